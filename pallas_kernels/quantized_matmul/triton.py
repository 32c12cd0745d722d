"""Quantized matmul for GPUs before Hopper, in Pallas' Triton backend: int4 and int8 weights. Newer GPUs run it too.

Few rows, x in 16 bits: bound by reading w once. Values are widened in registers, exactly, and each group's products are
scaled on their way into the float32 sum. Two values of 4 bits lie in a byte: the low ones are multiplied with the even
columns of x, the high ones with the odd ones, and nothing is shuffled. Where tiles are too few to fill the GPU, blocks
share K and XLA adds their parts.

Any rows, x rounded to int8, scales of channels: values meet in int8, sums are exact in int32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _triton
from pallas_kernels._triton import cover, dot, inside, load, store
from pallas_kernels.quantize_rows.api import rows_for
from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to

_MOST = 256  # rows of x in 16 bits: with more, XLA, which dequantizes in memory, is as fast
_MOST_CHANNELS = 16  # for 8 bits with scales of channels, which XLA widens on the way


@dataclasses.dataclass(frozen=True)
class Config:
    """A tile of the output, numbers of K in a step, blocks that share K, warps, loads in flight."""

    rows: int
    columns: int
    depth: int
    split: int
    warps: int
    stages: int


def tuned(M: int, N: int, K: int) -> Config:
    """For x in 16 bits."""
    rows = cover(M, 64)
    columns = 64 if rows < 64 else 128
    tiles = pl.cdiv(N, columns) * pl.cdiv(M, rows)
    split = 1
    while split < 8 and tiles * split < 400 and K // (2 * split) >= 512:  # about three blocks a multiprocessor
        split *= 2
    return Config(rows, columns, 128, split, 4, 4)


def tuned_int8(M: int) -> Config:
    """For x in 8 bits."""
    return Config(cover(M, 128), 128, 64, 1, 4 if M < 128 else 8, 4)


def supported(x, w: QuantizedArray, dtype) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    del dtype
    if reason := _triton.unfit():
        return reason
    (N, K), G = w.values.shape, w.scales.shape[1]
    if w.values.dtype not in (jnp.int4, jnp.int8):
        return f"takes values in int4 and int8. Got {w.values.dtype}"
    if 0 in (*x.shape, N, K) or K % 2:
        return f"takes at least one number, and an even K. Got x {x.shape}, w {w.values.shape}"
    if w.activations is not None:
        if w.activations == "float8_e4m3fn" or G > 1 or w.offsets is not None:
            return f"takes activations rounded to int8 with scales of channels and no offsets. Got {w.activations}, {G}"
        return None
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes x in bfloat16 and float16. Got {x.dtype}"
    most = _MOST_CHANNELS if w.values.dtype == jnp.int8 and G == 1 else _MOST
    if x.shape[0] > most:
        return f"takes at most {most} rows of x for {w.values.dtype}, {G} scales a row. Got {x.shape[0]}"
    least = 32 if w.values.dtype == jnp.int4 else 16
    if G > 1 and w.group % least:
        return f"takes groups that are multiples of {least} for {w.values.dtype}, or channels. Got {w.group}"
    return None


def matmul(x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None) -> jax.Array:
    """[M, N] of x [M, K] and a flat w."""
    (M, K), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    scales = repeat_to(w.scales.astype(jnp.float32), (N, G)).T
    if w.activations is not None:
        rows = rows_for(x, w)
        out = _product([rows.values], w.values.astype(jnp.int8), scales, jnp.float32, config or tuned_int8(M))
        return (out * rows.scales).astype(dtype)
    halves, values = [x], w.values
    if values.dtype == jnp.int4:
        halves = [x[:, ::2], x[:, 1::2]]
        values = lax.bitcast_convert_type(values.reshape(N, K // 2, 2), jnp.int8)
    config = config or tuned(M, N, K)
    plain = w.offsets is None and config.split == 1
    out = _product(halves, values, scales, dtype if plain else jnp.float32, config)
    if w.offsets is not None:
        sums = x.astype(jnp.float32).reshape(M, G, -1).sum(axis=2)
        out += jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")
    return out.astype(dtype)


def _product(xs: list[jax.Array], w: jax.Array, scales: jax.Array, dtype, config: Config) -> jax.Array:
    """[M, N]: the sum over g of (x[:, g] @ w[:, g].T) * scales[g]; scales [G, N] float32.

    w [N, Kb] int8 holds `len(xs)` values in a byte; x is given as their columns, [M, Kb] each.
    """
    M, (N, Kb), G = xs[0].shape[0], w.shape, scales.shape[0]
    packed = len(xs)
    group = Kb // G  # in bytes of a row of w, as all along K from here on
    bm, bn, bk = cover(M, config.rows), cover(N, config.columns), cover(Kb, config.depth // packed)
    if G > 1:
        bk = min(bk, group & -group)  # the largest power of two that divides a group
    steps = pl.cdiv(Kb, bk)
    share = pl.cdiv(steps, config.split)
    kind = jnp.int32 if xs[0].dtype == jnp.int8 else jnp.float32

    def kernel(w_ref, scales_ref, *refs):
        *x_refs, out_ref = refs
        m, n, split = pl.program_id(1) * bm, pl.program_id(0) * bn, pl.program_id(2)
        here, there = pl.ds(m, bm), pl.ds(n, bn)

        def factors(g):
            return load(scales_ref, pl.ds(g, 1), there, keep=inside((0, 1, 1), (n, bn, N)))

        def step(k, acc):
            along = pl.ds(k * bk, bk)
            values = load(w_ref, there, along, keep=inside((n, bn, N), (k * bk, bk, Kb)))
            # The low nibble's sign is where a shift to the left puts it.
            parts = [values] if packed == 1 else [(values << 4) >> 4, values >> 4]
            out = acc if G == 1 else jnp.zeros_like(acc)
            for x_ref, part in zip(x_refs, parts, strict=True):
                x = load(x_ref, here, along, keep=inside((m, bm, M), (k * bk, bk, Kb)))
                out += dot(x, part.astype(x.dtype), 1, 1, kind)
            return out if G == 1 else acc + out * factors(lax.div(k * bk, jnp.int32(group)))

        first = split * share
        acc = lax.fori_loop(first, jnp.minimum(first + share, steps), step, jnp.zeros((bm, bn), kind))
        out = acc.astype(jnp.float32)
        out = out * factors(0) if G == 1 else out
        store(out_ref, out, split, here, there, keep=inside((m, bm, M), (n, bn, N)))

    out = _triton.launch(
        kernel,
        "quantized_matmul",
        (pl.cdiv(N, bn), pl.cdiv(M, bm), config.split),
        (w, scales, *xs),
        [((config.split, M, N), dtype)],
        warps=config.warps,
        stages=config.stages,
    )[0]
    return out[0] if config.split == 1 else out.sum(axis=0)
