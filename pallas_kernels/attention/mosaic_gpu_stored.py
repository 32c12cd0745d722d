"""Gradients from a stored gradient of the logits, for Hopper GPUs: what five matmuls need where registers hold one sum.

Above head_dim 128 a warpgroup cannot hold dk and dv, so kernels that make all they need again take eight matmuls for
dq, dk and dv. Instead the kernel of dv writes the gradient of the logits, in the dtype of q, and one matmul each makes
dq and dk of it. Only the blocks that see each other are stored, and only where what hides keys is known while tracing.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.blocks import key_ranges, pad_to, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_pieces import (
    ROWS,
    accumulator,
    heads_at_once,
    launch,
    set_registers,
    slot_of,
    tiled,
)
from pallas_kernels.attention.schedule import deal

BLOCK = 128  # keys and queries
_MOST_BYTES = 2**31
_STAGES = 3


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where the blocks stand in an array [B * N, blocks, BLOCK, BLOCK], keys down."""

    ranges: np.ndarray  # [key blocks, 4] of query_ranges
    seen: np.ndarray  # [query blocks, 2]: the first key block of each, and one past its last

    @classmethod
    def of(cls, inputs: Inputs, options: Options) -> "Stored | None":
        """None where the table is made on the device, or the array would be larger than 2 GiB."""
        by_keys = query_ranges(inputs, options, BLOCK, BLOCK)
        if not isinstance(by_keys, np.ndarray):
            return None
        stored = cls(by_keys[0], key_ranges(inputs, options, BLOCK, BLOCK)[0][:, ::3])
        return stored if 2 * np.prod(stored.shape(inputs)) <= _MOST_BYTES else None

    @property
    def counts(self) -> np.ndarray:
        return self.ranges[:, 3] - self.ranges[:, 0]

    @property
    def places(self) -> np.ndarray:
        """[key blocks] int32: where the block of query block 0 would stand."""
        return (np.cumsum(self.counts) - self.counts - self.ranges[:, 0]).astype(np.int32)

    def shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        B, _, N, _ = inputs.q.shape
        return B * N, int(self.counts.sum()), BLOCK, BLOCK


def multiply(inputs: Inputs, options: Options, stored: Stored, dlogits: jax.Array, want: str) -> jax.Array:
    """`want`, "dq" [B, T, N, H] or "dk" [B, S, K, H]: one block for each multiprocessor, tiles of 2 x 64 rows."""
    B, T, N, H = inputs.q.shape
    S, K = inputs.k.shape[1:3]
    dtype, of_dq = inputs.q.dtype, want == "dq"
    length, heads, groups = (T, N, 1) if of_dq else (S, K, N // K)
    x = pad_to(inputs.k if of_dq else inputs.q, 1, BLOCK)
    ranges = (stored.seen if of_dq else stored.ranges[:, ::3]) * (BLOCK // ROWS)  # in steps of 64 keys or queries
    tiles = len(ranges)
    together = heads_at_once(B * heads, x.shape[1] * H * 2 * x.shape[2] // heads)
    schedule = deal(ranges[None, :, 1] - ranges[None, :, 0], B, heads, together)

    def kernel(x_ref, dlogits_ref, ranges_ref, places_ref, schedule_ref, out_ref, smem, full, free):
        x_smem, ds_smem, out_smem = smem
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        count = schedule_ref[block, 0] + 0

        def place(w):
            at = schedule_ref[block, w + 1] + 0
            pair, t = lax.div(at, jnp.int32(tiles)), lax.rem(at, jnp.int32(tiles))
            lo, hi = (ranges_ref[t, i] + 0 for i in (0, 1))
            return lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads)), t, lo, hi

        @pl.when(wg < 2)
        def _compute():
            set_registers(2, 240)

            def work(w, done):
                b, n, t, lo, hi = place(w)
                steps = groups * (hi - lo)

                def product(acc):
                    @pl.loop(done, done + steps)
                    def _(i):
                        slot = slot_of(i, _STAGES)
                        plgpu.barrier_wait(full.at[slot])
                        ds = ds_smem.at[slot, wg]
                        plgpu.wgmma(acc, ds.transpose((1, 0)) if of_dq else ds, x_smem.at[slot])
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(free.at[slot])

                    return acc[...]

                total = pl.run_scoped(product, accumulator(H))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
                out_smem.at[wg][...] = (total * options.scale).astype(dtype)
                plgpu.commit_smem()
                rows = pl.ds(pl.multiple_of(t * BLOCK + wg * ROWS, ROWS), ROWS)
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out_ref.at[b, rows, n])
                return done + steps

            lax.fori_loop(0, count, work, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            set_registers(2, 24)

            def feed(w, done):
                b, n, t, lo, hi = place(w)

                def step(j, i, query_head):
                    slot = slot_of(i, _STAGES)
                    pl.when(i >= _STAGES)(lambda: plgpu.barrier_wait(free.at[slot]))
                    along = pl.ds(pl.multiple_of(j * ROWS, ROWS), ROWS)
                    x_head = lax.div(n, jnp.int32(N // K)) if of_dq else query_head
                    plgpu.copy_gmem_to_smem(x_ref.at[b, along, x_head], x_smem.at[slot], full.at[slot])
                    across = lax.div(j, jnp.int32(2))
                    at = places_ref[across] + t if of_dq else places_ref[t] + across
                    other = pl.ds(pl.multiple_of(lax.rem(j, jnp.int32(2)) * ROWS, ROWS), ROWS)
                    for v in (0, 1):
                        mine = pl.ds(v * ROWS, ROWS)
                        keys, queries = (other, mine) if of_dq else (mine, other)
                        ref = dlogits_ref.at[b * N + query_head, at, keys, queries]
                        plgpu.copy_gmem_to_smem(ref, ds_smem.at[slot, v], full.at[slot])

                @pl.loop(0, groups)
                def _(g):
                    query_head, first = n * groups + g, done + g * (hi - lo) - lo
                    pl.loop(lo, hi)(lambda j: step(j, first + j, query_head))

                return done + groups * (hi - lo)

            done = lax.fori_loop(0, count, feed, jnp.int32(0))

            @pl.loop(jnp.maximum(done - _STAGES, 0), done)
            def _(i):
                plgpu.barrier_wait(free.at[slot_of(i, _STAGES)])

    smem = (
        tiled((_STAGES, ROWS, H), dtype),
        tiled((_STAGES, 2, ROWS, ROWS), dtype),
        tiled((2, ROWS, H), dtype),
    )
    (out,) = launch(
        kernel,
        f"attention_{want}_stored",
        [jax.ShapeDtypeStruct((B, tiles * BLOCK, heads, H), dtype)],
        {"block": len(schedule)},
        (
            smem,
            plgpu.Barrier(num_arrivals=3, num_barriers=_STAGES),
            plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES),
        ),
        (x, dlogits, ranges.astype(np.int32), stored.places, schedule),
    )
    return out[:, :length]
