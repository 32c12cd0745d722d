"""Rounded in the pass that makes them, both ways round, on every device of a mesh: gradients and weights.

Matrices are split over devices as their arrays' types say; the kernels (pallas_kernels.float8_grads) see one shard.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from jaxscale.quantize.precision import Precision
from jaxscale.quantize.rounding import Rounded
from jaxscale.sharding import active_mesh, partitions, shard_map
from pallas_kernels.float8_grads.api import gated_grads, round_both
from pallas_kernels.quantized_matmul.array import FORMATS


class Gradient(NamedTuple):
    """A rounded gradient [rows, outputs]; flipped has the rows last, None where rows have scales of their own."""

    plain: Rounded
    flipped: Rounded | None
    top: jax.Array


def round_both_ways(x: jax.Array, scale: jax.Array, format: str, first: int, stacked: int = 0) -> Gradient:
    """x [layers if stacked, first, others], rounded and with its first dims last; the largest over all devices.

    Args:
      scale: [layers if stacked].
      first: how many dims that is.
    """

    def local(x, scale):
        both = round_both(_matrices(x, first, stacked), scale, FORMATS[format][0])
        return both.values.reshape(x.shape), _flipped(both.flipped, x, first, stacked), _over_devices(both.top)

    if active_mesh() is not None:
        local = shard_map(local, out_specs=(P(*partitions(x)), _flipped_spec(x, first, stacked), P()))
    values, flipped, top = local(x, scale)
    return Gradient(Rounded(values, scale), Rounded(flipped, scale), top)


def gated_gradients(
    grad: jax.Array, gate: jax.Array, up: jax.Array, scales: Sequence[jax.Array], p: Precision, activation: str
) -> tuple[Gradient, Gradient, Rounded, jax.Array]:
    """Of h = act(gate) * up [B, T, F]: the gradients of gate and up, h with its rows last, the largest of h."""
    dtypes = FORMATS[p.gradients][0], FORMATS[p.activations][0]

    def local(grad, gate, up, *scales):
        made = gated_grads(_matrices(grad, 2), _matrices(gate, 2), _matrices(up, 2), scales, dtypes, activation)
        both = lambda b: (b.values.reshape(up.shape), _flipped(b.flipped, up, 2), _over_devices(b.top))
        return both(made.gate), both(made.up), _flipped(made.hidden, up, 2), _over_devices(made.hidden_top)

    if active_mesh() is not None:
        both, last = (P(*partitions(grad)), _flipped_spec(grad, 2), P()), _flipped_spec(grad, 2)
        local = shard_map(local, out_specs=(both, both, last, P()))
    d_gate, d_up, hidden, top = local(grad, gate, up, *scales)
    of = lambda made, scale: Gradient(Rounded(made[0], scale), Rounded(made[1], scale), made[2])
    return of(d_gate, scales[0]), of(d_up, scales[1]), Rounded(hidden, scales[2]), top


def _matrices(x: jax.Array, first: int, stacked: int = 0) -> jax.Array:
    return x.reshape(*x.shape[:stacked], math.prod(x.shape[stacked : stacked + first]), -1)


def _turned(dims: Sequence[Any], first: int, stacked: int) -> tuple[Any, ...]:
    return (*dims[:stacked], *dims[stacked + first :], *dims[stacked : stacked + first])


def _flipped(flat: jax.Array, like: jax.Array, first: int, stacked: int = 0) -> jax.Array:
    return flat.reshape(_turned(like.shape, first, stacked))


def _flipped_spec(x: jax.Array, first: int, stacked: int = 0) -> P:
    return P(*_turned(partitions(x), first, stacked))


def _over_devices(top: jax.Array) -> jax.Array:
    """In a shard_map body: the largest of all devices' numbers."""
    axes = tuple(sorted(jax.typeof(top).mat.varying))
    return jax.lax.pmax(top, axes) if axes else top


def whole(x: jax.Array) -> jax.Array:
    """`x` without the types that say how its gradient is summed: `cotangent_spec` remembers them."""
    return x if active_mesh() is None else jax.reshard(x, P(*partitions(x)))


def cotangent_spec(x: jax.Array) -> P | None:
    return None if active_mesh() is None else P(*partitions(x), unreduced=jax.typeof(x).sharding.spec.reduced)
