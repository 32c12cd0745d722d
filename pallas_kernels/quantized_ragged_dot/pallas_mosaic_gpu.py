"""ragged_dot of a QuantizedArray for Hopper GPUs (sm90): which kernel runs a call.

Activations rounded to 8 bits: the kernel of quantized_matmul for many rows, which takes them in groups. Else, where
groups have few rows: pallas_mosaic_gpu_few, which reads the values as they lie. Above, where the tensor cores and not
the memory are what is waited for, the matrices are dequantized in memory for the kernel of ragged_dot.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_many import matmul_many, unfit_many
from pallas_kernels.quantized_ragged_dot.pallas_mosaic_gpu_few import grouped_few, unfit_few
from pallas_kernels.ragged_dot import pallas_mosaic_gpu as dense


def supported(lhs, rhs: QuantizedArray, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    if 0 in (*lhs.shape, *rhs.shape):
        return f"takes at least one number. Got lhs {lhs.shape}, rhs {rhs.shape}"
    if rhs.activations is not None:
        return unfit_many(rhs)
    few = unfit_few(lhs, rhs)
    many = dense.supported(lhs, jax.ShapeDtypeStruct(rhs.shape, lhs.dtype), dtype)
    return few and many and f"{few}; or, dequantized, {many}"


def grouped(lhs: jax.Array, rhs: QuantizedArray, group_sizes: jax.Array, dtype) -> jax.Array:
    """[M, N] of lhs [M, K] and rhs [G, K, N]; zeros past the groups."""
    if rhs.activations is not None:
        rows = rows_for(lhs, rhs)
        matrices = rhs.values.astype(rows.values.dtype)  # int4 is exact in both
        return matmul_many(rows, matrices, rhs.scales.astype(jnp.float32), dtype, group_sizes)
    if unfit_few(lhs, rhs) is None:
        return grouped_few(lhs, rhs, group_sizes, dtype)
    return dense.grouped(lhs, rhs.dequantize(lhs.dtype), group_sizes, dtype)
