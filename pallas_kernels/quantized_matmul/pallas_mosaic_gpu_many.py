"""8-bit x times 8-bit w, for many rows of x: bound by the tensor cores. Hopper GPUs (sm90), Pallas Mosaic GPU.

Persistent: one block for each multiprocessor walks over tiles of the output; its warpgroups multiply 64 rows each, and
one more feeds them through TMA and is at the next tile while they store this one. Rows may stand in groups, each with
a w of its own (the experts of a mixture): tiles, turns and stores are then those of ragged_dot.

Tensor cores add products of float8 to an accumulator that keeps about 14 bits (DeepSeek-V3's technical report measures
it), so sums leave it for float32 registers every `promote` steps of 128. With scales for tiles of 1 x 128 and 128 x 128
they do so after each step, and that is where they are scaled; an accumulator and a sum of 64 x 128 are what fits into
the registers of three warpgroups. int8 is summed exactly, in int32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.array import QuantizedArray, QuantizedRows, repeat_to
from pallas_kernels.quantized_matmul.mosaic_gpu_pieces import varying_as
from pallas_kernels.ragged_dot.mosaic_gpu_pieces import (
    ALIGN,
    SM_COUNT,
    UNIT,
    drain,
    fill,
    for_each_tile,
    slot_of,
    store,
    store_buffer,
    tiled,
    walk,
)
from pallas_kernels.ragged_dot.schedule import Tiles, make_tiles

_STEP = 128  # of K: 128 bytes of a row


@dataclasses.dataclass(frozen=True)
class Config:
    """A block's tile of the output is (warpgroups * 64) x columns."""

    warpgroups: int = 3  # that compute
    columns: int = 128
    stages: int = 4  # steps in flight
    promote: int | None = 1  # steps that are summed in an accumulator; None: all
    wide: int = 8  # tiles side by side that blocks work on at a time: what they read together stays in L2
    blocks: int = SM_COUNT  # or pairs of them
    pair: bool = False  # two blocks take tiles side by side, and each half of the rows that both need


def unfit_many(w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_many` cannot multiply by w, of values [..., N, K]."""
    (N, K), scales = w.values.shape[-2:], w.scales.shape[-2:]
    if w.values.dtype not in (jnp.int4, w.activations):
        return f"takes values in int4 or the dtype of the activations. Got {w.values.dtype} and {w.activations}"
    if w.offsets is not None:
        return "takes no offsets beside activations of 8 bits"
    if K % _STEP or N % UNIT:
        return f"takes K that is a multiple of {_STEP} and N that is one of {UNIT}. Got K={K}, N={N}"
    tiles = w.activations == "float8_e4m3fn" and N % _STEP == 0 and scales == (N // _STEP, K // _STEP)
    if scales[1] > 1 and not tiles:
        return (
            f"takes scales of channels, or beside activations in float8 of tiles of 128 x 128, "
            f"[{N // _STEP}, {K // _STEP}]. Got {scales}, activations in {w.activations}"
        )
    return None


def tuned(scaled: bool, integer: bool, groups: bool, N: int) -> Config:
    """For scales of tiles or of channels, rows in groups or not, N columns."""
    if integer:
        return Config(warpgroups=2, columns=256, promote=None)
    promote = 1 if scaled else 4
    if groups or N <= _STEP:
        return Config(promote=promote)
    return Config(promote=promote, pair=True, blocks=SM_COUNT // 2)


def matmul_many(
    rows: QuantizedRows,
    w: jax.Array,
    w_scales: jax.Array,
    dtype,
    group_sizes: jax.Array | None = None,
    config: Config | None = None,
) -> jax.Array:
    """[M, N]: for the rows of group g, their product with w[g].T, scales and all.

    Args:
      rows: [M, K], K % 128 == 0; one scale each, or K / 128.
      w: [G, N, K], as the rows' values; N % 64 == 0.
      w_scales: float32; [G', N', 1] where G' and N' divide G and N, or [G, N / 128, K / 128].
      dtype: of the output.
      group_sizes: int32 [G], as ragged_dot has it; None: G = 1, all rows.
    """
    x, x_scales = rows.values, rows.scales.T  # what a step needs is contiguous
    (M, K), (G, N, _), scaled = x.shape, w.shape, x_scales.shape[0] > 1
    integer = x.dtype == jnp.int8
    c = config or tuned(scaled, integer, group_sizes is not None, N)
    assert not scaled or (c.promote == 1 and c.columns == _STEP), c
    kind = jnp.int32 if integer else jnp.float32
    height, depth = c.warpgroups * UNIT, K // _STEP
    promote = c.promote and max(p for p in range(1, c.promote + 1) if depth % p == 0)
    span = 2 * c.columns if c.pair else c.columns
    across = -(-N // span)
    tiles = _all_rows(M, height) if group_sizes is None else make_tiles(group_sizes, M, height, ALIGN, unit=UNIT)
    x = jnp.pad(x, ((0, -M % ALIGN), (0, 0)))  # TMA takes whole units of 8 rows
    # Loads of a tile that begins at any row are clipped where TMA makes them.
    x_scales = jnp.pad(x_scales, ((0, 0), (0, -M % ALIGN + (0 if scaled else height))))
    if scaled:
        w_scales = repeat_to(w_scales, (G, *w_scales.shape[1:]))
    else:
        w_scales = jnp.pad(repeat_to(w_scales, (G, N, 1))[..., 0], ((0, 0), (0, across * span - N)))

    def kernel(
        x_ref,
        xs_ref,
        w_ref,
        ws_ref,
        table_ref,
        count_ref,
        short_ref,
        out_ref,
        x_smem,
        w_smem,
        s_smem,
        out_smem,
        *barriers,
    ):
        full, free = barriers
        wg = lax.axis_index("wg")
        count = count_ref[0] + 0
        # As in ragged_dot: short groups wait for memory, and come last.
        late = (short_ref[0] * across >= c.blocks) if across <= c.wide else False

        def tile(i):
            """Of the i-th tile: group, first row, first column, its group's rows [begin, end), steps."""
            t, n = walk(i, count, across, c.wide)
            group, start, begin, end = (table_ref[t, x] + 0 for x in range(4))
            column = n * span + (lax.axis_index("pair") * c.columns if c.pair else 0)
            return jnp.minimum(group, G - 1), start, column, begin, end, jnp.where(group < G, depth, 0)

        @pl.when(wg < c.warpgroups)
        def _compute():
            _set_registers(c, True)
            column_layout, row_layout = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
            shape = (UNIT, c.columns)
            rowwise = lambda v: lax.broadcast_in_dim(v, shape, [0])
            own = pl.ds(wg * UNIT, UNIT)

            def multiply(slot, acc_ref):
                plgpu.wgmma(acc_ref, x_smem.at[slot, own], w_smem.at[slot].transpose((1, 0)))

            def all_steps(steps, done):
                """One accumulator for all of K."""

                def scope(acc_ref):
                    @pl.loop(0, steps)
                    def _(k):
                        slot = slot_of(done + k, c)
                        plgpu.barrier_wait(full.at[slot])
                        multiply(slot, acc_ref)
                        plgpu.wgmma_wait(1)  # the step before has been read
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(done + k - 1, c)]))

                    acc = acc_ref[...]
                    pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(done + steps - 1, c)]))
                    return acc

                return pl.run_scoped(scope, plgpu.ACC(shape, kind)).astype(jnp.float32)

            def promoted(promote: int, steps, done, group, column):
                """A sum in float32 to which an accumulator is added, and scaled, every few steps."""
                across = jnp.minimum(lax.div(column, jnp.int32(_STEP)), ws_ref.shape[1] - 1)
                tile_of = lambda k: ws_ref[group, across, jnp.minimum(k, depth - 1)]

                def few_steps(i, carry):
                    total, w_scale = carry
                    following = tile_of(i + 1) if scaled else w_scale
                    slots = [slot_of(done + i * promote + j, c) for j in range(promote)]
                    plgpu.barrier_wait(full.at[slots[0]])
                    scales = plgpu.load(s_smem.at[slots[0], own], layout=row_layout) if scaled else None

                    def scope(acc_ref):
                        for j, slot in enumerate(slots):
                            if j:
                                plgpu.barrier_wait(full.at[slot])
                            multiply(slot, acc_ref)
                            if j:
                                plgpu.wgmma_wait(1)
                                plgpu.barrier_arrive(free.at[slots[j - 1]])
                        return acc_ref[...]

                    acc = pl.run_scoped(scope, plgpu.ACC(shape, kind))
                    plgpu.barrier_arrive(free.at[slots[-1]])
                    return total + (acc if scales is None else acc * rowwise(scales * w_scale)), following

                total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                start = tile_of(0) if scaled else jnp.float32(1)
                return lax.fori_loop(0, lax.div(steps, jnp.int32(promote)), few_steps, (total, start))[0]

            def one_tile(i, done):
                group, start, column, begin, end, steps = tile(i)
                row = start + wg * UNIT

                @pl.when(row < end)
                def _():
                    if promote is None:
                        total = all_steps(steps, done)
                    else:
                        total = promoted(promote, steps, done, group, column)
                    if not scaled:
                        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
                        # Past the groups: the zeros after the last row's, whatever these rows hold.
                        here = pl.ds(pl.multiple_of(jnp.where(steps > 0, row, x_ref.shape[0]), ALIGN), UNIT)
                        total = total * rowwise(load(xs_ref.at[0, here], row_layout))
                        here = pl.ds(pl.multiple_of(column, c.columns), c.columns)
                        total = total * lax.broadcast_in_dim(load(ws_ref.at[group, here], column_layout), shape, [1])
                    store(total, out_smem, out_ref, dtype, row, column, begin, end)

                @pl.when(row >= end)  # the other warpgroups have the tensor cores alone
                def _():
                    @pl.loop(0, steps)
                    def _(k):
                        slot = slot_of(done + k, c)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.barrier_arrive(free.at[slot])

                return done + steps

            for_each_tile(c, count * across, one_tile, late)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == c.warpgroups)
        def _feed():
            _set_registers(c, False)

            def one_tile(i, done):
                group, start, column, _, _, steps = tile(i)
                here = pl.ds(pl.multiple_of(start, ALIGN), height)
                columns = pl.ds(pl.multiple_of(column, c.columns), c.columns)

                def copy(k, slot):
                    at = pl.ds(pl.multiple_of(k * _STEP, _STEP), _STEP)
                    both = "pair" if c.pair else None
                    plgpu.copy_gmem_to_smem(x_ref.at[here, at], x_smem.at[slot], full.at[slot], collective_axes=both)
                    plgpu.copy_gmem_to_smem(w_ref.at[group, columns, at], w_smem.at[slot], full.at[slot])
                    if scaled:
                        plgpu.copy_gmem_to_smem(xs_ref.at[k, here], s_smem.at[slot], full.at[slot])

                return fill(c, copy, steps, done, free)

            drain(c, for_each_tile(c, count * across, one_tile, late), free)

    slots: Any = {"num_arrivals": c.warpgroups, "num_barriers": c.stages}
    free = plgpu.ClusterBarrier(collective_axes=("pair",), **slots) if c.pair else plgpu.Barrier(**slots)
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], N), dtype),
        scratch_types=(
            tiled((c.stages, height, _STEP), x.dtype),
            tiled((c.stages, c.columns, _STEP), w.dtype),
            plgpu.SMEM((c.stages, height) if scaled else (1, 1), jnp.float32),
            store_buffer(c, dtype),
            plgpu.Barrier(num_arrivals=3 if scaled else 2, num_barriers=c.stages),
            free,
        ),
        grid=(c.blocks,),
        grid_names=("block",),
        cluster=(2,) if c.pair else (),
        cluster_names=("pair",) if c.pair else (),
        num_threads=c.warpgroups + 1,
        thread_name="wg",
        kernel_name="quantized_many" if group_sizes is None else "quantized_grouped",
    )(x, x_scales, w, w_scales, *tiles)
    return varying_as(x, out)[:M]


def _all_rows(M: int, block: int) -> Tiles:
    """The table of `make_tiles` for one group of all rows, a constant."""
    start = np.arange(0, M, block, dtype=np.int32)
    table = np.stack([np.zeros_like(start), start, start, np.minimum(start + block, M)], axis=1)
    return Tiles(*(jnp.asarray(x, jnp.int32) for x in (table, [len(start)], [0])))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    most = {2: (240, 24), 3: (160, 32)}[c.warpgroups]
    plgpu.set_max_registers(most[0 if computes else 1], action="increase" if computes else "decrease")
