"""x @ w for few rows of x, w in 4 or 8 bits: bound by reading w once. Hopper GPUs (sm90), Pallas Mosaic GPU.

Computed as out.T = w.T @ x.T: a tile of w goes from shared memory to registers as it lies, is widened there to
bfloat16, exactly, and is the left operand of a wgmma; the few rows of x are its columns. A scale belongs to a row and a
group of K, so each group's sum is a small accumulator that is multiplied with scales and added to the total in float32.

Widening takes most of the time that reading does, so it takes what nibbles a register happens to hold: those of one
register are 8 neighbours along K, of which bits i and i + 16 make a pair, where wgmma wants neighbours in a pair. Since
the order of summation is free, x is permuted instead (`order`), in the XLA fusion that pads it, or the weight was
(`QuantizedArray.interleave`), which saves a small kernel.

The warpgroups of a block take 64 rows of w each (`rows` of them), or each a share of K (`depth`), and sum at the end;
one more feeds them through TMA, from one tile into the next: a block stays on its multiprocessor. Where tiles are too
few, blocks share them, and XLA adds their parts. One writer and one order of summation: results
repeat bit by bit.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import QuantizedArray, order, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import mma, tiled, values_layout, varying_as, widen

_UNIT = 64  # rows of a wgmma
_SM_COUNT = 132  # of an H100 or H200 SXM
_PART = 64  # rows of x at a time
_MOST = 192  # rows of x: XLA, which dequantizes in memory, takes as long as four or five parts
_MOST_CHANNELS = 64  # for 8 bits with scales of channels, which XLA widens on the way


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 1  # warpgroups along N
    depth: int = 3  # warpgroups along K
    stages: int = 3  # steps in flight, of each of `depth`
    width: int = 128  # bytes of a row of w in a step
    blocks: int = _SM_COUNT  # at most


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


def tuned(tokens: int, bits: int) -> Config:
    """For `tokens` rows of x, a multiple of 8. More bytes in flight than these are slower: the first come later."""
    if tokens <= 16:
        return Config(depth=3, stages=3) if bits == 4 else Config(depth=4, stages=2)
    if bits == 8:
        return Config(depth=2, stages=4)
    return Config(depth=3 if tokens <= 32 else 2, stages=2)


def share_of(tiles: int, steps: int, c: Config) -> int:
    """How many steps a block takes, of tiles of `steps` each: whole tiles, whose sums need no addition, where most
    multiprocessors have some; memory is as fast to three quarters of them."""
    whole = -(-tiles // c.blocks) * steps
    if 4 * -(-tiles * steps // whole) >= 3 * c.blocks:
        return whole
    return max(-(-tiles * steps // c.blocks), min(2 * c.depth, whole))


def matmul_few(x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None) -> jax.Array:
    """[M, N] of x [M, K] and a flat QuantizedArray."""
    out = matmul_few_parts(x, w, dtype, config)
    return sum(out[1:], start=out[0]).astype(dtype)  # and not a reduction: XLA fuses additions with what follows


def matmul_few_parts(x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None) -> jax.Array:
    """[P, M, N] whose sum over P is x [M, K] @ w: in float32, or one part in `dtype`."""
    if x.shape[0] > _PART:
        some = [x[i : i + _PART] for i in range(0, x.shape[0], _PART)]
        return jnp.concatenate([matmul_few(part, w, dtype, config) for part in some])[None]
    (M, K), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    T = max(8, 1 << (M - 1).bit_length())
    c = config or tuned(T, jax.dtypes.itemsize_bits(w.values.dtype))
    step = step_of(K, w.values.dtype, c.width)
    width = step * jax.dtypes.itemsize_bits(w.values.dtype) // 8
    group = K // G
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces = step // piece
    steps = -(-K // step)  # of a tile
    tile = c.rows * _UNIT
    tiles = -(-N // tile)
    total = tiles * steps
    share = share_of(tiles, steps, c)
    blocks = -(-total // share)
    # A tile's steps may be those of several blocks, each with a sum of its own.
    parts = max((t * steps + steps - 1) // share - t * steps // share + 1 for t in range(tiles))
    x_order = x.astype(jnp.bfloat16)
    if not w.interleaved:
        x_order = order(x_order, w.values.dtype)
    if not w.interleaved or _dispatch.interpreted("gpu"):  # else TMA's, which fills up with zeros
        x_order = jnp.pad(x_order, ((0, T - M), (0, 0)))
    # One scale (and offset) for each row of all tiles: loads are not clipped.
    inside = w.offsets is not None and G > 1  # a channel's offset is added outside
    factors_of = [x for x in (w.scales, w.offsets if inside else None) if x is not None]
    padded = [jnp.pad(repeat_to(x, (N, G)), ((0, -N % tile), (0, 0))) for x in factors_of]
    wide = min(T, 16)  # rows of x whose results are stored at a time
    out_dtype = jnp.dtype(jnp.float32 if parts > 1 or (w.offsets is not None and not inside) else dtype)

    ahead = G > 1 and G <= 256 and G * w.scales.dtype.itemsize % 16 == 0

    def kernel(x_ref, w_ref, *refs):
        factor_refs, (out_ref, w_smem, x_smem, sum_smem, out_smem, full, free, done, read) = (
            refs[: len(padded)],
            refs[len(padded) :],
        )
        wg = lax.axis_index("wg")
        start = lax.axis_index("block") * share
        end = jnp.minimum(start + share, total)
        tile_of = lambda step: lax.div(step, jnp.int32(steps))

        def turns(d, upto):
            """How many of the steps d, d + depth, d + 2 depth, ... of the block there are below upto."""
            return lax.div(upto - start - d + c.depth - 1, jnp.int32(c.depth))

        @pl.when(wg < c.rows * c.depth)
        def _compute():
            _set_registers(c, True)
            d, r = lax.div(wg, jnp.int32(c.rows)), lax.rem(wg, jnp.int32(c.rows))
            own = lambda t: pl.ds(pl.multiple_of(t * tile + r * _UNIT, _UNIT), _UNIT)

            def factors(at):
                """The scales, or scales and offsets, of a step, read a turn ahead: nothing waits for them."""
                at = jnp.minimum(at, total - 1)
                k = lax.rem(at, jnp.int32(steps)) * step
                places = [lax.div(k + p * piece, jnp.int32(group)) for p in range(pieces)]
                load = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
                rows = own(tile_of(at))
                return tuple(tuple(load(ref.at[rows, jnp.minimum(g, G - 1)]) for ref in factor_refs) for g in places)

            def scaled(acc, scale):
                return acc * lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])

            def body(i, carry):
                total, now = carry
                following = factors(start + d + (i + 1) * c.depth) if G > 1 else now
                slot = _slot(i, c)
                plgpu.barrier_wait(full.at[d, slot])
                narrow = plgpu.load(w_smem.at[d, slot, pl.ds(r * _UNIT, _UNIT)], layout=values_layout(w.values.dtype))
                if G == 1:
                    total = mma(total, widen(narrow), x_smem.at[d, slot].transpose((1, 0)))
                    plgpu.barrier_arrive(free.at[d, slot])
                    return total, now
                for p in range(pieces):
                    a = widen(narrow[:, p * piece : (p + 1) * piece])
                    columns = x_smem.at[d, slot, :, pl.ds(p * piece, piece)].transpose((1, 0))
                    acc = mma(None, a, columns)
                    if inside:  # the offset times the sum of x, which ones as the left operand give
                        ones = plgpu.layout_cast(jnp.ones((_UNIT, piece), jnp.bfloat16), plgpu.Layout.WGMMA)
                        total += scaled(mma(None, ones, columns), now[p][1])
                    if p == pieces - 1:
                        plgpu.barrier_arrive(free.at[d, slot])
                    total += scaled(acc, now[p][0])
                return total, following

            def finish(t, total):
                """Stores the sums of all warpgroups: of the whole tile, or a part."""
                if c.depth > 1:

                    @pl.when(d > 0)
                    def _():
                        pl.when(t > tile_of(start))(lambda: plgpu.barrier_wait(read.at[r]))
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
                        pl.when(t < tile_of(end - 1))(lambda: plgpu.barrier_arrive(read.at[r]))
                    part = lax.axis_index("block") - lax.div(t * steps, jnp.int32(share))
                    # The tile's last block fills the parts that other tiles have and this one has not.
                    beyond = jnp.where((t + 1) * steps <= end, parts, part + 1)

                    def store(p, out):
                        for m in range(0, M, wide):
                            columns = out[:, m : m + wide].astype(out_dtype)
                            columns = plgpu.layout_cast(columns, plgpu.Layout.WGMMA_TRANSPOSED)
                            out_smem.at[r].transpose((1, 0))[...] = columns
                            plgpu.commit_smem()
                            size = min(wide, M - m)
                            target = out_ref.at[p, pl.ds(m, size), own(t)]
                            plgpu.copy_smem_to_gmem(out_smem.at[r, pl.ds(0, size)], target)
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    store(part, out)
                    if parts > 1:
                        pl.loop(part + 1, beyond)(lambda p: store(p, jnp.zeros_like(out)))

            def of_tile(t, now):
                zero = plgpu.layout_cast(jnp.zeros((_UNIT, T), jnp.float32), plgpu.Layout.WGMMA)
                if G == 1:
                    now = factors(t * steps)
                upto = jnp.minimum((t + 1) * steps, end)
                total, now = lax.fori_loop(turns(d, jnp.maximum(t * steps, start)), turns(d, upto), body, (zero, now))
                finish(t, scaled(total, now[0][0]) if G == 1 else total)
                return now

            lax.fori_loop(tile_of(start), tile_of(end - 1) + 1, of_tile, factors(start + d))

        @pl.when(wg == c.rows * c.depth)
        def _feed():
            _set_registers(c, False)

            everything = pl.ds(lax.axis_index("wg") * 0, T)  # T rows of which there may be M

            @pl.loop(0, turns(0, end))
            def _(i):
                slot = _slot(i, c)
                for d in range(c.depth):

                    @pl.when(i < turns(d, end))
                    def _(d=d):
                        pl.when(i >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, slot]))
                        here = start + d + i * c.depth
                        k = lax.rem(here, jnp.int32(steps))
                        own = pl.ds(pl.multiple_of(tile_of(here) * tile, tile), tile)
                        if ahead:
                            pl.when((k == 0) | (here == start))(lambda: plgpu.async_prefetch(factor_refs[0].at[own]))
                        at = pl.ds(pl.multiple_of(k * step, step), step)
                        plgpu.copy_gmem_to_smem(w_ref.at[own, at], w_smem.at[d, slot], full.at[d, slot])
                        plgpu.copy_gmem_to_smem(x_ref.at[everything, at], x_smem.at[d, slot], full.at[d, slot])

            for d in range(c.depth):  # all slots are free before the block ends

                @pl.loop(0, c.stages)
                def _(i, d=d):
                    last = turns(d, end) + i
                    pl.when(last >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, _slot(last, c)]))

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((parts, M, N), out_dtype),
        scratch_types=(
            tiled((c.depth, c.stages, tile, step), w.values.dtype, width),
            tiled((c.depth, c.stages, T, step), jnp.bfloat16, min(2 * piece, 128)),
            plgpu.SMEM((c.depth - 1, c.rows, _UNIT, T) if c.depth > 1 else (1, 1, 1, 1), jnp.float32),
            plgpu.SMEM((c.rows, wide, _UNIT), out_dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=c.rows, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=max(c.depth - 1, 1), num_barriers=c.rows),
            plgpu.Barrier(num_barriers=c.rows),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=c.rows * c.depth + 1,
        thread_name="wg",
        kernel_name="quantized_few",
    )(x_order, w.values, *padded)
    out = varying_as(x, out)
    if w.offsets is None or inside:
        return out
    sums = x.astype(jnp.float32).reshape(M, G, group).sum(axis=2)
    out = sum(out[1:], start=out[0])
    return (out + jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")).astype(dtype)[None]


# Pieces.


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows * c.depth)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
