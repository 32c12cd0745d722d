"""Pallas' Triton backend: some rows' groups are read once, and rounded in registers. Bound by memory."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _dispatch, _triton
from pallas_kernels._triton import inside, load, store
from pallas_kernels.quantize_rows.xla import held_as, round_rows
from pallas_kernels.quantized_matmul.array import FORMATS, Activations

_MOST = 32768  # numbers of a group, in the registers of one block


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of a block, or more where one group has more; warps."""

    numbers: int = 8192
    warps: int = 8


def supported(x, groups: int, outliers) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if reason := _triton.unfit():
        return reason
    if not _dispatch.interpreted("triton") and _triton.capability() < 89:
        return f"float8 needs compute capability 8.9 or above; this is {_triton.capability() / 10}"
    if outliers is not None:
        return "takes no outliers"
    (M, K) = x.shape
    if not 0 < M * K < 2**31 or K // groups > _MOST:
        return f"takes fewer than 2^31 numbers, at most {_MOST} of them in a group. Got {x.shape}, {groups} groups"
    return None


def quantize_rows(
    x: jax.Array, groups: int, dtype: Activations, outliers: None = None, config: Config | None = None
) -> tuple[jax.Array, jax.Array]:
    del outliers
    (M, K), c = x.shape, config or Config()
    R, group = M * groups, K // groups
    width = 1 << (group - 1).bit_length()
    height = max(1, min(c.numbers // width, 1 << (R - 1).bit_length()))

    def kernel(x_ref, values_ref, scales_ref):
        row = pl.program_id(0) * height
        here = pl.ds(row, height)
        keep = inside((row, height, R), (0, width, group))
        tile = load(x_ref, here, pl.ds(0, width), keep=keep).astype(jnp.float32)
        values, scales = round_rows(tile, jnp.abs(tile).max(axis=-1), held_as(dtype), FORMATS[dtype][2])
        store(values_ref, values, here, pl.ds(0, width), keep=keep)
        index = row + lax.iota(jnp.int32, height)
        across, down = lax.rem(index, jnp.int32(groups)), lax.div(index, jnp.int32(groups))
        place = jnp.where(index < R, across * M + down, index)  # what is masked stands nowhere, for the interpreter
        store(scales_ref, scales, place, keep=inside((row, height, R)))

    outputs = [((R, group), held_as(dtype)), ((R,), jnp.float32)]
    grid = (pl.cdiv(R, height),)
    values, scales = _triton.launch(
        kernel, "quantize_rows", grid, (x.reshape(R, group),), outputs, warps=c.warps, stages=1
    )
    # As kernels want them that take a step along K for many rows: their transposition and this one are none.
    return values.reshape(M, K), scales.reshape(groups, M).T
