"""The formula: dequantize, then multiply in float32; activations are rounded first where the weight asks for it."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w [K, N]."""
    if w.activations is not None:
        x = rows_for(x, w, implementation="xla").dequantize()
    out = jnp.dot(x.astype(jnp.float32), w.dequantize(), precision="highest")
    return out.astype(dtype)
