"""Attention of operands in float8: what rounding may cost, and where the kernel's registers stand."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention_float8
from tests.kernels.attention_oracle import close, one, oracle, registers

# importlib: the package's attribute `attention` is the function.
schedule = importlib.import_module("pallas_kernels.attention.schedule")


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


def test_float8_operands_stand_where_accumulators_do():
    """Each thread's registers by the layouts themselves: two pairs of an accumulator are the four of an operand."""
    float8 = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu_float8")
    places = np.arange(64 * 128).reshape(64, 128)
    wide = registers(places, mgpu.WGMMA_LAYOUT)
    narrow = registers(np.asarray(float8._order(places)), mgpu.WGMMA_LAYOUT_8BIT)
    assert mgpu.WGMMA_LAYOUT.lane_dims == mgpu.WGMMA_LAYOUT_8BIT.lane_dims
    np.testing.assert_array_equal(np.concatenate([wide[:, 0::2], wide[:, 1::2]], axis=-1), narrow)


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
