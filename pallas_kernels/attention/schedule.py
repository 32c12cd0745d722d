"""Which tiles each block of a persistent kernel computes: one block for each multiprocessor, one tile after another."""

import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def deal(steps, B: int, heads: int, together: int):
    """int32 [blocks, 1 + most tiles]: how many tiles a block has, and which: (batch * heads + head) * tiles + tile.

    Args:
      steps: int [B or 1, tiles], the steps of each; the schedule is made where they are known.
      together: tiles of so many heads come first, of these the ones that take longest.
    """
    pairs, tiles = B * heads, steps.shape[1]
    group = np.arange(pairs, dtype=np.int32).reshape(-1, 1, together)
    if pairs * tiles <= SM_COUNT:
        order = (group * tiles + np.arange(tiles)[::-1, None]).reshape(-1)
        return np.stack([np.ones_like(order), order], axis=1).astype(np.int32)
    if not isinstance(steps, np.ndarray):
        return _deal_unknown(steps, B, heads, together)
    longest = tiles - 1 - np.argsort(-steps[0, ::-1], kind="stable")  # a known table has one row
    free = [(0, block) for block in range(SM_COUNT)]
    lists: list[list[int]] = [[] for _ in free]
    for x in (group * tiles + longest[:, None]).reshape(-1).tolist():
        at, block = heapq.heappop(free)
        lists[block].append(x)
        heapq.heappush(free, (at + int(steps[0, x % tiles]) + 1, block))
    most = max(map(len, lists))
    return np.asarray([[len(x), *x, *[0] * (most - len(x))] for x in lists], np.int32)


def tile_steps(ranges, wgs: int):
    """The steps of tiles [B or 1, tiles], from a table with a row for each of a tile's warpgroups."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    lo, _, _, hi = xp.moveaxis(ranges.reshape(len(ranges), -1, wgs, 4), 3, 0)
    end = hi.max(axis=2)
    return end - xp.minimum(xp.where(lo < hi, lo, end[..., None]).min(axis=2), end)


def _deal_unknown(steps: jax.Array, B: int, heads: int, together: int) -> jax.Array:
    """Forth and back over the blocks, from the longest tile of a group of heads to its shortest: sums come close.

    Which ranks a block gets is known; which tiles have these ranks is found on the device.
    """
    rows, tiles = steps.shape
    together = max(d for d in range(1, heads + 1) if heads % d == 0 and d <= together)
    if 2 * together * tiles < 3 * SM_COUNT:  # too few to come out even: all batches and heads are one group
        steps, copies, groups = steps.reshape(1, -1), B * heads // rows, 1
        base = np.arange(copies)[:, None] * tiles
    else:
        copies, groups = together, B * heads // together
        base = np.arange(B * heads).reshape(groups, copies).T * tiles
    # Each group's places, one round of blocks after another, and the blocks that take them.
    place = np.arange(steps.shape[1] * copies)
    turn, at = np.divmod(place, SM_COUNT)
    at = np.where(turn % 2, SM_COUNT - 1 - at, at)
    lists: list[list[tuple[int, int]]] = [[] for _ in range(SM_COUNT)]
    for g in range(groups):
        row = g * copies // heads % len(steps)
        for x, block in zip(place.tolist(), ((at + g * max(1, SM_COUNT // groups)) % SM_COUNT).tolist()):
            rank, copy = divmod(x, copies)
            lists[block].append((row * steps.shape[1] + rank, int(base[copy, g])))
    most = max(map(len, lists))
    rank, start = np.moveaxis(np.asarray([x + [(0, 0)] * (most - len(x)) for x in lists], np.int32), 2, 0)
    first = np.arange(steps.shape[1], dtype=np.int32)
    first = first % tiles + first // tiles * (heads * tiles)  # of the tile's copies, as an element of the schedule
    order = longest_first(steps, first)
    counts = np.asarray([[len(x)] for x in lists], np.int32)
    return jnp.concatenate([counts, order.reshape(-1)[rank] + start], axis=1)


def longest_first(steps: jax.Array, names: np.ndarray) -> jax.Array:
    """int32 [rows, tiles]: the names of the tiles [tiles] from the longest of a row to its shortest."""
    # By counting, for a few hundred tiles faster than a sort.
    index = np.arange(steps.shape[1], dtype=np.int32)
    mine, other = steps[:, :, None], steps[:, None, :]
    before = (other > mine) | ((other == mine) & (index[:, None] > index)[None])  # of equal ones the last first
    ranks = jnp.sum(before, axis=2, dtype=jnp.int32)
    return jnp.sum(jnp.where(ranks[:, None, :] == index[None, :, None], names[None, None], 0), axis=2, dtype=jnp.int32)
