"""Attention for Hopper GPUs (sm90), written in Pallas Mosaic GPU: bfloat16 and float16.

Forward: a block holds two warpgroups of 64 queries each and one that feeds them K and V through TMA. Which key blocks a
query block visits stands in a small table, made before the kernel from whatever hides keys (causal, window, segments,
positions): blocks outside of its range cost nothing, blocks inside of the full range are not masked.

Backward: one kernel for dq, one for dk and dv, both in the same shape; each output has one writer and one order of
summation, so gradients repeat bit by bit.

A kernel compiles only where its registers suffice; `Config` holds what a sweep found (benchmarks/attention).
"""

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import key_ranges, pad_inputs, pad_to, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options, nameable

_LOG2E = math.log2(math.e)
_WG_ROWS = 64  # rows of one warpgroup: a wgmma is 64 rows high
_L2_BYTES = 32 * 2**20  # keys and values that are in use at one time should fit in half of the L2


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of the three kernels; each warpgroup holds 64 rows of its output."""

    block_kv: int = 128  # forward: keys in a step
    stages: int = 2  # forward: steps in flight
    overlap: bool = True  # forward: the next QK runs under this softmax, in one warpgroup
    ping_pong: bool = False  # forward: one warpgroup's softmax runs under the other's matmuls
    block_kv_dq: int = 64
    stages_dq: int = 2
    block_q_dkv: int = 64
    stages_dkv: int = 2
    warpgroups_bwd: int = 2  # that compute, in a block of dq or of dk and dv
    split_dkv: bool = False  # one kernel each for dk and dv, where registers do not hold both


def tuned(H: int, Hv: int) -> Config:
    """The configuration for head_dim H of q and k, Hv of v."""
    if max(H, Hv) > 192:
        return Config(block_kv=64, warpgroups_bwd=1, split_dkv=True)
    if max(H, Hv) > 128:
        return Config(block_kv=64, split_dkv=True)
    if max(H, Hv) == 64:
        return Config(block_kv_dq=128, block_q_dkv=128)
    return Config(stages_dq=3, stages_dkv=3)


def supported(inputs: Inputs, options: Options) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    kind = _dispatch.device_kind()
    if not _dispatch.interpreted("gpu") and not re.search(r"\b(H100|H200|H800|H20|GH200)\b", kind):
        return f"needs a Hopper GPU; this is {kind}"
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16. Got {inputs.q.dtype}"
    H, Hv = inputs.q.shape[3], inputs.v.shape[3]
    if H not in (64, 128, 192, 256) or Hv not in (64, 128, 192, 256):
        return f"takes head_dim 64, 128, 192, 256. Got {H} and {Hv}"
    if inputs.bias is not None:
        return "takes no bias"
    if options.scale <= 0:
        return f"takes a positive scale. Got {options.scale}"
    return None


def attention_mosaic_gpu(inputs: Inputs, options: Options, config: Config | None = None) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32."""
    return _attention(inputs, options, config or tuned(inputs.q.shape[3], inputs.v.shape[3]))


def backward(inputs: Inputs, options: Options, do: jax.Array, lse: jax.Array, delta: jax.Array):
    """dq, dk, dv of a block of keys; do [B, T, N, Hv], lse and delta [B, T, N] are those of whole rows."""
    config = tuned(inputs.q.shape[3], inputs.v.shape[3])
    rows = do, lse.swapaxes(1, 2) * _LOG2E, delta.swapaxes(1, 2)
    return _backward_dq(inputs, options, config, *rows), *_backward_dkv(inputs, options, config, *rows)


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
    delta = jnp.einsum("BTNH,BTNH->BNT", do, o, preferred_element_type=jnp.float32) - dlse
    dsinks = None
    if inputs.sinks is not None:
        p_sink = jnp.exp(inputs.sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = -jnp.sum(p_sink * delta, axis=(0, 2)).astype(inputs.sinks.dtype)
    lse = jnp.where(unseen, 0.0, lse) * _LOG2E
    dq = _backward_dq(inputs, options, config, do, lse, delta)
    dk, dv = _backward_dkv(inputs, options, config, do, lse, delta)
    none = dict.fromkeys(Inputs._fields[5:])
    return (inputs._replace(q=dq, k=dk, v=dv, bias=None, sinks=dsinks, **none),)


_attention.defvjp(_attention_fwd, _attention_bwd)


# Forward.


def _forward(inputs: Inputs, options: Options, config: Config) -> tuple[jax.Array, jax.Array]:
    """o [B, T, N, Hv] and the logsumexp [B, N, T]."""
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    dtype = inputs.q.dtype
    tile, bkv, stages = 2 * _WG_ROWS, config.block_kv, config.stages
    padded = pad_inputs(inputs, tile, bkv)
    tiles = padded.q.shape[1] // tile
    ranges = key_ranges(inputs, options, tile, bkv)
    mask = _Mask(padded, options, S, padded.k.shape[1])
    grid, locate = _grid(B, N, tiles, S * (H + Hv) * 2 * K // N)
    c = options.scale * _LOG2E

    def kernel(q_ref, k_ref, v_ref, ranges_ref, sinks_ref, *refs):
        aux, (o_ref, lse_ref, smem, q_barriers, k_barriers, v_barriers, k_free, v_free, turn) = refs[:-9], refs[-9:]
        q_smem, k_smem, v_smem, lse_smem, *o_smem = smem
        (o_smem,) = o_smem or [q_smem]
        wg = lax.axis_index("wg")
        b, n, t = locate()
        t = tiles - 1 - t  # under a causal mask the last tiles take longest: they start first
        lo, full_lo, full_hi, hi = _bounds(ranges_ref, b, t)
        if config.overlap:  # it starts on one block; a tile that sees none masks all of it
            hi = jnp.maximum(hi, lo + 1)

        @pl.when(wg < 2)
        def _compute():
            _set_registers(2, 240)
            q_start = pl.multiple_of(t * tile + wg * _WG_ROWS, _WG_ROWS)
            rows = pl.ds(q_start, _WG_ROWS)
            q = q_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q, q_barriers.at[wg])

            sink = -math.inf if inputs.sinks is None else sinks_ref[n] * _LOG2E
            total = 0.0 if inputs.sinks is None else 1.0
            reduced = plgpu.Layout.WGMMA.reduce(1)
            m = plgpu.layout_cast(jnp.full((_WG_ROWS,), sink, jnp.float32), reduced)
            l = plgpu.layout_cast(jnp.full((_WG_ROWS,), total, jnp.float32), reduced)
            acc = plgpu.layout_cast(jnp.full((_WG_ROWS, Hv), 0.0, jnp.float32), plgpu.Layout.WGMMA)

            def your_turn():  # both warpgroups meet; they enter half a step apart
                if config.ping_pong:
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(turn)

            def softmax(s, m, l, j, masked):
                s = _soft_cap(s, options)[0]
                if masked:
                    keep = mask.keep(aux, b, s.shape, 0, q_start, j * bkv)
                    s = jnp.where(keep, s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * c)
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - shift)
                p = jnp.exp2(s * c - lax.broadcast_in_dim(shift, s.shape, [0]))
                return p, m_new, l * alpha + p.sum(axis=1), alpha

            def rescale(acc, alpha):
                return acc * lax.broadcast_in_dim(alpha, acc.shape, [0])

            def step(j, carry, masked):
                acc, m, l = carry
                slot = _slot(j - lo, stages)
                plgpu.barrier_wait(k_barriers.at[slot])

                def qk(s_ref):
                    plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                    your_turn()
                    return s_ref[...]

                s = pl.run_scoped(qk, _acc(bkv))
                plgpu.barrier_arrive(k_free.at[slot])
                p, m, l, alpha = softmax(s, m, l, j, masked)
                acc, p = rescale(acc, alpha), p.astype(dtype)
                acc, p, m, l = lax.optimization_barrier((acc, p, m, l))
                plgpu.barrier_wait(v_barriers.at[slot])
                your_turn()
                acc = _mma(acc, p, v_smem.at[slot])
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, m, l

            def overlapped_step(j, carry, masked):
                """QK of block j and PV of block j - 1 in flight together: this softmax runs under that PV."""
                acc, m, l, p = carry
                slot, previous = _slot(j - lo, stages), _slot(j - 1 - lo, stages)
                plgpu.barrier_wait(k_barriers.at[slot])

                def both(s_ref, *acc_ref):
                    your_turn()
                    plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                    new_acc = _mma(acc, p, v_smem.at[previous], *acc_ref)
                    your_turn()
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(acc_ref))
                    plgpu.barrier_arrive(k_free.at[slot])
                    p_new, *rest = lax.optimization_barrier(softmax(s, m, l, j, masked))
                    # The loop in this wait ends a basic block: ptxas would move the exponentials below the PV's end.
                    plgpu.barrier_wait(v_barriers.at[slot])
                    new_acc = acc_ref[0][...] if acc_ref else new_acc
                    # Only now may p's registers change: the PV above reads them while it is in flight.
                    new_acc, p_new = lax.optimization_barrier((new_acc, p_new))
                    return new_acc, p_new.astype(dtype), *rest

                accs = [] if _dispatch.interpreted("gpu") else [_acc(Hv)]
                acc, p, m, l, alpha = pl.run_scoped(both, _acc(bkv), *accs)
                plgpu.barrier_arrive(v_free.at[previous])
                return rescale(acc, alpha), m, l, p

            def overlapped(bounds, carry):
                lo, full_lo, full_hi, hi = bounds
                acc, m, l = carry
                plgpu.barrier_wait(k_barriers.at[0])

                def qk(s_ref):
                    plgpu.wgmma(s_ref, q, k_smem.at[0].transpose((1, 0)))
                    return s_ref[...]

                s = pl.run_scoped(qk, _acc(bkv))
                plgpu.barrier_arrive(k_free.at[0])
                p, m, l, _ = softmax(s, m, l, lo, True)
                p = p.astype(dtype)
                plgpu.barrier_wait(v_barriers.at[0])
                inner = lo + 1, jnp.maximum(full_lo, lo + 1), jnp.maximum(full_hi, lo + 1), hi
                acc, m, l, p = _three_loops(overlapped_step, inner, (acc, m, l, p))
                last = _slot(hi - 1 - lo, stages)
                acc = _mma(acc, p, v_smem.at[last])
                plgpu.barrier_arrive(v_free.at[last])
                return acc, m, l

            plgpu.barrier_wait(q_barriers.at[wg])
            pl.when(wg == 1)(your_turn)
            loops = overlapped if config.overlap else functools.partial(_three_loops, step)
            acc, m, l = loops((lo, full_lo, full_hi, hi), (acc, m, l))
            pl.when(wg == 0)(your_turn)

            seen = l > 0.0
            inverse = jnp.where(seen, 1.0 / jnp.where(seen, l, 1.0), 0.0)
            o_smem.at[wg][...] = rescale(acc, inverse).astype(dtype)
            lse_smem.at[wg][...] = jnp.where(seen, (m + jnp.log2(jnp.where(seen, l, 1.0))) / _LOG2E, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[wg], o_ref.at[b, rows, n])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            _set_registers(2, 24)
            k_head = lax.div(n, jnp.int32(N // K))

            def copy(i, ref, smem, slot, barriers):
                keys = pl.ds(pl.multiple_of((lo + i) * bkv, bkv), bkv)
                plgpu.copy_gmem_to_smem(ref.at[b, keys, k_head], smem.at[slot], barriers.at[slot])

            copy_k = lambda i, slot: copy(i, k_ref, k_smem, slot, k_barriers)
            copy_v = lambda i, slot: copy(i, v_ref, v_smem, slot, v_barriers)
            _feed_ring(hi - lo, stages, (k_free, copy_k), (v_free, copy_v))

    smem = (
        _tiled((2, _WG_ROWS, H), dtype),
        _tiled((stages, bkv, H), dtype),
        _tiled((stages, bkv, Hv), dtype),
        plgpu.SMEM((2, _WG_ROWS), jnp.float32),
        *([] if Hv == H else [_tiled((2, _WG_ROWS, Hv), dtype)]),  # o leaves from where q stood, if it fits
    )
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    Tp = tiles * tile
    o, lse = _call(
        kernel,
        "attention_fwd",
        [jax.ShapeDtypeStruct((B, Tp, N, Hv), dtype), jax.ShapeDtypeStruct((B, N, Tp), jnp.float32)],
        grid,
        (smem, plgpu.Barrier(num_barriers=2), full, full, free, free, plgpu.Barrier(num_arrivals=2)),
        (padded.q, padded.k, padded.v, ranges, _sinks(inputs), *mask.arrays),
    )
    return o[:, :T], lse[:, :, :T]


# Backward.


def _backward_dq(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> jax.Array:
    """dq [B, T, N, H]; lse and delta are [B, N, T], lse in powers of two."""
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    dtype = inputs.q.dtype
    wgs, bkv, stages = config.warpgroups_bwd, config.block_kv_dq, config.stages_dq
    tile = wgs * _WG_ROWS
    padded = pad_inputs(inputs, tile, bkv)
    do, lse, delta = pad_to(do, 1, tile), pad_to(lse, 2, tile), pad_to(delta, 2, tile)
    tiles = padded.q.shape[1] // tile
    ranges = key_ranges(inputs, options, tile, bkv)
    mask = _Mask(padded, options, S, padded.k.shape[1])
    grid, locate = _grid(B, N, tiles, S * (H + Hv) * 2 * K // N)
    c = options.scale * _LOG2E

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, *refs):
        aux, (dq_ref, smem, q_barriers, k_barriers, v_barriers, k_free, v_free) = refs[:-7], refs[-7:]
        q_smem, do_smem, k_smem, v_smem = smem
        wg = lax.axis_index("wg")
        b, n, t = locate()
        t = tiles - 1 - t
        lo, full_lo, full_hi, hi = _bounds(ranges_ref, b, t)

        @pl.when(wg < wgs)
        def _compute():
            _set_registers(wgs, 240)
            q_start = pl.multiple_of(t * tile + wg * _WG_ROWS, _WG_ROWS)
            rows = pl.ds(q_start, _WG_ROWS)
            q, do = q_smem.at[wg], do_smem.at[wg]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q, q_barriers.at[wg])
            plgpu.copy_gmem_to_smem(do_ref.at[b, rows, n], do, q_barriers.at[wg])
            reduced = plgpu.Layout.WGMMA.reduce(1)
            lse = plgpu.load(lse_ref.at[b, n, rows], layout=reduced, optimized=False)
            delta = plgpu.load(delta_ref.at[b, n, rows], layout=reduced, optimized=False)

            def step(j, dq, masked):
                slot = _slot(j - lo, stages)
                plgpu.barrier_wait(v_barriers.at[slot])

                def products(s_ref, dp_ref):
                    plgpu.wgmma(s_ref, q, k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_ref, do, v_smem.at[slot].transpose((1, 0)))
                    s, slope = _soft_cap(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), options)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [0]))
                    if masked:
                        p = jnp.where(mask.keep(aux, b, s.shape, 0, q_start, j * bkv), p, 0.0)
                    p = _before(p, j + 1 < hi, k_barriers.at[_slot(j + 1 - lo, stages)])
                    dp = plgpu.wgmma_accumulator_load(dp_ref)
                    ds = p * (dp - lax.broadcast_in_dim(delta, s.shape, [0]))
                    return (ds if slope is None else ds * slope).astype(dtype)

                block = _acc(bkv)
                ds = pl.run_scoped(products, block, block)
                plgpu.barrier_arrive(v_free.at[slot])
                dq = _mma(dq, ds, k_smem.at[slot])
                plgpu.barrier_arrive(k_free.at[slot])
                return dq

            plgpu.barrier_wait(q_barriers.at[wg])
            pl.when(lo < hi)(lambda: plgpu.barrier_wait(k_barriers.at[0]))
            dq = plgpu.layout_cast(jnp.full((_WG_ROWS, H), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            dq = _three_loops(step, (lo, full_lo, full_hi, hi), dq)
            q[...] = (dq * options.scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q, dq_ref.at[b, rows, n])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _feed():
            _set_registers(wgs, 24)
            k_head = lax.div(n, jnp.int32(N // K))

            def copy(i, ref, smem, slot, barriers):
                keys = pl.ds(pl.multiple_of((lo + i) * bkv, bkv), bkv)
                plgpu.copy_gmem_to_smem(ref.at[b, keys, k_head], smem.at[slot], barriers.at[slot])

            copy_k = lambda i, slot: copy(i, k_ref, k_smem, slot, k_barriers)
            copy_v = lambda i, slot: copy(i, v_ref, v_smem, slot, v_barriers)
            _feed_ring(hi - lo, stages, (v_free, copy_v), (k_free, copy_k))

    smem = (
        _tiled((wgs, _WG_ROWS, H), dtype),
        _tiled((wgs, _WG_ROWS, Hv), dtype),
        _tiled((stages, bkv, H), dtype),
        _tiled((stages, bkv, Hv), dtype),
    )
    full = plgpu.Barrier(num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    (dq,) = _call(
        kernel,
        "attention_dq",
        [jax.ShapeDtypeStruct(padded.q.shape, dtype)],
        grid,
        (smem, plgpu.Barrier(num_arrivals=2, num_barriers=wgs), full, full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, *mask.arrays),
        wgs,
    )
    return dq[:, :T]


def _backward_dkv(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> tuple[jax.Array, jax.Array]:
    """dk [B, S, K, H] and dv [B, S, K, Hv]; a block sums over the query heads that share its kv head."""
    run = functools.partial(_dkv, inputs, options, config, do, lse, delta)
    if config.split_dkv:
        return run(True, False)[0], run(False, True)[0]
    dk, dv = run(True, True)
    return dk, dv


def _dkv(inputs: Inputs, options: Options, config: Config, do, lse, delta, want_dk: bool, want_dv: bool):
    """The wanted ones of dk and dv."""
    B, S, K, H = inputs.k.shape
    N, Hv = inputs.q.shape[2], inputs.v.shape[3]
    G = N // K
    dtype = inputs.q.dtype
    wgs, bq, stages = config.warpgroups_bwd, config.block_q_dkv, config.stages_dkv
    tile = wgs * _WG_ROWS
    padded = pad_inputs(inputs, bq, tile)
    do, lse, delta = pad_to(do, 1, bq), pad_to(lse, 2, bq), pad_to(delta, 2, bq)
    T = padded.q.shape[1]
    tiles = padded.k.shape[1] // tile
    ranges = query_ranges(inputs, options, bq, tile)
    mask = _Mask(padded, options, S, padded.k.shape[1])
    grid, locate = _grid(B, K, tiles, T * (H + Hv) * 2 * G)
    c = options.scale * _LOG2E
    widths = {x: width for x, width, want in (("dv", Hv, want_dv), ("dk", H, want_dk)) if want}

    def kernel(q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, ranges_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        *out_refs, smem, kv_barriers, q_barriers, do_barriers, q_free, do_free = refs
        k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = smem
        wg = lax.axis_index("wg")
        b, k_head, t = locate()
        lo, full_lo, full_hi, hi = _bounds(ranges_ref, b, t)

        @pl.when(wg < wgs)
        def _compute():
            _set_registers(wgs, 240)
            kv_start = pl.multiple_of(t * tile + wg * _WG_ROWS, _WG_ROWS)
            rows = pl.ds(kv_start, _WG_ROWS)
            k, v = k_smem.at[wg], v_smem.at[wg]
            plgpu.copy_gmem_to_smem(k_ref.at[b, rows, k_head], k, kv_barriers.at[wg])
            plgpu.copy_gmem_to_smem(v_ref.at[b, rows, k_head], v, kv_barriers.at[wg])
            across = plgpu.Layout.WGMMA.reduce(0)

            def step(j, sums, masked, first):
                i = first + j - lo
                slot = _slot(i, stages)
                plgpu.barrier_wait(do_barriers.at[slot])

                def products(s_ref, dp_ref, *sum_refs):  # s, dp: keys down, queries across
                    in_flight = dict(zip(widths, sum_refs))
                    plgpu.wgmma(s_ref, k, q_smem.at[slot].transpose((1, 0)))
                    if want_dk:
                        plgpu.wgmma(dp_ref, v, do_smem.at[slot].transpose((1, 0)))
                    s, slope = _soft_cap(plgpu.wgmma_accumulator_load(s_ref, wait_n=int(want_dk)), options)
                    lse = plgpu.load(lse_smem.at[slot], layout=across)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(lse, s.shape, [1]))
                    if masked:
                        p = jnp.where(mask.keep(aux, b, s.shape, 1, j * bq, kv_start), p, 0.0)
                    p = _before(p, i + 1 < G * (hi - lo), q_barriers.at[_slot(i + 1, stages)])
                    new = {}
                    if want_dv:
                        new["dv"] = _mma(sums["dv"], p.astype(dtype), do_smem.at[slot], in_flight.get("dv"))
                    if want_dk:
                        dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=int("dv" in in_flight))
                        delta = plgpu.load(delta_smem.at[slot], layout=across)
                        ds = p * (dp - lax.broadcast_in_dim(delta, s.shape, [1]))
                        ds = (ds if slope is None else ds * slope).astype(dtype)
                        new["dk"] = _mma(sums["dk"], ds, q_smem.at[slot], in_flight.get("dk"))
                    return {x: in_flight[x][...] if in_flight else new[x] for x in widths}

                block = _acc(bq)
                accs = [] if _dispatch.interpreted("gpu") else [_acc(width) for width in widths.values()]
                sums = pl.run_scoped(products, block, block, *accs)
                plgpu.barrier_arrive(do_free.at[slot])
                plgpu.barrier_arrive(q_free.at[slot])
                return sums

            plgpu.barrier_wait(kv_barriers.at[wg])
            pl.when(lo < hi)(lambda: plgpu.barrier_wait(q_barriers.at[0]))
            zero = lambda width: plgpu.layout_cast(jnp.full((_WG_ROWS, width), 0.0, jnp.float32), plgpu.Layout.WGMMA)

            def head(g, sums):
                return _three_loops(functools.partial(step, first=g * (hi - lo)), (lo, full_lo, full_hi, hi), sums)

            sums = lax.fori_loop(0, G, head, {x: zero(width) for x, width in widths.items()})
            leaving = {"dk": k, "dv": v}
            for x in widths:
                leaving[x][...] = (sums[x] * (options.scale if x == "dk" else 1.0)).astype(dtype)
            plgpu.commit_smem()
            for x, out_ref in zip(widths, out_refs, strict=True):
                plgpu.copy_smem_to_gmem(leaving[x], out_ref.at[b, rows, k_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == wgs)
        def _feed():
            _set_registers(wgs, 24)

            def copy(i, ref, row_ref, smem, row_smem, slot, barriers):
                n = k_head * G + lax.div(i, hi - lo)
                queries = pl.ds(pl.multiple_of((lo + lax.rem(i, hi - lo)) * bq, bq), bq)
                plgpu.copy_gmem_to_smem(ref.at[b, queries, n], smem.at[slot], barriers.at[slot])
                plgpu.copy_gmem_to_smem(row_ref.at[b, n, queries], row_smem.at[slot], barriers.at[slot])

            copy_q = lambda i, slot: copy(i, q_ref, lse_ref, q_smem, lse_smem, slot, q_barriers)
            copy_do = lambda i, slot: copy(i, do_ref, delta_ref, do_smem, delta_smem, slot, do_barriers)
            _feed_ring(G * (hi - lo), stages, (q_free, copy_q), (do_free, copy_do))

    smem = (
        _tiled((wgs, _WG_ROWS, H), dtype),
        _tiled((wgs, _WG_ROWS, Hv), dtype),
        _tiled((stages, bq, H), dtype),
        _tiled((stages, bq, Hv), dtype),
        plgpu.SMEM((stages, bq), jnp.float32),
        plgpu.SMEM((stages, bq), jnp.float32),
    )
    full = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=wgs, num_barriers=stages)
    out = _call(
        kernel,
        "attention_" + "_".join(widths),
        [jax.ShapeDtypeStruct((*padded.k.shape[:3], width), dtype) for width in widths.values()],
        grid,
        (smem, plgpu.Barrier(num_arrivals=2, num_barriers=wgs), full, full, free, free),
        (padded.q, padded.k, padded.v, do, lse, delta, ranges, *mask.arrays),
        wgs,
    )
    return [x[:, :S] for x in reversed(out)]


# Pieces.


class _Mask:
    """The mask inside of a block, from the arrays that a kernel receives for it."""

    def __init__(self, padded: Inputs, options: Options, keys: int, padded_keys: int):
        self.options, self.keys, self.ragged = options, keys, keys != padded_keys
        fields = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids", "window")
        arrays = {name: getattr(padded, name) for name in fields}
        if padded.window is not None:
            arrays["window"] = padded.window[None]
        self.names = [name for name in fields if arrays[name] is not None]
        self.arrays = [arrays[name] for name in self.names]

    def keep(self, refs, b, shape, q_dim: int, q_start, kv_start):
        """Which pairs of a block see each other; queries along q_dim of `shape`, keys along the other."""
        aux = dict(zip(self.names, refs, strict=True))
        kv_dim = 1 - q_dim

        def along(name, start, dim):
            values = aux[name].at[b, pl.ds(start, shape[dim])]
            values = plgpu.load(values, layout=plgpu.Layout.WGMMA.reduce(1 - dim), optimized=False)
            return lax.broadcast_in_dim(values, shape, [dim])

        def index(start, dim):
            return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA) + start

        conditions = []
        left, right = self.options.window
        if self.options.causal:
            right = 0 if right is None else min(right, 0)
        if left is not None or right is not None or "window" in aux:
            if "q_positions" in aux:
                ahead = along("kv_positions", kv_start, kv_dim) - along("q_positions", q_start, q_dim)
            else:
                ahead = index(kv_start, kv_dim) - index(q_start, q_dim)
            if left is not None:
                conditions.append(ahead >= -left)
            if right is not None:
                conditions.append(ahead <= right)
            if "window" in aux:
                window = aux["window"][0]
                conditions.append(ahead > -window)
                if right is None:
                    conditions.append(ahead < window)
        if "q_segment_ids" in aux:
            q_ids = along("q_segment_ids", q_start, q_dim)
            conditions += [q_ids == along("kv_segment_ids", kv_start, kv_dim), q_ids != 0]
        elif self.ragged:
            conditions.append(index(kv_start, kv_dim) < self.keys)
        if not conditions:  # a block that is not full, with nothing to hide: only when the last one is ragged
            return index(kv_start, kv_dim) >= 0
        return functools.reduce(lambda x, y: x & y, conditions)


def _bounds(ranges_ref, b, t):
    """One row of a range table, which has one row for all batches or one for each."""
    row = lax.rem(b, jnp.int32(ranges_ref.shape[0]))
    # Under shard_map with check_vma a value read varies over mesh axes and a sum in a kernel does not: loops want sums.
    return tuple(ranges_ref[row, t, i] + 0 for i in range(4))


def _three_loops(step, bounds, carry):
    """step(j, carry, masked) over the blocks of one row of a range table."""
    lo, full_lo, full_hi, hi = bounds
    carry = lax.fori_loop(lo, full_lo, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(full_lo, full_hi, functools.partial(step, masked=False), carry)
    return lax.fori_loop(full_hi, hi, functools.partial(step, masked=True), carry)


def _feed_ring(steps, stages: int, *buffers):
    """Copies for each step, once the computing warpgroups have freed its slot; at the end waits for all slots.

    Each buffer is (barriers that say a slot is free, copy(step, slot)).
    """

    @pl.loop(0, steps + stages)
    def _(i):
        slot = _slot(i, stages)
        for free, copy in buffers:
            pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            pl.when(i < steps)(lambda copy=copy: copy(i, slot))


def _mma(acc: jax.Array, a: jax.Array, b_ref, acc_ref=None) -> Any:
    """acc + a @ b with a in registers, which the interpreter's wgmma does not take; in flight in acc_ref if given."""
    if _dispatch.interpreted("gpu"):
        return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
    if acc_ref is not None:
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, a, b_ref)
        return None
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, b_ref))(plgpu.ACC.init(acc))


def _before(x: jax.Array, more, barrier) -> jax.Array:
    """x, and a wait for the next step's block, if there is one; the loop in this wait ends a basic block.

    Without that ptxas moves the exponentials that make x below the end of the wgmma that they should run under.
    """
    x = lax.optimization_barrier(x)
    pl.when(more)(lambda: plgpu.barrier_wait(barrier))
    return x


def _soft_cap(s: jax.Array, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """q @ k such that scale times it is the capped logit, and the derivative."""
    if options.soft_cap is None:
        return s, None
    ratio = options.soft_cap / options.scale
    tanh = jnp.tanh(s * (1 / ratio))
    return tanh * ratio, 1.0 - tanh * tanh


def _slot(i: jax.Array, stages: int) -> jax.Array:
    return lax.rem(i, jnp.int32(stages))


def _grid(B: int, heads: int, tiles: int, bytes_per_head: int):
    """The grid, and the function that finds (batch, head, tile) in it.

    Pairs of batch and head run in groups whose streamed operands fit in the L2; in a group the tile index varies
    slowest, so all pairs start on the tiles that take longest.
    """
    pairs = B * heads
    fit = max(1, _L2_BYTES // max(bytes_per_head, 1))
    group = max(d for d in range(1, pairs + 1) if pairs % d == 0 and d <= fit)

    def locate():
        pair = lax.axis_index("group") * group + lax.axis_index("pair")
        return lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads)), lax.axis_index("tile")

    return (pairs // group, tiles, group), locate


def _acc(width: int):
    return plgpu.ACC((_WG_ROWS, width), jnp.float32)


def _tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory that TMA writes and wgmma reads."""
    transforms: Any = plgpu  # pyright takes these two for abstract classes
    return plgpu.SMEM(shape, dtype, transforms=(transforms.TilingTransform((8, 64)), transforms.SwizzleTransform(128)))


def _set_registers(wgs: int, count: int) -> None:
    """Registers go from the warpgroup that feeds to the two that compute; one alone starts with all it can use."""
    if wgs > 1:
        plgpu.set_max_registers(count, action="increase" if count > 168 else "decrease")


def _call(kernel, name: str, out_type, grid, scratch, operands, wgs: int = 2):
    """`wgs` warpgroups that compute and one that feeds them, for each place in the grid."""
    out = plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=grid,
        grid_names=("group", "tile", "pair"),
        num_threads=wgs + 1,
        thread_name="wg",
        # A row lies in one warp: no reduction needs shared memory, and three stages of the forward need the rest.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name=name,
    )(*operands)
    axes = tuple(sorted(jax.typeof(operands[0]).mat.varying))
    return [jax.lax.pcast(x, axes, to="varying") if axes else x for x in out]


def _sinks(inputs: Inputs) -> jax.Array:
    N = inputs.q.shape[2]
    return jnp.zeros(N, jnp.float32) if inputs.sinks is None else inputs.sinks.astype(jnp.float32)
