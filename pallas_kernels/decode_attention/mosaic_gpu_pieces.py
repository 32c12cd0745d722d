"""What both kernels of decode attention for Hopper GPUs (sm90) use."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch

LOG2E = math.log2(math.e)
ROWS = 64  # a wgmma is 64 rows high
TILE = 64  # keys
SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


def iota(shape, dim: int) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def mma(acc: jax.Array, a: jax.Array, b_ref, acc_ref=None) -> Any:
    """acc + a @ b with a in registers, which the interpreter's wgmma does not take; in flight in acc_ref if given."""
    if _dispatch.interpreted("gpu"):
        return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    if acc_ref is not None:
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, a, b_ref)
        return None
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory in the order that TMA and wgmma share: rows of 128 bytes, swizzled."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    columns = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(
        shape, dtype, transforms=(transforms.TilingTransform((8, columns)), transforms.SwizzleTransform(128))
    )
