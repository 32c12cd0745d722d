"""The public function: checks its input, picks a backend, runs it."""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has the function named here, and maybe supported(x, scale) -> None | reason.
BACKENDS = {
    "mosaic_gpu": ("pallas_kernels.norm_rope.pallas_mosaic_gpu", "norm_rope_mosaic_gpu"),
    "xla": ("pallas_kernels.norm_rope.xla", "norm_rope_xla"),
}


def norm_rope(
    x: jax.Array,
    scale: jax.Array | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """RMS norm of each head, then its rotation by position (rope): what Qwen3 and Gemma 3 do to queries and keys.

    `y = x / sqrt(mean(x * x) + eps) * (scale + offset)`, then `[y1 * cos - y2 * sin, y2 * cos + y1 * sin]` of the
    halves y1, y2 of the last dim, all in float32, rounded once. Differentiable in x and scale; cos and sin count as
    constants.

    Args:
      x: [B, T, N, H], H even, float32, bfloat16 or float16.
      scale: [H] floating; None: rotation alone.
      cos, sin: [B, T, H/2] float32, of each token's angles.
      eps: added to the mean square.
      offset: added to scale (1 for Gemma).
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [B, T, N, H] in x's dtype.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    name = norm_rope_implementation(x, scale, cos, sin, implementation=implementation)
    if scale is not None:
        scale = scale.astype(jnp.float32) + offset
    cos, sin = jax.lax.stop_gradient((cos, sin))
    module, function = BACKENDS[name]
    x, scale, cos, sin = unify_vma((x, scale, cos, sin))
    return getattr(importlib.import_module(module), function)(x, scale, cos, sin, eps)


def norm_rope_implementation(x, scale, cos, sin, *, implementation: str | None = None) -> str:
    """The backend that `norm_rope` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    _check(x, scale, cos, sin)

    def check(module):
        supported = getattr(importlib.import_module(module), "supported", None)
        return supported(x, scale) if supported else None

    supported = {name: functools.partial(check, module) for name, (module, _) in BACKENDS.items()}
    return _dispatch.choose("norm_rope", implementation, supported)


def _check(x, scale, cos, sin):
    got = f"x {x.shape}, scale {None if scale is None else scale.shape}, cos {cos.shape}, sin {sin.shape}"
    if len(x.shape) != 4 or x.shape[3] % 2:
        raise ValueError(f"norm_rope takes x [B, T, N, H] with an even H. Got {got}")
    B, T, _, H = x.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"norm_rope takes x in float32, bfloat16 or float16; cast it. Got {x.dtype}")
    if scale is not None and (scale.shape != (H,) or not jnp.issubdtype(scale.dtype, jnp.floating)):
        raise ValueError(f"norm_rope takes a floating scale [H={H}], or None. Got {scale.dtype}, {got}")
    if not cos.shape == sin.shape == (B, T, H // 2) or not cos.dtype == sin.dtype == jnp.float32:
        raise ValueError(
            f"norm_rope takes cos and sin [B={B}, T={T}, H/2={H // 2}] in float32. Got {cos.dtype}, {sin.dtype}, {got}"
        )
