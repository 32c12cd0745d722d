"""Reed-Solomon parity over hosts: n hosts keep their shards and a little parity, and any `lost` of them come back.

As in REFT (arXiv 2310.12670) hosts protect each other. Host h's bytes are cut into n - lost pieces, for n stripes.
Stripe s keeps its parity on hosts s .. s + lost - 1 (modulo n) and takes one piece of every other host. So a lost host
takes at most one member of each stripe with it, and every host holds lost / (n - lost) of its bytes in parity.

The code is systematic over GF(2^8), its matrix a Cauchy matrix scaled so that the first parity is a plain XOR. Products
are looked up two bytes at a time in numpy: 0.3 GB/s on one busy core (benchmarks/checkpoint/erasure.py), in the range
of the C libraries (zfec 0.47), so that the parity costs no dependency. These are functions of bytes; `memory/` moves
them between hosts and keeps them in a process that outlives training.
"""

import functools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

Blob = np.ndarray  # uint8[bytes]


def make_parity(blobs: Sequence[Blob], lost: int) -> list[list[Blob]]:
    """Parity for the hosts' bytes.

    Args:
      blobs: uint8[bytes] of each host, all of one length.
      lost: how many hosts may be lost at once.

    Returns:
      For each host the `lost` pieces of parity that it has to keep.
    """
    hosts = len(blobs)
    pieces = [pieces_of(blob, hosts, lost) for blob in blobs]
    kept: list[list[Blob]] = [[] for _ in range(hosts)]
    for stripe in range(hosts):
        inside = members(stripe, hosts, lost)
        parity = encode([pieces[h][place_of(h, stripe, hosts, lost)] for h in inside], lost)
        for k, piece in enumerate(parity):
            kept[(stripe + k) % hosts].append(piece)
    # Host h was given the parities of stripes in ascending order; `parity_of` finds them again by that order.
    return kept


def recover(
    blobs: Mapping[int, Blob], parity: Mapping[int, Sequence[Blob]], hosts: int, lost: int, num_bytes: int
) -> dict[int, Blob]:
    """The bytes of the hosts that are not in `blobs`, bit for bit.

    Args:
      blobs, parity: what the hosts that are left hold, by host: their own bytes, and their share of `make_parity`.
      hosts, lost, num_bytes: as they were when the parity was made; num_bytes of one host's bytes.

    Raises:
      ValueError: more hosts are gone than the parity can bring back.
    """
    gone = [h for h in range(hosts) if h not in blobs]
    if len(gone) > lost:
        raise ValueError(f"{len(gone)} of {hosts} hosts are gone but the parity covers {lost}; restore from storage")
    pieces = {h: pieces_of(blob, hosts, lost) for h, blob in blobs.items()}
    found: dict[int, list[Blob | None]] = {h: [None] * (hosts - lost) for h in gone}
    for stripe in range(hosts):
        inside = members(stripe, hosts, lost)
        have = {k: pieces[h][place_of(h, stripe, hosts, lost)] for k, h in enumerate(inside) if h in pieces}
        for k in range(lost):
            keeper = (stripe + k) % hosts
            if keeper in parity:
                have[len(inside) + k] = parity[keeper][parity_of(keeper, stripe, hosts, lost)]
        for position, piece in decode(have, len(inside), lost).items():
            h = inside[position]
            found[h][place_of(h, stripe, hosts, lost)] = piece
    return {h: np.concatenate([p for p in parts if p is not None])[:num_bytes] for h, parts in found.items()}


def encode(data: Sequence[Blob], parity: int) -> list[Blob]:
    """`parity` pieces, each a combination of all `data` pieces of one even length."""
    matrix = matrix_of(len(data), parity)
    return [combine(matrix[k], data) for k in range(parity)]


def decode(have: Mapping[int, Blob], count: int, parity: int, wanted: Collection[int] | None = None) -> dict[int, Blob]:
    """The missing ones of `count` data pieces, from any `count` of those and the parity pieces count, count + 1, ...

    Args:
      wanted: which of the missing ones to compute; all of them by default.

    Raises:
      ValueError: fewer than `count` pieces are there.
    """
    missing = [k for k in range(count) if k not in have]
    spare = [k for k in sorted(have) if k >= count][: len(missing)]
    if len(spare) < len(missing):
        raise ValueError(
            f"{len(missing)} of {count} pieces are missing with {len(spare)} of parity; restore from storage"
        )
    # What the missing pieces add to each parity, then a small system of equations.
    matrix = matrix_of(count, parity)
    known = [k for k in range(count) if k in have]
    sums = [combine([1, *(matrix[p - count][k] for k in known)], [have[p], *(have[k] for k in known)]) for p in spare]
    system = _invert([[matrix[p - count][k] for k in missing] for p in spare])
    return {k: combine(row, sums) for k, row in zip(missing, system) if wanted is None or k in wanted}


def pieces_of(blob: Blob, hosts: int, lost: int) -> list[Blob]:
    """Equal pieces of even length; zeros fill the last."""
    size = piece_bytes(len(blob), hosts, lost)
    padded = np.zeros(size * (hosts - lost), np.uint8)
    padded[: len(blob)] = blob
    return list(padded.reshape(hosts - lost, size))


def piece_bytes(num_bytes: int, hosts: int, lost: int) -> int:
    """Length of a piece, which is even."""
    if not 0 < lost < hosts or hosts + lost > 256:
        raise ValueError(f"lost={lost} of {hosts} hosts; it must lie between 1 and {hosts - 1}, and both add up to 256")
    return -(-num_bytes // (2 * (hosts - lost))) * 2


def members(stripe: int, hosts: int, lost: int) -> list[int]:
    """The hosts whose data is in a stripe, in ascending order."""
    keepers = {(stripe + k) % hosts for k in range(lost)}
    return [h for h in range(hosts) if h not in keepers]


def place_of(host: int, stripe: int, hosts: int, lost: int) -> int:
    """Which piece of a host is in this stripe: its how-manieth stripe as a member of data it is."""
    return sum(host in members(s, hosts, lost) for s in range(stripe))


def parity_of(host: int, stripe: int, hosts: int, lost: int) -> int:
    """Which of a host's parity pieces is of this stripe."""
    return sum(host not in members(s, hosts, lost) for s in range(stripe))


# GF(2^8) with the polynomial x^8 + x^4 + x^3 + x^2 + 1, whose generator is x


@functools.cache
def _logs() -> tuple[list[int], list[int]]:
    exponents, logs, value = [0] * 510, [0] * 256, 1
    for power in range(255):
        exponents[power] = exponents[power + 255] = value
        logs[value] = power
        value = (value << 1) ^ (0x11D if value & 0x80 else 0)
    return exponents, logs


def _times(a: int, b: int) -> int:
    exponents, logs = _logs()
    return exponents[logs[a] + logs[b]] if a and b else 0


def _inverse(a: int) -> int:
    exponents, logs = _logs()
    return exponents[255 - logs[a]]


@functools.cache
def matrix_of(count: int, parity: int) -> list[list[int]]:
    """1 / (x_k + y_j), each column scaled so that the first row is ones; every square part of it has an inverse."""
    rows = [[_inverse(k ^ (parity + j)) for j in range(count)] for k in range(parity)]
    return [[_times(entry, _inverse(first)) for entry, first in zip(row, rows[0])] for row in rows]


def _invert(matrix: list[list[int]]) -> list[list[int]]:
    """Gauss-Jordan; the square parts of a Cauchy matrix have no zero to stumble over but in passing."""
    n = len(matrix)
    rows = [list(row) + [int(i == k) for i in range(n)] for k, row in enumerate(matrix)]
    for k in range(n):
        pivot = next(i for i in range(k, n) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        scale = _inverse(rows[k][k])
        rows[k] = [_times(x, scale) for x in rows[k]]
        for i in range(n):
            if i != k and (factor := rows[i][k]):
                rows[i] = [x ^ _times(factor, y) for x, y in zip(rows[i], rows[k])]
    return [row[n:] for row in rows]


def combine(factors: Sequence[int], pieces: Sequence[Blob], out: Blob | None = None) -> Blob:
    """Sum of factor * piece, block by block so that a block stays in the cache; added to `out` where it is given."""
    out = np.zeros(len(pieces[0]), np.uint8) if out is None else out
    wide = out.view(np.uint16)
    block = 1 << 15
    for start in range(0, len(wide), block):
        part = wide[start : start + block]
        for factor, piece in zip(factors, pieces):
            words = piece.view(np.uint16)[start : start + block]
            part ^= words if factor == 1 else _table(factor)[words]
    return out


@functools.lru_cache(maxsize=256)
def _table(factor: int) -> np.ndarray:
    """uint16[65536]: both bytes of a word times the factor."""
    single = np.array([_times(factor, x) for x in range(256)], np.uint16)
    return (single[None, :] | single[:, None] << 8).reshape(-1)
