"""The formula in jax.numpy, float32 inside, left to XLA: the kernel's oracle, and its fallback."""

import jax
import jax.numpy as jnp


def norm_rope_xla(x: jax.Array, scale: jax.Array | None, cos: jax.Array, sin: jax.Array, eps: float) -> jax.Array:
    """x [B, T, N, H]; scale [H], cos and sin [B, T, H/2] in float32."""
    h = x.astype(jnp.float32)
    if scale is not None:
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps) * scale[None, None, None]
    a, b = jnp.split(h, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
