"""Values of 4 and 8 bits widened to bfloat16 in registers, as the left operand of a wgmma. Hopper GPUs (sm90)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import order


def varying_as(x: jax.Array, out: jax.Array) -> jax.Array:
    """A kernel's output with its type under shard_map: different on the same mesh axes as x."""
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pcast(out, axes, to="varying") if axes else out


def values_layout(dtype) -> Any:
    return plgpu.Layout.WGMMA_UPCAST_4X if jax.dtypes.itemsize_bits(dtype) == 4 else plgpu.Layout.WGMMA_8BIT


def widen(values: jax.Array) -> jax.Array:
    """A tile of w in registers as bfloat16, its columns in the order of `order`."""
    if _dispatch.interpreted("gpu"):
        return order(values.astype(jnp.bfloat16), values.dtype)
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    bits = jax.dtypes.itemsize_bits(values.dtype)

    @plgpu.inline_mgpu(
        arg_types=(values_layout(values.dtype),),
        return_type=plgpu.ShapeDtypeStruct(values.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )
    def each(ctx, narrow):
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

    return each(values)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


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


def mma(acc: jax.Array | None, a: jax.Array, b_ref) -> Any:
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


def tiled(shape: tuple[int, ...], dtype, swizzle: int) -> Any:
    """Shared memory in the order that TMA and wgmma share."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    columns = swizzle * 8 // jax.dtypes.itemsize_bits(jnp.dtype(dtype))
    return plgpu.SMEM(
        shape, dtype, transforms=(transforms.TilingTransform((8, columns)), transforms.SwizzleTransform(swizzle))
    )
