"""Attention over a sequence that is split over devices (context parallelism), inside shard_map.

    out = jax.shard_map(partial(context.attention, strategy="ring", causal=True), out_specs=P(None, "cp"))(q, k, v)

Every strategy is a custom_vjp that keeps its own shards, the output and the logsumexp; the backward pass communicates
again instead of keeping what was gathered. A block of queries meets a block of keys in `pallas_kernels.attention`, and
blocks are merged by their logsumexps in float32.

- all_gather: K and V are gathered; their gradients are summed as they are scattered.
- ring: K and V go around, and in the backward pass float32 dK and dV follow one step behind (arXiv 2310.01889).
- bidirectional: both directions of the links work. Either K/V go around both ways, half as far, or, where this moves
  less, queries go one way and what they found comes back the other (TokenRing, arXiv 2412.20501).
- ulysses: heads are split instead of the sequence, by all-to-all (arXiv 2309.14509).
- usp: ulysses inside groups of neighbours, a ring across the groups (arXiv 2405.07719).
- halo: sliding windows; only those tokens of the neighbours travel that a window reaches.

Transfers of a step are issued before its attention and used after it. In the backward pass the own block is done in two
halves: the first hides the first transfer, the second hides the last one, which brings dK and dV home. Few steps are
written out; more become one scan, whose body holds a transfer beside the attention that hides it, so that the program
does not grow with cp.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels
from jaxscale.config import CPLayout, CPStrategy
from jaxscale.parallel import context_cost
from pallas_kernels.attention.inputs import nameable

type Pair = jax.Array | tuple[jax.Array, jax.Array]

_UNROLLED = 3  # steps of a ring that are written out; more become a scan


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str = "cp",
    strategy: CPStrategy | Literal["auto"] = "auto",
    layout: CPLayout = "contiguous",
    positions: Pair | None = None,
    segment_ids: Pair | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    ulysses_size: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Exact attention of this device's queries over the whole sequence; differentiable in q, k and v.

    The single-device twin is `pallas_kernels.attention` over the whole arrays.

    Args:
      q: [B, T, N, H], this device's T tokens of a sequence of T * cp.
      k, v: [B, T, K, H] and [B, T, K, Hv].
      axis_name: the mesh axis that the sequence is split over.
      strategy: "auto" takes the one that `context_cost.choose` expects to be fastest.
      layout: how `permute_batch` dealt the tokens over the devices.
      positions: int32 [B, T], or a pair for queries and keys. They may restart in each segment. By default a token's
        index in the sequence, which "packed" rows do not have. In a contiguous layout they must grow by one from token
        to token of a segment: this tells which devices a window reaches.
      segment_ids: int32 in the same forms; equal ids see each other, 0 is padding.
      causal, soft_cap, scale, implementation: as in `pallas_kernels.attention`.
      window: static, an int or a pair, as in `pallas_kernels.attention`.
      ulysses_size: usp's devices in a group; by default the most that divide the kv heads as well.
      return_lse: also return the logsumexp [B, T, N], float32; its cotangent is taken.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: sizes that do not fit, a strategy that cannot use this window or layout.
    """
    size = lax.axis_size(axis_name)
    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    if k.shape[1] != T or v.shape[1] != T:
        raise ValueError(f"context.attention: queries and keys are split alike. Got T={T}, S={k.shape[1]}")
    if N % K:
        raise ValueError(f"context.attention: {N} query heads are not divisible by {K} kv heads")
    if layout not in get_args(CPLayout):
        raise ValueError(f"context.attention: layout={layout!r} is not one of {get_args(CPLayout)}")
    if strategy != "auto" and strategy not in get_args(CPStrategy):
        raise ValueError(f"context.attention: strategy={strategy!r} is not 'auto' or one of {get_args(CPStrategy)}")
    if layout == "zigzag" and T % 2:
        raise ValueError(
            f"context.attention: a zigzag layout gives each of cp={size} devices two equal chunks, but T={T} tokens a "
            f"device is odd; make the sequence a multiple of {2 * size}"
        )
    if layout == "packed" and (positions is None or segment_ids is None):
        raise ValueError("context.attention: a packed layout needs positions and segment_ids; pass those of the batch")
    reach = _reach(window, causal)
    if strategy == "auto":
        shape = context_cost.Shape(
            batch=q.shape[0],
            seq_len=T * size,
            num_heads=N,
            num_kv_heads=K,
            head_dim=q.shape[3],
            itemsize=q.dtype.itemsize,
            causal=causal,
            window=reach[0],
            packed=segment_ids is not None,
        )
        strategy = context_cost.choose(shape, size, layouts=(layout,)).strategy
    if strategy == "halo" and (layout != "contiguous" or None in reach):
        raise ValueError(
            f"context.attention: halo needs a contiguous layout and a window that ends on both sides (or causal and a "
            f"left end). Got layout={layout!r}, window={window}, causal={causal}; use ring or all_gather"
        )
    group = 1
    if strategy in ("ulysses", "usp"):
        group = size if strategy == "ulysses" else ulysses_size or _ulysses_size(K, size)
        if size % group:
            raise ValueError(f"context.attention: ulysses_size={group} does not divide cp={size}")
        if group > N:
            raise ValueError(
                f"context.attention: ulysses splits {N} query heads over {group} devices, {group - N} of which would "
                f"have none; use ring, or usp with ulysses_size <= {N}"
            )
    if not causal and reach == (None, None):
        positions = None  # nothing compares them
    call = _Call(
        axis_name=axis_name,
        size=size,
        strategy=strategy,
        layout=layout,
        group=group,
        causal=causal,
        window=reach if window is not None else (None, None),
        reach=reach,
        soft_cap=soft_cap,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        implementation=implementation,
    )
    pairs: list[Any] = [x if isinstance(x, tuple | list) else (x, x) for x in (positions, segment_ids)]
    own, other = (Rows(*(x[i] for x in pairs)) for i in range(2))
    rows = _PairOfRows(own, None if all(x is y for x, y in pairs) else other)
    q, k, v, rows = _vary((q, k, v, rows), axis_name)
    out_and_lse: Any = _attention(call, q, k, v, rows)
    return out_and_lse if return_lse else out_and_lse[0]


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str = "cp",
    positions: tuple[jax.Array, jax.Array],
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
    causal: bool = True,
    window: Any = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of a few queries, which every device holds, over a cache whose slots are split over devices.

    Each device attends to its own slots; the parts are merged by their logsumexps with two sums (DistAttention, arXiv
    2401.02669). What moves is as large as the queries, whatever the length of the cache.

    Args:
      q: [B, T, N, H], the same on all devices of the axis.
      k, v: [B, S, K, H], this device's slots.
      positions: int32 [B, T] of the queries and [B, S] of this device's slots; so segment_ids.

    Returns:
      [B, T, N, Hv] in q's dtype, the same on all devices of the axis.
    """
    q, k, v, positions, segment_ids = _vary((q, k, v, positions, segment_ids), axis_name)
    out, lse = pallas_kernels.attention(
        q,
        k,
        v,
        positions=positions,
        segment_ids=segment_ids,
        causal=causal,
        window=window,
        soft_cap=soft_cap,
        scale=scale,
        implementation=implementation,
        return_lse=True,
    )
    top = lax.pmax(lse, axis_name)
    weight = jnp.exp(lse - jnp.where(top == -jnp.inf, 0.0, top))
    parts = jnp.concatenate([out.astype(jnp.float32) * weight[..., None], weight[..., None]], axis=-1)
    total = lax.psum(parts, axis_name)
    return (total[..., :-1] / jnp.where(total[..., -1:] > 0, total[..., -1:], 1.0)).astype(q.dtype)


def compiler_options(platform: str) -> dict[str, Any]:
    """For `jax.jit(step, compiler_options=...)`: what a step needs so that its transfers run beside its attention.

    XLA's scheduler for GPUs lets one collective at a time be in flight; K's transfer then waits for V's, and is made
    synchronous. Four: K and V, and in the backward pass dK and dV.
    """
    return {"xla_gpu_experimental_parallel_collective_overlap_limit": 4} if platform in ("gpu", "cuda") else {}


# One custom_vjp for all strategies.


class Rows(NamedTuple):
    """What a mask compares, int32 [..., B, T] each; None where nothing does, or where the layout tells it."""

    positions: jax.Array | None
    segment_ids: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call."""

    axis_name: str
    size: int
    strategy: str
    layout: CPLayout
    group: int  # devices that exchange heads by ulysses
    causal: bool
    window: tuple[int | None, int | None]
    reach: tuple[int | None, int | None]  # tokens before and after a query that it may see, causal included
    soft_cap: float | None
    scale: float
    implementation: str | None

    @property
    def compares_positions(self) -> bool:
        return self.reach != (None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, q, k, v, rows: "_PairOfRows"):
    return _attention_fwd(call, q, k, v, rows)[0]


def _attention_fwd(call: _Call, q, k, v, rows: "_PairOfRows"):
    """Residuals: the arguments, out, the logsumexp: nothing that was gathered."""
    with jax.named_scope(f"context_{call.strategy}"):
        out, lse = _FORWARD.get(call.strategy, _ring)(call, q, k, v, rows)
    out, lse = nameable(out.astype(q.dtype), lse)
    return (out, lse), (q, k, v, rows, out, lse)


def _attention_bwd(call: _Call, residuals, cotangents):
    # XLA would find the forward pass's transfers again and keep what they brought; behind a barrier it cannot.
    (q, k, v, rows, out, lse), (dout, dlse) = lax.optimization_barrier((residuals, cotangents))
    delta = jnp.einsum("BTNH,BTNH->BTN", dout, out, precision="highest", preferred_element_type=jnp.float32) - dlse
    with jax.named_scope(f"context_{call.strategy}_backward"):
        backward = _BACKWARD.get(call.strategy, _ring_bwd)
        dq, dk, dv = backward(call, q, k, v, rows, _Cotangent(dout, lse, delta))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


class _Cotangent(NamedTuple):
    """What the gradients of a block need to know of whole rows."""

    dout: jax.Array  # [B, T, N, Hv]
    lse: jax.Array  # [B, T, N] float32
    delta: jax.Array  # [B, T, N] float32


# A block of queries and a block of keys.


def _block(call: _Call, q, k, v, q_rows: Rows, kv_rows: Rows):
    """out [B, T, N, Hv] float32 and the logsumexp [B, T, N]."""
    masks = _masks(call, q_rows, kv_rows)
    out, lse = pallas_kernels.attention(q, k, v, **masks, implementation=call.implementation, return_lse=True)
    return out.astype(jnp.float32), lse


def _block_bwd(call: _Call, q, k, v, q_rows: Rows, kv_rows: Rows, rows: _Cotangent):
    masks = _masks(call, q_rows, kv_rows)
    return pallas_kernels.attention_backward(q, k, v, *rows, **masks, implementation=call.implementation)


def _masks(call: _Call, q_rows: Rows, kv_rows: Rows) -> dict[str, Any]:
    def pair(a, b):
        return None if a is None else (a, b)

    return {
        "causal": call.causal,
        "window": None if call.window == (None, None) else call.window,
        "soft_cap": call.soft_cap,
        "scale": call.scale,
        "positions": pair(q_rows.positions, kv_rows.positions),
        "segment_ids": pair(q_rows.segment_ids, kv_rows.segment_ids),
    }


def _add_block(call: _Call, acc, q, kv, q_rows: Rows, kv_rows: Rows):
    """The accumulated (out, lse) with a block merged in; a block that no query sees costs nothing."""

    def add(acc):
        return _merge(acc, _block(call, q, kv[0], kv[1], q_rows, kv_rows))

    return _if_seen(call, (q_rows, kv_rows), add, lambda acc: acc, acc)


def _block_grads(call: _Call, dq, q, kv, q_rows, kv_rows, rows):
    """dq with a block's part added; its (dk, dv)."""

    def add(dq):
        part, dk, dv = _block_bwd(call, q, kv[0], kv[1], q_rows, kv_rows, rows)
        return dq + part.astype(jnp.float32), (dk, dv)

    return _if_seen(call, (q_rows, kv_rows), add, lambda dq: (dq, jax.tree.map(jnp.zeros_like, kv)), dq)


def _if_seen(call: _Call, rows: tuple[Rows, Rows], add: Callable, skip: Callable, carry):
    """`add`, or `skip` where the block is known to be masked from the extremes of its positions and segments."""
    (q_pos, q_ids), (kv_pos, kv_ids) = rows
    seen = []
    balanced = call.layout in ("zigzag", "striped") and call.window == (None, None)  # every block is seen by some
    if q_pos is not None and kv_pos is not None and not balanced:
        left, right = call.reach
        if right is not None:
            seen.append(kv_pos.min(axis=1) - q_pos.max(axis=1) <= right)
        if left is not None:
            seen.append(kv_pos.max(axis=1) - q_pos.min(axis=1) >= -left)
    if q_ids is not None and kv_ids is not None:
        (q_low, q_high), (kv_low, kv_high) = map(_id_extremes, (q_ids, kv_ids))
        seen += [q_low <= kv_high, kv_low <= q_high]
    if not seen:
        return add(carry)
    return lax.cond(functools.reduce(jnp.logical_and, seen).any(), add, skip, carry)


def _id_extremes(ids: jax.Array):
    """Of each row, padding aside: a row of padding is low > high."""
    return jnp.where(ids > 0, ids, jnp.iinfo(ids.dtype).max).min(axis=1), ids.max(axis=1)


def _merge(a, b):
    """Two parts (out, lse) of the same queries, over different keys."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    top = jnp.maximum(lse_a, lse_b)
    shift = jnp.where(top == -jnp.inf, 0.0, top)
    weight_a, weight_b = jnp.exp(lse_a - shift), jnp.exp(lse_b - shift)
    total = weight_a + weight_b
    inverse = 1 / jnp.where(total > 0, total, 1.0)
    out = out_a * (weight_a * inverse)[..., None] + out_b * (weight_b * inverse)[..., None]
    return out, shift + jnp.log(total)


# Positions and segments of every device's tokens: a few bytes a token, gathered once instead of once a step.


class _AllRows:
    """The rows of every place, a group of devices, in the order in which `_in_order` puts their tokens."""

    def __init__(self, call: _Call, rows: Rows, shape: tuple[int, ...], group: int):
        self.call, self.group, self.batch, self.length = call, group, shape[0], shape[1] * group
        given = {name: x for name, x in rows._asdict().items() if x is not None}
        self.gathered = {}
        if given:
            x = lax.all_gather(jnp.stack(list(given.values())), call.axis_name)  # [cp, n, B, T]
            x = x.reshape(-1, group, *x.shape[1:])
            x = jnp.moveaxis(x, 1, 3)  # [places, n, B, group, T]
            x = _in_order(x.reshape(-1, self.length), call.layout, group).reshape(*x.shape[:3], self.length)
            self.gathered = {name: x[:, i] for i, name in enumerate(given)}

    def at(self, place) -> Rows:
        found = {name: lax.dynamic_index_in_dim(x, place, keepdims=False) for name, x in self.gathered.items()}
        if "positions" not in found and self.call.compares_positions:
            index = _positions(self.call.layout, place, self.length, self.call.size, self.group)
            found["positions"] = jnp.broadcast_to(index[None], (self.batch, self.length))
        return Rows(found.get("positions"), found.get("segment_ids"))


class _PairOfRows(NamedTuple):
    """This device's rows; kv is None where keys have those of the queries."""

    q: Rows
    kv: Rows | None

    def keys(self, call: _Call, x: jax.Array, group: int) -> _AllRows:
        return _AllRows(call, self.q if self.kv is None else self.kv, x.shape[:2], group)

    def all_queries(self, call: _Call, x: jax.Array) -> _AllRows:
        return _AllRows(call, self.q, x.shape[:2], 1)

    def queries(self, call: _Call, x: jax.Array, group: int) -> Rows:
        """Those of this device's queries, or of its group's."""
        if group > 1:
            return _AllRows(call, self.q, x.shape[:2], group).at(_place(call))
        if self.q.positions is not None or not call.compares_positions:
            return self.q
        index = _positions(call.layout, lax.axis_index(call.axis_name), x.shape[1], call.size, 1)
        return self.q._replace(positions=jnp.broadcast_to(index[None], x.shape[:2]))


def _positions(layout: CPLayout, place, T: int, size: int, group: int) -> jax.Array:
    """[T] int32: where the tokens of a place stand in the sequence."""
    t = jnp.arange(T, dtype=jnp.int32)
    place = jnp.asarray(place, jnp.int32)
    if layout == "zigzag":
        half = T // 2
        return jnp.where(t < half, place * half + t, (2 * (size // group) - 2 - place) * half + t)
    if layout == "striped":
        return t // group * size + place * group + t % group
    return place * T + t


def _in_order(x: jax.Array, layout: CPLayout, group: int) -> jax.Array:
    """[B, group * T, ...] of `group` neighbours side by side -> with positions that grow, as far as the layout tells.

    Kernels skip ranges of keys; dealt tokens side by side would look as if every range were needed.
    """
    B, T, *rest = x.shape
    if group == 1 or layout not in ("zigzag", "striped"):
        return x
    if layout == "striped":
        return x.reshape(B, group, T // group, *rest).swapaxes(1, 2).reshape(x.shape)
    x = x.reshape(B, group, 2, -1, *rest)
    return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1).reshape(B, T, *rest)


def _dealt(x: jax.Array, layout: CPLayout, group: int) -> jax.Array:
    """The inverse of `_in_order`."""
    B, T, *rest = x.shape
    if group == 1 or layout not in ("zigzag", "striped"):
        return x
    if layout == "striped":
        return x.reshape(B, T // group, group, *rest).swapaxes(1, 2).reshape(x.shape)
    x = x.reshape(B, 2, group, -1, *rest)
    return jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2).reshape(B, T, *rest)


# All-gather.


def _gather(call: _Call, x):
    return _in_order(lax.all_gather(x, call.axis_name, axis=1, tiled=True), call.layout, call.size)


def _all_gather(call: _Call, q, k, v, rows: _PairOfRows):
    own, keys = rows.queries(call, q, 1), rows.keys(call, k, call.size).at(0)
    return _block(call, q, _gather(call, k), _gather(call, v), own, keys)


def _all_gather_bwd(call: _Call, q, k, v, rows: _PairOfRows, cotangent: _Cotangent):
    own, keys = rows.queries(call, q, 1), rows.keys(call, k, call.size).at(0)
    dq, dk, dv = _block_bwd(call, q, _gather(call, k), _gather(call, v), own, keys, cotangent)

    def scatter(x):
        x = _dealt(x.astype(jnp.float32), call.layout, call.size)
        return lax.psum_scatter(x, call.axis_name, scatter_dimension=1, tiled=True)

    return dq, scatter(dk), scatter(dv)


# Rings: ring, bidirectional, halo, and usp's outer ring. Ulysses is the ring of one place.


class _Lane(NamedTuple):
    """Blocks of keys that travel `steps` places in one direction. Of the last block only `tail` tokens are needed."""

    direction: int
    steps: int
    tail: int

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


def _lanes(call: _Call, T: int) -> list[_Lane]:
    """How far keys travel. T: tokens of a place."""
    places = call.size // call.group
    lanes = [_Lane(1, places - 1, T)]
    if call.strategy == "bidirectional":
        lanes = [_Lane(1, places // 2, T), _Lane(-1, (places - 1) // 2, T)]
    reach = [n for n in call.reach if n is not None]
    if call.strategy != "bidirectional" and call.layout == "contiguous" and len(reach) == 2:
        # A query at the edge of its block sees the key n tokens away: this many places.
        hops = [-(-n // T) for n in reach]
        if sum(hops) < places:
            tails = [n - (hop - 1) * T if call.strategy == "halo" else T for n, hop in zip(reach, hops)]
            lanes = [_Lane(d, hop, tail) for d, hop, tail in zip((1, -1), hops, tails)]
    return [lane for lane in lanes if lane.steps]


def _shift(call: _Call, tree, places: int):
    """Every array of a tree moved that many places further around the ring."""
    if places % (call.size // call.group) == 0:
        return tree
    to = [(i, (i + places * call.group) % call.size) for i in range(call.size)]
    return jax.tree.map(lambda x: lax.ppermute(x, call.axis_name, to), tree)


def _send(call: _Call, held: dict[_Lane, Any], step) -> dict[_Lane, Any]:
    """What the lanes hold, one place further, for step `step`."""
    out = {}
    for lane, tree in held.items():
        last = isinstance(step, int) and step == lane.steps
        out[lane] = _shift(call, jax.tree.map(lane.cut, tree) if last else tree, lane.direction)
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


def _ring(call: _Call, q, k, v, rows: "_PairOfRows"):
    own, keys = rows.queries(call, q, call.group), rows.keys(call, k, call.group)
    heads = _Heads(call, q.shape[2], k.shape[2])
    q, k, v = heads.split_q(q), heads.split_kv(k), heads.split_kv(v)
    lanes = _lanes(call, q.shape[1])
    place = _place(call)

    def step(s, carry, sending):
        held, acc = carry
        coming = _send(call, {lane: held[lane] for lane in sending}, s + 1)
        for lane, kv in held.items():
            acc = _add_block(call, acc, q, kv, own, _rows_of(call, keys, lane, s, kv[0]))
        return coming, acc

    coming = _send(call, dict.fromkeys(lanes, (k, v)), 1)
    carry = coming, _block(call, q, k, v, own, keys.at(place))
    for s in _phases(lanes, 1):
        carry = _run(step, s, carry, lanes)
    out, lse = carry[1]
    return heads.join_q(out.astype(q.dtype)), heads.join_q(lse)


def _ring_bwd(call: _Call, q, k, v, rows: "_PairOfRows", cotangent: _Cotangent):
    own, keys = rows.queries(call, q, call.group), rows.keys(call, k, call.group)
    heads = _Heads(call, q.shape[2], k.shape[2])
    q, k, v = heads.split_q(q), heads.split_kv(k), heads.split_kv(v)
    cotangent = heads.split_cotangent(cotangent)
    T = q.shape[1]
    lanes = _lanes(call, T)
    place = _place(call)

    def own_block(part: slice):
        rows, cot = (jax.tree.map(lambda x: x[:, part], x) for x in (own, cotangent))
        return _block_bwd(call, q[:, part], k, v, rows, keys.at(place), cot)

    def step(s, carry, sending):
        held, sums, dq = carry
        coming = _send(call, {lane: held[lane] for lane in sending}, s + 1)
        moved = {lane: _shift(call, sums[lane], lane.direction) for lane in held if lane in sums}
        for lane, kv in held.items():
            kv_rows = _rows_of(call, keys, lane, s, kv[0])
            dq, part = _block_grads(call, dq, q, kv, own, kv_rows, cotangent)
            moved[lane] = jax.tree.map(jnp.add, moved[lane], lane.pad(part, T)) if lane in moved else _float32(part)
        return coming, sums | moved, dq

    coming = _send(call, dict.fromkeys(lanes, (k, v)), 1)
    halves = [slice(0, T // 2), slice(T // 2, T)] if lanes and T > 1 else [slice(0, T)]
    # The barriers keep the scheduler from doing both halves beside one of the two transfers.
    coming, first = lax.optimization_barrier((coming, own_block(halves[0])))
    carry = coming, {}, jnp.zeros_like(q, dtype=jnp.float32)
    for s in [1, *_phases(lanes, 2)] if lanes else []:
        carry = _run(step, s, carry, lanes)
    _, sums, dq_others = carry
    if lanes:
        k, v, sums, dq_others = lax.optimization_barrier((k, v, sums, dq_others))
    home = {lane: _shift(call, x, -lane.direction * lane.steps) for lane, x in sums.items()}
    parts = [_float32(first), *(_float32(own_block(half)) for half in halves[1:])]
    dq = jnp.concatenate([part[0] for part in parts], axis=1) + dq_others
    dk, dv = (functools.reduce(jnp.add, [part[i] for part in parts]) for i in (1, 2))
    for lane, part in home.items():
        dk, dv = jax.tree.map(jnp.add, (dk, dv), lane.pad(part, T))
    return heads.join_q(dq.astype(q.dtype)), heads.join_kv(dk, k.dtype), heads.join_kv(dv, v.dtype)


def _place(call: _Call) -> jax.Array:
    return lax.axis_index(call.axis_name) // call.group


def _rows_of(call: _Call, keys: "_AllRows", lane: _Lane, step, k) -> Rows:
    """Those of the block that the lane brings at a step."""
    rows = keys.at((_place(call) - lane.direction * step) % (call.size // call.group))
    return jax.tree.map(lane.cut, rows) if k.shape[1] < keys.length else rows


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


# TokenRing: queries travel, keys stay. Each part goes straight back to where its queries live.


def _queries_travel(q, k, v) -> bool:
    """Whether moving queries loads the busier direction of the links less, both passes together."""
    (N, H), (K, Hv) = q.shape[2:], v.shape[2:]
    size, float32 = q.dtype.itemsize, 4
    queries = max(size * N * (2 * H + Hv), N * (size * Hv + float32 * H))  # q, q, dout; back: out, dq
    keys = (2 * size + float32) * K * (H + Hv) / 2  # k and v in both passes, dk and dv; half of it each way
    return queries <= keys


def _bidirectional(call: _Call, q, k, v, rows: "_PairOfRows"):
    if not _queries_travel(q, k, v):
        return _ring(call, q, k, v, rows)
    queries, own = rows.all_queries(call, q), rows.keys(call, k, 1).at(_place(call))
    place = _place(call)
    acc, coming = None, q
    for s in range(call.size):
        here = coming
        coming = _shift(call, here, 1) if s + 1 < call.size else here
        there = queries.at((place - s) % call.size)
        zero = jnp.zeros_like(here[..., 0], dtype=jnp.float32)
        nothing = jnp.broadcast_to(zero[..., None], (*zero.shape, v.shape[3])), zero - jnp.inf
        block = functools.partial(_block, call, here, k, v, there, own)
        out, lse = _if_seen(call, (there, own), lambda nothing, block=block: block(), lambda nothing: nothing, nothing)
        part = _float32(_shift(call, (out.astype(q.dtype), lse), -s))
        acc = part if acc is None else _merge(acc, part)
    return acc


def _bidirectional_bwd(call: _Call, q, k, v, rows: "_PairOfRows", cotangent: _Cotangent):
    if not _queries_travel(q, k, v):
        return _ring_bwd(call, q, k, v, rows, cotangent)
    queries, own = rows.all_queries(call, q), rows.keys(call, k, 1).at(_place(call))
    place = _place(call)
    dq, dk, dv = (jnp.zeros_like(x, dtype=jnp.float32) for x in (q, k, v))
    coming = q, cotangent
    for s in range(call.size):
        here, cot = coming
        coming = _shift(call, (here, cot), 1) if s + 1 < call.size else (here, cot)
        there = queries.at((place - s) % call.size)
        part, (dk_part, dv_part) = _block_grads(call, jnp.zeros_like(dq), here, (k, v), there, own, cot)
        dq, dk, dv = jax.tree.map(jnp.add, (dq, dk, dv), _float32((_shift(call, part, -s), dk_part, dv_part)))
    return dq, dk, dv


# Ulysses: the heads of neighbours for the tokens of all of them.


class _Heads:
    """Splits heads over the `group` devices of a group instead of tokens, and back.

    Query heads that do not divide are padded, in each group of a kv head or by whole groups, whatever is less. A kv
    head that several devices need is sent to each of them; its gradients are added up at home.
    """

    def __init__(self, call: _Call, N: int, K: int):
        self.call, self.K, self.G = call, K, N // K
        self.u = u = call.group
        wider = -(-self.G // (u // math.gcd(u, K))) * (u // math.gcd(u, K))  # queries of a kv head
        more = -(-K // (u // math.gcd(u, self.G))) * (u // math.gcd(u, self.G))  # kv heads
        self.padded = (K, wider) if K * wider <= more * self.G else (more, self.G)
        self.copies = math.lcm(self.padded[0], u) // self.padded[0]
        first = [list(range(i, i + u)) for i in range(0, call.size, u)]
        self.groups = None if u == call.size else first

    def split_q(self, x: jax.Array) -> jax.Array:
        """[B, T, N, ...] -> [B, group * T, padded N // group, ...]."""
        if self.u == 1:
            return x
        B, T, _, *rest = x.shape
        x = x.reshape(B, T, self.K, self.G, *rest)
        K, G = self.padded
        x = jnp.pad(x, [(0, 0), (0, 0), (0, K - self.K), (0, G - self.G), *[(0, 0)] * len(rest)])
        return self._exchange(x.reshape(B, T, K * G, *rest))

    def join_q(self, x: jax.Array) -> jax.Array:
        """The inverse of split_q."""
        if self.u == 1:
            return x
        x = self._return(x)
        B, T, _, *rest = x.shape
        x = x.reshape(B, T, *self.padded, *rest)[:, :, : self.K, : self.G]
        return x.reshape(B, T, self.K * self.G, *rest)

    def split_kv(self, x: jax.Array) -> jax.Array:
        """[B, T, K, H] -> [B, group * T, the kv heads of this device's query heads, H]."""
        if self.u == 1:
            return x
        x = jnp.pad(x, ((0, 0), (0, 0), (0, self.padded[0] - self.K), (0, 0)))
        return self._exchange(jnp.repeat(x, self.copies, axis=2))

    def join_kv(self, x: jax.Array, dtype) -> jax.Array:
        """The transpose of split_kv, from and, where parts are added, in float32."""
        if self.u == 1:
            return x
        x = self._return(x if self.copies > 1 else x.astype(dtype))
        B, T, _, H = x.shape
        return x.reshape(B, T, self.padded[0], self.copies, H).sum(axis=3)[:, :, : self.K]

    def split_cotangent(self, cotangent: _Cotangent) -> _Cotangent:
        if self.u == 1:
            return cotangent
        rows = self.split_q(jnp.stack([cotangent.lse, cotangent.delta], axis=-1))
        return _Cotangent(self.split_q(cotangent.dout), rows[..., 0], rows[..., 1])

    def _exchange(self, x: jax.Array) -> jax.Array:
        x = lax.all_to_all(x, self.call.axis_name, 2, 1, tiled=True, axis_index_groups=self.groups)
        return _in_order(x, self.call.layout, self.u)

    def _return(self, x: jax.Array) -> jax.Array:
        x = _dealt(x, self.call.layout, self.u)
        return lax.all_to_all(x, self.call.axis_name, 1, 2, tiled=True, axis_index_groups=self.groups)


def _ulysses_size(K: int, size: int) -> int:
    """The largest part of cp that divides the kv heads too, so that none is sent twice."""
    return math.gcd(K, size)


_FORWARD = {"all_gather": _all_gather, "bidirectional": _bidirectional}
_BACKWARD = {"all_gather": _all_gather_bwd, "bidirectional": _bidirectional_bwd}


def _reach(window, causal: bool) -> tuple[int | None, int | None]:
    """How many tokens before and after itself a query may see."""
    if isinstance(window, int | np.integer):
        window = (int(window) - 1, int(window) - 1)
    if window is not None and not isinstance(window, tuple | list):
        raise ValueError(
            "context.attention: the window is static, an int or a pair; a traced one does not say who sends"
        )
    left, right = window or (None, None)
    if any(n is not None and n < 0 for n in (left, right)):
        raise ValueError(f"context.attention: a window holds at least the query itself. Got {window}")
    return left, (0 if causal else right)


def _vary(tree: Any, axis_name: str) -> Any:
    """Arrays that all vary over the same mesh axes: what a scan's carry and a custom_vjp need. The transpose of this
    cast sums the gradients of what the caller holds replicated."""
    axes = frozenset({axis_name}).union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(tree)))

    def vary(x):
        missing = tuple(sorted(axes - jax.typeof(x).mat.varying))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)
