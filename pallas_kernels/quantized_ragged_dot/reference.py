"""The formula: dequantize, then a loop over groups in float32; activations are rounded first where w asks for it."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray
from pallas_kernels.ragged_dot import reference


def grouped(lhs: jax.Array, rhs: QuantizedArray, group_sizes: jax.Array, dtype) -> jax.Array:
    """[M, N] of lhs [M, K] and rhs [G, K, N]; zeros past the groups."""
    if rhs.activations is not None:
        lhs = rows_for(lhs, rhs, implementation="xla").dequantize()
    return reference.grouped(lhs.astype(jnp.float32), rhs.dequantize(), group_sizes, dtype)
