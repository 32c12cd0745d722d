"""Which blocks of queries and keys meet: small tables with which a kernel skips the others; padding to blocks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.inputs import Inputs, Options


def key_ranges(inputs: Inputs, options: Options, tile: int, block_kv: int):
    """[B or 1, query tiles, 4] int32: the key blocks that a tile visits are [0, 3), those in [1, 2) need no mask."""
    return _ranges(*_meetings(inputs, options, tile, block_kv))


def query_ranges(inputs: Inputs, options: Options, block_q: int, tile: int):
    """[B or 1, key tiles, 4] int32: the same for the query blocks that a tile of keys visits."""
    some, every = _meetings(inputs, options, block_q, tile)
    return _ranges(some.swapaxes(1, 2), every.swapaxes(1, 2))


def _meetings(inputs: Inputs, options: Options, block_q: int, block_kv: int):
    """bool [B or 1, query blocks, key blocks]: may any pair see each other; do all pairs surely.

    Known from the smallest and largest position and segment id of each block, and from the positions of its first and
    last document: positions may restart, and where two documents meet in a block those of one say nothing of the other.
    Exact where no document is shorter than a block. Numpy where nothing of it is traced, so that a plain causal mask
    costs no operation on the device.
    """
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    given = (inputs.q_positions, inputs.q_segment_ids, inputs.window)
    xp: Any = np if all(x is None for x in given) else jnp

    def cut(x, block):
        """[B, blocks, block]; the last block repeats its last element."""
        return xp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge").reshape(x.shape[0], -1, block)

    q_pos = xp.arange(T, dtype=np.int32)[None] if inputs.q_positions is None else inputs.q_positions
    kv_pos = xp.arange(S, dtype=np.int32)[None] if inputs.kv_positions is None else inputs.kv_positions
    q_pos, kv_pos = cut(q_pos, block_q), cut(kv_pos, block_kv)
    queries = [x(axis=2)[:, :, None] for x in (q_pos.min, q_pos.max)]
    keys = [x(axis=2)[:, None, :] for x in (kv_pos.min, kv_pos.max)]
    some = xp.ones((1, queries[0].shape[1], keys[0].shape[2]), bool)
    whole = xp.arange(1, keys[0].shape[2] + 1) * block_kv <= S  # padded keys are always masked
    every = xp.broadcast_to(whole[None, None] & (inputs.bias is None), some.shape)  # a bias of -inf hides, too
    near = queries, keys  # positions of those that may see each other
    if inputs.q_segment_ids is not None:
        assert inputs.kv_segment_ids is not None
        q_ids, kv_ids = cut(inputs.q_segment_ids, block_q), cut(inputs.kv_segment_ids, block_kv)
        q_ends, kv_ends = _Ends(q_pos, q_ids, (..., None)), _Ends(kv_pos, kv_ids, (slice(None), None, slice(None)))
        first, last = jnp.maximum(q_ends.low, kv_ends.low), jnp.minimum(q_ends.high, kv_ends.high)
        some = some & (first <= last)
        every = every & q_ends.alone & kv_ends.alone & (q_ends.low == kv_ends.low)
        near = q_ends.of(first, first == last, *queries), kv_ends.of(first, first == last, *keys)
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
    return some, every


class _Ends:
    """The first and the last document of each block, padding aside, and where their tokens stand. `at` indexes
    [B, blocks] for the table of meetings."""

    def __init__(self, positions: jax.Array, ids: jax.Array, at: Any):
        none = jnp.iinfo(jnp.int32)
        low, high = jnp.where(ids > 0, ids, none.max).min(axis=2), ids.max(axis=2)

        def reach(document):
            here = ids == document[:, :, None]
            smallest = jnp.where(here, positions, none.max).min(axis=2)
            return smallest[at], jnp.where(here, positions, none.min).max(axis=2)[at]

        self.low, self.high, self.alone = low[at], high[at], ((ids.min(axis=2) == high) & (high > 0))[at]
        self.first, self.last = reach(low), reach(high)

    def of(self, document, only, smallest, largest):
        """The smallest and largest position of a block's tokens of this document, where it is the only one that
        matters; of all its tokens otherwise."""
        first, last = only & (document == self.low), only & (document == self.high)
        return [
            jnp.where(first, x, jnp.where(last, y, z)) for x, y, z in zip(self.first, self.last, (smallest, largest))
        ]


def _ranges(some, every):
    xp: Any = np if isinstance(some, np.ndarray) else jnp
    count = some.shape[2]
    index = xp.arange(count, dtype=np.int32)[None, None]
    lo = xp.min(xp.where(some, index, count), axis=2)
    hi = xp.max(xp.where(some, index + 1, 0), axis=2)
    lo = xp.minimum(lo, hi)  # no block: an empty range at 0
    inside = index >= lo[..., None]
    full_lo = xp.minimum(xp.min(xp.where(every & inside, index, count), axis=2), hi)
    after = index >= full_lo[..., None]
    full_hi = xp.minimum(xp.min(xp.where(~every & after, index, count), axis=2), hi)
    return xp.stack([lo, full_lo, full_hi, hi], axis=2).astype(np.int32)


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


def pad_to(x: jax.Array, axis: int, block: int) -> jax.Array:
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x
