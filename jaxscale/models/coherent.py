"""A decoding step whose tokens stay where their experts are (`jaxscale.parallel.coherent`): one all_to_all a layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.config import ModelConfig
from jaxscale.layers import rms_norm
from jaxscale.models import decoder, moe
from jaxscale.models.cache import Cache
from jaxscale.models.routing import Routing
from jaxscale.parallel import coherent, tensor
from jaxscale.parallel.expert import EP
from jaxscale.parallel.expert_local import Call, experts_local, round_first
from jaxscale.sharding import active_mesh
from sharding_rules.rules import Rules

# At rest: a device holds its experts and all of the rest, so that a step gathers no parameters.
PARAMS = {"experts": (EP,)}


def check(cfg: ModelConfig, mesh: Mesh | AbstractMesh | None) -> None:
    """Raises ValueError unless `hidden` is right for this model on this mesh."""
    sizes = {} if mesh is None else {axis: n for axis, n in mesh.shape.items() if n > 1}
    if cfg.moe is None:
        raise ValueError(f"coherent=True lets tokens stay with their experts, and {cfg.name} has none; leave it out")
    if set(sizes) != {EP}:
        has = ", ".join(f"{axis}={n}" for axis, n in sizes.items()) or "one device"
        raise ValueError(f"coherent=True runs over ep alone. Got {has}; use make_mesh(ep=...), or leave it out")
    coherent.check_coherent(cfg.moe, sizes[EP])


def hidden(
    params: decoder.Params,
    cache: Cache,
    tokens: Int[Array, " B"],
    positions: Int[Array, " B"],
    cfg: ModelConfig,
    rules: Rules,
) -> tuple[Float[Array, "B 1 D"], Cache]:
    """`decoder.hidden` of one token of each row, and the cache with it.

    Args:
      params: at rest as `PARAMS` says.
      cache: of all rows, whole on each device. Donate it.
    """
    check(cfg, active_mesh())
    # The cache comes out the same on all devices, which its type cannot know: what tells them apart is written over.
    body = functools.partial(_hidden_local, cfg=cfg, rules=rules)
    out = P(EP), jax.tree.map(lambda _: P(), cache)
    return jax.shard_map(body, out_specs=out, check_vma=False)(params, cache, tokens, positions)


def _hidden_local(params, cache, tokens, positions, *, cfg: ModelConfig, rules: Rules):
    (B,), specs, shape = tokens.shape, decoder.param_specs(cfg), (tokens.shape[0], 1)
    x = tensor.embed(params["embed"], tokens[:, None], jnp.dtype(cfg.dtype), rules)
    if cfg.scale_embeddings:
        x = x * jnp.asarray(cfg.embed_dim**0.5, x.dtype)

    def layer(name, cfg, carry, stacked):
        x, here, cache, before = carry
        p, index, local = stacked
        p = decoder.gather_layer(p, specs[name], cfg, shape, rules)
        # A row that is elsewhere has no position: it writes nothing and sees nothing.
        at = jnp.where(here, positions, -1)[:, None]
        x, cache = decoder.after_attention(p, x, cfg, local, at, None, index, cache, rules, None)
        wrote, norm = here, functools.partial(rms_norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
        with jax.named_scope("mlp"):
            if cfg.moe is None:
                y = decoder.mlp_block(p["mlp"], norm(x, p["mlp_norm"]), cfg, rules)
            else:
                see = functools.partial(norm, scale=p["mlp_norm"])
                x, y, here, before = _experts(p["moe"], x, see, here, before, cfg, rules)
            x = x + (norm(y, p["mlp_post_norm"]) if cfg.post_norms else y)
        return (x, here, cache, before), wrote

    indices, local = jnp.arange(cfg.num_layers, dtype=jnp.int32), jnp.asarray(cfg.local_layers)
    carry, writers, start = (x, coherent.home(B), cache, moe.no_logits(cfg, shape, rules)), [], 0
    for name, kind, count in decoder.stacks(cfg):
        part = slice(start, start + count)
        carry, wrote = jax.lax.scan(
            functools.partial(layer, name, kind), carry, (params[name], indices[part], local[part])
        )
        writers.append(wrote)
        start += count
    x, here, cache, _ = carry
    rows = jnp.arange(B, dtype=jnp.int32)
    with jax.named_scope("share"):
        new = {name: c[:, rows, positions] for name, c in cache.items()}
        new = coherent.share(new, jnp.concatenate(writers))
        cache = {name: c.at[:, rows, positions].set(new[name], unique_indices=True) for name, c in cache.items()}
        x = coherent.share(x, here)
    with jax.named_scope("final_norm"):
        n = B // jax.lax.axis_size(EP)
        mine = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(EP) * n, n)
        scale = params["final_norm"].astype(jnp.float32)
        return rms_norm(mine, scale, eps=cfg.norm_eps, offset=cfg.norm_offset), cache


def _experts(p: Any, x, see, here, before, cfg: ModelConfig, rules: Rules):
    """Moves each token to its experts. x and what they add to it, which tokens are here now, the router's logits."""
    m = cfg.moe
    assert m is not None
    logits, chosen, places = moe.choose(p, see(x), m, jnp.ones(x.shape[:2], bool), before, rules)
    tokens = {"x": x, "experts": chosen.experts, "places": places, "weights": chosen.weights}
    if m.gating_residual:
        tokens["logits"] = logits
    tokens, here = coherent.move(tokens, here, coherent.device_of(places[:, 0], m.num_places))
    x = tokens["x"]
    y = see(x)
    with jax.named_scope("experts"):
        places = jnp.where(here[:, None], tokens["places"][:, 0], -1)
        call = Call(m.num_places, moe.activation(cfg), "all_to_all", 1, 1)
        first = jax.lax.axis_index(EP) * (m.num_places // jax.lax.axis_size(EP))
        fn = functools.partial(experts_local, call, first=first)
        out = round_first(fn, y[:, 0], places, tokens["weights"][:, 0], p["experts"])[:, None]
    chosen = Routing(tokens["experts"], tokens["weights"], tokens["weights"])
    return x, moe.beside(out, p, y, chosen, cfg, rules), here, tokens.get("logits")
