"""A decoder's step with quantized weights on a Hopper GPU, in five kernels a layer.

With few rows each kernel's start and end count beside the reading of the weights. What XLA makes seven to ten kernels
of (norms, additions, rotation, the cache's writes, the gate, sums over a matmul's parts, offsets) are the ends of
matmuls and the start of attention here. The same numbers are rounded as in `decoder`, but for a norm's output: it is
rounded before each row is divided by its size, which the next matmul does to its sums.
"""

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
from pallas_kernels.decode_layer.api import kernels_fit, matmul_add, matmul_gate, matmul_parts
from pallas_kernels.decode_layer.rows import to_rows


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
        and kernels_fit(x)
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

    @jax.jit
    def layer(p, next_norm, x, rows, cache, index):
        qkv = matmul_parts(rows, p["attn"]["wqkv"], eps=cfg.norm_eps)
        options = {"window": window, "soft_cap": cfg.attn_soft_cap, "scale": cfg.query_scale}
        o, k, v = attend_new_token(qkv, cache["k"], cache["v"], index, positions[:, 0], *angles, **options)
        cache = {"k": k, "v": v}
        x, rows = matmul_add(o, p["attn"]["wo"], x, p["mlp_norm"], offset=cfg.norm_offset)
        h = matmul_gate(rows, p["mlp"]["w_gate_up"], eps=cfg.norm_eps)
        return *matmul_add(h, p["mlp"]["w_down"], x, next_norm, offset=cfg.norm_offset), cache

    x, layers = x[:, 0], params["layers"]
    norms = [p["attn_norm"] for p in layers]
    rows = to_rows(x, norms[0], cfg.norm_offset)
    for i, (p, next_norm) in enumerate(zip(layers, [*norms[1:], norms[0]])):  # the last one's goes nowhere
        x, rows, cache = layer(p, next_norm, x, rows, cache, np.int32(i))
    return x[:, None], cache
