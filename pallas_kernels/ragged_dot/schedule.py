"""Which rows of which group stand in each tile: small tables, made on the device from the sizes of the groups."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """A tile holds rows of one group, so one that starts in the middle of a block of rows is no special case.

    Tiles stand in the order of their rows. The rows after the last group count as one more group, number G.
    """

    table: jax.Array  # [T, 4] int32: group; first row, a multiple of `align`; the group's rows in the tile [begin, end)
    count: jax.Array  # [1] int32: tiles in use; the others have no rows, and the number and place of the last row


def bounds(group_sizes: jax.Array, M: int) -> tuple[jax.Array, jax.Array]:
    """int32 [G], [G]: where each group begins and ends, never past row M, whatever the caller wrote."""
    sizes = jnp.clip(group_sizes, 0, M).astype(jnp.int32)
    ends = jnp.cumsum(sizes, dtype=jnp.int32)
    return jnp.clip(ends - sizes, 0, M), jnp.clip(ends, 0, M)


def make_tiles(group_sizes: jax.Array, M: int, block: int, align: int = 1, *, empty: bool = False) -> Tiles:
    """Tiles of `block` rows that cover all M rows, each row once; `align` divides `block`.

    empty: a group without rows has a tile too.
    """
    begins, ends = bounds(group_sizes, M)
    begins, ends = jnp.append(begins, ends[-1:]), jnp.append(ends, jnp.int32(M))
    first = begins // align * align
    counts = jnp.where(ends > begins, -(-(ends - first) // block), 0)
    if empty:
        counts = jnp.append(jnp.maximum(counts[:-1], 1), counts[-1:])
    upto = jnp.cumsum(counts, dtype=jnp.int32)
    index = jnp.arange(_most_tiles(M, group_sizes.shape[0], block, align), dtype=jnp.int32)
    group = jnp.searchsorted(upto, index, side="right", method="compare_all").astype(jnp.int32)
    used = index < upto[-1]
    group = jnp.where(used, group, ends.shape[0] - 1)
    start = first[group] + (index - (upto - counts)[group]) * block
    start = jnp.where(used, start, M)
    begin = jnp.where(used, jnp.maximum(begins[group], start), M)
    end = jnp.where(used, jnp.minimum(ends[group], start + block), M)
    return Tiles(jnp.stack([group, start, begin, end], axis=1), upto[-1:])


def _most_tiles(M: int, G: int, block: int, align: int) -> int:
    """How many tiles there can be: each of the G + 1 groups begins and ends in a tile that need not be full."""
    if align == block:
        return -(-M // block) + G
    return (M + (G + 1) * (block - 1 + align - 1)) // block
