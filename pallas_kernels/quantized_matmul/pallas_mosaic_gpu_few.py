"""x @ w for few rows of x, w in 4 or 8 bits: bound by reading w once. Hopper GPUs (sm90), Pallas Mosaic GPU.

Computed as out.T = w.T @ x.T: a tile of w goes from shared memory to registers as it lies, is widened there to
bfloat16, exactly, and is the left operand of a wgmma; the few rows of x are its columns. A scale belongs to a row and a
group of K, so each group's sum is a small accumulator that is multiplied with scales and added to the total in float32.

Widening takes most of the time that reading does, so it takes what nibbles a register happens to hold: those of one
register are 8 neighbours along K, of which bits i and i + 16 make a pair, where wgmma wants neighbours in a pair. Since
the order of summation is free, x is permuted instead (`_order`), in the XLA fusion that pads it.

The warpgroups of a block take 64 rows of w each (`rows` of them), or each a share of K (`depth`), and sum at the end;
one more feeds them through TMA. Where there are too few tiles for all multiprocessors, blocks share K too (`split`),
and XLA adds their parts. One writer and one order of summation: results repeat bit by bit.
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
    step = _step(K, w.values.dtype)
    if w.scales.shape[1] > 1 and (w.group % 32 or (w.group % step and step % w.group)):
        return f"takes groups of 32, 64, or multiples of 128 that divide K={K}. Got {w.group}"
    return None


def _step(K: int, dtype, width: int = 128) -> int:
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
    step = _step(K, w.values.dtype, c.width)
    width = step * jax.dtypes.itemsize_bits(w.values.dtype) // 8
    group = K // G
    piece = min(group, step)  # of K: one accumulator's, with one scale
    pieces = step // piece
    steps = -(-K // step)
    share = -(-steps // c.split)  # steps of a block
    tile = c.rows * _UNIT
    x_order = _order(x.astype(jnp.bfloat16), w.values.dtype)
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
                narrow = plgpu.load(w_smem.at[d, slot, pl.ds(r * _UNIT, _UNIT)], layout=_layout(w.values.dtype))
                if G == 1:
                    total = _mma(total, _widen(narrow), x_smem.at[d, slot].transpose((1, 0)))
                    plgpu.barrier_arrive(free.at[d, slot])
                    return total, now
                for p in range(pieces):
                    a = _widen(narrow[:, p * piece : (p + 1) * piece])
                    acc = _mma(None, a, x_smem.at[d, slot, :, pl.ds(p * piece, piece)].transpose((1, 0)))
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
            _tiled((c.depth, c.stages, tile, step), w.values.dtype, width),
            _tiled((c.depth, c.stages, T, step), jnp.bfloat16, min(2 * piece, 128)),
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


def varying_as(x: jax.Array, out: jax.Array) -> jax.Array:
    """A kernel's output with its type under shard_map: different on the same mesh axes as x."""
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pcast(out, axes, to="varying") if axes else out


# Pieces.


def _layout(dtype) -> Any:
    return plgpu.Layout.WGMMA_UPCAST_4X if jax.dtypes.itemsize_bits(dtype) == 4 else plgpu.Layout.WGMMA_8BIT


def _order(x: jax.Array, dtype) -> jax.Array:
    """x [M, K] with K in the order in which `_widen` returns the columns of w."""
    M = x.shape[0]
    if jax.dtypes.itemsize_bits(dtype) == 4:  # 32 columns: thread, half, nibble of it
        return x.reshape(M, -1, 4, 2, 4).transpose(0, 1, 4, 2, 3).reshape(M, -1)
    return x.reshape(M, -1, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(M, -1)  # 16 columns: thread, pair, one of it


def _widen(values: jax.Array) -> jax.Array:
    """A tile of w in registers as bfloat16, its columns in the order of `_order`."""
    if _dispatch.interpreted("gpu"):
        return _order(values.astype(jnp.bfloat16), values.dtype)
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    bits = jax.dtypes.itemsize_bits(values.dtype)

    @plgpu.inline_mgpu(
        arg_types=(_layout(values.dtype),),
        return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def widen(ctx, narrow):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT.registers_shape(narrow.shape), dtype=object)
        count = 16 // bits  # pairs that one register of narrow values holds
        for index, register in np.ndenumerate(narrow.registers):
            word = mgpu.utils.bitcast(register, i32)
            for i in range(count):
                result = llvm.inline_asm(i32, [word], _ASSEMBLY[values.dtype.name](i), "=r,r")
                place = (index[0], index[1] * count + i, *index[2:])
                registers[place] = mgpu.utils.bitcast(result, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return widen(values)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def _int4(i: int) -> str:
    """Nibbles i and i + 4, their sign bits flipped, as the last bits of 128.0; less 136."""
    return f"""{{
        .reg .b32 a, b;
        shr.u32 a, $1, {4 * i};
        lop3.b32 a, a, 0x000F000F, 0x43084308, 0x6A;
        mov.b32 b, 0x43084308;
        sub.bf16x2 $0, a, b;
    }}"""


def _int8(i: int) -> str:
    """Bytes 2i and 2i + 1: their low 7 bits as the last of 128.0; less 128.0 or, where the eighth is set, 256.0."""
    return f"""{{
        .reg .b32 a, b;
        prmt.b32 a, $1, 0x43434343, {0x4140 + 0x0202 * i};
        and.b32 b, a, 0xFF80FF80;
        and.b32 a, a, 0xFF7FFF7F;
        sub.bf16x2 $0, a, b;
    }}"""


def _float(shift: int, mask: int, power: int):
    """Bytes 2i and 2i + 1: sign, exponent and mantissa where bfloat16 has them, times the ratio of the biases.

    Subnormals are exact; nan and infinity become large numbers.
    """

    def pair(i: int) -> str:
        return f"""{{
            .reg .b32 a, b;
            prmt.b32 a, $1, 0, {0x1404 + 0x2020 * i};
            shr.u32 b, a, {shift};
            and.b32 b, b, {mask:#x};
            lop3.b32 a, a, 0x80008000, b, 0xEA;
            mov.b32 b, {(127 + power) << 7 | (127 + power) << 23:#x};
            mul.bf16x2 $0, a, b;
        }}"""

    return pair


def _float4_e2m1fn(i: int) -> str:
    """Nibbles i and i + 4, as _float does."""
    return f"""{{
        .reg .b32 a, b;
        {"shl" if i < 2 else "shr"}.b32 a, $1, {abs(6 - 4 * i)};
        and.b32 a, a, 0x01C001C0;
        shl.b32 b, $1, {12 - 4 * i};
        lop3.b32 a, b, 0x80008000, a, 0xEA;
        mov.b32 b, 0x7E807E80;
        mul.bf16x2 $0, a, b;
    }}"""


_ASSEMBLY: dict[str, Any] = {
    "int4": _int4,
    "int8": _int8,
    "float8_e4m3fn": _float(4, 0x07F007F0, 120),
    "float8_e5m2": _float(3, 0x0FE00FE0, 112),
    "float4_e2m1fn": _float4_e2m1fn,
}


def _mma(acc: jax.Array | None, a: jax.Array, b_ref) -> Any:
    """a @ b, added to acc if given, with a in registers, which the interpreter's wgmma does not take."""
    if _dispatch.interpreted("gpu"):
        product = jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
        return product if acc is None else acc + product
    if acc is not None:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))

    def scope(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)
        return acc_ref[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b_ref.shape[1]), jnp.float32))


def _slot(i, c: Config):
    return lax.rem(i, jnp.int32(c.stages))


def _tiled(shape: tuple[int, ...], dtype, swizzle: int) -> Any:
    """Shared memory in the order that TMA and wgmma share."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    columns = swizzle * 8 // jax.dtypes.itemsize_bits(jnp.dtype(dtype))
    return plgpu.SMEM(
        shape, dtype, transforms=(transforms.TilingTransform((8, columns)), transforms.SwizzleTransform(swizzle))
    )


def _set_registers(c: Config, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32), 4: (112, 32)}.get(c.rows * c.depth)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
