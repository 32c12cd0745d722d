"""Pallas' Triton backend: a tile is read once, rounded in registers, and stored as it lies and transposed.

Bound by memory: 2 bytes read and 2 written a number for `round_both`, 6 and 5 for `gated_grads`. Each tile writes its
own largest number; XLA takes the largest of these few.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import _dispatch, _triton
from pallas_kernels._triton import cover, inside, load, store
from pallas_kernels.float8_grads.xla import gated, rounded


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile, and warps."""

    rows: int
    columns: int
    warps: int


PLAIN, GATED = Config(128, 128, 8), Config(64, 128, 8)  # on an H100; half or twice the tile is up to 20 % slower


def supported(arrays) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _triton.unfit():
        return reason
    if not _dispatch.interpreted("triton") and _triton.capability() < 89:
        return f"float8 needs compute capability 8.9 or above; this is {_triton.capability() / 10}"
    if not 0 < math.prod(arrays[0].shape) < 2**31:
        return f"takes at least one number and fewer than 2^31. Got {arrays[0].shape}"
    return None


def round_both(x: jax.Array, scale: jax.Array, dtype, config: Config = PLAIN) -> tuple[jax.Array, ...]:
    """x [L, M, N], scale [L]."""

    def compute(scale_ref, layer, tiles):
        (x,) = tiles
        return [(x, rounded(x, scale_ref[layer], dtype))]

    return _launch(compute, "round_both", (x,), scale, [(dtype, True)], config)


def gated_grads(grad, gate, up, scales, dtypes, act, config: Config = GATED) -> tuple[jax.Array, ...]:
    gradient, forward = dtypes

    def compute(scale_ref, layer, tiles):
        del layer
        grad, gate, up = tiles
        made = gated(grad, gate, up, act)
        return [(x, rounded(x, scale_ref[i], d)) for i, (x, d) in enumerate(zip(made, (gradient, gradient, forward)))]

    kinds = [(gradient, True), (gradient, True), (forward, False)]
    made = _launch(compute, "gated_grads", (grad[None], gate[None], up[None]), jnp.stack(scales), kinds, config)
    return tuple(x.reshape(x.shape[-2:]) if x.ndim else x for x in made)


def _launch(compute, name, arrays, scales, kinds, config: Config) -> tuple[jax.Array, ...]:
    """compute(scales, layer, tiles) -> (number, its rounded value) for each of the kinds: (dtype, whether it is wanted
    as it lies, too). Arrays are [L, M, N]. Returns for each the values if wanted, the transposed ones, the largest."""
    L, M, N = arrays[0].shape
    bm, bn = cover(M, config.rows), cover(N, config.columns)
    grid = pl.cdiv(N, bn), pl.cdiv(M, bm), L

    def kernel(scale_ref, *refs):
        refs, outs = refs[: len(arrays)], iter(refs[len(arrays) :])
        column, row, layer = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        m, n = row * bm, column * bn
        there, across = (layer, pl.ds(m, bm), pl.ds(n, bn)), (layer, pl.ds(n, bn), pl.ds(m, bm))
        keep, keep_across = inside((m, bm, M), (n, bn, N)), inside((n, bn, N), (m, bm, M))
        tiles = [load(r, *there, keep=keep).astype(jnp.float32) for r in refs]
        for (x, q), (_, plain) in zip(compute(scale_ref, layer, tiles), kinds, strict=True):
            if plain:
                store(next(outs), q, *there, keep=keep)
            store(next(outs), q.T, *across, keep=keep_across)
            store(next(outs), jnp.abs(x).max(), layer, row, column)

    outputs = []
    for dtype, plain in kinds:
        outputs += [((L, M, N), dtype)] * plain + [((L, N, M), dtype), (grid[::-1], jnp.float32)]
    made = _triton.launch(kernel, name, grid, (scales, *arrays), outputs, warps=config.warps, stages=1)
    return tuple(x.max() if x.dtype == jnp.float32 else x for x in made)
