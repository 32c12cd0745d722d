"""Values of 4 and 8 bits widened in registers, as the left operand of a wgmma. Hopper GPUs (sm90)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch


def varying_as(x: jax.Array, out: jax.Array) -> jax.Array:
    """A kernel's output with its type under shard_map: different on the same mesh axes as x."""
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pcast(out, axes, to="varying") if axes else out


def values_layout(dtype) -> Any:
    """That of the left operand of a wgmma, or of what `widen` makes one of."""
    names = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_8BIT, 16: plgpu.Layout.WGMMA}
    return names[jax.dtypes.itemsize_bits(dtype)]


def order(x: jax.Array, dtype) -> jax.Array:
    """x [M, K] with K in the order in which `widen` returns the columns of values in `dtype`, beside such an x."""
    M = x.shape[0]
    four = jax.dtypes.itemsize_bits(dtype) == 4
    if x.dtype == jnp.int8:  # 32 columns: thread, byte, nibble of it
        return x.reshape(M, -1, 4, 4, 2).transpose(0, 1, 4, 2, 3).reshape(M, -1) if four else x
    if four:  # 32 columns: thread, half, nibble of it
        return x.reshape(M, -1, 4, 2, 4).transpose(0, 1, 4, 2, 3).reshape(M, -1)
    return x.reshape(M, -1, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(M, -1)  # 16 columns: thread, pair, one of it


def widen(values: jax.Array, to=jnp.bfloat16) -> jax.Array:
    """A tile of w in registers as bfloat16, or as int8 (int4: times 16), its columns in the order of `order`."""
    if values.dtype == to:
        return values
    by = 16 if to == jnp.int8 else 1
    if _dispatch.interpreted("gpu"):
        return order(values.astype(to) * jnp.asarray(by, to), values.dtype)
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    bits = jax.dtypes.itemsize_bits(values.dtype)

    @plgpu.inline_mgpu(
        arg_types=(values_layout(values.dtype),),
        return_type=plgpu.ShapeDtypeStruct(values.shape, to, layout=values_layout(to)),
    )
    def each(ctx, narrow):
        del ctx
        i8, i32 = (ir.IntegerType.get_signless(size) for size in (8, 32))
        pair = ir.VectorType.get((4,), i8) if by > 1 else ir.VectorType.get((2,), ir.BF16Type.get())
        layout = mgpu.WGMMA_LAYOUT_8BIT if by > 1 else mgpu.WGMMA_LAYOUT
        registers = np.empty(layout.registers_shape(narrow.shape), dtype=object)
        count = jax.dtypes.itemsize_bits(to) // bits  # registers that one of narrow values becomes
        assembly = _ASSEMBLY[values.dtype.name] if by == 1 else _int4_to_int8
        for index, register in np.ndenumerate(narrow.registers):
            word = mgpu.utils.bitcast(register, i32)
            for i in range(count):
                result = llvm.inline_asm(i32, [word], assembly(i), "=r,r")
                place = (index[0], index[1] * count + i, *index[2:])
                registers[place] = mgpu.utils.bitcast(result, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=by > 1 or None)

    return each(values)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def lay_out(x_ref, x_smem, swizzle: int, wg, warpgroups: int, dtype) -> None:
    """x_ref [M, K], 16 rows at most, into x_smem [T, K], permuted by `order`; rows from M on hold anything.

    Called by `warpgroups` warpgroups of which this is number `wg`, the first ones of a block. A thread moves 8
    neighbours along K at a time.
    """
    M, K = x_ref.shape
    if _dispatch.interpreted("gpu"):

        @pl.when(wg == 0)
        def _():
            x_smem[...] = order(x_ref[...], dtype)

        return
    import jax.experimental.mosaic.gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    four = jax.dtypes.itemsize_bits(dtype) == 4
    chunk, columns = 32 if four else 16, swizzle // 2  # of K: permuted among themselves; in a row of a tile
    parts, lines = chunk // 8, 1 << (M - 1).bit_length()  # threads that share a chunk; rows, a power of two
    items = parts * lines * (K // chunk)
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    target_type = plgpu.RefType((transforms.TilingTransform((8, columns)), transforms.SwizzleTransform(swizzle)))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), target_type))
    def move(ctx, source, target):
        del ctx
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
        number = lambda v: mgpu.utils.c(v, i32)
        and_, shift = lambda x, m: arith.andi(x, number(m)), lambda x, n: arith.shrui(x, number(n))
        times, least = lambda x, n: arith.muli(x, number(n)), lambda x, n: arith.minui(x, number(n))
        pitch = ir.MemRefType(source.type).get_strides_and_offset()[0][0]
        begin = llvm.ptrtoint(i64, mgpu.utils.memref_ptr(source))
        place = llvm.ptrtoint(i32, mgpu.utils.memref_ptr(target))
        thread, loaded = mgpu.utils.thread_idx(), []
        for i in range(-(-items // (128 * warpgroups))):
            # The last threads repeat what others do.
            item = least(arith.addi(thread, number(i * 128 * warpgroups)), items - 1)
            part = and_(item, parts - 1)
            line = and_(shift(item, parts.bit_length() - 1), lines - 1)
            index = shift(item, parts.bit_length() + lines.bit_length() - 2)
            k = arith.addi(times(index, chunk), times(part, 8))
            offset = arith.addi(times(least(line, M - 1), pitch), k)
            address = arith.addi(begin, arith.extui(i64, times(offset, 2)))
            words = mgpu.utils.inline_ptx(
                "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", address, result_types=[i32] * 4
            )
            loaded.append((part, line, index, words))
        for part, line, index, words in loaded:
            column = times(index, chunk)
            tile = arith.addi(times(shift(line, 3), K // columns), arith.divui(column, number(columns)))
            row = arith.addi(times(and_(line, 7), swizzle), times(arith.remui(column, number(columns)), 2))
            flip = times(and_(shift(row, 7), swizzle // 16 - 1), 16)
            base = arith.addi(place, times(tile, 8 * swizzle))
            for j in range(4):
                if four:  # nibbles j and j + 4
                    pair = "prmt.b32 $0, $1, $2, 0x7632;" if j % 2 else "prmt.b32 $0, $1, $2, 0x5410;"
                    word = mgpu.utils.inline_ptx(pair, words[j // 2], words[j // 2 + 2], result_types=i32)
                    at = arith.addi(times(part, 4), number(16 * j))
                else:  # two threads' numbers, two pairs of each
                    word, at = words[j], arith.addi(times(part, 8), number(16 * (j % 2) + 4 * (j // 2)))
                at = arith.xori(arith.addi(row, at), flip)
                mgpu.utils.inline_ptx("st.shared.b32 [$0], $1;", arith.addi(base, at), word, has_side_effects=True)

    move(x_ref, x_smem)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def _int4(i: int) -> str:
    """Nibbles i and i + 4, their sign bits flipped, as the last bits of 128.0; less 136."""
    return f"""{{
        .reg .b32 a, b;
        shr.u32 a, $1, {4 * i};
        lop3.b32 a, a, 0x000F000F, 0x43084308, 0x6A;
        mov.b32 b, 0x43084308;
        sub.bf16x2 $0, a, b;
    }}"""


def _int4_to_int8(i: int) -> str:
    """The low (0) or the high (1) nibble of each byte, times 16."""
    return "and.b32 $0, $1, 0xF0F0F0F0;" if i else "{ .reg .b32 a; shl.b32 a, $1, 4; and.b32 $0, a, 0xF0F0F0F0; }"


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


def add_scaled(total: jax.Array, acc: jax.Array, scale: jax.Array) -> jax.Array:
    """total + acc * scale[:, None], all float32: one instruction for each number, where JAX would have two."""
    if _dispatch.interpreted("gpu"):
        return total + acc * lax.broadcast_in_dim(scale, acc.shape, [0])
    from jaxlib.mlir.dialects import math

    layout = plgpu.Layout.WGMMA

    @plgpu.inline_mgpu(
        arg_types=(layout, layout, layout),
        return_type=plgpu.ShapeDtypeStruct(total.shape, jnp.float32, layout=layout),
    )
    def fma(ctx, total, acc, scale):
        del ctx
        return acc._pointwise(math.fma, scale, total)

    spread = lax.broadcast_in_dim(scale, acc.shape, [0])
    return fma(total, acc, spread)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def mma(acc: jax.Array | None, a: jax.Array, b_ref) -> Any:
    """a @ b, added to acc if given, with a in registers, which the interpreter's wgmma does not take."""
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    if _dispatch.interpreted("gpu"):
        product = jnp.dot(a, b_ref[...], preferred_element_type=kind)
        return product if acc is None else acc + product
    if acc is not None:
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))

    def scope(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)
        return acc_ref[...]

    return pl.run_scoped(scope, plgpu.ACC((a.shape[0], b_ref.shape[1]), kind))


def tiled(shape: tuple[int, ...], dtype, swizzle: int) -> Any:
    """Shared memory in the order that TMA and wgmma share."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    columns = swizzle * 8 // jax.dtypes.itemsize_bits(jnp.dtype(dtype))
    return plgpu.SMEM(
        shape, dtype, transforms=(transforms.TilingTransform((8, columns)), transforms.SwizzleTransform(swizzle))
    )
