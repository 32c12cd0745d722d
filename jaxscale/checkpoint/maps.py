"""What layouts are made of: functions of lazy arrays, each with its inverse.

A lazy array knows its shape and can read any box of itself. A map answers with lazy arrays that, asked for a box, ask
their inputs for just the boxes that it needs. So a device's shard of a fused, restaged or transposed array costs the
bytes of that shard, on the host that holds the device, and nothing is compiled or exchanged.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

Box = tuple[slice, ...]  # one slice(start, stop) for each dim


@dataclasses.dataclass(frozen=True)
class Lazy:
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]
    sources: frozenset[str] = frozenset()  # names of the stored arrays behind it

    def whole(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))


def lazy(array: np.ndarray) -> Lazy:
    """An array in memory as a lazy one."""
    return Lazy(array.shape, array.dtype, lambda box: array[box])


class Map(Protocol):
    """Lazy arrays -> a list of lazy arrays; raises ValueError when the shapes do not fit."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Lazy]: ...

    def inverse(self) -> "Map": ...


@dataclasses.dataclass(frozen=True)
class Rename:
    def __call__(self, x):
        return [x]

    def inverse(self):
        return self


@dataclasses.dataclass(frozen=True)
class Transpose:
    order: tuple[int, ...]

    def __call__(self, x):
        if sorted(self.order) != list(range(len(x.shape))):
            raise ValueError(f"order {self.order} does not fit {len(x.shape)} dims")
        back = self.inverse().order
        shape = tuple(x.shape[dim] for dim in self.order)
        return [_made((x,), shape, lambda box: x.read(tuple(box[k] for k in back)).transpose(self.order))]

    def inverse(self):
        return Transpose(tuple(self.order.index(k) for k in range(len(self.order))))


@dataclasses.dataclass(frozen=True)
class Stack:
    def __call__(self, *xs):
        if len({(x.shape, x.dtype) for x in xs}) != 1:
            raise ValueError(f"the layers differ: {sorted({f'{x.dtype}{list(x.shape)}' for x in xs})}")
        read = lambda box: np.stack([x.read(box[1:]) for x in xs[box[0]]])
        return [_made(xs, (len(xs), *xs[0].shape), read)]

    def inverse(self):
        return Unstack()


@dataclasses.dataclass(frozen=True)
class Unstack:
    def __call__(self, x):
        if not x.shape:
            raise ValueError("a scalar has no layers")
        return [
            _made((x,), x.shape[1:], lambda box, i=i: x.read((slice(i, i + 1), *box))[0]) for i in range(x.shape[0])
        ]

    def inverse(self):
        return Stack()


@dataclasses.dataclass(frozen=True)
class Concat:
    axis: int
    sizes: tuple[int, ...]

    def __call__(self, *xs):
        found = tuple(x.shape[self.axis] for x in xs)
        if found != self.sizes:
            raise ValueError(f"sizes along {self.axis} are {found}, not {self.sizes}")
        shape = _resized(xs[0], self.axis, sum(self.sizes))
        if len({_resized(x, self.axis, 0) for x in xs}) != 1 or len({x.dtype for x in xs}) != 1:
            raise ValueError(f"the parts differ: {[f'{x.dtype}{list(x.shape)}' for x in xs]}")
        axis = self.axis % len(shape)

        def read(box):
            blocks, first = [], 0
            for x, size in zip(xs, self.sizes):
                start, stop = max(box[axis].start - first, 0), min(box[axis].stop - first, size)
                if start < stop:
                    blocks.append(x.read(_with(box, axis, start, stop)))
                first += size
            return np.concatenate(blocks, axis)

        return [_made(xs, shape, read)]

    def inverse(self):
        return Split(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class Split:
    axis: int
    sizes: tuple[int, ...]

    def __call__(self, x):
        _expect(x, self.axis, sum(self.sizes))
        firsts = np.cumsum((0, *self.sizes))
        return [
            _gathered(x, self.axis, np.arange(first, first + size)) for first, size in zip(firsts.tolist(), self.sizes)
        ]

    def inverse(self):
        return Concat(self.axis, self.sizes)


@dataclasses.dataclass(frozen=True)
class MergeDims:
    dim: int
    sizes: tuple[int, ...]

    def __call__(self, x):
        dim, count = self.dim % (len(x.shape) - len(self.sizes) + 1), len(self.sizes)
        if x.shape[dim : dim + count] != self.sizes:
            raise ValueError(f"shape {x.shape} does not hold {self.sizes} at dim {dim}")
        inner = int(np.prod(self.sizes[1:]))

        def read(box):
            # Whole rows of the outermost of the merged dims, then the part of them that was asked for.
            start, stop = box[dim].start // inner, -(-box[dim].stop // inner)
            rows = x.read((*box[:dim], slice(start, stop), *(slice(0, n) for n in self.sizes[1:]), *box[dim + 1 :]))
            flat = rows.reshape(*rows.shape[:dim], -1, *rows.shape[dim + count :])
            return flat[
                _with((slice(None),) * flat.ndim, dim, box[dim].start - start * inner, box[dim].stop - start * inner)
            ]

        return [_made((x,), (*x.shape[:dim], int(np.prod(self.sizes)), *x.shape[dim + count :]), read)]

    def inverse(self):
        return SplitDim(self.dim, self.sizes)


@dataclasses.dataclass(frozen=True)
class SplitDim:
    dim: int
    sizes: tuple[int, ...]

    def __call__(self, x):
        dim, count = self.dim % len(x.shape), len(self.sizes)
        _expect(x, dim, int(np.prod(self.sizes)))
        inner = int(np.prod(self.sizes[1:]))

        def read(box):
            rows, rest = box[dim], box[dim + 1 : dim + count]
            flat = x.read((*box[:dim], slice(rows.start * inner, rows.stop * inner), *box[dim + count :]))
            split = flat.reshape(*flat.shape[:dim], -1, *self.sizes[1:], *flat.shape[dim + 1 :])
            return split[(slice(None),) * (dim + 1) + rest]

        return [_made((x,), (*x.shape[:dim], *self.sizes, *x.shape[dim + 1 :]), read)]

    def inverse(self):
        return MergeDims(self.dim, self.sizes)


@dataclasses.dataclass(frozen=True)
class Permute:
    axis: int
    order: tuple[int, ...]

    def __call__(self, x):
        _expect(x, self.axis, len(self.order))
        return [_gathered(x, self.axis, np.asarray(self.order))]

    def inverse(self):
        return Permute(self.axis, tuple(np.argsort(self.order).tolist()))


@dataclasses.dataclass(frozen=True)
class Pad:
    axis: int
    old: int
    new: int

    def __call__(self, x):
        _expect(x, self.axis, self.old)
        zeros = Lazy(
            _resized(x, self.axis, self.new - self.old),
            x.dtype,
            lambda box: np.zeros([s.stop - s.start for s in box], x.dtype),
        )
        return Concat(self.axis, (self.old, self.new - self.old))(x, zeros)

    def inverse(self):
        return Unpad(self.axis, self.new, self.old)


@dataclasses.dataclass(frozen=True)
class Unpad:
    axis: int
    old: int
    new: int

    def __call__(self, x):
        _expect(x, self.axis, self.old)
        return [_gathered(x, self.axis, np.arange(self.new))]

    def inverse(self):
        return Pad(self.axis, self.new, self.old)


@dataclasses.dataclass(frozen=True)
class Repeat:
    axis: int
    times: int

    def __call__(self, x):
        return [_gathered(x, self.axis, np.arange(x.shape[self.axis] * self.times) // self.times)]

    def inverse(self):
        return Every(self.axis, self.times)


@dataclasses.dataclass(frozen=True)
class Every:
    """The first of each `times` copies."""

    axis: int
    times: int

    def __call__(self, x):
        if x.shape[self.axis] % self.times:
            raise ValueError(f"dim {self.axis} of {x.shape} does not hold {self.times} copies of each")
        return [_gathered(x, self.axis, np.arange(0, x.shape[self.axis], self.times))]

    def inverse(self):
        return Repeat(self.axis, self.times)


@dataclasses.dataclass(frozen=True)
class Cast:
    old: str
    new: str

    def __call__(self, x):
        if x.dtype.name != self.old:
            raise ValueError(f"dtype is {x.dtype.name}, not {self.old}")
        dtype = jnp.dtype(self.new)
        return [Lazy(x.shape, dtype, lambda box: x.read(box).astype(dtype), x.sources)]

    def inverse(self):
        return Cast(self.new, self.old)


@dataclasses.dataclass(frozen=True)
class Select:
    """Entry k along `axis` is entry entries[k] of `old`. `back` is what the inverse selects, where it is known."""

    axis: int
    entries: tuple[int, ...]
    old: int
    back: tuple[int, ...] | None = None

    def __call__(self, x):
        _expect(x, self.axis, self.old)
        return [_gathered(x, self.axis, np.asarray(self.entries))]

    def inverse(self):
        back = self.back
        if back is None:
            if lost := sorted(set(range(self.old)) - set(self.entries)):
                raise ValueError(f"entries {lost[:6]} of {self.old} were dropped; there is no way back")
            back = tuple(self.entries.index(k) for k in range(self.old))
        return Select(self.axis, back, len(self.entries), self.entries)


@dataclasses.dataclass(frozen=True)
class Mean:
    """Entry k along `axis` is the mean of the entries groups[k], taken in float64 and rounded once."""

    axis: int
    groups: tuple[tuple[int, ...], ...]

    def __call__(self, x):
        size = sum(map(len, self.groups))
        _expect(x, self.axis, size)
        if sorted(k for group in self.groups for k in group) != list(range(size)):
            raise ValueError(f"groups {self.groups} do not hold each of {size} entries once")
        axis = self.axis % len(x.shape)

        def read(box):
            means = []
            for group in self.groups[box[axis]]:
                block = _gathered(x, axis, np.asarray(group)).read(_with(box, axis, 0, len(group)))
                means.append(block.astype(np.float64).mean(axis, keepdims=True).astype(x.dtype))
            return np.concatenate(means, axis)

        return [_made((x,), _resized(x, axis, len(self.groups)), read)]

    def inverse(self):
        size = sum(map(len, self.groups))
        owner = {k: g for g, group in enumerate(self.groups) for k in group}
        return Select(self.axis, tuple(owner[k] for k in range(size)), len(self.groups))


@dataclasses.dataclass(frozen=True)
class Copies:
    """A new dim with `times` copies."""

    dim: int
    times: int

    def __call__(self, x):
        dim = self.dim % (len(x.shape) + 1)

        def read(box):
            one = np.expand_dims(x.read((*box[:dim], *box[dim + 1 :])), dim)
            return np.repeat(one, box[dim].stop - box[dim].start, dim)

        return [_made((x,), (*x.shape[:dim], self.times, *x.shape[dim:]), read)]

    def inverse(self):
        return First(self.dim, self.times)


@dataclasses.dataclass(frozen=True)
class First:
    """The first entry of a dim that holds copies."""

    dim: int
    times: int

    def __call__(self, x):
        dim = self.dim % len(x.shape)
        _expect(x, dim, self.times)
        read = lambda box: x.read((*box[:dim], slice(0, 1), *box[dim:])).squeeze(dim)
        return [_made((x,), (*x.shape[:dim], *x.shape[dim + 1 :]), read)]

    def inverse(self):
        return Copies(self.dim, self.times)


@dataclasses.dataclass(frozen=True)
class Compute:
    """A function of arrays that are whole along `axis` and of any size elsewhere; see `layout.compute`."""

    forward: Callable[..., tuple[np.ndarray, ...]]
    backward: Callable[..., tuple[np.ndarray, ...]] | None
    axis: int

    def __call__(self, *xs):
        if len({len(x.shape) for x in xs}) != 1 or not xs[0].shape:
            raise ValueError(f"the arrays have {[len(x.shape) for x in xs]} dims; they need the same, one or more")
        axis = self.axis % len(xs[0].shape)
        rest = {_resized(x, axis, 0) for x in xs}
        if len(rest) != 1:
            raise ValueError(f"the arrays differ beside axis {axis}: {[x.shape for x in xs]}")
        thin = [np.zeros([n if d == axis else 1 for d, n in enumerate(x.shape)], x.dtype) for x in xs]
        made = self.forward(*thin)
        sources = frozenset().union(*(x.sources for x in xs))

        def reader(k):
            def read(box):
                parts = self.forward(*(x.read(_with(box, axis, 0, x.shape[axis])) for x in xs))
                return parts[k][_with((slice(None),) * len(box), axis, box[axis].start, box[axis].stop)]

            return read

        return [
            Lazy(_resized(xs[0], axis, y.shape[axis]), np.dtype(y.dtype), reader(k), sources)
            for k, y in enumerate(made)
        ]

    def inverse(self):
        if self.backward is None:
            raise ValueError("a computed array has no way back; give `inverse`")
        return Compute(self.backward, self.forward, self.axis)


@dataclasses.dataclass(frozen=True)
class Stage:
    stages: int
    rounds: int

    def __call__(self, x):
        if not x.shape or x.shape[0] % (self.stages * self.rounds):
            raise ValueError(f"{x.shape[:1]} layers do not divide over {self.stages} stages x {self.rounds} rounds")
        return SplitDim(0, (self.stages, x.shape[0] // self.stages))(_gathered(x, 0, self.order(x.shape[0])))

    def order(self, layers: int) -> np.ndarray:
        """Which layer stands at each place, stage after stage."""
        return np.arange(layers).reshape(self.rounds, self.stages, -1).swapaxes(0, 1).reshape(-1)

    def inverse(self):
        return Unstage(self.stages, self.rounds)


@dataclasses.dataclass(frozen=True)
class Unstage:
    stages: int
    rounds: int

    def __call__(self, x):
        if len(x.shape) < 2 or x.shape[0] != self.stages or x.shape[1] % self.rounds:
            raise ValueError(f"shape {x.shape} is not one of {self.stages} stages x {self.rounds} rounds")
        (flat,) = MergeDims(0, x.shape[:2])(x)
        return [_gathered(flat, 0, np.argsort(Stage(self.stages, self.rounds).order(flat.shape[0])))]

    def inverse(self):
        return Stage(self.stages, self.rounds)


def _made(xs: tuple[Lazy, ...], shape: tuple[int, ...], read: Callable[[Box], np.ndarray]) -> Lazy:
    return Lazy(shape, xs[0].dtype, read, frozenset().union(*(x.sources for x in xs)))


def _gathered(x: Lazy, axis: int, index: np.ndarray) -> Lazy:
    """Entry k along `axis` is entry index[k] of x."""
    axis %= len(x.shape)

    def read(box):
        wanted = index[box[axis]]
        first = int(wanted.min())
        block = x.read(_with(box, axis, first, int(wanted.max()) + 1))
        if np.array_equal(wanted, np.arange(first, first + len(wanted))):
            return block
        return np.take(block, wanted - first, axis)

    return _made((x,), _resized(x, axis, len(index)), read)


def _with(box: Box, axis: int, start: int, stop: int) -> Box:
    return (*box[:axis], slice(start, stop), *box[axis + 1 :])


def _resized(x: Lazy, axis: int, size: int) -> tuple[int, ...]:
    shape = list(x.shape)
    shape[axis] = size
    return tuple(shape)


def _expect(x: Lazy, axis: int, size: int) -> None:
    if x.shape[axis] != size:
        raise ValueError(f"dim {axis} of {x.shape} is not {size}")
