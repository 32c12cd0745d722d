"""Pairs of token and expert to the expert's device and back by remote copies (remote_copy of `expert.py`).

Each device sorts its pairs by expert and sends each expert's run of rows right to where that expert's matmul reads it.
What arrives lies in order: nothing is padded on the way, and nothing is sorted or gathered on arrival. All devices know
all counts (one small all_gather), so each computes by itself where every run begins.

Where more arrives than a buffer holds, a turn moves those rows whose places fall into it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jaxscale.parallel.expert_local import Call, among, expert_mlp
from jaxscale.parallel.permute import Sorted, collect, sort_pairs, spread
from pallas_kernels import ragged_all_to_all
from pallas_kernels.ragged_all_to_all.api import Runs, ragged_all_to_all_implementation

_WEIGHT = 512  # bytes that a weight travels in: a float32 in each of 128 lanes
_START = 16384  # bytes that links carry while one more copy is started: 50 ns at 300 GB/s, an estimate


class Traffic(NamedTuple):
    """Who sends how much to whom."""

    pairs: Sorted  # this device's, by expert
    counts: Int[Array, "S E"]  # rows of each device for each expert, the same on all of them

    def arriving(self) -> Int[Array, " S"]:
        """How many rows each device gets."""
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


def rows_leaving(devices: int, pairs: float, *, tokens: int, num_experts: int, row_bytes: int) -> float:
    """What leaves a device for each of its tokens, in rows, if each is in so many pairs: every row that goes to another
    device and its weight, and what links could carry while copies are started."""
    starts = min(num_experts, pairs * tokens) * _START
    return pairs * (1 + _WEIGHT / row_bytes) * (devices - 1) / devices + starts / row_bytes / tokens


def make_traffic(call: Call, level, experts: Int[Array, "n K"]) -> Traffic:
    pairs = sort_pairs(among(experts, call.num_experts).reshape(-1), call.num_experts)
    return Traffic(pairs, level.all_gather(jnp.diff(pairs.starts)[None]))


def one_turn(call: Call, level, room: int, route: Route, turn, traffic: Traffic, x, weights, p):
    """What experts make of those pairs that find room in this turn."""
    m, K = weights.size, weights.shape[1]
    tokens, single = traffic.pairs.expand(m, K)
    there, back, sizes = make_runs(traffic.counts, level.index(), turn * room, room)
    rows = _to_experts(route, room, spread(x, tokens), there, back)
    w = _to_experts(route, room, spread(weights.reshape(-1, 1), single), there, back)
    expert = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(room, dtype=jnp.int32), side="right", method="compare_all")
    y = expert_mlp(call, rows, w, sizes, jnp.minimum(expert.astype(jnp.int32), len(sizes) - 1), p)
    return collect(_home(route, m, y, there, back), tokens).astype(x.dtype)


def make_runs(counts: Int[Array, "S E"], index, start, room: int) -> tuple[Runs, Runs, Int[Array, " e"]]:
    """(there, back, rows of each expert here): what device `index` sends to experts, and from its own experts home, of
    those rows whose place in their expert's device is start..start + room - 1.

    A device's places go by expert, and for one expert by the device that sends.
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
    return there, back, receiver(moved).reshape(size, -1).sum(axis=0, dtype=jnp.int32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_experts(route: Route, rows: int, x, there: Runs, back: Runs):
    """[rows, D]: what came; past it, anything."""
    output = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    return ragged_all_to_all(x, output, *there, axis_name=route.axis_name, axis_index_groups=route.groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _home(route: Route, rows: int, y, there: Runs, back: Runs):
    """[rows, D]: what came back; zeros for the rest."""
    output = jnp.zeros((rows, y.shape[1]), y.dtype)
    return ragged_all_to_all(y, output, *back, axis_name=route.axis_name, axis_index_groups=route.groups)


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
