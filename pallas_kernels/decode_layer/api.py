"""The public functions: check their input, pick a backend, run it. For one new token of each sequence."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.decode_layer.rows import Rows
from pallas_kernels.quantized_matmul.api import check_array
from pallas_kernels.quantized_matmul.array import QuantizedArray

# In the order of preference. Each module has the functions below; the first says what it does not take.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.decode_layer.pallas_mosaic_gpu",
    "xla": "pallas_kernels.decode_layer.xla",
}


def matmul_parts(rows: Rows, w: QuantizedArray, *, eps: float, implementation: str | None = None) -> jax.Array:
    """[P, B, *outputs], float32 or one part in rows' dtype, whose sum over P is norm(rows) @ w."""
    flat, backend = _flat("matmul_parts", implementation, rows.scaled, w, "unfit_parts")
    out = backend.matmul_parts(rows, flat, eps)
    return out.reshape(*out.shape[:2], *w.values.shape[: w.ndim - len(w.contraction)])


def matmul_gate(rows: Rows, w: QuantizedArray, *, eps: float, implementation: str | None = None) -> jax.Array:
    """silu(gate) * up [B, F] in rows' dtype, where norm(rows) @ w, rounded to that, is [gate, up]."""
    if len(w.values.shape) != 2 or w.values.shape[0] % 2:
        raise ValueError(f"matmul_gate takes w [D, 2F]. Got {w.shape}")
    flat, backend = _flat("matmul_gate", implementation, rows.scaled, w, "unfit_gate")
    return backend.matmul_gate(rows, flat, eps)


def matmul_add(
    h: jax.Array,
    w: QuantizedArray,
    x: jax.Array,
    scale: jax.Array,
    *,
    offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, Rows]:
    """The residual stream with a layer's output added: x [B, D] plus h [B, *contracted] @ w, and it as Rows.

    The product is rounded to x's dtype before the addition. scale [D] plus offset is the weight of the next norm.
    """
    if x.shape != (h.shape[0], w.values.shape[0]) or scale.shape != x.shape[1:] or w.ndim != len(w.contraction) + 1:
        got = f"h {h.shape}, w {w.shape}, x {x.shape}, scale {scale.shape}"
        raise ValueError(f"matmul_add takes h [B, *contracted], w [*contracted, D], x [B, D], scale [D]. Got {got}")
    h = h.reshape(h.shape[0], -1)
    flat, backend = _flat("matmul_add", implementation, h, w, "unfit_add")
    return backend.matmul_add(h, flat, x, scale, offset)


def rotate_and_write(
    parts: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    index: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries rotated by position (rope); keys, rotated, and values written to the cache, in place where it is donated.

    Args:
      parts: [P, B, N + 2 K, H]: their sum, rounded to the cache's dtype, is queries, keys and values.
      k_cache, v_cache: [L, B, S, K, H].
      index: int32 [], the layer that is written.
      positions: int32 [B], the slots; what is outside of the cache is not written.
      cos, sin: float32 [B, H/2], of each token's angles.

    Returns:
      Queries [B, N, H] in the cache's dtype, and both caches.
    """
    shapes = f"parts {parts.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, cos {cos.shape}, sin {sin.shape}"
    if parts.ndim != 4 or k_cache.ndim != 5 or k_cache.shape != v_cache.shape or k_cache.shape[1] != parts.shape[1]:
        raise ValueError(f"rotate_and_write takes parts [P, B, N + 2 K, H], caches [L, B, S, K, H]. Got {shapes}")
    _, B, both, H = parts.shape
    K = k_cache.shape[3]
    heads = both - 2 * K
    if heads < 1 or k_cache.shape[4] != H or not cos.shape == sin.shape == (B, H // 2) or positions.shape != (B,):
        raise ValueError(f"rotate_and_write: the sizes disagree. Got {shapes}, positions {positions.shape}")
    backend = _choose("rotate_and_write", implementation, lambda m: m.unfit_heads(k_cache, heads))
    index = jnp.asarray(index, jnp.int32)
    return backend.rotate_and_write(parts, k_cache, v_cache, index, positions, cos, sin, heads, k_cache.dtype)


def kernels_fit(x: Any, cache: Any, heads: int) -> bool:
    """Whether there are kernels here for activations [*B, D] and a cache [L, B, S, K, H]."""
    if _dispatch.unless_hopper() or x.dtype != jnp.bfloat16:
        return False
    return not _module("mosaic_gpu").unfit_heads(cache, heads)


def _flat(op: str, implementation: str | None, x: jax.Array, w: QuantizedArray, unfit: str) -> tuple[Any, Any]:
    """w as a matrix, and the module that multiplies x [B, K] with it."""
    check_array(w)
    flat = w.flat()
    if x.ndim != 2 or flat.values.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: w {w.shape} contracts other numbers than x has. Got x {x.shape}")
    return flat, _choose(op, implementation, lambda m: getattr(m, unfit)(x, flat))


def _choose(op: str, implementation: str | None, unfit: Callable[[Any], str | None]) -> Any:
    """The module that runs a call; unfit(the kernels' module) is None, or the reason why they do not."""
    mosaic = lambda: _dispatch.unless_hopper() or unfit(_module("mosaic_gpu"))
    return _module(_dispatch.choose(op, implementation, {"mosaic_gpu": mosaic, "xla": lambda: None}))


def _module(name: str) -> Any:
    return importlib.import_module(BACKENDS[name])
