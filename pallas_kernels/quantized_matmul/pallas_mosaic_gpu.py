"""Quantized matmul for Hopper GPUs (sm90): which of the kernels runs a call.

Few rows, activations in bfloat16 or rounded to 8 bits: pallas_mosaic_gpu_few. More rows, activations rounded to 8 bits:
pallas_mosaic_gpu_many.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import QuantizedArray, quantize_rows
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
    if w.scales.shape[1] == 1 and unfit_few(_like(x, jnp.bfloat16), w) is None:
        return None
    return unfit_many(w)


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w."""
    if w.activations is None:
        return matmul_few(x, w, dtype)
    values, scales = quantize_rows(x, w.scales.shape[1], w.activations)
    if w.scales.shape[1] == 1 and unfit_few(_like(x, jnp.bfloat16), w) is None:
        # Few rows are bound by reading w: 8 bits win nothing, and bfloat16 holds their values exactly.
        out = matmul_few(values.astype(jnp.bfloat16), w, jnp.float32)
        return (out * scales).astype(dtype)
    w_values = w.values.astype(values.dtype)[None]  # int4 is exact in both, and widening it a small part of the time
    return matmul_many(values, scales, w_values, w.scales.astype(jnp.float32)[None], dtype)


def _like(x, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype)
