"""What every backend receives: checked arrays and static options, and the rule that says which key a query sees."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"


class Inputs(NamedTuple):
    """The arrays of one call. None where the caller gave none."""

    q: jax.Array  # [B, T, N, H]
    k: jax.Array  # [B, S, K, H]
    v: jax.Array  # [B, S, K, Hv]
    bias: jax.Array | None = None  # [B or 1, N or 1, T or 1, S]
    sinks: jax.Array | None = None  # [N]
    q_segment_ids: jax.Array | None = None  # [B, T] int32, given with kv_segment_ids [B, S]
    kv_segment_ids: jax.Array | None = None
    q_positions: jax.Array | None = None  # [B, T] int32, given with kv_positions [B, S]
    kv_positions: jax.Array | None = None
    window: jax.Array | None = None  # a traced int32 scalar: keys less than this far away; Options.window is static


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of one call."""

    causal: bool
    window: tuple[int | None, int | None]  # left, right: how far a key may stand before and after its query
    scale: float
    soft_cap: float | None


def nameable(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same arrays under the name `ATTENTION`: a jax.checkpoint policy that keeps what has this name
    (`jax.checkpoint_policies.save_only_these_names`) spares the backward pass a second forward kernel."""
    # Without the barrier XLA runs a kernel twice whose output a scan stacks: for the stack, and for its other users.
    o, lse = jax.lax.optimization_barrier((o, lse))
    return checkpoint_name(o, ATTENTION), checkpoint_name(lse, ATTENTION)


def mask_arrays(inputs: Inputs) -> tuple[list[str], list[jax.Array]]:
    """Names and arrays, of those that are given, from which a kernel makes a block's mask; a window is [1]."""
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "window")
    given = {name: array for name in names if (array := getattr(inputs, name)) is not None}
    if inputs.window is not None:
        given["window"] = inputs.window[None]
    return list(given), list(given.values())


def visible(inputs: Inputs, options: Options) -> jax.Array | None:
    """Which keys each query sees: bool [B or 1, T, S], or None when all see all."""
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    q_pos, kv_pos = inputs.q_positions, inputs.kv_positions
    if q_pos is None:
        q_pos = jnp.arange(T, dtype=jnp.int32)[None]
        kv_pos = jnp.arange(S, dtype=jnp.int32)[None]
    assert kv_pos is not None
    left, right = options.window
    conditions = []
    if options.causal or left is not None or right is not None or inputs.window is not None:
        ahead = kv_pos[:, None, :] - q_pos[:, :, None]
        if options.causal:
            conditions.append(ahead <= 0)
        if left is not None:
            conditions.append(ahead >= -left)
        if right is not None:
            conditions.append(ahead <= right)
        if inputs.window is not None:
            conditions.append(jnp.abs(ahead) < inputs.window)
    if inputs.q_segment_ids is not None:
        assert inputs.kv_segment_ids is not None
        q_ids = inputs.q_segment_ids[:, :, None]
        conditions += [q_ids == inputs.kv_segment_ids[:, None, :], q_ids != 0]
    mask = None
    for condition in conditions:
        mask = condition if mask is None else mask & condition
    return mask


def unify_vma[T](inputs: T) -> T:
    """Under shard_map with check_vma, every array of a tree made varying over the axes that any of them varies over.

    A custom_vjp must return cotangents that vary as its inputs do; the transpose of this cast sums those of an input
    that the caller holds replicated (sinks, a shared bias).
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(inputs)))

    def vary(x):
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, inputs)
