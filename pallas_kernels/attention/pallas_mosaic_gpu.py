"""Attention for Hopper GPUs (sm90), written in Pallas Mosaic GPU: bfloat16 and float16.

Forward: a block holds two warpgroups of 64 queries each (three at head_dim 64, whose exponentials take longer than its
matmuls) and one that feeds them Q, K and V through TMA. There is one block for each multiprocessor, which computes one
tile of queries after another: the next one's Q and first K and V arrive while this one's output leaves. Which key
blocks a tile visits stands in a small table, made before the kernel from whatever hides keys (causal, window, segments,
positions): blocks outside of its range cost nothing, blocks inside of the full range are not masked.

The backward kernels stand in pallas_mosaic_gpu_bwd.py, mosaic_gpu_fused.py and mosaic_gpu_stored.py.

A kernel compiles only where its registers suffice; `Config` holds what a sweep found (benchmarks/attention).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention import pallas_mosaic_gpu_bwd
from pallas_kernels.attention.blocks import key_table, pad_inputs, pad_to, rows_to
from pallas_kernels.attention.inputs import Inputs, Options, nameable
from pallas_kernels.attention.mosaic_gpu_pieces import (
    LOG2E,
    ROWS,
    Config,
    Mask,
    accumulator,
    any_of_warp,
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
from pallas_kernels.attention.xla import bias_gradient

# A row's largest logit is taken anew, and what was summed scaled to it, once it has grown by this many powers of two:
# what is summed meanwhile is at most as much larger, and few steps have to scale (a seventh of a step's instructions).
_SLACK = 8.0


def tuned(H: int, Hv: int) -> Config:
    """The configuration for head_dim H of q and k, Hv of v."""
    if max(H, Hv) > 192:
        return Config(block_kv=64, warpgroups_bwd=1, split_dkv=True)
    if max(H, Hv) > 128:
        return Config(block_kv=64, split_dkv=True)
    if max(H, Hv) == 64:
        return Config(warpgroups=3, block_kv_dq=128, block_q_dkv=128, fused=True)
    return Config(stages_dq=3, stages_dkv=3)


def supported(inputs: Inputs, options: Options) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16. Got {inputs.q.dtype}"
    H, Hv = inputs.q.shape[3], inputs.v.shape[3]
    if max(H, Hv) > 256:
        return f"takes head_dim up to 256. Got {H} and {Hv}"
    if options.scale <= 0:
        return f"takes a positive scale. Got {options.scale}"
    return None


def attention_mosaic_gpu(inputs: Inputs, options: Options, config: Config | None = None) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32."""
    Hv = inputs.v.shape[3]
    inputs = _whole_widths(inputs)
    out: Any = _attention(inputs, options, config or tuned(inputs.q.shape[3], inputs.v.shape[3]))
    o, lse = out
    return o[..., :Hv], lse


def backward(inputs: Inputs, options: Options, do: jax.Array, lse: jax.Array, delta: jax.Array):
    """dq, dk, dv of a block of keys; do [B, T, N, Hv], lse and delta [B, T, N] are those of whole rows."""
    H, Hv = inputs.q.shape[3], inputs.v.shape[3]
    inputs = _whole_widths(inputs)
    config = tuned(inputs.q.shape[3], inputs.v.shape[3])
    rows = pad_to(do, 3, 64), lse.swapaxes(1, 2) * LOG2E, delta.swapaxes(1, 2)
    dq, dk, dv, _ = pallas_mosaic_gpu_bwd.backward(inputs, options, config, *rows)
    return dq[..., :H], dk[..., :H], dv[..., :Hv]


def _whole_widths(inputs: Inputs) -> Inputs:
    """q, k, v with a head_dim that the kernels take: zeros change neither logits nor what is cut off again."""
    return inputs._replace(q=pad_to(inputs.q, 3, 64), k=pad_to(inputs.k, 3, 64), v=pad_to(inputs.v, 3, 64))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(inputs: Inputs, options: Options, config: Config) -> tuple[jax.Array, jax.Array]:
    return _attention_fwd(inputs, options, config)[0]


def _attention_fwd(inputs: Inputs, options: Options, config: Config):
    """Residuals: the inputs, o, the logsumexp [B, N, T]."""
    o, lse = nameable(*_forward(inputs, options, config))
    return (o, lse.swapaxes(1, 2)), (inputs, o, lse)


def _attention_bwd(options: Options, config: Config, residuals, cotangents):
    inputs, o, lse = residuals
    do, dlse = cotangents
    unseen = lse == -jnp.inf
    dlse = jnp.where(unseen, 0.0, dlse.swapaxes(1, 2))  # a merge of blocks may send nan to a row that saw nothing
    finite = jnp.where(unseen, 0.0, lse)
    dq, dk, dv, delta = pallas_mosaic_gpu_bwd.backward(inputs, options, config, do, finite * LOG2E, -dlse, o)
    dsinks = None
    if inputs.sinks is not None:
        p_sink = jnp.exp(inputs.sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = -jnp.sum(p_sink * delta, axis=(0, 2)).astype(inputs.sinks.dtype)
    dbias = None
    if inputs.bias is not None:  # by XLA, which leaves it out where no one asks for it
        dbias = bias_gradient(inputs, options, do, finite.swapaxes(1, 2), delta.swapaxes(1, 2))
    none = dict.fromkeys(Inputs._fields[5:])
    return (inputs._replace(q=dq, k=dk, v=dv, bias=dbias, sinks=dsinks, **none),)


_attention.defvjp(_attention_fwd, _attention_bwd)


# Forward.


@functools.partial(jax.jit, static_argnames=("options", "config"), inline=True)  # see `launch`
def _forward(inputs: Inputs, options: Options, config: Config) -> tuple[jax.Array, jax.Array]:
    """o [B, T, N, Hv] and the logsumexp [B, N, T]."""
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    dtype = inputs.q.dtype
    wgs, bkv, stages = config.warpgroups, config.block_kv, config.stages
    tile = wgs * ROWS
    padded = pad_inputs(inputs, ROWS, bkv)
    queries = padded.q.shape[1]
    tiles = -(-queries // tile)
    ranges = rows_to(key_table(inputs, options, ROWS, ROWS), tiles * wgs)
    mask = Mask(padded, options, S, padded.k.shape[1])
    steps = tile_steps(key_table(inputs, options, tile, 2 * ROWS), 1)
    schedule = deal(steps, B, N, heads_at_once(B * N, S * (H + Hv) * 2 * K // N, share=2))
    schedule = describe(schedule, ranges, N, wgs, bkv // ROWS)
    c = options.scale * LOG2E
    buffers = 2 if max(H, Hv) <= 128 else 1  # of q: the next tile's arrives under this tile's work

    def kernel(q_ref, k_ref, v_ref, schedule_ref, sinks_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        o_ref, lse_ref, smem, q_barriers, k_barriers, v_barriers, q_free, k_free, v_free = refs
        q_smem, k_smem, v_smem, lse_smem, mask_smem, *o_smem = smem
        wg = lax.axis_index("wg")
        count = read_count(schedule_ref)
        read = functools.partial(read_tile, schedule_ref)

        def start_of(t, x):
            """The first row of a warpgroup; one past the end does the last rows once more, so that no tile is filled
            up in memory."""
            start = t * tile + x * ROWS
            return pl.multiple_of(jnp.minimum(start, queries - ROWS) if queries % tile else start, ROWS)

        def work(w, done):
            """One tile; `done` counts the blocks of keys of those before it."""
            b, n, t, lo, hi, (_, full_lo, full_hi, _) = read(w, wg)
            q_start = start_of(t, wg)
            rows = pl.ds(q_start, ROWS)
            buffer = slot_of(w, buffers)
            q = q_smem.at[buffer, wg]
            o = o_smem[0].at[wg] if o_smem else q  # o leaves from where q stood, if it fits
            slot = lambda j: slot_of(done + j - lo, stages)
            down = mask.down(aux, b, rows)

            sink = -math.inf if inputs.sinks is None else sinks_ref[n] * LOG2E
            total = 0.0 if inputs.sinks is None else 1.0
            reduced = plgpu.Layout.WGMMA.reduce(1)
            m = plgpu.layout_cast(jnp.full((ROWS,), sink, jnp.float32), reduced)
            l = plgpu.layout_cast(jnp.full((ROWS,), total, jnp.float32), reduced)
            acc = plgpu.layout_cast(jnp.full((ROWS, Hv), 0.0, jnp.float32), plgpu.Layout.WGMMA)

            def hide(s, j, at):
                """The 64 columns from `at` on, masked if any of them is hidden: half of a step of 128 mostly is not."""

                def masked(s):
                    keep = mask.keep(down, mask_smem, slot(j), s.shape, q_start, j * bkv + at, at)
                    return jnp.where(keep, s, -jnp.inf)

                unit = j * (bkv // ROWS) + at // ROWS
                return lax.cond((unit < full_lo) | (unit >= full_hi), masked, lambda s: s, s[:, at : at + ROWS])

            def softmax(s, m, l, j, masked):
                s = mask.add_bias(aux, cap_logits(s, options)[0], b, n, q_start, j * bkv)
                if masked:
                    s = jnp.concatenate([hide(s, j, at) for at in range(0, bkv, ROWS)], axis=1)
                m_new = jnp.maximum(m, s.max(axis=1) * c)
                grown, any_grown = any_of_warp(m_new > m + _SLACK)
                m_new = jnp.where(grown, m_new, m)
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - shift)
                p = jnp.exp2(s * c - lax.broadcast_in_dim(shift, s.shape, [0]))
                return p, m_new, l * alpha + p.sum(axis=1), alpha, any_grown

            def rescale(acc, alpha):
                return acc * lax.broadcast_in_dim(alpha, acc.shape, [0])

            def step(j, carry, masked):
                """QK of block j and PV of block j - 1 in flight together: this softmax runs under that PV."""
                acc, m, l, p = carry
                plgpu.barrier_wait(k_barriers.at[slot(j)])

                def both(s_ref, *acc_ref):
                    plgpu.wgmma(s_ref, q, k_smem.at[slot(j)].transpose((1, 0)))
                    new_acc = mma(acc, p, v_smem.at[slot(j - 1)], *acc_ref)
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(acc_ref))
                    late = masked and mask.across  # what stands beside k is in use
                    if not late:
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                    p_new, *rest = lax.optimization_barrier(softmax(s, m, l, j, masked))
                    if late:
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                    # The loop in this wait ends a basic block: ptxas would move the exponentials below the PV's end.
                    plgpu.barrier_wait(v_barriers.at[slot(j)])
                    new_acc = acc_ref[0][...] if acc_ref else new_acc
                    # Only now may p's registers change: the PV above reads them while it is in flight.
                    new_acc, p_new = lax.optimization_barrier((new_acc, p_new))
                    return new_acc, p_new.astype(dtype), *rest

                accs = [] if _dispatch.interpreted("gpu") else [accumulator(Hv)]
                acc, p, m, l, alpha, any_grown = pl.run_scoped(both, accumulator(bkv), *accs)
                plgpu.barrier_arrive(v_free.at[slot(j - 1)])
                acc = lax.cond(any_grown > 0, lambda acc: rescale(acc, alpha), lambda acc: acc, acc)
                return acc, m, l, p

            plgpu.barrier_wait(q_barriers.at[buffer])
            plgpu.barrier_wait(k_barriers.at[slot(lo)])

            def qk(s_ref):
                plgpu.wgmma(s_ref, q, k_smem.at[slot(lo)].transpose((1, 0)))
                return s_ref[...]

            s = pl.run_scoped(qk, accumulator(bkv))
            if not mask.across:
                plgpu.barrier_arrive(k_free.at[slot(lo)])

            @pl.when(w > 0)
            def _():  # the tile before has left
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if buffers > 1:
                    plgpu.barrier_arrive(q_free.at[1 - buffer])

            p, m, l = softmax(s, m, l, lo, True)[:3]  # nothing to rescale yet
            if mask.across:
                plgpu.barrier_arrive(k_free.at[slot(lo)])
            p = p.astype(dtype)
            plgpu.barrier_wait(v_barriers.at[slot(lo)])
            parts = jnp.int32(bkv // ROWS)
            start = jnp.clip(lax.div(full_lo + (parts - 1), parts), lo + 1, hi)  # of steps without a mask
            inner = lo + 1, start, jnp.clip(lax.div(full_hi, parts), start, hi), hi
            acc, m, l, p = three_loops(step, inner, (acc, m, l, p))
            acc = mma(acc, p, v_smem.at[slot(hi - 1)])
            plgpu.barrier_arrive(v_free.at[slot(hi - 1)])

            seen = l > 0.0
            inverse = jnp.where(seen, 1.0 / jnp.where(seen, l, 1.0), 0.0)
            o[...] = rescale(acc, inverse).astype(dtype)
            lse_smem.at[wg][...] = jnp.where(seen, (m + jnp.log2(jnp.where(seen, l, 1.0))) / LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o, o_ref.at[b, rows, n])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, rows])
            if buffers == 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[0])
            return done + hi - lo

        @pl.when(wg < wgs)
        def _compute():
            set_registers(wgs, 240 if wgs == 2 else 160)
            lax.fori_loop(0, count, work, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            if buffers > 1:
                plgpu.barrier_arrive(q_free.at[slot_of(count - 1, buffers)])

        @pl.when(wg == wgs)
        def _feed():
            set_registers(wgs, 24 if wgs == 2 else 32)

            def feed(w, done):
                b, n, t, lo, hi = read(w)[:5]
                k_head = lax.div(n, jnp.int32(N // K))
                buffer = slot_of(w, buffers)
                pl.when(w >= buffers)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                for x in range(wgs):
                    rows = pl.ds(start_of(t, x), ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[buffer, x], q_barriers.at[buffer])

                @pl.loop(lo, hi)
                def _(j):
                    slot = slot_of(done + j - lo, stages)
                    keys = pl.ds(pl.multiple_of(j * bkv, bkv), bkv)
                    again = done + j - lo >= stages
                    for ref, smem, full, free in (
                        (k_ref, k_smem, k_barriers, k_free),
                        (v_ref, v_smem, v_barriers, v_free),
                    ):
                        pl.when(again)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref.at[b, keys, k_head], smem.at[slot], full.at[slot])
                        if ref is k_ref:
                            mask.feed(aux, b, keys, mask_smem, slot, full.at[slot])

                return done + hi - lo

            done = lax.fori_loop(0, count, feed, jnp.int32(0))

            @pl.loop(jnp.maximum(done - stages, 0), done)
            def _(i):
                plgpu.barrier_wait(k_free.at[slot_of(i, stages)])
                plgpu.barrier_wait(v_free.at[slot_of(i, stages)])

            @pl.loop(jnp.maximum(count - buffers, 0), count)
            def _(w):
                plgpu.barrier_wait(q_free.at[slot_of(w, buffers)])

    smem = (
        tiled((buffers, wgs, ROWS, H), dtype),
        tiled((stages, bkv, H), dtype),
        tiled((stages, bkv, Hv), dtype),
        plgpu.SMEM((wgs, ROWS), jnp.float32),
        mask.smem(stages, bkv),
        *([] if Hv == H else [tiled((wgs, ROWS, Hv), dtype)]),
    )
    k_full, v_full = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1 + len(mask.across), 1))
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    q_full = plgpu.Barrier(num_arrivals=wgs, num_barriers=buffers)
    o, lse = launch(
        kernel,
        "attention_fwd",
        [
            jax.ShapeDtypeStruct((B, queries, N, Hv), dtype),
            jax.ShapeDtypeStruct((B, N, queries), jnp.float32),
        ],
        {"block": len(schedule)},
        (smem, q_full, k_full, v_full, q_full, free, free),
        (padded.q, padded.k, padded.v, schedule, _sinks(inputs), *mask.arrays),
        wgs + 1,
    )
    return o[:, :T], lse[:, :, :T]


def _sinks(inputs: Inputs) -> Any:
    N = inputs.q.shape[2]
    return np.zeros(N, np.float32) if inputs.sinks is None else inputs.sinks.astype(jnp.float32)
