"""Grouped matmul for TPUs, written in Pallas: float32, bfloat16.

Rows lie in blocks; a block with rows of several groups is visited once for each. A table made before the kernel
(schedule.py) and read by the index maps says which block and which group each visit is for. Visits of one block follow
each other, so the output stays on the chip between them and each adds its own rows; the same holds for visits of one
group where the sum runs over its rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _dispatch
from pallas_kernels.ragged_dot.schedule import make_tiles

_LANES = 128
_WHOLE = 6144  # bytes of the longest row that a block may hold whole


@dataclasses.dataclass(frozen=True)
class Config:
    """The largest blocks: rows, numbers summed in one step, columns. Powers of two from 128 on."""

    rows: int = 512
    depth: int = 1024
    columns: int = 512


TUNED = Config()


def supported(lhs, rhs, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _dispatch.unless_tpu():
        return reason
    if lhs.dtype not in (jnp.float32, jnp.bfloat16) or dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16. Got {lhs.dtype}, out {dtype}"
    _, K, N = rhs.shape
    if any(x % _LANES and x * lhs.dtype.itemsize > _WHOLE for x in (K, N)):
        most = _WHOLE // lhs.dtype.itemsize
        return f"takes K and N that are multiples of {_LANES} or at most {most}. Got K={K}, N={N}"
    return None


def grouped(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype, *, transposed: bool = False) -> jax.Array:
    """[M, N]: rows of group g times rhs[g] [K, N], or times the transpose of rhs[g] [N, K]; zeros past the groups."""
    (M, K), G = lhs.shape, rhs.shape[0]
    N = rhs.shape[1 if transposed else 2]
    bm, bk, bn = _row_block(M), _divisor(K, TUNED.depth), min(TUNED.columns, N)
    if bk > TUNED.depth and bn > 256:  # a whole row: 16 MB must hold two blocks of each operand
        bn = 256
    visits = _Visits(group_sizes, M, bm)
    depth = K // bk

    def kernel(group, block, begin, end, lhs_ref, rhs_ref, out_ref, acc_ref):
        t, k = pl.program_id(1), pl.program_id(2)
        first = (t == 0) | (block[t] != block[jnp.maximum(t - 1, 0)])
        used = (begin[t] < end[t]) & (group[t] < G)

        @pl.when(used & (k == 0))
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.when(used)
        def _():
            acc_ref[...] += _dot(lhs_ref[...], rhs_ref[0], 1, 1 if transposed else 0)

        @pl.when((k == depth - 1) & (first | used))
        def _():
            own = visits.own(block, begin, end, t, acc_ref.shape) & used
            before = jnp.where(first, jnp.zeros((), jnp.float32), out_ref[...].astype(jnp.float32))
            out_ref[...] = jnp.where(own, acc_ref[...], before).astype(dtype)

    matrix = lambda n, t, k, group, *_: (jnp.minimum(group[t], G - 1), *((n, k) if transposed else (k, n)))
    return _call(
        kernel,
        "ragged_dot_transposed" if transposed else "ragged_dot",
        (pl.cdiv(N, bn), visits.count, depth),
        [
            (lhs, (bm, bk), lambda n, t, k, group, block, *_: (block[t], k)),
            (rhs, (1, bn, bk) if transposed else (1, bk, bn), matrix),
        ],
        ((M, N), dtype, (bm, bn), lambda n, t, k, group, block, *_: (block[t], n)),
        (bm, bn),
        visits.tables,
        1,
    )


def contraction(lhs: jax.Array, grad: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """[G, K, N]: lhs.T @ grad over the rows of each group."""
    (M, K), N, G = lhs.shape, grad.shape[1], group_sizes.shape[0]
    bm, bk, bn = _row_block(M), min(TUNED.columns, K), min(TUNED.columns, N)
    visits = _Visits(group_sizes, M, bm, empty=True)  # their gradients are zeros that somebody has to write

    def kernel(group, block, begin, end, lhs_ref, grad_ref, out_ref, acc_ref):
        t = pl.program_id(2)
        mine = group[t] < G
        first = (t == 0) | (group[t] != group[jnp.maximum(t - 1, 0)])
        last = (t == visits.count - 1) | (group[t] != group[jnp.minimum(t + 1, visits.count - 1)])

        @pl.when(mine & first)
        def _():
            acc_ref[...] = jnp.zeros_like(acc_ref)

        @pl.when(mine & (begin[t] < end[t]))
        def _():
            # Both sides: what stands in rows of others may be nan.
            pick = lambda ref: jnp.where(
                visits.own(block, begin, end, t, ref.shape), ref[...], jnp.zeros((), ref.dtype)
            )
            acc_ref[...] += _dot(pick(lhs_ref), pick(grad_ref), 0, 0)

        @pl.when(mine & last)
        def _():
            out_ref[0] = acc_ref[...].astype(dtype)

    return _call(
        kernel,
        "ragged_contraction",
        (pl.cdiv(K, bk), pl.cdiv(N, bn), visits.count),
        [
            (lhs, (bm, bk), lambda m, n, t, group, block, *_: (block[t], m)),
            (grad, (bm, bn), lambda m, n, t, group, block, *_: (block[t], n)),
        ],
        ((G, K, N), dtype, (1, bk, bn), lambda m, n, t, group, *_: (jnp.minimum(group[t], G - 1), m, n)),
        (bk, bn),
        visits.tables,
        2,
    )


class _Visits:
    """Of each visit: group, block of rows, the group's rows in it [begin, end). Spare visits have none."""

    def __init__(self, group_sizes: jax.Array, M: int, rows: int, *, empty: bool = False):
        table = make_tiles(group_sizes, M, rows, rows, empty=empty).table
        blocks = jnp.minimum(table[:, 1] // rows, (M - 1) // rows)
        self.rows, self.count = rows, table.shape[0]
        self.tables = table[:, 0], blocks, table[:, 2], table[:, 3]

    def own(self, block, begin, end, t, shape):
        """Which of the block's rows are the group's, in `shape`."""
        row = lax.broadcasted_iota(jnp.int32, shape, 0) + block[t] * self.rows
        return (row >= begin[t]) & (row < end[t])


def _row_block(M: int) -> int:
    """A block of rows no larger than needed, in units that every dtype's tiles divide."""
    return min(TUNED.rows, -(-M // 16) * 16)


def _divisor(K: int, most: int) -> int:
    """The largest block that divides K: what lies past the end of an array must not enter a sum."""
    if K % _LANES:
        return K
    return max(d for d in range(_LANES, min(K, most) + 1, _LANES) if K % d == 0)


def _dot(x, y, x_dim: int, y_dim: int):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((x_dim,), (y_dim,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _call(kernel, name: str, grid, operands, output, scratch, tables, parallel: int) -> jax.Array:
    """A grid of blocks: the first `parallel` dims in any order, the rest in sequence."""
    shape, dtype, block, index = output
    varying = jax.typeof(operands[0][0]).mat
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(tables),
            grid=grid,
            in_specs=[pl.BlockSpec(block, index) for _, block, index in operands],
            out_specs=pl.BlockSpec(block, index),
            scratch_shapes=[pltpu.VMEM(scratch, jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
        ),
        name=name,
    )(*tables, *(x for x, _, _ in operands))
