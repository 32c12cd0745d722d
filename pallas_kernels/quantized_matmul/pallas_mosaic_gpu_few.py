"""x @ w for few rows of x, w in 4 or 8 bits: bound by reading w once. Hopper GPUs (sm90), Pallas Mosaic GPU.

Computed as out.T = w.T @ x.T: a tile of w goes from shared memory to registers as it lies, is widened there to
bfloat16, exactly, and is the left operand of a wgmma; the few rows of x are its columns. A scale belongs to a row and a
group of K, so each group's sum is a small accumulator that is multiplied with scales and added to the total in float32.

Widening takes most of the time that reading does, so it takes what nibbles a register happens to hold: those of one
register are 8 neighbours along K, of which bits i and i + 16 make a pair, where wgmma wants neighbours in a pair. Since
the order of summation is free, x is permuted instead (`order`), in the XLA fusion that pads it.

The warpgroups of a block take 64 rows of w each (`rows` of them), or each a share of K (`depth`), and sum at the end;
one more feeds them through TMA. Where there are too few tiles for all multiprocessors, blocks share K too (`split`),
and XLA adds their parts. One writer and one order of summation: results repeat bit by bit.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import mma, order, tiled, values_layout, varying_as, widen

_UNIT = 64  # rows of a wgmma
_SM_COUNT = 132  # of an H100 or H200 SXM
_PART = 64  # rows of x at a time
_MOST = 192  # rows of x: XLA, which dequantizes in memory, takes as long as four or five parts
_MOST_CHANNELS = 16  # for 8 bits with scales of channels, which XLA widens on the way


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 1  # warpgroups along N
    depth: int = 4  # warpgroups along K
    split: int = 1  # blocks along K
    stages: int = 4  # steps in flight, of each of `depth`
    width: int = 128  # bytes of a row of w in a step


def unfit_few(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few` cannot run this call."""
    (M, K), N, bits = x.shape, w.values.shape[0], jax.dtypes.itemsize_bits(w.values.dtype)
    if x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16. Got {x.dtype}"
    most = _MOST_CHANNELS if bits == 8 and w.scales.shape[1] == 1 else _MOST
    if most < M:
        return f"takes at most {most} rows of x for values of {bits} bits, {w.scales.shape[1]} scales a row. Got {M}"
    if N % 8 or N < _UNIT:
        return f"takes N >= {_UNIT}, a multiple of 8. Got {N}"
    if K % (256 // bits):
        return f"takes K that is a multiple of {256 // bits} for values of {bits} bits. Got {K}"
    step = step_of(K, w.values.dtype)
    if w.scales.shape[1] > 1 and (w.group % 32 or (w.group % step and step % w.group)):
        return f"takes groups of 32, 64, or multiples of 128 that divide K={K}. Got {w.group}"
    return None


def step_of(K: int, dtype, width: int = 128) -> int:
    """The numbers in `width` bytes of a row of w, or as large a part of them as divides K."""
    step = width * 8 // jax.dtypes.itemsize_bits(dtype)
    while K % step:
        step //= 2
    return step


def tuned(tokens: int, N: int, K: int) -> Config:
    """For `tokens` rows of x, a multiple of 8."""
    if tokens <= 8:
        rows, depth, stages, width = 1, 4, 4, 128
    elif tokens <= 16:
        rows, depth, stages, width = 2, 2, 4, 128
    else:
        rows, depth, stages, width = 4, 1, 6, 64
    while rows * _UNIT > N:
        rows, depth = rows // 2, depth * 2
    tiles = -(-N // (rows * _UNIT))
    split = max(1, min(_SM_COUNT // tiles, K // (1024 * depth)))
    return Config(rows, depth, split, stages, width)


def matmul_few(x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None) -> jax.Array:
    """[M, N] of x [M, K] and a flat QuantizedArray."""
    if x.shape[0] > _PART:
        parts = [x[i : i + _PART] for i in range(0, x.shape[0], _PART)]
        return jnp.concatenate([matmul_few(part, w, dtype, config) for part in parts])
    (M, K), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    T = max(8, 1 << (M - 1).bit_length())
    c = config or tuned(T, N, K)
    step = step_of(K, w.values.dtype, c.width)
    width = step * jax.dtypes.itemsize_bits(w.values.dtype) // 8
    group = K // G
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces = step // piece
    steps = -(-K // step)
    share = -(-steps // c.split)  # steps of a block
    tile = c.rows * _UNIT
    x_order = order(x.astype(jnp.bfloat16), w.values.dtype)
    x_order = jnp.pad(x_order, ((0, T - M), (0, 0)))
    # One scale for each row of all tiles: loads are not clipped.
    scales = jnp.pad(repeat_to(w.scales, (N, G)), ((0, -N % tile), (0, 0)))
    parts = c.split > 1
    wide = min(T, 16)  # rows of x whose results are stored at a time
    out_dtype = jnp.dtype(jnp.float32 if parts or w.offsets is not None else dtype)

    def kernel(x_ref, w_ref, scales_ref, out_ref, w_smem, x_smem, sum_smem, out_smem, full, free, done):
        wg = lax.axis_index("wg")
        row = lax.axis_index("rows") * tile
        first = lax.axis_index("split") * share
        last = jnp.minimum(first + share, steps)

        def turns(d):
            """How many steps first + d, first + d + depth, ... there are below last."""
            return lax.div(jnp.maximum(last - first - d, 0) + c.depth - 1, jnp.int32(c.depth))

        @pl.when(wg < c.rows * c.depth)
        def _compute():
            _set_registers(c, True)
            d, r = lax.div(wg, jnp.int32(c.rows)), lax.rem(wg, jnp.int32(c.rows))
            own = pl.ds(pl.multiple_of(row + r * _UNIT, _UNIT), _UNIT)

            def factors(k):
                """The scales of step k, read a step ahead: nothing waits for them."""
                places = [lax.div(k * step + p * piece, jnp.int32(group)) for p in range(pieces)]
                refs = [scales_ref.at[own, jnp.minimum(g, G - 1)] for g in places]
                return tuple(plgpu.load(r, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False) for r in refs)

            def scaled(acc, scale):
                return acc * lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])

            def body(i, carry):
                total, now = carry
                k = first + d + i * c.depth
                following = factors(k + c.depth) if G > 1 else now
                slot = _slot(i, c)
                plgpu.barrier_wait(full.at[d, slot])
                narrow = plgpu.load(w_smem.at[d, slot, pl.ds(r * _UNIT, _UNIT)], layout=values_layout(w.values.dtype))
                if G == 1:
                    total = mma(total, widen(narrow), x_smem.at[d, slot].transpose((1, 0)))
                    plgpu.barrier_arrive(free.at[d, slot])
                    return total, now
                for p in range(pieces):
                    a = widen(narrow[:, p * piece : (p + 1) * piece])
                    acc = mma(None, a, x_smem.at[d, slot, :, pl.ds(p * piece, piece)].transpose((1, 0)))
                    if p == pieces - 1:
                        plgpu.barrier_arrive(free.at[d, slot])
                    total += scaled(acc, now[p])
                return total, following

            zero = plgpu.layout_cast(jnp.zeros((_UNIT, T), jnp.float32), plgpu.Layout.WGMMA)
            total, now = lax.fori_loop(0, turns(d), body, (zero, factors(first + d)))
            if G == 1:
                total = scaled(total, now[0])

            if c.depth > 1:

                @pl.when(d > 0)
                def _():
                    sum_smem[d - 1, r] = total
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(done.at[r])

            @pl.when(d == 0)
            def _():
                out = total
                if c.depth > 1:
                    plgpu.barrier_wait(done.at[r])
                    for other in range(c.depth - 1):
                        out += plgpu.load(sum_smem.at[other, r], layout=plgpu.Layout.WGMMA, optimized=False)
                target = out_ref.at[lax.axis_index("split")] if parts else out_ref
                for t in range(0, M, wide):
                    columns = out[:, t : t + wide].astype(out_dtype)
                    out_smem.at[r].transpose((1, 0))[...] = plgpu.layout_cast(columns, plgpu.Layout.WGMMA_TRANSPOSED)
                    plgpu.commit_smem()
                    size = min(wide, M - t)
                    plgpu.copy_smem_to_gmem(out_smem.at[r, pl.ds(0, size)], target.at[pl.ds(t, size), own])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == c.rows * c.depth)
        def _feed():
            _set_registers(c, False)

            @pl.loop(0, turns(0))
            def _(i):
                slot = _slot(i, c)
                for d in range(c.depth):

                    @pl.when(i < turns(d))
                    def _(d=d):
                        pl.when(i >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, slot]))
                        at = pl.ds(pl.multiple_of((first + d + i * c.depth) * step, step), step)
                        here = pl.ds(pl.multiple_of(row, tile), tile)
                        plgpu.copy_gmem_to_smem(w_ref.at[here, at], w_smem.at[d, slot], full.at[d, slot])
                        plgpu.copy_gmem_to_smem(x_ref.at[:, at], x_smem.at[d, slot], full.at[d, slot])

            for d in range(c.depth):  # all slots are free before the block ends

                @pl.loop(0, c.stages)
                def _(i, d=d):
                    end = turns(d) + i
                    pl.when(end >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, _slot(end, c)]))

    out_shape = (c.split, M, N) if parts else (M, N)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(out_shape, out_dtype),
        scratch_types=(
            tiled((c.depth, c.stages, tile, step), w.values.dtype, width),
            tiled((c.depth, c.stages, T, step), jnp.bfloat16, min(2 * piece, 128)),
            plgpu.SMEM((c.depth - 1, c.rows, _UNIT, T) if c.depth > 1 else (1, 1, 1, 1), jnp.float32),
            plgpu.SMEM((c.rows, wide, _UNIT), out_dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=c.rows, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=max(c.depth - 1, 1), num_barriers=c.rows),
        ),
        grid=(-(-N // tile), c.split),
        grid_names=("rows", "split"),
        num_threads=c.rows * c.depth + 1,
        thread_name="wg",
        kernel_name="quantized_few",
    )(x_order, w.values, scales)
    out = varying_as(x, out)
    out = out.sum(axis=0) if parts else out
    if w.offsets is not None:
        sums = x.astype(jnp.float32).reshape(M, G, group).sum(axis=2)
        out += jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")
    return out.astype(dtype)


# Pieces.


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows * c.depth)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
