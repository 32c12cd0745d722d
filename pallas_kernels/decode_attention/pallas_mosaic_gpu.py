"""Decode attention for Hopper GPUs (sm90), written in Pallas Mosaic GPU: bound by reading the cache once.

The rows of a matmul are the queries that share a kv head: N / K heads times T tokens, filled up to 64. That wastes
tensor cores which would wait for memory anyway: at head_dim 128 a tile of 64 keys takes about 500 cycles of them and
1,700 of the memory. Each streaming multiprocessor holds two workers; each is a warpgroup that computes and one that
feeds it pages through TMA. The work of a ragged batch is cut into equal runs of tiles (schedule.py), so a long sequence
is split along its keys; a second kernel merges the parts. Every part has one writer and a fixed place: results repeat
bit by bit.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.mosaic_gpu_pieces import LOG2E, ROWS, mma, tiled
from pallas_kernels.decode_attention.inputs import Inputs, Options, bounded_lengths, placed, scales_of_tokens
from pallas_kernels.decode_attention.mosaic_gpu_pieces import SM_COUNT, TILE, iota
from pallas_kernels.decode_attention.pallas_mosaic_gpu_short import decode_attention_short, fits
from pallas_kernels.decode_attention.schedule import Schedule, make_schedule

_WIDTH = 64  # columns that a block merges
_UNROLL = 4  # parts that it reads at a time


@dataclasses.dataclass(frozen=True)
class Config:
    """What fits into 227 KB of shared memory."""

    workers: int = 2  # in a block; one block runs on a multiprocessor
    stages: int = 2  # tiles in flight for each worker
    blocks: int = SM_COUNT
    together: bool = True  # workers side by side read the heads of the same pages at about the same time

    def lanes(self, items: int) -> int:
        """How many items of a sequence run side by side; at most one worker in 20 is left over."""
        count = self.blocks * self.workers
        fits = [d for d in range(1, items + 1) if items % d == 0 and d <= count and count % d * 20 <= count]
        return max(fits) if self.together else 1


def tuned(H: int, Hv: int, itemsize: int) -> Config:
    """The configuration for head_dim H of q and k, Hv of v and pages of `itemsize` bytes a number."""
    if max(H, Hv) > 128:
        return Config(workers=1)
    if itemsize == 1:
        return Config(stages=4)
    return Config(stages=2 if max(H, Hv) > 64 else 4)


def supported(inputs: Inputs, options: Options) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    if reason := _dispatch.unless_hopper():
        return reason
    q, pages = inputs.q.dtype, inputs.k_pages.dtype
    if q not in (jnp.bfloat16, jnp.float16):
        return f"takes q in bfloat16 and float16. Got {q}"
    if pages not in (q, jnp.int8, jnp.float8_e4m3fn):
        return f"takes pages in q's dtype, int8 and float8_e4m3fn. Got {pages}"
    H, Hv = inputs.q.shape[3], inputs.v_pages.shape[3]
    if H not in (64, 128, 256) or Hv not in (64, 128, 256):
        return f"takes head_dim 64, 128, 256. Got {H} and {Hv}"
    if pages != q and (H, Hv) != (128, 128):
        return f"takes pages of 8 bits at head_dim 128. Got {H} and {Hv}"
    page = inputs.k_pages.shape[1]
    if not (page % TILE == 0 or (TILE % page == 0 and page >= 8)):
        return f"takes pages of 8, 16, 32 tokens or a multiple of {TILE}. Got {page}"
    if options.scale <= 0:
        return f"takes a positive scale. Got {options.scale}"
    return None


def decode_attention_mosaic_gpu(inputs: Inputs, options: Options, config: Config | None = None) -> jax.Array:
    """[B, T, N, Hv] in q's dtype."""
    if config is None and fits(inputs):
        return decode_attention_short(inputs, options)
    inputs = placed(inputs)
    B, T, N, H = inputs.q.shape
    K, Hv = inputs.v_pages.shape[2:]
    G = N // K
    config = config or tuned(H, Hv, inputs.k_pages.dtype.itemsize)
    # Queries of one kv head, token by token, in blocks of at most 64 rows.
    q = inputs.q.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    rows = min(-(-T * G // 8) * 8, ROWS)
    blocks = -(-T * G // rows)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, blocks * rows - T * G), (0, 0))).reshape(B, K * blocks, rows, H)
    if inputs.k_pages.dtype == jnp.float8_e4m3fn:  # one instruction makes it float16; int8 goes to bfloat16 as fast
        q = q.astype(jnp.float16)
    lanes = config.lanes(K * blocks)
    groups = config.blocks * config.workers // lanes
    schedule = make_schedule(bounded_lengths(inputs), T, K * blocks // lanes, TILE, options.window, groups)
    parts, lse = _parts(q, inputs, options, config, schedule, G)
    out = _merge(parts, lse, _sink_rows(inputs, T, blocks, rows), schedule, lanes, q.shape[:2], inputs.q.dtype)
    out = out.reshape(B, K, blocks * rows, Hv)[:, :, : T * G]
    return out.reshape(B, K, T, G, Hv).swapaxes(1, 2).reshape(B, T, N, Hv)


def _parts(q, inputs: Inputs, options: Options, config: Config, schedule: Schedule, G: int):
    """Each part's output [parts, rows, Hv] and logsumexp in powers of two [parts, rows], both float32."""
    B, items, rows, H = q.shape
    T = inputs.q.shape[1]
    page, K, Hv = inputs.v_pages.shape[1:]
    dtype, pages_dtype = q.dtype, inputs.k_pages.dtype
    quantized = pages_dtype != dtype
    pairs, stages = config.workers, config.stages
    copies = max(1, TILE // page)  # pages in a tile
    blocks = items // K
    lanes = config.lanes(items)
    groups = config.blocks * pairs // lanes
    turns = items // lanes  # items of a sequence that one worker does one after another
    c = options.scale * LOG2E
    scales = _scales(inputs) if quantized else ()
    of_tokens = _of_tokens(inputs)

    def kernel(q_ref, k_ref, v_ref, table_ref, sequences_ref, workers_ref, chunk_ref, *refs):
        scale_refs, (o_ref, lse_ref, smem, q_barriers, k_full, v_full, k_free, v_free) = refs[:-8], refs[-8:]
        q_smem, k_smem, v_smem, o_smem, lse_smem = smem
        if quantized:
            o_smem, wide = o_smem
        wg = lax.axis_index("wg")
        pair = lax.rem(wg, jnp.int32(pairs))
        worker = lax.axis_index("block") * pairs + pair
        group, lane = lax.div(worker, jnp.int32(lanes)), lax.rem(worker, jnp.int32(lanes))
        chunk = chunk_ref[0] + 0
        at_work = jnp.minimum(group, groups - 1)
        first, last = workers_ref[at_work, 0] + 0, workers_ref[at_work, 1] + 0
        last = jnp.where(group < groups, last, first)

        def part(i):
            """Sequence, item of it, length, and tiles [lo, hi) of this worker's part of its i-th item."""
            b, turn = lax.div(i, jnp.int32(turns)), lax.rem(i, jnp.int32(turns))
            length, offset, tiles, begin = (sequences_ref[b, x] + 0 for x in range(4))
            begin += turn * tiles
            lo = jnp.maximum(group * chunk - begin, 0)
            hi = jnp.minimum((group + 1) * chunk - begin, tiles)
            return b, turn * lanes + lane, length, offset + lo, offset + jnp.maximum(lo, hi)

        @pl.when(wg < pairs)
        def _compute():
            _set_registers(pairs, 216)
            reduced = plgpu.Layout.WGMMA.reduce(1)

            def keep(length, item, j):
                """Which keys of tile j each row sees."""
                key = iota((ROWS, TILE), 1) + j * TILE
                if T > 1:
                    row = iota((ROWS, TILE), 0) + lax.rem(item, jnp.int32(blocks)) * rows
                    ahead = key - (length - T) - lax.div(row, jnp.full_like(row, G))
                else:
                    ahead = key - (length - 1)
                see = ahead <= 0
                return see if options.window is None else see & (ahead > -options.window)

            def factors(b, head, j):
                """What the keys and values of each page of tile j are multiplied with."""
                if of_tokens:
                    return ()
                first = lax.div(j * TILE, jnp.int32(page))
                at = [jnp.minimum(first + x, ref.shape[2] - 1) for ref in scale_refs[:1] for x in range(copies)]
                return tuple(tuple(ref[b, head, x] for x in at) for ref in scale_refs[:2])

            def token_factors(which, b, head, j):
                """What each key or value of tile j is multiplied with; called early, since reading takes long."""
                at = scale_refs[which].at[b, head, pl.ds(j * TILE, TILE)]
                return plgpu.load(at, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

            def columns(factors):
                """One number for all keys of a tile, or one for each column."""
                if of_tokens:
                    return lax.broadcast_in_dim(factors, (ROWS, TILE), [1])
                if copies == 1:
                    return factors[0]
                column = iota((ROWS, TILE), 1)
                result = plgpu.layout_cast(jnp.full((ROWS, TILE), factors[-1]), plgpu.Layout.WGMMA)
                for x in reversed(range(copies - 1)):
                    result = jnp.where(column < (x + 1) * page, factors[x], result)
                return result

            def one_part(i, done):
                b, item, length, lo, hi = part(i)
                head = lax.div(item, jnp.int32(blocks))
                q = q_smem.at[pair]
                plgpu.copy_gmem_to_smem(q_ref.at[b, item], q.at[pl.ds(0, rows)], q_barriers.at[pair])
                full_hi = jnp.clip(lax.div(jnp.maximum(length - T + 1, 0), jnp.int32(TILE)), lo, hi)
                full_lo = lo
                if options.window is not None:
                    seen_by_all = jnp.maximum(length - options.window, 0)
                    full_lo = jnp.clip(lax.div(seen_by_all + TILE - 1, jnp.int32(TILE)), lo, full_hi)

                def softmax(s, m, l, scale, j, masked):
                    if quantized:
                        s = s * columns(scale)
                    if options.soft_cap is not None:
                        ratio = options.soft_cap / options.scale
                        s = jnp.tanh(s * (1 / ratio)) * ratio
                    if masked:
                        s = jnp.where(keep(length, item, j), s, -jnp.inf)
                    m_new = jnp.maximum(m, s.max(axis=1) * c)
                    shift = jnp.where(m_new == -jnp.inf, 0.0, m_new) if masked else m_new
                    alpha = jnp.exp2(m - shift)
                    p = jnp.exp2(s * c - lax.broadcast_in_dim(shift, s.shape, [0]))
                    return p, m_new, l * alpha + p.sum(axis=1), lax.broadcast_in_dim(alpha, (ROWS, Hv), [0])

                def owned(values, j):
                    """Zeros past a sequence's end, where nan may stand, which 0 * nan would pass on."""
                    return jnp.where(iota(values.shape, 0) + j * TILE < length, values, jnp.zeros((), dtype))

                def step(j, carry, masked):
                    acc, m, l = carry
                    slot = lax.rem(done + j - lo, jnp.int32(stages))
                    k, v = k_smem.at[pair, slot], v_smem.at[pair, slot]
                    plgpu.barrier_wait(k_full.at[pair, slot])

                    def qk(s_ref):
                        plgpu.wgmma(s_ref, q, k.transpose((1, 0)))
                        return s_ref[...]

                    s = pl.run_scoped(qk, plgpu.ACC((ROWS, TILE), jnp.float32))
                    plgpu.barrier_arrive(k_free.at[pair, slot])
                    p, m, l, alpha = softmax(s, m, l, None, j, masked)
                    plgpu.barrier_wait(v_full.at[pair, slot])
                    if masked:
                        v[...] = owned(plgpu.load(v, layout=plgpu.Layout.WGMMA), j)
                        plgpu.commit_smem()
                    acc = mma(acc * alpha, p.astype(dtype), v)
                    plgpu.barrier_arrive(v_free.at[pair, slot])
                    return acc, m, l

                def widen(full, free, narrow, target, j, masked=False):
                    """Tile j of 8 bits to where wgmma reads it, in 16; its slot is free at once."""
                    slot = lax.rem(done + j - lo, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[pair, slot])
                    values = _widen(narrow.at[pair, slot], dtype)
                    target[...] = owned(values, j) if masked else values
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(free.at[pair, slot])

                def widening_step(j, carry, masked):
                    """V is widened under QK, the next K under PV; this K was, under the PV before."""
                    acc, m, l, scales = carry
                    following = factors(b, head, j + 1)  # read a tile ahead: nothing waits for it
                    of_keys = token_factors(0, b, head, j) if of_tokens else scales[0]

                    def products(s_ref, *acc_ref):
                        plgpu.wgmma(s_ref, q, wide_k.transpose((1, 0)))
                        widen(v_full, v_free, v_smem, wide_v, j, masked)
                        s = plgpu.wgmma_accumulator_load(s_ref)
                        of_values = token_factors(1, b, head, j) if of_tokens else scales[1]
                        p, m_new, l_new, alpha = softmax(s, m, l, of_keys, j, masked)
                        p = (p * columns(of_values)).astype(dtype)
                        new_acc = mma(acc * alpha, p, wide_v, *acc_ref)
                        pl.when(j + 1 < hi)(lambda: widen(k_full, k_free, k_smem, wide_k, j + 1))
                        return acc_ref[0][...] if acc_ref else new_acc, m_new, l_new

                    accs = [] if _dispatch.interpreted("gpu") else [plgpu.ACC((ROWS, Hv), jnp.float32)]
                    block = plgpu.ACC((ROWS, TILE), jnp.float32)
                    return *pl.run_scoped(products, block, *accs), following

                zero = lambda layout, shape, x: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
                carry = (
                    zero(plgpu.Layout.WGMMA, (ROWS, Hv), 0.0),
                    zero(reduced, (ROWS,), -math.inf),
                    zero(reduced, (ROWS,), 0.0),
                )
                plgpu.barrier_wait(q_barriers.at[pair])
                run = step
                if quantized:
                    run, carry = widening_step, (*carry, factors(b, head, lo))
                    wide_k, wide_v = (wide.at[pair, pl.ds(x, TILE)] for x in (0, TILE))
                    pl.when(lo < hi)(lambda: widen(k_full, k_free, k_smem, wide_k, lo))
                if options.window is not None:
                    carry = lax.fori_loop(lo, full_lo, functools.partial(run, masked=True), carry)
                carry = lax.fori_loop(full_lo, full_hi, functools.partial(run, masked=False), carry)
                acc, m, l, *_ = lax.fori_loop(full_hi, hi, functools.partial(run, masked=True), carry)

                seen = l > 0.0
                inverse = jnp.where(seen, 1.0 / jnp.where(seen, l, 1.0), 0.0)
                if quantized:
                    inverse = inverse * scale_refs[2][b, head]
                    # The last wgmma of every warp must have read what o overwrites.
                    plgpu.commit_smem()
                o_smem.at[pair][...] = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
                lse_smem.at[pair][...] = jnp.where(seen, m + jnp.log2(jnp.where(seen, l, 1.0)), -jnp.inf)
                plgpu.commit_smem()
                number = (i + group) * lanes + lane
                plgpu.copy_smem_to_gmem(o_smem.at[pair, pl.ds(0, rows)], o_ref.at[number])
                plgpu.copy_smem_to_gmem(lse_smem.at[pair, pl.ds(0, rows)], lse_ref.at[number])
                plgpu.wait_smem_to_gmem(0)
                return done + hi - lo

            lax.fori_loop(first, last, one_part, jnp.int32(0))

        @pl.when(wg >= pairs)
        def _feed():
            _set_registers(pairs, 40)

            def one_part(i, done):
                b, item, length, lo, hi = part(i)
                head = lax.div(item, jnp.int32(blocks))
                last_page = lax.div(jnp.maximum(length - 1, 0), jnp.int32(page))

                def pages(j):
                    at = lax.div(j * TILE, jnp.int32(page))
                    return tuple(table_ref[b, jnp.minimum(at + x, last_page)] + 0 for x in range(copies))

                def step(j, indices):
                    at = done + j - lo
                    slot = lax.rem(at, jnp.int32(stages))
                    following = pages(j + 1)  # read while this step waits
                    size = TILE // copies
                    within = pl.ds(pl.multiple_of(lax.rem(j * TILE, jnp.int32(page)), size), size)
                    for free, full, ref, buffer in ((k_free, k_full, k_ref, k_smem), (v_free, v_full, v_ref, v_smem)):
                        pl.when(at >= stages)(lambda free=free: plgpu.barrier_wait(free.at[pair, slot]))
                        for x, index in enumerate(indices):
                            source = ref.at[index, within, head]
                            target = buffer.at[pair, slot, pl.ds(x * size, size)]
                            plgpu.copy_gmem_to_smem(source, target, full.at[pair, slot])
                    return following

                lax.fori_loop(lo, hi, step, pages(lo))
                return done + hi - lo

            done = lax.fori_loop(first, last, one_part, jnp.int32(0))
            for x in range(stages):  # the last tiles' slots: no barrier may be left with an arrival that nobody saw
                at = done + x
                slot = lax.rem(at, jnp.int32(stages))
                for free in (k_free, v_free):
                    pl.when(at >= stages)(lambda free=free, slot=slot: plgpu.barrier_wait(free.at[pair, slot]))

    count = (B * turns + groups) * lanes + -(-ROWS // rows)  # the merge reads 64 rows at a time
    leaving = tiled((pairs, ROWS, Hv), jnp.float32)
    if quantized:  # what leaves at the end of a part lies where keys and values were widened
        # A worker's share of both is equally large and starts at the same place, so workers do not meet.
        assert ROWS * Hv * 4 == 2 * TILE * H * 2
        leaving = plgpu.RefUnion(leaving, tiled((pairs, 2 * TILE, H), dtype))
    smem = (
        tiled((pairs, ROWS, H), dtype),
        tiled((pairs, stages, TILE, H), pages_dtype),
        tiled((pairs, stages, TILE, Hv), pages_dtype),
        leaving,
        plgpu.SMEM((pairs, ROWS), jnp.float32),
    )
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=(pairs, stages))
    free = plgpu.Barrier(num_barriers=(pairs, stages))
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((count, rows, Hv), jnp.float32),
            jax.ShapeDtypeStruct((count, rows), jnp.float32),
        ],
        scratch_types=(smem, plgpu.Barrier(num_barriers=pairs), full, full, free, free),
        grid=(config.blocks,),
        grid_names=("block",),
        num_threads=2 * pairs,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="decode_attention",
    )(q, inputs.k_pages, inputs.v_pages, inputs.page_table, *schedule, *scales)


def _merge(parts, lse, sinks, schedule: Schedule, lanes: int, shape: tuple[int, ...], dtype) -> jax.Array:
    """The parts of each item, weighted by their logsumexp: [B, items, rows, Hv].

    The parts of items that ran side by side lie side by side: a block takes up to 64 rows of several items, and 64
    columns. It reads 64 rows in any case; there are that many behind the last part.
    """
    B, items = shape
    _, rows, Hv = parts.shape
    turns, tall = items // lanes, lanes * rows
    height = max(x for x in range(8, ROWS + 1, 8) if tall % x == 0)
    given = sinks is not None
    sinks = [sinks] if given else []
    flat = parts.reshape(-1, Hv), lse.reshape(-1)

    def kernel(parts_ref, lse_ref, sequences_ref, chunk_ref, *refs):
        sink_refs, (out_ref, out_smem) = refs[:-2], refs[-2:]
        item, row = lax.axis_index("item"), lax.axis_index("rows") * height
        columns = pl.ds(lax.axis_index("columns") * _WIDTH, _WIDTH)
        b, turn = lax.div(item, jnp.int32(turns)), lax.rem(item, jnp.int32(turns))
        chunk, tiles = chunk_ref[0] + 0, sequences_ref[b, 2] + 0
        begin = sequences_ref[b, 3] + turn * tiles
        start = lax.div(begin, chunk)
        stop = jnp.where(tiles > 0, lax.div(begin + tiles + chunk - 1, chunk), start)
        reduced = plgpu.Layout.WGMMA.reduce(1)
        load = functools.partial(plgpu.load, optimized=False)
        across = lambda x: lax.broadcast_in_dim(x, (ROWS, _WIDTH), [0])

        def step(i, carry):
            """Several parts at a time, for their reads take long; beyond the last one it again, without weight."""
            acc, m, l = carry
            values, weights = [], []
            for x in range(_UNROLL):
                group = start + i * _UNROLL + x
                at = pl.ds((item + jnp.minimum(group, stop - 1)) * tall + row, ROWS)
                values.append(load(parts_ref.at[at, columns], layout=plgpu.Layout.WGMMA))
                weight = load(lse_ref.at[at], layout=reduced)
                weights.append(weight + jnp.where(group < stop, 0.0, -jnp.inf))
            m_new = functools.reduce(jnp.maximum, weights, m)
            shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
            alpha = jnp.exp2(m - shift)
            acc, l = acc * across(alpha), l * alpha
            for value, weight in zip(values, weights, strict=True):
                weight = jnp.exp2(weight - shift)
                acc, l = acc + value * across(weight), l + weight
            return acc, m_new, l

        zero = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.float32), reduced)
        m, l = zero(-math.inf), zero(0.0)
        if given:
            m = load(sink_refs[0].at[pl.ds(turn * tall + row, ROWS)], layout=reduced) * LOG2E
            l = jnp.where(m == -jnp.inf, 0.0, 1.0)
        acc = plgpu.layout_cast(jnp.full((ROWS, _WIDTH), 0.0, jnp.float32), plgpu.Layout.WGMMA)
        steps = lax.div(stop - start + _UNROLL - 1, jnp.int32(_UNROLL))
        acc, _, l = lax.fori_loop(0, steps, step, (acc, m, l))
        seen = l > 0.0
        inverse = jnp.where(seen, 1.0 / jnp.where(seen, l, 1.0), 0.0)
        out_smem[...] = (acc * across(inverse)).astype(dtype)
        plgpu.commit_smem()
        target = out_ref.at[pl.ds(pl.multiple_of(item * tall + row, 8), height), columns]
        plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, height)], target)
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B * items * rows, Hv), dtype),
        scratch_types=(tiled((ROWS, _WIDTH), dtype),),
        grid=(B * turns, tall // height, Hv // _WIDTH),
        grid_names=("item", "rows", "columns"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="decode_attention_merge",
    )(*flat, schedule.sequences, schedule.chunk, *sinks)
    return out.reshape(B, items, rows, Hv)


# Pieces.


def _sink_rows(inputs: Inputs, T: int, blocks: int, rows: int) -> jax.Array | None:
    """The sink of each row of all items of a sequence, and 64 more."""
    if inputs.sinks is None:
        return None
    K = inputs.k_pages.shape[2]
    sinks = jnp.tile(inputs.sinks.astype(jnp.float32).reshape(K, 1, -1), (1, T, 1)).reshape(K, -1)
    sinks = jnp.pad(sinks, ((0, 0), (0, blocks * rows - sinks.shape[1])))
    return jnp.pad(sinks.reshape(-1), (0, ROWS))


def _of_tokens(inputs: Inputs) -> bool:
    return any(x is not None and x.ndim == 3 for x in (inputs.k_scales, inputs.v_scales))


def _scales(inputs: Inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scales of each sequence's pages, [B, K, M], or tokens, [B, K, S]; those of v relative to their largest, and
    that one, [B, K].

    Probabilities are multiplied with the scales of v: relative ones keep them in the range of float16.
    """
    _, M = inputs.page_table.shape
    P, page, K, _ = inputs.k_pages.shape
    of_tokens = _of_tokens(inputs)
    count, step = (M * page, 1) if of_tokens else (M, page)
    used = jnp.arange(count, dtype=jnp.int32)[None] * step < bounded_lengths(inputs)[:, None]

    def in_order(scales):
        scales = jnp.ones((P, K), jnp.float32) if scales is None else scales
        if of_tokens:
            scales = scales_of_tokens(scales, inputs.page_table, page).swapaxes(1, 2)
        else:
            scales = scales.at[inputs.page_table].get(mode="clip").swapaxes(1, 2)
        scales = jnp.where(used[:, None], scales, 0.0)  # what stands behind a sequence's end may be nan
        return jnp.pad(scales, ((0, 0), (0, 0), (0, -count % TILE if of_tokens else 0)))  # whole tiles are read

    v = in_order(inputs.v_scales)
    largest = jnp.max(jnp.abs(v), axis=2)
    largest = jnp.where(largest > 0, largest, 1.0)
    return in_order(inputs.k_scales), v / largest[:, :, None], largest


def _widen(ref, dtype) -> jax.Array:
    """Numbers of 8 bits in shared memory as 16 bits in registers."""
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    x = plgpu.layout_cast(x, plgpu.Layout.WGMMA)
    return x.astype(dtype)


def _set_registers(pairs: int, count: int) -> None:
    """Registers go from the warpgroups that feed to those that compute; one pair starts with all it can use."""
    if pairs > 1:
        plgpu.set_max_registers(count, action="increase" if count > 128 else "decrease")
