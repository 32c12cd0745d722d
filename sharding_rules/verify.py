"""The proof of a plan: the program compiled with its specs, its collectives counted, its numbers compared."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.topologies import TopologyDescription, get_topology_desc
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.applied import applied
from sharding_rules.hardware import Hardware, find_hardware, hardware_of
from sharding_rules.hlo import Collective, collectives
from sharding_rules.infer import infer

if TYPE_CHECKING:
    from sharding_rules.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """Bytes that a device sends in one step, predicted and compiled, and the largest relative error against one device.

    `error` is over the loss and every gradient (or every output), each relative to its largest entry; None where the
    program was only compiled.
    """

    predicted_bytes: float
    compiled_bytes: float
    collectives: tuple[Collective, ...]
    error: float | None

    @property
    def byte_error(self) -> float:
        """|predicted - compiled| / compiled."""
        return abs(self.predicted_bytes - self.compiled_bytes) / max(self.compiled_bytes, 1.0)

    def __str__(self) -> str:
        parity = "not run" if self.error is None else f"{self.error:.2g}"
        return (
            f"predicted {self.predicted_bytes:,.0f} B, compiled {self.compiled_bytes:,.0f} B "
            f"({100 * self.byte_error:.1f} % off); largest relative error against one device {parity}"
        )


def verify(
    plan: "Plan",
    fn: Callable,
    params: Any,
    *args: Any,
    devices: Sequence[Any] | None = None,
    topology: str | TopologyDescription = "",
    hardware: str | Path | Hardware | None = None,
) -> Verification:
    """Compiles `fn` (a loss with its gradient, or any function) under the plan's rules and compares.

    Args:
      plan: rules for a mesh of as many devices as there are.
      fn, params, args: the model that the plan was made for, at any size that the rules divide: a small one compiles
        soon and its numbers can be compared. Shapes are filled with random numbers; integers with zeros and ones.
      devices: by default the first of `jax.devices()`; simulate more with
        XLA_FLAGS=--xla_force_host_platform_device_count=8.
      topology: compile ahead of time for hardware that is not here, without comparing numbers. A TPU slice by name,
        such as "v5p:2x2x2" (needs libtpu), or a description from `jax.experimental.topologies`, as GPUs need.
      hardware: whose compiler is predicted (`Hardware.scatters`); by default that of the devices.

    Raises:
      ValueError: fewer devices than the mesh has, or of a kind that is not known.
    """
    from sharding_rules.search import evaluate

    n = math.prod(plan.mesh_shape.values())
    if isinstance(topology, TopologyDescription):
        devices = topology.devices
    elif topology:
        devices = get_topology_desc(platform="tpu", topology_name=topology).devices
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < n:
        here = f"simulate them with XLA_FLAGS=--xla_force_host_platform_device_count={n}"
        remedy = f"name a topology of at least {n}" if topology else here
        mesh_text = ", ".join(f"{a}={size}" for a, size in plan.mesh_shape.items())
        raise ValueError(f"the plan is for {n} devices ({mesh_text}) but there are {len(devices)}; {remedy}")
    hardware = hardware_of(devices[0]) if hardware is None else find_hardware(hardware)
    model = infer(fn, params, *args)
    small = evaluate(model, plan.mesh_shape, plan.rules.compute, hardware)
    mesh = Mesh(
        np.array(devices[:n]).reshape(tuple(plan.mesh_shape.values())),
        tuple(plan.mesh_shape),
        axis_types=(AxisType.Auto,) * len(plan.mesh_shape),
    )
    partitioned = applied(small, fn, mesh)
    compiled, run = compile_with(
        partitioned, mesh, small.specs, small.rules.compute.get("batch", ()), model.train, params, args
    )
    found = collectives(compiled.as_text() or "")
    error = None
    if not topology:
        values = fill((params, *args))
        error = max_error(run(*values), jax.jit(run_alone(fn, model.train, params, args))(*values))
    assert small.prediction is not None
    return Verification(
        predicted_bytes=small.prediction.wire_bytes,
        compiled_bytes=sum(c.wire_bytes for c in found),
        collectives=tuple(found),
        error=error,
    )


def compile_with(fn, mesh: Mesh, specs: Any, batch: Sequence[str], train: bool, params: Any, args: Sequence[Any]):
    """(compiled program, a function that runs it): parameters and gradients by `specs`, batches split over `batch`."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))

    def batched(x):
        divides = x.ndim and x.shape[0] % math.prod(mesh.shape[a] for a in batch) == 0
        return NamedSharding(mesh, P(tuple(batch)) if batch and divides else P())

    ins = (shardings, *(jax.tree.map(batched, a) for a in args))
    outs = (None, shardings) if train else None
    jitted = jax.jit(run_alone(fn, train, params, args), in_shardings=ins, out_shardings=outs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *args))
    # On simulated devices only the partitioned program matters, not how fast its loops run.
    simulated = mesh.devices.flat[0].platform == "cpu"
    cheap = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0} if simulated else None
    compiled = jitted.lower(*shapes).compile(compiler_options=cheap)
    return compiled, lambda *values: compiled(*jax.device_put(values, ins))


def run_alone(fn, train: bool, params: Any, args: Sequence[Any]) -> Callable:
    if not train:
        return fn
    out = jax.eval_shape(fn, params, *args)
    return jax.value_and_grad(fn, has_aux=isinstance(out, tuple), allow_int=True)


def fill(tree: Any) -> Any:
    """Random numbers in the place of shapes; arrays stay."""
    rng = np.random.default_rng(0)

    def value(x):
        if isinstance(x, jax.Array | np.ndarray):
            return x
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)
        return jnp.asarray(rng.integers(0, 2, size=x.shape), x.dtype)

    return jax.tree.map(value, tree)


def max_error(got: Any, want: Any) -> float:
    """The largest difference over all leaves, each relative to the leaf's largest entry.

    A leaf below a thousandth of the largest is measured against that: the gradient of a bias that a norm takes out is
    zero but for rounding.
    """
    pairs = [
        (np.asarray(a, np.float32), np.asarray(b, np.float32))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        if jnp.issubdtype(a.dtype, jnp.inexact) and a.size
    ]
    floor = 1e-3 * max((float(np.abs(b).max()) for _, b in pairs), default=0.0) + 1e-30
    errors = [float(np.abs(a - b).max()) / max(float(np.abs(b).max()), floor) for a, b in pairs]
    return max((e if e == e else math.inf for e in errors), default=0.0)
