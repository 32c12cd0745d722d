"""Quantized matmul for Hopper GPUs (sm90): which of the kernels runs a call.

Few rows, activations in bfloat16, int8 or float8: pallas_mosaic_gpu_few. More rows, activations rounded to 8 bits:
pallas_mosaic_gpu_many.
"""

import re

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import QuantizedArray, quantize_rows
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_few import matmul_few, unfit_few
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_many import matmul_many, unfit_many


def supported(x, w: QuantizedArray, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    del dtype
    kind = _dispatch.device_kind()
    if not _dispatch.interpreted("gpu") and not re.search(r"\b(H100|H200|H800|H20|GH200)\b", kind):
        return f"needs a Hopper GPU; this is {kind}"
    if 0 in (*x.shape, *w.values.shape):
        return f"takes at least one number. Got x {x.shape}, w {w.values.shape}"
    if unfit_few(_few(x, w), w) is None:
        return None
    return unfit_few(x, w) if w.activations is None else unfit_many(w)


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w."""
    if w.activations is None:
        return matmul_few(x, w, dtype)
    values, scales = quantize_rows(x, w.scales.shape[1], w.activations)
    if unfit_few(_few(x, w), w) is not None:
        w_values = w.values.astype(values.dtype)[None]  # int4 is exact in both
        return matmul_many(values, scales, w_values, w.scales.astype(jnp.float32)[None], dtype)
    if w.activations == "int8":
        return matmul_few(values, w, dtype, scales)
    # Few rows are bound by reading w: float8 wins nothing, and bfloat16 holds its values exactly.
    return (matmul_few(values.astype(jnp.bfloat16), w, jnp.float32) * scales).astype(dtype)


def _few(x, w: QuantizedArray) -> jax.ShapeDtypeStruct:
    """What the kernel for few rows would get as x; float8 with more than one scale a row is not for it."""
    if w.activations is None or (w.activations == "float8_e4m3fn" and w.scales.shape[1] > 1):
        return jax.ShapeDtypeStruct(x.shape, x.dtype if w.activations is None else jnp.float32)
    return jax.ShapeDtypeStruct(x.shape, jnp.int8 if w.activations == "int8" else jnp.bfloat16)
