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
    k_scales: jax.Array | None = None  # [P, K] or [P, page, K] float32
    v_scales: jax.Array | None = None
    sinks: jax.Array | None = None  # [N]
    first_page: jax.Array | None = None  # [] int32


@dataclasses.dataclass(frozen=True)
class Options:
    """The static part of one call."""

    window: int | None
    scale: float
    soft_cap: float | None


def placed(inputs: Inputs) -> Inputs:
    """The same call with the pages' own numbers in its table."""
    if inputs.first_page is None:
        return inputs
    return inputs._replace(page_table=inputs.page_table + inputs.first_page[None, None], first_page=None)


def bounded_lengths(inputs: Inputs) -> jax.Array:
    """Lengths that the page table can hold: no backend reads past it, whatever the caller wrote."""
    return jnp.clip(inputs.lengths, 0, inputs.page_table.shape[1] * inputs.k_pages.shape[1])


def scales_of_tokens(scales: jax.Array, index: jax.Array, page: int) -> jax.Array:
    """[B, S, K] float32: those of the pages `index` [B, M], token by token."""
    own = scales.at[index].get(mode="clip").astype(jnp.float32)
    own = jnp.repeat(own[:, :, None], page, axis=2) if own.ndim == 3 else own
    return own.reshape(own.shape[0], -1, own.shape[3])


def visible(inputs: Inputs, options: Options, keys: jax.Array) -> jax.Array:
    """Which of the keys at these positions [S] each query sees: bool [B, T, S]."""
    T = inputs.q.shape[1]
    own = bounded_lengths(inputs)[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]
    ahead = keys[None, None, :] - own[:, :, None]
    return (ahead <= 0) if options.window is None else (ahead <= 0) & (ahead > -options.window)
