"""Which blocks of queries and keys meet: small tables with which a kernel skips the others; padding to blocks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention.inputs import Inputs, Options

_UNIT = 64


def key_ranges(inputs: Inputs, options: Options, tile: int, block_kv: int):
    """[B or 1, query tiles, 4] int32: the key blocks that a tile visits are [0, 3), those in [1, 2) need no mask."""
    return _ranges(*_meetings(inputs, options, tile, block_kv, (..., None), (slice(None), None)))


def query_ranges(inputs: Inputs, options: Options, block_q: int, tile: int):
    """[B or 1, key tiles, 4] int32: the same for the query blocks that a tile of keys visits."""
    return _ranges(*_meetings(inputs, options, block_q, tile, (slice(None), None), (..., None)))


def key_table(inputs: Inputs, options: Options, tile: int, block_kv: int):
    """`key_ranges`, with all tables of a call that are made on the device from one of 64 x 64: each is some kernels."""
    if _known(inputs) or tile % _UNIT or block_kv % _UNIT:
        return key_ranges(inputs, options, tile, block_kv)
    return coarser(key_ranges(inputs, options, _UNIT, _UNIT), tile // _UNIT, block_kv // _UNIT)


def _known(inputs: Inputs) -> bool:
    """Whether nothing that hides keys is traced."""
    return all(x is None for x in (inputs.q_positions, inputs.q_segment_ids, inputs.window))


def _meetings(inputs: Inputs, options: Options, block_q: int, block_kv: int, q_at, kv_at):
    """bool [B or 1, query blocks, key blocks], or with keys down: may any pair see each other; do all pairs surely.

    Known from the smallest and largest position and segment id of each block, and from the positions of its first and
    last document: positions may restart, and where two documents meet in a block those of one say nothing of the other.
    Exact where no document is shorter than a block. Numpy where nothing of it is traced, so that a plain causal mask
    costs no operation on the device.

    q_at, kv_at: index [B, blocks] for the table.
    """
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    xp: Any = np if _known(inputs) else jnp

    def cut(x, block):
        """[B, blocks, block]; the last block repeats its last element."""
        return xp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge").reshape(x.shape[0], -1, block)

    q_pos = xp.arange(T, dtype=np.int32)[None] if inputs.q_positions is None else inputs.q_positions
    kv_pos = xp.arange(S, dtype=np.int32)[None] if inputs.kv_positions is None else inputs.kv_positions
    q_pos, kv_pos = cut(q_pos, block_q), cut(kv_pos, block_kv)
    if inputs.q_segment_ids is None:
        queries, keys = ([x.min(axis=2)[at], x.max(axis=2)[at]] for x, at in ((q_pos, q_at), (kv_pos, kv_at)))
        near = queries, keys  # positions of those that may see each other
        some = every = xp.ones((1, 1, 1), bool)
    else:
        assert inputs.kv_segment_ids is not None
        q = _stats(q_pos, cut(inputs.q_segment_ids, block_q), q_at)
        kv = _stats(kv_pos, cut(inputs.kv_segment_ids, block_kv), kv_at)
        queries, keys = (q.smallest, q.largest), (kv.smallest, kv.largest)
        first, last = jnp.maximum(q.low, kv.low), jnp.minimum(q.high, kv.high)
        some, every = first <= last, q.alone & kv.alone & (q.low == kv.low)
        near = q.near(first, first == last), kv.near(first, first == last)
    left, right = options.window
    if options.causal:
        right = 0 if right is None else min(right, 0)
    if inputs.window is not None:
        far = inputs.window - 1
        left, right = far, (jnp.minimum(far, 0) if options.causal else far)
    (q_near, q_far), (kv_near, kv_far) = near
    if left is not None:
        some, every = some & (kv_far - q_near >= -left), every & (keys[0] - queries[1] >= -left)
    if right is not None:
        some, every = some & (kv_near - q_far <= right), every & (keys[1] - queries[0] <= right)
    if S % block_kv:  # padded keys are always masked
        every = every & (np.arange(1, kv_pos.shape[1] + 1) * block_kv <= S)[None][kv_at]
    if inputs.bias is not None:  # -inf hides, too
        every = every & False
    shape = np.broadcast_shapes(
        some.shape, every.shape, *(x[:, :, 0][at].shape for x, at in ((q_pos, q_at), (kv_pos, kv_at)))
    )
    return xp.broadcast_to(some, shape), xp.broadcast_to(every, shape)


class _Stats(NamedTuple):
    """Of the tokens of each block, int32 arrays: the smallest and largest id and position, and those of the positions
    of its first and of its last document, padding aside."""

    least_id: Any  # 0 where a token is padding
    smallest: Any
    largest: Any
    low: Any
    low_smallest: Any
    low_largest: Any
    high: Any
    high_smallest: Any
    high_largest: Any

    @property
    def alone(self):
        """Whether all tokens are of one document."""
        return (self.least_id == self.high) & (self.high > 0)

    def near(self, document, only):
        """The smallest and largest position of the tokens of this document, where it is the only one that matters; of
        all tokens otherwise."""
        first, last = only & (document == self.low), only & (document == self.high)
        ends = (
            (self.low_smallest, self.high_smallest, self.smallest),
            (self.low_largest, self.high_largest, self.largest),
        )
        return [jnp.where(first, x, jnp.where(last, y, z)) for x, y, z in ends]


def _stats(positions: jax.Array, ids: jax.Array, at: Any) -> _Stats:
    """Of [B, blocks, block]; `at` indexes [B, blocks] for the table of meetings.

    One reduction of nine numbers instead of nine, of which four would wait for others: on a GPU one kernel.
    """
    most, least = (np.int32(x) for x in (np.iinfo(np.int32).max, np.iinfo(np.int32).min))
    where = jnp.broadcast_to(positions, ids.shape)
    tokens = _Stats(ids, where, where, jnp.where(ids > 0, ids, most), where, where, ids, where, where)
    start = _Stats(most, most, least, most, most, least, least, most, least)
    return _Stats(*(x[at] for x in lax.reduce(tokens, start, _merge, (2,))))


def _merge(a: _Stats, b: _Stats) -> _Stats:
    """Of two sets of tokens together."""

    def ends(wins, same, x, y) -> tuple[Any, Any]:
        """(smallest, largest) of the document that is further out, of both where they have the same."""
        pick = lambda both, i: lax.select(same, both, lax.select(wins, x[i], y[i]))
        return pick(lax.min(x[0], y[0]), 0), pick(lax.max(x[1], y[1]), 1)

    low, high = a.low == b.low, a.high == b.high
    return _Stats(
        lax.min(a.least_id, b.least_id),
        lax.min(a.smallest, b.smallest),
        lax.max(a.largest, b.largest),
        lax.min(a.low, b.low),
        *ends(a.low < b.low, low, a[4:6], b[4:6]),
        lax.max(a.high, b.high),
        *ends(a.high > b.high, high, a[7:9], b[7:9]),
    )


def _ranges(some, every):
    """From [B, tiles, blocks] the first and the last block of `some`, and those of `every` if these are all between
    them (or else none), [B, tiles, 4]."""
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    count, zero = np.int32(some.shape[2]), np.int32(0)
    index = xp.arange(count, dtype=np.int32)
    marks = [y for x in (some, every) for y in (xp.where(x, index, count), xp.where(x, index + 1, zero))]
    marks = (*marks, every.astype(np.int32))
    if xp is np:
        found = [reduce(x, axis=2) for reduce, x in zip((np.min, np.max, np.min, np.max, np.sum), marks)]
    else:  # one kernel on a GPU
        found = lax.reduce(marks, (count, zero, count, zero, zero), _merge_ranges, (2,))
    lo, hi, full_lo, full_hi, full = found
    gap = full_hi - full_lo != full  # or none at all
    full_lo, full_hi = (xp.where(gap, hi, x) for x in (full_lo, full_hi))
    return xp.stack([xp.minimum(lo, hi), full_lo, full_hi, hi], axis=2).astype(np.int32)  # no block: empty, at 0


def _merge_ranges(a, b):
    return tuple(merge(x, y) for merge, x, y in zip((lax.min, lax.max, lax.min, lax.max, lax.add), a, b))


def ends(lo: list, hi: list):
    """The first of the blocks that any of some rows visits, and one past the last; not as reductions, each a kernel."""
    xp: Any = np if isinstance(lo[0], np.ndarray) else jnp
    end = functools.reduce(xp.maximum, hi)
    return functools.reduce(xp.minimum, [end, *(xp.where(x < y, x, end) for x, y in zip(lo, hi, strict=True))]), end


def pad_inputs(inputs: Inputs, block_q: int, block_kv: int) -> Inputs:
    """The queries filled up to whole blocks, and the keys; segment ids with 0."""
    queries = {x: getattr(inputs, x) for x in ("q", "q_segment_ids", "q_positions")}
    keys = {x: getattr(inputs, x) for x in ("k", "v", "kv_segment_ids", "kv_positions")}
    blocks = [(queries, block_q), (keys, block_kv)]
    bias = inputs.bias
    if bias is not None:
        bias = pad_to(bias if bias.shape[2] == 1 else pad_to(bias, 2, block_q), 3, block_kv)
    return inputs._replace(
        bias=bias,
        **{name: None if x is None else pad_to(x, 1, block) for group, block in blocks for name, x in group.items()},
    )


def rows_to(ranges, rows: int):
    """A table with rows that visit nothing at its end, so that it has `rows`."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    return xp.pad(ranges, ((0, 0), (0, rows - ranges.shape[1]), (0, 0)))


def coarser(ranges, rows: int, blocks: int):
    """The table of tiles that hold `rows` rows of a table each, and of blocks that hold so many of its blocks."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    missing = -ranges.shape[1] % rows
    lo, full_lo, full_hi, hi = (ranges[..., i] for i in range(4))
    if missing:  # rows that see nothing, and of which all that is seen is seen
        fill = [(lo, 0), (full_lo, 0), (full_hi, np.iinfo(np.int32).max), (hi, 0)]
        lo, full_lo, full_hi, hi = (xp.pad(x, ((0, 0), (0, missing)), constant_values=value) for x, value in fill)
    cut = lambda x: [x.reshape(len(ranges), -1, rows)[..., i] for i in range(rows)]
    start, end = ends(cut(lo), cut(hi))
    start, end = start // blocks, -(-end // blocks)
    full_lo = -(-functools.reduce(xp.maximum, cut(full_lo)) // blocks)
    full_hi = functools.reduce(xp.minimum, cut(full_hi)) // blocks
    none = full_lo >= full_hi
    full_lo, full_hi = (xp.where(none, end, x) for x in (full_lo, full_hi))
    return xp.stack([start, full_lo, full_hi, end], axis=2).astype(np.int32)


def pad_to(x: jax.Array, axis: int, block: int) -> jax.Array:
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
