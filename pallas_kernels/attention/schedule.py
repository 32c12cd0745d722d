"""Which tiles each block of a persistent kernel computes: one block for each multiprocessor, one tile after another."""

import heapq

import numpy as np

SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def deal(ranges, B: int, heads: int, tiles: int, together: int) -> np.ndarray:
    """int32 [blocks, 1 + most tiles]: how many tiles a block has, and which: (batch * heads + head) * tiles + tile.

    Args:
      ranges: [B or 1, tiles, 4], the table of blocks.py.
      together: tiles of so many heads come first, of these the ones that take longest.

    Where the table is made on the device each tile has a block of its own, and the hardware gives each to the
    multiprocessor that is free first: dealing them out there, sorted, was slower (docs/LOG.md).
    """
    pairs = B * heads
    group = np.arange(pairs, dtype=np.int32).reshape(-1, 1, together)
    if pairs * tiles <= SM_COUNT or not isinstance(ranges, np.ndarray):
        order = (group * tiles + np.arange(tiles)[::-1, None]).reshape(-1)
        return np.stack([np.ones_like(order), order], axis=1).astype(np.int32)
    steps = ranges[..., 3] - ranges[..., 0]
    longest = tiles - 1 - np.argsort(-steps[0, ::-1], kind="stable")  # a known table has one row
    free = [(0, block) for block in range(SM_COUNT)]
    lists: list[list[int]] = [[] for _ in free]
    for x in (group * tiles + longest[:, None]).reshape(-1).tolist():
        at, block = heapq.heappop(free)
        lists[block].append(x)
        heapq.heappush(free, (at + int(steps[0, x % tiles]) + 1, block))
    most = max(map(len, lists))
    return np.asarray([[len(x), *x, *[0] * (most - len(x))] for x in lists], np.int32)
