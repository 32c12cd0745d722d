"""Routers: which experts a token uses and with what weights. Pure functions of logits, a row of the batch at a time."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxscale.config import MoEConfig
from jaxscale.sharding import ROUTED


class Routing(NamedTuple):
    """experts: int32 [B, T, K], -1 for a choice that was dropped, numbers from num_experts on for experts that cost
    nothing; weights: float32 [B, T, K], 0 where dropped; probs: float32 [B, T, E], what the balance loss is about."""

    experts: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]
    probs: Float[Array, "B T E"]


def route(logits: Float[Array, "B T E"], bias: Float[Array, " E"] | None, mask: Bool[Array, "B T"], cfg: MoEConfig):
    """The Routing of each token.

    Args:
      logits: float32, one for each of cfg.num_routed experts.
      bias: added to the scores when experts are chosen, not when they are weighed; takes no gradient.
      mask: False for padding, which takes no place in an expert of limited capacity.
    """
    if cfg.router == "expert_choice":
        return _expert_choice(logits, mask, cfg)
    scores = jax.nn.sigmoid(logits) if cfg.router == "sigmoid" else jax.nn.softmax(logits, axis=-1)
    chosen = jax.lax.stop_gradient(scores)
    if bias is not None:
        chosen = chosen + jax.lax.stop_gradient(bias)[None, None]
    if cfg.num_groups > 1:
        chosen = _in_top_groups(chosen, cfg)
    experts = checkpoint_name(_top_k(chosen, cfg.top_k), ROUTED)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if cfg.norm_top_k:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    if cfg.router == "gshard" and cfg.capacity_factor is not None:
        kept = _within_capacity(experts, mask, cfg)
        experts, weights = jnp.where(kept, experts, -1), jnp.where(kept, weights, 0.0)
    probs = scores / scores.sum(axis=-1, keepdims=True) if cfg.router == "sigmoid" else scores
    return Routing(experts, weights * cfg.weight_scale, probs)


def capacity(cfg: MoEConfig, num_tokens: int) -> int:
    """How many tokens of a row an expert takes at most."""
    share = num_tokens * cfg.top_k / cfg.num_routed
    return min(num_tokens, max(1, math.ceil(share * (cfg.capacity_factor or 1.0))))


def _in_top_groups(scores, cfg: MoEConfig):
    """The lowest number for experts outside of the best groups: those whose best expert scores highest (softmax,
    DeepSeek-V2), whose two best do together (sigmoid, DeepSeek-V3)."""
    groups = scores.reshape(*scores.shape[:2], cfg.num_groups, -1)
    counted = 2 if cfg.router == "sigmoid" else 1
    best = jax.lax.top_k(groups, min(counted, groups.shape[-1]))[0].sum(axis=-1)
    _, top = jax.lax.top_k(best, cfg.top_groups)
    kept = jax.nn.one_hot(top, cfg.num_groups, dtype=jnp.int32).sum(axis=2) > 0
    return jnp.where(kept[..., None], groups, jnp.finfo(scores.dtype).min).reshape(scores.shape)


def _top_k(scores: Array, k: int) -> Array:
    """`jax.lax.top_k`'s indices of finite scores, one after another: on a GPU that one sorts whole rows (8 of 128 for
    32,768 tokens on one H100: 0.14 ms, here 0.10)."""
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    found = []
    for _ in range(k):
        found.append(jnp.argmax(scores, axis=-1).astype(jnp.int32))
        scores = jnp.where(index == found[-1][..., None], -jnp.inf, scores)
    return jnp.stack(found, axis=-1)


def _within_capacity(experts, mask, cfg: MoEConfig):
    """Which choices find a place: all first choices in the order of the tokens, then all second ones (GShard)."""
    B, T, K = experts.shape
    hot = jax.nn.one_hot(experts, cfg.num_routed, dtype=jnp.int32) * mask.astype(jnp.int32)[..., None, None]
    by_rank = hot.swapaxes(1, 2).reshape(B, K * T, -1)
    place = ((by_rank.cumsum(axis=1) - 1) * by_rank).sum(axis=-1).reshape(B, K, T).swapaxes(1, 2)
    limited = experts < cfg.num_experts  # what costs nothing has room for all
    return mask[..., None] & ((place < capacity(cfg, T)) | ~limited)


def _expert_choice(logits, mask, cfg: MoEConfig):
    """Each expert takes the tokens of a row that want it most; a token may end with none or with many."""
    _, T, E = logits.shape
    probs = jax.nn.softmax(logits, axis=-1)
    wanted = jnp.where(mask[..., None], jax.lax.stop_gradient(probs), -1.0).swapaxes(1, 2)
    _, tokens = jax.lax.top_k(wanted, capacity(cfg, T))  # [B, E, C]
    taken = jax.nn.one_hot(tokens, T, dtype=jnp.int32).sum(axis=2).swapaxes(1, 2) > 0
    taken = taken & mask[..., None]
    experts = jnp.where(taken, jnp.arange(E, dtype=jnp.int32)[None, None], -1)
    return Routing(experts, jnp.where(taken, probs, 0.0) * cfg.weight_scale, probs)
