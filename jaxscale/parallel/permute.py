"""Rows of tokens to where their experts want them, and back: two gathers, each the gradient of the other.

A place without a token holds anything, in what is spread and in the gradient of what is collected: whoever sums over
places must leave those out.

Left to itself XLA adds rows up one by one (a scatter-add) where a gather finds each token's rows and adds them in
registers: the sum has one order, so results repeat bit by bit.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Int

from jaxscale.sharding import ROUTED
from pallas_kernels import collect_at_home, spread_from_peers, spread_rows

_ONE_NUMBER = 2**31  # int32
UNROLLED = 16  # places of a token whose sum is written out


class Places(NamedTuple):
    """Which token stands at each of R places, and at which places each of n tokens stands, at most K of them.

    Out of range (n, R): none. Both say the same: place[t, k] = r if and only if token[r] = t.
    """

    token: Int[Array, " R"]
    place: Int[Array, "n K"]


class Sorted(NamedTuple):
    """Pairs in the order of a key of theirs. As `Places`, the pairs are the tokens: one place each."""

    pair: Int[Array, " m"]  # of each place
    place: Int[Array, " m"]  # of each pair
    starts: Int[Array, " G+1"]  # the first place of each key, and the end of the last

    def expand(self, rows: int, top_k: int, start: int | Array = 0) -> tuple[Places, Places]:
        """Places of tokens and of their pairs, `top_k` each, where of the places `rows` from `start` on are kept, and
        those of keys 0..G-1 used."""
        m, used = self.pair.shape[0], self.starts[-1]
        index = jnp.arange(rows, dtype=jnp.int32) + start
        pair = jnp.where(index < used, self.pair.at[index].get(mode="clip"), m)
        place = jnp.where((self.place >= start) & (self.place < used), self.place - start, rows)
        return Places(pair // top_k, place.reshape(-1, top_k)), Places(pair, place[:, None])


def sort_pairs(key: Int[Array, " m"], keys: int) -> Sorted:
    """Pairs with equal keys 0..keys-1 side by side, in their old order; those with the key `keys` last."""
    m = key.shape[0]
    index = jnp.arange(m, dtype=jnp.int32)
    if (keys + 1) * m < _ONE_NUMBER:  # one number for both, and no two alike: the fastest sort that a GPU has
        both = lax.sort(key * m + index, is_stable=False)
        pair, key = both % m, both // m
    else:
        key, pair = lax.sort((key, index), num_keys=1, is_stable=True)
    starts = jnp.searchsorted(key, jnp.arange(keys + 1, dtype=jnp.int32), method="compare_all").astype(jnp.int32)
    place = jnp.zeros_like(pair).at[pair].set(index, unique_indices=True)
    return Sorted(*(checkpoint_name(x, ROUTED) for x in (pair, place, starts)))


def merge_sorted(key: Int[Array, "S m"], place: Int[Array, "S m"], starts: Int[Array, "S G+1"]) -> Sorted:
    """`sort_pairs` of S lists, one after the other, each of which was sorted before.

    Args:
      key: 0..G-1; G is nobody's.
      place: of each pair in its own list's order, and `starts` that of the first pair of each key there, and of G.
    """
    counts = jnp.diff(starts, axis=1)
    ends = jnp.cumsum(counts.sum(axis=0), dtype=jnp.int32)
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    moved = first[None, :-1] + jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts - starts[:, :-1]
    keys, m = counts.shape[1], key.size
    index = jnp.arange(m, dtype=jnp.int32)
    place = place + jnp.take_along_axis(moved, jnp.minimum(key, keys - 1), axis=1, mode="clip")
    place = jnp.where(key.reshape(-1) < keys, place.reshape(-1), m + index)
    pair = jnp.zeros_like(index).at[place].set(index, mode="drop", unique_indices=True)
    return Sorted(*(checkpoint_name(x, ROUTED) for x in (pair, place, first)))


@jax.custom_vjp
def spread(x: Array, places: Places) -> Array:
    """[n, D] -> [R, D]: each place's token; where there is none, anything."""
    return spread_rows(x, places.token, places.place)


@jax.custom_vjp
def collect(y: Array, places: Places) -> Array:
    """[R, D] -> float32 [n, D]: the sum over each token's places."""
    first, *others = (places.place[:, k] for k in range(min(places.place.shape[1], UNROLLED)))
    total = _take(y, first).astype(jnp.float32)
    for at in others:
        total = total + _take(y, at).astype(jnp.float32)
    more = places.place[:, UNROLLED:].T
    return lax.scan(lambda acc, at: (acc + _take(y, at).astype(jnp.float32), None), total, more)[0]


def _take(x: Array, at: Array) -> Array:
    return jnp.take(x, at, axis=0, mode="fill", fill_value=0)


def _spread_fwd(x, places):
    return spread(x, places), (places, jnp.zeros((0,), x.dtype))


def _spread_bwd(residuals, grad):
    places, like = residuals
    return collect(grad, places).astype(like.dtype), None


def _collect_fwd(y, places):
    return collect(y, places), (places, jnp.zeros((0,), y.dtype))


def _collect_bwd(residuals, grad):
    places, like = residuals
    return spread(grad.astype(like.dtype), places), None


spread.defvjp(_spread_fwd, _spread_bwd)
collect.defvjp(_collect_fwd, _collect_bwd)


# The same over the devices of a mesh axis, whose tokens stand one after the other in the places: x and the sums are
# those of this device. Every device of the axis must call them as often.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def spread_over(axis: str, x: Array, places: Places) -> Array:
    """[n, D] -> [R, D]."""
    return spread_from_peers(x, places.token, places.place, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect_over(axis: str, y: Array, places: Places) -> Array:
    """[R, D] -> [n, D] in y's dtype."""
    return collect_at_home(y, places.place, axis)


def _spread_over_bwd(axis, places, grad):
    return collect_over(axis, grad, places), None


def _collect_over_bwd(axis, places, grad):
    return spread_over(axis, grad, places), None


spread_over.defvjp(lambda axis, x, places: (spread_over(axis, x, places), places), _spread_over_bwd)
collect_over.defvjp(lambda axis, y, places: (collect_over(axis, y, places), places), _collect_over_bwd)
