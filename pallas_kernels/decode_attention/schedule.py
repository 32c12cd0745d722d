"""Who does what: all tiles of keys of a ragged batch in one row, cut into equal runs, one for each worker."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Schedule(NamedTuple):
    """An item is one block of query rows of one sequence, its tiles those of the keys that it sees.

    The tiles of all items stand in one row, item after item; worker w does those in [w * chunk, (w + 1) * chunk). The
    part of item i that worker w does is part number i + w: along the row one of the two grows at each cut, so no two
    parts share a number, and there are fewer than items + workers. (A kernel may run several such rows side by side.)
    """

    sequences: jax.Array  # [B, 4]: length, first tile, tiles of each item, where the first item begins in the row
    workers: jax.Array  # [W, 2]: the items [first, last) that it has a part of
    chunk: jax.Array  # [1]


def make_schedule(lengths: jax.Array, T: int, items: int, tile: int, window: int | None, workers: int) -> Schedule:
    """All int32.

    Args:
      lengths: int32 [B], in tokens, the T queries included.
      items: of each sequence.
      tile: keys in one.
    """
    first = jnp.zeros_like(lengths) if window is None else jnp.maximum(lengths - T + 1 - window, 0) // tile
    tiles = -(-lengths // tile) - first
    index = jnp.arange(lengths.shape[0], dtype=jnp.int32)
    before = index[None, :] < index[:, None]
    begin = items * jnp.sum(jnp.where(before, tiles[None, :], 0), axis=1)
    total = begin[-1] + items * tiles[-1]
    chunk = jnp.maximum(-(-total // workers), 2)  # a part costs as much as a tile or two

    cut = jnp.minimum(jnp.arange(workers + 1, dtype=jnp.int32) * chunk, total)
    end = begin + items * tiles
    done = jnp.sum(end[None, :] <= cut[:, None], axis=1, dtype=jnp.int32)  # sequences that end before a cut
    inside = jnp.minimum(done, lengths.shape[0] - 1)
    into, each = cut - begin[inside], tiles[inside]
    each = jnp.maximum(each, 1)
    whole = done < lengths.shape[0]
    at = inside * items + into // each
    upto = jnp.where(whole, inside * items + -(-into // each), lengths.shape[0] * items)
    at = jnp.where(whole, at, lengths.shape[0] * items)
    sequences = jnp.stack([lengths, first, tiles, begin], axis=1)
    return Schedule(sequences, jnp.stack([at[:-1], upto[1:]], axis=1), chunk[None])
