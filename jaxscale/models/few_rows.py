"""A decoder's step with quantized weights on a Hopper GPU, in eight kernels a layer.

With few rows each kernel's start and end count beside the reading of the weights. What XLA makes seven to ten kernels
of (norms, additions, the gate, sums over a matmul's parts, offsets) is two kinds of small kernels here, three of them a
layer; attention rotates and writes the cache. The same numbers are rounded at the same places as in `decoder`.
"""

import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxscale.config import ModelConfig
from jaxscale.layers import rope_angles
from jaxscale.models import cache as kv
from jaxscale.models.cache import Cache
from jaxscale.sharding import active_mesh
from pallas_kernels import QuantizedArray
from pallas_kernels.decode_attention.api import attend_new_token
from pallas_kernels.decode_layer.api import add_norm, gate, kernels_fit
from pallas_kernels.quantized_matmul.api import quantized_matmul_parts


def fits(params: dict[str, Any], x: Float[Array, "B T D"], cfg: ModelConfig, cache: Cache) -> bool:
    """Whether `hidden` computes this step of a decoder whose layers `unstack` took apart, here."""
    layers = params.get("layers")
    if active_mesh() is not None or not isinstance(layers, tuple) or x.shape[1] != 1:
        return False
    attn, mlp = layers[0]["attn"], layers[0].get("mlp", {})
    weights = attn.get("wqkv"), attn.get("wo"), mlp.get("w_gate_up"), mlp.get("w_down")
    plain = set(attn) == {"wqkv", "wo"} and set(mlp) == {"w_gate_up", "w_down"} and not cfg.post_norms
    if not plain or not all(isinstance(w, QuantizedArray) and w.activations is None for w in weights):
        return False
    q = jax.ShapeDtypeStruct((*x.shape[:2], cfg.num_heads, cfg.head_dim), x.dtype)
    return (
        cfg.activation == "silu"
        and len(set(cfg.local_layers)) == 1
        and set(cache) == {"k", "v"}
        and kv.pages_fit(cache, q)
        and kernels_fit(x, cfg.mlp_dim)
    )


def hidden(
    params: dict[str, Any],
    x: Float[Array, "B T D"],
    cfg: ModelConfig,
    positions: Int[Array, "B T"],
    cache: Cache,
    rotation: tuple[Any, Any],
) -> tuple[Float[Array, "B T D"], Cache]:
    """The residual stream before the last norm, and the cache, of embedded tokens [B, 1, D]."""
    angles = tuple(a[:, 0] for a in rope_angles(positions, *rotation))
    window = cfg.window if cfg.local_layers[0] else None
    norm = functools.partial(add_norm, eps=cfg.norm_eps, offset=cfg.norm_offset)

    @jax.jit
    def layer(p, x, parts, cache, index):
        """The residual stream, and what is still to be added to it."""
        x, y = norm(x, parts, p["attn_norm"])
        qkv = quantized_matmul_parts(y, p["attn"]["wqkv"])
        options = {"window": window, "soft_cap": cfg.attn_soft_cap, "scale": cfg.query_scale}
        o, k, v = attend_new_token(qkv, cache["k"], cache["v"], index, positions[:, 0], *angles, **options)
        cache = {"k": k, "v": v}
        x, y = norm(x, quantized_matmul_parts(o, p["attn"]["wo"]), p["mlp_norm"])
        h = gate(quantized_matmul_parts(y, p["mlp"]["w_gate_up"]), x.dtype)
        return x, quantized_matmul_parts(h, p["mlp"]["w_down"]), cache

    x, parts = x[:, 0], None
    for i, p in enumerate(params["layers"]):
        x, parts, cache = layer(p, x, parts, cache, np.int32(i))
    assert parts is not None
    return (x + parts.sum(axis=0).astype(x.dtype))[:, None], cache
