"""The small kernels of a layer that decodes, for Hopper GPUs (sm90), written in Pallas Mosaic GPU.

Each takes 1 to 2 us, of which nearly all is latency, in the place of two or three of XLA's. They add up what a matmul
leaves in parts, and round where those kernels do.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
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


def unfit_heads(cache: jax.Array, heads: int) -> str | None:
    """None, or the reason why `rotate_and_write` cannot run for a cache [L, B, S, K, H]."""
    K, H = cache.shape[3:]
    if cache.dtype != jnp.bfloat16 or H not in (64, 128, 256):
        return f"takes caches in bfloat16 with head_dim 64, 128, 256. Got {cache.dtype}, {H}"
    count = _Heads(H).count
    return f"takes {count} heads at a time. Got {heads} and {K}" if heads % count or K % count else None


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


def rotate_and_write(parts, k_cache, v_cache, index, positions, cos, sin, heads: int, dtype):
    """q [B, N, H] rotated, of parts [P, B, N + 2 K, H]; k, rotated, and v written to caches [L, B, S, K, H]."""
    P, B, _, H = parts.shape
    K = k_cache.shape[3]
    tile = _Heads(H)
    groups = heads // tile.count, K // tile.count

    def kernel(parts_ref, index_ref, positions_ref, cos_ref, sin_ref, k_ref, v_ref, q_ref):
        b, group = lax.axis_index("row"), lax.axis_index("group")
        own = pl.ds(pl.multiple_of(group * tile.count, tile.count), tile.count)

        def half(where):
            total = tile.load(parts_ref.at[0, b, own, where])
            for p in range(1, P):
                total += tile.load(parts_ref.at[p, b, own, where])
            return total.astype(dtype).astype(jnp.float32)

        y1, y2 = (half(where) for where in tile.halves)
        cos, sin = (tile.load_row(ref.at[b]) for ref in (cos_ref, sin_ref))
        rotated = y1 * cos - y2 * sin, y2 * cos + y1 * sin

        @pl.when(group < groups[0])
        def _():
            for y, where in zip(rotated, tile.halves):
                tile.store(q_ref.at[b, own, where], y)

        def write(ref, first, ys):
            place = pl.ds(pl.multiple_of((group - first) * tile.count, tile.count), tile.count)
            slot = positions_ref[b]

            @pl.when((slot >= 0) & (slot < k_cache.shape[2]))
            def _():
                for y, where in zip(ys, tile.halves):
                    tile.store(ref.at[index_ref[0], b, slot, place, where], y)

        is_v = group >= groups[0] + groups[1]
        pl.when((group >= groups[0]) & ~is_v)(lambda: write(k_ref, groups[0], rotated))
        pl.when(is_v)(lambda: write(v_ref, groups[0] + groups[1], (y1, y2)))

    k_new, v_new = jax.new_ref(k_cache), jax.new_ref(v_cache)
    q = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, heads, H), dtype),
        grid=(B, groups[0] + 2 * groups[1]),
        grid_names=("row", "group"),
        kernel_name="decode_rotate_and_write",
    )(parts, index.reshape(1), positions, cos, sin, k_new, v_new)
    return q, jax.freeze(k_new), jax.freeze(v_new)


class _Heads:
    """What the threads of a warpgroup hold of a few heads: [heads, H/2] of each half, a row by 16 bytes a thread."""

    def __init__(self, H: int):
        width = H // 2
        lanes = width // _VECTOR  # that share a row
        self.count = _THREADS // lanes
        self.shape = (self.count, width)
        self.halves = pl.ds(0, width), pl.ds(width, width)
        tiling = Tiling((self.shape, (self.count // 4, width), (1, _VECTOR)))
        form = TiledLayout(tiling, (-6,), (-4, -3), -1, _check_canonical=False).canonicalize()
        self.layout: Any = plgpu.Layout.TILED(form.tiling, form.warp_dims, form.lane_dims, form.vector_dim)

    def load(self, ref):
        return plgpu.load(ref, layout=self.layout, optimized=False).astype(jnp.float32)

    def load_row(self, ref):
        """[H/2] of memory, for all heads."""
        row = plgpu.load(ref, layout=self.layout.reduce(0), optimized=False)
        return lax.broadcast_in_dim(row, self.shape, [1])

    def store(self, ref, x):
        ref[...] = plgpu.layout_cast(x.astype(ref.dtype), self.layout)
