"""What both kernels of decode attention for Hopper GPUs (sm90) use, beside attention's pieces."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # keys
SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def iota(shape, dim: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)
