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


def rotate_and_write(parts, k_cache, v_cache, index, positions, cos, sin, heads: int, dtype):
    total = parts.astype(jnp.float32).sum(axis=0).astype(dtype).astype(jnp.float32)
    K = k_cache.shape[3]
    q, k, v = jnp.split(total, (heads, heads + K), axis=1)

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    rows = jnp.arange(parts.shape[1], dtype=jnp.int32)
    slots = jnp.where(positions < 0, k_cache.shape[2], positions)  # -1 would be the last one
    write = lambda cache, x: cache.at[index, rows, slots].set(x.astype(cache.dtype), mode="drop")
    return rotate(q).astype(dtype), write(k_cache, rotate(k)), write(v_cache, v)
