"""quantized_matmul against numpy: every format, scale shape and dtype; odd sizes, zeros, saturation; the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    QuantizedArray,
    quantize_array,
    quantize_rows,
    quantized_matmul,
    quantized_matmul_implementation,
)
from pallas_kernels.quantized_matmul.api import BACKENDS
from pallas_kernels.quantized_matmul.array import FORMATS

PORTABLE = ["xla", "reference"]
# Largest error of rounding to nearest, in units of the group's largest magnitude: half a step.
BOUND = {
    "int4": 0.5 / 7,
    "uint4": 0.5 * 2 / 15,  # of the range, at most twice the magnitude
    "int8": 0.5 / 127,
    "float8_e4m3fn": 2.0**-4,
    "float8_e5m2": 2.0**-3,
    "float4_e2m1fn": 1.0 / 6,
}


def dense(w: QuantizedArray) -> np.ndarray:
    """[N, K] float64 of a weight with one output dim, written without the library's own dequantize."""
    q = np.asarray(w.values.astype(jnp.float32), np.float64) + (8 if w.unsigned else 0)
    N, K = q.shape
    rows, groups = w.scales.shape
    n, k = np.arange(N) // (N // rows), np.arange(K) // (K // groups)
    full = np.asarray(w.scales, np.float64)[n][:, k] * q
    if w.offsets is not None:
        full = full + np.asarray(w.offsets, np.float64)[n][:, k]
    return full if w.inputs is None else full * np.asarray(w.inputs, np.float64)[None]


def weight(rng, K, N, format="int4", group=None, **options) -> QuantizedArray:
    return quantize_array(jnp.asarray(rng.normal(size=(K, N)), jnp.float32), format, group=group, **options)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group", [None, 32])
def test_rounding_is_to_the_nearest_value_within_the_formats_bound(rng, format, group):
    w = np.asarray(rng.normal(size=(96, 7)) * rng.uniform(0.1, 10, size=(1, 7)), np.float32)
    got = quantize_array(jnp.asarray(w), format, group=group)
    assert got.shape == w.shape and got.format == format and got.group == (group or 96)
    groups = np.abs(w.T.reshape(7, -1, group or 96)).max(axis=-1, keepdims=True)
    error = np.abs(dense(got).reshape(7, -1, group or 96) - w.T.reshape(7, -1, group or 96)) / groups
    assert error.max() <= BOUND[format] + 2.0**-8  # bfloat16 scales and offsets
    np.testing.assert_allclose(np.asarray(got.dequantize()), dense(got).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("M", "K", "N", "group"), [(1, 64, 24, 32), (5, 96, 7, None), (17, 128, 33, 64)])
def test_parity(rng, implementation, format, M, K, N, group):
    w = weight(rng, K, N, format, group)
    x = rng.normal(size=(M, K)).astype(np.float32)
    want = x.astype(np.float64) @ dense(w).T
    got = quantized_matmul(jnp.asarray(x), w, implementation=implementation)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    half = quantized_matmul(
        jnp.asarray(x, jnp.bfloat16), w, implementation=implementation, preferred_element_type=jnp.float32
    )
    bound = 2.0**-7 * (np.abs(x) @ np.abs(dense(w).T))
    assert (np.abs(np.asarray(half) - want) <= bound).all()


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize(
    ("activations", "format"),
    [
        ("int8", "int4"),
        ("int8", "uint4"),
        ("int8", "int8"),
        ("int4", "uint4"),
        ("mixed", "int4"),
        ("float8_e4m3fn", "int4"),
        ("float8_e4m3fn", "float8_e4m3fn"),
    ],
)
@pytest.mark.parametrize("group", [None, 32])
def test_rounded_activations(rng, implementation, activations, format, group):
    w = weight(rng, 96, 10, format, group, activations="int4" if activations == "mixed" else activations)
    x = rng.normal(size=(6, 96)).astype(np.float32)
    x[2] = 0.0
    blocks = x.reshape(6, w.scales.shape[1], -1).astype(np.float64)
    high = np.asarray({"int8": 127, "int4": 7, "mixed": 7, "float8_e4m3fn": 448}[activations])
    if activations == "mixed":
        outliers = rng.integers(2, size=w.scales.shape[1]).astype(bool)
        w, high = dataclasses.replace(w, outliers=jnp.asarray(outliers)), np.where(outliers, 127, 7)[None, :, None]
    scale = np.abs(blocks).max(axis=-1, keepdims=True) / high
    rounded = blocks / np.where(scale == 0, 1, scale)
    if activations != "float8_e4m3fn":
        rounded = np.round(rounded)
    else:
        rounded = np.asarray(jnp.asarray(rounded, jnp.float32).astype(jnp.float8_e4m3fn).astype(jnp.float32))
    want = (rounded * scale).reshape(6, 96) @ dense(w).T
    got = np.asarray(quantized_matmul(jnp.asarray(x), w, implementation=implementation))
    # A tie may fall to either side: one step of one number.
    step = scale.max() * (32 if activations == "float8_e4m3fn" else 1) * np.abs(dense(w)).max()
    assert np.abs(got - want).max() <= step and np.abs(got - want).mean() < 1e-3 * np.abs(want).mean() + 1e-6
    assert (got[2] == 0).all()


@pytest.mark.parametrize("implementation", PORTABLE)
def test_rows_rounded_before(rng, implementation):
    """One rounding for several weights, bit for bit what each would do; over several dims too."""
    heads = jnp.asarray(rng.normal(size=(6, 16, 10)), jnp.float32)
    activations = str(rng.choice(["int8", "float8_e4m3fn"]))
    options = {"group": 32, "activations": activations}
    x = jnp.asarray(rng.normal(size=(5, 96)), [jnp.float32, jnp.bfloat16][rng.integers(2)])
    near = quantize_rows(x, 3, activations)  # pyright: ignore
    q = weight(rng, 96, 10, "int4", **options)
    out = quantize_array(heads, "int4", contraction=(-3, -2), **options)  # pyright: ignore
    for w, full in ((q, x), (out, x.reshape(5, 6, 16))):
        got = quantized_matmul(near, w, implementation=implementation)
        want = quantized_matmul(full, w, implementation=implementation)
        assert got.dtype == x.dtype and got.shape == (5, 10)
        np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))
    assert quantized_matmul_implementation(near, q) == quantized_matmul_implementation(x, q)
    with pytest.raises(ValueError, match="must end in the dims"):
        quantized_matmul(near, weight(rng, 48, 10, "int4", group=16, activations=activations))
    with pytest.raises(ValueError, match=r"quantize_rows\(x, 1,"):
        quantized_matmul(near, weight(rng, 96, 10, "int4", activations=activations))
    with pytest.raises(NotImplementedError, match="give it the array"):
        jax.grad(lambda s: quantized_matmul(dataclasses.replace(near, scales=s), q).sum())(near.scales)


@pytest.mark.parametrize("implementation", PORTABLE)
@pytest.mark.parametrize("scales", [(1, 1), (8, 1), (1, 3), (2, 3)])
def test_scales_of_a_tensor_and_of_tiles(rng, implementation, scales):
    N, K = 8, 96
    values = jnp.asarray(rng.integers(-127, 128, size=(N, K)), jnp.int8)
    for activations in (None, "int8"):
        w = QuantizedArray(values, jnp.asarray(rng.uniform(0.5, 2, size=scales), jnp.float32), activations=activations)
        x = jnp.asarray(rng.integers(-127, 128, size=(4, K)), jnp.float32).at[:, ::32].set(127.0)
        want = np.asarray(x, np.float64) @ dense(w).T
        got = quantized_matmul(x, w, implementation=implementation)
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("implementation", PORTABLE)
def test_many_dims_offsets_and_inputs(rng, implementation):
    """[N, H, D] contracted over N and H, with what the activations are multiplied with."""
    w = jnp.asarray(rng.normal(size=(3, 32, 10)), jnp.float32)
    q = quantize_array(w, "int4", contraction=(-3, -2), group=32, symmetric=False, scale_dtype=jnp.float32)
    inputs = rng.uniform(0.5, 2, size=96).astype(np.float32)
    q = dataclasses.replace(q, inputs=jnp.asarray(inputs))
    assert q.shape == (3, 32, 10) and q.values.shape == (10, 3, 32) and q.scales.shape == (10, 3)
    x = rng.normal(size=(2, 5, 3, 32)).astype(np.float32)
    want = np.einsum("BTNH,NHD->BTD", x, np.asarray(q.dequantize()))
    got = quantized_matmul(jnp.asarray(x), q, implementation=implementation)
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4 * np.abs(want).max())
    undone = np.asarray(q.dequantize()) / inputs.reshape(3, 32, 1)
    steps = np.repeat(np.asarray(q.scales).T[:, None], 32, axis=1)
    assert (np.abs(undone - np.asarray(w)) <= 0.51 * steps).all()


def test_layers_are_scanned(rng):
    """A stack of weights is one node whose layers a scan takes off; the gradient reaches x alone."""
    stack = quantize_array(jnp.asarray(rng.normal(size=(3, 64, 64)), jnp.float32), "uint4", group=32)
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)

    def run(x, multiply, ws):
        return jax.lax.scan(lambda x, w: (multiply(x, w), None), x, ws)[0]

    got, pull = jax.vjp(lambda x: run(x, quantized_matmul, stack), x)
    want, pull_dense = jax.vjp(lambda x: run(x, lambda x, w: jnp.dot(x, w, precision="highest"), stack.dequantize()), x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(jnp.abs(want).max()))
    ct = jnp.asarray(rng.normal(size=want.shape), jnp.float32)
    mine, theirs = pull(ct)[0], pull_dense(ct)[0]
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-3 * float(jnp.abs(theirs).max()))


def test_transpose_moves_nothing(rng):
    w = weight(rng, 64, 5, "int8", 32)
    np.testing.assert_array_equal(np.asarray(w.T.dequantize()), np.asarray(w.dequantize()).T)
    assert w.T.values is w.values and w.T.shape == (5, 64)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_and_saturation(format):
    """A group of zeros stays zero; the largest numbers of a group come back, whatever their size."""
    w = np.zeros((64, 4), np.float32)
    w[0], w[33] = (1e30, -1e30, 1e-30, 0.0), 1.0
    q = quantize_array(jnp.asarray(w), format, group=32)
    back = np.asarray(q.dequantize())
    assert np.isfinite(back).all() and (back[:32, 3] == 0).all()
    np.testing.assert_allclose(back[0], w[0], rtol=0.01)
    x = jnp.full((3, 64), 3e30, jnp.float32).at[1].set(0.0)
    out = quantized_matmul(x, dataclasses.replace(weight(np.random.default_rng(0), 64, 4), activations="int8"))
    assert np.isfinite(np.asarray(out)).all() and (np.asarray(out)[1] == 0).all()


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_is_not_lost(rng, format, dtype):
    """Among as many numbers as XLA's maximum on CPUs, which drops it, takes at a time."""
    w = rng.normal(size=(256, 64)).astype(np.float32)
    k, n = rng.integers(256), rng.integers(64)
    w[k, n] = np.nan
    run = jax.jit(lambda w: quantize_array(w, format, group=64).scales.astype(jnp.float32))
    scales = np.asarray(run(jnp.asarray(w, dtype)))
    assert np.argwhere(~np.isfinite(scales)).tolist() == [[n, k // 64]]


def test_which_backend_runs(rng):
    w = weight(rng, 64, 8)
    x = jax.ShapeDtypeStruct((2, 64), jnp.bfloat16)
    assert quantized_matmul_implementation(x, w) == "xla"
    assert list(BACKENDS)[-2:] == PORTABLE


@pytest.mark.parametrize(("M", "N"), [(0, 8), (2, 0), (0, 0)])
def test_no_rows_and_no_outputs(rng, M, N):
    x = jnp.zeros((M, 64), jnp.bfloat16)
    for options in ({}, {"activations": "int8"}, {"group": 32}):
        out = quantized_matmul(x, weight(rng, 64, N, **options))
        assert out.shape == (M, N) and out.dtype == jnp.bfloat16


def test_integers_do_not_meet_floats(rng):
    """Said where such a weight is made, and where one that was put together meets a matmul."""
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*int8"):
        weight(rng, 64, 8, "float8_e4m3fn", activations="int8")
    w = dataclasses.replace(weight(rng, 64, 8, "float8_e4m3fn"), activations="int8")
    with pytest.raises(ValueError, match=r"float8_e4m3fn.*int8"):
        quantized_matmul(jnp.ones((2, 64), jnp.float32), w)


def test_bad_input(rng):
    x, w = jnp.ones((2, 64), jnp.float32), weight(rng, 64, 8)
    with pytest.raises(ValueError, match="groups of 48 do not divide the 64 numbers"):
        weight(rng, 64, 8, group=48)
    with pytest.raises(ValueError, match="format 'int3' is unknown"):
        weight(rng, 64, 8, "int3")
    with pytest.raises(ValueError, match="symmetric about zero"):
        weight(rng, 64, 8, "float8_e5m2", symmetric=False)
    with pytest.raises(ValueError, match="activations='int7' is unknown"):
        weight(rng, 64, 8, activations="int7")
    for contraction in ((), (-1, -1), (-2, 0), (-3,), (2,), (-2, -1)):
        with pytest.raises(ValueError, match=r"must name some dims of \(64, 8\)"):
            weight(rng, 64, 8, contraction=contraction)
    with pytest.raises(ValueError, match=r"\(0, 8\) has no number along dims \(-2,\)"):
        weight(rng, 0, 8)
    with pytest.raises(ValueError, match=r"floating array. Got int32\[64, 8\]"):
        quantize_array(jnp.ones((64, 8), jnp.int32), "int8")
    with pytest.raises(ValueError, match=r"must end in the dims \(64,\)"):
        quantized_matmul(jnp.ones((2, 32), jnp.float32), w)
    with pytest.raises(ValueError, match="takes a QuantizedArray"):
        quantized_matmul(x, jnp.ones((64, 8)))
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16\. Got int32"):
        quantized_matmul(x.astype(jnp.int32), w)
    with pytest.raises(ValueError, match="do not divide"):
        quantized_matmul(x, dataclasses.replace(w, scales=jnp.ones((8, 3))))
    with pytest.raises(ValueError, match="unknown"):
        quantized_matmul(x, w, implementation="cuda")
    with pytest.raises(ValueError, match=r"outliers bool\[2\] must be bool and end in the 1 groups.*activations=None"):
        quantized_matmul(x, dataclasses.replace(w, outliers=jnp.zeros(2, bool)))
    with pytest.raises(ValueError, match=r"outliers float32\[1\] must be bool"):
        quantized_matmul(x, dataclasses.replace(w, activations="int4", outliers=jnp.ones(1)))
    for name, part in {"inputs": jnp.ones((3, 64)), "outliers": jnp.ones((3, 1), bool)}.items():
        with pytest.raises(ValueError, match=rf"{name} \(3, \d+\) are those of several weights"):
            quantized_matmul(x, dataclasses.replace(w, activations="int4", **{name: part}))
    with pytest.raises(ValueError, match=r"scales must be floating\. Got int32"):
        quantized_matmul(x, dataclasses.replace(w, scales=jnp.ones((8, 1), jnp.int32)))
    for name in set(BACKENDS) - set(PORTABLE):
        with pytest.raises(NotImplementedError, match=name):
            quantized_matmul(x, w, implementation=name)
