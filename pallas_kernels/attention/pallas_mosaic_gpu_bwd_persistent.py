"""The two backward kernels of pallas_mosaic_gpu_bwd.py, persistent as the forward is. Not run on a device yet.

One block for each multiprocessor computes one tile after another; the next tile's loads start before this one's output
has left. Up to head_dim 128 the dq kernel holds its rows of q and do in registers: both matmuls that read them then
take half of the shared memory's bandwidth, and the next tile's q and do may arrive as soon as these are read.

`Config.persistent_bwd` picks these kernels. When a device has shown them faster they replace the others, else they go.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import key_ranges, pad_inputs, pad_to, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_pieces import (
    LOG2E,
    ROWS,
    Config,
    Mask,
    accumulator,
    before,
    cap_logits,
    find_tile,
    heads_at_once,
    launch,
    mma,
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.schedule import deal


def backward(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    """dq, dk, dv; do [B, T, N, Hv]; lse and delta are [B, N, T], lse in powers of two."""
    dq = _backward_dq(inputs, options, config, do, lse, delta)
    run = functools.partial(_dkv, inputs, options, config, do, lse, delta)
    if config.split_dkv:
        return dq, run(True, False)[0], run(False, True)[0]
    return dq, *run(True, True)


def _backward_dq(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> jax.Array:
    """dq [B, T, N, H]."""
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    dtype = inputs.q.dtype
    wgs, bkv, stages = config.warpgroups_bwd, config.block_kv_dq, config.stages_dq
    held = max(H, Hv) <= 128  # q and do in registers
    tile = wgs * ROWS
    padded = pad_inputs(inputs, tile, bkv)
    do, lse, delta = pad_to(do, 1, tile), pad_to(lse, 2, tile), pad_to(delta, 2, tile)
    tiles = padded.q.shape[1] // tile
    ranges = key_ranges(inputs, options, tile, bkv)
    mask = Mask(padded, options, S, padded.k.shape[1])
    schedule = deal(ranges, B, N, tiles, heads_at_once(B * N, S * (H + Hv) * 2 * K // N), traced=True)
    c = options.scale * LOG2E

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, schedule_ref, *refs):
        aux, (dq_ref, smem, q_full, q_free, k_full, v_full, k_free, v_free) = refs[:-8], refs[-8:]
        q_smem, do_smem, k_smem, v_smem, lse_smem, delta_smem, *out_smem = smem
        wg = lax.axis_index("wg")
        count = schedule_ref[lax.axis_index("block"), 0] + 0
        place = functools.partial(find_tile, schedule_ref, ranges_ref, heads=N, tiles=tiles)

        def work(w, done):
            """One tile; `done` counts the blocks of keys of those before it."""
            b, n, t, (lo, full_lo, full_hi, hi) = place(w)
            q_start = pl.multiple_of(t * tile + wg * ROWS, ROWS)
            rows = pl.ds(q_start, ROWS)
            slot = lambda j: slot_of(done + j - lo, stages)
            plgpu.barrier_wait(q_full)
            reduced = plgpu.Layout.WGMMA.reduce(1)
            lse, delta = (plgpu.load(x.at[wg], layout=reduced, optimized=False) for x in (lse_smem, delta_smem))
            q, do = q_smem.at[wg], do_smem.at[wg]
            if held:
                q, do = (plgpu.load(x, layout=plgpu.Layout.WGMMA) for x in (q, do))
                plgpu.barrier_arrive(q_free)

            def step(j, dq, masked):
                plgpu.barrier_wait(v_full.at[slot(j)])

                def products(s_ref, dp_ref):
                    s = _product(s_ref, q, k_smem.at[slot(j)].transpose((1, 0)))
                    dp = _product(dp_ref, do, v_smem.at[slot(j)].transpose((1, 0)))
                    s, slope = cap_logits(s(1), options)
                    s = mask.add_bias(aux, s, b, n, 0, q_start, j * bkv)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [0]))
                    if masked:
                        p = jnp.where(mask.keep(aux, b, s.shape, 0, q_start, j * bkv), p, 0.0)
                    p = before(p, j + 1 < hi, k_full.at[slot(j + 1)])
                    ds = p * (dp(0) - lax.broadcast_in_dim(delta, s.shape, [0]))
                    return (ds if slope is None else ds * slope).astype(dtype)

                ds = pl.run_scoped(products, accumulator(bkv), accumulator(bkv))
                plgpu.barrier_arrive(v_free.at[slot(j)])
                dq = mma(dq, ds, k_smem.at[slot(j)])
                plgpu.barrier_arrive(k_free.at[slot(j)])
                return dq

            plgpu.barrier_wait(k_full.at[slot(lo)])
            dq = plgpu.layout_cast(jnp.full((ROWS, H), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            dq = three_loops(step, (lo, full_lo, full_hi, hi), dq)
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
                b, n, t, (lo, _, _, hi) = place(w)
                k_head = lax.div(n, jnp.int32(N // K))
                pl.when(w > 0)(lambda: plgpu.barrier_wait(q_free))
                for x in range(wgs):
                    rows = pl.ds(pl.multiple_of(t * tile + x * ROWS, ROWS), ROWS)
                    for ref, smem in ((q_ref, q_smem), (do_ref, do_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[x], q_full)
                    for ref, smem in ((lse_ref, lse_smem), (delta_ref, delta_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, n, rows], smem.at[x], q_full)

                @pl.loop(lo, hi)
                def _(j):
                    i = done + j - lo
                    slot = slot_of(i, stages)
                    keys = pl.ds(pl.multiple_of(j * bkv, bkv), bkv)
                    for ref, smem, full, free in ((k_ref, k_smem, k_full, k_free), (v_ref, v_smem, v_full, v_free)):
                        pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[b, keys, k_head], smem.at[slot], full.at[slot])

                return done + hi - lo

            done = lax.fori_loop(0, count, feed, jnp.int32(0))
            _drain(done, stages, k_free, v_free)
            plgpu.barrier_wait(q_free)

    smem = (
        tiled((wgs, ROWS, H), dtype),
        tiled((wgs, ROWS, Hv), dtype),
        tiled((stages, bkv, H), dtype),
        tiled((stages, bkv, Hv), dtype),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        *([tiled((wgs, ROWS, H), dtype)] if held else []),
    )
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    (dq,) = launch(
        kernel,
        "attention_dq",
        [jax.ShapeDtypeStruct(padded.q.shape, dtype)],
        {"block": len(schedule)},
        (smem, plgpu.Barrier(num_arrivals=4 * wgs), plgpu.Barrier(num_arrivals=wgs), full, full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, schedule, *mask.arrays),
        wgs + 1,
    )
    return dq[:, :T]


def _dkv(inputs: Inputs, options: Options, config: Config, do, lse, delta, want_dk: bool, want_dv: bool):
    """The wanted ones of dk [B, S, K, H] and dv [B, S, K, Hv]; a tile sums over the query heads of its kv head."""
    B, S, K, H = inputs.k.shape
    N, Hv = inputs.q.shape[2], inputs.v.shape[3]
    G = N // K
    dtype = inputs.q.dtype
    wgs, bq, stages = config.warpgroups_bwd, config.block_q_dkv, config.stages_dkv
    tile = wgs * ROWS
    padded = pad_inputs(inputs, bq, tile)
    do, lse, delta = pad_to(do, 1, bq), pad_to(lse, 2, bq), pad_to(delta, 2, bq)
    T = padded.q.shape[1]
    tiles = padded.k.shape[1] // tile
    ranges = query_ranges(inputs, options, bq, tile)
    mask = Mask(padded, options, S, padded.k.shape[1], keys_down=True)
    schedule = deal(ranges, B, K, tiles, heads_at_once(B * K, T * (H + Hv) * 2 * G), traced=True, weight=G)
    c = options.scale * LOG2E
    buffers = 2 if max(H, Hv) <= 128 else 1  # of k and v: the next tile's arrive under this tile's work
    widths = {x: width for x, width, want in (("dv", Hv, want_dv), ("dk", H, want_dk)) if want}

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, schedule_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        *out_refs, smem, kv_full, kv_free, q_full, do_full, q_free, do_free = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = smem
        wg = lax.axis_index("wg")
        count = schedule_ref[lax.axis_index("block"), 0] + 0
        place = functools.partial(find_tile, schedule_ref, ranges_ref, heads=K, tiles=tiles)

        def work(w, done):
            """One tile; `done` counts the steps of those before it."""
            b, k_head, t, (lo, full_lo, full_hi, hi) = place(w)
            kv_start = pl.multiple_of(t * tile + wg * ROWS, ROWS)
            rows = pl.ds(kv_start, ROWS)
            buffer = slot_of(w, buffers)
            k, v = k_smem.at[buffer, wg], v_smem.at[buffer, wg]
            across = plgpu.Layout.WGMMA.reduce(0)

            def step(j, sums, masked, first):
                i = first + j - lo
                slot = slot_of(done + i, stages)
                plgpu.barrier_wait(do_full.at[slot])

                def products(s_ref, dp_ref, *sum_refs):  # s, dp: keys down, queries across
                    in_flight = dict(zip(widths, sum_refs))
                    plgpu.wgmma(s_ref, k, q_smem.at[slot].transpose((1, 0)))
                    if want_dk:
                        plgpu.wgmma(dp_ref, v, do_smem.at[slot].transpose((1, 0)))
                    s, slope = cap_logits(plgpu.wgmma_accumulator_load(s_ref, wait_n=int(want_dk)), options)
                    s = mask.add_bias(aux, s, b, k_head * G + lax.div(i, hi - lo), 1, j * bq, kv_start)
                    lse = plgpu.load(lse_smem.at[slot], layout=across)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [1]))
                    if masked:
                        p = jnp.where(mask.keep(aux, b, s.shape, 1, j * bq, kv_start), p, 0.0)
                    if buffers > 1:
                        pl.when((i == 0) & (w > 0))(lambda: release(1 - buffer))
                    p = before(p, i + 1 < G * (hi - lo), q_full.at[slot_of(done + i + 1, stages)])
                    new = {}
                    if want_dv:
                        new["dv"] = mma(sums["dv"], p.astype(dtype), do_smem.at[slot], in_flight.get("dv"))
                    if want_dk:
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=int("dv" in in_flight))
                        delta = plgpu.load(delta_smem.at[slot], layout=across)
                        ds = p * (dp - lax.broadcast_in_dim(delta, s.shape, [1]))
                        ds = (ds if slope is None else ds * slope).astype(dtype)
                        new["dk"] = mma(sums["dk"], ds, q_smem.at[slot], in_flight.get("dk"))
                    return {x: in_flight[x][...] if in_flight else new[x] for x in widths}

                accs = [] if _dispatch.interpreted("gpu") else [accumulator(width) for width in widths.values()]
                sums = pl.run_scoped(products, accumulator(bq), accumulator(bq), *accs)
                plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            plgpu.barrier_wait(kv_full.at[buffer])
            plgpu.barrier_wait(q_full.at[slot_of(done, stages)])
            zero = lambda width: plgpu.layout_cast(jnp.full((ROWS, width), 0.0, jnp.float32), plgpu.Layout.WGMMA)

            def head(g, sums):
                return three_loops(functools.partial(step, first=g * (hi - lo)), (lo, full_lo, full_hi, hi), sums)

            sums = lax.fori_loop(0, G, head, {x: zero(width) for x, width in widths.items()})
            leaving = {"dk": k, "dv": v}
            for x in widths:
                leaving[x][...] = (sums[x] * (options.scale if x == "dk" else 1.0)).astype(dtype)
            plgpu.commit_smem()
            for x, out_ref in zip(widths, out_refs, strict=True):
                plgpu.copy_smem_to_gmem(leaving[x], out_ref.at[b, rows, k_head])
            if buffers == 1:
                release(0)
            return done + G * (hi - lo)

        def release(buffer):
            """The output of the tile that stood there has left."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(kv_free.at[buffer])

        @pl.when(wg < wgs)
        def _compute():
            set_registers(wgs, 240)
            lax.fori_loop(0, count, work, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            if buffers > 1:
                plgpu.barrier_arrive(kv_free.at[slot_of(count - 1, buffers)])

        @pl.when(wg == wgs)
        def _feed():
            set_registers(wgs, 24)

            def feed(w, done):
                b, k_head, t, (lo, _, _, hi) = place(w)
                buffer = slot_of(w, buffers)
                pl.when(w >= buffers)(lambda: plgpu.barrier_wait(kv_free.at[buffer]))
                for x in range(wgs):
                    rows = pl.ds(pl.multiple_of(t * tile + x * ROWS, ROWS), ROWS)
                    for ref, smem in ((k_ref, k_smem), (v_ref, v_smem)):
                        plgpu.copy_gmem_to_smem(ref.at[b, rows, k_head], smem.at[buffer, x], kv_full.at[buffer])

                @pl.loop(0, G * (hi - lo))
                def _(i):
                    n = k_head * G + lax.div(i, hi - lo)
                    queries = pl.ds(pl.multiple_of((lo + lax.rem(i, hi - lo)) * bq, bq), bq)
                    slot = slot_of(done + i, stages)
                    for ref, row_ref, smem, row_smem, full, free in (
                        (q_ref, lse_ref, q_smem, lse_smem, q_full, q_free),
                        (do_ref, delta_ref, do_smem, delta_smem, do_full, do_free),
                    ):
                        pl.when(done + i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[b, queries, n], smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(row_ref.at[b, n, queries], row_smem.at[slot], full.at[slot])

                return done + G * (hi - lo)

            _drain(lax.fori_loop(0, count, feed, jnp.int32(0)), stages, q_free, do_free)
            _drain(count, buffers, kv_free)

    smem = (
        tiled((buffers, wgs, ROWS, H), dtype),
        tiled((buffers, wgs, ROWS, Hv), dtype),
        tiled((stages, bq, H), dtype),
        tiled((stages, bq, Hv), dtype),
        plgpu.SMEM((stages, bq), jnp.float32),
        plgpu.SMEM((stages, bq), jnp.float32),
    )
    kv_full = plgpu.Barrier(num_arrivals=2 * wgs, num_barriers=buffers)
    kv_free = plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers)
    full = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    out = launch(
        kernel,
        "attention_" + "_".join(widths),
        [jax.ShapeDtypeStruct((*padded.k.shape[:3], width), dtype) for width in widths.values()],
        {"block": len(schedule)},
        (smem, kv_full, kv_free, full, full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, schedule, *mask.arrays),
        wgs + 1,
    )
    return [x[:, :S] for x in reversed(out)]


def _product(acc_ref, a: Any, b_ref):
    """a @ b in flight, a in registers or shared memory; what it returns waits until only so many later ones are."""
    if _dispatch.interpreted("gpu") and isinstance(a, jax.Array):  # whose wgmma takes no operand in registers
        value = jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
        return lambda later: value
    plgpu.wgmma(acc_ref, a, b_ref)
    return lambda later: plgpu.wgmma_accumulator_load(acc_ref, wait_n=later)


def _drain(done, slots: int, *barriers):
    """Waits for the last use of each slot."""

    @pl.loop(jnp.maximum(done - slots, 0), done)
    def _(i):
        for free in barriers:
            plgpu.barrier_wait(free.at[slot_of(i, slots)])
