"""Training: a state, a step for any pure loss function, and a loop that survives what happens to real runs."""

import dataclasses
import inspect
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxscale.sharding import active_mesh

Params = Any
Batch = Any
Metrics = dict[str, Any]
LossFn = Callable[..., Any]  # (params, batch) -> loss, or (loss, {name: scalar}); with key= if it takes one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step reads and writes: step (int32 scalar), params, opt_state, and a PRNG key."""

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    key: jax.Array


class NonFiniteLoss(ArithmeticError):
    """The loss or a gradient is not a number; says at which step, and which checkpoint is still good."""


class Preempted(Exception):  # noqa: N818  an event, not an error
    """The run was asked to stop (SIGTERM) and has saved itself at `step`."""

    def __init__(self, step: int):
        super().__init__(f"preempted: saved at step {step}; the same command resumes there")
        self.step = step


def make_train_state(params: Params, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state at step 0. Optimizer moments are made in the shards of their parameters."""
    opt_state = jax.jit(optimizer.init)(params)
    step = jnp.zeros((), jnp.int32)
    mesh = active_mesh()
    if mesh is not None:  # scalars too belong to the mesh, on every device alike
        step, key, opt_state = jax.tree.map(lambda x: jax.reshard(x, jax.typeof(x).sharding.spec), (step, key, opt_state))
    return TrainState(step=step, params=params, opt_state=opt_state, key=key)


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, *, accum_steps: int = 1, donate: bool = True
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A compiled training step for any pure loss function.

    Args:
      loss_fn: (params, batch) -> loss, or (loss, metrics) with metrics a dict of scalars. A parameter named `key` gets
        a fresh PRNG key each step (dropout). If the metrics hold a
        `weight` (the number of labelled tokens, say), micro-batches count by it: the accumulated gradient is then the
        gradient of the whole batch however its labels are spread.
      optimizer: any optax transformation.
      accum_steps: micro-batches in a step; the leading dim of every batch leaf must divide by it.
      donate: reuse the old state's memory for the new one.

    Returns:
      step(state, batch) -> (state, metrics): loss, grad_norm and what loss_fn reports, float32 scalars.
    """

    takes_key = "key" in inspect.signature(loss_fn).parameters

    def grad_fn(params, batch, key):
        def with_metrics(params):
            out = loss_fn(params, batch, key=key) if takes_key else loss_fn(params, batch)
            loss, metrics = out if isinstance(out, tuple) else (out, {})
            return loss, {"loss": loss, **metrics}

        (_, metrics), grads = jax.value_and_grad(with_metrics, has_aux=True)(params)
        return grads, metrics

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        if accum_steps == 1:
            grads, metrics = grad_fn(state.params, batch, key)
        else:
            grads, metrics = _accumulate(grad_fn, state.params, batch, key, accum_steps)
        with jax.named_scope("update"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.global_norm(grads)
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state, key=state.key), metrics

    return jax.jit(step, donate_argnums=0 if donate else ())


def _accumulate(grad_fn, params, batch, key, accum_steps):
    def split(x):
        if x.shape[0] % accum_steps:
            raise ValueError(f"batch dim {x.shape[0]} is not divisible by accum_steps={accum_steps}")
        # Micro-batch i takes rows i, i + accum_steps, ...: the split dim stays outermost, so nothing moves.
        x = x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:])
        return x.swapaxes(0, 1)

    def weigh(tree, weight):
        return jax.tree.map(lambda x: x * weight.astype(x.dtype), tree)

    def body(total, inputs):
        micro, i = inputs
        grads, metrics = grad_fn(params, micro, jax.random.fold_in(key, i))
        weight = metrics.get("weight", jnp.ones((), jnp.float32))
        part = weigh((grads, {k: v for k, v in metrics.items() if k != "weight"}), weight)
        return jax.tree.map(jnp.add, total, (part, weight)), None

    micro = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], micro), key)
    grads = jax.tree.map(jnp.zeros_like, params)  # the gradients' types are the parameters' types
    metrics = {k: jnp.zeros(v.shape, v.dtype) for k, v in shapes[1].items() if k != "weight"}
    (total, weight), _ = jax.lax.scan(body, ((grads, metrics), jnp.zeros((), jnp.float32)), (micro, jnp.arange(accum_steps)))
    grads, metrics = weigh(total, 1.0 / jnp.maximum(weight, 1e-30))
    return grads, ({**metrics, "weight": weight} if "weight" in shapes[1] else metrics)
