"""The public function: checks its input, picks a backend, runs it; its gradient is the same exchange the other way."""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has supported(operand) -> None | reason, or can run any call, and
# ragged_all_to_all(operand, output, runs, over).
BACKENDS = {
    "mosaic_tpu": "pallas_kernels.ragged_all_to_all.pallas_mosaic_tpu",
    "xla": "pallas_kernels.ragged_all_to_all.xla",
    "reference": "pallas_kernels.ragged_all_to_all.reference",
}


class Runs(NamedTuple):
    """What a device sends and how much it gets: int32 [N], N/size runs for each device that it exchanges with."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array  # in the receivers' arrays
    recv_sizes: jax.Array


class Over(NamedTuple):
    """The devices that exchange: an axis, or parts of it."""

    axis_name: str
    size: int
    groups: tuple[tuple[int, ...], ...] | None = None

    def index(self) -> jax.Array:
        """This device's place among those that exchange with it."""
        index = lax.axis_index(self.axis_name)
        if self.groups is None:
            return index
        places = np.zeros(len(self.groups) * self.size, np.int32)
        places[np.array(self.groups)] = np.arange(self.size)
        return jnp.asarray(places)[index]


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array | jax.ShapeDtypeStruct,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
    axis_index_groups: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Sends runs of rows to other devices, each into its own place of the receiver's `output`; as
    `jax.lax.ragged_all_to_all`, inside of shard_map.

    Args:
      operand: [R, ...]. On TPUs, where it is [R, 8, D], D a multiple of 128, rows are copied as they lie; otherwise XLA
        lays operand and result out anew, which takes about as long as sending them.
      output: [S, ...] as operand is: rows that nobody writes stay as they are here. A jax.ShapeDtypeStruct: they hold
        anything, nan included.
      input_offsets: int32 [N]: where each run begins in operand. The first N/size runs are for the first device of the
        axis, the next ones for the second.
      send_sizes: int32 [N]: rows of each run; 0 is allowed.
      output_offsets: int32 [N]: where it begins in the receiver's output.
      recv_sizes: int32 [N]: `lax.all_to_all(send_sizes)`.
      axis_index_groups: parts of the axis, equally large, that exchange among themselves.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [S, ...], differentiable in operand and output. Runs must lie inside of both arrays, and those that one device
      gets must not overlap: nothing checks it.

    Raises:
      ValueError: shapes or dtypes that disagree, an axis that is not there, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    runs = Runs(*(jnp.asarray(x) for x in (input_offsets, send_sizes, output_offsets, recv_sizes)))
    over = _over(axis_name, axis_index_groups)
    _check(operand, output, runs, over)
    backend = _choose(operand, implementation)
    if isinstance(output, jax.ShapeDtypeStruct):
        operand, runs = unify_vma((operand, runs))
        return _anywhere(backend, over, output.shape[0], operand, runs)
    operand, output, runs = unify_vma((operand, output, runs))
    return _into(backend, over, operand, output, runs)


def ragged_all_to_all_implementation(operand, *, implementation: str | None = None) -> str:
    """The backend that `ragged_all_to_all` runs for this operand, here; it may be a jax.ShapeDtypeStruct."""
    return _choose(operand, implementation)


def _run(backend: str, *args) -> jax.Array:
    return importlib.import_module(BACKENDS[backend]).ragged_all_to_all(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _into(backend: str, over: Over, operand, output, runs: Runs) -> jax.Array:
    return _run(backend, operand, output, runs, over)


def _into_fwd(backend, over, operand, output, runs):
    """Residuals: the runs."""
    return _into(backend, over, operand, output, runs), (runs, operand.shape[0])


def _into_bwd(backend, over, residuals, grad):
    runs, rows = residuals
    back = reverse(runs, over)
    index = jnp.arange(grad.shape[0], dtype=jnp.int32)[:, None]
    begin = back.input_offsets[None]
    came = ((index >= begin) & (index < begin + back.send_sizes[None])).any(axis=1)
    came = came.reshape(-1, *[1] * (grad.ndim - 1))
    none = jnp.zeros((rows, *grad.shape[1:]), grad.dtype)
    return _run(backend, grad, _like(none, grad), back, over), jnp.where(came, jnp.zeros((), grad.dtype), grad), None


_into.defvjp(_into_fwd, _into_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _anywhere(backend: str, over: Over, rows: int, operand, runs: Runs) -> jax.Array:
    return _run(backend, operand, rows, runs, over)


def _anywhere_fwd(backend, over, rows, operand, runs):
    """Residuals: the runs."""
    return _anywhere(backend, over, rows, operand, runs), (runs, operand.shape[0])


def _anywhere_bwd(backend, over, rows, residuals, grad):
    operand, _, runs = _into_bwd(backend, over, residuals, grad)
    return operand, runs


_anywhere.defvjp(_anywhere_fwd, _anywhere_bwd)


def reverse(runs: Runs, over: Over) -> Runs:
    """The runs that bring everything back to where it came from: one small all_to_all."""
    starts = jnp.stack([runs.output_offsets, runs.input_offsets], axis=1)
    starts = lax.all_to_all(starts, over.axis_name, 0, 0, axis_index_groups=over.groups, tiled=True)
    return Runs(starts[:, 0], runs.recv_sizes, starts[:, 1], runs.send_sizes)


def _like(x, other):
    missing = tuple(sorted(jax.typeof(other).mat.varying - jax.typeof(x).mat.varying))
    return lax.pcast(x, missing, to="varying") if missing else x


def _over(axis_name: str, groups: Any) -> Over:
    try:
        size = lax.axis_size(axis_name)
    except NameError:
        axes = ", ".join(map(str, jax.sharding.get_abstract_mesh().axis_names)) or "none"
        raise ValueError(
            f"ragged_all_to_all: axis_name={axis_name!r} is not an axis here; call it inside of jax.shard_map over a "
            f"mesh that has it. Axes of the mesh: {axes}"
        ) from None
    if groups is None:
        return Over(axis_name, size)
    groups = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in groups for i in group) != list(range(size)) or len(set(map(len, groups))) != 1:
        raise ValueError(
            f"ragged_all_to_all: axis_index_groups must split the {size} devices of {axis_name!r} into equal parts. "
            f"Got {groups}"
        )
    return Over(axis_name, len(groups[0]), groups)


def _check(operand, output, runs: Runs, over: Over) -> None:
    arrays = f"operand {operand.dtype}{operand.shape}, output {output.dtype}{output.shape}"
    if operand.ndim < 2 or operand.shape[1:] != output.shape[1:] or operand.dtype != output.dtype:
        raise ValueError(f"ragged_all_to_all takes operand [R,...] and output [S,...] of one dtype. Got {arrays}")
    if operand.size == 0 or 0 in output.shape:
        raise ValueError(f"ragged_all_to_all: neither array may be empty. Got {arrays}")
    named = ", ".join(f"{name} {x.dtype}{x.shape}" for name, x in runs._asdict().items())
    if any(x.dtype != jnp.int32 for x in runs):
        raise ValueError(f"ragged_all_to_all: offsets and sizes must be int32. Got {named}")
    lengths = {x.shape for x in runs}
    if len(lengths) != 1 or runs.send_sizes.ndim != 1 or not runs.send_sizes.size:
        raise ValueError(f"ragged_all_to_all: offsets and sizes must be [N], all of one length. Got {named}")
    count = runs.send_sizes.shape[0]
    if count % over.size:
        raise ValueError(
            f"ragged_all_to_all: {count} runs are not the same number for each of {over.size} devices of "
            f"{over.axis_name!r}; add runs of 0 rows, up to {-(-count // over.size) * over.size}"
        )


def _choose(operand, implementation: str | None) -> str:
    def check(name):
        supported = getattr(importlib.import_module(BACKENDS[name]), "supported", None)
        return lambda: supported(operand) if supported else None

    return _dispatch.choose("ragged_all_to_all", implementation, {name: check(name) for name in BACKENDS})
