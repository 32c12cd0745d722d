"""A mixture of experts in place of a decoder's MLP: router, experts, shared experts, balance losses and metrics."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.layers import gated_mlp
from jaxscale.models import routing
from jaxscale.parallel.expert import apply_experts, gather_experts
from jaxscale.params import ParamSpec, constant, normal, path_name
from jaxscale.sharding import active_mesh, compute_spec, constrain, einsum, enter, gather_params, partitions, shard_map
from sharding_rules.rules import Rules

RESIDUAL = ("batch", "norm_seq", "embed")
INSIDE = ("batch", "seq", "embed")


def block(
    p: dict[str, Any],
    y: Array,
    cfg: ModelConfig,
    rules: Rules,
    segment_ids: Array | None,
    before: Array | None,
    trace: bool = False,
) -> tuple[Array, dict[str, Array], Array | None]:
    """What the experts add to the residual stream.

    Args:
      p: of one layer, from `gather`.
      y: [B, T, D], normed.
      segment_ids: [B, T]; 0 is padding, which counts in no loss and takes no place of limited capacity.
      before: [B, T, E] logits of the router before (gating residuals).
      trace: also return the chosen experts.

    Returns:
      out [B, T, D]; what the router did, as sums over tokens that add up over micro-batches, for `losses`; logits for
      the next layer's router.
    """
    m = _moe(cfg)
    mask = jnp.ones(y.shape[:2], bool) if segment_ids is None else segment_ids > 0
    mask = constrain(mask, ("batch", "seq"), rules)
    logits, chosen, places = choose(p, y, m, mask, before, rules)
    with jax.named_scope("experts"):
        out = apply_experts(
            y,
            places,
            chosen.weights,
            p["experts"],
            activation=activation(cfg),
            dispatch=m.dispatch,
            chunks=m.dispatch_chunks,
            hosts=m.ep_hosts or 1,
            row_pairs=m.num_experts * routing.capacity(m, y.shape[1]) if m.router == "expert_choice" else None,
            rules=rules,
        )
    out = beside(out, p, y, chosen, cfg, rules)
    stats = _stats(logits, chosen, mask, m, rules)
    if trace:
        stats["experts"] = chosen.experts
    return out, stats, logits if m.gating_residual else None


def choose(p, y: Array, m: MoEConfig, mask: Array, before: Array | None, rules: Rules):
    """The router's logits; what it chose; the places [B, T, K] of the experts that it chose."""
    with jax.named_scope("router"):
        logits = router_logits(p["router"], constrain(y, INSIDE, rules), m, before)
        chosen = _route(logits, p["router"].get("balance_bias"), mask, m, rules)
        places = _spread(p["places"], chosen.experts, m, rules) if m.num_replicas else chosen.experts
    return logits, chosen, places


def beside(out: Array, p, y: Array, chosen: routing.Routing, cfg: ModelConfig, rules: Rules) -> Array:
    """`out`, and what experts add to which no token travels: those that cost nothing, and shared ones."""
    m = _moe(cfg)
    if m.num_routed > m.num_experts:
        out = out + _cheap(p.get("constant"), y, chosen, m, rules)
    if m.shared_dim:
        with jax.named_scope("shared"):
            (inside,) = enter(y, INSIDE, (p["shared"]["w_up"],), rules)
            h = gated_mlp(inside, p["shared"], cfg.activation)
            out = out + einsum("BTF,FD->BTD", h, p["shared"]["w_down"], axes=RESIDUAL, rules=rules)
    return out


def activation(cfg: ModelConfig) -> str:
    """Of the experts, as `apply_experts` names it."""
    m = _moe(cfg)
    return m.activation if m.activation == "gpt_oss" else cfg.activation


def losses(stats: dict[str, Array], cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """(what is added to the loss, metrics) of the stacked [L, ...] statistics of `block`; means over layers.

    Metrics: router_balance (1 when even), router_z, router_entropy in nats, router_dropped (share of the choices),
    router_load (the busiest expert's share of the choices over an even one).
    """
    m, load = _moe(cfg), stats["load"]
    total = jnp.maximum(stats["tokens"], 1e-9)
    mean = {name: (stats[name] / total).mean() for name in ("z", "entropy", "dropped")}
    balance = stats["balance"] if "balance" in stats else _balance(load, stats["prob"], stats["tokens"], m)
    mean = {"balance": (balance / total).mean()} | mean
    extra = m.balance_weight * mean["balance"] + m.router_z_weight * mean["z"]
    busiest = (load.max(axis=-1) / jnp.maximum(load.mean(axis=-1), 1e-9)).mean()
    return extra, {f"router_{name}": x for name, x in mean.items()} | {"router_load": busiest}


def bias_balancing(bias: Array, stats: dict[str, Array]) -> Array:
    """Zero, with the gradient of loss-free balancing (arXiv 2408.15664) of bias [L, E]: descent lowers that of busy
    experts."""
    over = jax.lax.stop_gradient(stats["load"] - stats["load"].mean(axis=-1, keepdims=True))
    if active_mesh() is not None:
        over = jax.reshard(over, jax.sharding.PartitionSpec(*partitions(bias)))
    return ((bias - jax.lax.stop_gradient(bias)) * jnp.sign(over)).sum()


def adds_up(cfg: ModelConfig, rows: int) -> bool:
    """Whether `losses` of a batch is the sum of `layer_loss` over its parts of so many rows.

    It is not where the load of the whole batch is balanced.
    """
    m = _moe(cfg)
    return not m.balance_weight or (m.balance_rows is not None and rows % m.balance_rows == 0)


def layer_loss(cfg: ModelConfig, stats: dict[str, Array]) -> Array:
    """What a layer's `stats` of any rows add to the loss, in `unit`s."""
    m = _moe(cfg)
    z = m.router_z_weight * stats["z"]
    return z + m.balance_weight * stats["balance"] if m.balance_weight else z


def unit(cfg: ModelConfig, size: int, segment_ids: Array | None) -> Array:
    """One over the number of layers, and of tokens: of all `size` but padding."""
    tokens = jnp.float32(size) if segment_ids is None else (segment_ids > 0).sum().astype(jnp.float32)
    layers = cfg.num_layers - _moe(cfg).first_dense
    return 1.0 / (layers * jnp.maximum(tokens, 1e-9))


def with_bias_balancing(optimizer: optax.GradientTransformation, rate: float) -> optax.GradientTransformation:
    """`optimizer` for all parameters but the routers' balance_bias, which goes `rate` a step against its load."""

    def labels(params):
        name = lambda path, _: "bias" if path_name(path).endswith("balance_bias") else "rest"
        return jax.tree.map_with_path(name, params)

    return optax.partition({"bias": optax.sgd(rate), "rest": optimizer}, labels)


def param_specs(cfg: ModelConfig, L: int) -> dict[str, Any]:
    """Those of L layers with experts."""
    m, D = _moe(cfg), cfg.embed_dim
    F, R = m.mlp_dim, m.num_routed

    def spec(*dims: tuple[int, str | None], init):
        return ParamSpec((L, *(n for n, _ in dims)), ("layers", *(a for _, a in dims)), init, cfg.param_dtype)

    embed, experts, mlp = (D, "embed"), (m.num_places, "experts"), (F, "mlp")
    into, zeros = normal(D**-0.5), constant(0.0)
    out_of = lambda fan_in: normal(fan_in**-0.5 * (2 * cfg.num_layers) ** -0.5)
    router = {"w": spec(embed, (R, None), init=into)}
    if m.router == "cosine":
        router = {
            "w_down": spec(embed, (m.cosine_dim, None), init=into),
            "w": spec((m.cosine_dim, None), (R, None), init=normal(m.cosine_dim**-0.5)),
            "temperature": spec((1, None), init=constant(0.07)),
        }
    if m.router_bias:
        router["b"] = spec((R, None), init=zeros)
    if m.router == "sigmoid":
        router["balance_bias"] = spec((R, None), init=zeros)
    if m.gating_residual:
        router["w_before"] = spec((R, None), (R, None), init=zeros)
    weights = {
        "w_gate": spec(experts, embed, mlp, init=into),
        "w_up": spec(experts, embed, mlp, init=into),
        "w_down": spec(experts, mlp, embed, init=out_of(F)),
    }
    if m.activation == "gpt_oss":
        weights |= {
            "b_gate": spec(experts, mlp, init=zeros),
            "b_up": spec(experts, mlp, init=zeros),
            "b_down": spec(experts, embed, init=zeros),
        }
    specs: dict[str, Any] = {"router": router, "experts": weights}
    if m.num_replicas:
        shape = (L, m.num_experts, 1 + m.num_replicas)
        specs["places"] = ParamSpec(shape, ("layers", None, None), _own_places, "int32")
    if m.num_constant:
        specs["constant"] = {
            "value": spec((m.num_constant, None), embed, init=zeros),
            "w": spec(embed, (2 * m.num_constant, None), init=into),
        }
    if m.shared_dim:
        shared = (m.shared_dim, "mlp")
        specs["shared"] = {
            "w_gate": spec(embed, shared, init=into),
            "w_up": spec(embed, shared, init=into),
            "w_down": spec(shared, embed, init=out_of(m.shared_dim)),
        }
    return specs


def gather(params: Any, specs: Any, cfg: ModelConfig, rows: Any, rules: Rules) -> Any:
    """One layer's parameters as the computation wants them; the router's in float32."""
    out = {}
    for name, part in params.items():
        if name == "experts":
            out[name] = gather_experts(part, specs[name], jnp.dtype(cfg.dtype), rows, rules)
        else:
            dtype = jnp.dtype({"router": "float32", "places": "int32"}.get(name, cfg.dtype))
            out[name] = gather_params(part, specs[name], dtype, rows, rules)
    return out


def no_logits(cfg: ModelConfig, shape: tuple[int, ...], rules: Rules) -> Array | None:
    """What the first router sees of a router before it; None without gating residuals."""
    if cfg.moe is None or not cfg.moe.gating_residual:
        return None
    return constrain(jnp.zeros((*shape, cfg.moe.num_routed), jnp.float32), ("batch", "seq", None), rules)


def router_logits(p: dict[str, Array], y: Array, m: MoEConfig, before: Array | None = None) -> Array:
    """Float32 [B, T, E]."""
    y = y.astype(jnp.float32)
    if m.router == "cosine":
        y = _unit(jnp.einsum("BTD,DR->BTR", y, p["w_down"]), axis=-1)
        logits = jnp.einsum("BTR,RE->BTE", y, _unit(p["w"], axis=0))
        logits = logits / jnp.maximum(p["temperature"], 0.01)[None, None]
    else:
        logits = jnp.einsum("BTD,DE->BTE", y, p["w"])
    if "b" in p:
        logits = logits + p["b"][None, None]
    if before is not None:
        logits = logits + jnp.einsum("BTE,EF->BTF", before, p["w_before"])
    return logits


def _route(logits, bias, mask, m: MoEConfig, rules: Rules) -> routing.Routing:
    if active_mesh() is None:
        return routing.route(logits, bias, mask, m)
    # What is limited in a row must see the whole row.
    whole = m.router == "expert_choice" or m.capacity_factor is not None
    seq = None if whole else "seq"
    logits, mask = constrain(logits, ("batch", seq, None), rules), constrain(mask, ("batch", seq), rules)
    spec = jax.typeof(logits).sharding.spec
    arrays = (logits, mask) if bias is None else (logits, mask, bias)
    route = lambda logits, mask, bias=None: routing.route(logits, bias, mask, m)
    out = shard_map(route, out_specs=spec)(*arrays)
    return routing.Routing(*(constrain(x, ("batch", "seq", None), rules) for x in out))


def _own_places(key, shape, dtype, *, out_sharding=None):
    """Of each expert the place with its number, and no copy."""
    return jax.lax.broadcasted_iota(dtype, shape, 1, out_sharding=out_sharding)


def _spread(places: Array, experts: Array, m: MoEConfig, rules: Rules) -> Array:
    """Expert numbers [B, T, K] -> the places of copies, which tokens take in turn; -1 for what has no place.

    places: [E, C], each expert's copies, again and again.
    """
    B, T, K = experts.shape
    token = jnp.arange(B * T, dtype=jnp.int32).reshape(B, T, 1) % places.shape[1]
    turn = constrain(jnp.broadcast_to(token, (B, T, K)), ("batch", "seq", None), rules)
    experts = constrain(experts, ("batch", "seq", None), rules)
    known = (experts >= 0) & (experts < m.num_experts)
    spec = compute_spec(experts.shape, ("batch", "seq", None), rules)
    return jnp.where(known, places.at[jnp.where(known, experts, 0), turn].get(out_sharding=spec), -1)


def _cheap(p, y, chosen: routing.Routing, m: MoEConfig, rules: Rules):
    """Experts that cost nothing: zero adds nothing, copy its input, constant a mix of its input and a learned vector
    (MoE++, arXiv 2410.07348)."""
    experts, weights = (constrain(x, ("batch", "norm_seq", None), rules) for x in (chosen.experts, chosen.weights))
    first = m.num_experts + m.num_zero
    taken = lambda low, high: jnp.where((experts >= low) & (experts < high), weights, 0.0).sum(axis=-1)
    out = y * taken(first, first + m.num_copy).astype(y.dtype)[..., None]
    if not m.num_constant:
        return out
    first += m.num_copy
    inside = constrain(y, INSIDE, rules)
    mix = jnp.einsum("BTD,DC->BTC", inside, p["w"]).astype(jnp.float32)
    mix = jax.nn.softmax(mix.reshape(*mix.shape[:2], m.num_constant, 2), axis=-1)
    each = jnp.stack([taken(first + i, first + i + 1) for i in range(m.num_constant)], axis=-1)
    mix = mix * constrain(each, ("batch", "seq", None), rules)[..., None]
    kept = constrain(mix[..., 0].sum(axis=-1), ("batch", "norm_seq"), rules)
    learned = jnp.einsum("BTC,CD->BTD", mix[..., 1].astype(y.dtype), p["value"])
    return out + y * kept.astype(y.dtype)[..., None] + constrain(learned, RESIDUAL, rules)


def _stats(logits, chosen: routing.Routing, mask, m: MoEConfig, rules: Rules) -> dict[str, Array]:
    B, E = mask.shape[0], m.num_routed
    rows = m.balance_rows
    if rows and B % rows:
        raise ValueError(f"balance_rows={rows} does not divide the {B} rows of a batch; use a divisor of it, or None")
    counted = mask.astype(jnp.float32)[..., None]
    per_row = lambda x: constrain((x * counted).sum(axis=1), (None, None), rules)
    hot = jax.nn.one_hot(chosen.experts, E, dtype=jnp.float32).sum(axis=2)
    tokens = per_row(jnp.ones_like(counted))
    total = lambda x: per_row(x).sum()
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    entropy = -(chosen.probs * jnp.log(chosen.probs + 1e-20)).sum(axis=-1, keepdims=True)
    if m.router == "expert_choice":
        lost = (hot.sum(axis=-1, keepdims=True) == 0).astype(jnp.float32)
    else:
        lost = (chosen.experts < 0).astype(jnp.float32).mean(axis=-1, keepdims=True)
    load, prob = per_row(hot), per_row(chosen.probs)
    stats = {"tokens": tokens.sum(), "load": load.sum(axis=0)}
    stats |= {"z": total(lse * lse), "entropy": total(entropy), "dropped": total(lost)}
    if rows is None:  # of the whole batch, whose load is known when all micro-batches have passed
        return stats | {"prob": prob.sum(axis=0)}
    grouped = lambda x: x.reshape(B // rows, rows, -1).sum(axis=1)
    return stats | {"balance": _balance(grouped(load), grouped(prob), grouped(tokens)[:, 0], m).sum()}


def _balance(load: Array, prob: Array, tokens: Array, m: MoEConfig) -> Array:
    """Of each of [n] groups of rows its number of tokens times E sum f p (1 when even), from sums [n, E] over them."""
    E = m.num_routed
    cost = jnp.where(jnp.arange(E) < m.num_experts, 1.0, m.cheap_balance)
    tokens = jnp.maximum(tokens, 1e-9)[:, None]
    return E * (cost[None] * load * prob / (tokens * m.top_k)).sum(axis=-1)


def _unit(x, axis: int):
    return x * jax.lax.rsqrt((x * x).sum(axis=axis, keepdims=True) + 1e-12)


def _moe(cfg: ModelConfig) -> MoEConfig:
    assert cfg.moe is not None
    return cfg.moe
