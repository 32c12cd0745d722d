"""What the grouped kernels for Hopper GPUs share: tiles in turns, a ring of slots, stores of a part of a tile.

`c` is a kernel's configuration: warpgroups, columns, stages, wide, blocks.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

UNIT = 64  # rows of a wgmma
ALIGN = 8  # rows of a swizzled tile
SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def store(acc, store_smem, out_ref, dtype, start, column, begin, end) -> None:
    """Rows [begin, end) of what starts at (start, column) in the output, in pieces of 64 rows and 128 bytes."""
    wg = lax.axis_index("wg")
    swizzled, plain = store_smem
    width = 128 // jnp.dtype(dtype).itemsize
    assert acc.shape[1] % (2 * width) == 0  # the next tile begins with the first slot, as this one
    for r in range(0, acc.shape[0], UNIT):
        first = start + r
        lo = jnp.clip(begin - first, 0, UNIT)
        rows = jnp.clip(end - first, 0, UNIT) - lo
        for x in range(0, acc.shape[1], width):
            slot = (r // UNIT * (acc.shape[1] // width) + x // width) % 2
            piece = acc[r : r + UNIT, x : x + width].astype(dtype)
            columns = pl.ds(pl.multiple_of(column + x, width), width)
            inside = column + x < out_ref.shape[1]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before the last one has left this slot

            @pl.when(inside & (rows == UNIT))
            def _(piece=piece, slot=slot, columns=columns, first=first):
                swizzled[wg, slot] = piece
                plgpu.commit_smem()
                place = out_ref.at[pl.ds(pl.multiple_of(first, ALIGN), UNIT), columns]
                plgpu.copy_smem_to_gmem(swizzled.at[wg, slot], place, commit_group=False)

            @pl.when(inside & (rows > 0) & (rows < UNIT))
            def _(piece=piece, slot=slot, columns=columns, first=first, lo=lo, rows=rows):
                plain[wg, slot] = piece
                plgpu.commit_smem()
                at, size = lo, UNIT // 2
                while size:  # a store's size is static: one of each power of two
                    has = (rows & size) != 0

                    @pl.when(has)
                    def _(at=at, size=size):
                        source = plain.at[wg, slot, pl.ds(at, size)]
                        place = out_ref.at[pl.ds(first + at, size), columns]
                        plgpu.copy_smem_to_gmem(source, place, commit_group=False)

                    at, size = at + (rows & size), size // 2

            plgpu.commit_smem_to_gmem_group()


def fill(c: Any, copy, steps, done, free):
    """copy(step, slot) for the steps of a tile, each once its slot is free; how many steps are done then."""

    @pl.loop(0, steps)
    def _(k):
        slot = slot_of(done + k, c)
        pl.when(done + k >= c.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
        copy(k, slot)

    return done + steps


def drain(c: Any, done, free) -> None:
    """Waits until all slots are free."""

    @pl.loop(0, c.stages)
    def _(k):
        pl.when(done + k >= c.stages)(lambda: plgpu.barrier_wait(free.at[slot_of(done + k, c)]))


def for_each_tile(c: Any, count, one_tile, late: Any = False):
    """one_tile(i, carry) for the tiles of this block, from a carry of 0; the last carry.

    Blocks take turns, forth and back: where tiles go from the longest to the shortest, all blocks get about as much
    work. late: half of the blocks begin with the second half of their turns.
    """
    block = lax.axis_index("block")
    turns = lax.div(count + c.blocks - 1, jnp.int32(c.blocks))
    shift = jnp.where(late & (block >= c.blocks // 2), lax.div(turns, jnp.int32(2)), 0)

    def turn(j, carry):
        j = lax.rem(j + shift, turns)
        i = j * c.blocks + jnp.where(lax.rem(j, jnp.int32(2)) == 0, block, c.blocks - 1 - block)
        return lax.cond(i < count, lambda: one_tile(i, carry), lambda: carry)

    return lax.fori_loop(0, turns, turn, jnp.int32(0))


def walk(i, down, across: int, wide: int):
    """(row, column) of tile i of down x across: in strips `wide` tiles wide, row by row."""
    strip = lax.div(i, down * wide)
    width = jnp.minimum(wide, across - strip * wide)
    i -= strip * down * wide
    return lax.div(i, width), strip * wide + lax.rem(i, width)


def slot_of(i, c: Any):
    return lax.rem(i, jnp.int32(c.stages))


def tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory that TMA fills and wgmma reads; or that it empties, in rows of 128 bytes."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    tiling = transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, transforms.SwizzleTransform(128)))


def store_buffer(c: Any, dtype) -> Any:
    """Two pieces for each warpgroup, swizzled, or plain where rows are counted one by one.

    Both views begin at the same place and tile the last two dims alone: a piece is the same bytes in both.
    """
    shape = (c.warpgroups, 2, UNIT, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.RefUnion(tiled(shape, dtype), plgpu.SMEM(shape, dtype))
