"""One suite for every attention backend: values and gradients against a float64 oracle that shares no code with them.

Mosaic kernels run in JAX's interpreters here, at the smallest sizes that reach each path; benchmarks/attention/bench.py
repeats the comparison on the real device at real sizes before it times anything.
"""

import contextlib
import functools
import importlib
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    _dispatch,
    attention,
    attention_backward,
    attention_float8,
    attention_implementation,
)
from pallas_kernels.attention.blocks import coarser, key_ranges, query_ranges
from pallas_kernels.attention.inputs import ATTENTION, Inputs, Options, visible

# importlib: the package's attribute `attention` is the function.
xla = importlib.import_module("pallas_kernels.attention.xla")
mosaic_tpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_tpu")
mosaic_gpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu")
schedule = importlib.import_module("pallas_kernels.attention.schedule")
stored = importlib.import_module("pallas_kernels.attention.mosaic_gpu_stored")
fused = importlib.import_module("pallas_kernels.attention.mosaic_gpu_fused")
pieces = importlib.import_module("pallas_kernels.attention.mosaic_gpu_pieces")


def oracle(q, k, v, *, do, dlse, causal=False, segment_ids=None, positions=None, window=None, soft_cap=None, scale=None,
           sinks=None, bias=None):  # fmt: skip
    """o, lse and every gradient of sum(o * do) + sum(lse * dlse), row by row in numpy float64."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    scale = H**-0.5 if scale is None else scale
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    q_ids, kv_ids = (None, None) if segment_ids is None else pair(segment_ids)
    q_pos, kv_pos = (
        (np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)) if positions is None else pair(positions)
    )
    left, right = window if isinstance(window, tuple) else (None, None) if window is None else (int(window) - 1,) * 2
    full_bias = np.zeros((B, N, T, S)) if bias is None else np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    o, lse = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
    dq, dk, dv, dbias = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((B, N, T, S))
    dsinks = None if sinks is None else np.zeros(N)
    for b, n, t in np.ndindex(B, N, T):
        ahead = np.asarray(kv_pos[b], np.int64) - int(q_pos[b, t])
        see = np.ones(S, bool)
        if causal:
            see &= ahead <= 0
        if left is not None:
            see &= -ahead <= left
        if right is not None:
            see &= ahead <= right
        if q_ids is not None:
            see &= (np.asarray(kv_ids[b]) == int(q_ids[b, t])) & (int(q_ids[b, t]) != 0)
        keys, values = k[b, :, n * K // N], v[b, :, n * K // N]
        x = scale * keys @ q[b, t, n]
        tanh = np.tanh(x / soft_cap) if soft_cap else 0.0
        x = np.where(see, (soft_cap * tanh if soft_cap else x) + full_bias[b, n, t], -np.inf)
        sink = -np.inf if sinks is None else float(sinks[n])
        top = max(x.max(), sink)
        if top == -np.inf:
            lse[b, t, n] = -np.inf
            continue
        lse[b, t, n] = top + np.log(np.exp(x - top).sum() + np.exp(sink - top))
        p = np.exp(x - lse[b, t, n])
        o[b, t, n] = p @ values
        delta = do[b, t, n] @ o[b, t, n] - dlse[b, t, n]
        dx = p * (values @ do[b, t, n] - delta)
        dbias[b, n, t] = dx
        dx = dx * (1 - tanh**2)
        dv[b, :, n * K // N] += p[:, None] * do[b, t, n]
        dk[b, :, n * K // N] += scale * dx[:, None] * q[b, t, n]
        dq[b, t, n] = scale * dx @ keys
        if dsinks is not None:
            dsinks[n] -= np.exp(sink - lse[b, t, n]) * delta
    grads = {"q": dq, "k": dk, "v": dv}
    if sinks is not None:
        grads["sinks"] = dsinks
    if bias is not None:
        axes = tuple(i for i, d in enumerate(bias.shape) if d == 1)
        grads["bias"] = dbias.sum(axis=axes, keepdims=True)
    return o, lse, grads


def one(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def documents(rng, B, T, padding=0):
    """Ids of documents of mixed length, in order, then padding."""
    starts = np.sort(rng.choice(np.arange(1, T - padding), size=(B, 3)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= starts[:, None, :]).sum(axis=2)
    ids[:, T - padding :] = 0
    return jnp.asarray(ids, jnp.int32)


def restarting(ids):
    """Positions that count from 0 in each document."""
    ids = np.asarray(ids)
    first = np.stack(
        [np.searchsorted(np.where(row == 0, 1 << 20, row), np.where(row == 0, 1 << 20, row)) for row in ids]
    )
    return jnp.asarray(np.arange(ids.shape[1])[None] - first, jnp.int32)


def interpreter(name):
    if name == "mosaic_gpu":
        return plgpu.force_gpu_interpret_mode()
    return pltpu.force_tpu_interpret_mode() if name == "mosaic_tpu" else contextlib.nullcontext()


@contextlib.contextmanager
def chunks(limit):
    """xla.py with blocks of at most `limit` logits; 0 makes chunks of 128."""
    before = xla._ONE_BLOCK, xla._BLOCK_LOGITS
    xla._ONE_BLOCK, xla._BLOCK_LOGITS = 0, limit
    try:
        yield
    finally:
        xla._ONE_BLOCK, xla._BLOCK_LOGITS = before


def check(rng, name, B, T, S, N, K, H, Hv, dtype, *, value=None, grad=None, **kwargs):
    """Values and gradients of one backend against the oracle, by relative norm; rows that see nothing exactly."""
    value = value or (1e-5 if dtype == jnp.float32 else 1e-2)
    grad = grad or (1e-5 if dtype == jnp.float32 else 1e-2)
    q, k, v = one(rng, (B, T, N, H), dtype), one(rng, (B, S, K, H), dtype), one(rng, (B, S, K, Hv), dtype)
    do, dlse = one(rng, (B, T, N, Hv), dtype), one(rng, (B, T, N))
    leaves = {"q": q, "k": k, "v": v} | {x: kwargs.pop(x) for x in ("sinks", "bias") if x in kwargs}

    def loss(leaves):
        o, lse = attention(**leaves, **kwargs, return_lse=True, implementation=name)
        seen = jnp.where(lse == -jnp.inf, 0.0, lse)
        return jnp.sum((o * do).astype(jnp.float32)) + jnp.sum(seen * dlse), (o, lse)

    with interpreter(name):
        (_, (o, lse)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
        jax.block_until_ready(grads)
    want_o, want_lse, want = oracle(**leaves, **kwargs, do=do, dlse=dlse)
    assert o.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = ~np.isneginf(want_lse)
    np.testing.assert_allclose(np.asarray(lse)[finite], want_lse[finite], atol=1e-4 if dtype == jnp.float32 else 1e-3)
    assert not np.asarray(o, np.float64)[~finite].any()
    close("o", o, want_o, value)
    for leaf, x in want.items():
        assert grads[leaf].dtype == leaves[leaf].dtype
        # A sink's gradient is a sum of terms of both signs: the error counts against their size.
        close(f"d{leaf}", grads[leaf], x, 4 * grad if leaf == "sinks" else grad)


def close(what, got, want, tolerance):
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all(), what
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    assert error < tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e}"


# Each case: sizes (B, T, S, N, K, H, Hv) and what hides keys. `make` builds the keyword arguments from fresh numbers.
CASES = {
    "plain": ((2, 24, 24, 2, 2, 8, 8), lambda rng: {}),
    "causal, GQA": ((2, 33, 33, 6, 2, 8, 8), lambda rng: {"causal": True}),
    "MQA, Hv differs, S != T": ((1, 17, 40, 4, 1, 8, 12), lambda rng: {"causal": True}),
    "one query": ((2, 1, 19, 2, 1, 8, 8), lambda rng: {}),
    "one query, one key": ((1, 1, 1, 1, 1, 8, 8), lambda rng: {"causal": True}),
    "window int": ((1, 40, 40, 2, 2, 8, 8), lambda rng: {"causal": True, "window": 5}),
    "window pair": ((1, 40, 31, 2, 1, 8, 8), lambda rng: {"window": (3, 6)}),
    "window open": ((1, 40, 40, 2, 1, 8, 8), lambda rng: {"window": (None, 2), "scale": 0.3}),
    "window 1": ((1, 9, 9, 1, 1, 8, 8), lambda rng: {"window": 1}),
    "window traced": ((1, 40, 40, 2, 2, 8, 8), lambda rng: {"causal": True, "window": jnp.int32(rng.integers(1, 60))}),
    "documents": ((2, 50, 50, 2, 1, 8, 8), lambda rng: {"causal": True, "segment_ids": documents(rng, 2, 50)}),
    "padding": ((2, 50, 50, 2, 1, 8, 8), lambda rng: {"segment_ids": documents(rng, 2, 50, padding=11)}),
    "rows that see nothing": ((1, 30, 20, 2, 2, 8, 8), lambda rng: {"window": (4, 4), "causal": True}),
    "offsets of a ring step": (
        (1, 16, 24, 2, 2, 8, 8),
        lambda rng: {
            "causal": True,
            "positions": (jnp.arange(16, dtype=jnp.int32)[None] + 10, jnp.arange(24, dtype=jnp.int32)[None] + 12),
        },
    ),
    "soft cap, sinks": (
        (2, 26, 26, 4, 2, 8, 8),
        lambda rng: {"causal": True, "soft_cap": 1.5, "sinks": one(rng, (4,))},
    ),
    "sinks alone": (
        (1, 20, 12, 2, 2, 8, 8),
        lambda rng: {"window": (3, 0), "sinks": one(rng, (2,))},
    ),
    "bias": ((2, 20, 24, 4, 2, 8, 8), lambda rng: {"bias": one(rng, (1, 4, 20, 24)), "soft_cap": 2.0}),
    "bias per key": ((2, 20, 24, 4, 2, 8, 8), lambda rng: {"bias": one(rng, (2, 1, 1, 24)), "causal": True}),
    "bias per query": (
        (2, 20, 24, 4, 2, 8, 8),
        lambda rng: {"bias": one(rng, (1, 4, 20, 1)), "sinks": one(rng, (4,))},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_xla_matches_the_oracle(rng, case):
    sizes, make = CASES[case]
    check(rng, "xla", *sizes, jnp.float32, **make(rng))


@pytest.mark.parametrize("case", list(CASES)[2::4])
def test_the_reference_matches_the_oracle(rng, case):
    sizes, make = CASES[case]
    check(rng, "reference", *sizes, jnp.float32, **make(rng))


@pytest.mark.parametrize(
    ("sizes", "make"),
    [
        ((1, 150, 300, 2, 1, 8, 8), lambda rng: {"causal": True}),
        ((1, 300, 140, 2, 2, 8, 12), lambda rng: {"window": (20, 5), "sinks": one(rng, (2,))}),
        ((2, 200, 200, 2, 1, 8, 8), lambda rng: {"causal": True, "segment_ids": documents(rng, 2, 200, padding=20)}),
        ((1, 200, 200, 2, 2, 8, 8), lambda rng: {"soft_cap": 2.0, "bias": one(rng, (1, 2, 200, 200)), "window": 30}),
        ((2, 140, 200, 2, 1, 8, 8), lambda rng: {"bias": one(rng, (1, 2, 1, 200)), "window": jnp.int32(70)}),
    ],
)
def test_chunks_match_the_oracle(rng, sizes, make):
    with chunks(0):
        check(rng, "xla", *sizes, jnp.float32, **make(rng))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("limit", [None, 0])
def test_half_precision(rng, dtype, limit):
    with chunks(limit) if limit is not None else contextlib.nullcontext():
        check(rng, "xla", 1, 130, 130, 2, 1, 16, 16, dtype, causal=True)


def test_restarting_positions_with_segments(rng):
    ids = documents(rng, 2, 60, padding=5)
    for kwargs in ({"causal": True}, {"window": 7}):
        check(rng, "xla", 2, 60, 60, 2, 2, 8, 8, jnp.float32, segment_ids=ids, positions=restarting(ids), **kwargs)


# The Mosaic kernels, in the interpreters. Blocks of 64 and 128 keep them small; each case reaches what the others do
# not: several blocks, skipped and unmasked ones, ragged ends, groups of heads, rows that see nothing.


def small_blocks(monkeypatch, **gpu):
    monkeypatch.setattr(mosaic_tpu, "TUNED", mosaic_tpu.Config(128, 128))
    monkeypatch.setattr(mosaic_gpu, "tuned", lambda H, Hv: mosaic_gpu.Config(**({"block_kv": 64} | gpu)))


def test_mosaic_gpu_causal_documents(rng, monkeypatch):
    small_blocks(monkeypatch, warpgroups=int(rng.choice([2, 3])), block_kv=int(rng.choice([64, 128])))
    ids = documents(rng, 1, 150, padding=20)
    kwargs = {"causal": True, "segment_ids": ids, "sinks": one(rng, (2,))}
    check(rng, "mosaic_gpu", 1, 150, 150, 2, 1, 64, 128, jnp.bfloat16, **kwargs)


def test_mosaic_gpu_window_positions(rng, monkeypatch):
    small_blocks(monkeypatch, warpgroups_bwd=1, split_dkv=True)
    positions = jnp.arange(100, dtype=jnp.int32)[None] + 30, jnp.arange(260, dtype=jnp.int32)[None]
    kwargs = {"causal": True, "window": jnp.int32(50), "positions": positions, "soft_cap": 3.0}
    check(rng, "mosaic_gpu", 1, 100, 260, 1, 1, 64, 64, jnp.float16, **kwargs)


def test_mosaic_gpu_stored_gradient_of_logits(rng, monkeypatch):
    """dq and dk from what the kernel of dv stores: blocks on and off the diagonal, ragged, groups of heads; too large
    to be stored, all is made again."""
    wgs, block = int(rng.integers(1, 3)), int(rng.choice([64, 128]))
    small_blocks(monkeypatch, warpgroups_bwd=wgs, block_q_dkv=block, split_dkv=True)
    hidden = [{"causal": True}, {"causal": True, "window": 90}, {"window": (30, 60)}, {}][rng.integers(4)]
    window = hidden.get("window", (None, None))
    options = Options("causal" in hidden, window if isinstance(window, tuple) else (window - 1,) * 2, 0.1, None)
    inputs = Inputs(*(jnp.zeros((1, n, h, 64), jnp.bfloat16) for n, h in ((200, 2), (290, 1), (290, 1))))
    found = stored.Stored.of(inputs, options)
    assert found is not None
    _, blocks, *_ = found.shape(inputs)
    assert blocks == (3 if hidden.get("causal") else 5 if hidden else 6)  # of 2 x 3 blocks, counted on paper
    check(rng, "mosaic_gpu", 1, 200, 290, 2, 1, 64, 64, jnp.bfloat16, soft_cap=5.0, **hidden)
    at = [jnp.arange(n, dtype=jnp.int32)[None] for n in (200, 290)]
    given = inputs._replace(q_positions=at[0], kv_positions=at[1])  # as the models here do: what a plan counts on
    assert stored.Stored.of(given, options) is None
    monkeypatch.setattr(stored, "_MOST_BYTES", 2 * 2 * blocks * 128 * 128 - 1)
    assert stored.Stored.of(inputs, options) is None


def test_mosaic_gpu_backward_in_one_kernel(rng, monkeypatch):
    """One group of heads after another: all but the last walk up their queries. More steps than places in the rings; a
    head_dim of v of its own, which ends in another place of shared memory."""
    small_blocks(monkeypatch, fused=True)
    monkeypatch.setattr(fused, "pays", lambda inputs: True)
    monkeypatch.setattr(pieces, "_L2_BYTES", int(rng.choice([1, 2**25])))
    ids = documents(rng, 1, 210, padding=20)
    hidden = [
        {"causal": True},
        {"window": (70, 20), "soft_cap": 3.0},
        {"bias": one(rng, (1, 4, 1, 210))},
        {"causal": True, "segment_ids": ids, "positions": restarting(ids), "window": jnp.int32(50)},
    ][rng.integers(4)]
    check(rng, "mosaic_gpu", 1, 210, 210, 4, 2, 64, int(rng.choice([64, 128])), jnp.bfloat16, **hidden)


def test_each_block_of_queries_is_summed_in_one_order(rng):
    """Both orders name each tile that visits a block once, one after the other, and the last of them."""
    starts = rng.integers(0, 9, (2, 5))
    ranges = np.stack([starts, starts, starts, starts + rng.integers(0, 4, (2, 5))], axis=-1).astype(np.int32)
    visits, turns = fused._order(ranges, 12)
    for b, block in np.ndindex(2, 12):
        tiles = [t for t in range(5) if ranges[b, t, 0] <= block < ranges[b, t, 3]]
        assert tiles == list(np.flatnonzero(visits[b, :, block]))
        for order, there in zip(turns, (tiles[::-1], tiles)):
            assert [order[b, t, block] for t in there] == [2 * i + (i == len(there) - 1) for i in range(len(there))]


def test_mosaic_gpu_several_tiles_in_a_block(rng, monkeypatch):
    """The one block of the forward kernel goes on to the next tile: q from two places in turn, a ring of k and v; rows
    past the end are computed twice by tiles of three warpgroups."""
    small_blocks(monkeypatch, warpgroups=int(rng.choice([2, 3])), block_kv=int(rng.choice([64, 128])))
    monkeypatch.setattr(schedule, "SM_COUNT", 1)
    kwargs = {"window": (17, 0), "soft_cap": 3.0, "sinks": one(rng, (1,))}
    check(rng, "mosaic_gpu", 1, 270, 330, 1, 1, 64, 64, jnp.float16, **kwargs)


def test_mosaic_gpu_backward_of_a_ring_step(rng, monkeypatch):
    """Given the whole rows' logsumexp, at a head_dim that is filled up."""
    one_warpgroup = {"warpgroups_bwd": 1, "split_dkv": True}
    H, Hv, more = [(64, 64, {}), (80, 24, {}), (24, 200, one_warpgroup)][rng.integers(3)]
    small_blocks(monkeypatch, **more)
    at, ids = jnp.arange(140, dtype=jnp.int32)[None], documents(rng, 1, 140, padding=10)
    hidden = [{}, {"segment_ids": ids}, {"positions": (at + 20, at)}][rng.integers(3)]
    shapes = (2, H), (1, H), (1, Hv), (2, Hv)
    q, k, v, do = (one(rng, (1, 140, *shape), jnp.bfloat16) for shape in shapes)
    rows = one(rng, (1, 140, 2)) + 4.0, one(rng, (1, 140, 2))

    def grads(name, *arrays):
        f = functools.partial(attention_backward, causal=True, implementation=name, **hidden)
        return jax.block_until_ready(f(*arrays, *rows))

    with plgpu.force_gpu_interpret_mode():
        got = grads("mosaic_gpu", q, k, v, do)
    for x, y in zip(got, grads("xla", *(x.astype(jnp.float32) for x in (q, k, v, do))), strict=True):
        assert x.shape == y.shape
        close("gradient", x, np.asarray(y, np.float64), 1e-2)


def test_mosaic_gpu_one_query_of_many_heads(rng, monkeypatch):
    small_blocks(monkeypatch)
    check(rng, "mosaic_gpu", 1, 1, 70, 3, 1, 24, 80, jnp.bfloat16)  # filled up to 64 and 128


def test_mosaic_gpu_under_vmap(rng):
    """And gradients repeat bit by bit. (Remat refuses the interpreter's effects.)"""
    x = [one(rng, (2, 1, 70, 1, 64), jnp.bfloat16) for _ in range(3)]

    def grads(name):
        layer = functools.partial(attention, causal=True, implementation=name)
        loss = lambda *x: jnp.sum(jnp.sin(layer(*x).astype(jnp.float32)))
        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))

    with plgpu.force_gpu_interpret_mode():
        f = grads("mosaic_gpu")
        got, again = (jax.block_until_ready(f(*x)) for _ in range(2))
    for a, b, c in zip(got, again, grads("reference")(*(a.astype(jnp.float32) for a in x))):
        np.testing.assert_array_equal(a, b)
        close("gradient", a, np.asarray(c, np.float64), 1e-2)


def test_mosaic_gpu_bias(rng, monkeypatch):
    """Of each pair, which differs between heads, or of each key; some of it -inf, for one query all of it."""
    small_blocks(monkeypatch)
    shape, dtype = [((1, 2, 70, 150), jnp.float32), ((1, 1, 1, 150), jnp.bfloat16)][rng.integers(2)]
    hidden = jnp.asarray(rng.random(shape) < 0.2).at[..., 0].set(False).at[:, :, 30:31].set(True)
    kwargs = {"bias": jnp.where(hidden, -jnp.inf, one(rng, shape, dtype)), "causal": True, "soft_cap": 3.0}
    check(rng, "mosaic_gpu", 1, 70, 150, 2, 1, 64, 64, jnp.bfloat16, **kwargs)


# Float8.


def test_float8_rounds_as_the_format_does(rng):
    """Scales of tokens and of kv heads; "xla" is float32 attention of what numpy's float64 rounds to."""
    q, k, v = one(rng, (1, 9, 4, 8)), one(rng, (1, 11, 2, 8)), one(rng, (1, 11, 2, 8))
    q = q.at[0, 3, 1].set(0.0)

    def rounded(x, axes):
        x = np.asarray(x, np.float64)
        unit = np.abs(x).max(axis=axes, keepdims=True) / 448
        unit = np.where(unit == 0, 1, unit)
        exponent = np.floor(np.log2(np.maximum(np.abs(x / unit), 2.0**-6)))
        return np.round(x / unit / 2 ** (exponent - 3)) * 2 ** (exponent - 3) * unit

    q8, k8, v8 = rounded(q, 3), rounded(k, (1, 3)), rounded(v, (1, 3))
    want, want_lse, _ = oracle(q8, k8, v8, do=np.zeros(q.shape), dlse=np.zeros(q.shape[:3]), causal=True)
    o, lse = attention_float8(q, k, v, causal=True, return_lse=True, implementation="xla")
    close("o", o, want, 1e-4)
    close("lse", lse, want_lse, 1e-4)


def test_float8_mosaic_gpu(rng, monkeypatch):
    """Probabilities are wrong by at most half a unit of a mantissa of 3 bits; the rest as float32 does it."""
    monkeypatch.setattr(schedule, "SM_COUNT", 1)
    q, k, v = (one(rng, (1, n, heads, 48), jnp.bfloat16) for n, heads in ((140, 2), (270, 1), (270, 1)))
    kwargs = {"window": (200, 30), "soft_cap": 2.0} if rng.integers(2) else {"sinks": one(rng, (2,))}
    with plgpu.force_gpu_interpret_mode():
        o, lse = jax.block_until_ready(
            attention_float8(q, k, v, **kwargs, return_lse=True, implementation="mosaic_gpu")
        )
    want, want_lse = attention_float8(q, k, v, **kwargs, return_lse=True, implementation="xla")
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    spread = attention_float8(q, k, jnp.abs(v), **kwargs, implementation="xla")  # sum of p |v|
    below = 2.0**-10 * 2.0**-8 * 270 * jnp.abs(v).max()  # of numbers below 2**-6, which are 2**8 too large
    error = np.abs(np.asarray(o, np.float32) - np.asarray(want, np.float32))
    assert (error <= (2.0**-4 + 2.0**-7) * np.asarray(spread) + np.asarray(below)).all()
    assert np.linalg.norm(error) < 2.0**-4 / 3**0.5 * np.linalg.norm(np.asarray(want, np.float32))


def registers(x, layout):
    """The numbers of x [64, n] as each thread of a warpgroup holds them, by the layout itself."""
    for tile in layout.tiling.tiles:
        n, first = len(tile), x.ndim - len(tile)
        x = x.reshape(*x.shape[:first], *(y for d, t in zip(x.shape[first:], tile) for y in (d // t, t)))
        order = [*range(first), *range(first, first + 2 * n, 2), *range(first + 1, first + 2 * n, 2)]
        x = x.transpose(order)
    return x


def test_float8_operands_stand_where_accumulators_do():
    """Each thread's registers by the layouts themselves: two pairs of an accumulator are the four of an operand."""
    float8 = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu_float8")
    places = np.arange(64 * 128).reshape(64, 128)
    wide = registers(places, mgpu.WGMMA_LAYOUT)
    narrow = registers(np.asarray(float8._order(places)), mgpu.WGMMA_LAYOUT_8BIT)
    assert mgpu.WGMMA_LAYOUT.lane_dims == mgpu.WGMMA_LAYOUT_8BIT.lane_dims
    np.testing.assert_array_equal(np.concatenate([wide[:, 0::2], wide[:, 1::2]], axis=-1), narrow)


def test_columns_of_an_accumulator_stand_where_masks_take_them():
    """Masks count columns from the lane and the register, which the interpreter does not run: by the layout itself."""
    pieces = importlib.import_module("pallas_kernels.attention.mosaic_gpu_pieces")
    layout = mgpu.WGMMA_LAYOUT
    held = registers(np.broadcast_to(np.arange(128), (64, 128)), layout)
    held_rows = registers(np.broadcast_to(np.arange(64)[:, None], (64, 128)), layout)
    assert layout.registers_shape((64, 128)) == tuple(
        1 if i - held.ndim in (*layout.warp_dims, *layout.lane_dims, layout.vector_dim) else d
        for i, d in enumerate(held.shape)
    )
    for at in np.ndindex(held.shape):
        lane = at[layout.lane_dims[0]] * held.shape[layout.lane_dims[1]] + at[layout.lane_dims[1]]
        assert held[at] == pieces.column(at, at[layout.vector_dim]) + lane % 4 * 2
        warp = at[layout.warp_dims[0]]
        assert held_rows[at] == warp * 16 + pieces.row(at) * 8 + lane // 4
    starts = mgpu.WGMMA_ROW_LAYOUT
    assert plgpu.Layout.WGMMA.reduce(1).to_mgpu() == starts and starts.registers_shape((64,)) == (1, 1, 2, 1, 1)


def test_float8_says_what_it_cannot_do():
    q = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="attention_float8 has no gradient"):
        jax.grad(lambda q: attention_float8(q, q, q).astype(jnp.float32).sum())(q)
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        attention_float8(q, q, q, implementation="mosaic_gpu")
    wide = jnp.zeros((1, 8, 1, 192), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(), pytest.raises(NotImplementedError, match="head_dim up to 128"):
        attention_float8(wide, wide, wide, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="sizes disagree"):
        attention_float8(q, wide, q)


def test_every_tile_has_a_block(rng):
    """Each tile once, long ones first, blocks that end at about the same time, where the table is known and where it is
    made on the device: of one row or of one for each batch, few tiles or many."""
    heads, (tiles, together) = 3, [(40, 1), (40, 6), (150, 3), (400, 1)][rng.integers(4)]
    for rows, traced in ((1, False), (1, True), (2, True)):
        ranges = np.sort(rng.integers(0, tiles, (rows, tiles, 4)), axis=2).astype(np.int32)
        steps = ranges[..., 3] - ranges[..., 0]
        dealt = schedule.deal(jnp.asarray(steps) if traced else steps, 2, heads, together)
        assert isinstance(dealt, jax.Array) == traced and len(dealt) == schedule.SM_COUNT
        done = [row[1 : 1 + row[0]] for row in np.asarray(dealt)]
        np.testing.assert_array_equal(np.sort(np.concatenate(done)), np.arange(2 * heads * tiles))
        costs = [steps[x // tiles // heads % rows, x % tiles] + 1 for x in done]
        if together == 6:
            assert all((np.diff(x) <= 0).all() for x in costs)
        sums = [x.sum() for x in costs]
        assert max(sums) <= np.mean(sums) + tiles
        names = rng.permutation(100 + tiles)[:tiles].astype(np.int32)
        for row, order in zip(steps, np.asarray(schedule.longest_first(jnp.asarray(steps), names))):
            np.testing.assert_array_equal(np.sort(order), np.sort(names))
            assert (np.diff(row[[list(names).index(x) for x in order]]) <= 0).all()


def test_a_tile_is_described_where_it_is_scheduled(rng):
    """Where the table is known, and where it is made on the device with a row for each batch."""
    heads, tiles, wgs, parts = 3, 30, *rng.integers(1, 3, 2).tolist()
    for rows, traced in ((1, False), (2, True)):
        ranges = np.sort(rng.integers(0, 9, (rows, tiles * wgs, 4)), axis=2).astype(np.int32)
        given = jnp.asarray(ranges) if traced else ranges
        dealt = schedule.deal(schedule.tile_steps(given, wgs), 2, heads, 3)
        turns = np.asarray(schedule.in_turn(given, wgs))
        for row, of_row in zip(turns, ranges):
            np.testing.assert_array_equal(np.sort(row[:, 0]), np.arange(tiles))
            assert (np.diff(row[:, 2] - row[:, 1]) <= 0).all() or not traced
            lo, hi = row[:, 1, None], row[:, 2, None]
            mine = of_row.reshape(tiles, -1)[row[:, 0]]
            np.testing.assert_array_equal(row[:, 3:], np.clip(mine, lo, hi))
            assert ((lo <= mine[:, ::4]) | (mine[:, ::4] == mine[:, 3::4])).all() and (mine[:, 3::4] <= hi).all()
        found = schedule.describe(dealt, given, heads, wgs, parts)
        assert isinstance(found, jax.Array) == traced
        np.testing.assert_array_equal(found[:, 0, 0], dealt[:, 0])
        for block, w in np.ndindex(len(dealt), dealt.shape[1] - 1):
            b, n, t, lo, hi, *bounds = np.asarray(found)[block, w + 1].tolist()
            assert (b * heads + n) * tiles + t == dealt[block, w + 1]
            mine = ranges[b % rows, t * wgs : (t + 1) * wgs]
            visited = [x for x in mine if x[0] < x[3]]
            assert hi == max(-(-max(mine[:, 3]) // parts), lo + 1)
            assert not visited or lo == min(x[0] for x in visited) // parts
            np.testing.assert_array_equal(bounds, np.clip(mine, lo * parts, hi * parts).reshape(-1))


def test_mosaic_tpu_causal_documents(rng, monkeypatch):
    small_blocks(monkeypatch)
    ids = documents(rng, 1, 300, padding=20)
    kwargs = {"causal": True, "segment_ids": ids, "positions": restarting(ids), "sinks": one(rng, (2,))}
    check(rng, "mosaic_tpu", 1, 300, 300, 2, 1, 16, 24, jnp.bfloat16, **kwargs)


def test_mosaic_tpu_window(rng, monkeypatch):
    small_blocks(monkeypatch)
    kwargs = {"window": jnp.int32(40), "soft_cap": 3.0}
    check(rng, "mosaic_tpu", 1, 350, 200, 1, 1, 16, 16, jnp.float32, **kwargs)  # the last queries see nothing


# Which blocks meet: the tables against the mask itself.


def in_blocks(mask, bq, bkv):
    """Of each block of a mask: does any pair see each other, do all of them, rows after the last one aside."""
    down, right = -mask.shape[1] % bq, -mask.shape[2] % bkv
    some = np.pad(mask, ((0, 0), (0, down), (0, right)))
    every = np.pad(np.pad(mask, ((0, 0), (0, down), (0, 0)), constant_values=True), ((0, 0), (0, 0), (0, right)))
    shape = len(mask), some.shape[1] // bq, bq, some.shape[2] // bkv, bkv
    return some.reshape(shape).any((2, 4)), every.reshape(shape).all((2, 4))


def test_block_tables_hold_every_visible_pair(rng):
    T, S, bq, bkv = int(rng.integers(20, 90)), int(rng.integers(20, 90)), 16, 8
    q, k = jnp.zeros((2, T, 1, 1)), jnp.zeros((2, S, 1, 1))
    ids = [jnp.asarray(np.sort(rng.integers(0, 4, (2, n)), axis=1), jnp.int32) for n in (T, S)]
    positions = [jnp.asarray(np.sort(rng.integers(0, 50, (2, n)), axis=1), jnp.int32) for n in (T, S)]
    shuffled = [jnp.asarray(rng.integers(0, 50, (2, n)), jnp.int32) for n in (T, S)]
    for _ in range(24):
        causal, packed, placed, anyhow = rng.random(4) < 0.5
        static = [(None, None), (int(rng.integers(0, 40)), None), (None, int(rng.integers(0, 40))), (5, 3)]
        inputs, options = Inputs(q, k, k), Options(bool(causal), static[rng.integers(4)], 1.0, None)
        if packed:
            inputs = inputs._replace(q_segment_ids=ids[0], kv_segment_ids=ids[1])
        if placed:
            q_positions, kv_positions = shuffled if anyhow else positions
            inputs = inputs._replace(q_positions=q_positions, kv_positions=kv_positions)
        if options.window == (None, None):
            inputs = inputs._replace(window=jnp.int32(rng.integers(1, 60)))
        mask = visible(inputs, options)
        mask = np.ones((1, T, S), bool) if mask is None else np.asarray(mask)
        (any_pair, all_pairs), by_rows = in_blocks(mask, bq, bkv), key_ranges(inputs, options, bq, bkv)
        rows, block = rng.integers(1, 4, 2)
        for table, some, whole in (
            (by_rows, any_pair, all_pairs),
            (query_ranges(inputs, options, bq, bkv), any_pair.swapaxes(1, 2), all_pairs.swapaxes(1, 2)),
            (coarser(by_rows, rows, block), *in_blocks(mask, rows * bq, block * bkv)),
        ):
            table = np.broadcast_to(np.asarray(table), (len(mask), *table.shape[1:]))
            lo, full_lo, full_hi, hi = np.moveaxis(table, 2, 0)[..., None]
            index = np.arange(some.shape[2])
            assert ((lo >= 0) & (lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi)).all()
            assert not (some & ~((lo <= index) & (index < hi))).any(), "a block that some pair needs is skipped"
            assert not ((full_lo <= index) & (index < full_hi) & ~whole).any(), (
                "a block that hides a pair is not masked"
            )


@pytest.mark.parametrize("restart", [False, True])
def test_packed_documents_cost_what_they_cost(rng, restart):
    """Documents and padding of any lengths of a block and more: the tables visit the blocks in which a pair is visible,
    whether positions restart with each document or not, and mask only those that hide one."""
    block, lengths = 16, rng.integers(16, 200, 12)
    ids = np.repeat([*range(1, 12), 0], lengths)[None]
    order = np.arange(ids.shape[1], dtype=np.int32)[None]
    positions = jnp.asarray(order - (np.searchsorted(ids[0, : -lengths[-1]], ids[0]) if restart else 0))
    q, ids = jnp.zeros((1, ids.shape[1], 1, 1)), jnp.asarray(ids, jnp.int32)
    inputs = Inputs(q, q, q, None, None, ids, ids, positions, positions)
    options = Options(True, [(None, None), (40, None)][rng.integers(2)], 1.0, None)
    mask = np.asarray(visible(inputs, options))[0]
    mask = np.pad(mask, [(0, -len(mask) % block)] * 2).reshape(-1, block, -(-len(mask) // block), block)
    visible_blocks, full_blocks = mask.any((1, 3)), mask.all((1, 3))
    for ranges, some, every in (
        (key_ranges, visible_blocks, full_blocks),
        (query_ranges, visible_blocks.T, full_blocks.T),
    ):
        table = ranges(inputs, options, block, block)
        lo, full_lo, full_hi, hi = np.asarray(table)[0].T
        np.testing.assert_array_equal(hi - lo, some.sum(axis=1))
        np.testing.assert_array_equal((full_hi - full_lo)[:-1], every.sum(axis=1)[:-1])
        lo, full_lo, full_hi, hi = np.asarray(coarser(table, 2, 3))[0].T
        some, every = (np.pad(x, [(0, -n % m) for n, m in zip(x.shape, (2, 3))]) for x in (some, every))
        some, every = (x.reshape(-1, 2, x.shape[1] // 3, 3) for x in (some, every))
        np.testing.assert_array_equal(hi - lo, some.any((1, 3)).sum(axis=1))
        np.testing.assert_array_equal((full_hi - full_lo)[:-1], every.all((1, 3)).sum(axis=1)[:-1])


def test_tables_are_few_reductions(rng):
    """A table is one reduction of the queries' tokens, one of the keys' (the compiler finds where they are the same)
    and one of the table itself, each of several numbers: on a GPU, where each is a kernel, there were twenty."""
    ids, positions = (jnp.asarray(np.sort(rng.integers(1, 9, (1, 64))), jnp.int32) for _ in range(2))
    q = jnp.zeros((1, 64, 1, 1))
    inputs, options = Inputs(q, q, q, None, None, ids, ids, positions, positions), Options(True, (9, None), 1.0, None)
    for ranges in (key_ranges, query_ranges):
        text = str(jax.make_jaxpr(lambda inputs, ranges=ranges: ranges(inputs, options, 16, 8))(inputs))
        assert len(re.findall(r"= reduce(?:_\w+)?\[", text)) == 3, text


# Transformations.


@pytest.mark.parametrize("limit", [None, 0])
def test_vmap_remat_scan(rng, limit):
    q, k, v = (one(rng, (2, 1, 140, 2, 8)) for _ in range(3))
    windows = jnp.asarray([9, 2**31 - 1], jnp.int32)  # a local layer and a global one

    def layers(q, k, v, name):
        def layer(x, window):
            return x + attention(x, k, v, causal=True, window=window, implementation=name), None

        return jnp.sum(jnp.sin(jax.lax.scan(jax.checkpoint(layer), q, windows)[0]))

    with chunks(limit) if limit is not None else contextlib.nullcontext():
        got, want = (
            jax.jit(jax.vmap(jax.grad(lambda *x, name=name: layers(*x, name), argnums=(0, 1, 2))))(q, k, v)
            for name in ("xla", "reference")
        )
    for x, y in zip(got, want):
        close("gradient", x, np.asarray(y, np.float64), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("limit", [None, 0])
def test_shard_map(rng, check_vma, limit):
    """Batch and heads split, sinks over heads, a bias that every device shares: its gradient is summed."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    q, k, v = one(rng, (2, 140, 4, 8)), one(rng, (2, 140, 2, 8)), one(rng, (2, 140, 2, 8))
    sinks, bias, ids = one(rng, (4,)), one(rng, (1, 1, 1, 140)), documents(rng, 2, 140)

    def loss(q, k, v, sinks, bias, ids, split):
        def local(q, k, v, sinks, bias, ids):
            return attention(q, k, v, causal=True, segment_ids=ids, sinks=sinks, bias=bias, implementation="xla")

        if split:
            heads = P("dp", None, "tp", None)
            specs = (heads, heads, heads, P("tp"), P(), P("dp", None))
            local = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=check_vma)
        return jnp.sum(jnp.sin(local(q, k, v, sinks, bias, ids)))

    grad = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    want = grad(q, k, v, sinks, bias, ids, False)
    heads = P("dp", None, "tp", None)
    specs = (heads, heads, heads, P("tp"), P(), P("dp", None))
    with chunks(limit) if limit is not None else contextlib.nullcontext(), jax.set_mesh(mesh):
        args = [jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip((q, k, v, sinks, bias, ids), specs)]
        got = jax.jit(grad, static_argnums=6)(*args, True)
    for x, y in zip(got, want):
        close("gradient", x, np.asarray(y, np.float64), 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_mosaic_types_under_shard_map(name, check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    heads = P("dp", None, "tp", None)
    specs = (heads, heads, heads, P("tp"), P("dp", None))
    shapes = [((2, 140, 4, 64), jnp.bfloat16)] + [((2, 140, 2, 64), jnp.bfloat16)] * 2
    shapes += [((4,), jnp.float32), ((2, 140), jnp.int32)]

    def loss(*args):
        def local(q, k, v, sinks, ids):
            return attention(q, k, v, causal=True, segment_ids=ids, sinks=sinks, implementation=name)

        o = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=check_vma)(*args)
        return jnp.sum(o.astype(jnp.float32))

    with jax.set_mesh(mesh), interpreter(name):
        args = [jax.ShapeDtypeStruct(*x, sharding=jax.NamedSharding(mesh, s)) for x, s in zip(shapes, specs)]
        grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2, 3)), *args)
    assert [(x.shape, x.dtype) for x in grads] == shapes[:4]


def test_equal_calls_are_one_kernel():
    """JAX lowers a kernel's body once as long as it is the same object: two layers' gradients have two, not four."""

    def bodies(jaxpr):
        for eqn in jaxpr.eqns:
            parts = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"))
            inner = [x for part in parts if hasattr(x := getattr(part, "jaxpr", part), "eqns")]
            if eqn.primitive.name == "mpmd_map":  # what plgpu.kernel binds
                yield from map(id, inner)
            else:
                for x in inner:
                    yield from bodies(x)

    def layers(x):
        layer = lambda x: jnp.sum(attention(x, x, x, causal=True, implementation="mosaic_gpu").astype(jnp.float32))
        return jax.grad(layer)(x) + jax.grad(layer)(2 * x)

    with plgpu.force_gpu_interpret_mode():
        found = list(bodies(jax.make_jaxpr(layers)(jnp.zeros((1, 128, 1, 64), jnp.bfloat16)).jaxpr))
    assert len(found) == 4 and len(set(found)) == 2


def test_a_named_output_spares_the_second_forward_pass():
    """Only traced: the forward passes in a gradient (each takes one logarithm), by what the policy keeps."""
    q = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)

    def forwards(policy):
        layer = jax.checkpoint(functools.partial(attention, causal=True, implementation="xla"), policy=policy)
        loss = lambda q: jnp.sum(jnp.square(layer(jnp.sin(q), q, q).astype(jnp.float32)))
        return str(jax.make_jaxpr(jax.grad(loss))(q)).count(" log ")

    with chunks(2**12):
        assert forwards(jax.checkpoint_policies.nothing_saveable) == 2
        assert forwards(jax.checkpoint_policies.save_only_these_names(ATTENTION)) == 1


def test_blocks_merge_by_logsumexp(rng):
    """Two halves of the keys, merged as ring attention does, also where one half is hidden from a query."""
    q, k, v = (one(rng, (1, 12, 2, 8)) for _ in range(3))

    def merged(q, k, v):
        at = jnp.arange(12, dtype=jnp.int32)[None]
        halves = [
            attention(q, k[:, s], v[:, s], causal=True, positions=(at, at[:, s]), return_lse=True)
            for s in (slice(0, 5), slice(5, 12))
        ]
        (o1, l1), (o2, l2) = halves
        lse = jnp.logaddexp(l1, l2)
        return sum(o * jnp.exp(l - lse)[..., None] for o, l in ((o1, l1), (o2, l2)))

    f = lambda attend: jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(q, k, v)
    got, want = f(merged), f(functools.partial(attention, causal=True))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        close("merged", x, np.asarray(y, np.float64), 1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_memory_is_linear_in_length(layers):
    """No buffer of the compiled forward and backward is near T x T, and twice the length takes twice the memory; of
    layers in a scan as well, outside of which masks that are the same for all of them could be kept."""

    def temporary(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

        def loss(q, k, v):
            layer = lambda q, _: (attention(q, k, v, causal=True, implementation="xla"), None)
            return jnp.sum(layer(q, None)[0] if layers == 1 else jax.lax.scan(layer, q, None, length=layers)[0])

        f = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return f.lower(q, q, q).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(8192)
    assert large < 0.25 * 4 * 8192**2
    assert large < 2.1 * small


# What ran, and bad input.


def test_which_implementation_ran(caplog):
    q = jax.ShapeDtypeStruct((1, 16, 2, 8), jnp.float32)
    assert attention_implementation(q, q, q, causal=True) == "xla"
    assert attention_implementation(q, q, q, implementation="reference") == "reference"
    with plgpu.force_gpu_interpret_mode():
        h = jax.ShapeDtypeStruct((1, 16, 2, 64), jnp.bfloat16)
        assert attention_implementation(h, h, h) == "mosaic_gpu"
        bias = jax.ShapeDtypeStruct((1, 1, 16, 16), jnp.float32)
        assert attention_implementation(h, h, h, bias=bias) == "mosaic_gpu"
        assert attention_implementation(q, q, q) == "xla"
    _dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="pallas_kernels"):
        for _ in range(2):
            attention_implementation(q, q, q)
    (record,) = caplog.records
    assert "attention runs on xla" in record.getMessage()
    assert "needs a Hopper GPU" in record.getMessage()


@pytest.mark.parametrize(
    ("error", "words", "change"),
    [
        (ValueError, "3 query heads are not divisible by 2 kv heads", {"q": (1, 8, 3, 8)}),
        (ValueError, "sizes disagree", {"k": (1, 8, 2, 4)}),
        (ValueError, "sizes disagree", {"v": (1, 9, 2, 8)}),
        (ValueError, "q \\(8, 2, 8\\)", {"q": (8, 2, 8)}),
        (ValueError, "int32", {"q": jnp.zeros((1, 8, 2, 8), jnp.int32)}),
        (ValueError, "one dtype", {"q": jnp.zeros((1, 8, 2, 8), jnp.bfloat16)}),
        (ValueError, "segment_ids must be \\[B=1, T=8\\].*\\(1, 7\\)", {"segment_ids": jnp.zeros((1, 7), jnp.int32)}),
        (ValueError, "must be int32", {"segment_ids": jnp.zeros((1, 8), jnp.int8)}),
        (ValueError, "needs T == S", {"positions": jnp.zeros((1, 8), jnp.int32), "q": (1, 4, 2, 8)}),
        (ValueError, "sinks must be floating \\[N=2\\]", {"sinks": jnp.zeros(3)}),
        (ValueError, "bias must be floating and broadcast", {"bias": jnp.zeros((8, 8))}),
        (ValueError, "window", {"window": 0}),
        (ValueError, "window", {"window": (-1, 3)}),
        (ValueError, "soft_cap must be positive", {"soft_cap": 0.0}),
        (ValueError, "'cudnn' is unknown", {"implementation": "cudnn"}),
        (NotImplementedError, "needs a Hopper GPU; this is cpu", {"implementation": "mosaic_gpu"}),
        (NotImplementedError, "needs a TPU; this is cpu", {"implementation": "mosaic_tpu"}),
    ],
)
def test_bad_input(error, words, change):
    arrays = {x: change.pop(x, (1, 8, 2, 8)) for x in ("q", "k", "v")}
    arrays = {x: jnp.zeros(a, jnp.float32) if isinstance(a, tuple) else a for x, a in arrays.items()}
    with pytest.raises(error, match=words):
        attention(**arrays, **change)


@pytest.mark.parametrize(
    ("words", "H", "dtype", "kwargs"),
    [
        ("takes head_dim up to 256. Got 272", 272, jnp.bfloat16, {}),
        ("takes bfloat16 and float16. Got float32", 64, jnp.float32, {}),
        ("takes a positive scale", 64, jnp.bfloat16, {"scale": -1.0}),
    ],
)
def test_mosaic_gpu_says_what_it_cannot_do(words, H, dtype, kwargs):
    q = jnp.zeros((1, 8, 1, H), dtype)
    with plgpu.force_gpu_interpret_mode(), pytest.raises(NotImplementedError, match=words):
        attention(q, q, q, implementation="mosaic_gpu", **kwargs)
