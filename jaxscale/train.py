"""Training: a state, a step for any pure loss function, and a loop that survives what happens to real runs."""

import contextlib
import dataclasses
import inspect
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from jaxscale.params import abstract_params
from jaxscale.sharding import active_mesh
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

Params = Any
Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[..., Any]  # (params, batch) -> loss, or (loss, {name: scalar}); with key= if it takes one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step reads and writes: step (int32 scalar), params, opt_state, a PRNG key, and where a loss
    function takes `scales` those (of delayed scaling: jaxscale.quantize.training)."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array
    scales: Any = None


_NO_MESH = "jaxscale: parameters or batch lie on a mesh but none is set; call the step under `with jax.set_mesh(mesh):`"
_NO_SHARDINGS = (
    "jaxscale: shardings are part of types here. A loss function that says nothing about them leaves them to the "
    "partitioner through jaxscale.auto: make_train_step(jaxscale.auto(loss_fn), optimizer)"
)


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient is not a number; says at which step, and which checkpoint is still good."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved itself at `step`."""

    def __init__(self, step: int):
        super().__init__(f"preempted: saved at step {step}; the same command resumes there")
        self.step = step


def make_train_state(
    params: Params, optimizer: optax.GradientTransformation, key: jax.Array, scales: Any = None
) -> TrainState:
    """The state at step 0. Optimizer moments are made in the shards of their parameters."""
    opt_state = jax.jit(optimizer.init)(params)
    step = jnp.zeros((), jnp.int32)
    mesh = active_mesh()
    if mesh is not None:  # scalars too belong to the mesh, on every device alike
        step, key, opt_state, scales = jax.tree.map(
            lambda x: jax.reshard(x, jax.typeof(x).sharding.spec), (step, key, opt_state, scales)
        )
    return TrainState(step=step, params=params, opt_state=opt_state, key=key, scales=scales)


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    accum_steps: int = 1,
    donate: bool = True,
    compiler_options: dict[str, Any] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled training step for any pure loss function.

    Args:
      loss_fn: (params, batch) -> loss, or (loss, metrics) with metrics a dict of scalars. A parameter named `key` gets
        a fresh PRNG key each step (dropout); one named `scales` gets those of the state, which its gradient replaces.
        If the metrics hold a `weight` (the number of labelled tokens, say), micro-batches count by it: the accumulated
        gradient is then the gradient of the whole batch however its labels are spread. On a mesh, one that says nothing
        about shardings is passed as `jaxscale.auto(loss_fn)`.
      optimizer: any optax transformation.
      accum_steps: micro-batches in a step; the leading dim of every batch leaf must divide by it.
      donate: reuse the old state's memory for the new one.
      compiler_options: for XLA; `jaxscale.parallel.context.compiler_options` says what a split sequence needs.

    Returns:
      step(state, batch) -> (state, metrics): loss, grad_norm and what loss_fn reports, float32 scalars.
    """

    takes = inspect.signature(loss_fn).parameters

    def grad_fn(params, scales, batch, key):
        def with_metrics(params, scales):
            options = {name: x for name, x in (("key", key), ("scales", scales)) if name in takes}
            out = loss_fn(params, batch, **options)
            loss, metrics = out if isinstance(out, tuple) else (out, {})
            return loss, {"loss": loss, **metrics}

        try:
            (_, metrics), grads = jax.value_and_grad(with_metrics, argnums=(0, 1), has_aux=True)(params, scales)
        except Exception as error:
            if type(error).__name__ in ("DuplicateSpecError", "ShardingTypeError"):  # which jax does not export
                error.add_note(_NO_MESH if active_mesh() is None else _NO_SHARDINGS)
            raise
        return *grads, metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if ("scales" in takes) != (state.scales is not None):
            raise ValueError(
                "the loss function takes scales but the state has none: make_train_state(..., scales=init_scales(...))"
                if state.scales is None
                else "the state has scales but the loss function takes none: make the state without them"
            )
        key = jax.random.fold_in(state.key, state.step)
        if accum_steps == 1:
            grads, scales, metrics = grad_fn(state.params, state.scales, batch, key)
        else:
            grads, scales, metrics = _accumulate(grad_fn, state.params, state.scales, batch, key, accum_steps)
        # optax divides by its int32 step counts: allowed here even where the user's own code promotes strictly.
        with jax.named_scope("update"), jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        new = TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key, scales=scales)
        return new, metrics

    return jax.jit(step, donate_argnums=0 if donate else (), compiler_options=compiler_options)


def _accumulate(grad_fn, params, scales, batch, key, accum_steps):
    def split(x):
        if x.shape[0] % accum_steps:
            raise ValueError(f"batch dim {x.shape[0]} is not divisible by accum_steps={accum_steps}")
        # Micro-batch i takes rows i, i + accum_steps, ...: the split dim stays outermost, so nothing moves.
        x = x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:])
        return x.swapaxes(0, 1)

    def weigh(tree, weight):
        return jax.tree.map(lambda x: x * weight.astype(x.dtype), tree)

    def body(carry, inputs):
        total, largest = carry
        micro, i = inputs
        grads, new, metrics = grad_fn(params, scales, micro, jax.random.fold_in(key, i))
        weight = metrics.get("weight", jnp.ones((), jnp.float32))
        part = weigh((grads, {k: v for k, v in metrics.items() if k != "weight"}), weight)
        return (jax.tree.map(jnp.add, total, (part, weight)), jax.tree.map(jnp.maximum, largest, new)), None

    micro = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad_fn, params, scales, jax.tree.map(lambda x: x[0], micro), key)
    grads = jax.tree.map(jnp.zeros_like, params)  # the gradients' types are the parameters' types
    metrics = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes[2].items() if k != "weight"}
    start = ((grads, metrics), jnp.zeros((), jnp.float32)), jax.tree.map(jnp.zeros_like, scales)
    ((total, weight), scales), _ = jax.lax.scan(body, start, (micro, jnp.arange(accum_steps)))
    grads, metrics = weigh(total, 1.0 / jnp.maximum(weight, 1e-30))
    return grads, scales, ({**metrics, "weight": weight} if "weight" in shapes[2] else metrics)


class Callback:
    """What a run does beside stepping. Override what is needed; `every` says at which steps `on_state` is called."""

    every: int = 1

    def on_start(self, step: int, steps: int) -> None:
        """Before the first step of this process: `step` is where it starts, `steps` where it ends."""

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """After step `step` (counted from 1), with its metrics on the host; also with what other callbacks return."""

    def on_state(self, step: int, state: TrainState) -> dict[str, float] | None:
        """At steps that are multiples of `every`, and at the last one. What it returns goes to every on_metrics."""

    def on_preempt(self, step: int, state: TrainState) -> None:
        """Once, when the run is asked to stop: save what must survive. Seconds count."""

    def on_end(self) -> None:
        """Always, however the run ended."""


def fit(
    state: TrainState,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    batches: Iterator[Batch],
    *,
    steps: int,
    callbacks: Sequence[Callback] = (),
) -> TrainState:
    """Run train_step until state.step is `steps`.

    One step is always in flight while the host prepares the next batch, so metrics arrive one step late. Nothing that
    came after a step that is not finite reaches a callback's on_state: no checkpoint of it can exist.

    Raises:
      NonFiniteLoss: the loss or gradient norm of a step is NaN or infinite.
      Preempted: SIGTERM arrived; callbacks have had on_preempt.
    """
    step = int(state.step)
    in_flight: list[tuple[int, Metrics]] = []
    last_done = time.perf_counter()

    def settle() -> None:
        nonlocal last_done
        done, metrics = in_flight.pop(0)
        host = {name: float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter()
        host["seconds"], last_done = now - last_done, now
        if not (np.isfinite(host["loss"]) and np.isfinite(host["grad_norm"])):
            raise NonFiniteLoss(
                f"step {done}: loss={host['loss']:g}, grad_norm={host['grad_norm']:g}; stopped before saving it. "
                f"Lower the learning rate or look at batch {done - 1}; the last checkpoint is from before this step"
            )
        report(done, host)

    def report(done: int, metrics: dict[str, float]) -> None:
        for callback in callbacks:
            callback.on_metrics(done, metrics)

    with _preemption() as asked_to_stop:
        try:
            for callback in callbacks:
                callback.on_start(step, steps)
            while step < steps:
                state, metrics = train_step(state, next(batches))
                step += 1
                in_flight.append((step, metrics))
                if len(in_flight) > 1:
                    settle()
                due = [c for c in callbacks if step % c.every == 0 or step == steps]
                stopping = asked_to_stop(step)
                if stopping or any(type(c).on_state is not Callback.on_state for c in due):
                    while in_flight:
                        settle()
                    for callback in due:
                        extra = callback.on_state(step, state)
                        if extra:
                            report(step, extra)
                    last_done = time.perf_counter()
                if stopping:
                    for callback in callbacks:
                        callback.on_preempt(step, state)
                    raise Preempted(step)
            while in_flight:
                settle()
        finally:
            with contextlib.ExitStack() as endings:  # each one is heard, also when another fails
                for callback in reversed(callbacks):
                    endings.callback(callback.on_end)
    return state


@contextlib.contextmanager
def _preemption():
    """Yields `asked_to_stop(step)`. In a job of many processes all of them agree on the step at which they stop."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # signals belong to the main thread
        return
    asked = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: asked.append(signum))
    try:
        yield lambda step: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, previous)


def put_batch(
    batch: Batch, mesh: jax.sharding.Mesh, rules: Rules = MEGATRON_FSDP, share: tuple[int, int] = (0, 1)
) -> Any:
    """Rows of a global batch -> arrays over the mesh, [B, T, ...] split by batch and sequence.

    A batch that does not divide over the mesh is kept whole on every device, as the rules' fallback says.

    Args:
      batch: a tree of numpy arrays.
      share: which part of the global batch these rows are, from `batch_share`; by default all of it.

    Raises:
      ValueError: a device of this process holds rows that are not among these.
    """
    index, count = share

    def put(x: np.ndarray) -> jax.Array:
        shape = (x.shape[0] * count, *x.shape[1:])
        axes = ("batch", "seq", *[None] * (x.ndim - 2))[: x.ndim]
        spec = resolve_spec(shape, axes, rules.compute, dict(mesh.shape)).spec
        first, end = index * x.shape[0], (index + 1) * x.shape[0]

        def part(at: Any) -> np.ndarray:
            start, stop, _ = at[0].indices(shape[0])
            if not first <= start < stop <= end:
                raise ValueError(
                    f"this process holds rows {start} to {stop} of {shape[0]} but was given {first} to {end}; "
                    f"load and put the share that batch_share(mesh, {shape[0]}) says"
                )
            return x[slice(start - first, stop - first), *at[1:]]

        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(put, batch)


def batch_share(mesh: jax.sharding.Mesh, batch_size: int, rules: Rules = MEGATRON_FSDP) -> tuple[int, int]:
    """(index, count): which of `count` equal parts of each global batch this process is to load.

    Read off the mesh: processes that hold the same rows, with tp or cp across hosts, load the same part. It is the
    whole batch, (0, 1), where devices are ordered so that a process's rows do not lie side by side.
    """
    spec = resolve_spec((batch_size,), ("batch",), rules.compute, dict(mesh.shape)).spec
    rows: dict[int, set[int]] = {}
    for device, (part,) in NamedSharding(mesh, spec).devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*part.indices(batch_size)))
    return _equal_parts(rows, batch_size)[jax.process_index()]


def _equal_parts(rows: dict[int, set[int]], batch_size: int) -> dict[int, tuple[int, int]]:
    """The rows of each process -> its (index, count)."""
    size = max(map(len, rows.values()))
    for held in rows.values():
        if len(held) != size or max(held) - min(held) != size - 1 or min(held) % size:
            return dict.fromkeys(rows, (0, 1))
    return {process: (min(held) // size, batch_size // size) for process, held in rows.items()}


def abstract_train_state(
    specs: Any, optimizer: optax.GradientTransformation, mesh: Any, rules: Rules = MEGATRON_FSDP, scales: Any = None
) -> TrainState:
    """The state of a run as ShapeDtypeStructs with their shardings on `mesh`: the target of a restore.

    Args:
      scales: as in make_train_state; their values do not matter.
    """

    def state(params, key, scales):
        return make_train_state(params, optimizer, key, scales)

    abstract = mesh.abstract_mesh if isinstance(mesh, jax.sharding.Mesh) else mesh
    with jax.sharding.use_abstract_mesh(abstract):
        shapes = jax.eval_shape(
            state,
            abstract_params(specs, abstract, rules),
            jax.eval_shape(jax.random.key, 0),
            jax.eval_shape(lambda: scales),
        )

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec))

    return jax.tree.map(place, shapes)
