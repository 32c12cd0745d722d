"""Fixed rows cut from a shuffled stream of documents, by index arithmetic: any row of any epoch in any process.

An epoch is a permutation of the documents laid end to end, each led by its BOS. Row r covers tokens [r T, (r + 1) T)
of that stream; a document that crosses the cut goes on in row r + 1 as a new segment. Only the last row of an epoch is
padded. Conversations lie in whole rows (`whole_offsets`): an answer is not learnt without its question.
"""

import numpy as np


def pack_rows(
    ids: np.ndarray,
    starts: np.ndarray,
    offsets: np.ndarray,
    rows: np.ndarray,
    seq_len: int,
    learnt: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
) -> dict:
    """Rows of the stream in which document d is `ids[starts[d] : starts[d] + offsets[d + 1] - offsets[d]]`.

    Args:
      ids: [num_tokens] flat token ids, of any integer dtype; a memory map will do.
      starts: [num_docs] int64, where each document begins in `ids`, in the order of the stream.
      offsets: [num_docs + 1] int64, where each document begins in the stream; offsets[-1] is the stream's length.
      rows: [R] int64 row numbers; a row past the end of the stream is all padding.
      seq_len: T.
      learnt: bool [num_tokens], which of `ids` are labels; None: all.
      sizes: [num_docs] how long each document is, where the stream has padding between them; None: it has none.

    Returns:
      int32 arrays [R, T]. tokens; labels: the next token of the same document, else -1; segment_ids: 1 for the first
      document piece of the row, 2 for the next, 0 for padding; positions: from 0 in each piece.
    """
    at = rows[:, None] * seq_len + np.arange(seq_len + 1)  # one further: the last label
    real = at < offsets[-1]
    at = np.minimum(at, offsets[-1] - 1)
    doc = np.searchsorted(offsets, at, side="right") - 1
    within = at - offsets[doc]
    if sizes is not None:
        real &= within < sizes[doc]
        within = np.minimum(within, sizes[doc] - 1)
    place = starts[doc] + within
    token = ids[place].astype(np.int32)
    first = np.maximum(offsets[doc], at[:, :1])  # of the piece: the document's start or the row's
    here, labelled = real[:, :-1], real[:, 1:] & (doc[:, 1:] == doc[:, :-1])
    if learnt is not None:
        labelled &= learnt[place[:, 1:]]
    return {
        "tokens": np.where(here, token[:, :-1], 0),
        "labels": np.where(labelled, token[:, 1:], np.int32(-1)),
        "segment_ids": np.where(here, (doc - doc[:, :1] + 1)[:, :-1], 0).astype(np.int32),
        "positions": np.where(here, (at - first)[:, :-1], 0).astype(np.int32),
    }


def whole_offsets(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """`offsets` for `pack_rows` of documents that are not cut: one that does not fit into what is left of a row begins
    the next. So does one longer than a row, which goes on in those after it."""
    offsets, end = [], 0
    for size in sizes.tolist():
        left = -end % seq_len
        begin = end + left if size > left else end
        offsets.append(begin)
        end = begin + size
    return np.array([*offsets, end], np.int64)


def document_order(digests: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """[num_docs] int64: a permutation that depends on each document's digest (uint64), the seed and the epoch.

    Sorting hashed keys, where NumPy's Generator would do, keeps the order across NumPy releases (NEP 19 lets streams
    change) and independent of the order in which the documents were found.
    """
    return np.argsort(_mix(digests ^ _key(seed, epoch)), kind="stable")


def row_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """[num_rows] int64: a second permutation, of the rows, or a long document would fill whole batches by itself."""
    return np.argsort(_mix(np.arange(num_rows, dtype=np.uint64) ^ ~_key(seed, epoch)), kind="stable")


def _key(seed: int, epoch: int) -> np.ndarray:
    return _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea & Flood 2014), a bijection of uint64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
