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

    Known from the smallest and largest position and segment id of each block; numpy where nothing of it is traced, so
    that a plain causal mask costs no operation on the device.
    """
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    given = (inputs.q_positions, inputs.q_segment_ids, inputs.window)
    xp: Any = np if all(x is None for x in given) else jnp

    def extremes(x, block):
        """The smallest and largest of each block; the last block repeats its last element."""
        x = xp.pad(x, ((0, 0), (0, -x.shape[1] % block)), mode="edge")
        x = x.reshape(x.shape[0], -1, block)
        return x.min(axis=2), x.max(axis=2)

    q_pos = xp.arange(T, dtype=np.int32)[None] if inputs.q_positions is None else inputs.q_positions
    kv_pos = xp.arange(S, dtype=np.int32)[None] if inputs.kv_positions is None else inputs.kv_positions
    q_min, q_max = (x[:, :, None] for x in extremes(q_pos, block_q))
    kv_min, kv_max = (x[:, None, :] for x in extremes(kv_pos, block_kv))
    some = xp.ones((1, q_min.shape[1], kv_min.shape[2]), bool)
    whole = xp.arange(1, kv_min.shape[2] + 1) * block_kv <= S  # padded keys are always masked
    every = xp.broadcast_to(whole[None, None] & (inputs.bias is None), some.shape)  # a bias of -inf hides, too
    left, right = options.window
    if options.causal:
        right = 0 if right is None else min(right, 0)
    if inputs.window is not None:
        far = inputs.window - 1
        left, right = far, (jnp.minimum(far, 0) if options.causal else far)
    if left is not None:
        some, every = some & (kv_max - q_min >= -left), every & (kv_min - q_max >= -left)
    if right is not None:
        some, every = some & (kv_min - q_max <= right), every & (kv_max - q_min <= right)
    if inputs.q_segment_ids is not None:
        assert inputs.kv_segment_ids is not None
        q_low, q_high = (x[:, :, None] for x in extremes(inputs.q_segment_ids, block_q))
        kv_low, kv_high = (x[:, None, :] for x in extremes(inputs.kv_segment_ids, block_kv))
        some = some & (q_low <= kv_high) & (kv_low <= q_high) & (q_high > 0) & (kv_high > 0)
        every = every & (q_low == q_high) & (kv_low == kv_high) & (q_low == kv_low) & (q_low != 0)
    return some, every


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
