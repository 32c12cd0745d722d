"""What a layout costs: the collectives that the partitioned program needs, and the time of compute and traffic.

Every array has the layout that its axes give it: each mesh axis splits the first dim that asks for it. A step (an op)
runs, on each mesh axis, split along one of its iteration dims or not at all; inputs that lie otherwise are gathered or
exchanged, an output that was reduced over a split dim is all-reduced. Of the ways to run a step the cheapest is taken.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from sharding_rules.hardware import Hardware
from sharding_rules.hlo import wire_bytes
from sharding_rules.infer import Array, Step

Splits = Mapping[int, tuple[str, ...]]  # logical axis id -> mesh axes


@dataclasses.dataclass(frozen=True, slots=True)
class Traffic:
    """A collective of the predicted program; `payload` is hlo.Collective.bytes: per device and execution."""

    kind: str
    payload: float
    axes: tuple[str, ...]
    count: int
    why: str

    def wire(self, mesh: Mapping[str, int]) -> float:
        """Bytes that a device sends in all executions."""
        return wire_bytes(self.kind, self.payload, math.prod(mesh[a] for a in self.axes)) * self.count


@dataclasses.dataclass(frozen=True, slots=True)
class StepCost:
    traffic: tuple[Traffic, ...]
    seconds: float  # communication, compute and memory traffic of all executions


class CostModel:
    """Costs of steps on a mesh of given sizes."""

    def __init__(self, mesh: Mapping[str, int], hardware: Hardware, stored_over: Iterable[str] = (), parents=()):
        self.parents = tuple(parents)  # pairs of mesh axes that are halves of one: parameters take both or neither
        self.mesh, self.hardware, self.stored_over = dict(mesh), hardware, tuple(stored_over)

    def layout(self, step: Step, array: Array, splits: Splits) -> dict[str, int]:
        """mesh axis -> the iteration dim that it splits."""
        placed: dict[str, int] = {}
        for dim in array.dims:
            for i in dim:
                axis, size = step.space[i]
                degree = 1
                for m in splits.get(axis, ()):
                    if m not in placed:
                        placed[m] = i
                        degree *= self.mesh[m]
                if degree != size:
                    break  # a minor atom is split only under a major one that is used up
        for outer, inner in self.parents if array.is_param else ():
            if (outer in placed) != (inner in placed):
                placed.pop(outer, placed.pop(inner, None))
        return placed

    def bytes(self, step: Step, array: Array, layout: Mapping[str, int], but: str = "") -> float:
        """Bytes per device of an array, as if it were whole on the mesh axis `but`."""
        size = float(array.itemsize)
        for dim in array.dims:
            for i in dim:
                size *= step.space[i][1]
        return size / math.prod(self.mesh[m] for m in layout if m != but)

    def cost(self, step: Step, count: int, splits: Splits) -> StepCost:
        if step.terms:
            return self._sum([self.cost(term, count, splits) for term in step.terms])
        if step.primitive == "elementwise":  # written once; fused operations read what others write
            written = self.bytes(step, step.outs[0], self.layout(step, step.outs[0], splits))
            return StepCost((), count * written / self.hardware.memory_bandwidth)
        relevant = {m for axis, _ in step.space for m in splits.get(axis, ())}
        arrays = (*step.ins, *step.outs)
        layouts = [self.layout(step, a, splits) for a in arrays]
        traffic: list[Traffic] = []
        reduced: dict[int, list[str]] = {}
        degree = 1
        for m in self.mesh:
            if m not in relevant or self.mesh[m] == 1:
                continue
            modes = {i for i, (axis, _) in enumerate(step.space) if m in splits.get(axis, ()) and step.kinds[i] != "b"}
            options = [self._mode(step, count, arrays, layouts, m, mode) for mode in [*sorted(modes), None]]
            _, _, found, partial, split = min(options, key=lambda o: o[:2])
            traffic += found
            for out in partial:
                reduced.setdefault(out, []).append(m)
            degree *= self.mesh[m] if split else 1
        for out, axes in reduced.items():
            n = len(step.ins) + out
            payload = self.bytes(step, arrays[n], layouts[n])
            if exchanged := self._columns(step, axes):
                traffic += self._exchange(step, count, exchanged, layouts)
                axes = [a for a in axes if a not in exchanged]
            scattered = tuple(a for a in axes if a in self.stored_over and step.gradient and self.hardware.scatters)
            kept = tuple(a for a in axes if a not in scattered)
            if scattered:
                traffic.append(Traffic("reduce-scatter", payload, scattered, count, step.primitive))
                payload /= math.prod(self.mesh[a] for a in scattered)
            if kept:
                traffic.append(Traffic("all-reduce", payload, kept, count, step.primitive))
        seconds = sum(self.seconds(t) for t in traffic)
        compute = step.flops / degree / self.hardware.flops
        moved = sum(self.bytes(step, a, x) for a, x in zip(arrays, layouts, strict=True)) if step.flops else 0.0
        return StepCost(tuple(traffic), seconds + count * max(compute, moved / self.hardware.memory_bandwidth))

    def _columns(self, step: Step, axes: Iterable[str]) -> tuple[str, ...]:
        """Storage axes of a looked-up table whose gradient is made by columns: they are the whole mesh."""
        found = tuple(a for a in axes if a in self.stored_over)
        alone = math.prod(self.mesh.values()) == math.prod(self.mesh[a] for a in found)
        return found if step.gradient and step.primitive.startswith("scatter") and alone else ()

    def _exchange(self, step: Step, count: int, axes: tuple[str, ...], layouts) -> list[Traffic]:
        """Every device gets its columns of all rows to be added, and all indices."""
        indices, updates = (self.bytes(step, a, x) for a, x in zip(step.ins, layouts))
        n = math.prod(self.mesh[a] for a in axes)
        return [
            Traffic("all-to-all", updates, axes, count, step.primitive),
            Traffic("all-gather", indices * n, axes, count, step.primitive),
        ]

    def _sum(self, terms: Iterable[StepCost]) -> StepCost:
        """The cost of products that are added: equal all-reduces are one, where the compiler adds first."""
        traffic: list[Traffic] = []
        seconds = 0.0
        for term in terms:
            seconds += term.seconds
            for t in term.traffic:
                if self.hardware.merges and t.kind == "all-reduce" and t in traffic:
                    seconds -= self.seconds(t)
                else:
                    traffic.append(t)
        return StepCost(tuple(traffic), seconds)

    def seconds(self, t: Traffic) -> float:
        if t.count == 0:
            return 0.0
        return t.count * self.hardware.seconds(t.kind, t.wire(self.mesh) / t.count, t.axes, self.mesh)

    def _mode(self, step, count, arrays, layouts, m: str, mode: int | None):
        """(inputs move, seconds, traffic, outputs left partial, compute is split) of running split along `mode`."""
        n = self.mesh[m]
        traffic: list[Traffic] = []
        partial: list[int] = []
        moved = False
        for k, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
            has = mode is not None and any(mode in dim for dim in array.dims)
            at = layout.get(m)
            whole = self.bytes(step, array, layout, but=m)
            is_input = k < len(step.ins)
            if is_input:
                if at is None or (has and at == mode):
                    continue  # whole, so that each device takes its part; or in place
                kind, payload = ("all-to-all", whole / n) if has else ("all-gather", whole)
                moved = True
            else:
                if mode is not None and step.kinds[mode] == "r":
                    if at is None:
                        partial.append(k - len(step.ins))
                        continue
                    kind, payload = "reduce-scatter", whole
                elif not has or at == mode:
                    continue
                else:
                    kind, payload = ("all-gather", whole) if at is None else ("all-to-all", whole / n)
            traffic.append(Traffic(kind, payload, (m,), count, step.primitive))
        seconds = sum(self.seconds(t) for t in traffic)
        for out in partial:
            array = step.outs[out]
            payload = self.bytes(step, array, layouts[len(step.ins) + out])
            seconds += self.seconds(Traffic("all-reduce", payload, (m,), count, ""))
        compute = count * step.flops / self.hardware.flops / (n if mode is not None else 1)
        # The partitioner never moves an input where it need not, even where a sum over the split dim costs more.
        return moved, seconds + compute, traffic, partial, mode is not None
