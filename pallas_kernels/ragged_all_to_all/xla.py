"""XLA's own collective. On a GPU it is slow (docs/moe.md); a CPU has none."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dispatch


def supported(operand) -> str | None:
    del operand
    kind = _dispatch.device_kind()
    return "XLA has no ragged_all_to_all for CPUs" if kind == "cpu" else None


def ragged_all_to_all(operand: jax.Array, output, runs, over) -> jax.Array:
    """output: [S, ...], or S."""
    if isinstance(output, int):
        output = jnp.zeros((output, *operand.shape[1:]), operand.dtype)
        axes = tuple(sorted(jax.typeof(operand).mat.varying))
        output = lax.pcast(output, axes, to="varying") if axes else output
    return lax.ragged_all_to_all(operand, output, *runs, axis_name=over.axis_name, axis_index_groups=over.groups)
