"""Activations between a layer's output and the next matmul."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
    """Activations [B, D] whose RMS norm is still to be finished: each row times 1 / root(mean of its squares + eps).

    One number for each row may as well multiply what a matmul makes of it.
    """

    scaled: jax.Array  # [B, D], times the norm's weight
    squares: jax.Array  # float32 [T, S], whose sum over S is that of a row's squares; T is 8, 16, 32, ..., at least B


def to_rows(x: jax.Array, scale: jax.Array, offset: float = 0.0) -> Rows:
    """Of x [B, D] and a norm's weight [D], to which offset is added."""
    h = x.astype(jnp.float32)
    scaled = (h * (scale.astype(jnp.float32) + offset)[None]).astype(x.dtype)
    T = max(8, 1 << (len(x) - 1).bit_length())
    return Rows(scaled, jnp.pad((h * h).sum(axis=1, keepdims=True), ((0, T - len(x)), (0, 31))))
