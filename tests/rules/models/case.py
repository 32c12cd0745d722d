"""What a model of the table is, and the few functions that the models share."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Case:
    """A model at its real size, for the search, and at a tiny one, to compile and compare numbers.

    `build(**sizes)` returns (loss_fn, parameter shapes, arguments). `expert` is the hand-written layout: the first
    pattern that is found in a parameter's path gives its spec; none: replicated.
    """

    name: str
    build: Callable[..., tuple[Callable, Any, tuple]]
    real: dict[str, int]
    tiny: dict[str, int]
    expert: list[tuple[str, P]]

    def expert_specs(self, params: Any) -> Any:
        def spec(path, leaf):
            name = "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
            return next((s for pattern, s in self.expert if re.search(pattern, name)), P())

        return jax.tree_util.tree_map_with_path(spec, params)


def arrays(tree: Any, dtype: Any = jnp.float32) -> Any:
    """Tuples of sizes -> ShapeDtypeStructs."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), tree, is_leaf=lambda x: isinstance(x, tuple))


def tokens(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def row(w: jax.Array, x: jax.Array) -> jax.Array:
    """A vector over the last dim of x, ready to be broadcast."""
    return w.reshape((1,) * (x.ndim - 1) + (-1,))


def rms(x, w):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * row(w, x)


def layer_norm(x, w, b):
    y = x - x.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-5) * row(w, x) + row(b, x)


def rope(x):
    """x [B,T,N,H], rotated by halves."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * (1e-4 ** (jnp.arange(half, dtype=x.dtype) / half))[None]
    c, s = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1)


def attend(q, k, v, causal=True, bias=None):
    """q [B,T,N,H], k and v [B,S,N,H] -> [B,T,N,H]."""
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
    if bias is not None:
        s = s + bias
    if causal:
        keep = jnp.arange(s.shape[2])[:, None] >= jnp.arange(s.shape[3])[None]
        s = jnp.where(keep[None, None], s, -1e9)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), v)


def cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1).mean()
