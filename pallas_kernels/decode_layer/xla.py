"""The formulas in jax.numpy, float32 inside: the kernels' oracles, and their fallbacks."""

import jax
import jax.numpy as jnp


def add_norm(x, parts, scale, eps: float, offset: float):
    if parts is not None:
        added = parts.astype(jnp.float32).sum(axis=0).astype(x.dtype)
        x = (x.astype(jnp.float32) + added.astype(jnp.float32)).astype(x.dtype)
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    return x, (h * (scale.astype(jnp.float32) + offset)[None]).astype(x.dtype)


def gate(parts, dtype):
    total = parts.astype(jnp.float32).sum(axis=0).astype(dtype).astype(jnp.float32)
    gate, up = jnp.split(total, 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(dtype)
