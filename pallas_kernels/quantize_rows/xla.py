"""The formula, left to XLA: the kernel's oracle, and its fallback."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.array import FORMATS, Activations, largest


def supported(x, groups: int, outliers) -> str | None:
    del x, groups, outliers
    return None


def quantize_rows(
    x: jax.Array, groups: int, dtype: Activations, outliers: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    high: float | jax.Array = FORMATS[dtype][2]
    if outliers is not None:
        high = jnp.where(outliers, FORMATS["int8"][2], high)[None]
    x_groups = x.reshape(x.shape[0], groups, -1)
    values, scales = round_rows(x_groups, largest(x_groups, (2,))[..., 0], held_as(dtype), high)
    values = values.reshape(x.shape)
    # XLA drops a float that is made narrow and wide again: xla_allow_excess_precision, on by default.
    return values if values.dtype == jnp.int8 else jax.lax.optimization_barrier(values), scales


def held_as(dtype: Activations):
    return FORMATS["int8" if dtype == "int4" else dtype][0]


def round_rows(x: jax.Array, top: jax.Array, dtype, high: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., group], the largest |x| [...] of each row -> values in int8 or float8, and float32 scales [...] that make
    `high` of it.

    Also the body of kernels, lest any rounds in its own way: hence operations that all have.
    """
    scales = top.astype(jnp.float32) * (1.0 / high)
    inverse = jnp.where(scales == 0, 0.0, 1.0 / jnp.maximum(scales, 2.0**-120))
    q = x.astype(jnp.float32) * jax.lax.broadcast_in_dim(inverse, x.shape, range(x.ndim - 1))
    if jnp.issubdtype(dtype, jnp.integer):  # halves away from zero; a sum of floats might be fused with the product
        twice = (2 * q).astype(jnp.int32)
        q = jax.lax.div(twice + jnp.where(twice < 0, -1, 1), 2)
    return q.astype(dtype), scales
