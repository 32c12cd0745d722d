"""The tables of schedule.py in one kernel (Pallas' Triton backend): blocks have some rows each, and see all groups."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton

_MOST_GROUPS = 128  # whose pairs are compared in the registers of one block: 256 spill


def supported(G: int) -> str | None:
    """None, or the reason why this kernel cannot make the tables."""
    if reason := _triton.unfit():
        return reason
    return None if G <= _MOST_GROUPS else f"takes at most {_MOST_GROUPS} groups. Got {G}"


def tables(fill, group_sizes: jax.Array, most: int) -> list[jax.Array]:
    """The parts of `Tiles`, of `most` rows: fill(sizes, index) gives the columns at `index`, and both counts."""
    G = group_sizes.shape[0]
    width, rows = 1 << (G - 1).bit_length(), 32
    warps = max(4, width // 16)

    def kernel(sizes_ref, table_ref, count_ref, short_ref):
        start = pl.program_id(0) * rows
        sizes = _triton.load(sizes_ref, pl.ds(0, width), keep=_triton.inside((0, width, G)))
        columns, count, short = fill(sizes, start + lax.iota(jnp.int32, rows))
        keep = _triton.inside((start, rows, most))
        for i, column in enumerate(columns):
            _triton.store(table_ref, column, pl.ds(start, rows), jnp.int32(i), keep=keep)

        @pl.when(start == 0)
        def _():
            count_ref[0], short_ref[0] = count, short

    outputs = [((most, 4), jnp.int32), ((1,), jnp.int32), ((1,), jnp.int32)]
    grid = (pl.cdiv(most, rows),)
    return _triton.launch(kernel, "ragged_tiles", grid, (group_sizes,), outputs, warps=warps, stages=1)
