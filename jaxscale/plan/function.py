"""`jaxscale.plan(loss_fn, params, batch, topology="h200:16x8")`: which mesh and rules for any pure function."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sharding_rules
from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.plan.aot import CompiledStep, compile_lowered, pod_devices
from jaxscale.plan.confirm import TOP, collective_seconds
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.plan.report import WIDTH, bars
from jaxscale.table import Table, human_bytes
from sharding_rules.hardware import Hardware
from sharding_rules.infer import on_one_device

MOST_TP = 16  # of a mesh that is tried


class Option(NamedTuple):
    """A mesh with the best rules on it, and what a step needs."""

    mesh: MeshConfig
    rules: sharding_rules.Plan
    seconds: float
    state_bytes: float  # of a device: parameters, their gradients and Adam's moments
    activation_bytes: float  # of a device: what the backward pass keeps, if every mesh axis splits it
    compiled: CompiledStep | None = None  # the compiler's answer, for those that were compiled
    no_room: str = ""  # what the compiler said instead of compiling

    @property
    def bytes(self) -> float:
        """Of a device: by the compiler, if it was asked."""
        return self.compiled.memory.total if self.compiled else self.state_bytes + self.activation_bytes

    @property
    def sent(self) -> float:
        return self.rules.prediction.wire_bytes if self.rules.prediction else 0.0


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
                human_bytes(o.sent),
            )
            for o in self.options[:most]
        ]
        header = ("mesh", "ms a step", "state", "activations, about", "sent")
        if any(o.compiled or o.no_room for o in self.options):
            asked = [
                (human_bytes(o.compiled.memory.total), human_bytes(o.compiled.census.wire_bytes()))
                if o.compiled
                else (o.no_room or "-", "-")
                for o in self.options[:most]
            ]
            rows = [(*row, *more) for row, more in zip(rows, asked, strict=True)]
            header = (*header, "bytes by the compiler", "sent by the compiled step")
        return Table(f"{self.name} on {self.pod.name}, per device", header, rows)

    def __str__(self) -> str:
        parts = [self.table(), self.best.rules.explain()]
        if (compiled := self.best.compiled) is not None:
            parts += [compiled.census.table(), compiled.held().table(12)]
        return "\n\n".join(map(str, parts))

    def _repr_html_(self) -> str:
        shown = self.options[:8]
        time = bars([(str(o.mesh), [o.seconds * 1e3]) for o in shown], ("ms a step",))
        memory = bars(
            [(str(o.mesh), [_gigabytes(o.state_bytes), _gigabytes(o.activation_bytes)]) for o in shown],
            ("GB of state", "GB of activations, about"),
            limit=_gigabytes(self.pod.hardware.memory),
        )
        asked = [(str(o.mesh), list(map(_gigabytes, o.compiled.memory[:3]))) for o in shown if o.compiled]
        names = ("GB of arguments, by the compiler", "GB of temporaries", "GB of outputs")
        memory += bars(asked, names, limit=_gigabytes(self.pod.hardware.memory)) if asked else ""
        pictures = f"<div style='max-width:{WIDTH}px'>{time}{memory}</div>"
        said = ""
        if (compiled := self.best.compiled) is not None:
            said = compiled.census.table()._repr_html_() + compiled.held().table()._repr_html_()
        return f"{self.table()._repr_html_()}{pictures}{said}{self.best.rules._repr_html_()}"


def plan(
    loss_fn: Callable,
    params: Any,
    *batch: Any,
    topology: Pod | str,
    mesh: MeshConfig | str | None = None,
    hardware: Hardware | None = None,
    compile: bool = False,
    quick: bool = False,
) -> FunctionPlan:
    """The mesh and the rules with which a step of any pure function takes least time, by arithmetic on its program.

    Nothing runs and no device is needed: ShapeDtypeStructs will do. The step is loss_fn and its gradient, with AdamW.
    With compile the real compiler is asked about the three fastest: what does not fit is out, and the compiled
    program's own collectives are priced instead of the predicted ones.

    Args:
      loss_fn: (params, *batch) -> scalar, or a tuple that begins with it.
      params, batch: pytrees of arrays or of shapes; leading dims of the batch are its rows.
      topology: such as "h200:16x8" or "v5p:4x4x4".
      mesh: only this one; by default every dp, fsdp, tp that the batch divides over.
      hardware: rates to use instead of the table's.
      compile: needs the compiler of that hardware, and takes seconds to minutes a mesh.
      quick: with compile, XLA's lowest optimisation level, as in `jaxscale.plan.aot.compile_step`.

    Raises:
      ValueError: no such topology; the function returns no scalar; the batch divides over no mesh; the state fits no
        mesh, with what would hold it; the compiler finds no room.
      ImportError: with compile, the compiler is not installed; with the command that installs it.
    """
    if not isinstance(topology, Pod | str):
        raise ValueError(f"topology={topology!r} is the name of a pod, such as 'h200:1x8' or 'v5p:2x2x1'")
    pod = find_pod(topology, hardware) if isinstance(topology, str) else topology
    rows = {x.shape[0] for x in jax.tree.leaves(batch) if x.ndim}
    if not rows:
        raise ValueError("the batch holds no array with rows; pass it after params, as in plan(loss_fn, params, batch)")
    model = sharding_rules.infer(loss_fn, params, *batch)
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    with on_one_device():
        [loss, *_] = jax.tree.leaves(jax.eval_shape(loss_fn, *_shapes((params, *batch))))
        if loss.ndim:
            raise ValueError(f"{name} returns {loss.dtype}{list(loss.shape)}, not a loss; plan its mean, for one")
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
    if not options:
        raise ValueError(f"{name} fits no mesh of {pod.name}: {refused[-1][0]}: {refused[-1][1]}")
    order = lambda o: (bool(o.no_room) or o.bytes > pod.hardware.memory, o.seconds, o.bytes)
    options.sort(key=order)
    if compile:
        with on_one_device():
            asked = [_confirmed(o, loss_fn, params, batch, pod, quick) for o in options[:TOP]]
        if all(order(o)[0] for o in asked):
            tried = "; ".join(f"{o.mesh}: {o.no_room or human_bytes(o.bytes)}" for o in asked)
            raise ValueError(f"{name} on {pod.name}: the compiler finds no room; {tried}")
        # Those that were not compiled stay behind: nothing is known of their collectives.
        options = sorted(asked, key=order) + options[TOP:]
    return FunctionPlan(name, pod, tuple(options), tuple(refused))


def _confirmed(option: Option, loss_fn: Callable, params: Any, batch: Any, pod: Pod, quick: bool) -> Option:
    """The option with the compiler's answer: its memory, and its seconds with the compiled program's collectives."""
    try:
        compiled = _compile(option, loss_fn, params, batch, pod, quick)
    except ValueError as error:
        return option._replace(no_room=str(error))
    predicted = option.rules.prediction
    assert predicted is not None
    wire = sum(
        t.count * pod.hardware.seconds(t.kind, t.wire(predicted.mesh) / t.count, t.axes, predicted.mesh)
        for t in predicted.traffic
    )
    seconds = option.seconds - wire + collective_seconds(compiled.census, pod, option.mesh)
    return option._replace(compiled=compiled, seconds=seconds)


def _compile(option: Option, loss_fn: Callable, params: Any, batch: Any, pod: Pod, quick: bool) -> CompiledStep:
    """A step of AdamW under the option's rules. Integers among the parameters are left as they are."""
    start = time.perf_counter()
    grid = make_mesh(option.mesh, pod_devices(pod))
    mesh = Mesh(grid.devices, grid.axis_names, axis_types=(AxisType.Auto,) * grid.devices.ndim)
    abstract = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    sharded = lambda tree: jax.tree.map(lambda p: NamedSharding(mesh, p), tree, is_leaf=lambda x: isinstance(x, P))
    params, batch, places = abstract(params), abstract(batch), sharded(option.rules.specs)
    floats = lambda tree: [x for x, p in zip(jax.tree.leaves(tree), jax.tree.leaves(params)) if _is_float(p)]
    tx, run = optax.adamw(1e-3), option.rules.apply(loss_fn, mesh)
    aux = isinstance(jax.eval_shape(loss_fn, params, *batch), tuple)

    def step(params, state, *batch):
        loss, grads = jax.value_and_grad(run, has_aux=aux, allow_int=True)(params, *batch)
        with jax.numpy_dtype_promotion("standard"):  # optax divides by its int32 counts
            updates, state = tx.update(floats(grads), state, floats(params))
            new: Any = optax.apply_updates(floats(params), updates)
        rest = iter(new)
        return jax.tree.map(lambda x: next(rest) if _is_float(x) else x, params), state, loss

    state = jax.eval_shape(tx.init, floats(params))
    whole = NamedSharding(mesh, P())
    moments = optax.tree.map_params(tx, lambda _, s: s, state, floats(places), transform_non_params=lambda _: whole)
    split = option.rules.rules.compute.get("batch", ())
    rows = math.prod(mesh.shape[a] for a in split)
    placed = lambda x: NamedSharding(mesh, P(tuple(split)) if split and x.ndim and x.shape[0] % rows == 0 else P())
    ins = (places, moments, *(jax.tree.map(placed, b) for b in batch))
    jitted = jax.jit(step, in_shardings=ins, out_shardings=(places, moments, None), donate_argnums=(0, 1))
    lowered = jitted.trace(params, state, *batch).lower(lowering_platforms=(pod.platform,))
    seconds = time.perf_counter() - start
    return compile_lowered(lowered, pod, option.mesh, mesh, trace_seconds=seconds, quick=quick)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _gigabytes(size: float) -> float:
    return size / 1e9


def _meshes(pod: Pod, rows: int) -> Iterator[MeshConfig]:
    n = pod.num_devices
    for tp, fsdp in itertools.product(range(1, _most_tp(pod) + 1), range(1, n + 1)):
        if n % (tp * fsdp) == 0 and rows % (n // tp) == 0:
            yield MeshConfig(dp=n // (tp * fsdp), fsdp=fsdp, tp=tp)


def _most_tp(pod: Pod) -> int:
    return max(d for d in range(1, min(MOST_TP, pod.hardware.node) + 1) if pod.num_devices % d == 0)


def _shapes(tree: Any) -> Any:
    """Without the shardings that arrays have where a mesh is set."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _activation_bytes(fn: Callable, params: Any, batch: Any) -> float:
    """Bytes of what the whole batch's forward pass keeps for the gradient, beside parameters and batch."""

    def residuals(params: Any, *batch: Any) -> Any:
        def loss(params: Any) -> Any:
            out = fn(params, *batch)
            return out[0] if isinstance(out, tuple) else out

        return jax.vjp(loss, params)[1]

    abstract = _shapes((params, *batch))
    kept = jax.tree.leaves(jax.eval_shape(residuals, *abstract))
    own = [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)]
    size = 0
    for x in kept:
        if (x.shape, x.dtype) in own:  # a parameter or the batch itself
            own.remove((x.shape, x.dtype))
            continue
        size += math.prod(x.shape) * jnp.dtype(x.dtype).itemsize
    return float(size)
