"""Quantized matmul for Hopper GPUs (sm90): which of the kernels runs a call.

Few rows, activations in bfloat16 or rounded: pallas_mosaic_gpu_few. More rows, activations rounded:
pallas_mosaic_gpu_many. Hopper multiplies no integers of 4 bits; those are widened, exactly.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_few import matmul_few, unfit_few
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_many import matmul_many, unfit_many


def supported(x, w: QuantizedArray, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    del dtype
    if reason := _dispatch.unless_hopper():
        return reason
    if 0 in (*x.shape, *w.values.shape):
        return f"takes at least one number. Got x {x.shape}, w {w.values.shape}"
    if w.activations is None:
        return unfit_few(x, w)
    return None if _few(x, w) else unfit_many(w)


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w."""
    if w.activations is None:
        return matmul_few(x, w, dtype)
    rows = rows_for(x, w)
    if _few(x, w):  # bound by reading w: 8 bits win nothing, and bfloat16 holds their values exactly
        if w.scales.shape[1] == 1:
            return (matmul_few(rows.values.astype(jnp.bfloat16), w, jnp.float32) * rows.scales).astype(dtype)
        return matmul_few(rows.dequantize().astype(jnp.bfloat16), w, dtype)
    # int4 is exact in both, and widening it a small part of the time.
    w_values = w.natural().values.astype(rows.values.dtype)[None]
    return matmul_many(rows, w_values, w.scales.astype(jnp.float32)[None], dtype)


def _few(x, w: QuantizedArray) -> bool:
    """Whether the kernel for few multiplies rounded rows: with scales along K, or more than 16 rows of 8 bits, only
    where that for many does not."""
    rounded = jax.dtypes.itemsize_bits(w.values.dtype) == 8 and x.shape[0] > 16
    if (w.scales.shape[1] > 1 or rounded) and unfit_many(w) is None:
        return False
    return unfit_few(jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), w) is None
