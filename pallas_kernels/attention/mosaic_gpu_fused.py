"""The backward of attention for Hopper GPUs in one kernel of five matmuls, up to head_dim 128 (at 128 two are faster).

A block holds 128 keys. Two warpgroups of 64 keys each make logits and their gradients (keys down, queries across) and
sum dk and dv in registers; they hand the gradients of the logits on through shared memory and do not wait for each
other. A third warpgroup multiplies them with the keys and adds the product to dq in global memory, float32, by TMA; it
also feeds the other two. Registers decide: a warpgroup has 24 beside what wgmma reads from registers or sums there
(216 = 24 + 2 x 64 for dk and dv + 32 + 2 x 16 for one block), so logits and their gradients take turns.

dq is summed in one order of the key blocks: a semaphore for each block of queries counts the key blocks that have added
theirs, so gradients repeat bit by bit. The first one stores, so nothing needs to be zero before, and the last one reads
the sum of the others and writes dq. Waits are for blocks of keys that started earlier (the hardware starts blocks in
the order of the grid) and are short: key blocks start from the last to the first and walk up their queries, so that
under a causal mask each is two steps behind the one before it. The last group of heads starts with the longest blocks
instead and walks down, so that all multiprocessors end together.
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
    cap_logits,
    heads_at_once,
    launch,
    mma,
    read_bounds,
    slot_of,
    three_loops,
    tiled,
)

_TILE = 2 * ROWS  # keys of a block
_COMPUTE, _MULTIPLY = 216, 72  # registers of a thread
_STRIDED_SHAPE = (16, 256)
_STRIDED = plgpu.Layout.WG_STRIDED(_STRIDED_SHAPE, 2)


def pays(inputs: Inputs) -> bool:
    """Where it was faster than two kernels on a device: not with groups of heads, nor with tables made there."""
    hidden = inputs.q_positions, inputs.q_segment_ids, inputs.window
    return inputs.q.shape[2] == inputs.k.shape[2] and all(x is None for x in hidden)


def fused(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    """dq, dk, dv; lse and delta are [B, N, T], lse in powers of two."""

    @custom_vmap
    def run(*args):
        return _fused(args[0], options, config, *args[1:])

    @run.def_vmap
    def _(axis_size, in_batched, *args):  # all elements of a batch would share the kernel's semaphores
        batched, treedef = jax.tree.flatten(in_batched)
        leaves = jax.tree.leaves(args)

        def one(i):
            at = lambda x, b: lax.dynamic_index_in_dim(x, i, keepdims=False) if b else x
            return run(*jax.tree.unflatten(treedef, map(at, leaves, batched)))

        return lax.map(one, jnp.arange(axis_size)), (True, True, True)

    return run(inputs, do, lse, delta)


def _fused(inputs: Inputs, options: Options, config: Config, do, lse, delta):
    B, S, K, H = inputs.k.shape
    _, queries, N, _ = inputs.q.shape
    Hv = inputs.v.shape[3]
    G = N // K
    dtype = inputs.q.dtype
    bq, stages = config.block_q_dkv, config.stages_dkv
    c = options.scale * LOG2E
    padded = pad_inputs(inputs, bq, _TILE)
    do, lse, delta = pad_to(do, 1, bq), pad_to(lse, 2, bq), pad_to(delta, 2, bq)
    T = padded.q.shape[1]
    tiles, blocks = padded.k.shape[1] // _TILE, T // bq
    ranges = query_ranges(inputs, options, bq, _TILE)
    visits, turns = _order(ranges, blocks)
    pairs = B * K
    group = heads_at_once(pairs, T * (H + Hv + 2 * H) * 2 * G)
    grid = {"group": pairs // group, "tile": tiles, "pair": group}
    mask = Mask(padded, options, S, padded.k.shape[1], keys_down=True)
    interpreted = _dispatch.interpreted("gpu")  # TMA does not add there: each tile stores its part of dq
    parts = [(x, y) for x in range(bq // ROWS) for y in range(H // ROWS)]  # of a block of dq, 64 x 64 each
    part_shape = (ROWS, ROWS) if interpreted else _STRIDED_SHAPE

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, turns_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        (sum_ref, *dq_ref), refs = refs[:-11], refs[-11:]
        dk_ref, dv_ref, smem, kv_barrier, q_barriers, do_barriers, q_free, do_free, *refs = refs
        ds_full, ds_free, k_free = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, ds_smem, dq_smem, mask_smem = smem
        wg = lax.axis_index("wg")
        pair = lax.axis_index("group") * group + lax.axis_index("pair")
        b, k_head = lax.div(pair, jnp.int32(K)), lax.rem(pair, jnp.int32(K))
        descends = lax.axis_index("group") == pairs // group - 1
        t = jnp.where(descends, lax.axis_index("tile"), tiles - 1 - lax.axis_index("tile"))
        lo, full_lo, full_hi, hi = read_bounds(ranges_ref, b, t)
        first, ahead = jnp.where(descends, hi - 1, lo), jnp.where(descends, -1, 1)
        steps = G * (hi - lo)

        def place(i):
            """The query head and the block of queries of step i; all heads of a block, for which others wait."""
            return k_head * G + lax.rem(i, jnp.int32(G)), first + ahead * lax.div(i, jnp.int32(G))

        @pl.when(wg < 2)
        def _compute():
            plgpu.set_max_registers(_COMPUTE, action="increase")
            kv_start = pl.multiple_of(t * _TILE + wg * ROWS, ROWS)
            keys = pl.ds(kv_start, ROWS)
            mine = pl.ds(pl.multiple_of(wg * ROWS, ROWS), ROWS)
            k, v = k_smem.at[mine], v_smem.at[mine]
            plgpu.copy_gmem_to_smem(k_ref.at[b, keys, k_head], k, kv_barrier)
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, k_head], v, kv_barrier)
            down = mask.down(aux, b, keys)

            def step(g, sums, r, masked):
                i = r * G + g
                n, start = k_head * G + g, (first + ahead * r) * bq
                slot, buffer = slot_of(i, stages), slot_of(i, 2)
                plgpu.barrier_wait(q_barriers.at[slot])

                def across(ref):
                    row = plgpu.load(ref.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
                    return lax.broadcast_in_dim(row, (ROWS, bq), [1])

                def logits(s_ref):
                    plgpu.wgmma(s_ref, k, q_smem.at[slot].transpose((1, 0)))
                    s, slope = cap_logits(s_ref[...], options)
                    s = mask.add_bias(aux, s, b, n, start, kv_start)
                    p = jnp.exp2(s * c - across(lse_smem))
                    if masked:
                        p = jnp.where(mask.keep(down, mask_smem, slot, s.shape, start, kv_start), p, 0.0)
                    return p.astype(dtype), slope

                p, slope = pl.run_scoped(logits, accumulator(bq))
                p = lax.optimization_barrier(p)
                plgpu.barrier_wait(do_barriers.at[slot])

                def products(dp_ref, *acc):
                    plgpu.wgmma(dp_ref, v, do_smem.at[slot].transpose((1, 0)))
                    dv = mma(sums[1], p, do_smem.at[slot], *acc)
                    dp = plgpu.wgmma_accumulator_load(dp_ref)
                    ds = p.astype(jnp.float32) * (dp - across(delta_smem))
                    ds = ds if slope is None else ds * slope
                    return ds.astype(dtype), (acc[0][...] if acc else dv)

                ds, dv = pl.run_scoped(products, accumulator(bq), *([] if interpreted else [accumulator(Hv)]))
                plgpu.barrier_arrive(do_free.at[slot])

                pl.when(i >= 2)(lambda: plgpu.barrier_wait(ds_free.at[buffer]))
                ds_smem.at[buffer, mine][...] = ds
                plgpu.commit_smem()
                plgpu.barrier_arrive(ds_full.at[buffer])
                dk = mma(sums[0], ds, q_smem.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return dk, dv

            plgpu.barrier_wait(kv_barrier)
            zero = lambda width: plgpu.layout_cast(jnp.full((ROWS, width), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            full_first = jnp.where(descends, hi - full_hi, full_lo - lo)
            bounds = 0 * lo, full_first, full_first + full_hi - full_lo, hi - lo

            def heads(r, sums, masked):
                step_of = functools.partial(step, r=r, masked=masked)
                return step_of(0, sums) if G == 1 else lax.fori_loop(0, G, step_of, sums)

            dk, dv = three_loops(heads, bounds, (zero(H), zero(Hv)))
            v[...] = dv.astype(dtype)
            for x in (0, 1):  # no barrier ends with an arrival that no one has waited for
                pl.when(steps > x)(lambda x=x: plgpu.barrier_wait(ds_free.at[slot_of(steps - 1 - x, 2)]))
            plgpu.barrier_wait(k_free)  # the keys have been multiplied with the last time
            k[...] = (dk * options.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, dk_ref.at[b, keys, k_head])
            plgpu.copy_smem_to_gmem(v, dv_ref.at[b, keys, k_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _multiply_and_feed():
            plgpu.set_max_registers(_MULTIPLY, action="decrease")
            if not interpreted:
                semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((B * N * blocks,)))

            def feed(i):
                """Queries of step i, once both warpgroups have left the step before that stood there."""
                n, j = place(i)
                rows, slot = pl.ds(pl.multiple_of(j * bq, bq), bq), slot_of(i, stages)
                for ref, row_ref, smem, row_smem, full, free in (
                    (q_ref, lse_ref, q_smem, lse_smem, q_barriers, q_free),
                    (do_ref, delta_ref, do_smem, delta_smem, do_barriers, do_free),
                ):
                    pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                    plgpu.copy_gmem_to_smem(ref.at[b, rows, n], smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(row_ref.at[b, n, rows], row_smem.at[slot], full.at[slot])
                    if ref is q_ref:
                        mask.feed(aux, b, rows, mask_smem, slot, full.at[slot])

            def semaphore(i):
                n, j = place(i)
                return semaphores.at[(b * N + n) * blocks + j]

            def wait_for(i, due):
                if not interpreted:
                    plgpu.semaphore_wait(semaphore(i), due, decrement=False, memory_scope="gpu")

            def signal(i):
                if not interpreted:
                    plgpu.semaphore_signal(semaphore(i), memory_scope="gpu")

            def add(i, _):
                """The product of step i; what was added in the step before is complete when this one's is ready."""
                n, j = place(i)
                row = lax.rem(b, jnp.int32(turns_ref.shape[1]))
                turn = turns_ref[descends.astype(jnp.int32), row, t, j] + 0  # as in read_bounds
                due, last = lax.div(turn, jnp.int32(2)), lax.rem(turn, jnp.int32(2)) == 1
                buffer = slot_of(i, 2)
                plgpu.barrier_wait(ds_full.at[buffer])
                pl.when((i > 0) & (i + stages - 1 < steps))(lambda: feed(i + stages - 1))
                for part, (x, y) in enumerate(parts):
                    rows, columns = pl.ds(x * ROWS, ROWS), pl.ds(y * ROWS, ROWS)

                    def product(acc, part=part, rows=rows, columns=columns):
                        plgpu.wgmma(acc, ds_smem.at[buffer, :, rows].transpose((1, 0)), k_smem.at[:, columns])
                        if part == 0:
                            plgpu.wait_smem_to_gmem(0)
                            pl.when(i > 0)(lambda: signal(i - 1))
                            wait_for(i, due)
                        return acc[...]

                    dq = pl.run_scoped(product, accumulator(ROWS))
                    if part == len(parts) - 1:
                        plgpu.barrier_arrive(ds_free.at[buffer])
                    if part >= 2:
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    leaving = dq_smem.at[part % 2]
                    sums = sum_ref.at[*([t] if interpreted else []), b, n, j, part]
                    if interpreted:
                        leaving[...] = dq
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(leaving, sums)
                        continue

                    @pl.when(~last)
                    def _(dq=dq, leaving=leaving, sums=sums):
                        leaving[...] = _relabel(dq, True)
                        plgpu.commit_smem()
                        store = functools.partial(plgpu.copy_smem_to_gmem, leaving, sums, commit_group=False)
                        pl.when(due == 0)(store)
                        pl.when(due > 0)(functools.partial(store, reduction_op="add"))
                        plgpu.commit_smem_to_gmem_group()

                    @pl.when(last)
                    def _(dq=dq, x=x, sums=sums, columns=columns):
                        mine = _relabel(dq, True)
                        total = lax.cond(due > 0, lambda: mine + plgpu.load(sums, layout=_STRIDED), lambda: mine)
                        total = (_relabel(total, False) * options.scale).astype(dtype)
                        rows = pl.ds(pl.multiple_of(j * bq + x * ROWS, ROWS), ROWS)
                        dq_ref[0].at[b, rows, n, columns][...] = total

                return ()

            @pl.loop(0, jnp.minimum(steps, stages))
            def _(i):
                feed(i)

            plgpu.barrier_wait(kv_barrier)
            lax.fori_loop(0, steps, add, ())
            plgpu.barrier_arrive(k_free)
            plgpu.wait_smem_to_gmem(0)
            pl.when(steps > 0)(lambda: signal(steps - 1))

            @pl.loop(jnp.maximum(steps - stages, 0), steps)  # no barrier ends with arrivals that no one has waited for
            def _(i):
                plgpu.barrier_wait(q_free.at[slot_of(i, stages)])
                plgpu.barrier_wait(do_free.at[slot_of(i, stages)])

    smem = (
        tiled((_TILE, H), dtype),
        tiled((_TILE, Hv), dtype),
        tiled((stages, bq, H), dtype),
        tiled((stages, bq, Hv), dtype),
        plgpu.SMEM((stages, bq), jnp.float32),
        plgpu.SMEM((stages, bq), jnp.float32),
        tiled((2, _TILE, bq), dtype),
        plgpu.SMEM((2, *part_shape), jnp.float32),
        mask.smem(stages, bq),
    )
    ring = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    q_full = plgpu.Barrier(num_arrivals=2 + len(mask.across), num_barriers=stages)
    ds_full, ds_free = plgpu.Barrier(num_arrivals=2, num_barriers=2), plgpu.Barrier(num_barriers=2)
    kinds = [jax.ShapeDtypeStruct(x.shape, dtype) for x in (padded.k, padded.v)]
    whole = [] if interpreted else [jax.ShapeDtypeStruct(padded.q.shape, dtype)]
    parts_shape = (tiles,) * interpreted + (B, N, blocks, len(parts), *part_shape)
    partial = jax.ShapeDtypeStruct(parts_shape, jnp.float32)
    sums, *dq, dk, dv = launch(
        kernel,
        "attention_bwd",
        [partial, *whole, *kinds],
        grid,
        (smem, plgpu.Barrier(num_arrivals=4), q_full, *(ring,) * 3, ds_full, ds_free, plgpu.Barrier()),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, turns, *mask.arrays),
    )
    seen = visits.any(axis=1)
    if interpreted:
        dq = jnp.where(jnp.asarray(visits.swapaxes(0, 1))[..., None, :, None, None, None], sums, 0.0).sum(axis=0)
        dq = dq.reshape(B, N, blocks, bq // ROWS, H // ROWS, ROWS, ROWS).transpose(0, 2, 3, 5, 1, 4, 6)
        dq = (dq * options.scale).astype(dtype).reshape(B, T, N, H)
    else:
        (dq,) = dq
        if not (isinstance(seen, np.ndarray) and seen.all()):  # a block of queries that sees no key was never stored
            dq = jnp.where(jnp.repeat(jnp.asarray(seen), bq, axis=-1)[..., None, None], dq, 0)
    return dq[:, :queries], dk[:, :S], dv[:, :S]


def _relabel(x: jax.Array, strided: bool) -> jax.Array:
    """The registers of a [64, 64] accumulator taken for those of a strided [16, 256], where each thread's numbers stand
    as it stores them without computing addresses; and back."""
    import jax.experimental.mosaic.gpu as mgpu

    layouts = {True: (_STRIDED_SHAPE, _STRIDED), False: ((ROWS, ROWS), plgpu.Layout.WGMMA)}
    shape, layout = layouts[strided]

    @plgpu.inline_mgpu(
        arg_types=(layouts[not strided][1],), return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    )
    def turn(ctx, x):
        del ctx
        to = mgpu.WGStridedFragLayout(shape, 2) if strided else mgpu.WGMMA_LAYOUT
        registers = x.registers.reshape(to.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=to, _is_signed=None)

    return turn(x)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


def _order(ranges, blocks: int):
    """[B or 1, tiles, blocks]: which tiles of keys visit a block of queries. [2, B or 1, tiles, blocks], int32: twice
    the number of those that have before this one, plus one for the last; from the last tile to the first, and the
    other way round."""
    xp: Any = np if isinstance(ranges, np.ndarray) else jnp
    index = xp.arange(blocks, dtype=np.int32)[None, None]
    visits = (ranges[..., :1] <= index) & (index < ranges[..., 3:])
    here, every = visits.astype(np.int32), visits.sum(axis=1, keepdims=True, dtype=np.int32)
    before = xp.cumsum(here, axis=1, dtype=np.int32) - here
    orders = xp.stack([every - before - here, before])
    return visits, 2 * orders + (orders == (every - 1)[None]).astype(np.int32)
