"""CRC-32 of a whole array from its shards: each process reads only its own bytes, and every sharding gives one number.

The number is `zlib.crc32(array.tobytes())`, row-major and little-endian, so anything can check it. A CRC is linear over
GF(2) once its initial and final inversions are set aside: the raw CRC of a concatenation is the raw CRC of its head,
multiplied by x**(8 * bytes that follow), XOR that of its tail. A shard is a set of evenly spaced runs of bytes, so its
share of the whole is found without the rest.
"""

import functools
import math
import zlib
from collections.abc import Sequence

import numpy as np

_POLY = 0xEDB88320  # CRC-32 (ISO 3309), bit-reflected
_ONES = 0xFFFFFFFF
_SHORT_RUN = 64  # bytes; below this a numpy step per byte beats a zlib call per run


def crc32_share(shard: np.ndarray, start: Sequence[int], shape: Sequence[int]) -> int:
    """What a shard adds to the CRC-32 of the array it belongs to; XOR the shares and pass them to `crc32_whole`.

    Args:
      shard: the values, any dtype.
      start: index of the shard's first element in the whole array.
      shape: of the whole array.
    """
    if not shard.size:
        return 0
    item = shard.dtype.itemsize
    sizes = shard.shape
    # Bytes between neighbours along each dim of the whole array.
    strides = [item] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    # The trailing dims that the shard holds whole, and the one before them, are one run of bytes.
    run_dim = len(shape) - 1
    while run_dim > 0 and sizes[run_dim] == shape[run_dim]:
        run_dim -= 1
    data = memoryview(np.ascontiguousarray(shard).reshape(-1).view(np.uint8))
    run = sizes[run_dim] * strides[run_dim] if shape else item
    crcs = _raw_crcs(data, run).reshape(sizes[: max(run_dim, 0)])
    for dim in range(crcs.ndim - 1, -1, -1):
        crcs = _fold(crcs, strides[dim])
    last = sum((first + size - 1) * stride for first, size, stride in zip(start, sizes, strides))
    return int(_shift(crcs, math.prod(shape) * item - last - item))


def crc32_whole(shares: int, num_bytes: int) -> int:
    """The CRC-32 of `num_bytes` bytes whose raw shares XOR to `shares`: put the two inversions back."""
    return int(shares ^ _shift(np.uint32(_ONES), num_bytes) ^ _ONES)


def _raw_crcs(data: memoryview, run: int) -> np.ndarray:
    """CRC of each run of bytes with no inversions, uint32[len(data) // run]."""
    if run == len(data):
        return np.array([zlib.crc32(data, _ONES) ^ _ONES], np.uint32)
    if run >= _SHORT_RUN:
        crc = zlib.crc32
        return np.array([crc(data[i : i + run], _ONES) for i in range(0, len(data), run)], np.uint32) ^ np.uint32(_ONES)
    columns = np.frombuffer(data, np.uint8).reshape(-1, run)
    out = np.zeros(len(columns), np.uint32)
    for k in range(run):
        out = _byte_table()[(out ^ columns[:, k]) & 0xFF] ^ (out >> 8)
    return out


def _fold(crcs: np.ndarray, stride: int) -> np.ndarray:
    """Joins the CRCs along the last dim, which lie `stride` bytes apart: pairs, then pairs of pairs."""
    while (n := crcs.shape[-1]) > 1:
        if n % 2:  # zeros in front of a message leave its raw CRC as it is
            crcs = np.concatenate([np.zeros((*crcs.shape[:-1], 1), np.uint32), crcs], axis=-1)
        crcs = _shift(crcs[..., 0::2], stride) ^ crcs[..., 1::2]
        stride *= 2
    return crcs[..., 0]


def _shift(crcs: np.ndarray | np.uint32, num_bytes: int) -> np.ndarray:
    """Raw CRCs of the same messages followed by `num_bytes` zero bytes."""
    tables = _shift_tables(num_bytes)
    crcs = np.asarray(crcs, np.uint32)
    return (
        tables[0][crcs & 0xFF] ^ tables[1][(crcs >> 8) & 0xFF] ^ tables[2][(crcs >> 16) & 0xFF] ^ tables[3][crcs >> 24]
    )


@functools.lru_cache(maxsize=1024)
def _shift_tables(num_bytes: int) -> np.ndarray:
    """uint32[4, 256]: each byte of a CRC times x**(8 num_bytes) mod the polynomial."""
    factor, square, n = 1 << 31, 1 << 23, num_bytes  # reflected: 1 is bit 31, x**8 is bit 23
    while n:
        if n & 1:
            factor = _multiply(factor, square)
        square, n = _multiply(square, square), n >> 1
    tables = np.zeros((4, 256), np.uint32)
    for byte in range(4):
        for bit in range(8):
            image = _multiply(1 << (8 * byte + bit), factor)
            tables[byte, 1 << bit : 2 << bit] = tables[byte, : 1 << bit] ^ np.uint32(image)
    return tables


def _multiply(a: int, b: int) -> int:
    """a * b in GF(2)[x] modulo the polynomial, both reflected."""
    out = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            out ^= b
        b = (b >> 1) ^ (_POLY if b & 1 else 0)
    return out


@functools.cache
def _byte_table() -> np.ndarray:
    return np.array([zlib.crc32(bytes([i]), _ONES) ^ _ONES for i in range(256)], np.uint32)
