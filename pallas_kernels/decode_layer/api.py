"""The public functions: check their input, pick a backend, run it. For one new token of each sequence."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch

# In the order of preference. Each module has the functions below; the first says what it does not take.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.decode_layer.pallas_mosaic_gpu",
    "xla": "pallas_kernels.decode_layer.xla",
}


def add_norm(
    x: jax.Array,
    parts: jax.Array | None,
    scale: jax.Array,
    *,
    eps: float,
    offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream with a layer's output added, and its RMS norm.

    Args:
      x: [B, D].
      parts: [P, B, D], what is added: their sum, rounded to x's dtype; None: nothing.
      scale: floating [D]; offset is added to it.

    Returns:
      The sum and its norm, [B, D] in x's dtype; computed in float32.
    """
    if x.ndim != 2 or scale.shape != x.shape[1:] or (parts is not None and parts.shape[1:] != x.shape):
        got = f"x {x.shape}, parts {None if parts is None else parts.shape}, scale {scale.shape}"
        raise ValueError(f"add_norm takes x [B, D], parts [P, B, D], scale [D]. Got {got}")
    backend = _choose("add_norm", implementation, lambda m: m.unfit_rows(x))
    return backend.add_norm(x, parts, scale, eps, offset)


def gate(parts: jax.Array, dtype, *, implementation: str | None = None) -> jax.Array:
    """silu(gate) * up [B, F] in `dtype`, of [P, B, 2F] whose sum over P, rounded to dtype, is [gate, up]."""
    if parts.ndim != 3 or parts.shape[2] % 2:
        raise ValueError(f"gate takes [P, B, 2F]. Got {parts.shape}")
    backend = _choose("gate", implementation, lambda m: m.unfit_hidden(parts.shape[2] // 2))
    return backend.gate(parts, jnp.dtype(dtype))


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


def kernels_fit(x: Any, cache: Any, heads: int, hidden: int) -> bool:
    """Whether all three run as kernels here: activations [*B, D], a cache [L, B, S, K, H], a gated MLP of `hidden`."""
    if _dispatch.unless_hopper():
        return False
    mosaic = _module("mosaic_gpu")
    return not (mosaic.unfit_rows(x) or mosaic.unfit_heads(cache, heads) or mosaic.unfit_hidden(hidden))


def _choose(op: str, implementation: str | None, unfit: Callable[[Any], str | None]) -> Any:
    """The module that runs a call; unfit(the kernels' module) is None, or the reason why they do not."""
    mosaic = lambda: _dispatch.unless_hopper() or unfit(_module("mosaic_gpu"))
    return _module(_dispatch.choose(op, implementation, {"mosaic_gpu": mosaic, "xla": lambda: None}))


def _module(name: str) -> Any:
    return importlib.import_module(BACKENDS[name])
