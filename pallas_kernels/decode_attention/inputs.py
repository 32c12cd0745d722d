"""What every backend receives: checked arrays and static options."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Inputs(NamedTuple):
    """The arrays of one call. None where the caller gave none."""

    q: jax.Array  # [B, T, N, H]
    k_pages: jax.Array  # [P, page, K, H]
    v_pages: jax.Array  # [P, page, K, Hv]
    page_table: jax.Array  # [B, M] int32
    lengths: jax.Array  # [B] int32
    k_scales: jax.Array | None = None  # [P, K] float32
    v_scales: jax.Array | None = None
    sinks: jax.Array | None = None  # [N]


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of one call."""

    window: int | None
    scale: float
    soft_cap: float | None


def bounded_lengths(inputs: Inputs) -> jax.Array:
    """Lengths that the page table can hold: no backend reads past it, whatever the caller wrote."""
    return jnp.clip(inputs.lengths, 0, inputs.page_table.shape[1] * inputs.k_pages.shape[1])


def visible(inputs: Inputs, options: Options, keys: jax.Array) -> jax.Array:
    """Which of the keys at these positions [S] each query sees: bool [B, T, S]."""
    T = inputs.q.shape[1]
    own = bounded_lengths(inputs)[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]
    ahead = keys[None, None, :] - own[:, :, None]
    return (ahead <= 0) if options.window is None else (ahead <= 0) & (ahead > -options.window)
