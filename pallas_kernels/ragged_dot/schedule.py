"""Which rows of which group stand in each tile: small tables, made on the device from the sizes of the groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    begins, ends = bounds(group_sizes, M)
    begins, ends = jnp.append(begins, ends[-1:]), jnp.append(ends, jnp.int32(M))
    G = group_sizes.shape[0]
    group = jnp.arange(G + 1, dtype=jnp.int32)
    first = begins // align * align
    length = jnp.where(ends > begins, ends - first, 0)
    counts = -(-length // block)
    if empty:
        counts = jnp.where(group < G, jnp.maximum(counts, 1), counts)
    # How many tiles there are up to the end of each group, in the order of groups or, large ones first, of sizes.
    if unit is None:
        before = group[None] <= group[:, None]
    else:
        size = jnp.where(group < G, ends - begins, -1)
        larger, as_large = size[None] > size[:, None], size[None] == size[:, None]
        before = larger | (as_large & (group[None] <= group[:, None]))
    upto = sum_where(before, counts[None])

    index = jnp.arange(_most_tiles(M, G, block, align), dtype=jnp.int32)
    count = counts.sum(dtype=jnp.int32)
    used = index < count
    mine = (index[:, None] >= (upto - counts)[None]) & (index[:, None] < upto[None])
    pick = lambda x: sum_where(mine, x[None])
    index = index - pick(upto - counts)
    step = unit or block
    units = -(-length // step)
    least, more = units // jnp.maximum(counts, 1), units % jnp.maximum(counts, 1)  # the first `more` have one more
    least, more, begins, ends, first = (pick(x) for x in (least, more, begins, ends, first))
    start = first + step * (index * least + jnp.minimum(index, more))
    height = step * jnp.where(index < more, least + 1, least)
    start = jnp.where(used, start, M)
    begin = jnp.where(used, jnp.maximum(begins, start), M)
    end = jnp.where(used, jnp.minimum(ends, start + height), M)
    short = (length[:-1] > 0) & (length[:-1] < block)
    table = jnp.stack([jnp.where(used, pick(group), G), start, begin, end], axis=1)
    return Tiles(table, count[None], short.sum(dtype=jnp.int32)[None])


def pair_low(tiles: Tiles, low: int) -> tuple[jax.Array, jax.Array]:
    """Turns of a tile of more than `low` rows, or of two with fewer, in the order of the tiles.

    Returns:
      int32 [T, 2]: the numbers of each turn's tiles, the second -1 where there is one; int32 [1]: how many turns.
    """
    T = tiles.table.shape[0]
    index = jnp.arange(T, dtype=jnp.int32)
    used = index < tiles.count
    is_low = used & (tiles.table[:, 3] - tiles.table[:, 2] <= low)
    upto = index[None] <= index[:, None]
    number = sum_where(upto, is_low[None].astype(jnp.int32))  # of low tiles up to each, itself included
    second = is_low & (number % 2 == 0)
    opens = used & ~second
    turn = sum_where(upto, opens[None].astype(jnp.int32)) - 1
    # The second of a pair is in the turn that the low tile before it has opened.
    before = jnp.where(upto & (opens & is_low)[None], turn[None], -1).max(axis=1)
    turn = jnp.where(second, before, turn)
    mine = turn[None] == index[:, None]
    first = sum_where(mine & opens[None], index[None])
    other = sum_where(mine & second[None], index[None] + 1) - 1
    return jnp.stack([first, other], axis=1), opens.sum(dtype=jnp.int32)[None]


def sum_where(where: jax.Array, x: jax.Array) -> jax.Array:
    """The sum of x along the last dim: for short lists sooner done than by sorts, scans and gathers."""
    return jnp.where(where, x, 0).sum(axis=-1, dtype=jnp.int32)


def _most_tiles(M: int, G: int, block: int, align: int) -> int:
    """How many tiles there can be: each of the G + 1 groups begins and ends in a tile that need not be full."""
    if align == block:
        return -(-M // block) + G
    return (M + (G + 1) * (block - 1 + align - 1)) // block
