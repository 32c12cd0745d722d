"""What the graph alone tells: axes, roles, structure; names in the user's tree play no part."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import ragged_dot
from sharding_rules import evaluate, infer, search
from sharding_rules.dims import Atom, concatenate, cut, expand, fresh, root, size_of, split, take, unify
from sharding_rules.explain import permutation
from tests.rules.models import CASES
from tests.rules.models.case import arrays
from tests.rules.models.language import LLAMA_TINY, llama


def _axes(name: str) -> dict[str, tuple]:
    fn, params, args = CASES[name].build(**CASES[name].tiny)
    model = infer(fn, params, *args)
    assert not model.unknown
    return {path: model.leaf_axes(i) for i, path in enumerate(model.paths)}


# Dims ----------------------------------------------------------------------------------------------------------------


def test_reshapes_split_and_merge_dims(rng):
    """Any chain of splits of one dim ends in atoms whose product is its size, common to all views of it."""
    for _ in range(50):
        primes = rng.choice([2, 3, 5], size=int(rng.integers(2, 6)))
        whole = fresh(int(primes.prod()))
        cuts = sorted(rng.choice(len(primes) + 1, size=2))
        for at in cuts:
            left, right = fresh(int(primes[:at].prod())), fresh(int(primes[at:].prod()))
            unify(whole, (*left, *right))
            assert expand(whole) == (*expand(left), *expand(right))
        assert size_of(expand(whole)) == primes.prod()


def test_sizes_that_do_not_factor_block_each_other():
    a, b = (*fresh(4), *fresh(3)), (*fresh(6), *fresh(2))
    unify(a, b)
    assert any(atom.blocked for atom in (*expand(a), *expand(b)))


def test_segments_follow_slices_and_splits():
    fused = fresh(96)
    q, k, v = cut(fused, 0, 64), cut(fused, 64, 80), cut(fused, 80, 96)
    assert q is not None
    assert k is not None
    assert v is not None
    heads = (*fresh(8), *fresh(8))
    unify(q, heads)
    unify(k, (*fresh(2), *fresh(8)))
    (atom,) = expand(fused)
    assert [size_of(s) for s in atom.segments or ()] == [64, 16, 16]
    assert split(atom, 8)  # [N*H | K*H | K*H] regrouped by H
    major, minor = expand(fused)
    assert (major.size, minor.size) == (12, 8)
    assert expand(heads)[1] is minor


def test_take_leaves_the_rest():
    atoms: list[Atom] = [*fresh(4), *fresh(6)]
    assert size_of(take(atoms, 3) or ()) == 3
    assert [a.size for a in atoms] == [4, 2]
    assert take(atoms, 16) is None


def test_a_shift_is_not_a_segment():
    assert cut(fresh(64), 0, 63) is None
    (joined,) = concatenate([fresh(63), fresh(1)])
    assert joined.segments is None


def test_every_union_ends_and_holds(rng):
    """Any chain of cuts, joins, splits and unions: parts and segments are strictly smaller than their atom, which is
    why unions end, and what was united stays the same dim."""

    def sound(atom: Atom):
        if atom.parts is not None:
            assert size_of(atom.parts) == atom.size
            assert all(1 < a.size < atom.size for a in atom.parts)
        if atom.segments is not None:
            assert sum(map(size_of, atom.segments)) == atom.size
            assert all(0 < size_of(s) < atom.size for s in atom.segments)
        for part in (*(atom.parts or ()), *(a for s in atom.segments or () for a in s)):
            sound(root(part))

    for _ in range(100):
        dims = [fresh(int(rng.choice([2, 3, 4, 6, 8, 12]))) for _ in range(3)]
        united = []
        for _ in range(12):
            a, b = (dims[int(i)] for i in rng.integers(len(dims), size=2))
            size, move = size_of(a), rng.integers(4)
            if move == 0:
                start, stop = sorted(rng.integers(size + 1, size=2))
                part = cut(a, int(start), int(stop))
                dims += [] if part is None else [part]
            elif move == 1 and size + size_of(b) <= 24:
                dims.append(concatenate([a, b]))
            elif move == 2:
                same = [d for d in dims if size_of(d) == size]
                united.append((a, same[int(rng.integers(len(same)))]))
                unify(*united[-1])
            elif size % 2 == 0:
                unify(a, (*fresh(size // 2), *fresh(2)))
            for dim in dims:
                for atom in dim:
                    sound(root(atom))
        for a, b in united:
            assert not size_of(a) or expand(a) == expand(b) or any(atom.blocked for atom in (*expand(a), *expand(b)))


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5, 8, 17, 64])
def test_bounds_of_groups(groups):
    """Starts and ends are slices of one array, shifted against each other: [b|a] is united with [a|b]."""

    def loss(p, x, sizes):
        bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes)])
        rows = bounds[1:] - bounds[:-1]
        y = jax.lax.ragged_dot(x, p, rows)
        return (y * y).sum()

    shapes = (arrays((groups, 16, 32)), arrays((24, 16)), jax.ShapeDtypeStruct((groups,), jnp.int32))
    model = infer(loss, *shapes)
    assert model.leaf_axes(0)[0] == ("experts" if groups > 1 else None)


# Structure -----------------------------------------------------------------------------------------------------------


def test_grouped_heads():
    axes = _axes("Llama (raw JAX, scanned)")
    assert axes["layers/wq"] == ("layers", "embed", "q_heads*head_dim")
    assert axes["layers/wk"] == axes["layers/wv"] == ("layers", "embed", "kv_heads*head_dim")
    assert axes["layers/wo"] == ("layers", "q_heads*head_dim", "embed")
    assert axes["layers/wg"] == axes["layers/wu"] == ("layers", "embed", "mlp")
    assert axes["layers/wd"] == ("layers", "mlp", "embed")
    assert axes["embed"] == ("vocab", "embed")


def test_unrolled_layers_are_one_axis():
    fn, params, args = llama(**{**LLAMA_TINY, "L": 5}, unroll=True)
    model = infer(fn, params, *args)
    scanned = infer(*(lambda f, p, a: (f, p, *a))(*llama(**{**LLAMA_TINY, "L": 5})))
    assert model.axes == scanned.axes
    assert len([a for a in model.logical if a.in_params and not a.why_whole]) <= 6


def test_fused_projections():
    axes = _axes("GPT-2")
    assert axes["h/0/attn/c_attn/w"][1].startswith("[q_heads")
    assert axes["h/0/attn/c_proj/w"] == ("q_heads*head_dim", "embed")
    assert _axes("Mamba")["layers/in_proj"] == ("layers", "embed", "[mlp|mlp]")
    assert _axes("GPT-NeoX")["layers/attention/query_key_value/w"][2].startswith("q_heads*")


def test_experts_and_tied_embeddings():
    axes = _axes("Mixtral")
    assert axes["layers/wg"] == ("layers", "experts", "embed", "mlp")
    assert axes["layers/router"] == ("layers", "embed", "experts")
    fn, params, args = CASES["Mamba"].build(**CASES["Mamba"].tiny)
    plan = evaluate(infer(fn, params, *args), {"tp": 4}, {"vocab": ("tp",)})
    assert plan.specs["embedding"] == P("tp", None)  # looked up and multiplied with: one decision


def test_lora_pairs_follow_their_base():
    axes = _axes("LoRA on Llama")
    for name, base in (("wq", 2), ("wv", 2)):
        assert axes[f"lora/{name}/b"][2] == axes[f"base/layers/{name}"][base]
    assert axes["lora/wd/a"][1] == axes["base/layers/wd"][1]


def test_a_square_weight_conflicts_with_itself(rng):
    """x + x @ W: both dims of W are the residual stream; any layout computes the same."""

    def loss(p, x):
        for w in p:
            x = x + jnp.tanh(x @ w)
        return (x * x).mean()

    params, x = [jnp.asarray(rng.normal(size=(16, 16)), jnp.float32) for _ in range(2)], jnp.ones((8, 16))
    model = infer(loss, params, x)
    assert model.leaf_axes(0)[0] == model.leaf_axes(0)[1]


@pytest.mark.parametrize("name", CASES)
def test_names_play_no_part(name, rng):
    """Every parameter renamed to a random string: the same specs, the same cost."""
    case = CASES[name]
    fn, params, args = case.build(**case.tiny)
    leaves, treedef = jax.tree.flatten(params)
    names = [f"{rng.integers(1 << 40):x}{i}" for i in range(len(leaves))]

    def renamed(p, *args):
        return fn(jax.tree.unflatten(treedef, [p[n] for n in names]), *args)

    mesh = {"dp": 2, "tp": 4}
    plan = search(infer(fn, params, *args), mesh, "v5e")
    other = search(infer(renamed, dict(zip(names, leaves, strict=True)), *args), mesh, "v5e")
    is_spec = lambda x: isinstance(x, P)
    assert [other.specs[n] for n in names] == jax.tree.leaves(plan.specs, is_leaf=is_spec)
    assert plan.prediction is not None
    assert other.prediction is not None
    assert other.prediction.seconds == pytest.approx(plan.prediction.seconds)


def test_control_flow_and_custom_rules():
    """while, cond, custom_vjp and remat hand dims on."""

    @jax.custom_vjp
    def act(x):
        return jax.nn.relu(x)

    act.defvjp(lambda x: (act(x), x), lambda x, g: (g * (x > 0).astype(g.dtype),))

    @jax.checkpoint
    def block(x, w):
        return x + act(x @ w["a"]) @ w["b"]

    def loss(p, x):
        x = jax.lax.cond(x[0, 0] > 0, lambda x: block(x, p[0]), lambda x: x * 2, x)
        x = jax.lax.fori_loop(0, 3, lambda _, x: block(x, p[0]), x)
        x = jax.lax.stop_gradient(jax.lax.while_loop(lambda x: x.sum() > 10.0, lambda x: block(x, p[1]) * 0.1, x)) + x
        return (x * x).mean()

    shapes = [arrays({"a": (16, 40), "b": (40, 16)})] * 2
    model = infer(loss, shapes, jax.ShapeDtypeStruct((8, 16), jnp.float32))
    assert not model.unknown
    plan = evaluate(model, {"tp": 8}, {model.leaf_axes(0)[1]: ("tp",), model.leaf_axes(2)[1]: ("tp",)})
    assert [w["a"] for w in plan.specs] == [P(None, "tp")] * 2
    assert [w["b"] for w in plan.specs] == [P("tp", None)] * 2


def test_the_heaviest_branch_counts():
    """Wherever it stands: its product is counted, the other's is not."""

    def loss(p, x, heavy_first):
        light, heavy = (lambda x: x * 2), (lambda x: jnp.tanh(x @ p["a"]) @ p["b"])
        x = jax.lax.cond(x[0, 0] > 0, *((heavy, light) if heavy_first else (light, heavy)), x)
        return (x * x).mean()

    shapes, x = arrays({"a": (16, 40), "b": (40, 16)}), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    costs = []
    for heavy_first in (True, False):
        model = infer(functools.partial(loss, heavy_first=heavy_first), shapes, x)
        assert (
            sum(count * step.flops for step, count in model.steps.items()) == 5 * 2 * 8 * 16 * 40
        )  # two forward, three backward
        plan = evaluate(model, {"fsdp": 2, "tp": 4}, {model.leaf_axes(0)[1]: ("tp",)})
        costs.append(sorted((t.kind, t.payload, t.count) for t in plan.prediction.traffic))
        assert any(t.axes == ("tp",) and t.kind == "all-reduce" for t in plan.prediction.traffic)
    assert costs[0] == costs[1]


def test_layers_of_a_counting_loop():
    """fori_loop takes layers by its counter: they are layers all the same."""

    def loss(p, x):
        x = jax.lax.fori_loop(0, 5, lambda i, x: x + jnp.tanh(x @ p["a"][i]) @ p["b"][i], x)
        return (x * x).mean()

    model = infer(loss, arrays({"a": (5, 16, 40), "b": (5, 40, 16)}), jax.ShapeDtypeStruct((8, 16), jnp.float32))
    assert [model.leaf_axes(i)[0] for i in range(2)] == ["layers", "layers"]
    assert evaluate(model, {"tp": 8}, {model.leaf_axes(0)[2]: ("tp",)}).specs == {
        "a": P(None, None, "tp"),
        "b": P(None, "tp", None),
    }


def test_experts_of_a_grouped_matmul_in_a_loop():
    """At large sizes ragged_dot is a loop over tiles that takes an expert by index."""

    def loss(p, x, sizes):
        h = jax.nn.silu(ragged_dot(x, p["up"], sizes, implementation="xla"))
        y = ragged_dot(h, p["down"], sizes, implementation="xla")
        return (y * y).mean()

    shapes = arrays({"up": (8, 64, 96), "down": (8, 96, 64)})
    model = infer(loss, shapes, arrays((1 << 14, 64)), jax.ShapeDtypeStruct((8,), jnp.int32))
    assert model.leaf_axes(0)[0] == model.leaf_axes(1)[0] == "experts"
    plan = search(model, {"dp": 2, "ep": 4, "tp": 2})
    assert any("experts is not split over ep=4: a loop takes one at a time" in note for note in plan.notes)


# Bad input -----------------------------------------------------------------------------------------------------------


def test_an_unknown_primitive_is_named_and_never_split():
    def loss(p, x):
        h = x @ p["a"]
        h = jnp.fft.irfft(jnp.fft.rfft(h, axis=-1), n=h.shape[-1], axis=-1)
        return (h @ p["b"]).sum()

    model = infer(loss, arrays({"a": (16, 32), "b": (32, 16)}), jax.ShapeDtypeStruct((8, 16), jnp.float32))
    assert "fft" in model.unknown
    plan = search(model, {"tp": 8})
    assert plan.specs["a"][1] is None
    assert plan.specs["b"][0] is None
    assert any("fft is not known" in note for note in plan.notes)


def test_the_users_own_error_comes_through():
    def loss(p, x):
        return (x @ p).sum()  # here

    with pytest.raises(TypeError, match="dot_general") as error:
        infer(loss, jnp.ones((3, 4)), jnp.ones((5, 7)))
    (note,) = (note for note in error.value.__notes__ if "infer its sharding rules" in note)
    assert re.search(r"at .*test_infer.py:\d+: return \(x @ p\).sum\(\)  # here", note)


def test_shapes_are_enough():
    fn, params, args = llama(**{**LLAMA_TINY, "D": 1 << 16, "V": 1 << 18, "F": 1 << 18})
    assert infer(fn, params, *args).sizes["mlp"] == 1 << 18


def test_the_permutation_of_segments():
    """A contiguous split of the permuted dim gives each device its part of every segment."""
    sizes, n = [8, 4, 4], 4
    parts = np.split(np.array(permutation(sizes, n)), n)
    for r, part in enumerate(parts):
        want = np.concatenate([np.split(np.arange(a, b), n)[r] for a, b in ((0, 8), (8, 12), (12, 16))])
        np.testing.assert_array_equal(part, want)


def test_functions_that_are_not_losses():
    model = infer(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], arrays({"a": (16, 32), "b": (32, 16)}), tokens_like())
    assert not model.train
    assert evaluate(model, {"tp": 8}, {model.leaf_axes(0)[1]: ("tp",)}).specs == {
        "a": P(None, "tp"),
        "b": P("tp", None),
    }


def tokens_like():
    return jax.ShapeDtypeStruct((8, 16), jnp.float32)
