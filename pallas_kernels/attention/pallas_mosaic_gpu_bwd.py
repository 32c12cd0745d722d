"""The backward of attention for Hopper GPUs: one kernel for dq, one for dk and dv, both in the shape of the forward.
At head_dim 64 one for all three where that is faster (mosaic_gpu_fused.py); above 128 one for dv, and dq and dk from
the gradient of the logits that it stores (mosaic_gpu_stored.py).

Each output has one writer and one order of summation, so gradients repeat bit by bit. The two kernels together do seven
matmuls where five would do; at head_dim 128 the kernel of five is slower than these two (docs/LOG.md).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention import mosaic_gpu_fused
from pallas_kernels.attention.blocks import pad_inputs, pad_to, query_ranges, rows_to
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_dq import backward_dq
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
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.mosaic_gpu_stored import BLOCK, Stored, multiply
from pallas_kernels.attention.schedule import in_turn


@functools.partial(jax.jit, static_argnames=("options", "config"), inline=True)  # see `launch`
def backward(inputs: Inputs, options: Options, config: Config, do, lse, delta, o=None):
    """dq, dk, dv, and delta; do and o [B, T, N, Hv]; lse and delta are [B, N, T], lse in powers of two.

    o: sum(do * o, -1) is added to delta.
    """
    fused = config.fused and mosaic_gpu_fused.pays(inputs)
    if o is not None and (fused or config.split_dkv):  # where dq is alone, its kernel does it
        delta, o = delta + jnp.einsum("BTNH,BTNH->BNT", do, o, preferred_element_type=jnp.float32), None
    if fused:
        return *mosaic_gpu_fused.fused(inputs, options, config, do, lse, delta), delta
    if config.split_dkv and (stored := Stored.of(inputs, options)):
        dv, dlogits = _dkv(inputs, options, config, do, lse, delta, False, True, stored)
        return *(multiply(inputs, options, stored, dlogits, x) for x in ("dq", "dk")), dv, delta
    dq, delta = backward_dq(inputs, options, config, do, lse, delta, o)
    return dq, *_backward_dkv(inputs, options, config, do, lse, delta), delta


def _backward_dkv(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> tuple[jax.Array, jax.Array]:
    """dk [B, S, K, H] and dv [B, S, K, Hv]; a block sums over the query heads that share its kv head."""
    run = functools.partial(_dkv, inputs, options, config, do, lse, delta)
    if config.split_dkv:
        return run(True, False)[0], run(False, True)[0]
    dk, dv = run(True, True)
    return dk, dv


def _dkv(
    inputs: Inputs,
    options: Options,
    config: Config,
    do,
    lse,
    delta,
    want_dk: bool,
    want_dv: bool,
    stored: Stored | None = None,
) -> list[jax.Array]:
    """The wanted ones of dk and dv; then the gradient of the logits, where it is to be stored."""
    B, S, K, H = inputs.k.shape
    N, Hv = inputs.q.shape[2], inputs.v.shape[3]
    G = N // K
    dtype = inputs.q.dtype
    wgs, bq, stages = config.warpgroups_bwd, config.block_q_dkv, config.stages_dkv
    tile = wgs * ROWS
    places = ()
    if stored is None:
        padded, rows = pad_inputs(inputs, bq, tile), bq
        ranges = rows_to(query_ranges(inputs, options, bq, ROWS), -(-S // tile) * wgs)
    else:
        padded, rows = pad_inputs(inputs, BLOCK, BLOCK), BLOCK
        ranges = np.repeat(stored.ranges, BLOCK // ROWS, axis=0)[None] * (BLOCK // bq)  # all of a block is stored
        places = (np.repeat(stored.places, BLOCK // tile),)
    do, lse, delta = pad_to(do, 1, rows), pad_to(lse, 2, rows), pad_to(delta, 2, rows)
    T = padded.q.shape[1]
    tiles = padded.k.shape[1] // tile
    mask = Mask(padded, options, S, padded.k.shape[1], keys_down=True)
    grid, locate = make_grid(B, K, tiles, T * (H + Hv) * 2 * G)
    table = in_turn(ranges, wgs)
    c = options.scale * LOG2E
    widths = {x: width for x, width, want in (("dv", Hv, want_dv), ("dk", H, want_dk)) if want}
    want_dp = want_dk or stored is not None

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, table_ref, *refs):
        places_ref, refs = refs[: len(places)], refs[len(places) :]
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        *out_refs, smem, kv_barriers, q_barriers, do_barriers, q_free, do_free = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, mask_smem, *ds_smem = smem
        wg = lax.axis_index("wg")
        b, k_head, turn = locate()
        read = lambda i: table_ref[lax.rem(b, jnp.int32(table_ref.shape[0])), turn, i] + 0
        t, lo, hi = (read(i) for i in range(3))

        @pl.when(wg < wgs)
        def _compute():
            set_registers(wgs, 240)
            kv_start = pl.multiple_of(t * tile + wg * ROWS, ROWS)
            rows = pl.ds(kv_start, ROWS)
            k, v = k_smem.at[wg], v_smem.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, k_head], k, kv_barriers.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, k_head], v, kv_barriers.at[wg])
            across = plgpu.Layout.WGMMA.reduce(0)
            down = mask.down(aux, b, rows)
            first_place = places_ref[0][t] + 0 if stored else 0

            def store(ds, i, j, n):
                """The block before the last has left its buffer by now; this one leaves under the next step."""
                start = j * bq
                buffer = ds_smem[0].at[wg, slot_of(i, 2)]
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                buffer[...] = ds
                plgpu.commit_smem()
                keys = pl.ds(pl.multiple_of(lax.rem(kv_start, jnp.int32(BLOCK)), ROWS), ROWS)
                queries = pl.ds(pl.multiple_of(lax.rem(start, jnp.int32(BLOCK)), bq), bq)
                place = first_place + lax.div(start, jnp.int32(BLOCK))
                plgpu.copy_smem_to_gmem(buffer, out_refs[-1].at[b * N + n, place, keys, queries])

            def step(j, sums, masked, first, n):
                i = first + j - lo
                slot = slot_of(i, stages)
                plgpu.barrier_wait(do_barriers.at[slot])

                def products(s_ref, dp_ref, *sum_refs):  # s, dp: keys down, queries across
                    in_flight = dict(zip(widths, sum_refs))
                    plgpu.wgmma(s_ref, k, q_smem.at[slot].transpose((1, 0)))
                    if want_dp:
                        plgpu.wgmma(dp_ref, v, do_smem.at[slot].transpose((1, 0)))
                    s, slope = cap_logits(plgpu.wgmma_accumulator_load(s_ref, wait_n=int(want_dp)), options)
                    s = mask.add_bias(aux, s, b, n, j * bq, kv_start)
                    lse = plgpu.load(lse_smem.at[slot], layout=across)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [1]))
                    if masked:
                        p = jnp.where(mask.keep(down, mask_smem, slot, s.shape, j * bq, kv_start), p, 0.0)
                    p = before(p, i + 1 < G * (hi - lo), q_barriers.at[slot_of(i + 1, stages)])
                    new = {}
                    if want_dv:
                        new["dv"] = mma(sums["dv"], p.astype(dtype), do_smem.at[slot], in_flight.get("dv"))
                    if want_dp:
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=int("dv" in in_flight))
                        delta = plgpu.load(delta_smem.at[slot], layout=across)
                        ds = p * (dp - lax.broadcast_in_dim(delta, s.shape, [1]))
                        ds = (ds if slope is None else ds * slope).astype(dtype)
                        if want_dk:
                            new["dk"] = mma(sums["dk"], ds, q_smem.at[slot], in_flight.get("dk"))
                        if stored:
                            store(ds, i, j, n)
                    return {x: in_flight[x][...] if in_flight else new[x] for x in widths}

                block = accumulator(bq)
                accs = [] if _dispatch.interpreted("gpu") else [accumulator(width) for width in widths.values()]
                sums = pl.run_scoped(products, block, block, *accs)
                plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            def skip(j, first):
                """A block that the other warpgroup visits alone."""
                i = first + j - lo
                slot = slot_of(i, stages)
                plgpu.barrier_wait(do_barriers.at[slot])
                plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                more = i + 1 < G * (hi - lo)
                pl.when(more)(lambda: plgpu.barrier_wait(q_barriers.at[slot_of(i + 1, stages)]))

            plgpu.barrier_wait(kv_barriers.at[wg])
            mine = tuple(read(3 + 4 * wg + i) for i in range(4))
            pl.when(lo < hi)(lambda: plgpu.barrier_wait(q_barriers.at[0]))
            zero = lambda width: plgpu.layout_cast(jnp.full((ROWS, width), 0.0, jnp.float32), plgpu.Layout.WGMMA)

            def head(g, sums):
                first = g * (hi - lo)
                of_head = functools.partial(step, first=first, n=k_head * G + g)
                pl.loop(lo, mine[0])(functools.partial(skip, first=first))
                sums = three_loops(of_head, mine, sums)
                pl.loop(mine[3], hi)(functools.partial(skip, first=first))
                return sums

            sums = lax.fori_loop(0, G, head, {x: zero(width) for x, width in widths.items()})
            leaving = {"dk": k, "dv": v}
            for x in widths:
                leaving[x][...] = (sums[x] * (options.scale if x == "dk" else 1.0)).astype(dtype)
            plgpu.commit_smem()
            for x, out_ref in zip(widths, out_refs):
                plgpu.copy_smem_to_gmem(leaving[x], out_ref.at[b, rows, k_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _feed():
            set_registers(wgs, 24)

            def copy(i, ref, row_ref, smem, row_smem, slot, barriers):
                n = k_head * G + lax.div(i, hi - lo)
                queries = pl.ds(pl.multiple_of((lo + lax.rem(i, hi - lo)) * bq, bq), bq)
                plgpu.copy_gmem_to_smem(ref.at[b, queries, n], smem.at[slot], barriers.at[slot])
                plgpu.copy_gmem_to_smem(row_ref.at[b, n, queries], row_smem.at[slot], barriers.at[slot])

            def copy_q(i, slot):
                copy(i, q_ref, lse_ref, q_smem, lse_smem, slot, q_barriers)
                queries = pl.ds(pl.multiple_of((lo + lax.rem(i, hi - lo)) * bq, bq), bq)
                mask.feed(aux, b, queries, mask_smem, slot, q_barriers.at[slot])

            copy_do = lambda i, slot: copy(i, do_ref, delta_ref, do_smem, delta_smem, slot, do_barriers)
            feed_ring(G * (hi - lo), stages, (q_free, copy_q), (do_free, copy_do))

    smem = (
        tiled((wgs, ROWS, H), dtype),
        tiled((wgs, ROWS, Hv), dtype),
        tiled((stages, bq, H), dtype),
        tiled((stages, bq, Hv), dtype),
        plgpu.SMEM((stages, bq), jnp.float32),
        plgpu.SMEM((stages, bq), jnp.float32),
        mask.smem(stages, bq),
        *([tiled((wgs, 2, ROWS, bq), dtype)] if stored else []),
    )
    q_full, do_full = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (2 + len(mask.across), 2))
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    shapes = [(*padded.k.shape[:3], width) for width in widths.values()]
    out = launch(
        kernel,
        "attention_" + "_".join(widths),
        [jax.ShapeDtypeStruct(x, dtype) for x in shapes + ([stored.shape(inputs)] if stored else [])],
        grid,
        (smem, plgpu.Barrier(num_arrivals=2, num_barriers=wgs), q_full, do_full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, table, *places, *mask.arrays),
        wgs + 1,
    )
    return [x[:, :S] for x in reversed(out[: len(widths)])] + out[len(widths) :]
