"""Activations rounded to 8 bits: each backend against float64 and a search among all values of the format.

The Triton kernel runs in Pallas' interpreter here; benchmarks/quantized/bench.py compares it with XLA's on the device.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import _triton, quantize_rows, quantize_rows_implementation
from pallas_kernels.quantize_rows import triton
from pallas_kernels.quantize_rows.api import BACKENDS

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


def on(name):
    return _triton.force_interpret_mode() if name == "triton" else contextlib.nullcontext()


def values_of(dtype) -> np.ndarray:
    """All finite numbers of the format, ascending."""
    if "int" in dtype:
        return np.arange(-LARGEST[dtype], LARGEST[dtype] + 1, dtype=np.float64)
    grid = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    return np.unique(grid[np.isfinite(grid)])


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("name", BACKENDS)
def test_each_number_is_the_nearest(rng, name, dtype):
    M, groups = int(rng.integers(1, 70)), int(rng.integers(1, 4))
    group = int(rng.choice([16, 96, 128, 200]))
    x = rng.normal(size=(M, groups, group)) * 2.0 ** rng.integers(-30, 30, size=(M, groups, 1))
    x[rng.integers(M), 0] = 0
    x = jnp.asarray(x.reshape(M, -1), [jnp.float32, jnp.bfloat16][rng.integers(2)])
    print(x.shape, x.dtype, groups)
    with on(name):
        rows = quantize_rows(x, groups, dtype, implementation=name)
    assert (rows.format, rows.dtype, rows.shape) == (dtype, x.dtype, x.shape)
    values, scales = rows.values, rows.scales
    assert values.shape == x.shape and values.dtype == (jnp.int8 if "int" in dtype else jnp.float8_e4m3fn)
    assert scales.shape == (M, groups) and scales.dtype == jnp.float32
    x = np.asarray(x, np.float64).reshape(M, groups, group)
    top = np.abs(x).max(axis=-1)
    np.testing.assert_allclose(scales, top / LARGEST[dtype], rtol=2.0**-22, atol=0)
    scales, grid = np.asarray(scales, np.float64)[..., None], values_of(dtype)
    got = np.asarray(values).astype(np.float64).reshape(x.shape)
    assert (got[top == 0] == 0).all()
    inside = x / np.where(scales == 0, 1, scales)
    right = np.clip(np.searchsorted(grid, inside), 1, len(grid) - 1)
    best = np.minimum(np.abs(grid[right] - inside), np.abs(grid[right - 1] - inside))
    assert (np.abs(got - inside) <= best + 2.0**-21 * np.abs(inside)).all()


def test_backends_agree_bit_by_bit(rng):
    """Several blocks, the last one not full."""
    x, dtype = jnp.asarray(rng.normal(size=(100, 256)), jnp.bfloat16), str(rng.choice(list(LARGEST)))
    with on("triton"):
        values, scales = triton.quantize_rows(x, 2, dtype, config=triton.Config(2048, 4))  # pyright: ignore
    want = quantize_rows(x, 2, dtype, implementation="xla")  # pyright: ignore
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(want.values, np.float32))
    np.testing.assert_array_equal(scales, want.scales)
    back = np.asarray(values, np.float64).reshape(100, 2, 128) * np.asarray(scales, np.float64)[..., None]
    np.testing.assert_allclose(want.dequantize(), back.reshape(100, 256), rtol=2.0**-22)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_may_be_gathered_first(rng, name):
    """Rounding a row that is gathered is gathering a row that is rounded, bit by bit."""
    x, dtype = jnp.asarray(rng.normal(size=(30, 256)), jnp.bfloat16), str(rng.choice(list(LARGEST)))
    token = jnp.asarray(rng.integers(30, size=70), jnp.int32)
    with on(name):
        first = quantize_rows(x, 2, dtype, implementation=name)  # pyright: ignore
        then = quantize_rows(x[token], 2, dtype, implementation=name)  # pyright: ignore
    for a, b in zip(jax.tree.leaves(jax.tree.map(lambda a: a[token], first)), jax.tree.leaves(then), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_no_gradient(rng):
    x = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
    with pytest.raises(NotImplementedError, match="has no gradient; give the matmul the array"):
        jax.grad(lambda x: quantize_rows(x, 2, "float8_e4m3fn").dequantize().sum())(x)
    assert jax.grad(lambda x: (x + quantize_rows(jax.lax.stop_gradient(x), 2, "int8").scales.sum()).sum())(x).shape


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_not_finite_stays_seen(rng, name, bad):
    x = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32).at[1, 40].set(bad)
    with on(name):
        rows = quantize_rows(x, 2, "int8", implementation=name)
    back = rows.dequantize().reshape(3, 2, 32)
    assert np.array_equal(np.isfinite(np.asarray(back)).all(axis=-1), [[True, True], [True, False], [True, True]])


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("dtype", LARGEST)
def test_one_nan_of_many_numbers_stays_seen(rng, dtype):
    x = rng.normal(size=(64, 256)).astype(np.float32)
    row, column = rng.integers(64), rng.integers(256)
    x[row, column] = np.nan
    scales = jax.jit(quantize_rows, static_argnums=(1, 2))(x, 4, dtype).scales
    assert np.argwhere(~np.isfinite(np.asarray(scales))).tolist() == [[row, column // 64]]


def test_outliers_keep_8_bits(rng):
    x = jnp.asarray(rng.normal(size=(5, 96)), jnp.float32)
    outliers = jnp.asarray([False, True, False])
    with on("triton"):
        assert quantize_rows_implementation(x, 3) == "triton"
        assert quantize_rows_implementation(x, 3, outliers) == "xla"
        rows = quantize_rows(x, 3, "int4", outliers)
    tops = np.abs(np.asarray(rows.values).reshape(5, 3, 32).astype(int)).max(axis=-1)
    assert (tops == [7, 127, 7]).all()
    want = np.abs(np.asarray(x).reshape(5, 3, 32)).max(axis=-1) / [7, 127, 7]
    np.testing.assert_allclose(rows.scales, want, rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_no_numbers(shape):
    rounded = quantize_rows(jnp.zeros(shape, jnp.bfloat16), 2, "int4")
    values, scales = rounded.values, rounded.scales
    assert (values.shape, values.dtype, scales.shape, scales.dtype) == (shape, jnp.int8, (shape[0], 2), jnp.float32)
    assert (np.asarray(scales) == 0).all()


def test_types_under_shard_map(rng):
    """Only traced: rows over dp, with types checked."""
    mesh = jax.make_mesh((2,), ("dp",), axis_types=(AxisType.Explicit,))
    x = jnp.asarray(rng.normal(size=(8, 128)), jnp.bfloat16)
    f = lambda x: quantize_rows(x, 2, "int8", implementation="triton")
    with jax.set_mesh(mesh), on("triton"):
        x = jax.device_put(x, jax.NamedSharding(mesh, P("dp", None)))
        rows = jax.eval_shape(jax.shard_map(f, out_specs=P("dp", None)), x)
    assert (rows.shape, rows.values.dtype, rows.scales.shape) == (x.shape, jnp.int8, (8, 2))


def test_refused_calls_say_why(rng):
    x = jnp.asarray(rng.normal(size=(4, 96)), jnp.float32)
    with pytest.raises(ValueError, match="5 groups do not divide the K=96"):
        quantize_rows(x, 5, "int8")
    with pytest.raises(ValueError, match=r"Got int32\[4, 96\]"):
        quantize_rows(x.astype(jnp.int32), 3, "int8")
    with pytest.raises(ValueError, match=r"outliers bool\[3\] beside int4. Got int8, bool\[3\]"):
        quantize_rows(x, 3, "int8", jnp.ones(3, bool))
    with pytest.raises(NotImplementedError, match="compute capability"):
        quantize_rows(x, 3, "int8", implementation="triton")
