"""The formula: dequantize, then multiply in float32; activations are rounded first where the weight asks for it."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_rows.xla import quantize_rows
from pallas_kernels.quantized_matmul.array import QuantizedArray


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w [K, N]."""
    if w.activations is not None:
        values, scales = quantize_rows(x, w.scales.shape[1], w.activations, w.outliers)
        values = values.astype(jnp.float32).reshape(*scales.shape, -1)
        x = (values * scales[..., None]).reshape(x.shape)
    out = jnp.dot(x.astype(jnp.float32), w.dequantize(), precision="highest")
    return out.astype(dtype)
