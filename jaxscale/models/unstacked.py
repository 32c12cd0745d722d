"""Parameters laid out for decoding with few rows, where each kernel's start and each copy of a weight count.

Layers become a tuple of trees, which a program takes one after another: XLA copies values of 4 bits out of a stack
before a kernel reads them, three times the traffic. Projections that meet the same activations become one, and values
lie in the order in which a kernel widens them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.api import quantized_matmul_implementation
from pallas_kernels.quantized_matmul.array import QuantizedArray

# name of a joined weight -> its parts and the dim along which they follow each other, from the end
JOINED = {"wqkv": (("wq", "wk", "wv"), -2), "w_gate_up": (("w_gate", "w_up"), -1)}


def unstack(params: Any, *, join: bool = True, interleave: bool = True) -> Any:
    """Decoder parameters whose stacks of layers are tuples; the layers' arrays are copies.

    Args:
      join: joins projections. Not for a mesh with tp: a device's share would no longer be whole heads of each.
      interleave: lays weights out for the kernel that runs them here, if it has a layout. Not for a mesh.
    """
    layers = {}
    for name in [name for name in params if name.endswith("layers") and not isinstance(params[name], tuple)]:
        stack = params[name]
        depth = jax.tree.leaves(stack)[0].shape[0]
        layers[name] = tuple(_take(stack, np.int32(i), join) for i in range(depth))
    params = params | layers
    return _interleaved(params) if interleave else params


def specs_like(specs: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The tree of specs for `params`, in which some weights are joined: they have the axes of their first part."""
    out = {}
    for name, part in params.items():
        spec = specs[JOINED[name][0][0] if name in JOINED else name]
        out[name] = specs_like(spec, part) if isinstance(part, dict) else spec
    return out


@functools.partial(jax.jit, static_argnames=("join",))
def _take(stack: Any, index: Any, join: bool) -> Any:
    layer = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), stack)
    return {name: _join(part) if join and name in ("attn", "mlp") else part for name, part in layer.items()}


def _interleaved(params: Any) -> Any:
    """The weights of matmuls in the order that the kernel for few rows has them in, where that is what runs them."""

    def one(path, w):
        inside = {getattr(key, "key", None) for key in path} & {"attn", "mlp", "head"}
        if not isinstance(w, QuantizedArray) or not inside or w.scales.ndim != w.ndim - len(w.contraction) + 1:
            return w
        x = jax.ShapeDtypeStruct((1, *w.values.shape[w.ndim - len(w.contraction) :]), jnp.bfloat16)
        return _interleave(w) if quantized_matmul_implementation(x, w) == "mosaic_gpu" else w

    return jax.tree.map_with_path(one, params, is_leaf=lambda w: isinstance(w, QuantizedArray))


@jax.jit
def _interleave(w: QuantizedArray) -> QuantizedArray:
    return w.interleave()


def _join(weights: dict[str, Any]) -> dict[str, Any]:
    for name, (parts, dim) in JOINED.items():
        if set(parts) <= set(weights) and (joined := _concatenate([weights[p] for p in parts], dim)) is not None:
            weights = {name: joined, **{k: w for k, w in weights.items() if k not in parts}}
    return weights


def _concatenate(parts: list[Any], dim: int) -> Any:
    """One weight that gives the outputs of all; None where they are not alike."""
    if not all(isinstance(p, QuantizedArray) for p in parts):
        return None if any(isinstance(p, QuantizedArray) for p in parts) else jnp.concatenate(parts, axis=dim)
    first = parts[0]
    place = first.order.index(first.ndim + dim)
    alike = lambda p: (p.contraction, p.unsigned, p.activations, p.values.dtype, p.scales.shape[-1], p.inputs is None)
    per_output = all(p.scales.shape[place] == p.values.shape[place] for p in parts)
    own = first.inputs is not None or first.outliers is not None  # what each has for the activations that it meets
    if own or not per_output or len({alike(p) for p in parts}) > 1:
        return None
    together = lambda *xs: jnp.concatenate(xs, axis=place)
    return dataclasses.replace(
        first,
        values=together(*(p.values for p in parts)),
        scales=together(*(p.scales for p in parts)),
        offsets=None if first.offsets is None else together(*(p.offsets for p in parts)),
    )
