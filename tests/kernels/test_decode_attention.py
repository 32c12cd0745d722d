"""One suite for every backend of decode attention, against dense attention in float64 that knows no pages.

Pages lie in random order; every slot that no sequence owns holds nan (int8: a large number), so that reading one shows.
The Mosaic kernel runs in JAX's interpreter; benchmarks/decode/bench.py repeats the comparison on the device.
"""

import contextlib
import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import decode_attention, decode_attention_implementation
from pallas_kernels.decode_attention import pallas_mosaic_gpu_short as short
from pallas_kernels.decode_attention.api import attend_new_token
from pallas_kernels.decode_attention.inputs import Options
from pallas_kernels.decode_attention.schedule import make_schedule

mosaic_gpu = importlib.import_module("pallas_kernels.decode_attention.pallas_mosaic_gpu")

PLAIN = ("reference", "xla")


def oracle(q, k, v, lengths, *, window=None, soft_cap=None, scale=None, sinks=None):
    """[B, T, N, Hv] in float64; k, v are lists of [length, K, H], one for each sequence."""
    B, T, N, H = q.shape
    out = np.zeros((B, T, N, v[0].shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        position = int(lengths[b]) - T + t
        seen = np.arange(0 if window is None else max(0, position - window + 1), position + 1)
        if len(seen) == 0:
            continue
        head = n * k[b].shape[1] // N
        logits = k[b][seen, head] @ np.asarray(q[b, t, n], np.float64) * (H**-0.5 if scale is None else scale)
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        top = max(logits.max(), -np.inf if sinks is None else float(sinks[n]))
        p = np.exp(logits - top)
        total = p.sum() + (0.0 if sinks is None else np.exp(float(sinks[n]) - top))
        out[b, t, n] = p @ v[b][seen, head] / total
    return out


def case(rng, *, lengths, T=1, N=4, K=2, H=16, Hv=None, page=16, dtype=jnp.float32, pages_dtype=None, scales="page"):
    """The arguments of a call, and what the oracle takes for them. scales: of each "page", "token", or None."""
    Hv, pages_dtype = Hv or H, pages_dtype or dtype
    B, M = len(lengths), max(1, -(-max(lengths) // page)) + 1
    count = B * M + 3
    owned = rng.permutation(count)[: B * M].reshape(B, M)
    size, garbage = {jnp.int8: (40, 127), jnp.int4: (4, 7)}.get(pages_dtype, (1, np.nan))
    table = np.full((B, M), -1, np.int32)  # past a sequence's last page nothing stands that could be followed
    arrays, dense = [], []
    for width in (H, Hv):
        pages = np.full((count, page, K, width), garbage)
        scale = np.exp(rng.normal(size=(count, page, K) if scales == "token" else (count, K))).astype(np.float32)
        rows = []
        lost = np.setdiff1d(
            np.arange(count), np.concatenate([owned[b, : -(-n // page)] for b, n in enumerate(lengths)])
        )
        for b, length in enumerate(lengths):
            used = owned[b, : -(-length // page)]
            table[b, : len(used)] = used
            values = rng.normal(size=(length, K, width)) * size
            values = np.asarray(jnp.asarray(values, jnp.float32).astype(pages_dtype).astype(jnp.float32), np.float64)
            for i in range(length):
                pages[used[i // page], i % page] = values[i]
            own = scale[used].reshape(-1, K) if scales == "token" else scale[used].repeat(page, axis=0)
            rows.append(values * own[:length, :, None] if pages_dtype != dtype and scales else values)
            if scales == "token":  # past the end nothing stands that could be multiplied with
                scale[used[-1:], (length - 1) % page + 1 :] = np.nan
        scale[lost] = np.nan
        arrays += [jnp.asarray(pages, jnp.float32).astype(pages_dtype), jnp.asarray(scale)]
        dense.append(rows)
    q = jnp.asarray(rng.normal(size=(B, T, N, H)), dtype)
    k_pages, k_scales, v_pages, v_scales = arrays
    args = q, k_pages, v_pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)
    more = {"k_scales": k_scales, "v_scales": v_scales} if pages_dtype != dtype and scales else {}
    return args, more, dense


def check(rng, implementation, *, bound, options=None, sinks=False, **sizes):
    args, more, (k, v) = case(rng, **sizes)
    options = dict(options or {})
    if sinks:
        options["sinks"] = jnp.asarray(rng.normal(size=args[0].shape[2]), jnp.float32)
    interpreter = plgpu.force_gpu_interpret_mode() if implementation == "mosaic_gpu" else contextlib.nullcontext()
    with interpreter:
        got = jax.jit(lambda *a: decode_attention(*a, **more, **options, implementation=implementation))(*args)
    exact = oracle(np.asarray(args[0], np.float64), k, v, sizes["lengths"], **options)
    assert got.dtype == args[0].dtype and got.shape == exact.shape
    got = np.asarray(got, np.float64)
    error = np.linalg.norm(got - exact) / max(np.linalg.norm(exact), 1e-30)
    assert error < bound, error
    blind = ~np.any(exact, axis=3)
    assert not np.any(got[blind])


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": [1, 40, 16, 0, 33], "page": 16},
        {"lengths": [5, 2, 300, 0], "T": 4, "N": 6, "K": 1, "page": 64, "Hv": 8},  # a length below T; MQA
        {"lengths": [129, 1100], "T": 8, "N": 2, "K": 2, "page": 128},  # MHA, more keys than xla gathers at a time
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"window": 7}, {"soft_cap": 2.0, "scale": 0.5, "sinks": True}], ids=["plain", "window", "cap"]
)
def test_float32_pages(rng, implementation, sizes, options):
    options = dict(options)
    check(rng, implementation, bound=1e-5, sinks=options.pop("sinks", False), options=options, **sizes)


@pytest.mark.parametrize("implementation", PLAIN)
@pytest.mark.parametrize(
    ("pages_dtype", "scales"),
    [
        (jnp.bfloat16, None),
        (jnp.int8, "page"),
        (jnp.int8, "token"),
        (jnp.int4, "token"),
        (jnp.float8_e4m3fn, "token"),
        (jnp.float8_e4m3fn, None),
        (jnp.float8_e5m2, "page"),
    ],
)
def test_pages_of_4_to_16_bits(rng, implementation, pages_dtype, scales):
    check(
        rng, implementation, bound=1e-2, lengths=[70, 3, 0], T=2, N=8, dtype=jnp.bfloat16, pages_dtype=pages_dtype,
        scales=scales,
    )  # fmt: skip


@pytest.fixture
def small_gpu(monkeypatch):
    """The Mosaic kernel that cuts sequences, on two multiprocessors: few enough for the interpreter."""
    monkeypatch.setattr(mosaic_gpu, "fits", lambda inputs: False)
    tuned = mosaic_gpu.tuned
    monkeypatch.setattr(mosaic_gpu, "tuned", lambda *sizes: dataclasses.replace(tuned(*sizes), blocks=2))


@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": [200, 5, 0, 64], "page": 64, "H": 64, "N": 6, "K": 3},
        {"lengths": [130, 3, 90], "T": 4, "page": 16, "H": 64, "K": 1, "sinks": True,
         "options": {"window": 50, "soft_cap": 5.0}},
        {"lengths": [300, 129], "T": 8, "page": 128, "H": 64, "N": 32, "Hv": 128},  # 128 rows: two blocks
        {"lengths": [200, 5], "page": 16, "H": 128, "K": 1, "pages_dtype": jnp.int8},
        {"lengths": [70], "page": 128, "H": 128, "K": 4, "pages_dtype": jnp.float8_e4m3fn, "scales": None},
        {"lengths": [200, 0, 9], "page": 64, "H": 128, "K": 2, "pages_dtype": jnp.int8, "scales": "token"},
        {"lengths": [75], "page": 8, "H": 128, "K": 1, "pages_dtype": jnp.float8_e4m3fn, "scales": "token"},
    ],
    ids=["ragged", "window", "two blocks", "int8", "fp8", "int8 tokens", "fp8 tokens"],
)  # fmt: skip
def test_mosaic_gpu(rng, small_gpu, sizes):
    check(rng, "mosaic_gpu", bound=1e-2, dtype=jnp.bfloat16, **sizes)


@pytest.mark.parametrize(
    "sizes",
    [
        {"lengths": [200, 5, 0, 64], "page": 64, "H": 64, "N": 6, "K": 3},
        {"lengths": [330, 3, 190], "T": 4, "page": 16, "H": 64, "K": 1, "sinks": True,
         "options": {"window": 150, "soft_cap": 5.0}},
        {"lengths": [700], "page": 128, "H": 128, "N": 8, "K": 2, "sinks": True},  # the slots of tiles go round
        {"lengths": [66, 150], "T": 8, "page": 64, "H": 128, "N": 8, "K": 1},  # 64 rows
    ],
    ids=["ragged", "window", "long", "64 rows"],
)  # fmt: skip
def test_mosaic_gpu_short(rng, sizes):
    """The kernel that has a sequence's head in one block."""
    check(rng, "mosaic_gpu", bound=1e-2, dtype=jnp.bfloat16, **sizes)


@pytest.mark.parametrize("implementation", [*PLAIN, "mosaic_gpu"])
def test_table_counts_from_the_first_page(rng, implementation):
    dtype = jnp.bfloat16 if implementation == "mosaic_gpu" else jnp.float32
    page = int(rng.choice([32, 128]))
    (q, k, v, table, lengths), _, _ = case(rng, lengths=[100, 30], page=page, H=64, dtype=dtype)
    table = table[:, : -(-100 // page)]
    interpreter = plgpu.force_gpu_interpret_mode() if implementation == "mosaic_gpu" else contextlib.nullcontext()
    with interpreter:
        run = jax.jit(lambda *a, first=None: decode_attention(*a, first_page=first, implementation=implementation))
        want = run(q, k, v, table, lengths)
        before = lambda x: jnp.concatenate([jnp.full((3, *x.shape[1:]), jnp.nan, x.dtype), x])
        got = run(q, before(k), before(v), table, lengths, first=jnp.int32(3))
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def new_token(rng, *, positions, N, K, H, S=192, L=2, P=2):
    """The arguments of `attend_new_token`; slots that hold nothing yet hold nan."""
    B = len(positions)
    caches = np.asarray(rng.normal(size=(2, L, B, S, K, H)), np.float32)
    for b, p in enumerate(positions):
        if p < S:
            caches[:, :, b, max(p, 0) :] = np.nan
    angle = rng.uniform(0, 2 * np.pi, (B, H // 2))
    parts = jnp.asarray(rng.normal(size=(P, B, N + 2 * K, H)), jnp.float32 if P > 1 else jnp.bfloat16)
    turn = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    index, positions = jnp.int32(rng.integers(L)), jnp.asarray(positions, jnp.int32)
    return parts, *jnp.asarray(caches, jnp.bfloat16), index, positions, *turn


def new_token_oracle(parts, k_cache, v_cache, index, positions, cos, sin, **options):
    """Attention and both caches in float64, of rows rotated as complex numbers."""
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    S, K, H = k_cache.shape[2:]
    total = wide(parts.astype(jnp.float32).sum(axis=0).astype(jnp.bfloat16))
    turned = (total[..., : H // 2] + 1j * total[..., H // 2 :]) * (wide(cos) + 1j * wide(sin))[:, None]
    turned = wide(jnp.asarray(np.concatenate([turned.real, turned.imag], axis=-1), jnp.bfloat16))
    N = total.shape[1] - 2 * K
    k, v = wide(k_cache), wide(v_cache)
    for b, p in enumerate(np.asarray(positions)):
        if 0 <= p < S:
            k[index, b, p], v[index, b, p] = turned[b, N : N + K], total[b, N + K :]
    lengths = np.clip(np.asarray(positions) + 1, 0, S)
    seen = [[x[index, b, :n] for b, n in enumerate(lengths)] for x in (k, v)]
    return oracle(turned[:, None, :N], *seen, lengths, **options)[:, 0], k, v


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"N": 8, "K": 2, "H": 128}, {}),
        ({"N": 14, "K": 2, "H": 128, "P": 1}, {"window": 70}),
        ({"N": 8, "K": 8, "H": 64, "P": 3}, {"soft_cap": 5.0, "scale": 0.2}),
        ({"N": 36, "K": 4, "H": 64, "S": 64}, {"window": 1}),  # nine heads of queries for each of keys
    ],
    ids=["plain", "window", "cap", "window of one"],
)
def test_new_token(rng, implementation, sizes, options):
    """At the first slot, at the last, at a tile's first, anywhere, and outside of the cache."""
    S = sizes.get("S", 192)
    positions = [0, S - 1, 64 % S, int(rng.integers(S)), [-1, S, S + 7][rng.integers(3)]]
    args = new_token(rng, positions=positions, **sizes)
    with plgpu.force_gpu_interpret_mode() if implementation == "mosaic_gpu" else contextlib.nullcontext():
        run = jax.jit(lambda *a: attend_new_token(*a, **options, implementation=implementation))
        out, *caches = run(*args)
    want, *filled = new_token_oracle(*args, **options)
    assert out.dtype == jnp.bfloat16 and out.shape == want.shape
    # XLA may leave out the rounding before the rotation: a bit of a key, which sharp logits amplify.
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0.05, atol=0.03 * np.abs(want).max())
    for got, before, after in zip(caches, args[1:3], filled, strict=True):
        got, before = (np.asarray(x.astype(jnp.float32), np.float64) for x in (got, before))
        written = np.zeros(got.shape[:3], bool)
        for b, p in enumerate(positions):
            if 0 <= p < S:
                written[args[3], b, p] = True
        np.testing.assert_array_equal(got[~written], before[~written])
        np.testing.assert_allclose(got[written], after[written], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("config", [short.Config(workers=1), short.Config(workers=3, stages=1)], ids=str)
def test_new_token_with_other_warpgroups(rng, config):
    args = new_token(rng, positions=[300, 63, 130], N=8, K=2, H=64, S=320)
    with plgpu.force_gpu_interpret_mode():
        out, *_ = jax.jit(lambda *a: short.attend_new_token(*a, Options(None, 0.1, None), config))(*args)
    want, *_ = new_token_oracle(*args, scale=0.1)
    assert np.linalg.norm(np.asarray(out, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_which_caches_take_a_new_token():
    new = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    assert short.unfit_new_token(new(2, 16, 1024, 8, 128), 32) is None
    for cache in (new(2, 16, 4096, 8, 128), new(2, 16, 1000, 8, 128), new(2, 16, 1024, 8, 256), new(2, 2, 64, 1, 64)):
        assert short.unfit_new_token(cache, 1)
    assert "float16" in str(short.unfit_new_token(new(2, 16, 1024, 8, 128, dtype=jnp.float16), 32))
    parts, cache, row = jnp.zeros((1, 2, 16, 8)), jnp.zeros((1, 2, 4, 8, 8)), jnp.zeros((2, 4))
    with pytest.raises(ValueError, match="sizes disagree"):
        attend_new_token(parts, cache, cache, jnp.int32(0), jnp.zeros(2, jnp.int32), row, row)


@pytest.mark.parametrize("window", [None, 100])
def test_every_tile_has_one_worker(rng, window):
    lengths = rng.integers(0, 2000, size=13) * rng.integers(0, 2, size=13)
    items, workers, tile, T = 6, 7, 64, 3
    sequences, spans, (chunk,) = (
        np.asarray(x) for x in make_schedule(jnp.asarray(lengths, jnp.int32), T, items, tile, window, workers)
    )
    owners = np.zeros((13, items, 40), int)
    parts = []
    for w, (first, last) in enumerate(spans):
        done = 0
        for i in range(first, last):
            _, offset, tiles, begin = sequences[i // items]
            begin += i % items * tiles
            lo, hi = max(w * chunk - begin, 0), min((w + 1) * chunk - begin, tiles)
            owners[i // items, i % items, offset + lo : offset + max(lo, hi)] += 1
            done += max(hi - lo, 0)
            parts.append(i + w)
        assert done <= chunk
    for b, length in enumerate(lengths):
        first = 0 if window is None else max(length - T + 1 - window, 0) // tile
        expected = np.zeros(40, int)
        expected[first : -(-length // tile)] = 1
        np.testing.assert_array_equal(owners[b], np.broadcast_to(expected, owners[b].shape))
    assert len(set(parts)) == len(parts) and max(parts, default=0) < 13 * items + workers


def test_heads_under_shard_map(rng):
    args, _, (k, v) = case(rng, lengths=[20, 35], N=8, K=4)
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
    heads, whole = P(None, None, "tp"), P()
    specs = (heads, heads, heads, whole, whole)
    with jax.set_mesh(mesh):
        args = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
        got = jax.jit(jax.shard_map(decode_attention, in_specs=specs, out_specs=heads))(*args)
    exact = oracle(np.asarray(args[0], np.float64), k, v, [20, 35])
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=1e-4, atol=1e-5)


def test_which_backend_runs(rng):
    args, _, _ = case(rng, lengths=[20])
    assert decode_attention_implementation(*args) == "xla"
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        decode_attention(*args, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="unknown"):
        decode_attention(*args, implementation="cudnn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 9, 4, 16)}, "1 to 8 query tokens"),
        ({"q": (2, 1, 3, 16)}, "3 query heads are not divisible by 2 kv heads"),
        ({"q": (2, 1, 4, 8)}, "sizes disagree"),
        ({"v_pages": (5, 8, 2, 16)}, "sizes disagree"),
        ({"k_pages": (0, 16, 2, 16), "v_pages": (0, 16, 2, 16)}, "at least one"),
        ({"lengths": (3,)}, "sizes disagree"),
        ({"lengths": (2, 1)}, "takes q"),
        ({"k_scales": (5, 2)}, "pages of fewer bits"),
        ({"sinks": (3,)}, r"sinks must be floating \[N=4\]"),
        ({"window": 0}, "at least the query itself"),
        ({"soft_cap": -1.0}, "soft_cap must be positive"),
    ],
)
def test_bad_input(change, message):
    shapes = {
        "q": (2, 1, 4, 16),
        "k_pages": (5, 16, 2, 16),
        "v_pages": (5, 16, 2, 16),
        "page_table": (2, 3),
        "lengths": (2,),
    }
    shapes |= change
    dtypes = {"page_table": jnp.int32, "lengths": jnp.int32}
    kwargs: dict[str, Any] = {
        x: jnp.zeros(s, dtypes.get(x, jnp.float32)) if isinstance(s, tuple) else s for x, s in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        decode_attention(**kwargs)


def test_no_sequences():
    q, pages = jnp.ones((0, 1, 4, 16)), jnp.ones((5, 16, 2, 16))
    out = decode_attention(q, pages, pages, jnp.zeros((0, 3), jnp.int32), jnp.zeros(0, jnp.int32))
    assert out.shape == q.shape and out.dtype == q.dtype


def test_bad_dtypes():
    kwargs: dict[str, Any] = {
        "q": jnp.zeros((2, 1, 4, 16), jnp.bfloat16),
        "k_pages": jnp.zeros((5, 16, 2, 16), jnp.int8),
        "v_pages": jnp.zeros((5, 16, 2, 16), jnp.int8),
        "page_table": jnp.zeros((2, 3), jnp.int32),
        "lengths": jnp.zeros((2,), jnp.int32),
    }
    with pytest.raises(ValueError, match="int8 pages need k_scales"):
        decode_attention(**kwargs)
    with pytest.raises(ValueError, match="must be float32"):
        decode_attention(**kwargs, k_scales=jnp.ones((5, 3)), v_scales=jnp.ones((5, 2)))
    with pytest.raises(ValueError, match="Got bfloat16, float32, int8"):
        decode_attention(**kwargs | {"k_pages": jnp.zeros((5, 16, 2, 16))})
    with pytest.raises(ValueError, match="must be int32"):
        decode_attention(**kwargs | {"lengths": jnp.zeros((2,), jnp.uint32)})
