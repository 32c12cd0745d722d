"""Decode attention to caches of few tokens in one kernel. Hopper GPUs (sm90), Pallas Mosaic GPU.

A block has one kv head of one sequence: its warpgroups take the tiles of keys in turn, each with a softmax of its own,
and add up through shared memory. Nothing passes between blocks, so no second kernel merges parts (3 to 4 us of an 8B
model's layer) and no schedule is read before the first page is asked for. What a long sequence costs is not shared with
other blocks: `fits` says where that is no loss.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.mosaic_gpu_pieces import LOG2E, ROWS, mma, tiled
from pallas_kernels.decode_attention.inputs import Inputs, Options, bounded_lengths
from pallas_kernels.decode_attention.mosaic_gpu_pieces import SM_COUNT, TILE, iota

_MOST = 2048  # tokens that the page table can hold: with more, sequences are cut


@dataclasses.dataclass(frozen=True)
class Config:
    workers: int = 2  # warpgroups that share the keys of a block
    stages: int = 2  # tiles in flight for each


def fits(inputs: Inputs) -> bool:
    """Whether this kernel is the faster one: for pages in q's dtype, short tables, and multiprocessors that are not
    left idle by the last blocks."""
    B, T, N, H = inputs.q.shape
    page, K, Hv = inputs.v_pages.shape[1:]
    if inputs.k_pages.dtype != inputs.q.dtype or H not in (64, 128) or Hv != H or T * N // K > ROWS:
        return False
    waves = -(-B * K // SM_COUNT)
    return inputs.page_table.shape[1] * page <= _MOST and (waves == 1 or 3 * waves * SM_COUNT <= 4 * B * K)


def decode_attention_short(inputs: Inputs, options: Options, config: Config = Config()) -> jax.Array:
    """[B, T, N, Hv] in q's dtype."""
    B, T, N, H = inputs.q.shape
    page, K, Hv = inputs.v_pages.shape[1:]
    G, dtype = N // K, inputs.q.dtype
    W, stages = config.workers, config.stages
    rows = T * G  # queries of a kv head, token by token
    tall = -(-rows // 8) * 8
    q = inputs.q.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, rows, H)
    if _dispatch.interpreted("gpu"):  # else TMA's, which fills up with zeros
        q = jnp.pad(q, ((0, 0), (0, 0), (0, tall - rows), (0, 0)))
    copies = max(1, TILE // page)  # pages in a tile
    size = TILE // copies
    single = inputs.page_table.shape[1] == copies == 1
    c = options.scale * LOG2E
    given = inputs.sinks is not None
    sinks = []
    if inputs.sinks is not None:
        sinks = jnp.tile(inputs.sinks.astype(jnp.float32).reshape(K, 1, G), (1, T, 1)).reshape(K, rows)
        sinks = [jnp.pad(sinks, ((0, 0), (0, ROWS - rows)))]
    first = inputs.first_page
    start = [] if first is None else [first.reshape(1)]

    def kernel(q_ref, k_ref, v_ref, table_ref, lengths_ref, *refs):
        start_refs, refs = refs[: len(start)], refs[len(start) :]
        sink_refs, (out_ref, q_smem, k_smem, v_smem, sum_smem, state_smem, out_smem, *barriers) = (
            refs[: len(sinks)],
            refs[len(sinks) :],
        )
        q_full, k_full, v_full, k_free, v_free, done = barriers
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        b, head = lax.div(block, jnp.int32(K)), lax.rem(block, jnp.int32(K))
        # Reads that nothing waits for until all are on their way.
        begin = start_refs[0][0] + 0 if start else jnp.int32(0)
        only = table_ref[b, 0] + begin if single else None
        length = lengths_ref[b] + 0
        hi = lax.div(length + TILE - 1, jnp.int32(TILE))
        lo = jnp.int32(0)
        if options.window is not None:
            lo = lax.div(jnp.maximum(length - T + 1 - options.window, 0), jnp.int32(TILE))

        def turns(w, upto):
            """How many of the tiles lo + w, lo + w + W, ... there are below upto."""
            return lax.div(jnp.maximum(upto - lo - w + W - 1, 0), jnp.int32(W))

        @pl.when(wg < W)
        def _compute():
            _set_registers(W, True)
            reduced = plgpu.Layout.WGMMA.reduce(1)
            across = lambda x, width: lax.broadcast_in_dim(x, (ROWS, width), [0])

            def keep(j):
                """Which keys of tile j each row sees."""
                key = iota((ROWS, TILE), 1) + j * TILE
                if T > 1:
                    ahead = key - (length - T) - lax.div(iota((ROWS, TILE), 0), jnp.full((ROWS, TILE), G, jnp.int32))
                else:
                    ahead = key - (length - 1)
                see = ahead <= 0
                return see if options.window is None else see & (ahead > -options.window)

            def step(i, carry, masked):
                acc, m, l = carry
                j, slot = lo + wg + i * W, lax.rem(i, jnp.int32(stages))
                k, v = k_smem.at[wg, slot], v_smem.at[wg, slot]
                plgpu.barrier_wait(k_full.at[wg, slot])

                def qk(s_ref):
                    plgpu.wgmma(s_ref, q_smem, k.transpose((1, 0)))
                    return s_ref[...]

                s = pl.run_scoped(qk, plgpu.ACC((ROWS, TILE), jnp.float32))
                plgpu.barrier_arrive(k_free.at[wg, slot])
                if options.soft_cap is not None:
                    ratio = options.soft_cap / options.scale
                    s = jnp.tanh(s * (1 / ratio)) * ratio
                if masked:
                    s = jnp.where(keep(j), s, -jnp.inf)
                m_new = jnp.maximum(m, s.max(axis=1) * c)
                shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                alpha = jnp.exp2(m - shift)
                p = jnp.exp2(s * c - across(shift, TILE))
                l = l * alpha + p.sum(axis=1)
                plgpu.barrier_wait(v_full.at[wg, slot])
                if masked:  # zeros past the end, where nan may stand, which 0 * nan would pass on
                    values = plgpu.load(v, layout=plgpu.Layout.WGMMA)
                    owned = iota(values.shape, 0) + j * TILE < length
                    v[...] = jnp.where(owned, values, jnp.zeros((), dtype))
                    plgpu.commit_smem()
                acc = mma(acc * across(alpha, Hv), p.astype(dtype), v)
                plgpu.barrier_arrive(v_free.at[wg, slot])
                return acc, m_new, l

            zero = lambda layout, shape, x: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
            carry = (
                zero(plgpu.Layout.WGMMA, (ROWS, Hv), 0.0),
                zero(reduced, (ROWS,), -math.inf),
                zero(reduced, (ROWS,), 0.0),
            )
            plgpu.barrier_wait(q_full)
            full_hi = jnp.clip(lax.div(jnp.maximum(length - T + 1, 0), jnp.int32(TILE)), lo, hi)
            full_lo = lo
            if options.window is not None:
                seen_by_all = jnp.maximum(length - options.window, 0)
                full_lo = jnp.clip(lax.div(seen_by_all + TILE - 1, jnp.int32(TILE)), lo, full_hi)
                carry = lax.fori_loop(0, turns(wg, full_lo), lambda i, x: step(i, x, True), carry)
            carry = lax.fori_loop(turns(wg, full_lo), turns(wg, full_hi), lambda i, x: step(i, x, False), carry)
            acc, m, l = lax.fori_loop(turns(wg, full_hi), turns(wg, hi), lambda i, x: step(i, x, True), carry)

            @pl.when(wg > 0)
            def _():
                sum_smem[wg - 1] = acc
                state_smem[0, wg - 1], state_smem[1, wg - 1] = m, l
                plgpu.commit_smem()
                plgpu.barrier_arrive(done)

            @pl.when(wg == 0)
            def _():
                plgpu.barrier_wait(done)
                load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
                others = [
                    (load(state_smem.at[0, w], reduced), load(state_smem.at[1, w], reduced)) for w in range(W - 1)
                ]
                top = m
                for other, _ in others:
                    top = jnp.maximum(top, other)
                if given:
                    sink = load(sink_refs[0].at[head], reduced) * LOG2E
                    top = jnp.maximum(top, sink)
                shift = jnp.where(top == -jnp.inf, 0.0, top)
                weight = jnp.exp2(m - shift)
                out, total = acc * across(weight, Hv), l * weight
                for w, (other, its) in enumerate(others):
                    weight = jnp.exp2(other - shift)
                    out += load(sum_smem.at[w], plgpu.Layout.WGMMA) * across(weight, Hv)
                    total += its * weight
                if given:
                    total += jnp.exp2(sink - shift)
                seen = total > 0.0
                inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
                out_smem[...] = (out * across(inverse, Hv)).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, rows)], out_ref.at[b, head])
                plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _feed():
            _set_registers(W, False)
            last_page = lax.div(jnp.maximum(length - 1, 0), jnp.int32(page))
            everything = pl.ds(lax.axis_index("wg") * 0, tall)  # `tall` rows of which there may be fewer
            plgpu.copy_gmem_to_smem(q_ref.at[b, head, everything], q_smem.at[pl.ds(0, tall)], q_full)

            @pl.loop(0, turns(0, hi))
            def _(i):
                slot = lax.rem(i, jnp.int32(stages))
                for w in range(W):

                    @pl.when(i < turns(w, hi))
                    def _(w=w):
                        j = lo + w + i * W
                        at = lax.div(j * TILE, jnp.int32(page))
                        pages = [only]
                        if only is None:
                            pages = [table_ref[b, jnp.minimum(at + x, last_page)] + begin for x in range(copies)]
                        within = pl.ds(pl.multiple_of(lax.rem(j * TILE, jnp.int32(page)), size), size)
                        buffers = (k_free, k_full, k_ref, k_smem), (v_free, v_full, v_ref, v_smem)
                        for free, full, ref, buffer in buffers:
                            pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[w, slot]))
                            for x, index in enumerate(pages):
                                source = ref.at[index, within, head]
                                target = buffer.at[w, slot, pl.ds(x * size, size)]
                                plgpu.copy_gmem_to_smem(source, target, full.at[w, slot])

            for w in range(W):  # no barrier may be left with an arrival that nobody saw

                @pl.loop(0, stages)
                def _(x, w=w):
                    at = turns(w, hi) + x
                    slot = lax.rem(at, jnp.int32(stages))
                    for free in (k_free, v_free):
                        pl.when(at >= stages)(lambda free=free: plgpu.barrier_wait(free.at[w, slot]))

    full = plgpu.Barrier(num_arrivals=copies, num_barriers=(W, stages))
    free = plgpu.Barrier(num_barriers=(W, stages))
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, K, rows, Hv), dtype),
        scratch_types=(
            tiled((ROWS, H), dtype),
            tiled((W, stages, TILE, H), dtype),
            tiled((W, stages, TILE, Hv), dtype),
            plgpu.SMEM((W - 1, ROWS, Hv), jnp.float32),
            plgpu.SMEM((2, W - 1, ROWS), jnp.float32),
            plgpu.SMEM((ROWS, Hv), dtype),
            plgpu.Barrier(),
            full,
            full,
            free,
            free,
            plgpu.Barrier(num_arrivals=W - 1),
        ),
        grid=(B * K,),
        grid_names=("block",),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="decode_attention_short",
    )(q, inputs.k_pages, inputs.v_pages, inputs.page_table, bounded_lengths(inputs), *start, *sinks)
    return out.reshape(B, K, T, G, Hv).swapaxes(1, 2).reshape(B, T, N, Hv)


def _set_registers(workers: int, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32)}.get(workers)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
