"""Gradients rounded to float8 in both layouts: each backend against float64 and a search among all float8 numbers.

The Triton kernels run in Pallas' interpreter here; benchmarks/quantized/gradients.py repeats the comparison on the
device.
"""

import contextlib
import math

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _triton
from pallas_kernels.float8_grads.api import ACTIVATIONS, BACKENDS, gated_grads, round_both

FORMATS = [jnp.float8_e4m3fn, jnp.float8_e5m2]


def on(name):
    return _triton.force_interpret_mode() if name == "triton" else contextlib.nullcontext()


def check(values, scale, want, error=0.0):
    """values * scale is the float8 number next to `want`, or to a number that is `error` away from it."""
    grid = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float64)
    grid = np.unique(grid[np.isfinite(grid)]) * float(scale)
    inside = np.clip(want, grid[0], grid[-1])
    right = np.clip(np.searchsorted(grid, inside), 1, len(grid) - 1)
    best = np.minimum(np.abs(grid[right] - inside), np.abs(grid[right - 1] - inside))
    got = np.asarray(values).astype(np.float64) * float(scale)
    assert (np.abs(got - inside) <= best + 2 * error).all()


def derivative(kind, x):
    """act(x) and act'(x), float64."""
    if kind == "silu":
        s = 1 / (1 + np.exp(-x))
        return x * s, s * (1 + x * (1 - s))
    if kind == "gelu":
        cdf = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x * cdf, cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


@pytest.mark.parametrize("name", BACKENDS)
def test_both_layouts_hold_the_nearest_numbers(rng, name):
    lead = [(), (2,), (1, 3)][rng.integers(3)]
    shape = *lead, int(rng.integers(1, 300)), int(rng.integers(1, 200))
    dtype = [jnp.float32, jnp.bfloat16, jnp.float16][rng.integers(3)]
    format = FORMATS[rng.integers(2)]
    x = jnp.asarray(rng.normal(size=shape) * 2.0 ** rng.uniform(-8, 4, size=shape), dtype)
    scale = jnp.asarray(2.0 ** rng.integers(-12, 1, size=lead), jnp.float32)  # of some the largest are cut off
    print(shape, dtype, format, scale)
    with on(name):
        values, flipped, top = round_both(x, scale, format, implementation=name)
    assert values.dtype == flipped.dtype == format
    np.testing.assert_array_equal(np.asarray(flipped, np.float32), np.asarray(values, np.float32).swapaxes(-1, -2))
    for i in np.ndindex(*lead):
        check(values[i], scale[i], np.asarray(x[i], np.float64))
    assert float(top) == np.abs(np.asarray(x, np.float32)).max()


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_too_large_is_cut_off_and_nan_stays(name):
    x = jnp.asarray([[1e5, -1e5, jnp.nan, 3.0, jnp.inf, 0.0]], jnp.float32)
    for format in FORMATS:
        most = float(jnp.finfo(format).max)
        with on(name):
            values, flipped, _ = round_both(x, jnp.float32(1), format, implementation=name)
        np.testing.assert_array_equal(np.asarray(values, np.float32), [[most, -most, np.nan, 3, most, 0]])
        np.testing.assert_array_equal(np.asarray(flipped, np.float32), np.asarray(values, np.float32).T)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_of_a_gated_layer(rng, name):
    shape = (int(rng.integers(1, 150)), int(rng.integers(1, 150)))
    kind = list(ACTIVATIONS)[rng.integers(3)]
    dtype = [jnp.float32, jnp.bfloat16][rng.integers(2)]
    print(shape, kind, dtype)
    grad, gate, up = (jnp.asarray(rng.normal(size=shape) * 2, dtype) for _ in range(3))
    scales = tuple(jnp.float32(2.0**-k) for k in rng.integers(2, 9, size=3))
    with on(name):
        got = gated_grads(grad, gate, up, scales, (FORMATS[1], FORMATS[0]), kind, implementation=name)
    d, g, u = (np.asarray(x, np.float64) for x in (grad, gate, up))
    value, slope = derivative(kind, g)
    error = 1e-5 * np.abs(d * u).max() + 1e-6 * max(np.abs(d * value).max(), np.abs(value * u).max())  # of float32
    for both, scale, want in ((got.gate, scales[0], d * u * slope), (got.up, scales[1], d * value)):
        assert both.values.dtype == both.flipped.dtype == FORMATS[1]
        check(both.values, scale, want, error)
        np.testing.assert_array_equal(np.asarray(both.flipped, np.float32), np.asarray(both.values, np.float32).T)
        np.testing.assert_allclose(both.top, np.abs(want).max(), rtol=1e-5)
    assert got.hidden.dtype == FORMATS[0]
    check(got.hidden, scales[2], (value * u).T, error)
    np.testing.assert_allclose(got.hidden_top, np.abs(value * u).max(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (2, 0, 8), (0, 4, 8)])
def test_no_numbers(shape):
    x, scale = jnp.zeros(shape), jnp.ones(shape[:-2])
    made = round_both(x, scale, jnp.float8_e4m3fn)
    assert (made.values.shape, made.flipped.shape) == (x.shape, x.mT.shape) and made.top == 0
    if len(shape) == 2:
        made = gated_grads(x, x, x, (scale,) * 3, (jnp.float8_e5m2, jnp.float8_e4m3fn), "silu")
        assert made.up.values.shape == x.shape and made.hidden.shape == x.mT.shape and made.hidden_top == 0


def test_bad_input():
    x, one = jnp.ones((4, 4)), jnp.float32(1)
    for args, message in [
        ((x[0], one, FORMATS[0]), r"takes matrices \[M, N\] of one shape.*float32\[4\]"),
        ((x.astype(jnp.int32), one, FORMATS[0]), "takes float32, bfloat16 or float16; cast it. Got int32"),
        ((x, jnp.ones(2), FORMATS[0]), r"a scale in float32 for each matrix. Got .*float32\[2\]"),
        ((x, one, jnp.int8), r"rounds to float8_e4m3fn or float8_e5m2. Got \['int8'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            round_both(*args)
    with pytest.raises(ValueError, match="activation='relu' is unknown; use one of"):
        gated_grads(x, x, x, (one,) * 3, (FORMATS[1], FORMATS[0]), "relu")
    with pytest.raises(NotImplementedError, match="'triton' cannot run this call: needs an NVIDIA GPU"):
        round_both(x, one, FORMATS[0], implementation="triton")
