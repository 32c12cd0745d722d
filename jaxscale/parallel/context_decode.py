"""Attention over a key-value cache whose slots are split over devices."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_kernels
from jaxscale.parallel.context_blocks import vary


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str = "cp",
    positions: tuple[jax.Array, jax.Array],
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = True,
    window: Any = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few queries, which every device holds, over a cache whose slots are split over devices.

    Each device attends to its own slots; the parts are merged by their logsumexps with two sums (DistAttention, arXiv
    2401.02669). What moves is as large as the queries, whatever the length of the cache.

    Args:
      q: [B, T, N, H], the same on all devices of the axis.
      k, v: [B, S, K, H], this device's slots.
      positions: int32 [B, T] of the queries and [B, S] of this device's slots; so segment_ids.

    Returns:
      [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32, the same on all devices of the axis.
    """
    q, k, v, positions, segment_ids = vary((q, k, v, positions, segment_ids), axis_name)
    out, lse = pallas_kernels.attention(
        q,
        k,
        v,
        positions=positions,
        segment_ids=segment_ids,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        implementation=implementation,
        return_lse=True,
    )
    top = lax.pmax(lse, axis_name)
    base = jnp.where(top == -jnp.inf, 0.0, top)
    weight = jnp.exp(lse - base)
    parts = jnp.concatenate([out.astype(jnp.float32) * weight[..., None], weight[..., None]], axis=-1)
    total = lax.psum(parts, axis_name)
    seen = total[..., -1:]
    return (total[..., :-1] / jnp.where(seen > 0, seen, 1.0)).astype(q.dtype), base + jnp.log(seen[..., 0])
