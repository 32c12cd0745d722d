"""Quantized matmul for TPUs, written in Pallas: 4 and 8 bit weights are read as they lie and widened on the chip.

A block of w is multiplied a group at a time and each product is scaled on its way into the float32 sum, so nothing
dequantized leaves the chip. int8 activations meet int8 weights in int8.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _dispatch
from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to

_LANES = 128
_ROWS, _COLUMNS, _DEPTH = 256, 512, 1024  # of the largest blocks


def supported(x, w: QuantizedArray, dtype) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if reason := _dispatch.unless_tpu():
        return reason
    if (x.dtype != jnp.bfloat16 and w.activations is None) or dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes x in bfloat16, or rounded to int8, to float32 and bfloat16. Got x {x.dtype}, out {dtype}"
    if w.values.dtype not in (jnp.int4, jnp.int8):
        return f"takes values in int4 and int8. Got {w.values.dtype}"
    if w.activations == "float8_e4m3fn":
        return f"takes activations as they are or in int8. Got {w.activations}"
    (N, K), G = w.values.shape, w.scales.shape[1]
    if 0 in (*x.shape, N, K) or N % _LANES or K % (2 * _LANES):
        return (
            f"takes N that is a multiple of {_LANES} and K that is one of {2 * _LANES}. Got x {x.shape}, N={N}, K={K}"
        )
    if G > 1 and (w.activations is not None or w.group % _LANES):
        return f"takes groups of multiples of {_LANES}, activations not rounded; or channels. Got groups of {w.group}"
    return None


def matmul(x: jax.Array, w: QuantizedArray, dtype) -> jax.Array:
    """[M, N] of x [M, K] and a flat w."""
    (M, _), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    scales = repeat_to(w.scales.astype(jnp.float32), (N, G)).T
    plain = w.offsets is None and w.activations is None
    rows = None if w.activations is None else rows_for(x, w)
    values = x if rows is None else rows.values
    out = _product(values, w.values, scales, dtype if plain else jnp.float32)
    if w.offsets is not None:
        sums = values.astype(jnp.float32).reshape(M, G, -1).sum(axis=2)
        out += jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")
    return (out if rows is None else out * rows.scales).astype(dtype)


def _product(x: jax.Array, w: jax.Array, scales: jax.Array, dtype) -> jax.Array:
    """[M, N]: the sum over g of (x[:, g] @ w[:, g].T) * scales[g]; w [N, K], scales [G, N] float32."""
    (M, K), N, G = x.shape, w.shape[0], scales.shape[0]
    group = K // G
    bm, bn = min(_ROWS, -(-M // 32) * 32), _divisor(N, _COLUMNS)
    bk = next(d for d in (_DEPTH, 512, 256) if K % d == 0)
    piece = min(group, bk) if G > 1 else bk
    if bk % piece or group % piece:
        piece = _LANES
    pieces = bk // piece
    x = jnp.pad(x, ((0, -M % bm), (0, 0)))
    # A row of scales for each piece of a block.
    rows = scales[(jnp.arange(K // piece) * piece) // group].reshape(K // bk, pieces, N) if G > 1 else scales[None]
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32

    def kernel(x_ref, w_ref, scales_ref, out_ref, acc_ref):
        k = pl.program_id(2)

        @pl.when(k == 0)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        for p in range(pieces):
            columns = slice(p * piece, (p + 1) * piece)
            # From int4 by way of int8 or float32, which every generation has.
            b = w_ref[:, columns].astype(jnp.int8 if kind == jnp.int32 else jnp.float32).astype(x.dtype)
            part = lax.dot_general(x_ref[:, columns], b, (((1,), (1,)), ((), ())), preferred_element_type=kind)
            part = part.astype(jnp.float32)
            acc_ref[...] += part * scales_ref[0, pl.ds(p, 1)] if G > 1 else part

        @pl.when(k == K // bk - 1)
        def _():
            out = acc_ref[...] if G > 1 else acc_ref[...] * scales_ref[0]
            out_ref[...] = out.astype(dtype)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((x.shape[0], N), dtype, manual_axis_type=jax.typeof(x).mat),
        grid=(x.shape[0] // bm, N // bn, K // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda m, n, k: (m, k)),
            pl.BlockSpec((bn, bk), lambda m, n, k: (n, k)),
            pl.BlockSpec((1, rows.shape[1], bn), lambda m, n, k: (k if G > 1 else 0, 0, n)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, k: (m, n)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="quantized_matmul",
    )(x, w, rows)
    return out[:M]


@functools.cache
def _divisor(size: int, most: int) -> int:
    """The largest multiple of 128 that divides size and is at most `most`."""
    return max(d for d in range(_LANES, most + 1, _LANES) if size % d == 0)
