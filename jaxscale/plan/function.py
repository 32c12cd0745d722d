"""`jaxscale.plan(loss_fn, params, batch, topology="h200:16x8")`: which mesh and rules for any pure function."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import sharding_rules
from jaxscale.config import MeshConfig
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.plan.report import WIDTH, bars
from jaxscale.table import Table, human_bytes
from sharding_rules.hardware import Hardware

MOST_TP = 16  # of a mesh that is tried


class Option(NamedTuple):
    """A mesh with the best rules on it, and what a step needs."""

    mesh: MeshConfig
    rules: sharding_rules.Plan
    seconds: float
    state_bytes: float  # of a device: parameters, their gradients and Adam's moments
    activation_bytes: float  # of a device: what the backward pass keeps, if every mesh axis splits it

    @property
    def bytes(self) -> float:
        return self.state_bytes + self.activation_bytes


class FunctionPlan(NamedTuple):
    """What was found for a function on a pod. Notebooks show it with pictures; `best.rules` goes into a program."""

    name: str
    pod: Pod
    options: tuple[Option, ...]  # those whose state fits, fastest first
    refused: tuple[tuple[MeshConfig, str], ...]  # meshes on which nothing could be split, and why

    @property
    def best(self) -> Option:
        return self.options[0]

    def table(self, most: int = 8) -> Table:
        rows = [
            (
                str(o.mesh),
                f"{o.seconds * 1e3:.3g}",
                human_bytes(o.state_bytes),
                human_bytes(o.activation_bytes),
                human_bytes(o.rules.prediction.wire_bytes if o.rules.prediction else 0),
            )
            for o in self.options[:most]
        ]
        header = ("mesh", "ms a step", "state", "activations, about", "sent")
        return Table(f"{self.name} on {self.pod.name}, per device", header, rows)

    def __str__(self) -> str:
        return f"{self.table()}\n\n{self.best.rules.explain()}"

    def _repr_html_(self) -> str:
        shown = self.options[:8]
        time = bars([(str(o.mesh), [o.seconds * 1e3]) for o in shown], ("ms a step",))
        memory = bars(
            [(str(o.mesh), [o.state_bytes / 1e9, o.activation_bytes / 1e9]) for o in shown],
            ("GB of state", "GB of activations, about"),
            limit=self.pod.hardware.memory / 1e9,
        )
        pictures = f"<div style='max-width:{WIDTH}px'>{time}{memory}</div>"
        return f"{self.table()._repr_html_()}{pictures}{self.best.rules._repr_html_()}"


def plan(
    loss_fn: Callable,
    params: Any,
    *batch: Any,
    topology: Pod | str,
    mesh: MeshConfig | str | None = None,
    hardware: Hardware | None = None,
) -> FunctionPlan:
    """The mesh and the rules with which a step of any pure function takes least time, by arithmetic on its program.

    Nothing runs and no device is needed: ShapeDtypeStructs will do. The step is loss_fn and its gradient, with AdamW.

    Args:
      loss_fn: (params, *batch) -> scalar, or a tuple that begins with it.
      params, batch: pytrees of arrays or of shapes; leading dims of the batch are its rows.
      topology: such as "h200:16x8" or "v5p:4x4x4".
      mesh: only this one; by default every dp, fsdp, tp that the batch divides over.
      hardware: rates to use instead of the table's.

    Raises:
      ValueError: no such topology; the batch divides over no mesh; the state fits no mesh, with what would hold it.
    """
    pod = find_pod(topology, hardware) if isinstance(topology, str) else topology
    rows = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim}
    if not rows:
        raise ValueError("the batch holds no array with rows; pass it after params, as in plan(loss_fn, params, batch)")
    model = sharding_rules.infer(loss_fn, params, *batch)
    activations = _activation_bytes(loss_fn, params, batch)
    wanted = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
    shapes = [wanted.fill(pod.num_devices)] if wanted else list(_meshes(pod, math.gcd(*rows)))
    if not shapes:
        raise ValueError(
            f"{math.gcd(*rows)} rows divide over no mesh of {pod.num_devices} devices with tp up to {MOST_TP}; "
            f"use a multiple of {pod.num_devices // _most_tp(pod)} rows, or a smaller topology"
        )
    options, refused = [], []
    for shape in shapes:
        sizes = {a: n for a in sharding_rules.MESH_AXES if (n := getattr(shape, a)) > 1}
        try:
            found = sharding_rules.search(model, sizes, pod.hardware)
        except ValueError as error:
            refused.append((shape, str(error)))
            continue
        assert found.prediction is not None
        split = math.prod(sizes.values())
        options.append(Option(shape, found, found.prediction.seconds, found.prediction.bytes, activations / split))
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    if not options:
        raise ValueError(f"{name} fits no mesh of {pod.name}: {refused[-1][0]}: {refused[-1][1]}")
    options.sort(key=lambda o: (o.bytes > pod.hardware.memory, o.seconds, o.bytes))
    return FunctionPlan(name, pod, tuple(options), tuple(refused))


def _meshes(pod: Pod, rows: int) -> Iterator[MeshConfig]:
    n = pod.num_devices
    for tp, fsdp in itertools.product(range(1, _most_tp(pod) + 1), range(1, n + 1)):
        if n % (tp * fsdp) == 0 and rows % (n // tp) == 0:
            yield MeshConfig(dp=n // (tp * fsdp), fsdp=fsdp, tp=tp)


def _most_tp(pod: Pod) -> int:
    return max(d for d in range(1, min(MOST_TP, pod.hardware.node) + 1) if pod.num_devices % d == 0)


def _activation_bytes(fn: Callable, params: Any, batch: Any) -> float:
    """Bytes of what the whole batch's forward pass keeps for the gradient, beside parameters and batch."""

    def residuals(params: Any, *batch: Any) -> Any:
        def loss(params: Any) -> Any:
            out = fn(params, *batch)
            return out[0] if isinstance(out, tuple) else out

        return jax.vjp(loss, params)[1]

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *batch))
    kept = jax.tree.leaves(jax.eval_shape(residuals, *abstract))
    own = [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)]
    size = 0
    for x in kept:
        if (x.shape, x.dtype) in own:  # a parameter or the batch itself
            own.remove((x.shape, x.dtype))
            continue
        size += math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
    return float(size)
