"""TokenRing (arXiv 2412.20501): queries travel, keys stay. Each part goes straight back to where its queries live."""

import functools

import jax
import jax.numpy as jnp

from jaxscale.parallel.context_blocks import (
    Call,
    Cotangent,
    block,
    block_grads,
    float32,
    if_seen,
    merge,
    place_of,
    shift,
)
from jaxscale.parallel.context_ring import ring, ring_bwd
from jaxscale.parallel.context_rows import PairOfRows


def queries_travel(q, k, v) -> bool:
    """Whether moving queries loads the busier direction of the links less, both passes together."""
    (N, H), (K, Hv) = q.shape[2:], v.shape[2:]
    size, float32 = q.dtype.itemsize, 4
    queries = max(size * N * (2 * H + Hv), N * (size * Hv + float32 * H))  # q, q, dout; back: out, dq
    keys = (2 * size + float32) * K * (H + Hv) / 2  # k and v in both passes, dk and dv; half of it each way
    return queries <= keys


def bidirectional(call: Call, q, k, v, rows: PairOfRows):
    if not queries_travel(q, k, v):
        return ring(call, q, k, v, rows)
    queries, own = rows.all_queries(call, q), rows.keys(call, k, 1).at(place_of(call))
    place = place_of(call)
    acc, coming = None, q
    for s in range(call.size):
        here = coming
        coming = shift(call, here, 1) if s + 1 < call.size else here
        there = queries.at((place - s) % call.size)
        zero = jnp.zeros_like(here[..., 0], dtype=jnp.float32)
        nothing = jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[3])), zero - jnp.inf
        compute = functools.partial(block, call, here, k, v, there, own)
        out, lse = if_seen(
            call, (there, own), lambda nothing, compute=compute: compute(), lambda nothing: nothing, nothing
        )
        part = float32(shift(call, (out.astype(q.dtype), lse), -s))
        acc = part if acc is None else merge(acc, part)
    return acc


def bidirectional_bwd(call: Call, q, k, v, rows: PairOfRows, cotangent: Cotangent):
    if not queries_travel(q, k, v):
        return ring_bwd(call, q, k, v, rows, cotangent)
    queries, own = rows.all_queries(call, q), rows.keys(call, k, 1).at(place_of(call))
    place = place_of(call)
    dq, dk, dv = (jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    coming = q, cotangent
    for s in range(call.size):
        here, cot = coming
        coming = shift(call, (here, cot), 1) if s + 1 < call.size else (here, cot)
        there = queries.at((place - s) % call.size)
        part, (dk_part, dv_part) = block_grads(call, jnp.zeros_like(dq), here, (k, v), there, own, cot)
        dq, dk, dv = jax.tree.map(jnp.add, (dq, dk, dv), float32((shift(call, part, -s), dk_part, dv_part)))
    return dq, dk, dv
