"""Positions and segments of every device's tokens: a few bytes a token, gathered once for both passes."""

import copy
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxscale.config import CPLayout
from jaxscale.parallel.context_blocks import Call, Rows, place_of
from jaxscale.parallel.context_cost import PARTS

_BUCKETS = 4096


class AllRows:
    """The rows of every place, a group of devices, in the order in which `in_order` puts their tokens."""

    def __init__(self, call: Call, rows: Rows, shape: tuple[int, ...], group: int):
        """rows: [cp, B, T] each; shape: of a device's queries or keys."""
        self.call, self.group, self.batch, self.length = call, group, shape[0], shape[1] * group

        def grouped(x):
            x = x.reshape(-1, group, *x.shape[1:]).swapaxes(1, 2)  # [places, B, group, T]
            return in_order(x.reshape(-1, self.length), call.layout, group).reshape(*x.shape[:2], self.length)

        self.gathered = {name: grouped(x) for name, x in rows._asdict().items() if x is not None}

    def at(self, place) -> Rows:
        found = {name: lax.dynamic_index_in_dim(x, place, keepdims=False) for name, x in self.gathered.items()}
        if "positions" not in found and self.call.compares_positions:
            index = positions(self.call.layout, place, self.length, self.call.size, self.group)
            found["positions"] = jnp.broadcast_to(index[None], (self.batch, self.length))
        return Rows(found.get("positions"), found.get("segment_ids"))

    def cut(self, starts: jax.Array, length: int) -> "AllRows":
        """Those of `length` tokens of each place, from starts [places, B] on."""
        rows, flat = copy.copy(self), starts.reshape(-1)
        rows.length = length
        rows.gathered = {
            name: cut_rows(x.reshape(-1, self.length), flat, length).reshape(*x.shape[:2], length)
            for name, x in self.gathered.items()
        }
        return rows

    def shared(self) -> tuple[jax.Array, jax.Array]:
        """Where the tokens stand whose documents several places hold: the first and the last one, [places, B] each;
        0 and -1 where there are none."""
        ids = self.gathered["segment_ids"]
        bucket = ids % _BUCKETS  # documents that meet in one count as one document
        place, row = jnp.ogrid[: ids.shape[0], : ids.shape[1]]
        held = jnp.zeros((*ids.shape[:2], _BUCKETS), jnp.int32)
        # Of neighbours that are alike one suffices: thousands that write to one place are slow.
        alike = jnp.pad(ids[..., 1:] == ids[..., :-1], [(0, 0), (0, 0), (1, 0)])
        first = jnp.where(alike | (ids <= 0), _BUCKETS, bucket)
        held = held.at[place[..., None], row[..., None], first].set(1, mode="drop")
        shared = jnp.take_along_axis(held.sum(axis=0)[None] > 1, bucket, axis=2) & (ids > 0)
        t = jnp.arange(self.length, dtype=jnp.int32)[None, None]
        last = jnp.where(shared, t, -1).max(axis=2)
        return jnp.where(last < 0, 0, jnp.where(shared, t, self.length).min(axis=2)), last


def cut_rows(x: jax.Array, starts: jax.Array, length: int) -> jax.Array:
    """x [B, T, ...], starts [B] -> [B, length, ...]: of each row the tokens from its start on."""
    return jnp.concatenate([lax.dynamic_slice_in_dim(x[i : i + 1], starts[i], length, 1) for i in range(x.shape[0])])


def put_rows(x: jax.Array, part: jax.Array, starts: jax.Array) -> jax.Array:
    """x with the tokens that `cut_rows` takes replaced."""
    # Behind a barrier: XLA would fuse the update with the kernel that wrote x, and fails to (jax 0.11.2), or with what
    # reads x to make the part, and copies x first.
    x, part = lax.optimization_barrier((x, part.astype(x.dtype)))
    for i in range(x.shape[0]):
        x = lax.dynamic_update_slice(x, part[i : i + 1], (i, starts[i], *[0] * (x.ndim - 2)))
    return x


class Part(NamedTuple):
    """Where the tokens begin on each place that hold all those of documents which several places hold, [places, B], and
    whether a small part of the tokens holds them on all places."""

    starts: jax.Array
    enough: jax.Array


class PairOfRows(NamedTuple):
    """This device's rows and those of all devices, [cp, B, T]; None for keys where they have those of the queries."""

    q: Rows
    kv: Rows | None
    all_q: Rows
    all_kv: Rows | None
    part: Part | None  # of packed rows

    def keys(self, call: Call, x: jax.Array, group: int) -> AllRows:
        return AllRows(call, self.all_q if self.all_kv is None else self.all_kv, x.shape, group)

    def all_queries(self, call: Call, x: jax.Array) -> AllRows:
        return AllRows(call, self.all_q, x.shape, 1)

    def queries(self, call: Call, x: jax.Array, group: int) -> Rows:
        """Those of this device's queries, or of its group's."""
        if group > 1:
            return AllRows(call, self.all_q, x.shape, group).at(place_of(call))
        if self.q.positions is not None or not call.compares_positions:
            return self.q
        index = positions(call.layout, lax.axis_index(call.axis_name), x.shape[1], call.size, 1)
        return self.q._replace(positions=jnp.broadcast_to(index[None], x.shape[:2]))

    def own(self, call: Call, q: jax.Array, k: jax.Array, group: int) -> tuple[Rows, Rows]:
        """Those of this device's queries and keys, or of its group's. Where they have the same ones the compiler should
        know: tables of blocks are made of them."""
        queries = self.queries(call, q, group)
        return queries, queries if self.kv is None else self.keys(call, k, group).at(place_of(call))


def gather_rows(call: Call, q: Rows, kv: Rows | None) -> PairOfRows:
    """What both passes know of the rows of all. kv: None where keys have those of the queries."""

    def everyones(rows: Rows) -> Rows:
        given = {name: x for name, x in rows._asdict().items() if x is not None}
        if not given:
            return rows
        x = lax.all_gather(jnp.stack(list(given.values())), call.axis_name)  # [cp, n, B, T]
        return rows._replace(**{name: x[:, i] for i, name in enumerate(given)})

    all_kv = None if kv is None else everyones(kv)
    all_q = everyones(q) if kv is None or call.group > 1 or call.strategy == "bidirectional" else Rows(None, None)
    rows = PairOfRows(q, kv, all_q, all_kv, None)
    ids = q.segment_ids
    if call.layout != "packed" or call.group > 1 or call.size == 1 or ids is None or ids.shape[1] < PARTS:
        return rows
    length = ids.shape[1] // PARTS
    first, last = rows.keys(call, ids, 1).shared()
    return rows._replace(part=Part(jnp.minimum(first, ids.shape[1] - length), (last - first < length).all()))


def positions(layout: CPLayout, place, T: int, size: int, group: int) -> jax.Array:
    """[T] int32: where the tokens of a place stand in the sequence."""
    t = jnp.arange(T, dtype=jnp.int32)
    place = jnp.asarray(place, jnp.int32)
    if layout == "zigzag":
        half = T // 2
        return jnp.where(t < half, place * half + t, (2 * (size // group) - 2 - place) * half + t)
    if layout == "striped":
        return t // group * size + place * group + t % group
    return place * T + t


def in_order(x: jax.Array, layout: CPLayout, group: int) -> jax.Array:
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


def dealt(x: jax.Array, layout: CPLayout, group: int) -> jax.Array:
    """The inverse of `in_order`."""
    B, T, *rest = x.shape
    if group == 1 or layout not in ("zigzag", "striped"):
        return x
    if layout == "striped":
        return x.reshape(B, T // group, group, *rest).swapaxes(1, 2).reshape(x.shape)
    x = x.reshape(B, 2, group, -1, *rest)
    return jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2).reshape(B, T, *rest)
