"""x @ w for few rows of x, w in 4 or 8 bits: bound by reading w once. Hopper GPUs (sm90), Pallas Mosaic GPU.

Computed as out.T = w.T @ x.T: a tile of w goes from shared memory to registers as it lies, is widened there to
bfloat16, exactly, and is the left operand of a wgmma; the few rows of x are its columns. A scale belongs to a row and a
group of K, so each group's sum is a small accumulator that is multiplied with scales and added to the total in float32.

Widening takes most of the time that reading does, so it takes what nibbles a register happens to hold: those of one
register are 8 neighbours along K, of which bits i and i + 16 make a pair, where wgmma wants neighbours in a pair. Since
the order of summation is free, x is permuted instead (`order`), in the XLA fusion that pads it, or the weight was
(`QuantizedArray.interleave`), which saves a small kernel.

The warpgroups of a block take 64 rows of w each (`rows` of them), or each a share of K (`depth`), and sum at the end;
one more feeds them through TMA, from one tile into the next: a block stays on its multiprocessor. What is stored of a
tile is up to its end (mosaic_gpu_few_ends.py). Where tiles are too few, blocks share them, and XLA adds their parts.
One writer and one order of summation: results repeat bit by bit.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul import mosaic_gpu_few_ends as ends
from pallas_kernels.quantized_matmul.array import QuantizedArray, order, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_few_ends import SM_COUNT, UNIT, Add, Config, End, Tiles, filled, step_of
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import mma, tiled, values_layout, varying_as, widen

_PART = 64  # rows of x at a time
_MOST = 192  # rows of x: XLA, which dequantizes in memory, takes as long as four or five parts
_MOST_CHANNELS = 64  # for 8 bits with scales of channels, which XLA widens on the way


class Norm(NamedTuple):
    """Rows x, each to be multiplied with rsqrt(mean of its squares + eps) before a matmul, or after it."""

    squares: jax.Array  # float32 [T, S], whose sum over S is that of a row's squares; T >= M is 8 or a power of two
    eps: float


def unfit_few(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few` cannot run this call."""
    (M, K), N, bits = x.shape, w.values.shape[0], jax.dtypes.itemsize_bits(w.values.dtype)
    if x.dtype != jnp.bfloat16:
        return f"takes x in bfloat16. Got {x.dtype}"
    most = _MOST_CHANNELS if bits == 8 and w.scales.shape[1] == 1 else _MOST
    if most < M:
        return f"takes at most {most} rows of x for values of {bits} bits, {w.scales.shape[1]} scales a row. Got {M}"
    if N % 8 or N < UNIT:
        return f"takes N >= {UNIT}, a multiple of 8. Got {N}"
    if N % UNIT and (M % 8 == 0 or M >= _PART):  # such rows lie in tiles of 64 columns, which TMA stores whole
        return (
            f"takes N that is a multiple of {UNIT} for 8, 16, ... rows of x, or {_PART} and more. Got N {N}, {M} rows"
        )
    if K % (256 // bits):
        return f"takes K that is a multiple of {256 // bits} for values of {bits} bits. Got {K}"
    step = step_of(K, w.values.dtype)
    if w.scales.shape[1] > 1 and (w.group % 32 or (w.group % step and step % w.group)):
        return f"takes groups of 32, 64, or multiples of 128 that divide K={K}. Got {w.group}"
    return None


def unfit_normed(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_parts` takes no Norm with x."""
    if w.activations is not None or w.inputs is not None or (w.offsets is not None and w.scales.shape[1] == 1):
        return "takes activations as they are, and no offsets of channels"
    if x.shape[0] > _PART:
        return f"takes at most {_PART} rows of x. Got {x.shape[0]}"
    return unfit_few(x, w)


def unfit_gate(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_gate` cannot run this call."""
    if w.values.shape[0] % (2 * UNIT):
        return f"takes N that is a multiple of {2 * UNIT}. Got {w.values.shape[0]}"
    return unfit_normed(x, w)


def unfit_add(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_add` cannot run this call."""
    if split_of(w, x.shape[0]) is None:
        some = f"at most {_PART // 4} rows of x for N a multiple of 512, {_PART // 2} for one of 1024"
        return f"takes {some}, K a multiple of 512. Got x {x.shape}, w {w.shape}"
    return unfit_normed(x, w)


def split_of(w: QuantizedArray, M: int) -> int | None:
    """Into how many parts along K the rows of w are taken apart, such that whole tiles keep most multiprocessors busy.

    [N, K] is [N split, K / split] as it lies in memory. A part meets its own part of x and others, of which nothing is
    kept. None where `matmul_few_add` does not take w.
    """
    (N, K), G = w.values.shape, w.scales.shape[1]
    step, bits = step_of(K, w.values.dtype), jax.dtypes.itemsize_bits(w.values.dtype)
    T = filled(M)

    def fits(split):
        even = K % split == 0 and (G == 1 or (G % split == 0 and split < G)) and K // split % (256 // bits) == 0
        return even and step_of(K // split, w.values.dtype) == step and N * split % 2048 == 0 and T * split <= _PART

    def busy(split):
        tiles = N * split // UNIT
        return -(-tiles // -(-tiles // SM_COUNT))

    return max((split for split in (2, 4) if fits(split)), key=busy, default=None)


def tuned(tokens: int, bits: int) -> Config:
    """For `tokens` rows of x, a multiple of 8. More bytes in flight than these are slower: the first come later."""
    return Config(stages=4 if bits == 8 else 3 if tokens <= 32 else 2)


def tuned_gate(tokens: int) -> Config:
    """As `tuned`, for tiles of 64 rows of the gate and 64 of what it multiplies."""
    if tokens <= 16:
        return Config(rows=2, depth=2, stages=3)
    return Config(rows=2, depth=1, stages=4 if tokens <= 32 else 3)


def matmul_few(x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None) -> jax.Array:
    """[M, N] of x [M, K] and a flat QuantizedArray."""
    out = matmul_few_parts(x, w, dtype, config)
    return sum(out[1:], start=out[0]).astype(dtype)  # and not a reduction: XLA fuses additions with what follows


def matmul_few_parts(
    x: jax.Array, w: QuantizedArray, dtype, config: Config | None = None, norm: Norm | None = None
) -> jax.Array:
    """[P, M, N] whose sum over P is x [M, K] @ w: in float32, or one part in `dtype`."""
    if x.shape[0] > _PART:
        assert norm is None
        some = [x[i : i + _PART] for i in range(0, x.shape[0], _PART)]
        return jnp.concatenate([matmul_few(part, w, dtype, config) for part in some])[None]
    (M, K), N, G = x.shape, w.values.shape[0], w.scales.shape[1]
    if w.offsets is None or G > 1:
        tiles = Tiles(M, w, config or tuned(filled(M), jax.dtypes.itemsize_bits(w.values.dtype)))
        return _few(x, w, tiles, ends.parts(tiles, dtype), norm)[0]
    assert norm is None
    out = sum(matmul_few_parts(x, dataclasses.replace(w, offsets=None), jnp.float32, config))  # a channel's: added here
    sums = x.astype(jnp.float32).reshape(M, G, K // G).sum(axis=2)
    return (out + jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")).astype(dtype)[None]


def matmul_few_gate(x: jax.Array, w: QuantizedArray, config: Config | None = None, norm: Norm | None = None):
    """silu(gate) * up [M, N/2] in x's dtype, where x [M, K] @ w, rounded to that, is [gate, up]."""
    tiles = Tiles(x.shape[0], w, config or tuned_gate(filled(x.shape[0])), halves=2)
    return _few(x, w, tiles, ends.gate(tiles, x.dtype), norm)[0][0]


def matmul_few_add(x: jax.Array, w: QuantizedArray, add: Add, config: Config | None = None):
    """add.to plus x [M, K] @ w, what is to be normed of it, and its squares; see Add and Norm."""
    M, split = x.shape[0], split_of(w, x.shape[0])
    assert split
    tiles = Tiles(M, w, config or tuned(split * filled(M), jax.dtypes.itemsize_bits(w.values.dtype)), split)
    return _few(x, w, tiles, ends.added(tiles, x.dtype, add))


def _few(x: jax.Array, w: QuantizedArray, tiles: Tiles, end: End, norm: Norm | None = None) -> tuple[jax.Array, ...]:
    """The kernel: what its end makes of x @ w, or of norm(x) @ w."""
    c, T, K, split, late = tiles.c, tiles.T, tiles.K, tiles.split, tiles.late
    step, steps, share, leaders, givers = tiles.step, tiles.steps, tiles.share, tiles.leaders, tiles.givers
    G, bits = w.scales.shape[1], jax.dtypes.itemsize_bits(w.values.dtype)
    columns = split * T
    group = K // max(G, split)
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces = step // piece
    last = tiles.count * steps
    x_order = x.astype(jnp.bfloat16)
    pad = lambda x, rows: jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
    # TMA fills up 8 rows, or adds whole 8s to others; it takes no array of more than 8 rows that 8 does not divide.
    as_it_is = w.interleaved and (tiles.M <= 8 or tiles.M % 8 == 0)
    x_order = x_order if w.interleaved else order(x_order, w.values.dtype)
    x_order = ends.fill(x_order, T) if as_it_is else pad(x_order, T)
    # One scale (and offset) for each row of all tiles: loads are not clipped.
    by_row = lambda x: repeat_to(x, (tiles.N, G)).reshape(tiles.N if late else tiles.N * split, -1)
    factors_of = [by_row(x) for x in (w.scales, w.offsets) if x is not None]
    padded = [pad(x, -(-x.shape[0] // tiles.rows) * tiles.rows) for x in factors_of]
    Gs = padded[0].shape[1]  # of a row
    eps = norm.eps if norm else 0.0
    ahead = Gs > 1 and Gs <= 256 and Gs * w.scales.dtype.itemsize % 16 == 0

    def kernel(*refs):
        refs = iter(refs)
        take = lambda n: [next(refs) for _ in range(n)]
        (x_ref, w_ref), factor_refs, squares_refs = take(2), take(len(padded)), take(1 if norm else 0)
        operand_refs, out_refs = take(len(end.operands)), take(len(end.out_type))
        w_smem, x_smem, sum_smem, out_smem, norm_smem, full, free, done, read, near = refs
        wg = lax.axis_index("wg")
        start = lax.axis_index("block") * share
        stop = jnp.minimum(start + share, last)
        tile_of = lambda step: lax.div(step, jnp.int32(steps))
        every = pl.ds(lax.axis_index("wg") * 0, T)
        mine = ends.Refs(factor_refs, operand_refs, out_refs, sum_smem, out_smem, near, every)

        def turns(d, upto):
            """How many of the steps d, d + depth, d + 2 depth, ... of the block there are below upto."""
            return lax.div(upto - start - d + c.depth - 1, jnp.int32(c.depth))

        @pl.when(wg < c.rows * c.depth)
        def _compute():
            _set_registers(c, True)
            d, r = lax.div(wg, jnp.int32(c.rows)), lax.rem(wg, jnp.int32(c.rows))
            leader = jnp.int32(0) if tiles.halves > 1 else r  # that collects this warpgroup's sums

            def factors(at):
                """The scales, or scales and offsets, of a step, read a turn ahead: nothing waits for them."""
                at = jnp.minimum(at, last - 1)
                k = lax.rem(at, jnp.int32(steps)) * step
                places = [lax.div(k + p * piece, jnp.int32(group)) for p in range(pieces)]
                load = functools.partial(plgpu.load, layout=_COLUMN, optimized=False)
                rows = tiles.own(tile_of(at), r)
                return tuple(tuple(load(ref.at[rows, jnp.minimum(g, Gs - 1)]) for ref in factor_refs) for g in places)

            def scaled(acc, scale):
                return acc * lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])

            def body(i, carry):
                total, now = carry
                following = factors(start + d + (i + 1) * c.depth) if Gs > 1 else now
                slot = _slot(i, c)
                plgpu.barrier_wait(full.at[d, slot])
                narrow = plgpu.load(w_smem.at[d, slot, pl.ds(r * UNIT, UNIT)], layout=values_layout(w.values.dtype))
                if Gs == 1:
                    total = mma(total, widen(narrow), x_smem.at[d, slot].transpose((1, 0)))
                    plgpu.barrier_arrive(free.at[d, slot])
                    return total, now
                for p in range(pieces):
                    a = widen(narrow[:, p * piece : (p + 1) * piece])
                    some = x_smem.at[d, slot, :, pl.ds(p * piece, piece)].transpose((1, 0))
                    acc = mma(None, a, some)
                    if len(factor_refs) > 1:  # the offset times the sum of x, which ones as the left operand give
                        ones = plgpu.layout_cast(jnp.ones((UNIT, piece), jnp.bfloat16), plgpu.Layout.WGMMA)
                        total += scaled(mma(None, ones, some), now[p][1])
                    if p == pieces - 1:
                        plgpu.barrier_arrive(free.at[d, slot])
                    total += scaled(acc, now[p][0])
                return total, following

            def finish(t, total, ready):
                """Hands the sums of all warpgroups, of the whole tile or a part, to its end."""
                if givers:

                    @pl.when(wg >= leaders)
                    def _():
                        pl.when(t > tile_of(start))(lambda: plgpu.barrier_wait(read.at[leader]))
                        end.give(mine, wg, total)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(done.at[leader])

                @pl.when(wg < leaders)
                def _():
                    if end.leaders_give:
                        end.give(mine, wg, total)
                        plgpu.commit_smem()
                    if givers:
                        plgpu.barrier_wait(done.at[leader])
                    outs = end.collect(mine, leader, total)
                    if givers:
                        pl.when(t < tile_of(stop - 1))(lambda: plgpu.barrier_arrive(read.at[leader]))
                    if norm:
                        factor = plgpu.load(norm_smem.at[leader], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                        outs = [out * lax.broadcast_in_dim(factor, out.shape, [1]) for out in outs]
                    end.store(mine, leader, t, stop, outs, ready)

            def of_tile(t, now):
                zero = plgpu.layout_cast(jnp.zeros((UNIT, columns), jnp.float32), plgpu.Layout.WGMMA)
                ready = end.prepare(mine, wg, t)
                if Gs == 1 and not late:
                    now = factors(t * steps)
                upto = jnp.minimum((t + 1) * steps, stop)
                total, now = lax.fori_loop(turns(d, jnp.maximum(t * steps, start)), turns(d, upto), body, (zero, now))
                finish(t, scaled(total, now[0][0]) if Gs == 1 and not late else total, ready)
                return now

            if norm:

                @pl.when(wg < leaders)
                def _():
                    squares = plgpu.load(squares_refs[0], layout=ends.rows_layout(32, 1).reduce(2), optimized=False)
                    norm_smem.at[wg][...] = lax.rsqrt(squares.sum(axis=1) * (1 / K) + eps)
                    plgpu.commit_smem()

            lax.fori_loop(tile_of(start), tile_of(stop - 1) + 1, of_tile, () if late else factors(start + d))

        @pl.when(wg == c.rows * c.depth)
        def _feed():
            _set_registers(c, False)

            @pl.loop(0, turns(0, stop))
            def _(i):
                slot = _slot(i, c)
                for d in range(c.depth):

                    @pl.when(i < turns(d, stop))
                    def _(d=d):
                        pl.when(i >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, slot]))
                        here = start + d + i * c.depth
                        k = lax.rem(here, jnp.int32(steps)) * step
                        for rows, some in tiles.wanted(tile_of(here)):
                            if ahead:
                                prefetch = lambda rows=rows: plgpu.async_prefetch(factor_refs[0].at[rows])
                                pl.when((k == 0) | (here == start))(prefetch)
                            at = pl.ds(pl.multiple_of(k, step), step)
                            plgpu.copy_gmem_to_smem(w_ref.at[rows, at], w_smem.at[d, slot, some], full.at[d, slot])
                        for h in range(split):
                            at = pl.ds(pl.multiple_of(h * (K // split) + k, step), step)
                            some = x_smem.at[d, slot, pl.ds(h * T, T)]
                            plgpu.copy_gmem_to_smem(x_ref.at[every, at], some, full.at[d, slot])

            for d in range(c.depth):  # all slots are free before the block ends

                @pl.loop(0, c.stages)
                def _(i, d=d):
                    turn = turns(d, stop) + i
                    pl.when(turn >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, _slot(turn, c)]))

    out = plgpu.kernel(
        kernel,
        out_type=end.out_type,
        scratch_types=(
            tiled((c.depth, c.stages, tiles.rows, step), w.values.dtype, step * bits // 8),
            tiled((c.depth, c.stages, columns, step), jnp.bfloat16, min(2 * piece, 128)),
            *end.scratch,
            plgpu.SMEM((leaders, T) if norm else (1, 1), jnp.float32),
            plgpu.Barrier(num_arrivals=split + tiles.halves, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=c.rows, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=max(givers // leaders, 1), num_barriers=leaders),
            plgpu.Barrier(num_barriers=leaders),
            plgpu.Barrier(),
        ),
        grid=(-(-last // share),),
        grid_names=("block",),
        num_threads=c.rows * c.depth + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=end.approx_math),
        kernel_name=end.name,
    )(
        x_order,
        w.values.reshape(tiles.N * split, K // split),
        *padded,
        *([norm.squares] if norm else []),
        *end.operands,
    )
    return tuple(varying_as(x, out) for out in out)


# Pieces.

_COLUMN: Any = plgpu.Layout.WGMMA.reduce(1)


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows * c.depth)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
