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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
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
    depth: int = 2  # warpgroups along K
    stages: int = 3  # steps in flight, of each of `depth`
    width: int = 128  # bytes of a row of w in a step
    blocks: int = _SM_COUNT  # at most


class Norm(NamedTuple):
    """Rows x, each to be multiplied with rsqrt(mean of its squares + eps) before a matmul, or after it."""

    squares: jax.Array  # float32 [T, S], whose sum over S is that of a row's squares; T >= M is 8 or a power of two
    eps: float


class Add(NamedTuple):
    """What becomes of a product: added to the residual stream, and made ready for the next norm."""

    to: jax.Array  # [M, N]
    weight: jax.Array  # [N], of the next norm; with offset added, the sum is multiplied with it
    offset: float


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


def unfit_normed(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_parts` takes no Norm with x."""
    if w.activations is not None or w.inputs is not None or (w.offsets is not None and w.scales.shape[1] == 1):
        return "takes activations as they are, and no offsets of channels"
    if x.shape[0] > _PART:
        return f"takes at most {_PART} rows of x. Got {x.shape[0]}"
    return unfit_few(x, w)


def unfit_gate(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_gate` cannot run this call."""
    if w.values.shape[0] % (2 * _UNIT):
        return f"takes N that is a multiple of {2 * _UNIT}. Got {w.values.shape[0]}"
    return unfit_normed(x, w)


def unfit_add(x, w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_few_add` cannot run this call."""
    if split_of(w, x.shape[0]) is None:
        some = f"at most {_PART // 4} rows of x for N a multiple of 512, {_PART // 2} for one of 1024"
        return f"takes {some}, K a multiple of 512. Got x {x.shape}, w {w.shape}"
    return unfit_normed(x, w)


def step_of(K: int, dtype, width: int = 128) -> int:
    """The numbers in `width` bytes of a row of w, or as large a part of them as divides K."""
    step = width * 8 // jax.dtypes.itemsize_bits(dtype)
    while K % step:
        step //= 2
    return step


def split_of(w: QuantizedArray, M: int) -> int | None:
    """Into how many parts along K the rows of w are taken apart, such that whole tiles keep most multiprocessors busy.

    [N, K] is [N split, K / split] as it lies in memory. A part meets its own part of x and others, of which nothing is
    kept. None where `matmul_few_add` does not take w.
    """
    (N, K), G = w.values.shape, w.scales.shape[1]
    step, bits = step_of(K, w.values.dtype), jax.dtypes.itemsize_bits(w.values.dtype)
    T = max(8, 1 << (M - 1).bit_length())

    def fits(split):
        even = K % split == 0 and (G == 1 or (G % split == 0 and split < G)) and K // split % (256 // bits) == 0
        return even and step_of(K // split, w.values.dtype) == step and N * split % 2048 == 0 and T * split <= _PART

    def busy(split):
        tiles = N * split // _UNIT
        return -(-tiles // -(-tiles // _SM_COUNT))

    return max((split for split in (2, 4) if fits(split)), key=busy, default=None)


def tuned(tokens: int, bits: int) -> Config:
    """For `tokens` rows of x, a multiple of 8. More bytes in flight than these are slower: the first come later."""
    return Config(stages=4 if bits == 8 else 3 if tokens <= 32 else 2)


def tuned_gate(tokens: int) -> Config:
    """As `tuned`, for tiles of 64 rows of the gate and 64 of what it multiplies."""
    if tokens <= 16:
        return Config(rows=2, depth=2, stages=3)
    return Config(rows=2, depth=1, stages=4 if tokens <= 32 else 3)


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
        return _few(x, w, dtype, config, norm=norm)[0]
    assert norm is None
    out = sum(_few(x, dataclasses.replace(w, offsets=None), jnp.float32, config)[0])  # a channel's: added here
    sums = x.astype(jnp.float32).reshape(M, G, K // G).sum(axis=2)
    return (out + jnp.dot(sums, repeat_to(w.offsets, (N, G)).T, precision="highest")).astype(dtype)[None]


def matmul_few_gate(x: jax.Array, w: QuantizedArray, config: Config | None = None, norm: Norm | None = None):
    """silu(gate) * up [M, N/2] in x's dtype, where x [M, K] @ w, rounded to that, is [gate, up]."""
    return _few(x, w, x.dtype, config, norm=norm, gate=True)[0][0]


def matmul_few_add(x: jax.Array, w: QuantizedArray, add: Add, config: Config | None = None):
    """add.to plus x [M, K] @ w, what is to be normed of it, and its squares; see Add and Norm."""
    return _few(x, w, x.dtype, config, add=add)


def _few(x, w: QuantizedArray, dtype, config, norm: Norm | None = None, gate: bool = False, add: Add | None = None):
    """The kernel: [P, M, N] as one of a tuple, or the outputs of `matmul_few_add`."""
    (M, K), N, G, bits = x.shape, w.values.shape[0], w.scales.shape[1], jax.dtypes.itemsize_bits(w.values.dtype)
    T = max(8, 1 << (M - 1).bit_length())
    split = split_of(w, M) if add else 1
    assert split
    columns = split * T
    c = config or (tuned_gate(T) if gate else tuned(columns, bits))
    step = step_of(K // split, w.values.dtype, c.width)
    width = step * bits // 8
    group = K // max(G, split)
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces = step // piece
    steps = -(-(K // split) // step)  # of a tile
    tile = c.rows * _UNIT
    tiles = -(-N * split // tile)
    total = tiles * steps
    share = -(-tiles // c.blocks) * steps if gate or add else share_of(tiles, steps, c)
    blocks = -(-total // share)
    # A tile's steps may be those of several blocks, each with a sum of its own.
    parts = max((t * steps + steps - 1) // share - t * steps // share + 1 for t in range(tiles))
    out_dtype = jnp.dtype(jnp.float32 if parts > 1 else dtype)
    interpreted = _dispatch.interpreted("gpu")
    fill = lambda x: jnp.pad(x, ((0, T - M), (0, 0))) if interpreted else x  # else TMA's, which fills up with zeros
    x_order = x.astype(jnp.bfloat16)
    x_order = fill(x_order) if w.interleaved else jnp.pad(order(x_order, w.values.dtype), ((0, T - M), (0, 0)))
    # One scale (and offset) for each row of all tiles: loads are not clipped.
    late = add is not None and G == 1  # a channel's scale comes after the sum of a row's parts
    by_row = lambda x: repeat_to(x, (N, G)).reshape(N if late else N * split, -1)
    factors_of = [by_row(x) for x in (w.scales, w.offsets) if x is not None]
    padded = [jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) for x in factors_of]
    Gs = padded[0].shape[1]  # of a row
    wide = min(T, 16)  # rows of x whose results are stored at a time
    leaders = 1 if gate else c.rows  # warpgroups that collect sums and store them, the first ones
    givers = c.rows * c.depth - leaders
    ahead = Gs > 1 and Gs <= 256 and Gs * w.scales.dtype.itemsize % 16 == 0
    out_width = _UNIT // split
    eps, offset = norm.eps if norm else 0.0, add.offset if add else 0.0
    form = _rows_layout(out_width, split)  # of the rows of a tile's results
    assert not gate or (c.rows == 2 and N % tile == 0)
    assert not add or (c.rows == 1 and N * split % tile == 0)

    def kernel(*refs):
        refs = iter(refs)
        take = lambda n: [next(refs) for _ in range(n)]
        (x_ref, w_ref), factor_refs = take(2), take(len(padded))
        squares_ref: Any = next(refs) if norm else None
        add_ref, weight_ref = take(2) if add else (w_ref, w_ref)
        out_refs = take(3 if add else 1)
        w_smem, x_smem, sum_smem, out_smem, norm_smem, full, free, done, read, near = refs
        wg = lax.axis_index("wg")
        start = lax.axis_index("block") * share
        end = jnp.minimum(start + share, total)
        tile_of = lambda step: lax.div(step, jnp.int32(steps))
        everything = pl.ds(lax.axis_index("wg") * 0, T)  # T rows of which there may be M

        def turns(d, upto):
            """How many of the steps d, d + depth, d + 2 depth, ... of the block there are below upto."""
            return lax.div(upto - start - d + c.depth - 1, jnp.int32(c.depth))

        def own(t, r):
            """The rows of w that are the r-th warpgroups' of a tile: with a gate, the first half's or the second's."""
            if gate:
                return pl.ds(r * (N // 2) + pl.multiple_of(t * _UNIT, _UNIT), _UNIT)
            return pl.ds(pl.multiple_of(t * tile + r * _UNIT, _UNIT), _UNIT)

        def wanted(t):
            """Rows of w, and where they go in a tile: from two places where there is a gate."""
            if gate:
                return [(own(t, r), pl.ds(r * _UNIT, _UNIT)) for r in range(2)]
            return [(pl.ds(pl.multiple_of(t * tile, tile), tile), pl.ds(0, tile))]

        @pl.when(wg < c.rows * c.depth)
        def _compute():
            _set_registers(c, True)
            d, r = lax.div(wg, jnp.int32(c.rows)), lax.rem(wg, jnp.int32(c.rows))
            leader = jnp.int32(0) if gate else r  # that collects this warpgroup's sums

            def factors(at):
                """The scales, or scales and offsets, of a step, read a turn ahead: nothing waits for them."""
                at = jnp.minimum(at, total - 1)
                k = lax.rem(at, jnp.int32(steps)) * step
                places = [lax.div(k + p * piece, jnp.int32(group)) for p in range(pieces)]
                load = functools.partial(plgpu.load, layout=_COLUMN, optimized=False)
                rows = own(tile_of(at), r)
                return tuple(tuple(load(ref.at[rows, jnp.minimum(g, Gs - 1)]) for ref in factor_refs) for g in places)

            def scaled(acc, scale):
                return acc * lax.broadcast_in_dim(scale.astype(jnp.float32), acc.shape, [0])

            def body(i, carry):
                total, now = carry
                following = factors(start + d + (i + 1) * c.depth) if Gs > 1 else now
                slot = _slot(i, c)
                plgpu.barrier_wait(full.at[d, slot])
                narrow = plgpu.load(w_smem.at[d, slot, pl.ds(r * _UNIT, _UNIT)], layout=values_layout(w.values.dtype))
                if Gs == 1:
                    total = mma(total, widen(narrow), x_smem.at[d, slot].transpose((1, 0)))
                    plgpu.barrier_arrive(free.at[d, slot])
                    return total, now
                for p in range(pieces):
                    a = widen(narrow[:, p * piece : (p + 1) * piece])
                    some = x_smem.at[d, slot, :, pl.ds(p * piece, piece)].transpose((1, 0))
                    acc = mma(None, a, some)
                    if len(factor_refs) > 1:  # the offset times the sum of x, which ones as the left operand give
                        ones = plgpu.layout_cast(jnp.ones((_UNIT, piece), jnp.bfloat16), plgpu.Layout.WGMMA)
                        total += scaled(mma(None, ones, some), now[p][1])
                    if p == pieces - 1:
                        plgpu.barrier_arrive(free.at[d, slot])
                    total += scaled(acc, now[p][0])
                return total, following

            def picked(total):
                """Of each row of w, which is a part of K, the products with that part of x."""
                out = total[:, :T]
                part = lax.rem(plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA), split)
                for h in range(1, split):
                    out = jnp.where(part == h, total[:, h * T : (h + 1) * T], out)
                return out

            def hand_on(total):
                if add:
                    some = plgpu.layout_cast(picked(total), plgpu.Layout.WGMMA_TRANSPOSED)
                    sum_smem.at[wg].transpose((1, 0))[...] = some
                else:
                    sum_smem[wg - leaders] = total

            def sum_of_rows():
                """[T, out_width]: of all warpgroups, and of the parts of K that neighbouring rows of w are."""

                def of(d):
                    shape = T, out_width, split
                    if interpreted:  # which does not take a reshaped reference
                        return sum_smem[d].reshape(shape)
                    return plgpu.load(sum_smem.at[d].reshape(shape), layout=form, optimized=False)

                return sum((of(d) for d in range(1, c.depth)), start=of(0)).sum(axis=2)

            def finish(t, total, weights):
                """Stores the sums of all warpgroups: of the whole tile, or a part."""
                if givers:

                    @pl.when(wg >= leaders)
                    def _():
                        pl.when(t > tile_of(start))(lambda: plgpu.barrier_wait(read.at[leader]))
                        hand_on(total)
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(done.at[leader])

                @pl.when(wg < leaders)
                def _():
                    def given(depth, r):
                        at = sum_smem.at[depth * c.rows + r - leaders]
                        return plgpu.load(at, layout=plgpu.Layout.WGMMA, optimized=False)

                    if add:
                        hand_on(total)
                        plgpu.commit_smem()
                    if givers:
                        plgpu.barrier_wait(done.at[leader])
                    depths = range(1, c.depth)
                    outs = [sum_of_rows() if add else sum((given(d, leader) for d in depths), start=total)]
                    if gate:
                        outs.append(sum((given(d, 1) for d in depths), start=given(0, 1)))
                    if givers:
                        pl.when(t < tile_of(end - 1))(lambda: plgpu.barrier_arrive(read.at[leader]))
                    if add:
                        return store_added(t, outs[0], *weights)
                    if norm:
                        factor = plgpu.load(norm_smem.at[leader], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
                        outs = [out * lax.broadcast_in_dim(factor, out.shape, [1]) for out in outs]
                    out = outs[0]
                    if gate:
                        out, up = (out.astype(dtype).astype(jnp.float32) for out in outs)
                        out = out / (1.0 + jnp.exp(-out)) * up
                    part = lax.axis_index("block") - lax.div(t * steps, jnp.int32(share))
                    # The tile's last block fills the parts that other tiles have and this one has not.
                    beyond = jnp.where((t + 1) * steps <= end, parts, part + 1)
                    place = pl.ds(pl.multiple_of(t * (_UNIT * leaders) + leader * _UNIT, _UNIT), _UNIT)

                    def store(p, out):
                        for m in range(0, M, wide):
                            some = plgpu.layout_cast(
                                out[:, m : m + wide].astype(out_dtype), plgpu.Layout.WGMMA_TRANSPOSED
                            )
                            out_smem.at[leader].transpose((1, 0))[...] = some
                            plgpu.commit_smem()
                            size = min(wide, M - m)
                            target = out_refs[0].at[p, pl.ds(m, size), place]
                            plgpu.copy_smem_to_gmem(out_smem.at[leader, pl.ds(0, size)], target)
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

                    store(part, out)
                    if parts > 1:
                        pl.loop(part + 1, beyond)(lambda p: store(p, jnp.zeros_like(out)))

            def place_of(t):
                return pl.ds(pl.multiple_of(t * out_width, out_width), out_width)

            def store_added(t, out, weight, channel):
                along = lambda x: lax.broadcast_in_dim(x.astype(jnp.float32), out.shape, [1])
                if late:
                    out *= along(channel)
                plgpu.barrier_wait(near)
                before = plgpu.load(out_smem.at[0], layout=form.reduce(2), optimized=False).astype(jnp.float32)
                # Rounded as a matmul's output is, and as the residual stream is.
                out = (before + out.astype(dtype).astype(jnp.float32)).astype(dtype)
                out_smem.at[0][...] = out
                out = out.astype(jnp.float32)
                out_smem.at[1][...] = (out * (along(weight) + offset)).astype(dtype)
                out_refs[2].at[:, t][...] = (out * out).sum(axis=1)
                plgpu.commit_smem()
                for i in range(2):
                    plgpu.copy_smem_to_gmem(out_smem.at[i, pl.ds(0, M)], out_refs[i].at[pl.ds(0, M), place_of(t)])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def of_tile(t, now):
                zero = plgpu.layout_cast(jnp.zeros((_UNIT, columns), jnp.float32), plgpu.Layout.WGMMA)
                weights = ()
                if add:
                    ask = lambda: plgpu.copy_gmem_to_smem(add_ref.at[everything, place_of(t)], out_smem.at[0], near)
                    pl.when(wg == 0)(ask)
                    load = functools.partial(plgpu.load, layout=form.reduce(2).reduce(0), optimized=False)
                    weights = (
                        load(weight_ref.at[place_of(t)]),
                        load(factor_refs[0].at[place_of(t), 0]) if late else None,
                    )
                elif Gs == 1:
                    now = factors(t * steps)
                upto = jnp.minimum((t + 1) * steps, end)
                total, now = lax.fori_loop(turns(d, jnp.maximum(t * steps, start)), turns(d, upto), body, (zero, now))
                finish(t, scaled(total, now[0][0]) if Gs == 1 and not late else total, weights)
                return now

            if norm:

                @pl.when(wg < leaders)
                def _():
                    squares = plgpu.load(squares_ref, layout=_rows_layout(32, 1).reduce(2), optimized=False)
                    norm_smem.at[wg][...] = lax.rsqrt(squares.sum(axis=1) * (1 / K) + eps)
                    plgpu.commit_smem()

            lax.fori_loop(tile_of(start), tile_of(end - 1) + 1, of_tile, () if late else factors(start + d))

        @pl.when(wg == c.rows * c.depth)
        def _feed():
            _set_registers(c, False)

            @pl.loop(0, turns(0, end))
            def _(i):
                slot = _slot(i, c)
                for d in range(c.depth):

                    @pl.when(i < turns(d, end))
                    def _(d=d):
                        pl.when(i >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, slot]))
                        here = start + d + i * c.depth
                        k = lax.rem(here, jnp.int32(steps)) * step
                        for rows, some in wanted(tile_of(here)):
                            if ahead:
                                prefetch = lambda rows=rows: plgpu.async_prefetch(factor_refs[0].at[rows])
                                pl.when((k == 0) | (here == start))(prefetch)
                            at = pl.ds(pl.multiple_of(k, step), step)
                            plgpu.copy_gmem_to_smem(w_ref.at[rows, at], w_smem.at[d, slot, some], full.at[d, slot])
                        for h in range(split):
                            at = pl.ds(pl.multiple_of(h * (K // split) + k, step), step)
                            some = x_smem.at[d, slot, pl.ds(h * T, T)]
                            plgpu.copy_gmem_to_smem(x_ref.at[everything, at], some, full.at[d, slot])

            for d in range(c.depth):  # all slots are free before the block ends

                @pl.loop(0, c.stages)
                def _(i, d=d):
                    last = turns(d, end) + i
                    pl.when(last >= c.stages)(lambda: plgpu.barrier_wait(free.at[d, _slot(last, c)]))

    new = lambda *shape: jax.ShapeDtypeStruct(shape, out_dtype)
    if add:
        out_type = new(M, N), new(M, N), jax.ShapeDtypeStruct((T, tiles), jnp.float32)
    else:
        out_type = (new(parts, M, N // 2 if gate else N),)
    out = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=(
            tiled((c.depth, c.stages, tile, step), w.values.dtype, width),
            tiled((c.depth, c.stages, columns, step), jnp.bfloat16, min(2 * piece, 128)),
            plgpu.SMEM((c.depth, T, _UNIT) if add else (givers, _UNIT, T) if givers else (1, 1, 1), jnp.float32),
            plgpu.SMEM((2, T, out_width) if add else (leaders, wide, _UNIT), out_dtype),
            plgpu.SMEM((leaders, T) if norm else (1, 1), jnp.float32),
            plgpu.Barrier(num_arrivals=split + (2 if gate else 1), num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=c.rows, num_barriers=(c.depth, c.stages)),
            plgpu.Barrier(num_arrivals=max(givers // leaders, 1), num_barriers=leaders),
            plgpu.Barrier(num_barriers=leaders),
            plgpu.Barrier(),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=c.rows * c.depth + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=gate),
        kernel_name="quantized_few" + ("_gate" if gate else "_add" if add else ""),
    )(
        x_order,
        w.values.reshape(N * split, K // split),
        *padded,
        *([norm.squares] if norm else []),
        *([fill(add.to), add.weight] if add else []),
    )
    return tuple(varying_as(x, out) for out in out)


# Pieces.

_COLUMN: Any = plgpu.Layout.WGMMA.reduce(1)


def _rows_layout(width: int, split: int) -> Any:
    """[rows, width, split] in the registers of a warpgroup: a row's numbers in one warp, the last dim in one thread."""
    lanes = min(width, 32)
    rows = 32 // lanes
    tiling = Tiling(((4 * rows, lanes, split), (rows, lanes, split)))
    form = TiledLayout(tiling, (-6,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(form.tiling, form.warp_dims, form.lane_dims, form.vector_dim)


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows * c.depth)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
