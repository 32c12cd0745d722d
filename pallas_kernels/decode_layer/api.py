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


def kernels_fit(x: Any, hidden: int) -> bool:
    """Whether both run as kernels here: activations [*B, D], a gated MLP of `hidden`."""
    if _dispatch.unless_hopper():
        return False
    mosaic = _module("mosaic_gpu")
    return not (mosaic.unfit_rows(x) or mosaic.unfit_hidden(hidden))


def _choose(op: str, implementation: str | None, unfit: Callable[[Any], str | None]) -> Any:
    """The module that runs a call; unfit(the kernels' module) is None, or the reason why they do not."""
    mosaic = lambda: _dispatch.unless_hopper() or unfit(_module("mosaic_gpu"))
    return _module(_dispatch.choose(op, implementation, {"mosaic_gpu": mosaic, "xla": lambda: None}))


def _module(name: str) -> Any:
    return importlib.import_module(BACKENDS[name])
