"""The hidden layer of experts in one kernel on Hopper: silu(x gate) * (x up) * weights, of rows in groups.

Written, and not used by any model before it has been timed (benchmarks/moe/gated.py, layer.py --gated): what it spares,
reading gate and up once more, it may lose where a tile's end waits for exponentials.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_dot import pallas_mosaic_gpu as kernels


def gated_reference(gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
    """[M, N] in the dtype of gate, float32 inside. weights: [M, 1]."""
    g, u = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(g) * u * weights).astype(gate.dtype)


@jax.custom_vjp
def ragged_dot_gated(
    lhs: jax.Array, gate: jax.Array, up: jax.Array, weights: jax.Array, group_sizes: jax.Array
) -> jax.Array:
    """`gated_reference` of two `ragged_dot`s of the same rows, rounded once, not three times.

    Args:
      lhs: [M, K], bfloat16 or float16; K and N multiples of 64.
      gate, up: [G, K, N].
      weights: float32 [M, 1], of each row; finite.
      group_sizes: int32 [G].

    Returns:
      [M, N]; zeros past the groups.
    """
    return kernels.gated(lhs, (gate, up), weights[:, 0], group_sizes, lhs.dtype, keep=False)[0]


def _fwd(lhs, gate, up, weights, group_sizes):
    """Residuals: the inputs, and gate and up of each row, which the same kernel writes."""
    hidden, *sides = kernels.gated(lhs, (gate, up), weights[:, 0], group_sizes, lhs.dtype)
    return hidden, (lhs, gate, up, weights, group_sizes, sides)


def _bwd(residuals, grad):
    """By the kernels of `ragged_dots`."""
    lhs, gate, up, weights, group_sizes, sides = residuals
    *grads, d_weights = jax.vjp(gated_reference, *sides, weights)[1](grad)
    grads = tuple(grads)
    d_lhs = kernels.grouped_sum(grads, (gate, up), group_sizes, lhs.dtype, transposed=True)
    d_gate, d_up = (kernels.contraction(lhs, g, group_sizes, gate.dtype) for g in grads)
    return d_lhs, d_gate, d_up, d_weights, None


ragged_dot_gated.defvjp(_fwd, _bwd)
