"""Grouped matmul by quantized matrices in plain XLA: they are dequantized in memory, then multiplied by ragged_dot.

Rounded activations meet scales of channels as values of 8 bits, which bfloat16 holds exactly, and what they sum to is
scaled; with more scales along K both sides are dequantized in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to
from pallas_kernels.ragged_dot import xla
from pallas_kernels.ragged_dot.schedule import bounds, row_groups


def grouped(lhs: jax.Array, rhs: QuantizedArray, group_sizes: jax.Array, dtype) -> jax.Array:
    """[M, N] of lhs [M, K] and rhs [G, K, N]; zeros past the groups."""
    if rhs.activations is None:
        return xla.grouped(lhs, rhs.dequantize(lhs.dtype), group_sizes, dtype)
    (G, N, _), S = rhs.values.shape, rhs.scales.shape[-1]
    rows = rows_for(lhs, rhs, implementation="xla")
    if S > 1 or rhs.offsets is not None:
        return xla.grouped(rows.dequantize(), rhs.dequantize(), group_sizes, dtype)
    exact = dataclasses.replace(rhs, scales=jnp.ones_like(rhs.scales)).dequantize(jnp.bfloat16)
    out = xla.grouped(rows.values.astype(jnp.bfloat16), exact, group_sizes, jnp.float32)
    channels = repeat_to(rhs.scales.astype(jnp.float32), (G, N, 1))[..., 0]
    inside = jnp.arange(lhs.shape[0], dtype=jnp.int32) < bounds(group_sizes, lhs.shape[0])[1][-1]
    scales = jnp.where(inside[:, None], rows.scales, 0)  # rows past the groups may hold anything
    return (out * scales * channels[row_groups(group_sizes, lhs.shape[0])]).astype(dtype)
