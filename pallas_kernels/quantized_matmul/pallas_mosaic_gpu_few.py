"""x @ w for few rows of x, w in 4 or 8 bits: bound by reading w once. Hopper GPUs (sm90), Pallas Mosaic GPU.

Computed as out.T = w.T @ x.T: a tile of w goes from shared memory to registers as it lies, is widened there to
bfloat16, exactly, and is the left operand of a wgmma; the few rows of x are its columns. A scale belongs to a row and a
group of K, so each group's sum is a small accumulator that is multiplied with scales and added to the total in float32.

Widening takes most of the time that reading does, so it takes what nibbles a register happens to hold: those of one
register are 8 neighbours along K, of which bits i and i + 16 make a pair, where wgmma wants neighbours in a pair. Since
the order of summation is free, x is permuted instead (`order`): up to 16 rows by the block that needs them, while its
first tiles of w are on their way; more in the XLA fusion that pads them.

The warpgroups of a block take 64 rows of w each, one more feeds them through TMA. Blocks share K in clusters of
`split`: each warpgroup sends its sum to the block of the cluster that adds up and stores these 64 rows. One writer and
one order of summation: results repeat bit by bit.

What counts is that memory never waits and that little comes after its last byte: each warpgroup has a ring of its own,
so that the last one is alone with its last tile.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import (
    lay_out,
    mma,
    order,
    tiled,
    values_layout,
    varying_as,
    widen,
)
from pallas_kernels.ragged_dot.mosaic_gpu_pieces import SM_COUNT, UNIT

_CLUSTER = 8  # the most blocks that share K
_SMEM = 220 * 2**10  # bytes of a block, barriers left out
_PART = 64  # rows of x at a time
_MOST = 192  # rows of x: XLA, which dequantizes in memory, takes as long as four or five parts
_MOST_CHANNELS = 16  # for 8 bits with scales of channels, which XLA widens on the way


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 4  # warpgroups, each with 64 rows of w
    split: int = 1  # blocks of a cluster, which share K
    stages: int = 4  # steps of w in flight, of each warpgroup
    x_stages: int | None = None  # steps of x in flight; None: a block permutes its share of x itself, and keeps it


def unfit_few(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few` cannot run this call; x in bfloat16, or in int8 with scales of its own."""
    (M, K), N, bits = x.shape, w.values.shape[0], jax.dtypes.itemsize_bits(w.values.dtype)
    G, integer = w.scales.shape[1], x.dtype == jnp.int8
    if x.dtype != jnp.bfloat16 and not integer:
        return f"takes x in bfloat16. Got {x.dtype}"
    if integer and (w.values.dtype not in (jnp.int4, jnp.int8) or w.offsets is not None):
        return f"takes int4 and int8 without offsets beside x in int8. Got {w.format}"
    most = _MOST_CHANNELS if bits == 8 and G == 1 and not integer else _MOST
    if most < M:
        return f"takes at most {most} rows of x for values of {bits} bits, {G} scales a row. Got {M}"
    if N % 8 or N < UNIT:
        return f"takes N >= {UNIT}, a multiple of 8. Got {N}"
    least = 64 if integer else 32  # numbers of K that a tile of x in shared memory is wide
    if K % max(256 // bits, least):
        return f"takes K that is a multiple of {max(256 // bits, least)} for values of {bits} bits. Got {K}"
    step = step_of(K, w.values.dtype)
    if G > 1 and (w.group % least or (w.group % step and step % w.group)):
        return f"takes groups of {'' if integer else '32, '}64, or multiples of 128 that divide K={K}. Got {w.group}"
    return None


def step_of(K: int, dtype) -> int:
    """The numbers in 128 bytes of a row of w, or as large a part of them as divides K."""
    step = 1024 // jax.dtypes.itemsize_bits(dtype)
    while K % step:
        step //= 2
    return step


def tuned(tokens: int, N: int, K: int, dtype, integer: bool = False) -> Config:
    """For `tokens` rows of x, a multiple of 8, and values of `dtype`; x in int8, or in bfloat16.

    Time goes with the tiles that a multiprocessor reads one after another; of equals, the widest: it reads least of x.
    """
    step = step_of(K, dtype)
    steps, best = K // step, None
    for rows in range(min(4, -(-N // UNIT)), 0, -1):
        for split in (s for s in range(1, _CLUSTER + 1) if steps % s == 0):
            blocks = -(-N // (rows * UNIT)) * split
            time = -(-blocks // SM_COUNT) * (rows * steps // split + 2)
            if best is None or time < best[0]:
                best = time, rows, split
    assert best is not None
    _, rows, split = best
    stage = (1 if integer else 2) * tokens * step
    kept = stage * steps // split
    x_stages = None if tokens <= 16 and kept <= 2**16 and not integer else 2 if tokens > 16 else 4
    left = _SMEM - (stage * x_stages if x_stages else kept)
    left -= -(-rows // split) * (split - 1) * UNIT * tokens * 4 + rows * UNIT * min(tokens, 16) * 4
    return Config(rows, split, max(2, min(6, left // (rows * UNIT * 128))), x_stages)


def matmul_few(
    x: jax.Array, w: QuantizedArray, dtype, x_scales: jax.Array | None = None, config: Config | None = None
) -> jax.Array:
    """[M, N] of x [M, K] and a flat QuantizedArray; x in int8 has x_scales, float32, [M, G] as w has [N, G]."""
    if x.shape[0] > _PART:
        cuts = [slice(i, i + _PART) for i in range(0, x.shape[0], _PART)]
        scales = [None if x_scales is None else x_scales[cut] for cut in cuts]
        return jnp.concatenate([matmul_few(x[cut], w, dtype, s, config) for cut, s in zip(cuts, scales)])
    (M, K), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    T = max(8, 1 << (M - 1).bit_length())
    integer = x_scales is not None
    kind = jnp.dtype(jnp.int8 if integer else jnp.bfloat16)
    c = config or tuned(T, N, K, w.values.dtype, integer)
    step, group = step_of(K, w.values.dtype), K // G
    width = step * jax.dtypes.itemsize_bits(w.values.dtype) // 8
    piece = min(group, step, 128 if T > 16 else step)  # of K: widened at a time, with one scale
    pieces = step // piece
    share = K // step // c.split  # steps of a block
    assert share * c.split * step == K, (c, K, step)
    tile, swizzle = c.rows * UNIT, min(kind.itemsize * piece, 128)
    keeps, x_stages = c.x_stages is None, c.x_stages or 1
    x_bits = x.astype(kind) if keeps else order(x.astype(kind), w.values.dtype)
    if not keeps or _dispatch.interpreted("gpu"):
        x_bits = jnp.pad(x_bits, ((0, T - M), (0, 0)))
    # One scale for each row of all tiles: loads are not clipped.
    scales = jnp.pad(repeat_to(w.scales, (N, G)), ((0, -N % tile), (0, 0)))
    # Of each group of K, for all columns; int4 is widened to 16 times itself.
    by = 16 if integer and w.values.dtype == jnp.int4 else 1
    x_factors = jnp.zeros((1, 8), jnp.float32) if x_scales is None else jnp.pad(x_scales / by, ((0, T - M), (0, 0))).T
    # The interpreter has no stores into another block: XLA adds their parts.
    parts = c.split > 1 and _dispatch.interpreted("gpu")
    sends = c.split > 1 and not parts
    high = min(T, 32)  # rows of x that share an accumulator: one of 64 would not leave registers enough
    wide = min(T, 16)  # and whose results are stored at a time
    out_dtype = jnp.dtype(jnp.float32 if parts or w.offsets is not None else dtype)
    places = -(-c.rows // c.split)  # tiles of 64 rows that a block adds up

    def kernel(
        x_ref, w_ref, scales_ref, factors_ref, out_ref, w_smem, x_smem, factors_smem, sum_smem, out_smem, *barriers
    ):
        full, free, x_full, x_free, done = barriers
        wg = lax.axis_index("wg")
        row = lax.axis_index("rows") * tile
        block = lax.axis_index("split")
        first = block * share

        @pl.when(wg < c.rows)
        def _compute():
            _set_registers(c, True)
            here = pl.ds(pl.multiple_of(row + wg * UNIT, UNIT), UNIT)
            if keeps:
                mine = x_ref.at[:, pl.ds(pl.multiple_of(first * step, step), share * step)]
                lay_out(mine, x_smem, swizzle, wg, c.rows, w.values.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(x_full.at[0])
                plgpu.barrier_wait(x_full.at[0])

            def load(ref, dim):
                """Scales of the rows (0) or the columns (1) of a sum."""
                return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - dim), optimized=False)

            def factors(i):
                """The scales of step i, read a step ahead: nothing waits for them."""
                places = [lax.div((first + i) * step + p * piece, jnp.int32(group)) for p in range(pieces)]
                return tuple(load(scales_ref.at[here, jnp.minimum(g, G - 1)], 0) for g in places)

            def scaled(acc, scale, x_scales, t):
                """Part t of a sum; x_scales: a reference to those of all columns, or None."""
                spread = lambda s, dim: lax.broadcast_in_dim(s.astype(jnp.float32), acc.shape, [dim])
                acc = acc.astype(jnp.float32) * spread(scale, 0)
                return acc if x_scales is None else acc * spread(load(x_scales.at[pl.ds(t * high, high)], 1), 1)

            def body(i, carry):
                total, now = carry
                following = factors(i + 1) if G > 1 else now
                slot, x_slot = lax.rem(i, jnp.int32(c.stages)), 0 if keeps else lax.rem(i, jnp.int32(x_stages))
                plgpu.barrier_wait(full.at[slot, wg])
                narrow = plgpu.load(w_smem.at[slot, wg], layout=values_layout(w.values.dtype))
                if not keeps:
                    plgpu.barrier_wait(x_full.at[x_slot])

                total = list(total)
                for p in range(pieces):
                    a = widen(narrow[:, p * piece : (p + 1) * piece], kind)
                    at = pl.ds(pl.multiple_of(i * step + p * piece, piece), piece) if keeps else pl.ds(p * piece, piece)
                    for t in range(len(total)):
                        x_part = (
                            (x_smem if keeps else x_smem.at[x_slot]).at[pl.ds(t * high, high), at].transpose((1, 0))
                        )
                        if G == 1:
                            total[t] = mma(total[t], a, x_part)
                        else:
                            x_scales = factors_smem.at[x_slot, p * piece // group] if integer else None
                            total[t] += scaled(mma(None, a, x_part), now[p], x_scales, t)
                plgpu.barrier_arrive(free.at[slot, wg])
                if not keeps:
                    plgpu.barrier_arrive(x_free.at[x_slot])
                return tuple(total), following

            sums = jnp.int32 if integer and G == 1 else jnp.float32
            zero = plgpu.layout_cast(jnp.zeros((UNIT, high), sums), plgpu.Layout.WGMMA)
            total, now = lax.fori_loop(0, share, body, ((zero,) * (T // high), factors(0)))
            if G == 1:
                x_scales = factors_ref.at[0] if integer else None
                total = [scaled(part, now[0], x_scales, t) for t, part in enumerate(total)]
            owner = lax.rem(wg, jnp.int32(c.split)) if sends else block  # the block that adds up these rows
            place = lax.div(wg, jnp.int32(c.split))

            @pl.when(block == owner)
            def _():
                if sends:
                    plgpu.barrier_wait(done.at[place])
                target = out_ref.at[block] if parts else out_ref
                for t in range(0, M, high):
                    out = total[t // high]
                    for other in range(c.split - 1 if sends else 0):
                        ref = sum_smem.at[place, other, t // high]
                        out += plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
                    for r in range(t, min(t + high, M), wide):
                        columns = out[:, r - t : r - t + wide].astype(out_dtype)
                        turned = out_smem.at[wg].transpose((1, 0))
                        turned[...] = plgpu.layout_cast(columns, plgpu.Layout.WGMMA_TRANSPOSED)
                        plgpu.commit_smem()
                        size = min(wide, M - r)
                        plgpu.copy_smem_to_gmem(out_smem.at[wg, pl.ds(0, size)], target.at[pl.ds(r, size), here])
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            if sends:

                @pl.when(block != owner)
                def _():
                    other = lax.rem(block - owner + c.split - 1, jnp.int32(c.split))
                    to = {"cluster_idx": owner, "cluster_dim": "split", "optimized": False}
                    for t, part in enumerate(total):
                        plgpu.async_store_smem(part, sum_smem.at[place, other, t], done.at[place], **to)

        @pl.when(wg == c.rows)
        def _feed():
            _set_registers(c, False)

            @pl.loop(0, share)
            def _(i):
                slot, x_slot = lax.rem(i, jnp.int32(c.stages)), 0 if keeps else lax.rem(i, jnp.int32(x_stages))
                at = pl.ds(pl.multiple_of((first + i) * step, step), step)
                for r in range(c.rows):
                    pl.when(i >= c.stages)(lambda r=r: plgpu.barrier_wait(free.at[slot, r]))
                    rows = pl.ds(pl.multiple_of(row + r * UNIT, UNIT), UNIT)
                    plgpu.copy_gmem_to_smem(w_ref.at[rows, at], w_smem.at[slot, r], full.at[slot, r])
                    if r == 0 and not keeps:
                        pl.when(i >= x_stages)(lambda: plgpu.barrier_wait(x_free.at[x_slot]))
                        plgpu.copy_gmem_to_smem(x_ref.at[:, at], x_smem.at[x_slot], x_full.at[x_slot])
                        if integer and G > 1:
                            groups = pl.ds(lax.div((first + i) * step, jnp.int32(group)), max(step // group, 1))
                            plgpu.copy_gmem_to_smem(factors_ref.at[groups], factors_smem.at[x_slot], x_full.at[x_slot])

            # All slots are free before the block ends.
            for i in range(max(share, c.stages), share + c.stages):
                for r in range(c.rows):
                    plgpu.barrier_wait(free.at[i % c.stages, r])
            for i in range(max(share, x_stages), share + x_stages if not keeps else 0):
                plgpu.barrier_wait(x_free.at[i % x_stages])

    grid = {"rows": -(-N // tile), "split": c.split}
    clusters = {"cluster": (c.split,), "cluster_names": ("split",)} if sends else {}
    out_shape = (c.split, M, N) if parts else (M, N)
    x_shape = (T, share * step) if keeps else (x_stages, T, step)
    sums = (places, c.split - 1, T // high, UNIT, high)
    ring: Any = {"num_barriers": (c.stages, c.rows)}
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=(
            tiled((c.stages, c.rows, UNIT, step), w.values.dtype, width),
            tiled(x_shape, kind, swizzle),
            plgpu.SMEM((x_stages, max(step // group, 1), T) if integer else (1, 8), jnp.float32),
            tiled(sums, jnp.float32, min(4 * high, 128)) if sends else plgpu.SMEM((1, 8), jnp.float32),
            plgpu.SMEM((c.rows, wide, UNIT), out_dtype),
            plgpu.Barrier(num_arrivals=1, **ring),
            plgpu.Barrier(num_arrivals=1, **ring),
            plgpu.Barrier(num_arrivals=c.rows if keeps else 1 + (integer and G > 1), num_barriers=x_stages),
            plgpu.Barrier(num_arrivals=c.rows, num_barriers=x_stages),
            plgpu.Barrier(num_arrivals=max(c.split - 1, 1) * (T // high), num_barriers=places),
        ),
        grid=(grid["rows"],) if sends else tuple(grid.values()),
        grid_names=("rows",) if sends else tuple(grid),
        num_threads=c.rows + 1,
        thread_name="wg",
        kernel_name="quantized_few",
        **clusters,
    )(x_bits, w.values, scales, x_factors)
    out = varying_as(x, out)
    out = out.sum(axis=0) if parts else out
    if w.offsets is not None:
        sums = x.astype(jnp.float32).reshape(M, G, group).sum(axis=2)
        out += jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")
    return out.astype(dtype)


# Pieces.


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
