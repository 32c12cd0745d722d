"""Attention: values and gradients against a float64 oracle that shares no code with them; transformations; bad input.

The Mosaic kernels are in test_attention_mosaic.py.
"""

import contextlib
import functools
import importlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    _dispatch,
    attention,
    attention_backward,
    attention_float8,
    attention_implementation,
)
from pallas_kernels.attention.inputs import ATTENTION
from tests.kernels.attention_oracle import check, close, documents, interpreter, one, restarting

# importlib: the package's attribute `attention` is the function.
xla = importlib.import_module("pallas_kernels.attention.xla")


@contextlib.contextmanager
def chunks(limit):
    """xla.py with blocks of at most `limit` logits; 0 makes chunks of 128."""
    before = xla._ONE_BLOCK, xla._BLOCK_LOGITS
    xla._ONE_BLOCK, xla._BLOCK_LOGITS = 0, limit
    try:
        yield
    finally:
        xla._ONE_BLOCK, xla._BLOCK_LOGITS = before


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


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu", "xla", "reference"])
@pytest.mark.parametrize("sizes", [(0, 40), (2, 0)])
def test_no_queries_are_no_rows_and_have_no_gradients(rng, sizes, name, check_vma):
    B, T = sizes
    new = lambda *shape: one(rng, shape, jnp.bfloat16)
    arrays = new(B, T, 4, 16), new(B, 40, 2, 16), new(B, 40, 2, 8), one(rng, (4,)), one(rng, (1, 4, T, 40))
    mesh = jax.make_mesh((2,), ("tp",), (AxisType.Auto,), devices=jax.devices()[:2])
    heads = P(None, None, "tp")

    def local(q, k, v, sinks, bias):
        more = {"bias": bias} if name != "mosaic_tpu" else {}
        return attention(q, k, v, causal=True, sinks=sinks, **more, return_lse=True, implementation=name)

    @jax.jit
    def run(*arrays):
        specs = (heads, heads, heads, P("tp"), P(None, "tp"))
        split = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=check_vma)
        out, pull = jax.vjp(split, *arrays)
        return out, pull(out)

    with interpreter(name):
        (o, lse), grads = run(*arrays)
    assert (o.shape, o.dtype) == ((B, T, 4, 8), jnp.bfloat16) and (lse.shape, lse.dtype) == ((B, T, 4), jnp.float32)
    for x, grad in zip(arrays, grads, strict=True):
        assert (grad.shape, grad.dtype) == (x.shape, x.dtype) and not np.asarray(grad, np.float32).any()


def test_no_rows_of_a_step_of_a_ring_nor_of_float8(rng):
    q, k, v = one(rng, (2, 0, 2, 8)), one(rng, (2, 5, 1, 8)), one(rng, (2, 5, 1, 4))
    rows = one(rng, (2, 0, 2, 4)), jnp.zeros((2, 0, 2)), jnp.zeros((2, 0, 2))
    for x, grad in zip((q, k, v), attention_backward(q, k, v, *rows), strict=True):
        assert grad.shape == x.shape and not np.asarray(grad).any()
    out, lse = attention_float8(q, k, v, return_lse=True)
    assert (out.shape, lse.shape) == ((2, 0, 2, 4), (2, 0, 2))


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
        (ValueError, "at least one key", {"k": (1, 0, 2, 8), "v": (1, 0, 2, 8)}),
        (ValueError, "head_dims of at least 1", {"v": (1, 8, 2, 0)}),
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
