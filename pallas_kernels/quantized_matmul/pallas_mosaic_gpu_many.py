"""8-bit x times 8-bit w, for many rows of x: bound by the tensor cores. Hopper GPUs (sm90), Pallas Mosaic GPU.

Persistent: one block for each multiprocessor walks over tiles of the output; its warpgroups multiply 64 rows each, and
one more feeds them through TMA and is at the next tile while they store this one.

Tensor cores add products of float8 to an accumulator that keeps about 14 bits (DeepSeek-V3's technical report measures
it), so sums leave it for float32 registers every `promote` steps of 128. With scales for tiles of 1 x 128 and 128 x 128
they do so after each step, and that is where they are scaled; an accumulator and a sum of 64 x 128 are what fits into
the registers of three warpgroups. int8 is summed exactly, in int32.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.quantized_matmul.array import QuantizedArray, repeat_to
from pallas_kernels.quantized_matmul.pallas_mosaic_gpu_few import varying_as

_UNIT = 64  # rows of a wgmma
_STEP = 128  # of K: 128 bytes of a row
_ALIGN = 8  # rows of a swizzled tile
_SM_COUNT = 132  # of an H100 or H200 SXM; on a smaller one the last blocks run after the first


@dataclasses.dataclass(frozen=True)
class Config:
    """A block's tile of the output is (warpgroups * 64) x columns."""

    warpgroups: int = 3  # that compute
    columns: int = 128
    stages: int = 4  # steps in flight
    promote: int | None = 1  # steps that are summed in an accumulator; None: all
    wide: int = 8  # tiles side by side that blocks work on at a time: what they read together stays in L2
    blocks: int = _SM_COUNT


def unfit_many(w: QuantizedArray) -> str | None:
    """None, or the reason why `matmul_many` cannot multiply by w."""
    (N, K), scales = w.values.shape, w.scales.shape
    if w.values.dtype not in (jnp.int4, w.activations):
        return f"takes values in int4 or the dtype of the activations. Got {w.values.dtype} and {w.activations}"
    if w.offsets is not None:
        return "takes no offsets beside activations of 8 bits"
    if K % _STEP or N % _UNIT:
        return f"takes K that is a multiple of {_STEP} and N that is one of {_UNIT}. Got K={K}, N={N}"
    if scales[1] > 1 and (N % _STEP or scales != (N // _STEP, K // _STEP)):
        return f"takes scales of channels, or of tiles of 128 x 128, [{N // _STEP}, {K // _STEP}]. Got {scales}"
    return None


def tuned(grouped: bool, integer: bool) -> Config:
    if grouped:
        return Config()
    return Config(warpgroups=2, columns=256, stages=4, promote=None) if integer else Config(promote=4)


def matmul_many(
    x: jax.Array, x_scales: jax.Array, w: jax.Array, w_scales: jax.Array, dtype, config: Config | None = None
) -> jax.Array:
    """[M, N]: the sum over g of x_scales[:, g] (x[:, g] @ w[:, g].T) w_scales[:, g].

    Args:
      x: [M, K], int8 or float8, K % 128 == 0.
      x_scales: [M, G] float32; G = 1, or K / 128.
      w: [N, K], as x; N % 64 == 0.
      w_scales: float32; [N', 1] where N' divides N, or [N / 128, K / 128].
    """
    (M, K), (N, _), G = x.shape, w.shape, x_scales.shape[1]
    integer, grouped = x.dtype == jnp.int8, G > 1
    c = config or tuned(grouped, integer)
    assert not grouped or (c.promote == 1 and c.columns == _STEP), c
    kind = jnp.int32 if integer else jnp.float32
    rows, steps = c.warpgroups * _UNIT, K // _STEP
    promote = c.promote and max(p for p in range(1, c.promote + 1) if steps % p == 0)
    down, across = -(-M // rows), -(-N // c.columns)
    x = jnp.pad(x, ((0, -M % _ALIGN), (0, 0)))  # TMA takes whole units of 8 rows
    x_scales = jnp.pad(x_scales, ((0, down * rows - M), (0, 0))).T  # [G, M]: what a step needs is contiguous
    if not grouped:
        w_scales = jnp.pad(repeat_to(w_scales, (N, 1))[:, 0], (0, across * c.columns - N))

    def kernel(x_ref, xs_ref, w_ref, ws_ref, out_ref, x_smem, w_smem, s_smem, out_smem, full, free):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        turns = lax.div(down * across - block + c.blocks - 1, jnp.int32(c.blocks))

        def tile(i):
            """First row and column of this block's i-th tile."""
            m, n = _walk(block + i * c.blocks, down, across, c.wide)
            return m * rows, n * c.columns

        @pl.when(wg < c.warpgroups)
        def _compute():
            _set_registers(c, True)
            column_layout, row_layout = plgpu.Layout.WGMMA.reduce(0), plgpu.Layout.WGMMA.reduce(1)
            shape = (_UNIT, c.columns)
            rowwise = lambda v: lax.broadcast_in_dim(v, shape, [0])

            def multiply(slot, acc_ref):
                plgpu.wgmma(acc_ref, x_smem.at[slot, pl.ds(wg * _UNIT, _UNIT)], w_smem.at[slot].transpose((1, 0)))

            def all_steps(done):
                """One accumulator for all of K."""

                def scope(acc_ref):
                    @pl.loop(0, steps)
                    def _(k):
                        slot = _slot(done + k, c)
                        plgpu.barrier_wait(full.at[slot])
                        multiply(slot, acc_ref)
                        plgpu.wgmma_wait(1)  # the step before has been read
                        pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[_slot(done + k - 1, c)]))

                    acc = acc_ref[...]
                    plgpu.barrier_arrive(free.at[_slot(done + steps - 1, c)])
                    return acc

                return pl.run_scoped(scope, plgpu.ACC(shape, kind)).astype(jnp.float32)

            def promoted(promote: int, done, column):
                """A sum in float32 to which an accumulator is added, and scaled, every few steps."""
                tile_of = lambda k: ws_ref[lax.div(column, jnp.int32(_STEP)), jnp.minimum(k, steps - 1)]

                def few_steps(i, carry):
                    total, w_scale = carry
                    following = tile_of(i + 1) if grouped else w_scale
                    first = i * promote

                    def scope(acc_ref):
                        for j in range(promote):
                            slot = _slot(done + first + j, c)
                            plgpu.barrier_wait(full.at[slot])
                            multiply(slot, acc_ref)
                            if j:
                                plgpu.wgmma_wait(1)
                                plgpu.barrier_arrive(free.at[_slot(done + first + j - 1, c)])
                        return acc_ref[...]

                    acc = pl.run_scoped(scope, plgpu.ACC(shape, kind))
                    slot = _slot(done + first + promote - 1, c)
                    if grouped:
                        scale = plgpu.load(s_smem.at[slot, pl.ds(wg * _UNIT, _UNIT)], layout=row_layout)
                        acc *= rowwise(scale * w_scale)
                    plgpu.barrier_arrive(free.at[slot])
                    return total + acc, following

                total = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
                start = tile_of(0) if grouped else jnp.float32(1)
                return lax.fori_loop(0, steps // promote, few_steps, (total, start))[0]

            def one_tile(i, _):
                row, column = tile(i)
                row += wg * _UNIT
                total = all_steps(i * steps) if promote is None else promoted(promote, i * steps, column)
                if not grouped:
                    load = lambda ref, at, layout: plgpu.load(ref.at[at], layout=layout, optimized=False)
                    at = pl.ds(pl.multiple_of(row, _UNIT), _UNIT)
                    total = total * rowwise(load(xs_ref.at[0], at, row_layout))
                    at = pl.ds(pl.multiple_of(column, c.columns), c.columns)
                    total = total * lax.broadcast_in_dim(load(ws_ref, at, column_layout), shape, [1])
                _store(total.astype(dtype), out_smem, out_ref, row, column, i)
                return 0

            lax.fori_loop(0, turns, one_tile, 0)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == c.warpgroups)
        def _feed():
            _set_registers(c, False)

            def one_tile(i, _):
                row, column = tile(i)
                here = pl.ds(pl.multiple_of(row, rows), rows)
                columns = pl.ds(pl.multiple_of(column, c.columns), c.columns)

                @pl.loop(0, steps)
                def _(k):
                    done = i * steps + k
                    slot = _slot(done, c)
                    pl.when(done >= c.stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    at = pl.ds(pl.multiple_of(k * _STEP, _STEP), _STEP)
                    plgpu.copy_gmem_to_smem(x_ref.at[here, at], x_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(w_ref.at[columns, at], w_smem.at[slot], full.at[slot])
                    if grouped:
                        plgpu.copy_gmem_to_smem(xs_ref.at[k, here], s_smem.at[slot], full.at[slot])

                return 0

            lax.fori_loop(0, turns, one_tile, 0)

            @pl.loop(0, c.stages)  # all slots are free before the block ends
            def _(i):
                done = turns * steps + i
                pl.when(done >= c.stages)(lambda: plgpu.barrier_wait(free.at[_slot(done, c)]))

    width = 128 // jnp.dtype(dtype).itemsize
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x.shape[0], N), dtype),
        scratch_types=(
            _tiled((c.stages, rows, _STEP), x.dtype),
            _tiled((c.stages, c.columns, _STEP), w.dtype),
            plgpu.SMEM((c.stages, rows) if grouped else (1, 1), jnp.float32),
            _tiled((c.warpgroups, 2, _UNIT, width), dtype),
            plgpu.Barrier(num_arrivals=3 if grouped else 2, num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.stages),
        ),
        grid=(c.blocks,),
        grid_names=("block",),
        num_threads=c.warpgroups + 1,
        thread_name="wg",
        kernel_name="quantized_many",
    )(x, x_scales, w, w_scales)
    return varying_as(x, out)[:M]


# Pieces.


def _store(out, out_smem, out_ref, row, column, i) -> None:
    """64 rows of this block's i-th tile, in pieces of 128 bytes."""
    wg = lax.axis_index("wg")
    width = out_smem.shape[-1]
    pieces = out.shape[1] // width
    for x in range(0, out.shape[1], width):
        slot = x // width % 2
        if pieces % 2:  # the next tile begins with the other slot
            slot = lax.rem(i * pieces + x // width, jnp.int32(2))
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the piece before the last one has left this slot
        out_smem[wg, slot] = out[:, x : x + width]
        plgpu.commit_smem()

        @pl.when((column + x < out_ref.shape[1]) & (row < out_ref.shape[0]))
        def _(x=x, slot=slot):
            columns = pl.ds(pl.multiple_of(column + x, width), width)
            target = out_ref.at[pl.ds(pl.multiple_of(row, _UNIT), _UNIT), columns]
            plgpu.copy_smem_to_gmem(out_smem.at[wg, slot], target, commit_group=False)

        plgpu.commit_smem_to_gmem_group()


def _walk(i, down: int, across: int, wide: int):
    """(row, column) of tile i of down x across: in strips `wide` tiles wide, row by row."""
    strip = lax.div(i, jnp.int32(down * wide))
    width = jnp.minimum(wide, across - strip * wide)
    i -= strip * (down * wide)
    return lax.div(i, width), strip * wide + lax.rem(i, width)


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory in rows of 128 bytes, in the order that TMA and wgmma share."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    tiling = transforms.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, transforms.SwizzleTransform(128)))


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    most = {2: (240, 24), 3: (160, 32)}[c.warpgroups]
    plgpu.set_max_registers(most[0 if computes else 1], action="increase" if computes else "decrease")
