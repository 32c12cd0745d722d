"""Grouped matmul for GPUs before Hopper, in Pallas' Triton backend: bfloat16, float16. Newer GPUs run it too.

A tile of the output has rows of one group; a table made on the device says which (schedule.py), so a group that starts
in the middle of a block of rows is no special case and an empty one costs nothing. Tiles are walked in strips a few
tiles high, so that what blocks read at one time stays in the L2. One writer, one order of summation: results repeat bit
by bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton
from pallas_kernels._triton import cover, dot, inside, load, store
from pallas_kernels.ragged_dot.schedule import bounds, make_tiles

_STRIP = 8  # tiles of rows that are computed together


@dataclasses.dataclass(frozen=True)
class Config:
    """Of one kernel: a tile of the output, numbers summed in a step, warps, loads in flight."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tuned(height: float) -> Config:
    """For groups of `height` rows on the average."""
    if height <= 32:  # bound by reading rhs
        return Config(16 if height <= 8 else 32, 128, 64, 4, 4)
    if height <= 64:
        return Config(64, 128, 64, 4, 3)
    return Config(128, 128, 32, 4, 4) if _triton.shared_memory() < 200 * 1024 else Config(128, 256, 64, 8, 3)


def tuned_contraction() -> Config:
    return Config(128, 128, 32, 4, 4) if _triton.shared_memory() < 200 * 1024 else Config(128, 256, 64, 8, 3)


def supported(lhs, rhs, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    del rhs
    if reason := _triton.unfit():
        return reason
    if lhs.dtype not in (jnp.bfloat16, jnp.float16) or dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16. Got {lhs.dtype}, out {dtype}"
    return None


def grouped(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    dtype,
    *,
    transposed: bool = False,
    config: Config | None = None,
) -> jax.Array:
    """[M, N]: rows of group g times rhs[g] [K, N], or times the transpose of rhs[g] [N, K]; zeros past the groups."""
    (M, K), G = lhs.shape, rhs.shape[0]
    N = rhs.shape[1 if transposed else 2]
    config = config or tuned(M / G)
    bm, bn, bk = cover(M, config.rows), cover(N, config.columns), cover(K, config.depth)
    table = make_tiles(group_sizes, M, bm).table
    tiles, columns = table.shape[0], pl.cdiv(N, bn)

    def kernel(table_ref, lhs_ref, rhs_ref, out_ref):
        row, column = _strips(pl.program_id(0), tiles, columns)
        group, start, end = table_ref[row, 0], table_ref[row, 2], table_ref[row, 3]
        matrix = jnp.minimum(group, G - 1)
        here, there = pl.ds(start, bm), pl.ds(column * bn, bn)

        def step(k, acc):
            along = pl.ds(k * bk, bk)
            x = load(lhs_ref, here, along, keep=inside((start, bm, end), (k * bk, bk, K)))
            if transposed:
                y = load(rhs_ref, matrix, there, along, keep=inside((column * bn, bn, N), (k * bk, bk, K)))
            else:
                y = load(rhs_ref, matrix, along, there, keep=inside((k * bk, bk, K), (column * bn, bn, N)))
            return acc + dot(x, y, 1, 1 if transposed else 0)

        steps = pl.cdiv(K, bk) * ((group < G) & (start < end)).astype(jnp.int32)  # past the groups: zeros
        acc = lax.fori_loop(0, steps, step, jnp.zeros((bm, bn), jnp.float32))
        store(out_ref, acc, here, there, keep=inside((start, bm, end), (column * bn, bn, N)))

    return _triton.launch(
        kernel,
        "ragged_dot_transposed" if transposed else "ragged_dot",
        (tiles * columns,),
        (table, lhs, rhs),
        [((M, N), dtype)],
        warps=config.warps,
        stages=config.stages,
    )[0]


def contraction(
    lhs: jax.Array, grad: jax.Array, group_sizes: jax.Array, dtype, *, config: Config | None = None
) -> jax.Array:
    """[G, K, N]: lhs.T @ grad over the rows of each group."""
    (M, K), N, G = lhs.shape, grad.shape[1], group_sizes.shape[0]
    config = config or tuned_contraction()
    bk, bn, bm = cover(K, config.rows), cover(N, config.columns), cover(M, config.depth)
    tiles, columns = pl.cdiv(K, bk), pl.cdiv(N, bn)

    def kernel(begins_ref, ends_ref, lhs_ref, grad_ref, out_ref):
        group = pl.program_id(1)
        begin, end = begins_ref[group], ends_ref[group]
        row, column = _strips(pl.program_id(0), tiles, columns)
        here, there = pl.ds(row * bk, bk), pl.ds(column * bn, bn)

        def step(i, acc):
            start = begin + i * bm
            x = load(lhs_ref, pl.ds(start, bm), here, keep=inside((start, bm, end), (row * bk, bk, K)))
            y = load(grad_ref, pl.ds(start, bm), there, keep=inside((start, bm, end), (column * bn, bn, N)))
            return acc + dot(x, y, 0, 0)

        steps = lax.div(end - begin + (bm - 1), jnp.int32(bm))
        acc = lax.fori_loop(0, steps, step, jnp.zeros((bk, bn), jnp.float32))
        store(out_ref, acc, group, here, there, keep=inside((row * bk, bk, K), (column * bn, bn, N)))

    return _triton.launch(
        kernel,
        "ragged_contraction",
        (tiles * columns, G),
        (*bounds(group_sizes, M), lhs, grad),
        [((G, K, N), dtype)],
        warps=config.warps,
        stages=config.stages,
    )[0]


def _strips(i, tiles: int, columns: int):
    """Row and column of the i-th tile: strips of _STRIP rows, down each column of a strip first."""
    strip = lax.div(i, jnp.int32(_STRIP * columns))
    height = jnp.minimum(tiles - strip * _STRIP, _STRIP)
    i -= strip * _STRIP * columns
    return strip * _STRIP + lax.rem(i, height), lax.div(i, height)
