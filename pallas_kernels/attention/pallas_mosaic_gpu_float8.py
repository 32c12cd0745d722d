"""Attention in float8 for Hopper GPUs (sm90), written in Pallas Mosaic GPU: the forward of pallas_mosaic_gpu.py with
both matmuls in e4m3.

What differs. The second matmul takes V with keys innermost, so XLA transposes V as it rounds it. An accumulator holds
pairs of neighbours and a float8 operand in registers wants four: instead of exchanging registers between threads the
keys of V are permuted, which costs nothing. Probabilities are 2**8 times as large, which uses the format's range and
cancels. The tensor cores add float8 products to about 14 bits, so each step's sum over 128 keys starts at zero and is
added in float32, in the multiplication that rescales anyway.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import key_ranges, pad_inputs, pad_to
from pallas_kernels.attention.float8 import DTYPE, round_inputs
from pallas_kernels.attention.inputs import Inputs, Options
from pallas_kernels.attention.mosaic_gpu_pieces import (
    LOG2E,
    ROWS,
    Mask,
    accumulator,
    cap_logits,
    find_tile,
    heads_at_once,
    launch,
    read_bounds,
    set_registers,
    slot_of,
    three_loops,
    tiled,
)
from pallas_kernels.attention.schedule import deal

BLOCK_KV, STAGES, WIDTH = 128, 4, 128  # WIDTH: head_dim is filled up to it
_SHIFT = 8.0  # of the exponents of probabilities


def supported(inputs: Inputs, options: Options) -> str | None:
    """None, or the reason why this kernel cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    if inputs.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, and rounds them. Got {inputs.q.dtype}"
    H, Hv = inputs.q.shape[3], inputs.v.shape[3]
    if max(H, Hv) > WIDTH:
        return f"takes head_dim up to {WIDTH}. Got {H} and {Hv}"
    if options.scale <= 0:
        return f"takes a positive scale. Got {options.scale}"
    return None


def attention_float8_mosaic_gpu(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32."""
    Hv, dtype = inputs.v.shape[3], inputs.q.dtype
    inputs, q_scale, k_scale, v_scale = round_inputs(inputs)
    inputs = inputs._replace(q=pad_to(inputs.q, 3, WIDTH), k=pad_to(inputs.k, 3, WIDTH), v=pad_to(inputs.v, 3, WIDTH))
    G = inputs.q.shape[2] // inputs.k.shape[2]
    factors = (q_scale * jnp.repeat(k_scale, G, axis=1)[:, None]).swapaxes(1, 2)
    o, lse = _forward(inputs, options, dtype, factors, jnp.repeat(v_scale, G, axis=1))
    return o[..., :Hv], lse.swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("options", "dtype"), inline=True)  # see `launch`
def _forward(inputs: Inputs, options: Options, dtype, factors, v_scale) -> tuple[jax.Array, jax.Array]:
    """o [B, T, N, Hv] and the logsumexp [B, N, T]; factors [B, N, T] of the logits, v_scale [B, N]."""
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.k.shape[2], inputs.v.shape[3]
    S = inputs.k.shape[1]
    tile, bkv, stages, buffers = 2 * ROWS, BLOCK_KV, STAGES, 2
    padded = pad_inputs(inputs, tile, bkv)
    tiles = padded.q.shape[1] // tile
    ranges = key_ranges(inputs, options, tile, bkv)
    mask = Mask(padded, options, S, padded.k.shape[1])
    schedule = deal(ranges[..., 3] - ranges[..., 0], B, N, heads_at_once(B * N, S * (H + Hv) * K // N))
    c = options.scale * LOG2E

    def kernel(q_ref, k_ref, v_ref, factors_ref, v_scale_ref, ranges_ref, schedule_ref, sinks_ref, *refs):
        aux, refs = refs[: len(mask.arrays)], refs[len(mask.arrays) :]
        o_ref, lse_ref, smem, q_barriers, k_barriers, v_barriers, q_free, k_free, v_free = refs
        q_smem, k_smem, v_smem, o_smem, lse_smem, factors_smem, mask_smem = smem
        wg = lax.axis_index("wg")
        count = schedule_ref[lax.axis_index("block"), 0] + 0
        find = functools.partial(find_tile, schedule_ref, heads=N, tiles=tiles)

        def place(w):
            b, n, t = find(w)
            lo, full_lo, full_hi, hi = read_bounds(ranges_ref, b, t)
            return b, n, t, (lo, full_lo, full_hi, jnp.maximum(hi, lo + 1))  # one that sees no block masks all of one

        def work(w, done):
            """One tile; `done` counts the blocks of keys of those before it."""
            b, n, t, (lo, full_lo, full_hi, hi) = place(w)
            q_start = pl.multiple_of(t * tile + wg * ROWS, ROWS)
            rows = pl.ds(q_start, ROWS)
            buffer = slot_of(w, buffers)
            q, o = q_smem.at[buffer, wg], o_smem.at[wg]
            slot = lambda j: slot_of(done + j - lo, stages)
            reduced = plgpu.Layout.WGMMA.reduce(1)
            sink = -math.inf if inputs.sinks is None else sinks_ref[n] * LOG2E
            total = 0.0 if inputs.sinks is None else 2.0**_SHIFT
            m = plgpu.layout_cast(jnp.full((ROWS,), sink, jnp.float32), reduced)
            l = plgpu.layout_cast(jnp.full((ROWS,), total, jnp.float32), reduced)
            acc = plgpu.layout_cast(jnp.full((ROWS, Hv), 0.0, jnp.float32), plgpu.Layout.WGMMA)
            plgpu.barrier_wait(q_barriers.at[buffer])
            factor = plgpu.load(factors_smem.at[buffer, wg], layout=reduced, optimized=False)
            down = lambda x, like: lax.broadcast_in_dim(x, like.shape, [0])
            rows_mask = mask.down(aux, b, rows)

            def softmax(s, m, l, j, masked):
                unit = factor * c
                if options.soft_cap is not None:
                    s, unit = cap_logits(s * down(factor, s), options)[0], jnp.full_like(factor, c)
                if masked:
                    keep = mask.keep(rows_mask, mask_smem, slot(j), s.shape, q_start, j * bkv)
                    s = jnp.where(keep, s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * unit)
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - shift)
                p = jnp.exp2(s * down(unit, s) - down(shift - _SHIFT, s))
                return p, m_new, l * alpha + p.sum(axis=1), alpha

            def qk(s_ref):
                plgpu.wgmma(s_ref, q, k_smem.at[slot(lo)].transpose((1, 0)))
                return s_ref[...]

            def step(j, carry, masked):
                """QK of block j and PV of block j - 1 in flight together: this softmax runs under that PV."""
                acc, m, l, p, alpha = carry
                plgpu.barrier_wait(k_barriers.at[slot(j)])

                def both(s_ref, pv_ref):
                    plgpu.wgmma(s_ref, q, k_smem.at[slot(j)].transpose((1, 0)))
                    pv = _product(pv_ref, p, v_smem.at[slot(j - 1)].transpose((1, 0)))
                    s = plgpu.wgmma_accumulator_load(s_ref, wait_n=0 if _dispatch.interpreted("gpu") else 1)
                    late = masked and mask.across  # what stands beside k is in use
                    if not late:
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                    p_new, *rest = lax.optimization_barrier(softmax(s, m, l, j, masked))
                    if late:
                        plgpu.barrier_arrive(k_free.at[slot(j)])
                    # The loop in this wait ends a basic block: ptxas would move the exponentials below the PV's end.
                    plgpu.barrier_wait(v_barriers.at[slot(j)])
                    new_acc = acc * down(alpha, acc) + pv()
                    # Only now may p's registers change: the PV above reads them while it is in flight.
                    new_acc, p_new = lax.optimization_barrier((new_acc, p_new))
                    return new_acc, _narrow(p_new), *rest

                acc, p, m, l, alpha = pl.run_scoped(both, accumulator(bkv), accumulator(Hv))
                plgpu.barrier_arrive(v_free.at[slot(j - 1)])
                return acc, m, l, p, alpha

            plgpu.barrier_wait(k_barriers.at[slot(lo)])
            s = pl.run_scoped(qk, accumulator(bkv))
            p, m, l, alpha = softmax(s, m, l, lo, True)
            plgpu.barrier_arrive(k_free.at[slot(lo)])
            plgpu.barrier_wait(v_barriers.at[slot(lo)])
            inner = lo + 1, jnp.maximum(full_lo, lo + 1), jnp.maximum(full_hi, lo + 1), hi
            acc, m, l, p, alpha = three_loops(step, inner, (acc, m, l, _narrow(p), alpha))
            plgpu.barrier_arrive(q_free.at[buffer])
            last = lambda pv_ref: _product(pv_ref, p, v_smem.at[slot(hi - 1)].transpose((1, 0)))()
            acc = acc * down(alpha, acc) + pl.run_scoped(last, accumulator(Hv))
            plgpu.barrier_arrive(v_free.at[slot(hi - 1)])

            seen = l > 0.0
            inverse = jnp.where(seen, v_scale_ref[b, n] / jnp.where(seen, l, 1.0), 0.0)
            log = (m + jnp.log2(jnp.where(seen, l, 1.0)) - _SHIFT) / LOG2E
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has long left
            o[...] = (acc * down(inverse, acc)).astype(dtype)
            lse_smem.at[wg][...] = jnp.where(seen, log, -jnp.inf)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o, o_ref.at[b, rows, n])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse_ref.at[b, n, rows])
            return done + hi - lo

        @pl.when(wg < 2)
        def _compute():
            set_registers(2, 240)
            lax.fori_loop(0, count, work, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == 2)
        def _feed():
            set_registers(2, 24)

            def feed(w, done):
                b, n, t, (lo, _, _, hi) = place(w)
                k_head = lax.div(n, jnp.int32(N // K))
                buffer = slot_of(w, buffers)
                pl.when(w >= buffers)(lambda: plgpu.barrier_wait(q_free.at[buffer]))
                for x in (0, 1):
                    rows = pl.ds(pl.multiple_of(t * tile + x * ROWS, ROWS), ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[buffer, x], q_barriers.at[buffer])
                    smem = factors_smem.at[buffer, x]
                    plgpu.copy_gmem_to_smem(factors_ref.at[b, n, rows], smem, q_barriers.at[buffer])

                @pl.loop(lo, hi)
                def _(j):
                    i = done + j - lo
                    slot = slot_of(i, stages)
                    keys = pl.ds(pl.multiple_of(j * bkv, bkv), bkv)
                    for ref, smem, full, free in (
                        (k_ref.at[b, keys, k_head], k_smem, k_barriers, k_free),
                        (v_ref.at[b, k_head, :, keys], v_smem, v_barriers, v_free),
                    ):
                        pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                        plgpu.copy_gmem_to_smem(ref, smem.at[slot], full.at[slot])
                        if smem is k_smem:
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
        tiled((buffers, 2, ROWS, H), DTYPE),
        tiled((stages, bkv, H), DTYPE),
        tiled((stages, Hv, bkv), DTYPE),
        tiled((2, ROWS, Hv), dtype),
        plgpu.SMEM((2, ROWS), jnp.float32),
        plgpu.SMEM((buffers, 2, ROWS), jnp.float32),
        mask.smem(stages, bkv),
    )
    k_full, v_full = (plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in (1 + len(mask.across), 1))
    free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    q_full = plgpu.Barrier(num_arrivals=4, num_barriers=buffers)
    q_free = plgpu.Barrier(num_arrivals=2, num_barriers=buffers)
    Tp = tiles * tile
    sinks = jnp.zeros(N, jnp.float32) if inputs.sinks is None else inputs.sinks.astype(jnp.float32)
    operands = padded.q, padded.k, _keys_inside(padded.v), pad_to(factors, 2, tile), v_scale, ranges, schedule, sinks
    o, lse = launch(
        kernel,
        "attention_float8_fwd",
        [jax.ShapeDtypeStruct((B, Tp, N, Hv), dtype), jax.ShapeDtypeStruct((B, N, Tp), jnp.float32)],
        {"block": len(schedule)},
        (smem, q_full, k_full, v_full, q_free, free, free),
        (*operands, *mask.arrays),
    )
    return o[:, :T], lse[:, :, :T]


def _keys_inside(v: jax.Array) -> jax.Array:
    """v [B, S, K, Hv] as [B, K, Hv, S], its keys in the order in which `_narrow` leaves them."""
    B, S, K, Hv = v.shape
    return _order(v.transpose(0, 2, 3, 1).reshape(-1, S)).reshape(B, K, Hv, S)


def _order(x: jax.Array) -> jax.Array:
    """Columns in groups of 16, two pairs for each of four threads: (pair, thread, one) to (thread, pair, one)."""
    return x.reshape(x.shape[0], -1, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)


def _product(acc_ref, p: Any, v_ref):
    """p @ v in flight, p in registers, which the interpreter's wgmma does not take; what it returns waits for it."""
    if _dispatch.interpreted("gpu"):
        value = jnp.dot(p.astype(jnp.float32), v_ref[...].astype(jnp.float32), preferred_element_type=jnp.float32)
        return lambda: value
    plgpu.wgmma(acc_ref, p, v_ref)
    return lambda: plgpu.wgmma_accumulator_load(acc_ref)


def _narrow(p: jax.Array) -> jax.Array:
    """An accumulator as a float8 operand in registers, its columns in the order of `_order`."""
    if _dispatch.interpreted("gpu"):
        return _order(p.astype(DTYPE))
    import jax.experimental.mosaic.gpu as mgpu
    import numpy as np
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm, vector

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(p.shape, DTYPE, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def pack(ctx, wide):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        four = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        registers = np.empty(mgpu.WGMMA_LAYOUT_8BIT.registers_shape(wide.shape), dtype=object)
        for index in np.ndindex(registers.shape):
            pairs = [wide.registers[index[0], index[1] * 2 + i, *index[2:]] for i in (0, 1)]
            numbers = [vector.extract(x, dynamic_position=[], static_position=[i]) for x in pairs for i in (0, 1)]
            word = llvm.inline_asm(i32, numbers, _PACK, "=r,f,f,f,f")
            registers[index] = mgpu.utils.bitcast(word, four)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None)

    return pack(p)  # pyright: ignore[reportCallIssue]  # its signature is that of the decorated function


_PACK = """{
    .reg .b16 a, b;
    cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 b, $4, $3;
    mov.b32 $0, {a, b};
}"""
