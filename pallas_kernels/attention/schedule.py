"""Which tiles each block of a persistent kernel computes: one block for each multiprocessor, one tile after another."""

import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.blocks import ends

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
    lo, hi = _ends(ranges, wgs)
    return hi - lo


def _ends(ranges, wgs: int):
    """The first block of each tile [B or 1, tiles], and one past its last."""
    cut = lambda i: [ranges[:, w::wgs, i] for w in range(wgs)]
    return ends(cut(0), cut(3))


def _describe(ranges, wgs: int, parts: int):
    """Of each tile [B or 1, tiles, 2 + 4 * wgs] what `describe` says of its steps."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    lo, hi = _ends(ranges, wgs)
    lo, hi = lo // parts, -(-hi // parts)
    hi = xp.maximum(hi, lo + 1)
    alone = xp.clip(ranges.reshape(*lo.shape, wgs * 4), lo[..., None] * parts, hi[..., None] * parts)
    return xp.concatenate([lo[..., None], hi[..., None], alone], axis=2)


def in_turn(ranges, wgs: int):
    """int32 [B or 1, tiles, 3 + 4 * wgs]: tiles in the order in which blocks of one tile each start, and their numbers
    as `describe` gives them. Longest first where they are made on the device, or else multiprocessors would wait for
    the last ones; as they stand where they are known, which is no worse under a causal mask or a window."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    of_tile = _describe(ranges, wgs, 1)
    names = np.arange(of_tile.shape[1], dtype=np.int32)
    order = np.broadcast_to(names, of_tile.shape[:2])
    if xp is jnp:
        order = longest_first(of_tile[..., 1] - of_tile[..., 0], names)
    return xp.concatenate([order[..., None], xp.take_along_axis(of_tile, order[..., None], axis=1)], axis=2)


def describe(schedule, ranges, heads: int, wgs: int, parts: int = 1):
    """int32 [blocks, 1 + most tiles, 5 + 4 * wgs]: of a block the number of its tiles; of each of these batch, head,
    tile, its first step, one past its last (one that sees no key has one), and for each of its warpgroups the four
    numbers of the table, within these two. A step is `parts` of the table's blocks.

    A tile's numbers stand together and where the kernel knows without a look elsewhere: a tile waits for them.
    """
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    of_tile = _describe(ranges, wgs, parts)
    pair, tile = schedule[:, 1:] // of_tile.shape[1], schedule[:, 1:] % of_tile.shape[1]
    batch, head = pair // heads, pair % heads
    places = xp.stack([batch, head, tile], axis=2)
    places = xp.concatenate([places, of_tile[batch % len(ranges), tile]], axis=2)
    counts = xp.pad(schedule[:, :1, None], ((0, 0), (0, 0), (0, places.shape[2] - 1)))
    return xp.concatenate([counts, places], axis=1).astype(np.int32)


def _deal_unknown(steps: jax.Array, B: int, heads: int, together: int) -> jax.Array:
    """Forth and back over the blocks, from the longest tile of a group of heads to its shortest: sums come close. The
    next group starts from the other end, and each pair of groups further on.

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
    shift = max(1, SM_COUNT // ((groups + 1) // 2))
    lists: list[list[tuple[int, int]]] = [[] for _ in range(SM_COUNT)]
    for g in range(groups):
        row = g * copies // heads % len(steps)
        blocks = (np.where((turn + g) % 2, SM_COUNT - 1 - at, at) + g // 2 * shift) % SM_COUNT
        for x, block in zip(place.tolist(), blocks.tolist()):
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
