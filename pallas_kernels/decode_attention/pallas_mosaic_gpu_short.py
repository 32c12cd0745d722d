"""Decode attention to caches of few tokens in one kernel. Hopper GPUs (sm90), Pallas Mosaic GPU.

A block has one kv head of one sequence: its warpgroups take the tiles of keys in turn, each with a softmax of its own,
and add up through shared memory. Where that leaves multiprocessors idle, a cluster of blocks shares the tiles and adds
up in the shared memory of the first. No second kernel merges parts (3 to 4 us of an 8B model's layer) and no schedule
is read before the first page is asked for. What a long sequence costs is not shared with other clusters: `fits` says
where that is no loss.

`attend_new_token` takes queries, keys and values as a matmul leaves them. The first warpgroup rotates them and writes
the cache while tiles are on their way, and its softmax begins with the new token, which is not read back.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu.fragmented_array import TiledLayout, Tiling
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.mosaic_gpu_pieces import LOG2E, ROWS, mma, tiled
from pallas_kernels.decode_attention.inputs import Inputs, Options, bounded_lengths
from pallas_kernels.decode_attention.mosaic_gpu_pieces import SM_COUNT, TILE, iota

_MOST = 2048  # tokens that the page table can hold: with more, sequences are cut
_WIDTH = 32  # columns of the layout of few rows

# [8, 32] numbers in a warpgroup, two neighbours in a thread: all of them are of use with 8 rows, where an accumulator's
# layout has 64. A cluster's stores take no more than 8 bytes.
_few = Tiling(((8, _WIDTH), (2, _WIDTH), (1, 2)))
_few = TiledLayout(_few, (-6,), (-4, -3), -1, _check_canonical=False).canonicalize()
FEW: Any = plgpu.Layout.TILED(_few.tiling, _few.warp_dims, _few.lane_dims, _few.vector_dim)


@dataclasses.dataclass(frozen=True)
class Config:
    workers: int = 2  # warpgroups that share the keys of a block
    stages: int = 2  # tiles in flight for each
    parts: int = 1  # blocks of a cluster, which share the keys of a head; the interpreter has no such stores


def tuned(heads: int, tall: int, tokens: int) -> Config:
    """For so many kv heads of all sequences, each with `tall` rows of queries and slots for so many tokens."""
    parts = 1
    while 2 * parts <= min(ROWS // tall, tokens // TILE, SM_COUNT // heads) and not _dispatch.interpreted("gpu"):
        parts *= 2
    return Config(parts=parts) if parts == 1 else Config(workers=1, parts=parts)


def fits(inputs: Inputs) -> bool:
    """Whether this kernel is the faster one: for pages in q's dtype, short tables, and multiprocessors that are not
    left idle by the last blocks."""
    B, T, N, H = inputs.q.shape
    page, K, Hv = inputs.v_pages.shape[1:]
    if inputs.k_pages.dtype != inputs.q.dtype or H not in (64, 128) or Hv != H or T * N // K > ROWS:
        return False
    waves = -(-B * K // SM_COUNT)
    return inputs.page_table.shape[1] * page <= _MOST and (waves == 1 or 3 * waves * SM_COUNT <= 4 * B * K)


def unfit_new_token(cache: jax.Array, heads: int) -> str | None:
    """None, or the reason why `attend_new_token` does not run, or would be slower, with a cache [L, B, S, K, H]."""
    L, B, S, K, H = cache.shape
    new: Any = lambda *shape, dtype=cache.dtype: jax.ShapeDtypeStruct(shape, dtype)
    pages, ints = new(L * B, S, K, H), (new(B, 1, dtype=jnp.int32), new(B, dtype=jnp.int32))
    if cache.dtype != jnp.bfloat16 or S % TILE or not fits(Inputs(new(B, 1, heads, H), pages, pages, *ints)):
        return f"takes short caches in bfloat16, of a multiple of {TILE} slots, head_dim 64, 128. Got {cache}"
    if -(heads // K) % 8 > 2 * K:
        return f"reads queries of 8 heads at a time. Got {heads} of queries, {K} of keys"
    return None


def decode_attention_short(inputs: Inputs, options: Options, config: Config | None = None) -> jax.Array:
    """[B, T, N, Hv] in q's dtype."""
    B, T, N, H = inputs.q.shape
    queries = _Given(inputs)
    pages = inputs.k_pages, inputs.v_pages
    config = config or tuned(B * queries.K, queries.tall, inputs.page_table.shape[1] * queries.page)
    out = _attend(queries, *pages, options, config)
    return out.reshape(B, -1, T, queries.G, H).swapaxes(1, 2).reshape(B, T, N, H)


def attend_new_token(
    parts, k_cache, v_cache, index, positions, cos, sin, options: Options, config: Config | None = None
):
    """Attention [B, N, H] and both caches, [L, B, S, K, H]; see decode_layer/api.py."""
    L, B, S, K, H = k_cache.shape
    queries = _New(parts, index, positions, cos, sin, k_cache)
    # A row of a layer is a page.
    k_pages, v_pages = (jax.new_ref(x.reshape(L * B, S, K, H)) for x in (k_cache, v_cache))
    out = _attend(queries, k_pages, v_pages, options, config or tuned(B * K, queries.tall, S))
    caches = (jax.freeze(x).reshape(k_cache.shape) for x in (k_pages, v_pages))
    return out.reshape(B, -1, H), *caches


class _Given:
    """Queries that are ready, and a page table."""

    def __init__(self, inputs: Inputs):
        self.B, self.T, N, self.H = inputs.q.shape
        self.page, self.K = inputs.k_pages.shape[1:3]
        self.G, self.dtype = N // self.K, inputs.q.dtype
        self.rows, self.tall = _rows(self.T * self.G)
        self.copies = max(1, TILE // self.page)  # pages in a tile
        self.single = inputs.page_table.shape[1] == self.copies == 1
        q = inputs.q.reshape(self.B, self.T, self.K, self.G, self.H).swapaxes(1, 2)  # token by token
        q = q.reshape(self.B, self.K, self.rows, self.H)
        if _dispatch.interpreted("gpu"):  # else TMA's, which fills up with zeros
            q = jnp.pad(q, ((0, 0), (0, 0), (0, self.tall - self.rows), (0, 0)))
        self.operands = [q, inputs.page_table, bounded_lengths(inputs)]
        self.counts_from = inputs.first_page is not None
        if inputs.first_page is not None:
            self.operands.append(inputs.first_page.reshape(1))
        self.sinks = inputs.sinks is not None
        if inputs.sinks is not None:
            sinks = jnp.tile(inputs.sinks.astype(jnp.float32).reshape(self.K, 1, self.G), (1, self.T, 1))
            self.operands.append(jnp.pad(sinks.reshape(self.K, self.rows), ((0, 0), (0, ROWS - self.rows))))

    def open(self, refs, b, head):
        """The first query's position, how many keys the cache holds, and a token's pages from its own on."""
        _, table_ref, lengths_ref, *refs = refs
        # Reads that nothing waits for until all are on their way.
        begin = refs[0][0] + 0 if self.counts_from else jnp.int32(0)
        only = table_ref[b, 0] + begin if self.single else None
        length = lengths_ref[b] + 0

        def pages(token):
            if only is not None:
                return [only]
            at, last = (lax.div(x, jnp.int32(self.page)) for x in (token, jnp.maximum(length - 1, 0)))
            return [table_ref[b, jnp.minimum(at + x, last)] + begin for x in range(self.copies)]

        return length - self.T, length, pages

    def copy(self, refs, b, head, q_smem, full):
        everything = pl.ds(lax.axis_index("wg") * 0, self.tall)  # `tall` rows of which there may be fewer
        plgpu.copy_gmem_to_smem(refs[0].at[b, head, everything], q_smem.at[pl.ds(0, self.tall)], full)

    def sink(self, refs, head, layout, counts) -> Any:
        """The sinks' logits, which one block of a cluster counts, or None."""
        if not self.sinks:
            return None
        sink = plgpu.load(refs[-1].at[head], layout=layout, optimized=False) * LOG2E
        return jnp.where(jnp.broadcast_to(counts, sink.shape), sink, -jnp.inf)


class _New:
    """Queries, keys and values of one new token in a matmul's parts, to be rotated and written to the cache."""

    T, copies = 1, 1

    def __init__(self, parts, index, positions, cos, sin, cache):
        _, self.B, self.page, self.K, self.H = cache.shape
        self.N, self.dtype = parts.shape[2] - 2 * self.K, cache.dtype
        self.G = self.N // self.K
        self.rows, self.tall = _rows(self.G)
        self.operands = [parts, index.reshape(1), positions, cos, sin]

    def open(self, refs, b, head):
        page, slot = refs[1][0] * self.B + b, refs[2][b] + 0
        return jnp.clip(slot, -1, self.page - 1), jnp.clip(slot, 0, self.page), lambda token: [page]

    def inside(self, refs, b):
        """Whether the cache has a slot for the new token: else nothing is written, and only the cache is seen."""
        slot = refs[2][b]
        return (slot >= 0) & (slot < self.page)

    def prepare(self, refs, b, head, caches, q_smem, few_smem, logit_smem, value_smem, first):
        """Queries and the new token's logits and value to shared memory; if first, key and value to the cache."""
        parts_ref, index_ref, positions_ref, cos_ref, sin_ref = refs
        halves = pl.ds(0, self.H // 2), pl.ds(self.H // 2, self.H // 2)
        row = FEW.reduce(0)
        load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)
        cos, sin = (load(ref.at[b], row) for ref in (cos_ref, sin_ref))
        across = lambda x: lax.broadcast_in_dim(x, (self.tall, self.H // 2), [1])

        def total(heads, where, layout):
            """Rounded as a matmul's output is."""
            y = load(parts_ref.at[0, b, heads, where], layout).astype(jnp.float32)
            for p in range(1, parts_ref.shape[0]):
                y += load(parts_ref.at[p, b, heads, where], layout).astype(jnp.float32)
            return y.astype(self.dtype).astype(jnp.float32)

        def rotated(heads, layout, cos, sin):
            y1, y2 = (total(heads, where, layout) for where in halves)
            return [y.astype(self.dtype) for y in (y1 * cos - y2 * sin, y2 * cos + y1 * sin)]

        # All loads come before the first store. Below the heads that share this key come others, up to a multiple of
        # 8: nobody reads what comes of them.
        q = rotated(pl.ds(head * self.G, self.tall), FEW, across(cos), across(sin))
        k = rotated(self.N + head, row, cos, sin)
        v = total(self.N + self.K + head, pl.ds(0, self.H), row).astype(self.dtype)
        for y, where in zip(q, halves):
            few_smem[:, where] = y
        q_smem[pl.ds(0, self.tall)] = load(few_smem, FEW)  # which cannot be written by halves of 64
        plgpu.commit_smem()
        wide = lambda x: x.astype(jnp.float32)
        logits = [(wide(x) * across(wide(y))).sum(axis=1) for x, y in zip(q, k)]
        logit_smem[pl.ds(0, self.tall)] = logits[0] + logits[1]
        value_smem[...] = v

        @pl.when(first & self.inside(refs, b))
        def _():
            k_ref, v_ref = (ref.at[index_ref[0] * self.B + b, positions_ref[b], head] for ref in caches)
            for y, where in zip(k, halves):
                k_ref.at[where][...] = y
            v_ref[...] = v

    def sink(self, refs, head, layout, counts) -> Any:
        return None


def _rows(count: int) -> tuple[int, int]:
    return count, -(-count // 8) * 8


def _attend(queries: _Given | _New, k_pages, v_pages, options: Options, config: Config) -> jax.Array:
    """[B, K, T * G, H] in the queries' dtype."""
    B, T, K, G, H, page = queries.B, queries.T, queries.K, queries.G, queries.H, queries.page
    rows, tall, dtype, copies = queries.rows, queries.tall, queries.dtype, queries.copies
    W, stages, parts = config.workers, config.stages, config.parts
    size = TILE // copies
    c = options.scale * LOG2E
    everyone = W * parts

    def kernel(*refs):
        count = len(queries.operands)
        (k_ref, v_ref, *given), refs = refs[: 2 + count], refs[2 + count :]
        out_ref, q_smem, k_smem, v_smem, sum_smem, state_smem, out_smem, new_smem, far, *barriers = refs
        q_full, k_full, v_full, k_free, v_free, done = barriers
        wg, block = lax.axis_index("wg"), lax.axis_index("block")
        part = lax.axis_index("part") if parts > 1 else jnp.int32(0)
        b, head = lax.div(block, jnp.int32(K)), lax.rem(block, jnp.int32(K))
        query, end, pages = queries.open(given, b, head)
        hi = lax.div(end + TILE - 1, jnp.int32(TILE))
        lo = jnp.int32(0)
        if options.window is not None:
            lo = lax.div(jnp.maximum(query + 1 - options.window, 0), jnp.int32(TILE))

        # The cluster's warpgroups take tiles in turn; the first block, which adds up, comes last.
        begin = lo + (parts - 1 - part) * W

        def turns(w, upto):
            """How many of the tiles of warpgroup w are below upto."""
            return lax.div(jnp.maximum(upto - begin - w + everyone - 1, 0), jnp.int32(everyone))

        @pl.when(wg < W)
        def _compute():
            _set_registers(W, True)
            reduced = plgpu.Layout.WGMMA.reduce(1)
            across = lambda x, width: lax.broadcast_in_dim(x, (ROWS, width), [0])
            load = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False)

            def keep(j):
                """Which keys of tile j each row sees."""
                key = iota((ROWS, TILE), 1) + j * TILE
                ahead = key - query
                if T > 1:
                    ahead -= lax.div(iota((ROWS, TILE), 0), jnp.full((ROWS, TILE), G, jnp.int32))
                see = ahead <= 0 if T > 1 else key < end
                return see if options.window is None else see & (ahead > -options.window)

            def capped(s):
                ratio = (options.soft_cap or 1.0) / options.scale
                return s if options.soft_cap is None else jnp.tanh(s * (1 / ratio)) * ratio

            def step(i, carry, masked):
                acc, m, l = carry
                j, slot = begin + wg + i * everyone, lax.rem(i, jnp.int32(stages))
                k, v = k_smem.at[wg, slot], v_smem.at[wg, slot]
                plgpu.barrier_wait(k_full.at[wg, slot])

                def qk(s_ref):
                    plgpu.wgmma(s_ref, q_smem, k.transpose((1, 0)))
                    return s_ref[...]

                s = pl.run_scoped(qk, plgpu.ACC((ROWS, TILE), jnp.float32))
                plgpu.barrier_arrive(k_free.at[wg, slot])
                s = capped(s)
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
                    owned = iota(values.shape, 0) + j * TILE < end
                    v[...] = jnp.where(owned, values, jnp.zeros((), dtype))
                    plgpu.commit_smem()
                acc = mma(acc * across(alpha, H), p.astype(dtype), v)
                plgpu.barrier_arrive(v_free.at[wg, slot])
                return acc, m_new, l

            fill = lambda layout, shape, x: plgpu.layout_cast(jnp.full(shape, x, jnp.float32), layout)
            carry = (
                fill(plgpu.Layout.WGMMA, (ROWS, H), 0.0),
                fill(reduced, (ROWS,), -math.inf),
                fill(reduced, (ROWS,), 0.0),
            )
            if isinstance(queries, _New):
                prepare, (few_smem, logit_smem, value_smem) = queries.prepare, new_smem
                first = (part == 0) & (wg == 0)

                @pl.when(wg == 0)
                def _():
                    prepare(given, b, head, (k_ref, v_ref), q_smem, few_smem, logit_smem, value_smem, part == 0)
                    plgpu.barrier_arrive(q_full)

                plgpu.barrier_wait(q_full)
                first &= queries.inside(given, b)
                value = load(value_smem, plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                new = (
                    lax.broadcast_in_dim(value, (ROWS, H), [1]),
                    capped(load(logit_smem, reduced)) * c,
                    jnp.ones_like(carry[2]),
                )
                carry = tuple(jnp.where(jnp.broadcast_to(first, x.shape), x, y) for x, y in zip(new, carry))
            else:
                plgpu.barrier_wait(q_full)
            seen_by_all = query + 1 if T > 1 else end
            full_hi = jnp.clip(lax.div(jnp.maximum(seen_by_all, 0), jnp.int32(TILE)), lo, hi)
            full_lo = lo
            if options.window is not None:
                seen_by_all = jnp.maximum(query + T - options.window, 0)
                full_lo = jnp.clip(lax.div(seen_by_all + TILE - 1, jnp.int32(TILE)), lo, full_hi)
                carry = lax.fori_loop(0, turns(wg, full_lo), lambda i, x: step(i, x, True), carry)
            carry = lax.fori_loop(turns(wg, full_lo), turns(wg, full_hi), lambda i, x: step(i, x, False), carry)
            acc, m, l = lax.fori_loop(turns(wg, full_hi), turns(wg, hi), lambda i, x: step(i, x, True), carry)

            def share(out, lse):
                """Adds up what the cluster's blocks have, in the first one's shared memory."""
                far_sum, far_lse, far_done = far
                few = pl.ds(0, tall)
                sum_smem[0], state_smem[0, 0] = out, lse
                wide = lambda x, width: lax.broadcast_in_dim(x, (tall, width), [0])
                lse = plgpu.layout_cast(wide(load(state_smem.at[0, 0, few], FEW.reduce(1)), _WIDTH), FEW)
                for x, there in ((load(sum_smem.at[0, few], FEW), far_sum), (lse, far_lse)):
                    plgpu.async_store_smem(x, there.at[part], far_done, cluster_idx=jnp.int32(0), cluster_dim="part")

                @pl.when(part == 0)
                def _():
                    plgpu.barrier_wait(far_done)
                    every = [load(far_lse.at[p], FEW).max(axis=1) for p in range(parts)]
                    top = functools.reduce(jnp.maximum, every)
                    shift = jnp.where(top == -jnp.inf, 0.0, top)
                    weights = [jnp.exp2(x - shift) for x in every]
                    total = sum(weights[1:], weights[0])
                    inverse = jnp.where(total > 0.0, 1.0 / jnp.where(total > 0.0, total, 1.0), 0.0)
                    out = [load(far_sum.at[p], FEW) * wide(w * inverse, H) for p, w in enumerate(weights)]
                    out_smem[...] = sum(out[1:], out[0]).astype(dtype)

            if W > 1:

                @pl.when(wg > 0)
                def _():
                    sum_smem[wg - 1] = acc
                    state_smem[0, wg - 1], state_smem[1, wg - 1] = m, l
                    plgpu.barrier_arrive(done)

            @pl.when(wg == 0)
            def _():
                others = []
                if W > 1:
                    plgpu.barrier_wait(done)
                    others = [[load(state_smem.at[x, w], reduced) for x in range(2)] for w in range(W - 1)]
                top = functools.reduce(jnp.maximum, [other for other, _ in others], m)
                sink = queries.sink(given, head, reduced, part == 0)
                if sink is not None:
                    top = jnp.maximum(top, sink)
                shift = jnp.where(top == -jnp.inf, 0.0, top)
                weight = jnp.exp2(m - shift)
                out, total = acc * across(weight, H), l * weight
                for w, (other, its) in enumerate(others):
                    weight = jnp.exp2(other - shift)
                    out += load(sum_smem.at[w], plgpu.Layout.WGMMA) * across(weight, H)
                    total += its * weight
                if sink is not None:
                    total += jnp.exp2(sink - shift)
                seen = total > 0.0
                inverse = jnp.where(seen, 1.0 / jnp.where(seen, total, 1.0), 0.0)
                out *= across(inverse, H)
                if parts == 1:
                    out_smem[...] = out.astype(dtype)
                else:
                    share(out, jnp.where(seen, top + jnp.log2(jnp.where(seen, total, 1.0)), -jnp.inf))

                @pl.when(part == 0)
                def _():
                    # TMA leaves out rows that there are not. (Slices of 4 rows make tiles that Mosaic swizzles wrong.)
                    everything = pl.ds(lax.axis_index("wg") * 0, tall)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, tall)], out_ref.at[b, head, everything])
                    plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == W)
        def _feed():
            _set_registers(W, False)
            if isinstance(queries, _Given):
                queries.copy(given, b, head, q_smem, q_full)

            @pl.loop(0, turns(0, hi))
            def _(i):
                slot = lax.rem(i, jnp.int32(stages))
                for w in range(W):

                    @pl.when(i < turns(w, hi))
                    def _(w=w):
                        token = (begin + w + i * everyone) * TILE
                        within = pl.ds(pl.multiple_of(lax.rem(token, jnp.int32(page)), size), size)
                        buffers = (k_free, k_full, k_ref, k_smem), (v_free, v_full, v_ref, v_smem)
                        indices = pages(token)
                        for free, full, ref, buffer in buffers:
                            pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[w, slot]))
                            for x, index in enumerate(indices):
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
    sums = max(W - 1, 1)
    new = ()
    if isinstance(queries, _New):
        new = plgpu.SMEM((tall, H), dtype), plgpu.SMEM((ROWS,), jnp.float32), plgpu.SMEM((H,), dtype)
    far = ()
    if parts > 1:
        far = [tiled((parts, tall, width), jnp.float32) for width in (H, _WIDTH)]
        far = *far, plgpu.Barrier(num_arrivals=2 * parts)
    high = tall if _dispatch.interpreted("gpu") else rows
    out = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, K, high, H), dtype),
        scratch_types=(
            tiled((ROWS, H), dtype),
            tiled((W, stages, TILE, H), dtype),
            tiled((W, stages, TILE, H), dtype),
            tiled((sums, ROWS, H), jnp.float32),
            plgpu.SMEM((2, sums, ROWS), jnp.float32),
            tiled((ROWS if parts == 1 else tall, H), dtype),
            new,
            far,
            plgpu.Barrier(),
            full,
            full,
            free,
            free,
            plgpu.Barrier(num_arrivals=sums),
        ),
        grid=(B * K,),
        grid_names=("block",),
        cluster=(parts,) if parts > 1 else (),
        cluster_names=("part",) if parts > 1 else (),
        num_threads=W + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=512),
        kernel_name="decode_attention_short",
    )(k_pages, v_pages, *queries.operands)
    return out[:, :, :rows]


def _set_registers(workers: int, computes: bool) -> None:
    """Registers go from the warpgroup that feeds to those that compute."""
    many = {2: (240, 24), 3: (160, 32)}.get(workers)
    if many:
        plgpu.set_max_registers(many[0 if computes else 1], action="increase" if computes else "decrease")
