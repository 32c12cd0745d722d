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


def kernels_fit(x: Any) -> bool:
    """Whether there are kernels here for activations [*B, D]."""
    return not _dispatch.unless_hopper() and x.dtype == jnp.bfloat16


def _flat(op: str, implementation: str | None, x: jax.Array, w: QuantizedArray, unfit: str) -> tuple[Any, Any]:
    """w as a matrix, and the module that multiplies x [B, K] with it."""
    check_array(op, w)
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
