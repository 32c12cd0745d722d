"""Stored arrays straight into the shards of a target: read in pieces by many threads, checked while other pieces load.

A piece is some whole chunks of an array. It is read where its shard will lie, checksummed there (zlib lets other
threads run meanwhile), and a finished array goes to its devices while the next ones are read.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxscale.checkpoint.checksum import crc32_share

PIECE_BYTES = 32 << 20  # of one read; a chunk that is larger is read whole
AHEAD_BYTES = 2 << 30  # of arrays in host memory that have not reached their devices; one array may be larger
ALIGN = 64  # bytes
THREADS = min(16, max(4, os.cpu_count() or 1))

Bounds = tuple[tuple[int, int], ...]  # (first, end) along each dim


def fill(
    targets: Mapping[str, jax.ShapeDtypeStruct], open_array: Callable[[str], Any]
) -> Iterator[tuple[str, jax.Array, int]]:
    """Yields (name, array in the shards of its target, this process's share of its CRC-32).

    The shares of all processes XOR to that of the array: each counts the shards whose first copy it holds.

    Args:
      open_array: name -> a TensorStore.

    Raises:
      ValueError: an array is stored in another dtype than its target's, or cannot be read.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        under_way: collections.deque[_Filling] = collections.deque()
        waiting, held = collections.deque(targets.items()), 0
        try:
            while waiting or under_way:
                while waiting and (not under_way or held < AHEAD_BYTES):
                    name, target = waiting.popleft()
                    under_way.append(_start(pool, name, target, open_array(name)))
                    held += under_way[-1].num_bytes
                filling = under_way.popleft()
                share = functools.reduce(operator.xor, (future.result() for future in filling.futures), 0)
                yield filling.name, _to_devices(filling), share
                held -= filling.num_bytes
        finally:
            pool.shutdown(cancel_futures=True)


@dataclasses.dataclass
class _Filling:
    name: str
    target: jax.ShapeDtypeStruct
    boxes: dict[Bounds, np.ndarray]  # what the devices of this process will hold
    futures: list[concurrent.futures.Future[int]]
    num_bytes: int


def _start(pool: concurrent.futures.Executor, name: str, target: jax.ShapeDtypeStruct, store: Any) -> _Filling:
    if store.dtype.numpy_dtype != target.dtype:  # TensorStore would cast in silence
        raise ValueError(f"{name} is stored as {store.dtype.numpy_dtype} but its target is {target.dtype}")
    counted = _boxes(target)
    boxes = {box: _empty(box, target.dtype) for box in counted}
    chunk = store.chunk_layout.read_chunk.shape or ()
    futures = [
        pool.submit(_read_piece, store, piece, boxes, counts)
        for region, counts in _regions(counted)
        for piece in _pieces(region, chunk, target.dtype.itemsize)
    ]
    return _Filling(name, target, boxes, futures, sum(part.nbytes for part in boxes.values()))


def _boxes(target: jax.ShapeDtypeStruct) -> dict[Bounds, bool]:
    """The parts that this process's devices hold, and whether this process counts them: it has the first copy."""
    first: dict[Bounds, int] = {}
    mine: dict[Bounds, None] = {}
    assert target.sharding is not None
    for device, index in target.sharding.devices_indices_map(target.shape).items():
        box = bounds(index, target.shape)
        first.setdefault(box, device.process_index)
        if device.process_index == jax.process_index():
            mine[box] = None
    return {box: first[box] == jax.process_index() for box in mine}


def _regions(counted: Mapping[Bounds, bool]) -> list[tuple[Bounds, bool]]:
    """What to read as one: all boxes if they tile a larger box, since a chunk often lies under several."""
    if not counted:
        return []
    around = hull(counted)
    whole = _size(around) == sum(map(_size, counted)) and len(set(counted.values())) == 1
    return [(around, next(iter(counted.values())))] if whole else list(counted.items())


def _pieces(region: Bounds, chunk: Sequence[int], itemsize: int) -> Iterator[Bounds]:
    """Cuts a region between chunks, the first dims first, so that a piece's bytes lie in long runs."""
    steps = [end - first for first, end in region]
    for dim, size in enumerate(chunk):
        excess = math.prod(steps) * itemsize / PIECE_BYTES
        if excess <= 1:
            break
        steps[dim] = max(1, int(steps[dim] / excess) // size) * size
    cuts = []
    for (first, end), step in zip(region, steps):
        edges = [first, *range((first // step + 1) * step, end, step), end] if step < end - first else [first, end]
        cuts.append(list(itertools.pairwise(edges)))
    return itertools.product(*cuts)


def _read_piece(store: Any, piece: Bounds, boxes: Mapping[Bounds, np.ndarray], counts: bool) -> int:
    """Reads a piece into the boxes that it touches; returns its share of the array's CRC-32."""
    import tensorstore as ts

    source = store[tuple(slice(*part) for part in piece)]
    inside = [(box, _overlap(piece, box)) for box in boxes]
    touched = [(box, common) for box, common in inside if common is not None]
    box, common = touched[0]
    if common == piece:  # as often: no copy
        block = boxes[box][_within(piece, box)]
        ts.array(block, dtype=source.dtype, copy=False, write=True).write(source).result()
    else:
        block = source.read().result()
        for box, common in touched:
            boxes[box][_within(common, box)] = block[_within(common, piece)]
    return crc32_share(block, [first for first, _ in piece], store.shape) if counts else 0


def _to_devices(filling: _Filling) -> jax.Array:
    target = filling.target
    array = jax.make_array_from_callback(
        target.shape,
        target.sharding,
        lambda index: filling.boxes[bounds(index, target.shape)],
        dtype=target.dtype,
    )
    jax.block_until_ready(array)  # the others are read meanwhile
    return array


def bounds(index: Any, shape: Sequence[int]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape))


def hull(boxes: Any) -> Bounds:
    """The smallest box around all."""
    return tuple((min(first), max(end)) for first, end in (zip(*parts) for parts in zip(*boxes)))


def _size(box: Bounds) -> int:
    return math.prod(end - first for first, end in box)


def _overlap(a: Bounds, b: Bounds) -> Bounds | None:
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return None if any(first >= end for first, end in common) else common


def _within(part: Bounds, box: Bounds) -> tuple[Any, ...]:
    """The index of a part in its box; the ellipsis makes a view of a scalar too."""
    return (..., *(slice(first - start, end - start) for (first, end), (start, _) in zip(part, box)))


def _empty(box: Bounds, dtype: Any) -> np.ndarray:
    """Aligned so that a CPU device takes the buffer as it is."""
    raw = np.empty(_size(box) * np.dtype(dtype).itemsize + ALIGN, np.uint8)
    start = -raw.ctypes.data % ALIGN
    return raw[start : len(raw) - ALIGN + start].view(dtype).reshape([end - first for first, end in box])
