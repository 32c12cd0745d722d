"""Everything to every device, then each row of the output finds the run that it is in."""

import jax
import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(operand: jax.Array, output, runs, over) -> jax.Array:
    """output: [S, ...], or S: rows that nobody writes are zeros."""
    gather = lambda x: lax.all_gather(x, over.axis_name, axis_index_groups=over.groups)
    rows = output if isinstance(output, int) else output.shape[0]
    per = runs.send_sizes.shape[0] // over.size
    for_me = lambda x: lax.dynamic_slice_in_dim(gather(x), over.index() * per, per, axis=1).reshape(1, -1)
    here, sizes, there = for_me(runs.output_offsets), for_me(runs.send_sizes), for_me(runs.input_offsets)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    inside = (row >= here) & (row < here + sizes)
    run = inside.argmax(axis=1)
    source = run // per * operand.shape[0] + there[0, run] + row[:, 0] - here[0, run]
    everything = gather(operand).reshape(-1, *operand.shape[1:])
    got = jnp.take(everything, source, axis=0, mode="clip")
    came = inside.any(axis=1).reshape(-1, *[1] * (operand.ndim - 1))
    return jnp.where(came, got, jnp.zeros((), operand.dtype) if isinstance(output, int) else output)
