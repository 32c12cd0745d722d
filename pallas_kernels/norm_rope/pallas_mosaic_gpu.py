"""Norm and rotation of heads for Hopper GPUs (sm90), written in Pallas Mosaic GPU: bound by reading and writing once.

A warpgroup holds a tile of 1,024 pairs: a few tokens with some of their heads; each thread 8 neighbouring numbers of
each half of a row, loaded and stored by 16 bytes. 8 threads (at head_dim 128) hold a row and add up its squares by
shuffles. The 4 rows of a warp are heads of one token where N allows, so what a warp touches is contiguous, and cos and
sin are read once for all of them. Nothing passes through shared memory: the memory is busy because many small blocks
share a multiprocessor. (On an H100 tiles of two and four times the size were no faster forward, slower backward.)
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch

_VECTOR = 8  # numbers of a thread that lie side by side
_BLOCKS = 1024  # of the backward pass at least: more than run at one time


def supported(x: jax.Array, scale: jax.Array | None) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    if scale is None:
        return "norms and rotates; XLA rotates alone"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16. Got {x.dtype}"
    _, T, N, H = x.shape
    if H not in (64, 128, 256):
        return f"takes head_dim 64, 128, 256. Got {H}"
    tokens = _Tile(N, H).tokens
    if T % tokens:
        return f"takes a multiple of {tokens} tokens of {N} heads. Got {T}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def norm_rope_mosaic_gpu(x, scale, cos, sin, eps: float) -> jax.Array:
    """As `norm_rope_xla`, without gradients to cos and sin."""
    return _forward(x, scale, cos, sin, eps)


def _fwd(x, scale, cos, sin, eps: float):
    """Residuals: the inputs."""
    # Without the barrier XLA may run a kernel twice whose output a scan stacks: for the stack, and for its other users.
    return lax.optimization_barrier(_forward(x, scale, cos, sin, eps)), (x, scale, cos, sin)


def _bwd(eps: float, residuals, grad):
    x, scale, cos, sin = residuals
    return *_backward(x, scale, cos, sin, grad, eps), None, None


norm_rope_mosaic_gpu.defvjp(_fwd, _bwd)


def _forward(x, scale, cos, sin, eps: float):
    B, T, N, H = x.shape
    tile = _Tile(N, H)

    def kernel(x_ref, scale_ref, cos_ref, sin_ref, out_ref):
        b, (t, heads) = lax.axis_index("batch"), tile.locate(lax.axis_index("tile"))
        tokens = tile.tokens_at(t)
        cos, sin = (tile.load(ref.at[b, tokens], 1) for ref in (cos_ref, sin_ref))
        x1, x2 = (tile.load(x_ref.at[b, tokens, heads, half]) for half in tile.halves)
        r = tile.over_rows(lax.rsqrt(tile.mean(x1 * x1 + x2 * x2) + eps))
        y1, y2 = (x * r * tile.load(scale_ref.at[half], 0, 1) for x, half in zip((x1, x2), tile.halves))
        for half, y in zip(tile.halves, (y1 * cos - y2 * sin, y2 * cos + y1 * sin)):
            tile.store(out_ref.at[b, tokens, heads, half], y)

    grid = B, T // tile.tokens * tile.groups
    return _launch(kernel, "norm_rope", jax.typeof(x), grid, (x, scale, cos, sin))


def _backward(x, scale, cos, sin, grad, eps: float):
    """The gradients to x and scale. Each block sums the latter over its own heads and steps; XLA sums the rest."""
    B, T, N, H = x.shape
    tile = _Tile(N, H)
    rows, blocks = T // tile.tokens, B * T // tile.tokens * tile.groups
    steps = max(s for s in (1, 2, 4, 8) if s == 1 or (rows % s == 0 and blocks >= s * _BLOCKS))
    grid = B, rows // steps * tile.groups

    def kernel(x_ref, scale_ref, cos_ref, sin_ref, grad_ref, dx_ref, dscale_ref):
        b, block = lax.axis_index("batch"), lax.axis_index("tile")
        first, heads = tile.locate(block)

        def step(i, sums):
            tokens = tile.tokens_at(first * steps + i)
            both = lambda ref: [tile.load(ref.at[b, tokens, heads, half]) for half in tile.halves]
            (x1, x2), (g1, g2) = both(x_ref), both(grad_ref)
            cos, sin = (tile.load(ref.at[b, tokens], 1) for ref in (cos_ref, sin_ref))
            g1, g2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
            r = tile.over_rows(lax.rsqrt(tile.mean(x1 * x1 + x2 * x2) + eps))
            x1, x2 = x1 * r, x2 * r
            sums = sums[0] + g1 * x1, sums[1] + g2 * x2
            g1, g2 = (g * tile.load(scale_ref.at[half], 0, 1) for g, half in zip((g1, g2), tile.halves))
            mean = tile.over_rows(tile.mean(g1 * x1 + g2 * x2))
            for half, g, x in zip(tile.halves, (g1, g2), (x1, x2)):
                tile.store(dx_ref.at[b, tokens, heads, half], r * (g - x * mean))
            return sums

        zero = plgpu.layout_cast(jnp.zeros(tile.shape, jnp.float32), tile.layout)
        for half, total in zip(tile.halves, lax.fori_loop(0, steps, step, (zero, zero))):
            if tile.shape[1] == 1:
                dscale_ref.at[b, block, :, :, half][...] = total
            else:
                dscale_ref.at[b, block, :, 0, half][...] = jnp.sum(total, axis=1)

    out = jax.typeof(x), jax.ShapeDtypeStruct((*grid, tile.tokens, 1, H), jnp.float32)
    dx, dscale = _launch(kernel, "norm_rope_grad", out, grid, (x, scale, cos, sin, grad))
    return dx, jnp.sum(dscale, axis=(0, 1, 2, 3))


def _launch(kernel, name: str, out, grid, operands) -> Any:
    """One warpgroup for each place in the grid."""
    out = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out)
    # No two threads meet in memory: no barriers.
    params = plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True)
    out = plgpu.kernel(
        kernel, out_type=out, grid=grid, grid_names=("batch", "tile"), compiler_params=params, kernel_name=name
    )(*operands)
    axes = tuple(sorted(jax.typeof(operands[0]).mat.varying))
    return jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying") if axes else x, out)


class _Tile:
    """What the threads of a warpgroup hold: [tokens, heads, H/2] of each half of the rows, and in which registers."""

    def __init__(self, N: int, H: int):
        width = H // 2
        rows = 32 * _VECTOR // width  # of a warp
        heads = math.gcd(N, rows)
        self.tokens, self.groups = 4 * rows // heads, N // heads
        self.shape = (self.tokens, heads, width)
        self.halves = pl.ds(0, width), pl.ds(width, width)
        tiling = Tiling((self.shape, (rows // heads, heads, width), (_VECTOR,)))
        # Without what has one element: JAX takes layouts in this form alone.
        form = TiledLayout(tiling, (-7,), (-4, -3, -2), -1, _check_canonical=False).canonicalize()
        self.layout: Any = plgpu.Layout.TILED(form.tiling, form.warp_dims, form.lane_dims, form.vector_dim)

    def locate(self, i):
        """Which tile of tokens the i-th one is, and its heads."""
        heads = self.shape[1]
        groups = jnp.int32(self.groups)
        return lax.div(i, groups), pl.ds(lax.rem(i, groups) * heads, heads)

    def tokens_at(self, i):
        return pl.ds(i * self.tokens, self.tokens)

    def load(self, ref, *missing: int):
        """Float32 [tokens, heads, H/2] of memory that lacks the dims `missing`, along which it is repeated."""
        x = plgpu.load(ref, layout=self.layout.reduce(missing) if missing else self.layout, optimized=False)
        return self._spread(x.astype(jnp.float32), *missing) if missing else x.astype(jnp.float32)

    def store(self, ref, x):
        ref[...] = plgpu.layout_cast(x.astype(ref.dtype), self.layout)

    def mean(self, x):
        """[tokens, heads], over both halves of a row, of which x is the sum."""
        return jnp.sum(x, axis=2) * (0.5 / self.shape[2])

    def over_rows(self, x):
        """[tokens, heads] for each number of the rows."""
        return self._spread(x, 2)

    def _spread(self, x, *missing: int):
        return lax.broadcast_in_dim(x, self.shape, [d for d in range(3) if d not in missing])
