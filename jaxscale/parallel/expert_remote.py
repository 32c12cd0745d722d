"""Pairs of token and expert to the expert's device and back by remote copies (remote_copy of `expert.py`).

Each device sorts its pairs by expert and sends each expert's run of rows right to where that expert's matmul reads it.
What arrives lies in order: nothing is sorted or gathered on arrival. All devices know all counts (one small
all_gather), so each computes by itself where every run begins.

Where runs are long, they go in blocks of 8 rows, which are whole tiles of a TPU's memory: the last block of a run is
filled up, and nothing is laid out anew. Rows that fill up hold some token's numbers with a weight of zero. Short runs
go row by row, with nothing more.

Where more arrives than a buffer holds, a turn moves those blocks whose places fall into it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxscale.parallel.expert_local import Call, among, expert_mlp
from jaxscale.parallel.permute import Places, Sorted, collect, sort_pairs, spread
from pallas_kernels import ragged_all_to_all
from pallas_kernels.ragged_all_to_all.api import Runs, ragged_all_to_all_implementation

_WEIGHT = 512  # bytes that the weights of a block travel in: a float32 in each of 128 lanes
_START = 16384  # bytes that links carry while one more copy is started: 50 ns at 300 GB/s, an estimate
_BLOCK = 8
_LONG = 32  # rows of a run that blocks of 8 are worth: 11 % more rows travel then


class Traffic(NamedTuple):
    """Who sends how much to whom."""

    pairs: Sorted  # this device's, by expert
    counts: Int[Array, "S E"]  # blocks of each device for each expert, the same on all of them

    def arriving(self) -> Int[Array, " S"]:
        """How many blocks each device gets."""
        size = self.counts.shape[0]
        return self.counts.reshape(size, size, -1).sum(axis=(0, 2))


class Route(NamedTuple):
    """The level's devices on an axis, as `ragged_all_to_all` names them."""

    axis_name: str
    groups: tuple[tuple[int, ...], ...] | None


def unless_remote(x) -> str | None:
    """None where rows such as x's travel by remote copies; else the reason."""
    try:
        ragged_all_to_all_implementation(x, implementation="mosaic_tpu")
    except NotImplementedError as error:
        return str(error).split(": ", 2)[-1]
    return None


def block_of(pairs: float, num_experts: int) -> int:
    """Rows of a block, where a device has so many pairs."""
    return _BLOCK if pairs >= _LONG * num_experts else 1


def filling(pairs: float, num_experts: int) -> float:
    """How many rows fill up the blocks of a device's runs: half a block for each run."""
    return (block_of(pairs, num_experts) - 1) / 2 * num_experts


def rows_leaving(devices: int, pairs: float, *, tokens: int, num_experts: int, row_bytes: int) -> float:
    """What leaves a device for each of its tokens, in rows, if each is in so many pairs: every row that goes to another
    device, what fills up its block, and its weight; and what links could carry while copies are started."""
    block = block_of(pairs * tokens, num_experts)
    starts = min(num_experts, pairs * tokens) * _START
    rows = (pairs + filling(pairs * tokens, num_experts) / tokens) * (1 + _WEIGHT / block / row_bytes)
    return rows * (devices - 1) / devices + starts / row_bytes / tokens


def make_traffic(call: Call, level, block: int, experts: Int[Array, "n K"]) -> Traffic:
    pairs = sort_pairs(among(experts, call.num_experts).reshape(-1), call.num_experts)
    counts = -(-jnp.diff(pairs.starts) // block)
    return Traffic(pairs, level.all_gather(counts[None]))


def one_turn(call: Call, level, block: int, room: int, route: Route, turn, traffic: Traffic, x, weights, p):
    """What experts make of those pairs that find room in this turn: `room` blocks."""
    m, K = weights.size, weights.shape[1]
    blocks = -(-(m + (block - 1) * min(m, call.num_experts)) // block)
    there, back, sizes, arrival = make_runs(traffic.counts, level.index(), turn * room, room)
    tokens, single = in_blocks(traffic.pairs, block, blocks, K, arrival - turn * room, room)
    to_experts: Callable[[Array], Array] = lambda a: _to_experts(route, room, a, there, back)
    rows = to_experts(_rows_of(x, tokens, block)).reshape(room * block, -1)
    w = spread(weights.reshape(-1, 1), single)
    w = to_experts(jnp.where(single.token[:, None] < m, w, 0.0).reshape(blocks, block)).reshape(-1, 1)
    place = jnp.arange(room * block, dtype=jnp.int32)
    expert = jnp.searchsorted(jnp.cumsum(sizes * block), place, side="right", method="compare_all").astype(jnp.int32)
    y = expert_mlp(call, rows, w, sizes * block, jnp.minimum(expert, len(sizes) - 1), p)
    home: Array = _home(route, blocks, _whole(y, block), there, back)
    return collect(home.reshape(blocks * block, -1), tokens).astype(x.dtype)


def _rows_of(x, tokens: Places, block: int):
    """Where there is no token, some token's row, whose gradient nobody asks for: what fills up a block is finite."""
    some = Places(jnp.minimum(tokens.token, x.shape[0] - 1), tokens.place)
    return _whole(spread(x, some), block)


def _whole(rows, block: int):
    return rows if block == 1 else rows.reshape(-1, block, rows.shape[1])


def in_blocks(pairs: Sorted, block: int, blocks: int, top_k: int, arrival, room: int) -> tuple[Places, Places]:
    """Places of tokens and of their pairs in the order of `pairs`, where every key begins with a block of its own.

    Args:
      arrival: [E], where each key's first block arrives. Pairs whose block does not arrive at 0..room - 1 have no
        place, though it holds their token.
    """
    m = pairs.pair.shape[0]
    begin, end = pairs.starts[:-1], pairs.starts[1:]
    held = -(-(end - begin) // block)
    first = jnp.cumsum(held, dtype=jnp.int32) - held
    row = jnp.arange(blocks * block, dtype=jnp.int32)

    def of_key(index, starts, value):
        """value[key], where key's places begin at starts[key]: the sum of all steps up to there, no lookup."""
        step = jnp.diff(value, prepend=jnp.zeros(1, value.dtype))
        return jnp.where(index[:, None] >= starts[None], step[None], 0).sum(axis=1, dtype=jnp.int32)

    at = row + of_key(row, first * block, begin - first * block)
    pair = jnp.where(at < of_key(row, first * block, end), pairs.pair.at[at].get(mode="clip"), m)
    place = pairs.place + of_key(pairs.place, begin, first * block - begin)
    arrives = place // block + of_key(pairs.place, begin, arrival - first)
    here = (pairs.place < pairs.starts[-1]) & (arrives >= 0) & (arrives < room)
    place = jnp.where(here, place, len(row))
    return Places(pair // top_k, place.reshape(-1, top_k)), Places(pair, place[:, None])


def make_runs(counts: Int[Array, "S E"], index, start, room: int) -> tuple[Runs, Runs, Array, Array]:
    """What device `index` sends to experts, and from its own home, of those blocks whose place in their expert's device
    is start..start + room - 1. A device's places go by expert, and for one expert by the device that sends.

    Returns:
      there, back, blocks of each expert here [e], the place of the first block from here for each expert [E].
    """
    size = counts.shape[0]
    begin = jnp.cumsum(counts, axis=1, dtype=jnp.int32) - counts  # in the sender's order
    to = lambda a: a.reshape(size, size, -1).transpose(1, 2, 0)  # [receiver, its expert, sender]
    rows, begin = to(counts), to(begin)
    end = jnp.cumsum(rows.reshape(size, -1), axis=1, dtype=jnp.int32).reshape(rows.shape)
    first, last = (jnp.clip(a, start, start + room) for a in (end - rows, end))
    moved = last - first
    begin, place = begin + first - (end - rows), first - start
    sender = lambda a: lax.dynamic_index_in_dim(a, index, 2, keepdims=False).reshape(-1)  # by receiver, by expert
    receiver = lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False).T.reshape(-1)  # by sender, by expert
    there = Runs(sender(begin), sender(moved), sender(place), receiver(moved))
    back = Runs(receiver(place), receiver(moved), receiver(begin), sender(moved))
    return there, back, receiver(moved).reshape(size, -1).sum(axis=0, dtype=jnp.int32), sender(end - rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_experts(route: Route, rows: int, x, there: Runs, back: Runs) -> Array:
    """[rows, ...]: what came; elsewhere, anything."""
    return _exchange(route, rows, x, there)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _home(route: Route, rows: int, y, there: Runs, back: Runs) -> Array:
    return _exchange(route, rows, y, back)


def _exchange(route: Route, rows: int, x, runs: Runs):
    output = jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype)
    return ragged_all_to_all(x, output, *runs, axis_name=route.axis_name, axis_index_groups=route.groups)


# Each is the other's gradient. All devices know both directions, so the backward pass asks nobody.


def _to_experts_fwd(route, rows, x, there, back):
    return _to_experts(route, rows, x, there, back), (there, back, x.shape[0])


def _to_experts_bwd(route, rows, residuals, grad):
    there, back, before = residuals
    return _home(route, before, grad, there, back), None, None


def _home_fwd(route, rows, y, there, back):
    return _home(route, rows, y, there, back), (there, back, y.shape[0])


def _home_bwd(route, rows, residuals, grad):
    there, back, before = residuals
    return _to_experts(route, before, grad, there, back), None, None


_to_experts.defvjp(_to_experts_fwd, _to_experts_bwd)
_home.defvjp(_home_fwd, _home_bwd)
