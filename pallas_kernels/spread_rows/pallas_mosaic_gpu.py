"""Rows copied to several places by TMA, for Hopper GPUs (sm90), written in Pallas Mosaic GPU.

Each warpgroup takes every so-manieth row: it comes into shared memory once and leaves once for each of its places. So
memory reads n rows and writes R, where XLA's gather reads R as well: a token's experts are far apart, and no cache
holds its row until the next one asks. Rows of 2048, 8 places each, on one H100: 0.47 ms for 0.90 (docs/LOG.md,
2026-11-27).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch

_BLOCKS = 132  # multiprocessors of an H100 or H200 SXM
_WORKERS = 4  # warpgroups of a block, each with rows of its own
_SLOTS = 8  # rows on their way of each
_SHARED = 200 * 1024  # bytes of a block
_MOST_PLACES = 16  # of a row: their stores are written out


def supported(x, token, place) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    del token
    if reason := _dispatch.unless_hopper():
        return reason
    if jnp.dtype(x.dtype).itemsize not in (1, 2, 4):
        return f"copies rows of 1, 2 or 4 bytes a number. Got {x.dtype}"
    if x.shape[1] % 64 or 0 in x.shape or place.shape[1] > _MOST_PLACES:
        return f"takes D that is a multiple of 64 and up to {_MOST_PLACES} places. Got x {x.shape}, place {place.shape}"
    if _slots(x) < 2:
        return f"needs two rows of each of {_WORKERS} warpgroups in {_SHARED} bytes. Got x {x.dtype}{x.shape}"
    return None


def spread_rows(x: jax.Array, token: jax.Array, place: jax.Array) -> jax.Array:
    return _spread(x, place, rows=token.shape[0], blocks=_BLOCKS)


# Equal calls are traced once and share one kernel, as in ragged_dot.
@functools.partial(jax.jit, static_argnames=("rows", "blocks"), inline=True)
def _spread(x: jax.Array, place: jax.Array, *, rows: int, blocks: int) -> jax.Array:
    (n, D), K, slots = x.shape, place.shape[1], _slots(x)
    inner = 256 if D % 256 == 0 else 64  # TMA moves boxes of up to 256 numbers a side
    step, ahead = blocks * _WORKERS, slots // 2

    def kernel(x_ref, place_ref, out_ref, smem, full):
        wg = lax.axis_index("wg")
        first = lax.axis_index("block") * _WORKERS + wg
        count = lax.div(jnp.int32(n) - first + step - 1, jnp.int32(step))

        def load(i):
            slot = lax.rem(i, jnp.int32(slots))
            plgpu.copy_gmem_to_smem(x_ref.at[first + i * step], smem.at[wg, slot], full.at[wg * slots + slot])

        for i in range(ahead):
            pl.when(i < count)(functools.partial(load, jnp.int32(i)))

        @pl.loop(0, count)
        def _(i):
            slot = lax.rem(i, jnp.int32(slots))
            places = [place_ref[first + i * step, k] + 0 for k in range(K)]
            plgpu.barrier_wait(full.at[wg * slots + slot])
            for at in places:

                @pl.when(at < rows)
                def _(at=at):
                    plgpu.copy_smem_to_gmem(smem.at[wg, slot], out_ref.at[at], commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            # What the next load overwrites has left: it was the row `slots - ahead` before this one.
            plgpu.wait_smem_to_gmem(slots - ahead, wait_read_only=True)
            pl.when(i + ahead < count)(functools.partial(load, i + ahead))

        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((rows, D // inner, inner), x.dtype),
        scratch_types=(
            plgpu.SMEM((_WORKERS, slots, D // inner, inner), x.dtype),
            plgpu.Barrier(num_barriers=_WORKERS * slots),
        ),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=_WORKERS,
        thread_name="wg",
        kernel_name="spread_rows",
    )(x.reshape(n, D // inner, inner), place).reshape(rows, D)
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pcast(out, axes, to="varying") if axes else out


def _slots(x) -> int:
    return min(_SLOTS, _SHARED // (_WORKERS * x.shape[1] * jnp.dtype(x.dtype).itemsize))
