"""Rings: ring, bidirectional with keys on their way, halo, and usp's outer ring. Ulysses is the ring of one place.

Transfers of a step are issued before its attention and used after it. In the backward pass the own block is done in two
halves: the first hides the first transfer, the second hides the last one, which brings dK and dV home. Few steps are
written out; more become one scan, whose body holds a transfer beside the attention that hides it, so that the program
does not grow with cp.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.context_blocks import (
    Call,
    Cotangent,
    Rows,
    add_block,
    block,
    block_bwd,
    block_grads,
    float32,
    place_of,
    shift,
)
from jaxscale.parallel.context_heads import Heads
from jaxscale.parallel.context_rows import PARTS, AllRows, PairOfRows, cut_rows, put_rows

_UNROLLED = 3  # steps of a ring that are written out; more become a scan


class _Lane(NamedTuple):
    """Blocks of keys that travel `steps` places in one direction. Of the last block only `tail` tokens are needed."""

    direction: int
    steps: int
    tail: int
    around: bool = True  # from the last place to the first one as well

    def cut(self, x: jax.Array) -> jax.Array:
        """[B, T, ...]: the tokens nearest to where the block is going."""
        return x[:, x.shape[1] - self.tail :] if self.direction > 0 else x[:, : self.tail]

    def pad(self, parts: Any, T: int) -> Any:
        """Gradients of such tokens as gradients of the whole block, float32."""

        def pad(x):
            gap = (T - x.shape[1], 0) if self.direction > 0 else (0, T - x.shape[1])
            x = x.astype(jnp.float32)
            return x if x.shape[1] == T else jnp.pad(x, ((0, 0), gap, (0, 0), (0, 0)))

        return jax.tree.map(pad, parts)


def _lanes(call: Call, T: int) -> list[_Lane]:
    """How far keys travel. T: tokens of a place."""
    places = call.size // call.group
    # In rows as they were, causal, nobody sees what comes around from the other end.
    lanes = [_Lane(1, places - 1, T, around=call.layout != "contiguous" or call.reach[1] != 0)]
    if call.strategy == "bidirectional":
        lanes = [_Lane(1, places // 2, T), _Lane(-1, (places - 1) // 2, T)]
    reach = [n for n in call.reach if n is not None]
    if call.strategy != "bidirectional" and call.layout == "contiguous" and len(reach) == 2:
        # A query at the edge of its block sees the key n tokens away: this many places.
        hops = [-(-n // T) for n in reach]
        if sum(hops) < places:
            tails = [n - (hop - 1) * T if call.strategy == "halo" else T for n, hop in zip(reach, hops)]
            lanes = [_Lane(d, hop, tail, around=False) for d, hop, tail in zip((1, -1), hops, tails)]
    return [lane for lane in lanes if lane.steps]


def _send(call: Call, held: dict[_Lane, Any], step) -> dict[_Lane, Any]:
    """What the lanes hold, one place further, for step `step`."""
    out = {}
    for lane, tree in held.items():
        last = isinstance(step, int) and step == lane.steps
        out[lane] = shift(call, jax.tree.map(lane.cut, tree) if last else tree, lane.direction, lane.around)
    return out


def _phases(lanes: list[_Lane], first: int) -> Iterator[Any]:
    """The steps from `first`: ints one by one, and at most one range (start, stop) that every lane takes and passes."""
    if not lanes:
        return
    both, last = min(lane.steps for lane in lanes), max(lane.steps for lane in lanes)
    step = first
    if both - first > _UNROLLED:
        yield first, both - 1  # the step before the last one may send less: not the scan's
        step = both - 1
    yield from range(step, last + 1)


def _run(step: Callable, s, carry, lanes: list[_Lane]):
    if isinstance(s, int):
        return step(s, carry, [lane for lane in lanes if lane.steps > s])
    return lax.scan(lambda carry, i: (step(i, carry, lanes), None), carry, jnp.arange(*s))[0]


def ring(call: Call, q, k, v, rows: PairOfRows):
    own, keys = rows.own(call, q, k, call.group), rows.keys(call, k, call.group)
    heads = Heads(call, q.shape[2], k.shape[2])
    q, k, v = heads.split_q(q), heads.split_kv(k), heads.split_kv(v)
    out, lse = _by_part(call, rows, keys, (k, v), functools.partial(_forward, call, q, k, v, own, keys))
    return heads.join_q(out), heads.join_q(lse)


def _forward(call: Call, q, k, v, own: tuple[Rows, Rows], keys: AllRows, part: "_Part | None" = None):
    """out in q's dtype and the logsumexp. own: rows of this place's queries and keys."""
    cut, others = (part.cut, part.keys) if part else (lambda tree: tree, keys)
    lanes = _lanes(call, others.length)
    queries, query_rows = cut((q, own[0]))

    def step(s, carry, sending):
        held, acc = carry
        coming = _send(call, {lane: held[lane] for lane in sending}, s + 1)
        for lane, kv in held.items():
            acc = add_block(call, acc, queries, kv, query_rows, _rows_of(call, others, lane, s, kv[0]))
        return coming, acc

    coming = part.coming if part else _send(call, dict.fromkeys(lanes, (k, v)), 1)
    out, lse = block(call, q, k, v, *own)
    if part:  # its tables of blocks wait: nothing keeps the host from starting the long kernel
        coming, query_rows, lse = lax.optimization_barrier((coming, query_rows, lse))
    carry = coming, cut((out, lse))
    for s in _phases(lanes, 1):
        carry = _run(step, s, carry, lanes)
    found = carry[1][0].astype(q.dtype), carry[1][1]
    return part.put((out.astype(q.dtype), lse), found) if part else found


def ring_bwd(call: Call, q, k, v, rows: PairOfRows, cotangent: Cotangent):
    own, keys = rows.own(call, q, k, call.group), rows.keys(call, k, call.group)
    heads = Heads(call, q.shape[2], k.shape[2])
    q, k, v = heads.split_q(q), heads.split_kv(k), heads.split_kv(v)
    cotangent = heads.split_cotangent(cotangent)

    def backward(part=None):
        dq, *dkv = _backward(call, q, k, v, own, keys, cotangent, part)
        dk, dv = (heads.join_kv(x, k.dtype).astype(k.dtype) for x in dkv)
        return heads.join_q(dq.astype(q.dtype)), dk, dv

    return _by_part(call, rows, keys, (k, v), backward)


def _backward(call: Call, q, k, v, own: tuple[Rows, Rows], keys: AllRows, cotangent: Cotangent, part: "_Part | None"):
    """dq, dk, dv: float32, or where only a part travels in the dtype of what they belong to."""
    T = q.shape[1]
    cut, others = (part.cut, part.keys) if part else (lambda tree: tree, keys)
    lanes = _lanes(call, others.length)
    queries, query_rows, query_cotangent = cut((q, own[0], cotangent))

    def own_block(half: slice):
        rows, cot = (jax.tree.map(lambda x: x[:, half], x) for x in (own[0], cotangent))
        return block_bwd(call, q[:, half], k, v, rows, own[1], cot)

    def step(s, carry, sending):
        held, sums, dq = carry
        coming = _send(call, {lane: held[lane] for lane in sending}, s + 1)
        moved = {lane: shift(call, sums[lane], lane.direction) for lane in held if lane in sums}
        for lane, kv in held.items():
            kv_rows = _rows_of(call, others, lane, s, kv[0])
            dq, dkv = block_grads(call, dq, queries, kv, query_rows, kv_rows, query_cotangent)
            if lane in moved:
                moved[lane] = jax.tree.map(jnp.add, moved[lane], lane.pad(dkv, others.length))
            else:  # the only part goes home as the kernel returned it; a sum of parts is kept in float32
                moved[lane] = dkv if lane.steps == 1 else float32(dkv)
        return coming, sums | moved, dq

    coming = part.coming if part else _send(call, dict.fromkeys(lanes, (k, v)), 1)
    hidden = bool(lanes) and part is None and T > 1  # long transfers, each to be hidden behind half of the own block
    halves = [slice(0, T // 2), slice(T // 2, T)] if hidden else [slice(0, T)]
    first = list(own_block(halves[0]))
    if hidden:  # the barriers keep the scheduler from doing both halves beside one of the two transfers
        coming, first = lax.optimization_barrier((coming, first))
    elif part:  # dQ first, home behind dK and dV
        coming, first[0] = lax.optimization_barrier((coming, first[0]))
    carry = coming, {}, jnp.zeros_like(queries, dtype=jnp.float32)
    for s in [1, *_phases(lanes, 2)] if lanes else []:
        carry = _run(step, s, carry, lanes)
    _, sums, dq_others = carry
    if hidden:
        k, v, sums, dq_others = lax.optimization_barrier((k, v, sums, dq_others))
    home = {lane: shift(call, x, -lane.direction * lane.steps) for lane, x in sums.items()}
    blocks = [first, *(own_block(half) for half in halves[1:])]
    dq, dk, dv = float32(first if part is None else part.cut(first))
    for other in blocks[1:]:
        others_dq, *others_dkv = float32(other)
        dq, (dk, dv) = jnp.concatenate([dq, others_dq], axis=1), jax.tree.map(jnp.add, (dk, dv), tuple(others_dkv))
    for lane, x in home.items():
        dk, dv = jax.tree.map(jnp.add, (dk, dv), lane.pad(x, others.length))
    found = dq + dq_others, dk, dv
    return found if part is None else part.put(first, found)


class _Part:
    """A few tokens of each place that hold all those of documents which several places hold. Only they travel, and see
    what comes. The first transfer is issued here: before the branch, at which a GPU waits for its host."""

    def __init__(self, call: Call, keys: AllRows, starts: jax.Array, kv):
        self.length = keys.length // PARTS
        self.keys = keys.cut(starts, self.length)
        self.starts = lax.dynamic_index_in_dim(starts, place_of(call), keepdims=False)
        self.coming = _send(call, dict.fromkeys(_lanes(call, self.length), self.cut(kv)), 1)

    def cut(self, tree):
        return jax.tree.map(lambda x: cut_rows(x, self.starts, self.length), tree)

    def put(self, whole, parts):
        return jax.tree.map(lambda x, part: put_rows(x, part, self.starts), tuple(whole), tuple(parts))


def _by_part(call: Call, rows: PairOfRows, keys: AllRows, kv, run: Callable):
    """`run`, with a small part of the tokens as its `part` where these are all that has to travel.

    A packed layout leaves most documents whole (`context_layout`). All devices know the rows of all, so they take the
    same way.
    """
    if rows.part is None:
        return run()
    part = _Part(call, keys, rows.part.starts, kv)
    return lax.cond(rows.part.enough, lambda: run(part), run)


def _rows_of(call: Call, keys: AllRows, lane: _Lane, step, k) -> Rows:
    """Those of the block that the lane brings at a step."""
    rows = keys.at((place_of(call) - lane.direction * step) % (call.size // call.group))
    return jax.tree.map(lane.cut, rows) if k.shape[1] < keys.length else rows
