"""Shardings of activations, said by logical axes. Without a mesh in context every function here is the identity."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in context when arrays may be sharded on it: None outside of a mesh and inside a shard_map body."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(t == AxisType.Manual for t in mesh.axis_types):
        return None
    return mesh


def compute_spec(shape: Sequence[int], axes: Sequence[str | None], rules: Rules = MEGATRON_FSDP) -> P | None:
    """The PartitionSpec of an array in computation, or None when there is no mesh."""
    mesh = active_mesh()
    return None if mesh is None else resolve_spec(shape, axes, rules.compute, dict(mesh.shape)).spec


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = MEGATRON_FSDP) -> jax.Array:
    """`x`, laid out by its logical axes; communicates when it was laid out otherwise.

    Args:
      x: any array.
      axes: a logical axis (or None) for each dim of x, as in ("batch", "seq", "embed").
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    spec = resolve_spec(x.shape, axes, rules.compute, dict(mesh.shape)).spec
    if any(t == AxisType.Explicit for t in mesh.axis_types):
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def einsum(
    subscripts: str, *operands: jax.Array, axes: Sequence[str | None] | None = None, rules: Rules = MEGATRON_FSDP
) -> jax.Array:
    """jnp.einsum whose result is laid out by `axes`; they must be said where a split dim is contracted."""
    if axes is None or active_mesh() is None:
        return jnp.einsum(subscripts, *operands)
    sizes = {}
    inputs, output = subscripts.split("->")
    for names, x in zip(inputs.split(","), operands, strict=True):
        sizes.update(zip(names, x.shape))
    spec = compute_spec([sizes[n] for n in output], axes, rules)
    return jnp.einsum(subscripts, *operands, out_sharding=spec)


def gather_params(params: Any, specs: Any, dtype: Any, rules: Rules = MEGATRON_FSDP) -> Any:
    """Parameters as the computation wants them: cast to `dtype`, gathered over fsdp, still split over tp.

    Casting first halves the bytes that are gathered. The gradient comes back through the transpose: scattered over the
    axes that were gathered, in the dtype at rest.
    """

    def gather(x, spec):
        return constrain(x.astype(dtype), spec.axes[len(spec.axes) - x.ndim :], rules)

    return jax.tree.map(gather, params, specs)
