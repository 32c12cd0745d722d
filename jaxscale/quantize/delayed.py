"""Delayed scaling: scales come from the largest numbers of the last steps, so that one pass over a tensor will do."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

HISTORY = 16  # steps whose largest number sets the next scale
# Before a number was seen: scales of 1 for activations; of gradients, far smaller, 2^-20.
START = (448.0, 57344.0 * 2.0**-20)


def used_top(histories: Sequence[jax.Array | None], kind: int, top: Any) -> jax.Array:
    """The number that a scale is made from: of weights that meet the same tensor the largest."""
    known = [delayed_top(h[kind], kind) for h in histories if h is not None]
    return functools.reduce(jnp.maximum, known) if known else top


def delayed_top(history: jax.Array, kind: int) -> jax.Array:
    top = jnp.where(jnp.isfinite(history), history, 0).max()  # a step that was not finite spoils no later one
    return jnp.where(top > 0, top, START[kind])


def next_history(history: jax.Array | None, *tops: jax.Array) -> jax.Array | None:
    return None if history is None else jnp.concatenate([jnp.stack(tops)[:, None], history[:, :-1]], 1)
