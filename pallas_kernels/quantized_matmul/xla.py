"""Quantized matmul in plain XLA: what runs where no kernel does.

With one scale per channel the values are multiplied as they are and the result is scaled. With groups the weight is
dequantized on its way into the matmul, in the dtype of x: a group's products could be scaled instead, but XLA would
write M x N x G of them. Activations in 8 bits meet values in 8 bits (4-bit ones are widened, which is exact), a scan
step for each group.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w [K, N]."""
    if w.activations is not None:
        return _quantized_activations(x, w).astype(dtype)
    exact = "highest" if x.dtype == jnp.float32 else None
    if w.scales.shape[1] > 1:
        dense = w.dequantize(x.dtype).T
        return _dot(x, dense, jnp.float32, exact).astype(dtype)
    out = _dot(x, w.values.astype(x.dtype), jnp.float32, exact) * _row(w.scales, w)
    if w.offsets is not None:
        out = out + x.astype(jnp.float32).sum(axis=1, keepdims=True) * _row(w.offsets, w)
    return out.astype(dtype)


def _quantized_activations(x: jax.Array, w: QuantizedArray) -> jax.Array:
    """float32 [M, N] = sum over groups of (x's scale) (w's scale) (products of values) + (x's sum) (w's offset)."""
    assert w.activations is not None
    M, G, N = x.shape[0], w.scales.shape[1], w.values.shape[0]
    rows = rows_for(x, w, implementation="xla")
    values, x_scales = rows.values, rows.scales
    integer = values.dtype == jnp.int8
    # Where they do not meet in 8 bits they meet in bfloat16, which holds them all. XLA's float8 matmul on CPUs is off
    # by 2 %.
    alike = integer or (w.values.dtype == values.dtype and _dispatch.device_kind() != "cpu")
    values, w_values = (v.astype(values.dtype if alike else jnp.bfloat16) for v in (values, w.values))

    def product(x, w, x_scales, w_scales, w_offsets):
        kind = jnp.int32 if integer else jnp.float32
        out = _dot(x, w, kind).astype(jnp.float32) * x_scales[:, None] * w_scales[None]
        if w_offsets is not None:
            total = x.astype(jnp.float32).sum(axis=1) * x_scales
            out = out + total[:, None] * w_offsets[None]
        return out

    w_scales = repeat_to(w.scales.astype(jnp.float32), (N, G))
    w_offsets = None if w.offsets is None else repeat_to(w.offsets, (N, G))
    if G == 1:
        return product(values, w_values, x_scales[:, 0], w_scales[:, 0], None if w_offsets is None else w_offsets[:, 0])

    def step(acc, group):
        return acc + product(*group), None

    split = lambda v: jnp.moveaxis(v.reshape(v.shape[0], G, -1), 1, 0)
    columns = None if w_offsets is None else w_offsets.T
    start = jnp.zeros_like(x, dtype=jnp.float32, shape=(M, N))
    return jax.lax.scan(step, start, (split(values), split(w_values), x_scales.T, w_scales.T, columns))[0]


def _row(scales: jax.Array, w: QuantizedArray) -> jax.Array:
    return repeat_to(scales.astype(jnp.float32), (w.values.shape[0], 1)).T


def _dot(x: jax.Array, w: jax.Array, kind, precision=None) -> jax.Array:
    """[M, N] of [M, K] and [N, K]."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=kind)
