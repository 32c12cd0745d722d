"""The small kernels of a layer that decodes, for Hopper GPUs (sm90), written in Pallas Mosaic GPU.

Each takes 1 to 2 us, of which nearly all is latency, in the place of two or three of XLA's. They add up what a matmul
leaves in parts, and round where those kernels do.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_THREADS = 128  # of a block
_VECTOR = 4  # neighbouring numbers of a thread: 16 bytes of float32
_MOST_DIM = 16384
_CHUNK = 8 * _THREADS  # of a hidden layer, for a block


def unfit_rows(x: jax.Array) -> str | None:
    """None, or the reason why `add_norm` cannot run for x [B, D]."""
    D = x.shape[-1]
    if x.dtype != jnp.bfloat16 or D % (_VECTOR * _THREADS) or D > _MOST_DIM:
        return f"takes rows of 512 to {_MOST_DIM} numbers, a multiple of 512, in bfloat16. Got {x.dtype} {x.shape}"
    return None


def unfit_hidden(F: int) -> str | None:
    """None, or the reason why `gate` cannot run for a hidden layer of F."""
    return f"takes a multiple of {_CHUNK} hidden numbers. Got {F}" if F % _CHUNK else None


def add_norm(x: jax.Array, parts: jax.Array | None, scale: jax.Array, eps: float, offset: float):
    """x [M, D] plus the sum of parts [P, M, D], and the norm of that; see api.py."""
    M, D = x.shape
    given = [] if parts is None else [parts]

    def kernel(x_ref, scale_ref, *refs):
        *part_refs, sum_ref, out_ref = refs
        layout: Any = plgpu.Layout.WG_STRIDED((D,), vec_size=_VECTOR)
        load = lambda ref: plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
        row = lax.axis_index("row")
        total = load(x_ref.at[row])
        factor = load(scale_ref) + offset
        if part_refs:
            added = load(part_refs[0].at[0, row])
            for p in range(1, part_refs[0].shape[0]):
                added += load(part_refs[0].at[p, row])
            # Rounded as a matmul's output is, and as the residual stream is.
            total = (total + added.astype(x.dtype).astype(jnp.float32)).astype(x.dtype)
            sum_ref.at[row][...] = total
            total = total.astype(jnp.float32)
        else:
            sum_ref.at[row][...] = total.astype(x.dtype)
        r = lax.rsqrt(jnp.sum(total * total) * (1 / D) + eps)
        out_ref.at[row][...] = (total * r * factor).astype(x.dtype)

    new = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.kernel(kernel, out_type=(new, new), grid=(M,), grid_names=("row",), kernel_name="decode_add_norm")(
        x, scale, *given
    )


def gate(parts: jax.Array, dtype) -> jax.Array:
    """silu(gate) * up of [P, M, 2F], whose sum over P is [gate, up]; [M, F] in dtype."""
    P, M, F = parts.shape[0], parts.shape[1], parts.shape[2] // 2

    def kernel(parts_ref, out_ref):
        layout: Any = plgpu.Layout.WG_STRIDED((_CHUNK,), vec_size=_VECTOR)
        row, at = lax.axis_index("row"), pl.multiple_of(lax.axis_index("chunk") * _CHUNK, _CHUNK)

        def half(start):
            load = lambda p: plgpu.load(
                parts_ref.at[p, row, pl.ds(start + at, _CHUNK)], layout=layout, optimized=False
            ).astype(jnp.float32)
            total = load(0)
            for p in range(1, P):
                total += load(p)
            return total.astype(dtype).astype(jnp.float32)

        gate, up = half(0), half(F)
        out_ref.at[row, pl.ds(at, _CHUNK)][...] = (gate / (1.0 + jnp.exp(-gate)) * up).astype(dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, F), dtype),
        grid=(M, F // _CHUNK),
        grid_names=("row", "chunk"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decode_gate",
    )(parts)
