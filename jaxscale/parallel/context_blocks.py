"""What the strategies of `context.attention` share: a block of queries meets a block of keys, parts are merged."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from jaxscale.config import CPLayout


class Rows(NamedTuple):
    """What a mask compares, int32 [..., B, T] each; None where nothing does, or where the layout tells it."""

    positions: jax.Array | None
    segment_ids: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of a call."""

    axis_name: str
    size: int
    strategy: str
    layout: CPLayout
    group: int  # devices that exchange heads by ulysses
    causal: bool
    window: tuple[int | None, int | None]
    reach: tuple[int | None, int | None]  # tokens before and after a query that it may see, causal included
    soft_cap: float | None
    scale: float
    implementation: str | None

    @property
    def compares_positions(self) -> bool:
        return self.reach != (None, None)


class Cotangent(NamedTuple):
    """What the gradients of a block need to know of whole rows."""

    dout: jax.Array  # [B, T, N, Hv]
    lse: jax.Array  # [B, T, N] float32
    delta: jax.Array  # [B, T, N] float32


def block(call: Call, q, k, v, q_rows: Rows, kv_rows: Rows):
    """out [B, T, N, Hv] float32 and the logsumexp [B, T, N]."""
    masks = _masks(call, q_rows, kv_rows)
    out, lse = pallas_kernels.attention(q, k, v, **masks, implementation=call.implementation, return_lse=True)
    return out.astype(jnp.float32), lse


def block_bwd(call: Call, q, k, v, q_rows: Rows, kv_rows: Rows, rows: Cotangent):
    masks = _masks(call, q_rows, kv_rows)
    return pallas_kernels.attention_backward(q, k, v, *rows, **masks, implementation=call.implementation)


def _masks(call: Call, q_rows: Rows, kv_rows: Rows) -> dict[str, Any]:
    def pair(a, b):
        return None if a is None else (a, b)

    return {
        "causal": call.causal,
        "window": None if call.window == (None, None) else call.window,
        "soft_cap": call.soft_cap,
        "scale": call.scale,
        "positions": pair(q_rows.positions, kv_rows.positions),
        "segment_ids": pair(q_rows.segment_ids, kv_rows.segment_ids),
    }


def add_block(call: Call, acc, q, kv, q_rows: Rows, kv_rows: Rows):
    """The accumulated (out, lse) with a block merged in; a block that no query sees costs nothing."""

    def add(acc):
        return merge(acc, block(call, q, kv[0], kv[1], q_rows, kv_rows))

    return if_seen(call, (q_rows, kv_rows), add, lambda acc: acc, acc)


def block_grads(call: Call, dq, q, kv, q_rows, kv_rows, rows):
    """dq with a block's part added; its (dk, dv)."""

    def add(dq):
        part, dk, dv = block_bwd(call, q, kv[0], kv[1], q_rows, kv_rows, rows)
        return dq + part.astype(jnp.float32), (dk, dv)

    return if_seen(call, (q_rows, kv_rows), add, lambda dq: (dq, jax.tree.map(jnp.zeros_like, kv)), dq)


def if_seen(call: Call, rows: tuple[Rows, Rows], add: Callable, skip: Callable, carry):
    """`add`, or `skip` where the block is known to be masked from the extremes of its positions and segments."""
    (q_pos, q_ids), (kv_pos, kv_ids) = rows
    seen = []
    balanced = call.layout in ("zigzag", "striped", "packed") and call.window == (
        None,
        None,
    )  # every block is seen by some
    if q_pos is not None and kv_pos is not None and not balanced:
        left, right = call.reach
        if right is not None:
            seen.append(kv_pos.min(axis=1) - q_pos.max(axis=1) <= right)
        if left is not None:
            seen.append(kv_pos.max(axis=1) - q_pos.min(axis=1) >= -left)
    if q_ids is not None and kv_ids is not None and call.layout != "packed":
        (q_low, q_high), (kv_low, kv_high) = map(_id_extremes, (q_ids, kv_ids))
        seen += [q_low <= kv_high, kv_low <= q_high]
    if not seen:
        return add(carry)
    return lax.cond(functools.reduce(jnp.logical_and, seen).any(), add, skip, carry)


def _id_extremes(ids: jax.Array):
    """Of each row, padding aside: a row of padding is low > high."""
    return jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max).min(axis=1), ids.max(axis=1)


def merge(a, b):
    """Two parts (out, lse) of the same queries, over different keys."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - base), jnp.exp(lse_b - base)
    total = weight_a + weight_b
    inverse = 1 / jnp.where(total > 0, total, 1.0)
    out = out_a * (weight_a * inverse)[..., None] + out_b * (weight_b * inverse)[..., None]
    return out, base + jnp.log(total)


def place_of(call: Call) -> jax.Array:
    return lax.axis_index(call.axis_name) // call.group


def shift(call: Call, tree, places: int, around: bool = True):
    """Every array of a tree moved that many places further around the ring; not around: zeros come in at its start."""
    if places % (call.size // call.group) == 0:
        return tree
    to = [(i, i + places * call.group) for i in range(call.size)]
    to = [(i, j % call.size) for i, j in to if around or 0 <= j < call.size]
    return jax.tree.map(lambda x: lax.ppermute(x, call.axis_name, to), tree)


def float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def vary(tree: Any, axis_name: str) -> Any:
    """Arrays that all vary over the same mesh axes: what a scan's carry and a custom_vjp need. The transpose of this
    cast sums the gradients of what the caller holds replicated."""
    axes = frozenset({axis_name}).union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def cast(x):
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)
