"""Context parallelism against one device: values, logsumexps, gradients in float32; random documents and layouts."""

import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from jaxscale.parallel import context, context_blocks, context_queries, context_ring, context_rows
from jaxscale.parallel.context_layout import layout_order, permute, restore
from jaxscale.plan.hlo import census

B, T, H = 2, 64, 8
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 11},
    "sides": {"window": (5, 9)},
    "packed": {"causal": True},
    "packed window": {"causal": True, "window": 20},
}
RINGS = ("all_gather", "ring", "bidirectional", "ulysses", "usp")


def make_mesh(cp):
    return Mesh(np.array(jax.devices()[:cp]), ("cp",), axis_types=(AxisType.Explicit,))


def documents(rng):
    """Positions and segment ids of random rows, the end padded; documents cross whatever boundary there is."""
    ids = np.sort(rng.integers(1, 6, (B, T)), axis=1).astype(np.int32)
    first = np.array([np.searchsorted(row, row) for row in ids])
    ids[:, T - rng.integers(0, 6) :] = 0
    return np.where(ids > 0, np.arange(T) - first, 0).astype(np.int32), ids


def score(attend, q, k, v, weight, lse_weight):
    """A scalar with random cotangents on the output and on the logsumexp of rows that saw something."""
    out, lse = attend(q, k, v, return_lse=True)
    total = (out * weight).sum() + (jnp.where(lse == -jnp.inf, 0.0, lse) * lse_weight).sum()
    return total, (out, lse)


grads_of = functools.partial(jax.value_and_grad, argnums=(1, 2, 3), has_aux=True)


def compare(rng, cp, cases, N, K, Hv=H, rows=None, order=None):
    """Runs (strategy, layout, mask) cases in one program on cp devices and checks each against one device.

    rows: positions and segment ids; order: that of "packed" rows, by default the planner's.
    """
    arrays = [rng.normal(size=(B, T, n, h)).astype("f") for n, h in ((N, H), (K, H), (K, Hv), (N, Hv))]
    arrays.append(rng.normal(size=(B, T, N)).astype("f"))
    rows = documents(rng) if rows is None else rows
    masks = {mask for _, _, mask in cases}

    def single(mask):
        extra = {"positions": rows[0], "segment_ids": rows[1]} if "packed" in mask else {}
        return functools.partial(pallas_kernels.attention, **MASKS[mask], **extra)

    def references(*arrays):
        return {m: grads_of(score)(single(m), *arrays) for m in sorted(masks)}

    expected = jax.device_get(jax.jit(references)(*arrays))
    mesh = make_mesh(cp)
    orders = {layout: layout_order(layout, T, cp, *rows) for layout in {layout for _, layout, _ in cases}}
    orders |= {} if order is None else {"packed": order}
    orders = {layout: np.broadcast_to(order, (B, T)) for layout, order in orders.items()}
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "cp")))
        dealt = {name: [put(permute(x, order)) for x in (*arrays, *rows)] for name, order in orders.items()}

        def all_cases(dealt):
            out = {}
            for strategy, layout, mask in cases:
                *given, positions, ids = dealt[layout]
                kwargs = dict(strategy=strategy, layout=layout, **MASKS[mask])
                extra = (positions, ids) if "packed" in mask else ()

                def attend(q, k, v, return_lse, kwargs=kwargs, extra=extra):
                    names = ("positions", "segment_ids")

                    def body(q, k, v, *extra):
                        return context.attention(q, k, v, **kwargs, **dict(zip(names, extra)), return_lse=return_lse)

                    return jax.shard_map(body, out_specs=P(None, "cp"))(q, k, v, *extra)

                out[strategy, layout, mask] = grads_of(score)(attend, *given)
            return out

        found = jax.device_get(jax.jit(all_cases)(dealt))
    for case in cases:
        order = orders[case[1]]
        ((_, (out, lse)), grads), ((_, (got, got_lse)), got_grads) = expected[case[2]], found[case]
        got_lse = restore(got_lse, order)
        np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(lse), err_msg=str(case))
        pairs = {"out": (out, got), "dq": (grads[0], got_grads[0])}
        pairs |= {"dk": (grads[1], got_grads[1]), "dv": (grads[2], got_grads[2])}
        for name, (a, b) in pairs.items():
            error = np.abs(restore(b, order) - a).max() / np.abs(a).max()
            assert error < 1e-5, f"{name} of {case}: {error:.1e}"
        seen = np.isfinite(lse)
        np.testing.assert_allclose(got_lse[seen], lse[seen], atol=1e-5, rtol=1e-5, err_msg=str(case))


def cases_of(cp, masks, strategies=RINGS):
    """Every strategy on every layout; halo where it applies."""
    out = []
    for strategy, mask in itertools.product(strategies, masks):
        layouts = ["contiguous", "zigzag", "striped"] + ["packed"] * ("packed" in mask)
        out += [(strategy, layout, mask) for layout in layouts]
    out += [("halo", "contiguous", m) for m in masks if "window" in m or m == "sides"]
    return out


def cover(rng, cases):
    """A random few of them in which every strategy, every layout and every mask occurs."""
    seen: set[tuple[int, str]] = set()
    picked = []
    for i in rng.permutation(len(cases)):
        if new := set(enumerate(cases[i])) - seen:
            seen |= new
            picked.append(cases[i])
    return picked


@pytest.mark.slow
@pytest.mark.parametrize(("cp", "N", "K"), [(2, 4, 2), (4, 4, 1), (8, 8, 8), (8, 8, 2)])
def test_parity(rng, cp, N, K):
    """Of all strategy x layout x mask cases others in each run; with EVERY_CASE=1 all of them, in 10 CPU minutes."""
    if os.environ.get("EVERY_CASE"):
        for mask in MASKS:
            compare(rng, cp, cases_of(cp, [mask]), N, K)
    else:
        compare(rng, cp, cover(rng, cases_of(cp, MASKS)), N, K)


@pytest.mark.parametrize("strategy", [*RINGS, "halo"])
def test_each_strategy(rng, strategy):
    """Packed rows with a window, on four devices: documents and windows cross every boundary."""
    layout = "contiguous" if strategy == "halo" else rng.choice(["zigzag", "striped", "packed"])
    mask = rng.choice(["packed", "packed window"]) if strategy != "halo" else "packed window"
    compare(rng, 4, [(strategy, str(layout), str(mask))], 4, 2)


@pytest.mark.parametrize("cp", [2, 4])
def test_whole_documents_stay(rng, cp, monkeypatch):
    """Of packed rows only what several devices hold travels: a part where that is enough, or else all, by what the rows
    hold."""
    for module in (context_ring, context_rows):
        monkeypatch.setattr(module, "PARTS", 8)
    taken = []
    for name in ("_forward", "_backward"):
        body = getattr(context_ring, name)

        def noted(*args, body=body):
            part = args[-1] if isinstance(args[-1], context_ring._Part) else None
            jax.debug.callback(lambda: taken.append(part.length if part else T // cp))
            return body(*args)

        monkeypatch.setattr(context_ring, name, noted)
    local = T // cp
    cut = local // 8  # tokens that a device holds of one document; the second row has none such
    sizes = [[cut * cp] + [local - cut] * cp, [local] * cp]
    ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in sizes]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in sizes]).astype(np.int32)
    parts, whole = np.arange(cut * cp).reshape(cp, cut), np.arange(cut * cp, T).reshape(cp, local - cut)

    def order(places):
        """The cut document's tokens stand at other places on each device, within a whole one."""
        row = [np.insert(own, place, part) for own, part, place in zip(whole, parts, places)]
        return np.stack([np.concatenate(row), np.arange(T)])

    places = rng.integers(0, local - cut, cp, endpoint=True)
    compare(rng, cp, [("ring", "packed", "packed")], 4, 2, rows=(positions, ids), order=order(places))
    assert set(taken) == {cut}, taken
    taken.clear()
    # Apart from each other they take more than that.
    apart = order(places)
    apart[0, :local] = np.concatenate([parts[0][:1], whole[0], parts[0][1:]])
    compare(rng, cp, [("ring", "packed", "packed window")], 4, 2, rows=(positions, ids), order=apart)
    assert set(taken) == {local}, taken


def test_queries_travel(rng):
    """As many kv heads as query heads: TokenRing moves queries. Fewer: keys go both ways."""
    q, k = (jax.ShapeDtypeStruct((1, 8, n, H), jnp.bfloat16) for n in (8, 4))
    assert context_queries.queries_travel(q, q, q)
    assert not context_queries.queries_travel(q, k, k)
    compare(rng, 4, [("bidirectional", "zigzag", "packed"), ("bidirectional", "contiguous", "causal")], 2, 2)


def test_heads_that_do_not_divide(rng):
    """Nine heads over two and four devices are padded; one kv head is sent to all."""
    compare(rng, 2, [("ulysses", "zigzag", "causal")], 9, 3)
    compare(rng, 4, [("ulysses", "striped", "packed")], 6, 1)


# What travels, as derived on paper.


def lowered(cp, strategy, layout="contiguous", packed=False, N=4, K=2, tokens=T, backward=True, **masks):
    mesh = make_mesh(cp)
    spec = P(None, "cp")
    kind = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    args = [kind(B, tokens, n, H) for n in (N, K, K)] + [kind(B, tokens, dtype=jnp.int32)] * (2 * packed)

    def body(q, k, v, *rows):
        extra = dict(zip(("positions", "segment_ids"), rows))
        return context.attention(q, k, v, strategy=strategy, layout=layout, **masks, **extra)

    def loss(q, k, v, *rows):
        return (jax.shard_map(body, out_specs=spec)(q, k, v, *rows) ** 2).sum()

    run = jax.grad(loss, (0, 1, 2)) if backward else lambda *args: jax.shard_map(body, out_specs=spec)(*args)
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*args)


def program(cp, *args, **kwargs):
    counted = census(lowered(cp, *args, **kwargs).compile(), mesh=make_mesh(cp))
    return {kind: axes["cp"] for kind, axes in counted.counts.items()}, counted


def test_census_all_gather():
    """K and V are gathered in each pass, dK and dV scattered; nothing is all-reduced."""
    counts, _ = program(4, "all_gather", "zigzag", causal=True)
    assert counts.pop("all-reduce", 0) <= 1  # the loss itself
    # (the CPU compiler writes a reduce-scatter as an all-to-all and a sum, or keeps it)
    assert counts.pop("reduce-scatter", 0) + counts.pop("all-to-all", 0) == 2
    assert counts == {"all-gather": 4}


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_census_ring(cp):
    """Forward: K and V take cp - 1 steps. Backward: again, and dK, dV take cp - 2 steps and one home."""
    forward, bytes_ = program(cp, "ring", "zigzag", causal=True, backward=False)
    assert forward == {"collective-permute": 2 * (cp - 1)}
    block = B * (T // cp) * 2 * H * 4  # one of K, V
    assert bytes_.wire_bytes("cp") == 2 * (cp - 1) * block
    counts, _ = program(cp, "ring", "zigzag", causal=True)
    counts.pop("all-reduce", None)
    assert counts == {"collective-permute": 2 * (cp - 1) * 3}


def test_census_packed_rows():
    """Positions and segment ids of all devices come in one gather, which both passes use. Of the two ways to go on the
    census counts the heavier one: all tokens travel."""
    counts, bytes_ = program(4, "ring", "packed", packed=True, causal=True, backward=False)
    assert counts == {"collective-permute": 6, "all-gather": 1}
    assert bytes_.wire_bytes("cp") == 3 * (T // 4) * B * (2 * 2 * H * 4 + 2 * 4)
    counts, _ = program(4, "ring", "packed", packed=True, causal=True)
    counts.pop("all-reduce", None)
    assert counts == {"collective-permute": 6 * 3, "all-gather": 1}


def test_census_bidirectional():
    """Keys (GQA): 4 of 8 places forward, 3 backward. Queries (MHA): 7 steps, and 7 parts (out, lse) sent back."""
    assert program(8, "bidirectional", "zigzag", causal=True, backward=False)[0] == {"collective-permute": 2 * 7}
    counts, _ = program(8, "bidirectional", "zigzag", causal=True, backward=False, K=4)
    assert counts == {"collective-permute": 7 + 2 * 7}


def test_census_ulysses():
    """q, k, v to heads, out and lse back (out alone without a gradient); in the backward pass q, k, v, dout and
    (lse, delta) to heads, dq, dk and dv back."""
    forward, _ = program(4, "ulysses", "zigzag", causal=True, K=4, backward=False)
    assert forward == {"all-to-all": 4}
    counts, _ = program(4, "ulysses", "zigzag", causal=True, K=4)
    counts.pop("all-reduce", None)
    assert counts == {"all-to-all": 5 + 5 + 3}


def test_census_usp():
    """Groups of two exchange heads; four groups' keys take three steps."""
    counts, _ = program(8, "usp", "zigzag", causal=True, backward=False)
    assert counts == {"all-to-all": 4, "collective-permute": 2 * 3}


def test_census_window():
    """A window of nine tokens before a query, blocks of eight: two neighbours, of the second one token. Ring sends
    whole blocks, and neither goes further."""
    counts, ring = program(8, "ring", causal=True, window=10, backward=False)
    assert counts == {"collective-permute": 2 * 2}
    token = B * 2 * H * 4
    assert ring.wire_bytes("cp") == 2 * 16 * token
    counts, halo = program(8, "halo", causal=True, window=10, backward=False)
    assert counts == {"collective-permute": 2 * 2}
    assert halo.wire_bytes("cp") == 2 * (8 + 1) * token


def test_the_past_is_not_sent_to_the_first_device():
    """Contiguous causal rows: keys go from each device to the next, and not around; gradients do, to come home."""
    text = lowered(4, "ring", causal=True, backward=False).as_text()
    pairs = [re.findall(r"\d+", x) for x in re.findall(r"source_target_pairs = dense<\[(.*?)\]>", text)]
    assert pairs == [["0", "1", "1", "2", "2", "3"]] * 6
    around = lowered(4, "ring", "zigzag", causal=True, backward=False).as_text()
    assert around.count("[3, 0]") == 6


def test_program_does_not_grow():
    """More steps are more trips of one loop."""
    mesh_sizes = {}
    for cp in (7, 8):
        mesh = make_mesh(cp)
        x = jax.ShapeDtypeStruct((1, 112, 2, H), jnp.float32, sharding=NamedSharding(mesh, P(None, "cp")))
        with jax.set_mesh(mesh):
            attend = functools.partial(context.attention, strategy="ring", causal=True)
            run = jax.shard_map(attend, out_specs=P(None, "cp"))
            mesh_sizes[cp] = jax.jit(jax.grad(lambda *a, run=run: run(*a).sum())).lower(x, x, x).as_text().count("\n")
    assert abs(mesh_sizes[8] - mesh_sizes[7]) < 0.02 * mesh_sizes[7]


def test_masked_blocks_are_skipped(monkeypatch):
    """The blocks that attention is computed on, counted as it runs: under a causal mask in a contiguous layout those of
    the past, in rows of two documents that end with a device's tokens none beyond."""
    seen = []
    block = context_blocks.block

    def counting(call, q, k, v, *rows):
        jax.debug.callback(lambda _: seen.append(1), q[0, 0, 0, 0])
        return block(call, q, k, v, *rows)

    for module in (context_blocks, context_ring):
        monkeypatch.setattr(module, "block", counting)
    mesh, ids = make_mesh(4), np.repeat(np.array([[1, 2]], np.int32), 32, axis=1)
    x = np.ones((1, 64, 2, H), "f")

    def run(**kwargs):
        seen.clear()

        def body(x, ids):
            extra = {"segment_ids": ids} if kwargs.pop("packed", False) else {}
            return context.attention(x, x, x, strategy="ring", **kwargs, **extra)

        with jax.set_mesh(mesh):
            put = [jax.device_put(a, NamedSharding(mesh, P(None, "cp"))) for a in (x, ids)]
            jax.block_until_ready(jax.jit(jax.shard_map(body, out_specs=P(None, "cp")))(*put))
            jax.effects_barrier()
        return len(seen)

    assert run() == 16
    assert run(causal=True) == 10
    assert run(causal=True, packed=True) == 6
    assert run(packed=True) == 8


# Decoding, errors.


def test_decode(rng):
    """A few queries, known to all, over a cache whose slots are split; slots beyond a row's position are empty."""
    q = rng.normal(size=(3, 2, 4, H)).astype("f")
    k, v = (rng.normal(size=(3, T, 2, H)).astype("f") for _ in range(2))
    last = rng.integers(1, T, 3)
    positions = (last[:, None] - np.array([1, 0])).astype(np.int32)
    slots = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T))
    expected, lse = pallas_kernels.attention(q, k, v, positions=(positions, slots), causal=True, return_lse=True)
    mesh = make_mesh(8)
    with jax.set_mesh(mesh):
        split = [jax.device_put(x, NamedSharding(mesh, P(None, "cp"))) for x in (k, v, slots)]
        whole = [jax.device_put(x, NamedSharding(mesh, P())) for x in (q, positions)]

        def body(q, positions, k, v, slots):
            return context.decode(q, k, v, positions=(positions, slots))

        run = jax.jit(jax.shard_map(body, out_specs=(P(), P())))
        got, got_lse = run(*whole, *split)
        counts = census(run.lower(*whole, *split).compile(), mesh=mesh).counts
    np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(got_lse, lse, atol=1e-6, rtol=1e-5)
    assert counts == {"all-reduce": {"cp": 2}}


def test_one_device(rng):
    compare(rng, 1, [(strategy, "contiguous", "causal") for strategy in ("ring", "all_gather", "ulysses")], 2, 1)


@pytest.mark.parametrize(
    ("match", "kwargs"),
    [
        ("cp=4 devices two equal chunks, but T=5", {"tokens": 20, "strategy": "ring", "layout": "zigzag"}),
        ("ulysses splits 2 query heads over 4", {"strategy": "ulysses", "N": 2}),
        ("halo needs", {"strategy": "halo", "causal": True}),
        ("halo needs", {"strategy": "halo", "causal": True, "window": 8, "layout": "zigzag"}),
        ("positions and segment_ids", {"strategy": "ring", "layout": "packed", "causal": True}),
        ("not 'auto' or one of", {"strategy": "rings"}),
        ("3 query heads are not divisible by 2", {"strategy": "ring", "N": 3}),
        ("ulysses_size=3 does not divide cp=4", {"strategy": "usp", "ulysses_size": 3}),
        ("layout='zag' is not one of", {"strategy": "ring", "layout": "zag"}),
        ("window is static", {"strategy": "halo", "window": np.ones((), np.int32), "causal": True}),
        (r"a pair >= 0. Got \(3, -2\)", {"strategy": "ring", "window": (3, -2)}),
        ("an int >= 1, or a pair >= 0. Got 0", {"strategy": "ring", "window": 0}),
    ],
)
def test_bad_input(match, kwargs):
    with pytest.raises(ValueError, match=match):
        program(4, **kwargs)


def test_keys_split_otherwise_than_queries():
    mesh, spec = make_mesh(4), P(None, "cp")
    q, k = (jax.ShapeDtypeStruct((1, n, 2, H), jnp.float32, sharding=NamedSharding(mesh, spec)) for n in (64, 32))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"queries and keys are split alike. Got T=16, S=8"):
        jax.jit(jax.shard_map(context.attention, out_specs=spec)).lower(q, k, k)


def test_two_sides_of_a_window_on_two_devices(rng):
    """Both devices need what the other holds, and each has one neighbour: keys go around though the window ends."""
    compare(rng, 2, [("ring", "contiguous", "sides"), ("ring", "contiguous", "window")], 2, 1)


def test_rows_of_keys_on_their_own(rng):
    """Positions and segments as pairs for queries and keys: keys stand three tokens later, and some are padding."""
    strategy = str(rng.choice(["ring", "bidirectional", "ulysses", "all_gather"]))
    (positions, ids), mesh = documents(rng), make_mesh(2)
    hidden = np.where(rng.random(ids.shape) < 0.2, 0, ids).astype(np.int32)
    pairs = {"positions": (positions, positions + 3), "segment_ids": (ids, hidden)}
    q, k, v = (rng.normal(size=(B, T, n, H)).astype("f") for n in (4, 4, 4))

    def loss(attend, q, k, v):
        return (attend(q, k, v) ** 2).sum()

    def split(q, k, v):
        def body(q, k, v, *rows):
            pairs = {"positions": rows[:2], "segment_ids": rows[2:]}
            return context.attention(q, k, v, strategy=strategy, causal=True, **pairs)

        rows = [put(x) for pair in pairs.values() for x in pair]
        return jax.shard_map(body, out_specs=P(None, "cp"))(q, k, v, *rows)

    expected = jax.grad(
        functools.partial(loss, functools.partial(pallas_kernels.attention, causal=True, **pairs)), (0, 1, 2)
    )(q, k, v)
    with jax.set_mesh(mesh):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, P(None, "cp")))
        found = jax.jit(jax.grad(functools.partial(loss, split), (0, 1, 2)))(put(q), put(k), put(v))
    for a, b in zip(expected, found):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max(), err_msg=strategy)
