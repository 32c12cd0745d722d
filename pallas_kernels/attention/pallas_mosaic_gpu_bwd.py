"""The backward of attention for Hopper GPUs: one kernel with five matmuls, where its registers suffice."""

import functools
import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import pad_inputs, pad_to, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_pieces import (
    LOG2E,
    ROWS,
    SM_COUNT,
    Config,
    Mask,
    accumulator,
    before,
    cap_logits,
    heads_at_once,
    launch,
    read_bounds,
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.pallas_mosaic_gpu_bwd_split import backward as split_backward

_TILE = 2 * ROWS  # keys of a tile
_BEHIND = 2  # steps from one tile's addition to a block of dq to that of the next
_BETWEEN = 2  # steps' worth of time between two tiles of a block


def backward(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    """dq, dk, dv; do [B, T, N, Hv]; lse and delta are [B, N, T], lse in powers of two."""

    def split(inputs, do, lse, delta):
        return split_backward(inputs, options, config, do, lse, delta)

    if not config.fused or inputs.bias is not None:
        return split(inputs, do, lse, delta)

    @custom_vmap
    def run(inputs, do, lse, delta):
        return _fused(inputs, options, config, do, lse, delta)

    @run.def_vmap
    def _(axis_size, in_batched, *args):  # all elements of a batch would share the kernel's semaphores
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        return jax.vmap(split, in_axes=axes, axis_size=axis_size)(*args), (True, True, True)

    return run(inputs, do, lse, delta)


def _fused(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    B, S, K, H = inputs.k.shape
    _, queries, N, _ = inputs.q.shape
    G = N // K
    dtype = inputs.q.dtype
    bq, stages = config.block_q, config.stages_bwd
    c = options.scale * LOG2E
    padded = pad_inputs(inputs, bq, _TILE)
    do, lse, delta = pad_to(do, 1, bq), pad_to(-lse / c, 2, bq), pad_to(-delta, 2, bq)
    T = padded.q.shape[1]
    tiles, blocks = padded.k.shape[1] // _TILE, T // bq
    ranges = query_ranges(inputs, options, bq, _TILE)
    visits, turns = _order(ranges, blocks)
    mask = Mask(padded, options, S, padded.k.shape[1])
    schedule = _schedule(ranges, B * K, tiles, heads_at_once(B * K, T * (2 * H * 2 + H * 4) * G), G)
    interpreted = _dispatch.interpreted("gpu")  # TMA does not add there: each tile stores its part of dq
    by_queries = bq == _TILE  # how the two warpgroups share a block of dq: by queries, or by columns
    width = H if by_queries else H // 2
    late = interpreted or options.soft_cap is not None  # when -lse is added; otherwise the sum starts there

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, turns_ref, schedule_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        dq_ref, dk_ref, dv_ref, smem, kv_barrier, q_barriers, do_barriers, q_free, do_free, *refs = refs
        ds_full, ds_free, dq_full, dq_free, met = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem, *through = smem
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        count = schedule_ref[block, 0] + 0

        def place(w):
            """Batch, kv head, tile and range of queries of the w-th tile of this block."""
            x = schedule_ref[block, w + 1] + 0
            pair, t = lax.div(x, jnp.int32(tiles)), lax.rem(x, jnp.int32(tiles))
            b, k_head = lax.div(pair, jnp.int32(K)), lax.rem(pair, jnp.int32(K))
            return b, k_head, t, read_bounds(ranges_ref, b, t)

        def step_place(i, k_head, lo, hi):
            """The query head and the block of queries of step i of a tile."""
            return k_head * G + lax.div(i, hi - lo), lo + lax.rem(i, hi - lo)

        @pl.when(wg < 2)
        def _compute():
            set_registers(2, 232)
            mine = pl.ds(pl.multiple_of(wg * ROWS, ROWS), ROWS)
            k, v = k_smem.at[mine], v_smem.at[mine]

            def across(ref, slot):
                row = plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                return lax.broadcast_in_dim(row, (ROWS, bq), [1])

            def from_registers(acc_ref, a, b_ref):
                if interpreted:  # its wgmma takes a from shared memory alone
                    through[0].at[wg][...] = a
                    plgpu.commit_smem()
                    a = through[0].at[wg]
                plgpu.wgmma(acc_ref, a, b_ref)

            def work(w, done):
                b, k_head, t, (lo, full_lo, full_hi, hi) = place(w)
                steps = G * (hi - lo)
                kv_start = pl.multiple_of(t * _TILE + wg * ROWS, ROWS)
                keys = pl.ds(kv_start, ROWS)
                plgpu.copy_gmem_to_smem(k_ref.at[b, keys, k_head], k, kv_barrier)
                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, k_head], v, kv_barrier)

                def make_dq(i, dq_ref):
                    """dq of step i from the ds of both warpgroups."""
                    plgpu.barrier_wait(ds_full.at[slot_of(i, 2)])
                    ds_block = ds_smem.at[slot_of(i, 2)]
                    if by_queries:
                        plgpu.wgmma(dq_ref, ds_block.at[:, mine].transpose((1, 0)), k_smem)
                    else:
                        plgpu.wgmma(dq_ref, ds_block.transpose((1, 0)), k_smem.at[:, mine])

                def send_dq(i, dq):
                    @pl.when(i >= 0)
                    def _():
                        pl.when(done + i > 0)(lambda: plgpu.barrier_wait(dq_free.at[wg]))
                        dq_smem.at[wg][...] = dq
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(dq_full.at[wg])

                def tile(dk_sum, dv_sum):
                    def step(j, carry, masked, first):
                        i = first + j - lo
                        slot = slot_of(done + i, stages)
                        q, do = q_smem.at[slot], do_smem.at[slot]

                        def softmax(s_ref, dp_ref):
                            """p and ds of step i."""
                            plgpu.barrier_wait(q_barriers.at[slot])
                            if not late:
                                s_ref[...] = across(lse_smem, slot)
                            plgpu.wgmma(s_ref, k, q.transpose((1, 0)))
                            plgpu.barrier_wait(do_barriers.at[slot])
                            if not interpreted:
                                dp_ref[...] = across(delta_smem, slot)
                            plgpu.wgmma(dp_ref, v, do.transpose((1, 0)))
                            s, slope = cap_logits(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), options)
                            p = jnp.exp2((s + across(lse_smem, slot) if late else s) * c)
                            if masked:
                                p = jnp.where(mask.keep(aux, b, s.shape, 1, j * bq, kv_start), p, 0.0)
                            p = before(p, i > 0, ds_free.at[slot_of(i, 2)])
                            dp = plgpu.wgmma_accumulator_load(dp_ref)
                            ds = p * (dp + across(delta_smem, slot) if interpreted else dp)
                            return p.astype(dtype), (ds if slope is None else ds * slope).astype(dtype)

                        p, ds = pl.run_scoped(softmax, accumulator(bq), accumulator(bq))
                        ds_smem.at[slot_of(i, 2), mine][...] = ds
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(ds_full.at[slot_of(i, 2)])

                        def products(dq_sum):
                            from_registers(dv_sum, p, do)
                            make_dq(i + 1, dq_sum)  # of step i - 1, which lies in the same place
                            from_registers(dk_sum, ds, q)
                            return plgpu.wgmma_accumulator_load(dq_sum, wait_n=1)

                        dq = pl.run_scoped(products, accumulator(width))
                        plgpu.barrier_arrive(do_free.at[slot])
                        plgpu.barrier_arrive(ds_free.at[slot_of(i + 1, 2)])
                        send_dq(i - 1, dq)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(q_free.at[slot])
                        return carry

                    def head(g, carry):
                        bounds = lo, full_lo, full_hi, hi
                        return three_loops(functools.partial(step, first=g * (hi - lo)), bounds, carry)

                    if G == 1:
                        head(0, jnp.int32(0))
                    else:
                        lax.fori_loop(0, G, head, jnp.int32(0))

                    def last(dq_sum):
                        make_dq(steps + 1, dq_sum)
                        return plgpu.wgmma_accumulator_load(dq_sum)

                    pl.when(steps > 0)(lambda: plgpu.barrier_wait(ds_free.at[slot_of(steps, 2)]))
                    send_dq(steps - 1, pl.run_scoped(last, accumulator(width)))
                    plgpu.barrier_arrive(met)
                    plgpu.barrier_wait(met)  # the other one multiplied with these keys
                    k[...] = (dk_sum[...] * options.scale).astype(dtype)
                    v[...] = dv_sum[...].astype(dtype)

                plgpu.barrier_arrive(ds_full.at[1])  # so that the first step need not be another one
                plgpu.barrier_wait(kv_barrier)
                pl.run_scoped(tile, accumulator(H), accumulator(H))
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(k, dk_ref.at[b, keys, k_head])
                plgpu.copy_smem_to_gmem(v, dv_ref.at[b, keys, k_head])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                return done + steps

            done = lax.fori_loop(0, count, work, jnp.int32(0))
            pl.when(done > 0)(lambda: plgpu.barrier_wait(dq_free.at[wg]))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            set_registers(2, 24)

            def feed(w, done):
                b, k_head, t, (lo, _, _, hi) = place(w)
                steps = G * (hi - lo)

                @pl.loop(0, steps)
                def _(i):
                    n, j = step_place(i, k_head, lo, hi)
                    slot = slot_of(done + i, stages)
                    rows = pl.ds(pl.multiple_of(j * bq, bq), bq)
                    for ref, row_ref, smem, row_smem, full, free in (
                        (q_ref, lse_ref, q_smem, lse_smem, q_barriers, q_free),
                        (do_ref, delta_ref, do_smem, delta_smem, do_barriers, do_free),
                    ):
                        pl.when(done + i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(row_ref.at[b, n, rows], row_smem.at[slot], full.at[slot])

                return done + steps

            done = lax.fori_loop(0, count, feed, jnp.int32(0))

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                plgpu.barrier_wait(q_free.at[slot_of(i, stages)])
                plgpu.barrier_wait(do_free.at[slot_of(i, stages)])

        @pl.when(wg == 3)
        def _add():
            set_registers(2, 24)
            if not interpreted:
                semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((B * N * blocks,)))

            def semaphore(b, n, j):
                return semaphores.at[(b * N + n) * blocks + j]

            def wait_for(b, n, j, due):
                if not interpreted:
                    plgpu.semaphore_wait(semaphore(b, n, j), due, decrement=False, memory_scope="gpu")

            def signal(b, n, j):
                if not interpreted:
                    plgpu.semaphore_signal(semaphore(b, n, j), memory_scope="gpu")

            def tile(w, carry):
                b, k_head, t, (lo, _, _, hi) = place(w)
                steps = G * (hi - lo)
                at = lambda i: step_place(i, k_head, lo, hi)

                def turn(i):
                    """How many tiles add to the dq of step i before this one; beyond the last step its number."""
                    j = at(jnp.minimum(i, steps - 1))[1]
                    return turns_ref[lax.rem(b, jnp.int32(turns_ref.shape[0])), t, j] + 0  # as in read_bounds

                def add(i, dues):
                    """Adds the dq of step i, for which it is this tile's turn; then waits for the turn of the next."""
                    due, due_next = dues
                    n, j = at(i)
                    for x in (0, 1):
                        plgpu.barrier_wait(dq_full.at[x])
                        rows = pl.ds(pl.multiple_of(j * bq + (x * ROWS if by_queries else 0), ROWS), ROWS)
                        columns = pl.ds(0 if by_queries else x * width, width)
                        if interpreted:
                            plgpu.copy_smem_to_gmem(dq_smem.at[x], dq_ref.at[t, b, rows, n, columns])
                        else:
                            to = dq_ref.at[b, rows, n, columns]
                            store = functools.partial(plgpu.copy_smem_to_gmem, dq_smem.at[x], to, commit_group=False)
                            pl.when(due == 0)(store)
                            pl.when(due > 0)(functools.partial(store, reduction_op="add"))
                            plgpu.commit_smem_to_gmem_group()
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        plgpu.barrier_arrive(dq_free.at[x])
                    due_later = turn(i + 2)
                    plgpu.wait_smem_to_gmem(2)
                    pl.when(i > 0)(lambda: signal(b, *at(i - 1)))
                    pl.when(i + 1 < steps)(lambda: wait_for(b, *at(i + 1), due_next))
                    return due_next, due_later

                @pl.when(steps > 0)
                def _():
                    wait_for(b, *at(jnp.int32(0)), turn(0))
                    lax.fori_loop(0, steps, add, (turn(0), turn(1)))
                    plgpu.wait_smem_to_gmem(0)
                    signal(b, *at(steps - 1))

                return carry

            lax.fori_loop(0, count, tile, jnp.int32(0))

    transforms: Any = plgpu  # pyright takes these two for abstract classes
    words = transforms.TilingTransform((8, 32)), transforms.SwizzleTransform(128)
    smem = (
        tiled((_TILE, H), dtype),
        tiled((_TILE, H), dtype),
        tiled((stages, bq, H), dtype),
        tiled((stages, bq, H), dtype),
        plgpu.SMEM((stages, bq), jnp.float32),
        plgpu.SMEM((stages, bq), jnp.float32),
        tiled((2, _TILE, bq), dtype),
        plgpu.SMEM((2, ROWS, width), jnp.float32, transforms=words),
        *([tiled((2, ROWS, bq), dtype)] if interpreted else []),
    )
    ring, two = plgpu.Barrier(num_arrivals=2, num_barriers=stages), plgpu.Barrier(num_arrivals=2, num_barriers=2)
    one = plgpu.Barrier(num_barriers=2)
    kv_type = jax.ShapeDtypeStruct(padded.k.shape, dtype)
    dq, dk, dv = launch(
        kernel,
        "attention_bwd",
        [jax.ShapeDtypeStruct((tiles,) * interpreted + padded.q.shape, jnp.float32), kv_type, kv_type],
        {"block": len(schedule)},
        (smem, plgpu.Barrier(num_arrivals=4), *(ring,) * 4, two, two, one, one, plgpu.Barrier(num_arrivals=2)),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, turns, schedule, *mask.arrays),
        threads=4,
    )
    wide = lambda x: jnp.repeat(jnp.asarray(x), bq, axis=-1)[..., None, None]
    if interpreted:
        dq = jnp.where(wide(visits.swapaxes(0, 1)), dq, 0.0).sum(axis=0)
    elif not (isinstance(visits, np.ndarray) and visits.any(axis=1).all()):
        dq = jnp.where(wide(visits.any(axis=1)), dq, 0.0)  # a block of queries that sees no key was never stored
    return (dq * options.scale).astype(dtype)[:, :queries], dk[:, :S], dv[:, :S]


def _order(ranges, blocks: int):
    """[B or 1, tiles, blocks]: which tiles of keys visit a block of queries; how many later ones do, int32."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    index = xp.arange(blocks, dtype=np.int32)[None, None]
    visits = (ranges[..., :1] <= index) & (index < ranges[..., 3:])
    counts = visits.astype(np.int32)
    return visits, xp.flip(xp.cumsum(xp.flip(counts, axis=1), axis=1, dtype=np.int32), axis=1) - counts


def _schedule(ranges, pairs: int, tiles: int, together: int, G: int):
    """int32 [blocks, 1 + most tiles]: how many tiles a block computes, and which: pair of batch and head * tiles + tile.

    Every table is in one order of all tiles in which those that add to the same dq go from the last to the first: no
    block waits for one that has not started. Where the ranges are known the tiles are dealt out backwards in time, so
    that all blocks end together: the last tile of all is the longest, and a tile starts before the one it goes before.
    Else each has a block of its own, and the hardware starts them in order.
    """
    order = (np.arange(pairs).reshape(-1, 1, together) * tiles + np.arange(tiles)[:, None]).reshape(-1)
    if not isinstance(ranges, np.ndarray) or pairs * tiles <= SM_COUNT:
        return np.stack([np.ones_like(order), order[::-1]], axis=1).astype(np.int32)
    steps = np.broadcast_to(G * (ranges[..., 3] - ranges[..., 0]), (pairs, tiles)).reshape(-1)
    free = [(0, block) for block in range(SM_COUNT)]
    lists: list[list[int]] = [[] for _ in free]
    at = np.zeros(pairs * tiles, np.int64)
    for x in order.tolist():
        time, block = heapq.heappop(free)
        at[x] = time if x % tiles == 0 else max(time, at[x - 1] + _BEHIND)
        lists[block].append(x)
        heapq.heappush(free, (int(at[x] + steps[x]) + _BETWEEN, block))
    most = max(map(len, lists))
    return np.asarray([[len(x), *x[::-1], *[0] * (most - len(x))] for x in lists], np.int32)
