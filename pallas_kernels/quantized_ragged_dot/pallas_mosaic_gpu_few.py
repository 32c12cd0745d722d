"""Rows in groups of few, times their group's matrix in 4 or 8 bits: bound by reading the matrices once. Hopper (sm90).

As in quantized_matmul's kernel for few rows, out.T = w.T @ x.T: a tile of w is widened in registers and is the left
operand of a wgmma, the rows of a group are its columns. Persistent: blocks take tiles in turns, 64 columns of the
output for each warpgroup and up to `rows` rows of one group; one more warpgroup feeds them through TMA and is at the
next tile while they store this one.

x is gathered so that each group begins at a multiple of 8 rows, the unit in which TMA fills swizzled memory: no group
has more tiles than its rows need, so none of its matrix is read twice. The same fusion permutes K into the order in
which values are widened. One writer and one order of summation: results repeat bit by bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.array import QuantizedArray, order, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_few_ends import step_of
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import mma, tiled, values_layout, varying_as, widen
from pallas_kernels.ragged_dot.mosaic_gpu_pieces import ALIGN, SM_COUNT, UNIT, drain, fill, for_each_tile, slot_of
from pallas_kernels.ragged_dot.schedule import bounds, sum_where

_MOST = 64  # rows of a group on the average: above, a dequantized copy and wgmma of 64 rows of x win


@dataclasses.dataclass(frozen=True)
class Config:
    """A block's tile of the output is rows x (warpgroups * 64)."""

    rows: int = 16  # of x
    warpgroups: int = 4  # that compute
    stages: int = 5  # steps in flight
    width: int = 128  # bytes of a row of w in a step
    blocks: int = SM_COUNT


def unfit_few(lhs, rhs: QuantizedArray) -> str | None:
    """None, or the reason why `grouped_few` cannot run this call."""
    (M, K), (G, N, _), S = lhs.shape, rhs.values.shape, rhs.scales.shape[-1]
    bits = jax.dtypes.itemsize_bits(rhs.values.dtype)
    if lhs.dtype != jnp.bfloat16:
        return f"takes lhs in bfloat16. Got {lhs.dtype}"
    if _MOST * G < M:
        return f"takes at most {_MOST} rows in a group on the average. Got {M} rows in {G} groups"
    if rhs.offsets is not None:
        return "takes no offsets"
    if N % 8 or N < UNIT:
        return f"takes N >= {UNIT}, a multiple of 8. Got {N}"
    if K % (256 // bits):
        return f"takes K that is a multiple of {256 // bits} for values of {bits} bits. Got {K}"
    step = step_of(K, rhs.values.dtype)
    if S > 1 and (rhs.group % 32 or (rhs.group % step and step % rhs.group)):
        return f"takes groups of 32, 64, or multiples of 128 that divide K={K}. Got {rhs.group}"
    return None


def tuned(height: int, N: int) -> Config:
    """For `height` rows in a group on the average, N columns."""
    warpgroups = min(4, -(-N // UNIT))
    if height <= 4:
        return Config(8, warpgroups)
    if height <= 10:
        return Config(16, warpgroups)
    return Config(32, warpgroups, 4) if height <= 24 else Config(64, warpgroups, 6, 64)


def grouped_few(
    lhs: jax.Array, rhs: QuantizedArray, group_sizes: jax.Array, dtype, config: Config | None = None
) -> jax.Array:
    """[M, N] of lhs [M, K] and rhs [G, K, N]; zeros past the groups."""
    (M, K), (G, N, _), S = lhs.shape, rhs.values.shape, rhs.scales.shape[-1]
    c = config or tuned(-(-M // G), N)
    step = step_of(K, rhs.values.dtype, c.width)
    width = step * jax.dtypes.itemsize_bits(rhs.values.dtype) // 8
    group = K // S
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces, depth = step // piece, K // step
    tile_columns = c.warpgroups * UNIT
    across = -(-N // tile_columns)
    table, count, source = _tiles(group_sizes, M, c.rows)
    x = order(lhs[source], rhs.values.dtype)
    # One scale for each row of all tiles: loads are not clipped.
    scales = jnp.pad(repeat_to(rhs.scales, (G, N, S)), ((0, 0), (0, -N % tile_columns), (0, 0)))
    wide = min(c.rows, 16)  # rows of the output that are stored at a time

    def kernel(x_ref, w_ref, scales_ref, table_ref, count_ref, out_ref, w_smem, x_smem, out_smem, full, free):
        wg = lax.axis_index("wg")
        tiles = (count_ref[0] + 0) * across

        def tile(i):
            """Of the i-th tile: group, first row of x, first column, first row of the output, rows, steps."""
            t, n = lax.div(i, jnp.int32(across)), lax.rem(i, jnp.int32(across))
            matrix, start, begin, rows = (table_ref[t, j] + 0 for j in range(4))
            steps = jnp.where(matrix < G, depth, 0)  # past the groups: zeros
            return jnp.minimum(matrix, G - 1), start, n * tile_columns, begin, rows, steps

        @pl.when(wg < c.warpgroups)
        def _compute():
            _set_registers(c, True)
            mine = pl.ds(wg * UNIT, UNIT)

            def one_tile(i, done):
                matrix, _, column, begin, rows, steps = tile(i)
                own = pl.ds(pl.multiple_of(column + wg * UNIT, UNIT), UNIT)

                def factors(k):
                    """The scales of step k, read a step ahead: nothing waits for them."""
                    places = [lax.div(k * step + p * piece, jnp.int32(group)) for p in range(pieces)]
                    refs = [scales_ref.at[matrix, own, jnp.minimum(s, S - 1)] for s in places]
                    return tuple(plgpu.load(r, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for r in refs)

                def scaled(acc, scale):
                    return acc * lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])

                def body(k, carry):
                    total, now = carry
                    following = factors(k + 1) if S > 1 else now
                    slot = slot_of(done + k, c)
                    plgpu.barrier_wait(full.at[slot])
                    narrow = plgpu.load(w_smem.at[slot, mine], layout=values_layout(rhs.values.dtype))
                    if S == 1:
                        total = mma(total, widen(narrow), x_smem.at[slot].transpose((1, 0)))
                        plgpu.barrier_arrive(free.at[slot])
                        return total, now
                    for p in range(pieces):
                        a = widen(narrow[:, p * piece : (p + 1) * piece])
                        acc = mma(None, a, x_smem.at[slot, :, pl.ds(p * piece, piece)].transpose((1, 0)))
                        if p == pieces - 1:
                            plgpu.barrier_arrive(free.at[slot])
                        total += scaled(acc, now[p])
                    return total, following

                zero = plgpu.layout_cast(jnp.zeros((UNIT, c.rows), jnp.float32), plgpu.Layout.WGMMA)
                total, now = lax.fori_loop(0, steps, body, (zero, factors(0)))
                if S == 1:
                    total = scaled(total, now[0])
                for t in range(0, c.rows, wide):
                    at, left = t, jnp.clip(rows - t, 0, wide)

                    @pl.when((left > 0) & (column + wg * UNIT < N))
                    def _(t=t, at=at, left=left):
                        part = total[:, t : t + wide].astype(dtype)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        out_smem.at[wg].transpose((1, 0))[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        size, first = wide, 0
                        while size:  # a store's size is static: one of each power of two
                            has = (left & size) != 0

                            @pl.when(has)
                            def _(first=first, size=size):
                                place = out_ref.at[pl.ds(begin + at + first, size), own]
                                plgpu.copy_smem_to_gmem(out_smem.at[wg, pl.ds(first, size)], place, commit_group=False)

                            first, size = first + (left & size), size // 2
                        plgpu.commit_smem_to_gmem_group()

                return done + steps

            for_each_tile(c, tiles, one_tile)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == c.warpgroups)
        def _feed():
            _set_registers(c, False)

            def one_tile(i, done):
                matrix, start, column, _, _, steps = tile(i)
                rows = pl.ds(pl.multiple_of(start, ALIGN), c.rows)
                columns = pl.ds(pl.multiple_of(column, tile_columns), tile_columns)

                def copy(k, slot):
                    at = pl.ds(pl.multiple_of(k * step, step), step)
                    plgpu.copy_gmem_to_smem(w_ref.at[matrix, columns, at], w_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(x_ref.at[rows, at], x_smem.at[slot], full.at[slot])

                return fill(c, copy, steps, done, free)

            drain(c, for_each_tile(c, tiles, one_tile), free)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, N), dtype),
        scratch_types=(
            tiled((c.stages, tile_columns, step), rhs.values.dtype, width),
            tiled((c.stages, c.rows, step), jnp.bfloat16, min(2 * piece, 128)),
            plgpu.SMEM((c.warpgroups, wide, UNIT), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
        ),
        grid=(c.blocks,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="wg",
        kernel_name="quantized_grouped_few",
    )(x, rhs.values, scales, table, count)
    return varying_as(lhs, out)


def _tiles(group_sizes: jax.Array, M: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tiles of up to `rows` rows of one group, and x laid out for them, each group from a multiple of 8 rows on.

    Returns:
      table: int32 [T, 4]: group; first row of the laid out x; first row of the output; how many rows. The rows past
        the groups count as group G.
      count: int32 [1]: tiles in use.
      source: int32 [M']: the row of x in each row of the layout.
    """
    G = group_sizes.shape[0]
    begins, ends = bounds(group_sizes, M)
    begins, ends = jnp.append(begins, ends[-1:]), jnp.append(ends, jnp.int32(M))
    group = jnp.arange(G + 1, dtype=jnp.int32)
    upto = lambda x: sum_where(group[None] <= group[:, None], x[None])
    within = lambda i, ends, x: sum_where((i[:, None] >= (ends - x)[None]) & (i[:, None] < ends[None]), group[None])
    sizes = ends - begins
    # Each group's rows in the layout; the rows past the groups are not in it.
    laid = jnp.where(group < G, -(-sizes // ALIGN) * ALIGN, 0)
    laid_ends = upto(laid)
    starts = laid_ends - laid
    row = jnp.arange(-(-(M + (ALIGN - 1) * min(G, M)) // ALIGN) * ALIGN, dtype=jnp.int32)
    at = within(row, laid_ends, laid)
    source = jnp.clip(row - starts[at] + begins[at], 0, M - 1)

    counts = -(-sizes // rows)
    count_ends = upto(counts)
    index = jnp.arange(M // rows + min(G + 1, M), dtype=jnp.int32)
    at = within(index, count_ends, counts)
    skipped = (index - (count_ends - counts)[at]) * rows
    left = jnp.clip(sizes[at] - skipped, 0, rows)
    table = jnp.stack([at, jnp.where(at < G, starts[at] + skipped, 0), begins[at] + skipped, left], axis=1)
    return table, counts.sum(dtype=jnp.int32)[None], source


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.warpgroups)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
