"""Tiles of the kernel for few rows, and its ends: what is stored of each, by the kernel that sums it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import QuantizedArray

UNIT = 64  # rows of a wgmma
SM_COUNT = 132  # of an H100 or H200 SXM
_WIDE = 16  # rows of x whose results are stored at a time


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = 1  # warpgroups along N
    depth: int = 2  # warpgroups along K
    stages: int = 3  # steps in flight, of each of `depth`
    width: int = 128  # bytes of a row of w in a step
    blocks: int = SM_COUNT  # at most


class Add(NamedTuple):
    """What becomes of a product: added to the residual stream, and made ready for the next norm."""

    to: jax.Array  # [M, N]
    weight: jax.Array  # [N], of the next norm; with offset added, the sum is multiplied with it
    offset: float


class Tiles:
    """How x [M, K] and w [N, K] are taken apart: rows of w into tiles, a tile along K into steps, which blocks share.

    split: parts of K that are rows of a tile beside each other. halves: of w, from each of which a tile has rows.
    """

    def __init__(self, M: int, w: QuantizedArray, c: Config, split: int = 1, halves: int = 1):
        (self.N, self.K), self.M, self.c, self.split, self.halves = w.values.shape, M, c, split, halves
        self.T = filled(M)
        self.step = step_of(self.K // split, w.values.dtype, c.width)  # of K
        self.steps = -(-(self.K // split) // self.step)  # of a tile
        self.rows = c.rows * UNIT
        self.count = -(-self.N * split // self.rows)
        whole = split > 1 or halves > 1
        assert not whole or (c.rows == halves and self.N * split % self.rows == 0)
        self.share = (-(-self.count // c.blocks) * self.steps) if whole else share_of(self.count, self.steps, c)
        # A tile's steps may be those of several blocks, each with a sum of its own.
        ends = ((t * self.steps, (t + 1) * self.steps - 1) for t in range(self.count))
        self.parts = max(last // self.share - first // self.share + 1 for first, last in ends)
        self.leaders = c.rows // halves  # warpgroups that collect sums and store them, the first ones
        self.givers = c.rows * c.depth - self.leaders
        self.late = split > 1 and w.scales.shape[1] == 1  # a channel's scale comes after the sum of a row's parts

    def own(self, t, r):
        """The rows of w that are the r-th warpgroups' of a tile: with halves, those of the r-th."""
        if self.halves > 1:
            return pl.ds(r * (self.N // 2) + pl.multiple_of(t * UNIT, UNIT), UNIT)
        return pl.ds(pl.multiple_of(t * self.rows + r * UNIT, UNIT), UNIT)

    def wanted(self, t):
        """Rows of w, and where they go in a tile."""
        if self.halves > 1:
            return [(self.own(t, r), pl.ds(r * UNIT, UNIT)) for r in range(2)]
        return [(pl.ds(pl.multiple_of(t * self.rows, self.rows), self.rows), pl.ds(0, self.rows))]


def filled(M: int) -> int:
    """Rows of x, filled up."""
    return max(8, 1 << (M - 1).bit_length())


def step_of(K: int, dtype, width: int = 128) -> int:
    """The numbers in `width` bytes of a row of w, or as large a part of them as divides K."""
    step = width * 8 // jax.dtypes.itemsize_bits(dtype)
    while K % step:
        step //= 2
    return step


def share_of(tiles: int, steps: int, c: Config) -> int:
    """How many steps a block takes, of tiles of `steps` each: whole tiles, whose sums need no addition, where most
    multiprocessors have some; memory is as fast to three quarters of them."""
    whole = -(-tiles // c.blocks) * steps
    if 4 * -(-tiles * steps // whole) >= 3 * c.blocks:
        return whole
    return max(-(-tiles * steps // c.blocks), min(2 * c.depth, whole))


class Refs(NamedTuple):
    """The memory that an end meets in the kernel."""

    factors: list[Any]  # scales, or scales and offsets, of rows of w
    operands: list[Any]
    outs: list[Any]
    sums: Any
    out: Any  # on its way to outs
    near: Any  # a barrier
    every: Any  # T rows of which there may be M


class End(NamedTuple):
    name: str
    out_type: tuple[jax.ShapeDtypeStruct, ...]
    scratch: tuple[Any, Any]  # of Refs: sums, out
    give: Callable  # (refs, wg, total): a warpgroup's sums to shared memory
    collect: Callable  # (refs, leader, total): the sums of all, a list, in the leader's registers
    store: Callable  # (refs, leader, t, stop, sums, what prepare gave): of tile t, or its part that a block's stop ends
    prepare: Callable = lambda refs, wg, t: None  # ahead of a tile's steps
    operands: tuple[jax.Array, ...] = ()
    leaders_give: bool = False  # too: else their sums stay in registers
    approx_math: bool = False


def parts(tiles: Tiles, dtype) -> End:
    """[P, M, N] whose sum over P is the product: float32, or one part in `dtype`."""
    M, T, c, leaders = tiles.M, tiles.T, tiles.c, tiles.leaders
    dtype = jnp.float32 if tiles.parts > 1 else dtype

    def give(refs, wg, total):
        refs.sums[wg - leaders] = total

    def collect(refs, leader, total):
        def given(d, r):
            return plgpu.load(refs.sums.at[d * c.rows + r - leaders], layout=plgpu.Layout.WGMMA, optimized=False)

        first = sum((given(d, leader) for d in range(1, c.depth)), start=total)
        others = (sum((given(d, r) for d in range(1, c.depth)), start=given(0, r)) for r in range(1, tiles.halves))
        return [first, *others]  # of each half

    def store(refs, leader, t, stop, sums, _):
        part = lax.axis_index("block") - lax.div(t * tiles.steps, jnp.int32(tiles.share))
        # The tile's last block fills the parts that other tiles have and this one has not.
        beyond = jnp.where((t + 1) * tiles.steps <= stop, tiles.parts, part + 1)
        place = pl.ds(pl.multiple_of(t * (UNIT * leaders) + leader * UNIT, UNIT), UNIT)

        def store_part(p, out):
            for m in range(0, M, _WIDE):
                some = plgpu.layout_cast(out[:, m : m + _WIDE].astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                refs.out.at[leader].transpose((1, 0))[...] = some
                plgpu.commit_smem()
                size = min(_WIDE, M - m)
                target = refs.outs[0].at[p, pl.ds(m, size), place]
                plgpu.copy_smem_to_gmem(refs.out.at[leader, pl.ds(0, size)], target)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        store_part(part, sums[0])
        if tiles.parts > 1:
            pl.loop(part + 1, beyond)(lambda p: store_part(p, jnp.zeros_like(sums[0])))

    out_type = jax.ShapeDtypeStruct((tiles.parts, M, tiles.N // tiles.halves), dtype)
    sums = plgpu.SMEM((tiles.givers, UNIT, T) if tiles.givers else (1, 1, 1), jnp.float32)
    scratch = sums, plgpu.SMEM((leaders, min(T, _WIDE), UNIT), dtype)
    return End("quantized_few", (out_type,), scratch, give, collect, store)


def gate(tiles: Tiles, dtype) -> End:
    """silu(gate) * up [1, M, N/2] where the product, rounded to `dtype`, is [gate, up]; a tile has rows of both."""
    plain = parts(tiles, dtype)

    def store(refs, leader, t, stop, sums, _):
        out, up = (x.astype(dtype).astype(jnp.float32) for x in sums)
        plain.store(refs, leader, t, stop, [out / (1.0 + jnp.exp(-out)) * up], _)

    return plain._replace(name="quantized_few_gate", store=store, approx_math=True)


def added(tiles: Tiles, dtype, add: Add) -> End:
    """add.to plus the product, what is to be normed of it, and squares of each tile; see Add and Norm."""
    M, T, split, depth, width = tiles.M, tiles.T, tiles.split, tiles.c.depth, UNIT // tiles.split
    form = rows_layout(width, split)  # of the rows of a tile's results
    place_of = lambda t: pl.ds(pl.multiple_of(t * width, width), width)

    def prepare(refs, wg, t):
        to_ref, weight_ref = refs.operands
        ask = lambda: plgpu.copy_gmem_to_smem(to_ref.at[refs.every, place_of(t)], refs.out.at[0], refs.near)
        pl.when(wg == 0)(ask)
        load = functools.partial(plgpu.load, layout=form.reduce(2).reduce(0), optimized=False)
        return load(weight_ref.at[place_of(t)]), load(refs.factors[0].at[place_of(t), 0]) if tiles.late else None

    def give(refs, wg, total):
        """Of each row of w, which is a part of K, the products with that part of x."""
        out = total[:, :T]
        part = lax.rem(plgpu.broadcasted_iota(jnp.int32, out.shape, 0, layout=plgpu.Layout.WGMMA), split)
        for h in range(1, split):
            out = jnp.where(part == h, total[:, h * T : (h + 1) * T], out)
        refs.sums.at[wg].transpose((1, 0))[...] = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)

    def collect(refs, leader, total):
        """[T, width]: of all warpgroups, and of the parts of K that neighbouring rows of w are."""

        def of(d):
            if _dispatch.interpreted("gpu"):  # which does not take a reshaped reference
                return refs.sums[d].reshape(T, width, split)
            return plgpu.load(refs.sums.at[d].reshape(T, width, split), layout=form, optimized=False)

        return [sum((of(d) for d in range(1, depth)), start=of(0)).sum(axis=2)]

    def store(refs, leader, t, stop, sums, prepared):
        (out,), (weight, channel) = sums, prepared
        along = lambda x: lax.broadcast_in_dim(x.astype(jnp.float32), out.shape, [1])
        if tiles.late:
            out *= along(channel)
        plgpu.barrier_wait(refs.near)
        before = plgpu.load(refs.out.at[0], layout=form.reduce(2), optimized=False).astype(jnp.float32)
        # Rounded as a matmul's output is, and as the residual stream is.
        out = (before + out.astype(dtype).astype(jnp.float32)).astype(dtype)
        refs.out.at[0][...] = out
        out = out.astype(jnp.float32)
        refs.out.at[1][...] = (out * (along(weight) + add.offset)).astype(dtype)
        refs.outs[2].at[:, t][...] = (out * out).sum(axis=1)
        plgpu.commit_smem()
        for i in range(2):
            plgpu.copy_smem_to_gmem(refs.out.at[i, pl.ds(0, M)], refs.outs[i].at[pl.ds(0, M), place_of(t)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    stream, squares = jax.ShapeDtypeStruct((M, tiles.N), dtype), jax.ShapeDtypeStruct((T, tiles.count), jnp.float32)
    scratch = plgpu.SMEM((depth, T, UNIT), jnp.float32), plgpu.SMEM((2, T, width), dtype)
    operands = fill(add.to, T), add.weight
    out_type = stream, stream, squares
    return End("quantized_few_add", out_type, scratch, give, collect, store, prepare, operands, leaders_give=True)


def rows_layout(width: int, split: int) -> Any:
    """[rows, width, split] in the registers of a warpgroup: a row's numbers in one warp, the last dim in one thread."""
    lanes = min(width, 32)
    rows = 32 // lanes
    tiling = Tiling(((4 * rows, lanes, split), (rows, lanes, split)))
    form = TiledLayout(tiling, (-6,), (-3, -2), -1, _check_canonical=False).canonicalize()
    return plgpu.Layout.TILED(form.tiling, form.warp_dims, form.lane_dims, form.vector_dim)


def fill(x: jax.Array, rows: int) -> jax.Array:
    """TMA fills up with zeros, but not where it is interpreted."""
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))) if _dispatch.interpreted("gpu") else x
