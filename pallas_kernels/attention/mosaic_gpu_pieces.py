"""What the forward and backward kernels for Hopper share."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import Inputs, Options, mask_arrays

LOG2E = math.log2(math.e)
ROWS = 64  # rows of one warpgroup: a wgmma is 64 rows high
_L2_BYTES = 32 * 2**20  # what is streamed at one time should fit in the L2 beside the rest


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the kernels; each warpgroup holds 64 rows of its output."""

    block_kv: int = 128  # forward: keys in a step
    stages: int = 2  # forward: steps in flight
    warpgroups: int = 2  # forward: that compute, 64 queries each
    block_kv_dq: int = 64
    stages_dq: int = 2
    block_q_dkv: int = 64
    stages_dkv: int = 2
    warpgroups_bwd: int = 2  # that compute, in a block of dq or of dk and dv
    split_dkv: bool = False  # dk and dv are made apart, since registers do not hold both
    fused: bool = False  # dq, dk and dv are made in one kernel


class Mask:
    """The mask and the bias inside of a block, from the arrays that a kernel receives for them.

    Segment ids and positions across a block of logits come through shared memory, with the keys or queries that they
    belong to: a thread needs a quarter of them, and from global memory it would wait for each. Those down a block are
    read once for a tile.

    keys_down: blocks of logits have keys down and queries across, and so has the bias that the kernel receives.
    """

    def __init__(self, padded: Inputs, options: Options, keys: int, padded_keys: int, keys_down: bool = False):
        self.options, self.keys, self.ragged = options, keys, keys != padded_keys
        self.q_dim = int(keys_down)  # of a block of logits
        self.names, self.arrays = mask_arrays(padded)
        self.across = [name for name in self.names if name.startswith("q_" if keys_down else "kv_")]
        bias = padded.bias
        self.per_query = bias is not None and bias.shape[2] > 1
        if bias is not None:
            self.names.append("bias")
            self.arrays.append(bias.swapaxes(2, 3) if keys_down and self.per_query else bias)

    def add_bias(self, refs, s, b, n, q_start, kv_start):
        """s, such that scale times it holds the bias of head n."""
        q_dim = self.q_dim
        if "bias" not in self.names:
            return s
        ref = dict(zip(self.names, refs, strict=True))["bias"]
        at = lax.rem(b, jnp.int32(ref.shape[0])), lax.rem(n, jnp.int32(ref.shape[1]))
        layout = plgpu.Layout.WGMMA
        if self.per_query:
            starts = (q_start, kv_start) if q_dim == 0 else (kv_start, q_start)
            block = (pl.ds(start, size) for start, size in zip(starts, s.shape))
            bias = plgpu.load(ref.at[*at, *block], layout=layout, optimized=False).astype(jnp.float32)
        else:
            keys = ref.at[*at, 0, pl.ds(kv_start, s.shape[1 - q_dim])]
            bias = plgpu.load(keys, layout=layout.reduce(q_dim), optimized=False).astype(jnp.float32)
            bias = lax.broadcast_in_dim(bias, s.shape, [1 - q_dim])
        return s + bias * (1 / self.options.scale)

    def smem(self, stages: int, size: int) -> list:
        """Where ids and positions across a block stand."""
        return [plgpu.SMEM((stages, size), jnp.int32) for _ in self.across]

    def feed(self, refs, b, places, smem, slot, barrier) -> None:
        """Their copies to a slot; each is one more arrival at the barrier."""
        for name, to in zip(self.across, smem, strict=True):
            plgpu.copy_gmem_to_smem(refs[self.names.index(name)].at[b, places], to.at[slot], barrier)

    def down(self, refs, b, places) -> dict:
        """What `keep` needs for the rows of a tile."""
        found = {}
        for name, ref in zip(self.names, refs, strict=True):
            if name == "window":
                found[name] = ref[0]
            elif name != "bias" and name not in self.across:
                layout = plgpu.Layout.WGMMA.reduce(1)
                found[name] = plgpu.load(ref.at[b, places], layout=layout, optimized=False)
                if name.endswith("segment_ids"):  # padding sees nothing and is not seen
                    found[name] = jnp.where(found[name] == 0, jnp.iinfo(jnp.int32).min, found[name])
        return found

    def keep(self, down, smem, slot, shape, q_start, kv_start, at: int = 0):
        """Which pairs of a block see each other: what `down` gave for its rows, and `smem` at `slot` for the rest, from
        the `at`-th on."""
        q_dim, kv_dim = self.q_dim, 1 - self.q_dim
        across = dict(zip(self.across, smem, strict=True))

        def along(name, dim):
            if name in across:
                layout = plgpu.Layout.WGMMA.reduce(0)
                values = plgpu.load(across[name].at[slot, pl.ds(at, shape[1])], layout=layout)
            else:
                values = down[name]
            return lax.broadcast_in_dim(values, shape, [dim])

        layout = plgpu.Layout.WGMMA.reduce(1)
        rows = lambda: plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=layout)
        start_down, start_across = (q_start, kv_start) if q_dim == 0 else (kv_start, q_start)
        conditions = []
        left, right = self.options.window
        if self.options.causal:
            right = 0 if right is None else min(right, 0)
        if left is not None or right is not None or "window" in down:
            if "q_positions" in self.names:
                ahead, of_keys = along("kv_positions", kv_dim) - along("q_positions", q_dim), True
            else:
                ahead, of_keys = _columns(shape, start_across - start_down - rows()), q_dim == 0
            far = down["window"] - 1 if "window" in down else None
            limits = [(left, False), (right, True), (far, False)]
            limits += [(far, True)] if right is None else []
            for limit, keys_ahead in limits:
                if limit is not None:
                    conditions.append(ahead <= limit if keys_ahead == of_keys else ahead >= -limit)
        if "q_segment_ids" in self.names:
            conditions.append(along("q_segment_ids", q_dim) == along("kv_segment_ids", kv_dim))
        elif self.ragged or not conditions:  # with nothing to hide only a ragged last block is not full
            if q_dim == 0:
                start = plgpu.layout_cast(jnp.full(shape[:1], start_across, jnp.int32), layout)
                conditions.append(_columns(shape, start) < self.keys)
            else:
                conditions.append(lax.broadcast_in_dim(start_down + rows(), shape, [0]) < self.keys)
        return functools.reduce(lambda x, y: x & y, conditions)


def _columns(shape: tuple[int, int], starts: jax.Array) -> jax.Array:
    """The column of each number of an accumulator, plus a start for each row; made anew in each step.

    As an iota they are 32 and more values that no loop changes: LLVM computes them once before all loops, ptxas has no
    registers for them and spills them, and each masked step waits for them one by one. Here a thread has one for each
    of its two rows, and what is compared with a limit takes one instruction.
    """
    if _dispatch.interpreted("gpu"):
        return lax.broadcasted_iota(jnp.int32, shape, 1) + lax.broadcast_in_dim(starts, shape, [0])
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    rows = plgpu.Layout.WGMMA.reduce(1)

    @plgpu.inline_mgpu(
        arg_types=(rows,), return_type=plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=plgpu.Layout.WGMMA)
    )
    def columns(ctx, starts):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
        # Volatile, and made from what a step changes: neither compiler may move it out of a loop.
        ask = lambda start: llvm.inline_asm(i32, [start], _FIRST_COLUMN, "=r,r", has_side_effects=True)
        firsts = [ask(start) for start in starts.registers.flat]
        nsw = arith.IntegerOverflowFlags.nsw  # so that what is added may go over to a limit
        for at in np.ndindex(registers.shape):
            add = [arith.constant(i32, ir.IntegerAttr.get(i32, column(at, i))) for i in (0, 1)]
            pair = [arith.addi(firsts[row(at)], x, overflow_flags=nsw) for x in add]
            registers[at] = vector.from_elements(ir.VectorType.get((2,), i32), pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=True)

    return columns(starts)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def any_of_warp(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For bool [64] of a row's layout: whether any row that a thread's warp holds is set, for each row and as an int32.

    The number differs from warp to warp: a branch on it may hold nothing in which warps meet. The interpreter, which
    knows no warps, leaves the rows as they are and takes the branch.
    """
    if _dispatch.interpreted("gpu"):
        return rows, jnp.int32(1)
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm, vector

    layout = plgpu.Layout.WGMMA.reduce(1)
    types = [plgpu.ShapeDtypeStruct(s, jnp.int32, layout=x) for s, x in ((rows.shape, layout), ((), _SPLAT))]

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=types)
    def vote(ctx, x):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        mine = [vector.extract(r, dynamic_position=[], static_position=[0]) for r in x.registers.flat]
        found = llvm.inline_asm(i32, [functools.reduce(arith.ori, mine)], _VOTE, "=r,r", has_side_effects=True)
        registers = np.full(x.registers.shape, vector.from_elements(ir.VectorType.get((1,), i32), [found]), object)
        of_rows = mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=True)
        return [of_rows, mgpu.FragmentedArray.splat(found, (), is_signed=True)]

    of_rows, scalar = vote(rows.astype(jnp.int32))  # pyright: ignore[reportCallIssue]  # as above
    return of_rows > 0, scalar


_SPLAT = plgpu.Layout.WG_SPLAT
_VOTE = """{
    .reg .pred any;
    setp.ne.s32 any, $1, 0;
    vote.sync.any.pred any, any, 0xffffffff;
    selp.s32 $0, 1, 0, any;
}"""


def row(register) -> int:
    """Which of its lane's two rows a register of an accumulator is of."""
    return register[4]


def column(register, i: int) -> int:
    """Of number i of a register of an accumulator, from the first column of its lane."""
    return 8 * register[1] + i


_FIRST_COLUMN = """{
    .reg .b32 lane;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 3;
    shl.b32 lane, lane, 1;
    add.s32 $0, lane, $1;
}"""


def read_bounds(ranges_ref, b, t):
    """One row of a range table, which has one row for all batches or one for each."""
    row = lax.rem(b, jnp.int32(ranges_ref.shape[0]))
    # Under shard_map with check_vma a value read varies over mesh axes and a sum in a kernel does not: loops want sums.
    return tuple(ranges_ref[row, t, i] + 0 for i in range(4))


def read_count(schedule_ref):
    """How many tiles this block of a persistent kernel has; see `schedule.describe`."""
    return schedule_ref[lax.axis_index("block"), 0, 0] + 0


def read_tile(schedule_ref, w, wg: Any = 0) -> Any:
    """Batch, head, tile, first step and one past the last, and a warpgroup's bounds, of the w-th tile."""
    read = lambda i: schedule_ref[lax.axis_index("block"), w + 1, i] + 0
    return *(read(i) for i in range(5)), tuple(read(5 + 4 * wg + i) for i in range(4))


def find_tile(schedule_ref, w, heads: int, tiles: int):
    """Batch, head and tile, the w-th of this block; see schedule.py."""
    x = schedule_ref[lax.axis_index("block"), w + 1] + 0
    pair, t = lax.div(x, jnp.int32(tiles)), lax.rem(x, jnp.int32(tiles))
    return lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads)), t


def three_loops(step, bounds, carry):
    """step(j, carry, masked) over the blocks of one row of a range table."""
    lo, full_lo, full_hi, hi = bounds
    carry = lax.fori_loop(lo, full_lo, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(full_lo, full_hi, functools.partial(step, masked=False), carry)
    return lax.fori_loop(full_hi, hi, functools.partial(step, masked=True), carry)


def feed_ring(steps, stages: int, *buffers):
    """Copies for each step, once the computing warpgroups have freed its slot; at the end waits for all slots.

    Each buffer is (barriers that say a slot is free, copy(step, slot)).
    """

    @pl.loop(0, steps + stages)
    def _(i):
        slot = slot_of(i, stages)
        for free, copy in buffers:
            pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            pl.when(i < steps)(lambda copy=copy: copy(i, slot))


def mma(acc: jax.Array, a: jax.Array, b_ref, acc_ref=None) -> Any:
    """acc + a @ b with a in registers, which the interpreter's wgmma does not take; in flight in acc_ref if given."""
    if _dispatch.interpreted("gpu"):
        return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    if acc_ref is not None:
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, a, b_ref)
        return None
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def before(x: jax.Array, more, barrier) -> jax.Array:
    """x, and a wait for the next step's block, if there is one; the loop in this wait ends a basic block.

    Without that ptxas moves the exponentials that make x below the end of the wgmma that they should run under.
    """
    x = lax.optimization_barrier(x)
    pl.when(more)(lambda: plgpu.barrier_wait(barrier))
    return x


def cap_logits(s: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """q @ k such that scale times it is the capped logit, and the derivative."""
    if options.soft_cap is None:
        return s, None
    ratio = options.soft_cap / options.scale
    tanh = jnp.tanh(s * (1 / ratio))
    return tanh * ratio, 1.0 - tanh * tanh


def slot_of(i: jax.Array, stages: int) -> jax.Array:
    return lax.rem(i, jnp.int32(stages))


def make_grid(B: int, heads: int, tiles: int, bytes_per_head: int):
    """The grid, and the function that finds (batch, head, tile) in it.

    Pairs of batch and head run in groups whose streamed operands fit in the L2; in a group the tile index varies
    slowest, so all pairs start on the tiles that take longest.
    """
    pairs = B * heads
    group = heads_at_once(pairs, bytes_per_head)

    def locate():
        pair = lax.axis_index("group") * group + lax.axis_index("pair")
        return lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads)), lax.axis_index("tile")

    return {"group": pairs // group, "tile": tiles, "pair": group}, locate


def heads_at_once(heads: int, bytes_per_head: int, share: int = 1) -> int:
    """The divisor of `heads` such that what so many of them stream fits in the L2, or in a part of it: the forward and
    dq are 1 to 4 % faster with half (an H100), the others not; with a quarter packed rows are 14 % slower."""
    fit = max(1, _L2_BYTES // (share * max(bytes_per_head, 1)))
    return max(d for d in range(1, heads + 1) if heads % d == 0 and d <= fit)


def accumulator(width: int):
    return plgpu.ACC((ROWS, width), jnp.float32)


def tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory that TMA writes and wgmma reads."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    tile = transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, transforms.SwizzleTransform(128)))


def set_registers(wgs: int, count: int) -> None:
    """Registers go from the warpgroup that feeds to those that compute; one alone starts with all it can use."""
    if wgs > 1:
        plgpu.set_max_registers(count, action="increase" if count > 512 // (wgs + 1) else "decrease")


def launch(kernel, name: str, out_type, grid, scratch, operands, threads: int = 3):
    """A block of that many warpgroups for each place in the grid.

    What calls this is under `jax.jit(inline=True)`, which leaves the program as it is and traces equal calls once, so
    that Mosaic lowers and compiles one kernel for all of them: each layer's recomputation, each step of a ring.
    """
    out = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="wg",
        # A row lies in one warp: no reduction needs shared memory, and dq has none left.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
    )(*operands)
    axes = tuple(sorted(jax.typeof(operands[0]).mat.varying))
    return [jax.lax.pcast(x, axes, to="varying") if axes else x for x in out]
