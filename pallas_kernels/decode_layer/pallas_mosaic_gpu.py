"""What stands between the matmuls of a layer that decodes, for Hopper GPUs (sm90), written in Pallas Mosaic GPU.

Norms, additions and the gate are the ends of matmuls (quantized_matmul/pallas_mosaic_gpu_few.py). Rotation and the
cache's writes are a kernel of 1 to 2 us, of which nearly all is latency. It adds up what a matmul leaves in parts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.rows import Rows
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu_few as few
from pallas_kernels.quantized_matmul.array import QuantizedArray

_THREADS = 128  # of a block
_VECTOR = 4  # neighbouring numbers of a thread: 16 bytes of float32
unfit_parts, unfit_gate, unfit_add = few.unfit_normed, few.unfit_gate, few.unfit_add


def unfit_heads(cache: jax.Array, heads: int) -> str | None:
    """None, or the reason why `rotate_and_write` cannot run for a cache [L, B, S, K, H]."""
    K, H = cache.shape[3:]
    if cache.dtype != jnp.bfloat16 or H not in (64, 128, 256):
        return f"takes caches in bfloat16 with head_dim 64, 128, 256. Got {cache.dtype}, {H}"
    count = _Heads(H).count
    return f"takes {count} heads at a time. Got {heads} and {K}" if heads % count or K % count else None


def matmul_parts(rows: Rows, w: QuantizedArray, eps: float):
    return few.matmul_few_parts(rows.scaled, w, rows.scaled.dtype, norm=few.Norm(rows.squares, eps))


def matmul_gate(rows: Rows, w: QuantizedArray, eps: float):
    return few.matmul_few_gate(rows.scaled, w, norm=few.Norm(rows.squares, eps))


def matmul_add(h, w: QuantizedArray, x, scale, offset: float):
    x, scaled, squares = few.matmul_few_add(h, w, few.Add(x, scale, offset))
    return x, Rows(scaled, squares)


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
