"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in place of a decoder's attention.

A token's keys and values come from one latent vector, and one rotated key serves all heads. Training and prefill expand
the latents to heads. Few queries over a long cache go to the latents instead: the expansion of keys is moved into the
queries, that of values behind attention, so that a cache of R + Hr numbers a token is all that is read.

Letters beside the house's: R numbers of a latent, Hr rotated and Hn other dims of a query or key, Hv dims of a value.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxscale.config import MLAConfig, ModelConfig
from jaxscale.layers import rms_norm, rope, rope_angles, rope_frequencies, yarn_magnitude
from jaxscale.models import cache as kv
from jaxscale.parallel import tensor
from jaxscale.parallel.context_cost import Context
from jaxscale.params import ParamSpec, constant, normal
from jaxscale.sharding import active_mesh, constrain, einsum, enter, gather_params, matmul, partitions
from pallas_kernels import attention
from sharding_rules.rules import Rules

INSIDE = ("batch", "seq", None)
DOWN = ("wq_down", "wkv_down", "wk_rope")  # multiplied where the norms are: there tp splits the sequence


def param_specs(cfg: ModelConfig, L: int) -> dict[str, Any]:
    """Those of L layers."""
    m, D, N = _mla(cfg), cfg.embed_dim, cfg.num_heads

    def spec(*dims: tuple[int, str | None], init):
        return ParamSpec((L, *(n for n, _ in dims)), ("layers", *(a for _, a in dims)), init, cfg.param_dtype)

    embed, heads, latent = (D, "embed"), (N, "q_heads"), (m.kv_rank, "latent")
    ones, dim = constant(1.0), lambda size: (size, "head_dim")
    fan_in = lambda size: normal(size**-0.5)
    specs = {
        "wkv_down": spec(embed, latent, init=fan_in(D)),
        "kv_latent_norm": spec(latent, init=ones),
        "wk_rope": spec(embed, dim(m.rope_dim), init=fan_in(D)),
        "wk_up": spec(latent, heads, dim(m.nope_dim), init=fan_in(m.kv_rank)),
        "wv_up": spec(latent, heads, dim(m.value_dim), init=fan_in(m.kv_rank)),
        "wo": spec(heads, dim(m.value_dim), embed, init=normal((N * m.value_dim * 2 * cfg.num_layers) ** -0.5)),
    }
    if m.q_rank is None:
        return specs | {"wq": spec(embed, heads, dim(cfg.head_dim), init=fan_in(D))}
    rank = (m.q_rank, "latent")
    return specs | {
        "wq_down": spec(embed, rank, init=fan_in(D)),
        "q_latent_norm": spec(rank, init=ones),
        "wq_up": spec(rank, heads, dim(cfg.head_dim), init=fan_in(m.q_rank)),
    }


def gather(params: Any, specs: Any, cfg: ModelConfig, rows: tuple[int, ...], rules: Rules) -> Any:
    """One layer's parameters as the computation wants them."""
    row_axes = lambda name: ("batch", "norm_seq" if name in DOWN else "seq")
    gather_one = lambda x, spec, axes: gather_params(x, spec, jnp.dtype(cfg.dtype), rows, rules, row_axes=axes)
    return {name: gather_one(x, specs[name], row_axes(name)) for name, x in params.items()}


def block(
    p: dict[str, Array],
    y: Array,
    cfg: ModelConfig,
    positions: Array,
    segment_ids: Array | None,
    index: Array,
    cache: kv.Cache | None,
    rules: Rules,
    context: Context | None,
) -> tuple[Array, kv.Cache | None]:
    """What attention adds to the residual stream, and the cache with this layer's latents in it.

    Args:
      p: of one layer, from `gather`.
      y: [B, T, D], normed; other arguments as in `jaxscale.models.decoder`.
    """
    m = _mla(cfg)
    norm = functools.partial(rms_norm, eps=cfg.norm_eps)
    rotate = functools.partial(_rotate, cfg=cfg, positions=positions)
    if m.q_rank is None:
        (y_q,) = enter(y, INSIDE, (p["wq"],), rules)
        q = matmul("BTD,DNH->BTNH", y_q, p["wq"])
    else:
        down = norm(matmul("BTD,DR->BTR", y, p["wq_down"]), p["q_latent_norm"])
        (down,) = enter(down, INSIDE, (p["wq_up"],), rules)
        q = matmul("BTR,RNH->BTNH", down, p["wq_up"])
    q_nope, q_rope = q[..., : m.nope_dim], rotate(q[..., m.nope_dim :])
    latents = norm(matmul("BTD,DR->BTR", y, p["wkv_down"]), p["kv_latent_norm"])
    k_rope = constrain(matmul("BTD,DH->BTH", y, p["wk_rope"]), INSIDE, rules)
    k_rope = rotate(k_rope[:, :, None])[:, :, 0]

    kv_positions, segments = positions, None if segment_ids is None else (segment_ids, segment_ids)
    if cache is not None:
        new = jnp.concatenate([constrain(latents, INSIDE, rules), k_rope], axis=-1)[:, :, None]
        cache = {"latent": kv.write(cache["latent"], new, index, positions, rules)}
        slots, kv_positions = kv.read(cache["latent"], index, rules)
        latents, k_rope = slots[:, :, 0, : m.kv_rank], slots[:, :, 0, m.kv_rank :]
    attend = functools.partial(attention, causal=True, scale=_logit_scale(cfg))
    where = (positions, kv_positions), segments, rules, context if cache is None else None
    if cache is not None and _few(m, q.shape[1], k_rope.shape[1]):
        q = jnp.concatenate([matmul("BTNH,RNH->BTNR", q_nope, p["wk_up"]), q_rope], axis=-1)
        k = jnp.concatenate([latents, k_rope], axis=-1)[:, :, None]
        o = tensor.attention(attend, q, k, latents[:, :, None], *where)
        o = matmul("BTNR,RNH->BTNH", o, p["wv_up"])
    else:
        over = INSIDE if cache is None else ("batch", None, None)
        k_rope = constrain(k_rope, over, rules)
        into_k, into_v = enter(latents, over, (p["wk_up"], p["wv_up"]), rules)
        k_nope, v = matmul("BSR,RNH->BSNH", into_k, p["wk_up"]), matmul("BSR,RNH->BSNH", into_v, p["wv_up"])
        k = jnp.concatenate([k_nope, _for_all_heads(k_rope, k_nope)], axis=-1)
        o = tensor.attention(attend, jnp.concatenate([q_nope, q_rope], axis=-1), k, v, *where)
    return einsum("BTNH,NHD->BTD", o, p["wo"], axes=("batch", "norm_seq", "embed"), rules=rules), cache


def _few(m: MLAConfig, T: int, S: int) -> bool:
    """Whether attending to latents takes fewer FLOPs than expanding S of them for T queries."""
    on_latents = T * (S * (2 * m.kv_rank + m.rope_dim) + m.kv_rank * (m.nope_dim + m.value_dim))
    return on_latents < T * S * (m.nope_dim + m.rope_dim + m.value_dim) + S * m.kv_rank * (m.nope_dim + m.value_dim)


def _logit_scale(cfg: ModelConfig) -> float:
    scale, scaling = cfg.query_scale or cfg.head_dim**-0.5, cfg.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * yarn_magnitude(scaling, scaling.mscale_all_dim) ** 2


def _rotate(x: Array, cfg: ModelConfig, positions: Array) -> Array:
    inv_freq, factor = rope_frequencies(_mla(cfg).rope_dim, cfg.rope_theta, cfg.rope_scaling)
    return rope(x, rope_angles(positions, inv_freq, factor))


def _for_all_heads(k_rope: Array, like: Array) -> Array:
    """[B, S, Hr] -> [B, S, N, Hr], laid out as `like` [B, S, N, H] is."""
    shape = (*like.shape[:3], k_rope.shape[-1])
    if active_mesh() is None:
        return jnp.broadcast_to(k_rope[:, :, None], shape)
    where = jax.sharding.PartitionSpec(*partitions(like))
    return jax.lax.broadcast_in_dim(k_rope, shape, (0, 1, 3), out_sharding=where)


def _mla(cfg: ModelConfig) -> MLAConfig:
    assert cfg.mla is not None
    return cfg.mla
