"""The gradient of the queries, for Hopper GPUs, persistent as the forward is.

One block for each multiprocessor computes one tile after another; the next tile's loads start before this one's output
has left. Up to head_dim 128 a warpgroup holds its rows of q and do in registers: both matmuls that read them then take
half of the shared memory's bandwidth, and the next tile's q and do may arrive as soon as these are read. There the sums
of do * o over a row, without which no logit has a gradient, are made on the way and left for the kernel of dk and dv.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import key_table, pad_inputs, pad_to, rows_to
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_pieces import (
    LOG2E,
    ROWS,
    Config,
    Mask,
    accumulator,
    before,
    cap_logits,
    heads_at_once,
    launch,
    mma,
    read_count,
    read_tile,
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.schedule import deal, describe, tile_steps


def backward_dq(
    inputs: Inputs, options: Options, config: Config, do, lse, delta, o=None
) -> tuple[jax.Array, jax.Array]:
    """dq [B, T, N, H], and delta; do [B, T, N, Hv]; lse and delta are [B, N, T], lse in powers of two.

    o [B, T, N, Hv], up to head_dim 128: sum(do * o, -1) is added to delta.
    """
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    dtype = inputs.q.dtype
    wgs, bkv, stages = config.warpgroups_bwd, config.block_kv_dq, config.stages_dq
    held = max(H, Hv) <= 128  # q and do in registers
    assert held or o is None
    tile = wgs * ROWS
    padded = pad_inputs(inputs, tile, bkv)
    do, lse, delta = pad_to(do, 1, tile), pad_to(lse, 2, tile), pad_to(delta, 2, tile)
    outputs = () if o is None else (pad_to(o, 1, tile),)  # the forward's
    tiles = padded.q.shape[1] // tile
    ranges = rows_to(key_table(inputs, options, ROWS, bkv), tiles * wgs)
    mask = Mask(padded, options, S, padded.k.shape[1])
    # Counted as the forward counts them: where its tiles are as large there is one schedule.
    steps = tile_steps(key_table(inputs, options, tile, 2 * ROWS), 1)
    schedule = deal(steps, B, N, heads_at_once(B * N, S * (H + Hv) * 2 * K // N, share=2))
    schedule = describe(schedule, ranges, N, wgs)
    c = options.scale * LOG2E

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, schedule_ref, *refs):
        o_ref, refs = refs[: len(outputs)], refs[len(outputs) :]
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        dq_ref, *sums_ref, smem, q_full, q_free, k_full, v_full, k_free, v_free = refs
        q_smem, do_smem, k_smem, v_smem, mask_smem, out_smem, o_smem = smem
        wg = lax.axis_index("wg")
        count = read_count(schedule_ref)

        def work(w, done):
            """One tile; `done` counts the blocks of keys of those before it."""
            b, n, t, lo, hi, mine = read_tile(schedule_ref, w, wg)
            q_start = pl.multiple_of(t * tile + wg * ROWS, ROWS)
            rows = pl.ds(q_start, ROWS)
            down = mask.down(aux, b, rows)
            slot = lambda j: slot_of(done + j - lo, stages)
            reduced = plgpu.Layout.WGMMA.reduce(1)
            # From global memory: shared memory is full, and they arrive under the wait for q.
            lse, delta = (plgpu.load(x.at[b, n, rows], layout=reduced, optimized=False) for x in (lse_ref, delta_ref))
            plgpu.barrier_wait(q_full)
            q, do = q_smem.at[wg], do_smem.at[wg]
            if held:
                q, do, *o = (plgpu.load(x, layout=plgpu.Layout.WGMMA) for x in (q, do, *(x.at[wg] for x in o_smem)))
                plgpu.barrier_arrive(q_free)
                for x in o:
                    delta += jnp.sum(do.astype(jnp.float32) * x.astype(jnp.float32), axis=1)
                    sums_ref[0].at[b, n, rows][...] = delta

            def step(j, dq, masked):
                plgpu.barrier_wait(v_full.at[slot(j)])

                def products(s_ref, dp_ref):
                    s = _product(s_ref, q, k_smem.at[slot(j)].transpose((1, 0)))
                    dp = _product(dp_ref, do, v_smem.at[slot(j)].transpose((1, 0)))
                    s, slope = cap_logits(s(1), options)
                    s = mask.add_bias(aux, s, b, n, q_start, j * bkv)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [0]))
                    if masked:
                        p = jnp.where(mask.keep(down, mask_smem, slot(j), s.shape, q_start, j * bkv), p, 0.0)
                    p = before(p, j + 1 < hi, k_full.at[slot(j + 1)])
                    ds = p * (dp(0) - lax.broadcast_in_dim(delta, s.shape, [0]))
                    return (ds if slope is None else ds * slope).astype(dtype)

                ds = pl.run_scoped(products, accumulator(bkv), accumulator(bkv))
                plgpu.barrier_arrive(v_free.at[slot(j)])
                dq = mma(dq, ds, k_smem.at[slot(j)])
                plgpu.barrier_arrive(k_free.at[slot(j)])
                return dq

            def skip(j):
                """A block that the other warpgroup visits alone."""
                plgpu.barrier_wait(v_full.at[slot(j)])
                plgpu.barrier_arrive(v_free.at[slot(j)])
                plgpu.barrier_arrive(k_free.at[slot(j)])
                pl.when(j + 1 < hi)(lambda: plgpu.barrier_wait(k_full.at[slot(j + 1)]))

            plgpu.barrier_wait(k_full.at[slot(lo)])
            pl.loop(lo, mine[0])(skip)
            dq = plgpu.layout_cast(jnp.full((ROWS, H), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            dq = three_loops(step, mine, dq)
            pl.loop(mine[3], hi)(skip)
            leaving = (out_smem[0] if held else q_smem).at[wg]
            if held:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has long left
            leaving[...] = (dq * options.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(leaving, dq_ref.at[b, rows, n])
            if not held:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free)
            return done + hi - lo

        @pl.when(wg < wgs)
        def _compute():
            set_registers(wgs, 240)
            lax.fori_loop(0, count, work, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _feed():
            set_registers(wgs, 24)

            def feed(w, done):
                b, n, t, lo, hi = read_tile(schedule_ref, w)[:5]
                k_head = lax.div(n, jnp.int32(N // K))
                pl.when(w > 0)(lambda: plgpu.barrier_wait(q_free))
                for x in range(wgs):
                    rows = pl.ds(pl.multiple_of(t * tile + x * ROWS, ROWS), ROWS)
                    for ref, smem in ((q_ref, q_smem), (do_ref, do_smem), *zip(o_ref, o_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[x], q_full)

                @pl.loop(lo, hi)
                def _(j):
                    i = done + j - lo
                    slot = slot_of(i, stages)
                    keys = pl.ds(pl.multiple_of(j * bkv, bkv), bkv)
                    for ref, smem, full, free in ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free)):
                        pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[b, keys, k_head], smem.at[slot], full.at[slot])
                        if ref is k_ref:
                            mask.feed(aux, b, keys, mask_smem, slot, full.at[slot])

                return done + hi - lo

            done = lax.fori_loop(0, count, feed, jnp.int32(0))
            plgpu.barrier_wait(q_free)

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                for free in (k_free, v_free):
                    plgpu.barrier_wait(free.at[slot_of(i, stages)])

    smem = (
        tiled((wgs, ROWS, H), dtype),
        tiled((wgs, ROWS, Hv), dtype),
        tiled((stages, bkv, H), dtype),
        tiled((stages, bkv, Hv), dtype),
        mask.smem(stages, bkv),
        [tiled((wgs, ROWS, H), dtype)] if held else [],
        [tiled((wgs, ROWS, Hv), dtype) for _ in outputs],
    )
    k_full, v_full = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1 + len(mask.across), 1))
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    q_full = plgpu.Barrier(num_arrivals=(2 + len(outputs)) * wgs)
    dq, *sums = launch(
        kernel,
        "attention_dq",
        [
            jax.ShapeDtypeStruct(padded.q.shape, dtype),
            *(jax.ShapeDtypeStruct(delta.shape, jnp.float32) for _ in outputs),
        ],
        {"block": len(schedule)},
        (smem, q_full, plgpu.Barrier(num_arrivals=wgs), k_full, v_full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, schedule, *outputs, *mask.arrays),
        wgs + 1,
    )
    return dq[:, :T], (*sums, delta)[0][:, :, :T]


def _product(acc_ref, a: Any, b_ref):
    """a @ b in flight, a in registers or shared memory; what it returns waits until only so many later ones are."""
    if _dispatch.interpreted("gpu") and isinstance(a, jax.Array):  # whose wgmma takes no operand in registers
        value = jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
        return lambda later: value
    plgpu.wgmma(acc_ref, a, b_ref)
    return lambda later: plgpu.wgmma_accumulator_load(acc_ref, wait_n=later)
