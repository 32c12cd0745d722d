"""The hidden layer of experts in one kernel on Hopper: silu(x gate) * (x up) * weights, of rows in groups.

Forward only: it writes neither gate nor up, which a gradient needs (measured: then two matmuls are as fast).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma


def gated_reference(gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
    """[M, N] in the dtype of gate, float32 inside. weights: [M, 1]."""
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(g) * u * weights).astype(gate.dtype)


def supported(lhs, gate, up) -> str | None:
    """None, or the reason why `ragged_dot_gated` cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    from pallas_kernels.ragged_dot import pallas_mosaic_gpu as kernels

    if not all(isinstance(x, jax.Array) and x.dtype == lhs.dtype for x in (gate, up)):
        return f"takes arrays of one dtype. Got {lhs.dtype}, {type(gate).__name__}, {type(up).__name__}"
    return kernels.supported(lhs, gate, lhs.dtype)


def ragged_dot_gated(
    lhs: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """`gated_reference` of two `ragged_dot`s of the same rows, rounded once, not three times. No gradient.

    Args:
      lhs: [M, K], bfloat16 or float16; K and N multiples of 64.
      gate, up: [G, K, N].
      weights: float32 [M, 1], of each row; finite.
      group_sizes: int32 [G].

    Returns:
      [M, N]; zeros past the groups.
    """
    from pallas_kernels.ragged_dot import pallas_mosaic_gpu as kernels

    lhs, gate, up, weights, group_sizes = unify_vma((lhs, gate, up, weights, group_sizes))
    return kernels.gated(lhs, (gate, up), weights[:, 0], group_sizes, lhs.dtype)
