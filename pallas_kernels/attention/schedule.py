"""Which tiles each block of a persistent kernel computes: one block for each multiprocessor, one tile after another."""

import heapq

import jax
import jax.numpy as jnp
import numpy as np

SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def deal(ranges, B: int, heads: int, tiles: int, together: int, traced: bool = False):
    """int32 [blocks, 1 + most tiles]: how many tiles a block has, and which: (batch * heads + head) * tiles + tile.

    Args:
      ranges: [B or 1, tiles, 4], the table of blocks.py.
      together: tiles of so many heads come first, of these the ones that take longest.
      traced: whether tiles are dealt out on the device where the table is made there. Otherwise each has a block of its
        own then, and the hardware gives each to the multiprocessor that is free first.
    """
    pairs = B * heads
    known = isinstance(ranges, np.ndarray)
    group = np.arange(pairs, dtype=np.int32).reshape(-1, 1, together)
    if pairs * tiles <= SM_COUNT or not (known or traced):
        order = (group * tiles + np.arange(tiles)[::-1, None]).reshape(-1)
        return np.stack([np.ones_like(order), order], axis=1).astype(np.int32)
    steps = ranges[..., 3] - ranges[..., 0]
    if not known:
        return _snake(steps, group // heads, group, tiles)
    longest = tiles - 1 - np.argsort(-steps[0, ::-1], kind="stable")  # a known table has one row
    free = [(0, block) for block in range(SM_COUNT)]
    lists: list[list[int]] = [[] for _ in free]
    for x in (group * tiles + longest[:, None]).reshape(-1).tolist():
        at, block = heapq.heappop(free)
        lists[block].append(x)
        heapq.heappush(free, (at + int(steps[0, x % tiles]) + 1, block))
    most = max(map(len, lists))
    return np.asarray([[len(x), *x, *[0] * (most - len(x))] for x in lists], np.int32)


def _snake(steps, rows, group, tiles: int) -> jax.Array:
    """Tiles from the longest to the shortest, dealt out forth and back: one round makes up for the other."""
    longest = jnp.argsort(steps, axis=1, descending=True)  # [B or 1, tiles]
    rows = np.broadcast_to(rows % steps.shape[0], (len(group), tiles, group.shape[2]))
    order = group * tiles + longest[rows, np.arange(tiles)[None, :, None]]
    order = order.astype(jnp.int32).reshape(-1)
    rounds = -(-order.size // SM_COUNT)
    order = jnp.pad(order, (0, rounds * SM_COUNT - order.size), constant_values=-1).reshape(rounds, SM_COUNT)
    order = jnp.where(np.arange(rounds)[:, None] % 2 == 0, order, order[:, ::-1])
    count = jnp.sum(order >= 0, axis=0, dtype=jnp.int32)
    return jnp.concatenate([count[:, None], order.T], axis=1)
