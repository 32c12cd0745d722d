"""Fused projections by segments: an array whose fused dim is regrouped, and the operations that keep it so.

A fused dim of segments laid one after another, [q | k | v], cannot be split within each segment by a PartitionSpec.
Regrouped into (groups, a part of every segment) it can, along the groups, and the product is still one: `split(x @ w)`
becomes a product with a regrouped w and slices of each group. Whatever has no rule here takes the array in its own
order again, so the numbers never depend on what is known.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax

from sharding_rules.primitives import ELEMENTWISE


@dataclasses.dataclass(frozen=True)
class Regrouped:
    """`x` has dims `dim` and `dim + 1`, (groups, sum(sizes) / groups), in place of one dim of segments of `sizes`."""

    x: Any
    dim: int
    sizes: tuple[int, ...]

    @property
    def like(self) -> tuple[Any, ...]:
        return self.dim, self.sizes, self.x.shape[self.dim]


def regroup(x: Any, dim: int, sizes: Sequence[int], groups: int) -> Regrouped:
    pieces = [jax.lax.slice_in_dim(x, start, stop, axis=dim) for start, stop in _ranges(sizes)]
    pieces = [p.reshape(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :]) for p in pieces]
    return Regrouped(jax.lax.concatenate(pieces, dim + 1), dim, tuple(sizes))


def segments(y: Regrouped) -> list[Any]:
    """Each segment in its own order."""
    shape = y.x.shape
    ranges = _ranges([n // shape[y.dim] for n in y.sizes])
    pieces = [jax.lax.slice_in_dim(y.x, start, stop, axis=y.dim + 1) for start, stop in ranges]
    return [p.reshape(*shape[: y.dim], -1, *shape[y.dim + 2 :]) for p in pieces]


def join(y: Regrouped) -> Any:
    return jax.lax.concatenate(segments(y), y.dim)


def apply(eqn, values: Sequence[Any]) -> list[Any] | None:
    """The outputs of an equation of which some inputs are regrouped; None: it has no rule for that."""
    name, params = eqn.primitive.name, eqn.params
    with eqn.ctx.manager:
        if name == "dot_general":
            return _dot_general(eqn, *values)
        if name in ELEMENTWISE and len(eqn.outvars) == 1:
            return _elementwise(eqn, values)
        if name in ("broadcast_in_dim", "reshape"):
            return _lead(eqn, values[0]) or _stack(eqn, values[0])
        y = values[0]
        if name == "split" and (params["axis"], tuple(params["sizes"])) == (y.dim, y.sizes):
            return segments(y)
        if name == "slice":
            return _slice(eqn, y)
    return None


def _dot_general(eqn, lhs: Any, rhs: Any) -> list[Any] | None:
    """One operand is regrouped along a dim that stays."""
    numbers = eqn.params["dimension_numbers"]
    sides = [(*contract, *batch) for contract, batch in zip(*numbers, strict=True)]
    if isinstance(lhs, Regrouped) and isinstance(rhs, Regrouped):
        return None
    right = isinstance(rhs, Regrouped)
    y = rhs if right else lhs
    if y.dim in sides[right]:
        return None
    later = lambda dims: tuple(d + (d > y.dim) for d in dims)
    moved = tuple(tuple(later(dims) if i == right else dims for i, dims in enumerate(pair)) for pair in numbers)
    out = len(numbers[1][0]) + len([d for d in range(y.dim) if d not in sides[right]])
    out += eqn.invars[0].aval.ndim - len(sides[0]) if right else 0
    product = eqn.primitive.bind(*((lhs, y.x) if right else (y.x, rhs)), **{**eqn.params, "dimension_numbers": moved})
    return [Regrouped(product, out, y.sizes)]


def _elementwise(eqn, values: Sequence[Any]) -> list[Any] | None:
    """What is regrouped is so alike; what else there is has size 1 along that dim."""
    y = next(x for x in values if isinstance(x, Regrouped))

    def operand(x):
        if isinstance(x, Regrouped):
            return x.x if x.like == y.like else None
        if jax.numpy.ndim(x) == 0:
            return x
        return jax.lax.expand_dims(x, [y.dim]) if x.shape[y.dim] == 1 else None

    operands = [operand(x) for x in values]
    if any(x is None for x in operands):
        return None
    return [Regrouped(eqn.primitive.bind(*operands, **eqn.params), y.dim, y.sizes)]


def _lead(eqn, y: Regrouped) -> list[Any] | None:
    """A vector is given leading dims of size 1, ready to be broadcast."""
    shape = eqn.outvars[0].aval.shape
    if y.x.ndim != 2 or shape != (*[1] * (len(shape) - 1), sum(y.sizes)):
        return None
    return [Regrouped(jax.lax.expand_dims(y.x, range(len(shape) - 1)), len(shape) - 1, y.sizes)]


def _stack(eqn, y: Regrouped) -> list[Any] | None:
    """Segments of one size are laid out as a dim: (3 x N x H,) -> (3, N, H)."""
    shape, size = eqn.outvars[0].aval.shape, y.sizes[0]
    before, n = y.x.shape[: y.dim], len(y.sizes)
    end = next((k for k in range(y.dim + 1, len(shape) + 1) if math.prod(shape[y.dim : k]) == n * size), 0)
    same = set(y.sizes) == {size} and (*shape[: y.dim], *shape[end:]) == (*before, *y.x.shape[y.dim + 2 :])
    if eqn.primitive.name != "reshape" or not same or shape[y.dim] != n:
        return None
    return [jax.numpy.stack([s.reshape(*before, *shape[y.dim + 1 :]) for s in segments(y)], y.dim)]


def _slice(eqn, y: Regrouped) -> list[Any] | None:
    """One segment, taken whole."""
    starts, stops, strides = (eqn.params[k] for k in ("start_indices", "limit_indices", "strides"))
    if strides is not None and strides[y.dim] != 1:
        return None
    for (start, stop), segment in zip(_ranges(y.sizes), segments(y), strict=True):
        if (starts[y.dim], stops[y.dim]) == (start, stop):
            replaced = lambda limits, new: [*limits[: y.dim], new, *limits[y.dim + 1 :]]
            return [jax.lax.slice(segment, replaced(starts, 0), replaced(stops, stop - start), strides)]
    return None


def _ranges(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *itertools.accumulate(sizes))))
