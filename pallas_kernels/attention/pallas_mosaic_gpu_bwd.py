"""The backward of attention for Hopper GPUs: one kernel with five matmuls, where its registers suffice.

A block holds 128 keys: two warpgroups of 64, each with its part of dk and dv in registers, and one that moves blocks of
queries in and of dq out through TMA. Logits and their gradients are computed once, keys down and queries across. The
gradients of the logits go through shared memory, whence both warpgroups multiply them with all 128 keys: each makes
half of what this block of keys adds to dq.

dq is summed in float32 in global memory by TMA, in the order of the key blocks: a semaphore for each query block counts
the blocks that have added theirs. So gradients repeat bit by bit; and as the first one stores, nothing needs to be zero
before. A block walks from its last queries to its first and waits for earlier blocks only, which started before it (the
hardware starts blocks in the order of the grid) and, under a causal mask, have the same last queries: waits are short.
"""

import functools
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
    Config,
    Mask,
    accumulator,
    before,
    cap_logits,
    feed_ring,
    launch,
    make_grid,
    mma,
    read_bounds,
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.pallas_mosaic_gpu_bwd_split import backward_dkv, backward_dq

_TILE = 2 * ROWS  # keys of a block


def backward(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    """dq, dk, dv; lse and delta are [B, N, T], lse in powers of two."""

    def split(inputs, do, lse, delta):
        args = inputs, options, config, do, lse, delta
        return backward_dq(*args), *backward_dkv(*args)

    if not config.fused:
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
    grid, locate = make_grid(B, K, tiles, T * 2 * H * 2 * G)
    interpreted = _dispatch.interpreted("gpu")  # TMA does not add there: each tile stores its part of dq
    by_queries = bq == _TILE  # how the two warpgroups share a block of dq: by queries, or by columns
    width = H if by_queries else H // 2

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, turns_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        dq_ref, dk_ref, dv_ref, smem, kv_barrier, q_barriers, do_barriers, q_free, do_free, *refs = refs
        ds_full, dq_full, dq_free = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem = smem
        wg = lax.axis_index("wg")
        b, k_head, t = locate()
        lo, full_lo, full_hi, hi = read_bounds(ranges_ref, b, t)
        steps = G * (hi - lo)

        @pl.when(wg < 2)
        def _compute():
            set_registers(2, 232)
            kv_start = pl.multiple_of(t * _TILE + wg * ROWS, ROWS)
            keys = pl.ds(kv_start, ROWS)
            mine = pl.ds(pl.multiple_of(wg * ROWS, ROWS), ROWS)
            k, v = k_smem.at[mine], v_smem.at[mine]
            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, k_head], k, kv_barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, k_head], v, kv_barrier)

            def meet():  # what both wrote to shared memory is there, and what both read has been read
                plgpu.barrier_arrive(ds_full)
                plgpu.barrier_wait(ds_full)

            def step(g, sums, r, masked):
                i = r * G + g
                slot = slot_of(i, stages)
                q, do, ds_block = q_smem.at[slot], do_smem.at[slot], ds_smem.at[slot_of(i, 2)]
                plgpu.barrier_wait(do_barriers.at[slot])

                def products(s_ref, dp_ref, dk_ref, dv_ref, dq_ref):  # s, dp: keys down, queries across
                    def across(ref):
                        row = plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                        return lax.broadcast_in_dim(row, (ROWS, bq), [1])

                    # A sum that starts at -lse or -delta needs no registers for them when it has ended.
                    late = interpreted or options.soft_cap is not None
                    if not late:
                        s_ref[...] = across(lse_smem)
                    plgpu.wgmma(s_ref, k, q.transpose((1, 0)))
                    if not interpreted:
                        dp_ref[...] = across(delta_smem)
                    plgpu.wgmma(dp_ref, v, do.transpose((1, 0)))
                    s, slope = cap_logits(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), options)
                    p = jnp.exp2((s + across(lse_smem) if late else s) * c)
                    if masked:
                        p = jnp.where(mask.keep(aux, b, s.shape, 1, (hi - 1 - r) * bq, kv_start), p, 0.0)
                    p = before(p, i + 1 < steps, q_barriers.at[slot_of(i + 1, stages)])
                    dp = plgpu.wgmma_accumulator_load(dp_ref)
                    ds = p * (dp + across(delta_smem) if interpreted else dp)
                    ds = (ds if slope is None else ds * slope).astype(dtype)
                    dv = mma(sums[1], p.astype(dtype), do, dv_ref)
                    ds_block.at[mine][...] = ds
                    plgpu.commit_smem()
                    meet()
                    if by_queries:
                        plgpu.wgmma(dq_ref, ds_block.at[:, mine].transpose((1, 0)), k_smem)
                    else:
                        plgpu.wgmma(dq_ref, ds_block.transpose((1, 0)), k_smem.at[:, mine])
                    dk = mma(sums[0], ds, q, dk_ref)
                    dq = plgpu.wgmma_accumulator_load(dq_ref, wait_n=0 if interpreted else 1)
                    plgpu.barrier_arrive(do_free.at[slot])
                    pl.when(i > 0)(lambda: plgpu.barrier_wait(dq_free))
                    dq_smem.at[wg][...] = dq
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(dq_full)
                    return (dk, dv) if interpreted else (dk_ref[...], dv_ref[...])

                sums = pl.run_scoped(products, *map(accumulator, (bq, bq, H, H, width)))
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            plgpu.barrier_wait(kv_barrier)
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(q_barriers.at[0]))
            zero = plgpu.layout_cast(jnp.full((ROWS, H), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            backwards = 0 * lo, hi - full_hi, hi - full_lo, hi - lo

            def heads(r, sums, masked):
                step_of = functools.partial(step, r=r, masked=masked)
                return step_of(0, sums) if G == 1 else lax.fori_loop(0, G, step_of, sums)

            dk, dv = three_loops(heads, backwards, (zero, zero))
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(dq_free))
            meet()  # the other one multiplied with these keys
            k[...] = (dk * options.scale).astype(dtype)
            v[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[b, keys, k_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[b, keys, k_head])
            plgpu.wait_smem_to_gmem(0)

        def place(i):
            """The query head and the block of queries of step i; all heads of a block, for which others wait."""
            return k_head * G + lax.rem(i, jnp.int32(G)), hi - 1 - lax.div(i, jnp.int32(G))

        @pl.when(wg == 2)
        def _feed():
            set_registers(2, 24)

            def copy(i, ref, row_ref, smem, row_smem, slot, barriers):
                n, j = place(i)
                rows = pl.ds(j * bq, bq)
                plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[slot], barriers.at[slot])
                plgpu.copy_gmem_to_smem(row_ref.at[b, n, rows], row_smem.at[slot], barriers.at[slot])

            copy_q = lambda i, slot: copy(i, q_ref, lse_ref, q_smem, lse_smem, slot, q_barriers)
            copy_do = lambda i, slot: copy(i, do_ref, delta_ref, do_smem, delta_smem, slot, do_barriers)

            feed_ring(steps, stages, (q_free, copy_q), (do_free, copy_do))

        @pl.when(wg == 3)
        def _add():
            set_registers(2, 24)
            if not interpreted:
                semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((B * N * blocks,)))

            def turn(i):
                """How many blocks of keys add to the dq of step i before this one; beyond the last step its number."""
                j = place(jnp.minimum(i, steps - 1))[1]
                return turns_ref[lax.rem(b, jnp.int32(turns_ref.shape[0])), t, j] + 0  # as in read_bounds

            def semaphore(i):
                n, j = place(i)
                return semaphores.at[(b * N + n) * blocks + j]

            def wait_for(i, due):
                if not interpreted:
                    plgpu.semaphore_wait(semaphore(i), due, decrement=False, memory_scope="gpu")

            def signal(i):
                if not interpreted:
                    plgpu.semaphore_signal(semaphore(i), memory_scope="gpu")

            def add(i, turns):
                """Adds the dq of step i to the sum; `turns` are those of this step and the next.

                It waits for its turn in the next step, and for the end of this addition, while the next dq is made.
                """
                due, due_next = turns
                n, j = place(i)
                plgpu.barrier_wait(dq_full)
                for x in (0, 1):
                    rows = pl.ds(j * bq + (x * ROWS if by_queries else 0), ROWS)
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
                plgpu.barrier_arrive(dq_free)
                due_later = turn(i + 2)
                plgpu.wait_smem_to_gmem(1)
                pl.when(i > 0)(lambda: signal(i - 1))
                wait_for(jnp.minimum(i + 1, steps - 1), due_next)
                return due_next, due_later

            @pl.when(steps > 0)
            def _():
                wait_for(0, turn(0))
                lax.fori_loop(0, steps, add, (turn(0), turn(1)))
                plgpu.wait_smem_to_gmem(0)
                signal(steps - 1)

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
    )
    ring, two = plgpu.Barrier(num_arrivals=2, num_barriers=stages), plgpu.Barrier(num_arrivals=2)
    kv_type = jax.ShapeDtypeStruct(padded.k.shape, dtype)
    dq, dk, dv = launch(
        kernel,
        "attention_bwd",
        [jax.ShapeDtypeStruct((tiles,) * interpreted + padded.q.shape, jnp.float32), kv_type, kv_type],
        grid,
        (smem, plgpu.Barrier(num_arrivals=4), *(ring,) * 4, two, two, plgpu.Barrier()),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, turns, *mask.arrays),
        threads=4,
    )
    wide = lambda x: jnp.repeat(jnp.asarray(x), bq, axis=-1)[..., None, None]
    if interpreted:
        dq = jnp.where(wide(visits.swapaxes(0, 1)), dq, 0.0).sum(axis=0)
    elif not (isinstance(visits, np.ndarray) and visits.any(axis=1).all()):
        dq = jnp.where(wide(visits.any(axis=1)), dq, 0.0)  # a block of queries that sees no key was never stored
    return (dq * options.scale).astype(dtype)[:, :queries], dk[:, :S], dv[:, :S]


def _order(ranges, blocks: int):
    """[B or 1, tiles, blocks]: which tiles of keys visit a block of queries; how many did before this one, int32."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    index = xp.arange(blocks, dtype=np.int32)[None, None]
    visits = (ranges[..., :1] <= index) & (index < ranges[..., 3:])
    return visits, xp.cumsum(visits, axis=1, dtype=np.int32) - visits.astype(np.int32)
