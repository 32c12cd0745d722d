"""Which rows of which group stand in each tile: small tables, made on the device from the sizes of the groups."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Tiles(NamedTuple):
    """A tile holds rows of one group, so one that starts in the middle of a block of rows is no special case.

    Tiles stand in the order of their rows, or those of large groups first. The rows after the last group count as one
    more group, number G, the last one.
    """

    table: jax.Array  # [T, 4] int32: group; first row, a multiple of `align`; the group's rows in the tile [begin, end)
    count: jax.Array  # [1] int32: tiles in use; the others have no rows, and the number and place of the last row
    short: jax.Array  # [1] int32: how many groups are smaller than a tile


def bounds(group_sizes: jax.Array, M: int) -> tuple[jax.Array, jax.Array]:
    """int32 [G], [G]: where each group begins and ends, never past row M, whatever the caller wrote."""
    sizes = jnp.clip(group_sizes, 0, M).astype(jnp.int32)
    group = jnp.arange(sizes.shape[0], dtype=jnp.int32)
    ends = sum_where(group[None] <= group[:, None], sizes[None])
    return jnp.clip(ends - sizes, 0, M), jnp.clip(ends, 0, M)


def row_groups(group_sizes: jax.Array, M: int) -> jax.Array:
    """int32 [M]: the group of each row; rows after the last group count as its own."""
    ends = bounds(group_sizes, M)[1]
    groups = jnp.searchsorted(ends, jnp.arange(M, dtype=jnp.int32), side="right", method="compare_all")
    return jnp.minimum(groups, ends.shape[0] - 1).astype(jnp.int32)


def make_tiles(
    group_sizes: jax.Array, M: int, block: int, align: int = 1, *, empty: bool = False, unit: int | None = None
) -> Tiles:
    """Tiles of up to `block` rows that cover all M rows, each row once; `align` divides `block`.

    empty: a group without rows has a tile too.
    unit: for workers that take tiles in turns. Large groups come first, and each is cut into tiles of as many units of
      this many rows, give or take one: a whole tile and a sliver would keep workers waiting for each other.
    """
    G = group_sizes.shape[0]
    most = _most_tiles(M, G, block, align)
    fill = functools.partial(_fill, G=G, M=M, block=block, align=align, empty=empty, unit=unit)
    from pallas_kernels.ragged_dot import schedule_triton  # not with the package: it takes 0.4 s

    if schedule_triton.supported(G) is None:
        return Tiles(*schedule_triton.tables(fill, group_sizes, most))
    columns, count, short = fill(group_sizes, jnp.arange(most, dtype=jnp.int32))
    return Tiles(jnp.stack(columns, axis=1), count[None], short[None])


def _fill(sizes: jax.Array, index: jax.Array, *, G: int, M: int, block: int, align: int, empty: bool, unit: int | None):
    """The table's columns at `index`, the number of tiles and that of short groups; sizes may go on past G.

    Iotas, comparisons and sums alone: XLA makes five kernels or so of them, Triton one.
    """
    ceil = lambda x, y: lax.div(x + (y - 1), jnp.int32(y) if isinstance(y, int) else y)
    group = lax.iota(jnp.int32, sizes.shape[0])
    across, down = group[None], group[:, None]
    sizes = jnp.where(group < G, jnp.clip(sizes, 0, M), 0).astype(jnp.int32)
    begins = jnp.minimum(sum_where(across < down, sizes[None]), M)
    ends = jnp.minimum(begins + sizes, M)
    size, used = ends - begins, ends.max()

    def cut(begins, ends):
        """The first row of the first tile, and how many rows are cut."""
        first = begins - lax.rem(begins, jnp.int32(align))
        return first, jnp.where(ends > begins, ends - first, 0)

    _, length = cut(begins, ends)
    counts = ceil(length, block)
    if empty:
        counts = jnp.where(group < G, jnp.maximum(counts, 1), counts)
    earlier = across < down
    if unit is not None:
        earlier = (size[None] > size[:, None]) | ((size[None] == size[:, None]) & earlier)
    before = sum_where(earlier, counts[None])
    short = jnp.where((length > 0) & (length < block), 1, 0).sum(dtype=jnp.int32)

    # Whose tile it is; those of the rows after the last group come last.
    total = counts.sum(dtype=jnp.int32)
    mine = (index[:, None] >= before[None]) & (index[:, None] < (before + counts)[None])
    own = (sum_where(mine, x[None]) for x in (group, begins, ends, before))
    group, begin, end, before = (jnp.where(index < total, x, y) for x, y in zip(own, (G, used, M, total)))
    first, length = cut(begin, end)
    step = unit or block
    units, parts = ceil(length, step), jnp.maximum(ceil(length, block), 1)
    least, more = lax.div(units, parts), lax.rem(units, parts)  # the first `more` have one more
    place = index - before
    start = first + step * (place * least + jnp.minimum(place, more))
    height = step * jnp.where(place < more, least + 1, least)
    count = total + ceil(cut(used, jnp.int32(M))[1], block)
    here = lambda x, none: jnp.where(index < count, x, none)
    begin, end = jnp.maximum(begin, start), jnp.minimum(end, start + height)
    return (here(group, G), here(start, M), here(begin, M), here(end, M)), count, short


def sum_where(where: jax.Array, x: jax.Array) -> jax.Array:
    """The sum of x along the last dim: for short lists sooner done than by sorts, scans and gathers."""
    return jnp.where(where, x, 0).sum(axis=-1, dtype=jnp.int32)


def _most_tiles(M: int, G: int, block: int, align: int) -> int:
    """How many tiles there can be: each of the G + 1 groups begins and ends in a tile that need not be full."""
    if align == block:
        return -(-M // block) + G
    return (M + (G + 1) * (block - 1 + align - 1)) // block
