"""The Triton kernels in Pallas' interpreter, against the oracles of the other backends' tests.

Each case is small and reaches what the others do not: several blocks, skipped and unmasked ones, ragged ends, groups of
heads, sizes that are no power of two. The interpreter fills what lies past an array's end with nan, so a load that is
not masked shows. benchmarks/triton/bench.py repeats the comparison on a GPU.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    _triton,
    attention,
    attention_backward,
    attention_implementation,
    quantized_matmul,
    quantized_matmul_implementation,
    ragged_dot,
    ragged_dot_implementation,
)

triton_attention = importlib.import_module("pallas_kernels.attention.triton")
triton_ragged = importlib.import_module("pallas_kernels.ragged_dot.triton")
triton_quantized = importlib.import_module("pallas_kernels.quantized_matmul.triton")


def sibling(name):
    """A test file of this folder, for its oracle."""
    spec = importlib.util.spec_from_file_location(f"{name}_oracle", pathlib.Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


attentions, raggeds, quantizeds = map(sibling, ("test_attention", "test_ragged_dot", "test_quantized_mosaic"))


@pytest.fixture
def interpreted():
    with _triton.force_interpret_mode():
        yield


def small_blocks(monkeypatch, q=32, kv=16):
    blocks = triton_attention.Blocks(q, kv, 4, 2)
    monkeypatch.setattr(triton_attention, "tuned", lambda H, Hv: triton_attention.Config(blocks, blocks, blocks))


# Attention.


def test_attention_case(rng, interpreted):
    """One of the suite that all backends share, with head_dims that this one takes."""
    names = [name for name in attentions.CASES if "bias" not in name]
    (*sizes, H, Hv), make = attentions.CASES[names[rng.integers(len(names))]]
    widths = (16, 48 if Hv != H else 16)
    attentions.check(rng, "triton", *sizes, *widths, jnp.float16, **make(rng))


def test_attention_packed_documents(rng, interpreted, monkeypatch):
    small_blocks(monkeypatch)
    ids = attentions.documents(rng, 1, 70, padding=11)
    kwargs = {"segment_ids": ids, "positions": attentions.restarting(ids), "sinks": attentions.one(rng, (4,))}
    attentions.check(rng, "triton", 1, 70, 70, 4, 2, 144, 16, jnp.bfloat16, causal=True, **kwargs)


def test_attention_window_positions_soft_cap(rng, interpreted, monkeypatch):
    small_blocks(monkeypatch, q=16, kv=32)
    positions = jnp.arange(40, dtype=jnp.int32)[None] + 30, jnp.arange(100, dtype=jnp.int32)[None]
    kwargs = {"causal": True, "window": jnp.int32(25), "positions": positions, "soft_cap": 3.0}
    attentions.check(rng, "triton", 1, 40, 100, 1, 1, 16, 48, jnp.float16, **kwargs)


def test_attention_under_vmap_and_remat(rng, interpreted, monkeypatch):
    """And gradients repeat bit by bit."""
    small_blocks(monkeypatch)
    x = [attentions.one(rng, (2, 1, 40, 1, 16), jnp.bfloat16) for _ in range(3)]

    def grads(name):
        layer = jax.checkpoint(functools.partial(attention, causal=True, implementation=name))
        loss = lambda *x: jnp.sum(jnp.sin(layer(*x).astype(jnp.float32)))
        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))

    f = grads("triton")
    got, again = f(*x), f(*x)
    for a, b, c in zip(got, again, grads("reference")(*(a.astype(jnp.float32) for a in x)), strict=True):
        np.testing.assert_array_equal(a, b)
        attentions.close("gradient", a, np.asarray(c, np.float64), 1e-2)


def test_a_step_of_ring_attention(rng, interpreted, monkeypatch):
    """The gradients of two halves of the keys, given the logsumexp of whole rows, add up to those of all keys."""
    small_blocks(monkeypatch, q=16, kv=16)
    q, k, v, do = (attentions.one(rng, (1, 40, 2, 16), jnp.float16) for _ in range(4))
    at = jnp.arange(40, dtype=jnp.int32)[None]

    @jax.jit
    def whole(*x):
        f = functools.partial(attention, causal=True, return_lse=True, implementation="reference")
        (o, lse), vjp = jax.vjp(f, *(y.astype(jnp.float32) for y in x))
        return o, lse, vjp((do.astype(jnp.float32), jnp.zeros_like(lse)))

    o, lse, want = whole(q, k, v)
    delta = jnp.sum(o * do.astype(jnp.float32), axis=-1)

    @jax.jit
    def part(k, v, here):
        return attention_backward(q, k, v, do, lse, delta, causal=True, positions=(at, here), implementation="triton")

    halves = [part(k[:, s], v[:, s], at[:, s]) for s in (slice(0, 20), slice(20, 40))]
    got = [halves[0][0].astype(jnp.float32) + halves[1][0].astype(jnp.float32)]
    got += [jnp.concatenate(pair, axis=1) for pair in list(zip(*halves, strict=True))[1:]]
    for a, b in zip(got, want, strict=True):
        attentions.close("gradient", a, np.asarray(b, np.float64), 1e-2)


# Grouped matmul.

RAGGED = [  # M, K, N, sizes, dtype: ends inside of blocks, all to one, none at all, more than there are rows
    (90, 40, 72, [3, 0, 71, 10], jnp.bfloat16),
    (33, 64, 24, [0, 33, 0], jnp.float16),
    (20, 16, 40, [9, -4, 5, 2**31 - 1, 2**31 - 1], jnp.bfloat16),
    (33, 8, 8, [0, 0, 0], jnp.bfloat16),
]


def test_ragged_dot(rng, interpreted, monkeypatch):
    config = triton_ragged.Config(32, 32, 16, 4, 2)
    monkeypatch.setattr(triton_ragged, "tuned", lambda height: config)
    monkeypatch.setattr(triton_ragged, "tuned_contraction", lambda: config)
    M, K, N, sizes, dtype = RAGGED[rng.integers(len(RAGGED))]
    raggeds.check(rng, "triton", sizes, M=M, K=K, N=N, dtype=dtype)


def test_rows_past_the_groups_may_hold_anything(rng, interpreted):
    lhs = jnp.asarray(rng.normal(size=(40, 16)), jnp.bfloat16).at[30:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(2, 16, 24)), jnp.bfloat16)

    @jax.jit
    def run(lhs, rhs):
        f = lambda lhs, rhs: ragged_dot(lhs, rhs, jnp.asarray([20, 10], jnp.int32), implementation="triton")
        y, vjp = jax.vjp(f, lhs, rhs)
        return y, *vjp(jnp.ones_like(y).at[30:].set(jnp.nan))

    y, d_lhs, d_rhs = run(lhs, rhs)
    assert not np.any(np.asarray(y)[30:]) and not np.any(np.asarray(d_lhs)[30:])
    assert all(np.all(np.isfinite(x.astype(jnp.float32))) for x in (y, d_lhs, d_rhs))


# Quantized matmul.


def test_quantized_matmul(rng, interpreted):
    cases = [case for case in quantizeds.FEW if "float" not in case[3]]
    M, N, K, format, group, options = cases[rng.integers(len(cases))]
    w, x = quantizeds.weight(rng, N, K, format, group, **options), quantizeds.rows(rng, M, K)
    quantizeds.check(x, w, quantized_matmul(x, w, implementation="triton", preferred_element_type=jnp.float32))


def test_blocks_share_k(rng, interpreted):
    """Shares that differ in length, one of them empty; the extreme values of a nibble; a scale of zero."""
    w, x = quantizeds.weight(rng, 72, 320, "int4", 32), quantizeds.rows(rng, 3, 320)
    values = w.values.at[0].set(jnp.asarray(np.tile([-8, 7], 160), jnp.int4))
    w = type(w)(values, w.scales.at[1, 2].set(0))
    config = triton_quantized.Config(16, 32, 64, 4, 4, 2)
    got = jax.jit(lambda x, w: triton_quantized.matmul(x, w.flat(), jnp.float32, config))(x, w)
    quantizeds.check(x, w, got)


def test_both_in_int8(rng, interpreted):
    format = ["int8", "int4"][rng.integers(2)]
    w = quantizeds.weight(rng, 40, 100, format, activations="int8", scale_dtype=jnp.float32)
    x = quantizeds.rows(rng, 37, 100).at[3].set(0)
    got, want = (
        quantized_matmul(x, w, implementation=name, preferred_element_type=jnp.float32)
        for name in ("triton", "reference")
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(np.asarray(want)).max())
    assert (got[3] == 0).all()


# What runs where, and what is refused.


def on(kind: str):
    """A trace for a GPU that is not here."""
    device = jax.sharding.AbstractDevice(kind, None, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=device))


HALF = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
QKV = HALF((1, 32, 2, 64)), HALF((1, 32, 2, 64)), HALF((1, 32, 2, 64))
SINGLE = [jax.ShapeDtypeStruct(*x) for x in (((8, 4), jnp.float32), ((2, 4, 4), jnp.float32), ((2,), jnp.int32))]
TRITON = {"implementation": "triton"}
GROUPS = HALF((64, 64)), HALF((2, 64, 64)), jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "triton"),
        ("NVIDIA L4", "triton"),
        ("NVIDIA H100 80GB HBM3", "mosaic_gpu"),
        ("NVIDIA B200", "triton"),
        ("Tesla T4", "xla"),
        ("TPU v5p", "mosaic_tpu"),
        ("cpu", "xla"),
    ],
)
def test_which_backend_runs(rng, kind, name):
    x, w = HALF((3, 256)), jax.eval_shape(lambda: quantizeds.weight(rng, 128, 256, "int4", 128))
    with on(kind):
        assert attention_implementation(*QKV) == name
        assert quantized_matmul_implementation(x, w) == name
        assert ragged_dot_implementation(*GROUPS) == name


def attend(x, **options):
    return attention(x, x, x, **options, **TRITON)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("multiple of 16, up to 256. Got 24 and 24", lambda: attend(jnp.zeros((1, 8, 1, 24), jnp.bfloat16))),
        ("bfloat16 and float16. Got float32", lambda: attend(jnp.zeros((1, 8, 1, 16)))),
        ("no bias", lambda: attend(jnp.zeros((1, 8, 1, 16), jnp.float16), bias=jnp.zeros((1, 1, 1, 8)))),
        ("positive scale. Got -1.0", lambda: attend(jnp.zeros((1, 8, 1, 16), jnp.float16), scale=-1.0)),
        ("float16. Got float32", lambda: ragged_dot(*(jnp.ones(x.shape, x.dtype) for x in SINGLE), **TRITON)),
    ],
)
def test_refused_calls_say_why(interpreted, words, call):
    with pytest.raises(NotImplementedError, match=words):
        call()


def test_refused_weights_say_why(rng, interpreted):
    for words, M, format, group, activations in (
        ("at most 256 rows", 257, "int4", 128, None),
        ("at most 16 rows", 17, "int8", None, None),
        ("int4 and int8. Got float8_e4m3fn", 3, "float8_e4m3fn", None, None),
        ("multiples of 32 for int4", 3, "int4", 16, None),
        ("scales of channels", 3, "int8", 64, "int8"),
    ):
        w = jax.eval_shape(
            lambda f=format, g=group, a=activations: quantizeds.weight(rng, 64, 256, f, g, activations=a)
        )
        with pytest.raises(NotImplementedError, match=words):
            quantized_matmul_implementation(HALF((M, 256)), w, **TRITON)


def test_a_cpu_is_no_place_for_triton():
    q = jnp.zeros((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"compute capability 8.0 or above \(A100.*this is cpu"):
        attention(q, q, q, implementation="triton")


def test_a_jax_without_the_backend(monkeypatch):
    """It is deprecated in JAX 0.11: then others run, and the reason says so."""
    monkeypatch.setattr(_triton, "plgpu", None)
    q = jnp.zeros((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="has no Triton backend"):
        attention(q, q, q, implementation="triton")
    assert attention_implementation(q, q, q) == "xla"


@pytest.mark.parametrize("check_vma", [True, False])
def test_types_under_shard_map(rng, interpreted, check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    w = quantizeds.weight(rng, 64, 64, "int4", group=32)

    def local(q, k, ids, lhs, rhs, sizes, w):
        o = attention(q, k, k, causal=True, segment_ids=ids, implementation="triton")
        y = ragged_dot(lhs, rhs, sizes[0], implementation="triton")
        return o, y, quantized_matmul(y[:, :64], w, implementation="triton")

    specs = P("dp", None, "tp", None), P("dp", None, "tp", None), P("dp", None), P("dp", None), P(None, None, "tp")
    specs += (P("dp", None), jax.tree.map(lambda _: P("tp", None), w))

    def loss(q, k, lhs, rhs, ids, sizes, w):
        out = specs[0], P("dp", "tp"), P("dp", "tp")
        f = jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=check_vma)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in f(q, k, ids, lhs, rhs, sizes, w))

    with jax.set_mesh(mesh):
        new = lambda shape, spec, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.NamedSharding(mesh, spec)
        )
        args = new((2, 40, 4, 16), specs[0]), new((2, 40, 2, 16), specs[1]), new((80, 64), specs[3])
        args += new((3, 64, 128), specs[4]), new((2, 40), specs[2], jnp.int32), new((2, 3), specs[5], jnp.int32)
        args += (jax.tree.map(lambda v: new(v.shape, P("tp", None), v.dtype), w),)
        grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2, 3)), *args)
    assert [x.shape for x in grads] == [x.shape for x in args[:4]]


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
def test_every_kernel_lowers_for_an_a100(rng):
    """To Triton's own language, which JAX writes without a GPU; compiling it takes jax[cuda13]."""

    def run(q, k, do, lhs, rhs, sizes, x, w):
        f = functools.partial(attention, causal=True, soft_cap=9.0, implementation="triton")
        grads = jax.vjp(f, q, k, k)[1](do)
        y, vjp = jax.vjp(lambda *x: ragged_dot(*x, sizes, implementation="triton"), lhs, rhs)
        return grads, vjp(y), quantized_matmul(x, w, implementation="triton")

    q, k = HALF((1, 100, 4, 80)), HALF((1, 100, 2, 80))
    w = jax.eval_shape(lambda: quantizeds.weight(rng, 96, 256, "int4", 32))
    with on("NVIDIA A100-SXM4-80GB"):
        traced = jax.jit(run).trace(q, k, q, *GROUPS, HALF((3, 256)), w)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3 + 3 + 2 + 1  # and two tables of tiles
