"""The formulas in jax.numpy, float32 inside: the kernels' oracles, and their fallbacks."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_layer.rows import Rows, to_rows
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.array import QuantizedArray


def matmul_parts(rows: Rows, w: QuantizedArray, eps: float):
    x = rows.scaled
    factor = jax.lax.rsqrt(rows.squares[: len(x)].sum(axis=1, keepdims=True) / x.shape[1] + eps)
    return (quantized_matmul(x, w, preferred_element_type=jnp.float32) * factor)[None]


def matmul_gate(rows: Rows, w: QuantizedArray, eps: float):
    dtype = rows.scaled.dtype
    gate, up = jnp.split(matmul_parts(rows, w, eps)[0].astype(dtype).astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)


def matmul_add(h, w: QuantizedArray, x, scale, offset: float):
    x = (x.astype(jnp.float32) + quantized_matmul(h, w).astype(jnp.float32)).astype(x.dtype)
    return x, to_rows(x, scale, offset)
