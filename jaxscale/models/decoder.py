"""The decoder: Llama 2/3, Mistral, Qwen2/3, SmolLM2, Gemma 2/3, Mixtral, Qwen3-MoE, DeepSeek-V2/V3 and GPT-OSS by
configuration.

Layers are stacked and scanned; plain ones before those with experts (`first_dense`) are a stack of their own."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxscale.config import ModelConfig
from jaxscale.layers import gated_mlp, rms_norm, rope, rope_angles, rope_frequencies, soft_cap
from jaxscale.models import cache as kv
from jaxscale.models import few_rows, mla, moe
from jaxscale.models.cache import Cache
from jaxscale.models.cache import CacheFormat as CacheFormat
from jaxscale.models.cache import init_cache as init_cache
from jaxscale.models.unstacked import specs_like
from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel import tensor
from jaxscale.parallel.context_cost import Context
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.parallel.pipeline_step import Task, scored
from jaxscale.params import ParamSpec, constant, normal, path_name
from jaxscale.sharding import active_mesh, as_weight, constrain, einsum, enter, gather_params, matmul, matmuls, saveable
from pallas_kernels import attention
from sharding_rules.rules import MEGATRON_FSDP, Rules

Params = dict[str, Any]
Remat = Literal["none", "dots", "full"]

RESIDUAL = ("batch", "norm_seq", "embed")  # between the blocks, split by sequence over tp
INSIDE = ("batch", "seq", "embed")  # where a block begins: whole over tp


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    rules: Rules = MEGATRON_FSDP,
    remat: Remat = "none",
    context: Context | None = None,
    pipeline: Pipeline | None = None,
) -> Float[Array, "B T V"]:
    """Logits in float32. Tokens attend causally within their segment (0 is padding); positions default to 0..T-1."""
    x, _, _ = _hidden(
        params,
        tokens,
        cfg,
        segment_ids=segment_ids,
        positions=positions,
        rules=rules,
        remat=remat,
        context=context,
        pipeline=pipeline,
    )
    return logits(params, x, cfg, rules)


def loss_fn(
    params: Params,
    batch: dict[str, Array],
    cfg: ModelConfig,
    *,
    rules: Rules = MEGATRON_FSDP,
    remat: Remat = "none",
    z_loss: float = 0.0,
    chunk: int = 2048,
    context: Context | None = None,
    pipeline: Pipeline | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Mean next-token loss in nats over the tokens with a label, and its parts.

    Args:
      batch: int32 [B, T] each: tokens, labels (-1: none), segment_ids, positions; dealt as context's layout says.
      context: how a sequence that is split over cp attends; by default the partitioner gathers keys and values.
      pipeline: on a mesh with pp, how the batch passes the stages; the loss is that of the whole batch however it does.

    Returns:
      loss: nll, plus z_loss times the mean squared logsumexp (PaLM, arXiv 2204.02311).
      parts: nll, and weight: the number of labels, by which micro-batches are averaged; of a mixture of experts also
        what `moe.losses` reports.
    """
    tokens, labels, segment_ids = batch["tokens"], batch["labels"], batch.get("segment_ids")
    stages = _stages()
    if cfg.tie_embeddings and stages == 1:
        # Gathered once for both uses, so that their gradients are added before they are scattered.
        table = _gather(params["embed"], param_specs(cfg)["embed"], cfg, tokens.shape, rules)
        params = params | {"embed": table}
    labels = constrain(labels, ("batch", "seq"), rules)
    counted = (labels >= 0).astype(jnp.float32)
    weight = counted.sum()
    targets = {"labels": labels, "share": counted / jnp.maximum(weight, 1.0)}

    def finish(params, x, targets):
        """Of any tokens, `share` each of the loss."""
        x, labels = _final_norm(params, x, cfg, rules), targets["labels"]
        share = constrain(targets["share"], ("batch", "seq"), rules)
        with jax.named_scope("loss"):
            head = _head(params, cfg, labels.shape, rules)
            nll, lse = tensor.token_losses(x, head, labels, chunk=chunk, logit_soft_cap=cfg.logit_soft_cap, rules=rules)
            loss = mean_nll = (nll * share).sum()
            if z_loss:
                loss = loss + z_loss * (lse * lse * share).sum()
        return loss, {"nll": mean_nll}

    # What routers do adds to the loss of each micro-batch on its own, or only when all have passed.
    adds_up = cfg.moe is None or (
        stages > 1 and moe.adds_up(cfg, over_pp.micro_rows(pipeline, depth(cfg), len(tokens)))
    )

    def through(layer, carry, stacked, rows):
        if stages == 1:
            carry, routing = jax.lax.scan(functools.partial(layer, rows), carry, stacked)
            return *finish(params, carry[0], targets), routing
        task = Task(layer, finish, take=lambda carry: carry[0], cast=functools.partial(_cast, cfg))
        unit = jnp.ones((), jnp.float32)
        if cfg.moe is not None:
            unit = moe.unit(cfg, tokens.size, segment_ids)
            task = task._replace(weigh=functools.partial(moe.layer_loss, cfg) if adds_up else None)
        ends = {name: params[name] for name in ("final_norm", "embed" if cfg.tie_embeddings else "head")}
        return scored(task, carry, stacked, rows, ends, targets, unit, pipeline)

    loss, parts, routing = _layers(
        params,
        tokens,
        cfg,
        through,
        segment_ids=segment_ids,
        positions=batch.get("positions"),
        rules=rules,
        remat=remat,
        context=context,
    )
    parts = {**parts, "weight": weight}
    if routing is not None:
        extra, metrics = moe.losses(routing, cfg)
        loss, parts = loss if adds_up else loss + extra, parts | metrics
    bias = params["layers"]["moe"]["router"].get("balance_bias") if cfg.moe else None
    if routing is not None and bias is not None:
        loss = loss + moe.bias_balancing(bias, routing)
    return loss, parts


def router_trace(
    params: Params, tokens: Int[Array, "B T"], cfg: ModelConfig, *, rules: Rules = MEGATRON_FSDP
) -> Int[Array, "L B T K"]:
    """Which experts each layer with experts chose for each token, int32, -1 where none: what placement is made from."""
    _, _, routing = _hidden(params, tokens, cfg, rules=rules, trace=True)
    if routing is None:
        raise ValueError(f"{cfg.name} has no experts to trace; set ModelConfig.moe")
    return routing["experts"]


def hidden(
    params: Params,
    tokens: Int[Array, "B T"],
    cfg: ModelConfig,
    *,
    segment_ids: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    cache: Cache | None = None,
    rules: Rules = MEGATRON_FSDP,
    remat: Remat = "none",
    context: Context | None = None,
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Activations after the last norm, and the cache with these tokens' keys and values in it.

    Args:
      cache: from `init_cache`. A row's keys and values go to the slots positions[row, 0] onwards, one after another;
        its queries then see every slot up to their own position. Without segment_ids. Donate it: no copy is made then.
    """
    x, cache, _ = _hidden(
        params,
        tokens,
        cfg,
        segment_ids=segment_ids,
        positions=positions,
        cache=cache,
        rules=rules,
        remat=remat,
        context=context,
    )
    return x, cache


def _hidden(params, tokens, cfg: ModelConfig, *, rules: Rules = MEGATRON_FSDP, cache=None, pipeline=None, **options):
    """As `hidden`, and what the routers of all layers did."""
    if (stages := _stages()) > 1 and (cache is not None or options.get("trace")):
        what = "a cache" if cache is not None else "a trace of the routers"
        raise ValueError(f"{what} takes no pipeline, and the mesh has pp={stages}; use one with pp=1")

    def through(layer, carry, stacked, rows):
        if stages > 1:
            return over_pp.scan(layer, carry, stacked, rows, pipeline)
        return jax.lax.scan(functools.partial(layer, rows), carry, stacked)

    (x, cache, _), routing = _layers(params, tokens, cfg, through, rules=rules, cache=cache, **options)
    return _final_norm(params, x, cfg, rules), cache, routing


def _layers(
    params,
    tokens,
    cfg: ModelConfig,
    through,
    *,
    segment_ids=None,
    positions=None,
    cache: Cache | None = None,
    rules: Rules = MEGATRON_FSDP,
    remat: Remat = "none",
    context: Context | None = None,
    trace: bool = False,
):
    """What `through` (layer, carry, stacked, rows) returns of the last stack of layers, once it has come there."""
    specs = param_specs(cfg)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    tokens, positions = (constrain(x, ("batch", "seq"), rules) for x in (tokens, positions))
    if segment_ids is not None:
        segment_ids = constrain(segment_ids, ("batch", "seq"), rules)

    with jax.named_scope("embed"):
        table = _gather(params["embed"], specs["embed"], cfg, tokens.shape, rules)
        x = tensor.embed(table, tokens, jnp.dtype(cfg.dtype), rules)
        if cfg.scale_embeddings:
            x = x * jnp.asarray(cfg.embed_dim**0.5, x.dtype)

    if cache is not None and few_rows.fits(params, x, cfg, cache):
        x, cache = few_rows.hidden(params, x, cfg, positions, cache, _rotation(cfg, jnp.asarray(False)))
        return (x, cache, None), None

    def layer(name, cfg, rows, carry, stacked):
        (positions, segment_ids), (x, cache, before), (p, index, local) = rows, carry, stacked
        p = gather_layer(p, specs[name], cfg, x.shape[:2], rules)
        x, cache, routing, before = _layer(
            p, x, cfg, local, positions, segment_ids, index, cache, rules, context, before, trace
        )
        return (x, cache, before), routing

    # The whole cache is carried and each layer writes its slots in place; scanned over, it would be copied every step.
    indices, local = jnp.arange(cfg.num_layers, dtype=jnp.int32), jnp.asarray(cfg.local_layers)
    rows = positions, segment_ids
    carry, start = (x, cache, moe.no_logits(cfg, tokens.shape, rules)), 0
    result: Any = None
    for name, kind, count in stacks(cfg):
        body = functools.partial(layer, name, kind)
        if isinstance(params[name], tuple):  # as `unstacked` lays them out: to generate, nothing else is returned
            body = jax.jit(body)
            for i, p in enumerate(params[name], start):
                carry, _ = body(rows, carry, (p, np.int32(i), local[i]))  # constant: no kernel computes from it
            start += count
            result = carry, None
            continue
        if remat != "none" or active_mesh() is not None:
            body = jax.checkpoint(body, policy=functools.partial(saveable, remat), prevent_cse=False)
        part = slice(start, start + count)
        stacked = params[name], indices[part], local[part]
        if name == "layers":
            return through(body, carry, stacked, rows)
        # Those before the layers with experts, of which each stage computes its share of the batch.
        carry, _ = jax.lax.scan(functools.partial(body, rows), carry, stacked)
        start += count
    return result


def _final_norm(params, x, cfg, rules):
    with jax.named_scope("final_norm"):
        scale = gather_params(params["final_norm"], param_specs(cfg)["final_norm"], jnp.float32, rules=rules)
        return rms_norm(x, scale, eps=cfg.norm_eps, offset=cfg.norm_offset)


def _stages() -> int:
    return 1 if (mesh := active_mesh()) is None else mesh.shape["pp"]


def _cast(cfg: ModelConfig, params: Any) -> Any:
    """Parameters, of layers or others, in the dtypes that they are computed with, as they are gathered."""

    def one(path, x):
        name = path_name(path)
        if (own := as_weight(x)) is not None:
            return own.cast(jnp.dtype(cfg.dtype))
        whole = "router" in name or name == "final_norm" or not jnp.issubdtype(x.dtype, jnp.inexact)
        return x if whole else x.astype(cfg.dtype)

    return jax.tree.map_with_path(one, params, is_leaf=lambda x: as_weight(x) is not None)


def depth(cfg: ModelConfig) -> int:
    """How many layers a pipeline splits."""
    return stacks(cfg)[-1][2]


def stacks(cfg: ModelConfig) -> list[tuple[str, ModelConfig, int]]:
    """(name, configuration, depth) of each stack of layers, in the order of the model."""
    first = cfg.moe.first_dense if cfg.moe else 0
    plain = dataclasses.replace(cfg, moe=None)
    return [("dense_layers", plain, first)] * (first > 0) + [("layers", cfg, cfg.num_layers - first)]


def logits(
    params: Params, x: Float[Array, "B T D"], cfg: ModelConfig, rules: Rules = MEGATRON_FSDP
) -> Float[Array, "B T V"]:
    """Float32 logits of activations, split over the vocabulary."""
    x = constrain(x, INSIDE, rules)
    if cfg.tie_embeddings:  # [V, D] as it lies: for one row the CPU takes six times as long with its transpose
        table = _gather(params["embed"], param_specs(cfg)["embed"], cfg, x.shape[:2], rules)
        out = matmul("BTD,VD->BTV", x, table, preferred_element_type=jnp.float32)
    else:
        head = _head(params, cfg, x.shape[:2], rules)
        out = matmul("BTD,DV->BTV", x, head, preferred_element_type=jnp.float32)
    return soft_cap(out, cfg.logit_soft_cap)


@functools.lru_cache(maxsize=32)
def param_specs(cfg: ModelConfig) -> dict[str, Any]:
    """Shape, logical axes, initial values and dtype of every parameter."""
    D, V = cfg.embed_dim, cfg.vocab_size
    table = normal(D**-0.5 if cfg.tie_embeddings else 1.0)
    specs = {
        "embed": ParamSpec((V, D), ("vocab", "embed"), table, cfg.param_dtype),
        **{name: _layer_specs(kind, depth) for name, kind, depth in stacks(cfg)},
        "final_norm": ParamSpec((D,), ("embed",), constant(1.0 - cfg.norm_offset), cfg.param_dtype),
    }
    if not cfg.tie_embeddings:
        specs["head"] = ParamSpec((D, V), ("embed", "vocab"), normal(D**-0.5), cfg.param_dtype)
    return specs


def _layer_specs(cfg: ModelConfig, L: int) -> dict[str, Any]:
    """Those of a stack of L layers."""
    D, F = cfg.embed_dim, cfg.mlp_dim
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def spec(*dims: tuple[int, str | None], init):
        return ParamSpec(tuple(size for size, _ in dims), tuple(name for _, name in dims), init, cfg.param_dtype)

    layers, embed = (L, "layers"), (D, "embed")
    ones, zeros = constant(1.0 - cfg.norm_offset), constant(0.0)
    # What writes into the residual stream starts smaller by the number of writes (GPT-2).
    into = normal(D**-0.5)
    out_of = lambda fan_in: normal(fan_in**-0.5 * (2 * cfg.num_layers) ** -0.5)
    norm = spec(layers, embed, init=ones)

    attn = {
        "wq": spec(layers, embed, (N, "q_heads"), (H, "head_dim"), init=into),
        "wk": spec(layers, embed, (K, "kv_heads"), (H, "head_dim"), init=into),
        "wv": spec(layers, embed, (K, "kv_heads"), (H, "head_dim"), init=into),
        "wo": spec(layers, (N, "q_heads"), (H, "head_dim"), embed, init=out_of(N * H)),
    }
    if cfg.qkv_bias:
        attn |= {
            "bq": spec(layers, (N, "q_heads"), (H, "head_dim"), init=zeros),
            "bk": spec(layers, (K, "kv_heads"), (H, "head_dim"), init=zeros),
            "bv": spec(layers, (K, "kv_heads"), (H, "head_dim"), init=zeros),
        }
    if cfg.out_bias:
        attn["bo"] = spec(layers, embed, init=zeros)
    if cfg.qk_norm:
        attn |= {
            "q_norm": spec(layers, (H, "head_dim"), init=ones),
            "k_norm": spec(layers, (H, "head_dim"), init=ones),
        }
    if cfg.sinks:
        attn["sinks"] = spec(layers, (N, "q_heads"), init=zeros)
    if cfg.mla is not None:
        attn = mla.param_specs(cfg, L)
    ffn = {
        "w_gate": spec(layers, embed, (F, "mlp"), init=into),
        "w_up": spec(layers, embed, (F, "mlp"), init=into),
        "w_down": spec(layers, (F, "mlp"), embed, init=out_of(F)),
    }
    if cfg.mlp_bias:
        ffn |= {
            "b_gate": spec(layers, (F, "mlp"), init=zeros),
            "b_up": spec(layers, (F, "mlp"), init=zeros),
            "b_down": spec(layers, embed, init=zeros),
        }
    block = {"attn_norm": norm, "attn": attn, "mlp_norm": norm, "mlp": ffn}
    if cfg.moe is not None:
        del block["mlp"]
        block["moe"] = moe.param_specs(cfg, L)
    if cfg.post_norms:
        block |= {"attn_post_norm": norm, "mlp_post_norm": norm}
    return block


def _layer(p, x, cfg, local, positions, segment_ids, index, cache, rules, context, before, trace):
    norm = functools.partial(rms_norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
    x, cache = after_attention(p, x, cfg, local, positions, segment_ids, index, cache, rules, context)
    routing = None
    with jax.named_scope("mlp"):
        y = norm(x, p["mlp_norm"])
        if cfg.moe is None:
            y = mlp_block(p["mlp"], y, cfg, rules)
        else:
            y, routing, before = moe.block(p["moe"], y, cfg, rules, segment_ids, before, trace)
        x = x + (norm(y, p["mlp_post_norm"]) if cfg.post_norms else y)
    return x, cache, routing, before


def after_attention(p, x, cfg, local, positions, segment_ids, index, cache, rules, context):
    """The residual stream after a layer's attention, and the cache."""
    norm = functools.partial(rms_norm, eps=cfg.norm_eps, offset=cfg.norm_offset)
    with jax.named_scope("attention"):
        y, rest = norm(x, p["attn_norm"]), (positions, segment_ids, index, cache, rules, context)
        if cfg.mla is None:
            y, cache = _attention_block(p["attn"], y, cfg, local, *rest)
        else:
            y, cache = mla.block(p["attn"], y, cfg, *rest)
        return x + (norm(y, p["attn_post_norm"]) if cfg.post_norms else y), cache


def _attention_block(p, y, cfg, local, positions, segment_ids, index, cache, rules, context):
    if "wqkv" in p:
        (y,) = enter(y, INSIDE, (p["wqkv"],), rules)
        ends = cfg.num_heads, cfg.num_heads + cfg.num_kv_heads
        q, k, v = jnp.split(matmul("BTD,DNH->BTNH", y, p["wqkv"]), ends, axis=2)
    else:
        y_q, y_kv = enter(y, INSIDE, (p["wq"], p["wk"]), rules)
        products = "BTD,DNH->BTNH", "BTD,DKH->BTKH", "BTD,DKH->BTKH"
        q, k, v = matmuls(products, (y_q, y_kv, y_kv), (p["wq"], p["wk"], p["wv"]))
    if cfg.qkv_bias:
        q, k, v = (x + p[b][None, None] for x, b in ((q, "bq"), (k, "bk"), (v, "bv")))
    angles = rope_angles(positions, *_rotation(cfg, local))
    rotate = functools.partial(rope, angles=angles, eps=cfg.norm_eps, offset=cfg.norm_offset)
    q, k = (rotate(x, norm=p.get(name)) for x, name in ((q, "q_norm"), (k, "k_norm")))

    kinds = set(cfg.local_layers)
    options = {"soft_cap": cfg.attn_soft_cap, "scale": cfg.query_scale}
    kv_positions, segments = positions, None if segment_ids is None else (segment_ids, segment_ids)
    if cache is not None:
        cache = kv.update(cache, {"k": k, "v": v}, index, positions, rules)
        if len(kinds) == 1 and kv.pages_fit(cache, q):
            window = cfg.window if kinds.pop() else None
            o = kv.attend(cache, q, index, positions, rules, window=window, sinks=p.get("sinks"), **options)
            return _attention_output(p, o, cfg, rules), cache
        k, kv_positions = kv.layer(cache, "k", index, q.dtype, rules)
        v, _ = kv.layer(cache, "v", index, q.dtype, rules)

    def attend(is_local: bool, q, k, v):
        attend_one = functools.partial(
            attention,
            causal=True,
            window=cfg.window if is_local else None,
            **options,
        )
        split = context if cache is None else None
        where = (positions, kv_positions), segments, rules, split
        return tensor.attention(attend_one, q, k, v, *where, sinks=p.get("sinks"))

    if len(kinds) == 1:
        o = attend(kinds.pop(), q, k, v)
    else:  # one program for each kind of layer, chosen as the scan goes: the kernels see static windows
        o = jax.lax.cond(local, functools.partial(attend, True), functools.partial(attend, False), q, k, v)
    return _attention_output(p, o, cfg, rules), cache


def _attention_output(p, o, cfg, rules):
    out = einsum("BTNH,NHD->BTD", o, p["wo"], axes=RESIDUAL, rules=rules)
    return out + p["bo"][None, None] if cfg.out_bias else out


def mlp_block(p, y, cfg, rules):
    (y,) = enter(y, INSIDE, (p["w_gate_up" if "w_gate_up" in p else "w_up"],), rules)
    own = as_weight(p["w_down"])
    out = None if own is None else own.gated(y, p, cfg.activation)
    if out is None:
        h = gated_mlp(y, p, cfg.activation)
        out = einsum("BTF,FD->BTD", h, p["w_down"], axes=RESIDUAL, rules=rules)
    else:
        out = constrain(out, RESIDUAL, rules)
    return out + p["b_down"][None, None] if cfg.mlp_bias else out


def _head(params, cfg, rows, rules):
    """[D, V] in the computation's dtype."""
    specs = param_specs(cfg)
    if cfg.tie_embeddings:
        return _gather(params["embed"], specs["embed"], cfg, rows, rules).T
    return _gather(params["head"], specs["head"], cfg, rows, rules)


def _rotation(cfg: ModelConfig, local: Array) -> tuple[Any, Any]:
    """Rotary frequencies and the factor on cos and sin of a layer, given whether it is a local one."""

    def table(is_local: bool):
        if is_local and cfg.local_rope_theta:
            return rope_frequencies(cfg.head_dim, cfg.local_rope_theta, None)
        return rope_frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)

    kinds = set(cfg.local_layers)
    if len(kinds) == 1 or cfg.local_rope_theta is None:
        return table(kinds.pop())
    (far, far_factor), (near, near_factor) = table(False), table(True)
    return jnp.where(local, near.astype("f"), far.astype("f")), jnp.where(local, near_factor, far_factor)


def _gather(params, specs, cfg, rows, rules):
    return gather_params(params, specs, jnp.dtype(cfg.dtype), rows, rules)


def gather_layer(p, specs, cfg, rows, rules):
    """What has a way of its own to be gathered apart: experts, latent attention."""
    own = {"moe": moe.gather} if cfg.moe is not None else {}
    own |= {"attn": mla.gather} if cfg.mla is not None else {}
    specs = specs_like(specs, p)
    rest, rest_specs = ({k: v for k, v in tree.items() if k not in own} for tree in (p, specs))
    gathered = {k: fn(p[k], specs[k], cfg, rows, rules) for k, fn in own.items()}
    return _gather(rest, rest_specs, cfg, rows, rules) | gathered
