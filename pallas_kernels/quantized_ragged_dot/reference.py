"""The formula: dequantize, then a loop over groups in float32; activations are rounded first where w asks for it."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows.xla import quantize_rows
from pallas_kernels.quantized_matmul.array import QuantizedArray
from pallas_kernels.ragged_dot import reference


def grouped(lhs: jax.Array, rhs: QuantizedArray, group_sizes: jax.Array, dtype) -> jax.Array:
    """[M, N] of lhs [M, K] and rhs [G, K, N]; zeros past the groups."""
    lhs = lhs.astype(jnp.float32)
    if rhs.activations is not None:
        values, scales = quantize_rows(lhs, rhs.scales.shape[-1], rhs.activations)
        lhs = (values.astype(jnp.float32).reshape(*scales.shape, -1) * scales[..., None]).reshape(lhs.shape)
    return reference.grouped(lhs, rhs.dequantize(), group_sizes, dtype)
