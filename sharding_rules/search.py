"""The exact search: which logical axis goes to which mesh axis, so that a step takes the least time.

The cost is a sum over distinct steps, each a function of the few axes in it, so branch and bound over axes with the
sum of the steps' own minima as the bound visits a small part of the layouts and still proves the best one.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from sharding_rules.cost import CostModel, Traffic
from sharding_rules.hardware import Hardware, find_hardware
from sharding_rules.infer import Inferred
from sharding_rules.plan import Plan, make_plan, place, store

# What the house's mesh axes mean: the batch is split over BATCH, positions over SEQUENCE, experts over EXPERTS;
# parameters rest split over STORED (and are gathered when used). Stages take whole layers. Any other axis is free.
BATCH, SEQUENCE, EXPERTS, STORED, STAGES = ("dp", "fsdp", "ep"), ("cp",), ("ep",), ("fsdp", "cp"), ("pp",)

Choice = tuple[str, ...]


def search(
    model: Inferred,
    mesh_shape: Mapping[str, int],
    hardware: str | Path | Hardware = "h200",
    *,
    memory: float | None = None,
) -> Plan:
    """The layout of least time, proven so.

    Args:
      model: what `infer` found.
      mesh_shape: mesh axis -> size, outermost first. dp, fsdp, ep, cp and pp mean what they mean in the house; an axis
        of any other name (tp) is free to split any parameter axis.
      hardware: a name (h200, h100, a100, v5e, v5p, v6e, tpu7x, cpu), a .toml file or a Hardware.
      memory: bytes per device for parameters, gradients and Adam's moments; by default the hardware's.

    Raises:
      ValueError: no axis divides by a mesh axis, or the memory limit cannot be met.
    """
    problem = Problem(model, mesh_shape, find_hardware(hardware))
    limit = problem.hardware.memory if memory is None else memory
    best = problem.solve(limit)
    if not best:
        smallest = problem.solve(math.inf, by_memory=True)[0].bytes
        raise ValueError(
            f"no layout over {dict(mesh_shape)} keeps parameters, gradients and moments within {limit / 1e9:.4g} GB "
            f"per device: the smallest needs {smallest / 1e9:.4g} GB; raise memory= or use more devices"
        )
    return make_plan(problem, best[0], best[1] if len(best) > 1 else None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A complete choice and what it costs."""

    splits: Mapping[int, Choice]
    seconds: float
    bytes: float


@dataclasses.dataclass
class Factor:
    """A part of the cost that depends on the axes in `scope` alone; returns (seconds, bytes)."""

    scope: tuple[int, ...]
    evaluate: Callable[[Mapping[int, Choice]], tuple[float, float]]
    cache: dict[tuple[Choice, ...], tuple[float, float]] = dataclasses.field(default_factory=dict)
    least: tuple[float, float] = (0.0, 0.0)

    def __call__(self, splits: Mapping[int, Choice]) -> tuple[float, float]:
        key = tuple(splits.get(i, ()) for i in self.scope)
        if key not in self.cache:
            self.cache[key] = self.evaluate(splits)
        return self.cache[key]


class Problem:
    """The axes that may be chosen, their domains, and the cost as a sum of factors."""

    def __init__(self, model: Inferred, mesh_shape: Mapping[str, int], hardware: Hardware):
        for axis, size in mesh_shape.items():
            if size < 1:
                raise ValueError(f"mesh axis {axis}={size}: sizes are at least 1")
        self.model, self.hardware, self.mesh_shape = model, hardware, dict(mesh_shape)
        stages = [f"{m}={mesh_shape[m]} takes whole layers: nothing is split over it here" for m in STAGES
                  if mesh_shape.get(m, 1) > 1]  # fmt: skip
        self.notes: list[str] = stages
        self.free = [a for a in mesh_shape if a not in (*BATCH, *SEQUENCE, *EXPERTS, *STORED, *STAGES)]
        self.stored = tuple(a for a in STORED if mesh_shape.get(a, 1) > 1)
        self.mesh, self.parents = self._refine()
        self.cost = CostModel(self.mesh, hardware, self.stored, self.parents.values())
        self.fixed = self._fixed()
        self.domains = self._domains()
        self.visited = 0

    def _refine(self) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
        """Cuts a free axis that exceeds the kv heads in two: one part splits kv heads, the other the group of each."""
        named = {a.name: a for a in self.model.logical}
        kv, group = named.get("kv_heads"), named.get("q_groups")
        mesh: dict[str, int] = {}
        parents: dict[str, tuple[str, ...]] = {}
        for axis, n in self.mesh_shape.items():
            fits = kv and group and 1 < kv.size < n and n % kv.size == 0 and group.size % (n // kv.size) == 0
            if axis in self.free and fits and kv and not parents:
                parents[axis] = (f"{axis}:0", f"{axis}:1")
                mesh |= {f"{axis}:0": kv.size, f"{axis}:1": n // kv.size}
            else:
                mesh[axis] = n
        return mesh, parents

    def _fixed(self) -> dict[int, Choice]:
        fixed: dict[int, Choice] = {}
        for role, wanted in (("batch", BATCH), ("seq", SEQUENCE), ("experts", EXPERTS)):
            for axis in self.model.logical:
                if axis.name != role:
                    continue
                placed: list[str] = []
                for m in wanted:
                    n = self.mesh_shape.get(m, 1)
                    if n > 1 and axis.why_whole:
                        self.notes.append(f"{role} is not split over {m}={n}: {axis.why_whole}")
                    elif n > 1 and axis.size % (n * math.prod(self.mesh[p] for p in placed)):
                        self.notes.append(f"{role}={axis.size} is not divisible by {m}={n}: not split over it")
                    elif n > 1:
                        placed.append(m)
                fixed[axis.id] = tuple(placed)
        return fixed

    def _domains(self) -> dict[int, list[Choice]]:
        domains: dict[int, list[Choice]] = {}
        free = [a for a in self.free if self.mesh_shape[a] > 1]
        candidates = [
            a for a in self.model.logical if a.in_params and not a.why_whole and a.name not in ("batch", "seq")
        ]
        for axis in candidates:
            base = self.fixed.get(axis.id, ())
            options = [base]
            for k in range(1, len(free) + 1):
                for chosen in itertools.combinations(free, k):
                    n = math.prod(self.mesh_shape[m] for m in (*base, *chosen))
                    if axis.leads and axis.size % n == 0:
                        options.append((*base, *(part for m in chosen for part in self.parents.get(m, (m,)))))
            for whole, (outer, inner) in self.parents.items():
                if axis.name in ("kv_heads", "q_groups"):
                    options.append((outer if axis.name == "kv_heads" else inner,))
                if axis.name == "kv_heads":
                    n = self.mesh_shape[whole]
                    self.notes.append(
                        f"{whole}={n} exceeds kv_heads={axis.size}: query heads are split, kv heads rest whole"
                    )
            if len(options) > 1:
                domains[axis.id] = options
        for m in free:
            parts = self.parents.get(m, (m,))
            if not any(parts[-1] in option for options in domains.values() for option in options):
                sizes = ", ".join(sorted({f"{a.name}={a.size}" for a in candidates if a.leads}))
                raise ValueError(
                    f"no axis divides by {m}={self.mesh_shape[m]}; the axes that may be split are {sizes or 'none'}"
                )
        return domains

    def factors(self) -> list[Factor]:
        grouped: dict[tuple[int, ...], list] = {}
        for step, count in self.model.steps.items():
            scope = tuple(sorted({axis for axis, _ in step.space if axis in self.domains}))
            grouped.setdefault(scope, []).append((step, count))
        made = []
        for scope, steps in grouped.items():

            def evaluate(splits, steps=steps):
                return sum(self.cost.cost(step, count, splits).seconds for step, count in steps), 0.0

            made.append(Factor(scope, evaluate))
        for leaf, dims in enumerate(self.model.params):
            scope = tuple(sorted({i for dim in dims for i in dim if i in self.domains}))
            made.append(Factor(scope, lambda splits, leaf=leaf: self.leaf_cost(leaf, splits)))
        for factor in made:
            options = itertools.product(*(self.domains[i] for i in factor.scope))
            costs = [factor({**self.fixed, **dict(zip(factor.scope, o, strict=True))}) for o in options]
            factor.least = min(c[0] for c in costs), min(c[1] for c in costs)
        return made

    def solve(self, limit: float, by_memory: bool = False) -> list[Layout]:
        """The two best layouts within `limit` bytes, best first."""
        factors = self._factors = getattr(self, "_factors", None) or self.factors()
        order = sorted(self.domains, key=lambda i: (-sum(f.least[0] for f in factors if i in f.scope), i))
        done_at: list[list[Factor]] = [[] for _ in range(len(order) + 1)]
        for f in factors:
            done_at[max((order.index(i) + 1 for i in f.scope), default=0)].append(f)
        rest = [(0.0, 0.0)] * (len(order) + 2)
        for depth in range(len(order), -1, -1):
            least = [f.least for f in done_at[depth]]
            rest[depth] = rest[depth + 1][0] + sum(s for s, _ in least), rest[depth + 1][1] + sum(b for _, b in least)
        best: list[Layout] = []
        splits = dict(self.fixed)

        def rank(layout: Layout) -> tuple[float, float]:
            return (layout.bytes, layout.seconds) if by_memory else (layout.seconds, layout.bytes)

        def descend(depth: int, seconds: float, size: float) -> None:
            for f in done_at[depth]:
                s, b = f(splits)
                seconds, size = seconds + s, size + b
            bound = Layout({}, seconds + rest[depth + 1][0], size + rest[depth + 1][1])
            if bound.bytes > limit or (len(best) == 2 and rank(bound) >= rank(best[1])):
                return
            if depth == len(order):
                self.visited += 1
                best.append(Layout(dict(splits), seconds, size))
                best.sort(key=rank)
                del best[2:]
                return
            for option in reversed(self.domains[order[depth]]):
                splits[order[depth]] = option
                descend(depth + 1, seconds, size)
            del splits[order[depth]]

        descend(0, 0.0, 0.0)
        return best

    # Parameters at rest ----------------------------------------------------------------------------------------------

    def table(self, splits: Mapping[int, Choice]) -> dict[str, Choice]:
        """The choice by name: how parameters are split in computation."""
        table = {a.name: splits[a.id] for a in self.model.logical if splits.get(a.id)}
        for whole, (outer, inner) in self.parents.items():
            for name in table:
                table[name] = tuple(whole if m == outer else m for m in table[name] if m != inner) or table[name]
            if splits.get(self.named("kv_heads")) == (outer,):
                del table["kv_heads"]
            if splits.get(self.named("q_groups")) == (inner,):
                del table["q_groups"]
                table["q_heads"] = (whole,)
        if "kv_heads" in table and "q_groups" in self.model.sizes:
            table["q_heads"] = table["kv_heads"]
        return table

    def named(self, name: str) -> int:
        return next((a.id for a in self.model.logical if a.name == name), -1)

    def place(self, leaf: int, splits: Mapping[int, Choice]) -> list[list[str]]:
        return place(self.model.parts(leaf), self.table(splits), self.model.sizes, self.mesh_shape)

    def rest(self, leaf: int, splits: Mapping[int, Choice]) -> list[list[str]]:
        placed = self.place(leaf, splits)
        return store(self.model.leaves[leaf].shape, self.model.parts(leaf), placed, self.stored, self.mesh_shape)

    def leaf_traffic(self, leaf: int, splits: Mapping[int, Choice]) -> list[Traffic]:
        """Gathering a stored parameter where it is read."""
        computed, resting = self.place(leaf, splits), self.rest(leaf, splits)
        over = tuple(m for m in self.stored if any(m in p for p in resting) and not any(m in p for p in computed))
        reads = self.model.reads.get(leaf, 0)
        if not over or not reads:
            return []
        array = self.model.leaves[leaf]
        payload = math.prod(array.shape) * array.dtype.itemsize
        payload /= math.prod(self.mesh_shape[m] for p in computed for m in p)
        for dim in self.model.params[leaf]:
            # A loop gathers one layer each time; slices of a stack are gathered one by one and make up the whole.
            walked = [self.model.logical[i] for i in dim]
            payload /= math.prod(a.size for a in walked if a.loop and not a.segments)
        return [Traffic("all-gather", payload, over, reads, "a stored parameter is read")]

    def leaf_bytes(self, leaf: int, splits: Mapping[int, Choice]) -> float:
        """Bytes per device of a parameter."""
        array = self.model.leaves[leaf]
        split = math.prod(self.mesh_shape[m] for p in self.rest(leaf, splits) for m in p)
        return math.prod(array.shape) * array.dtype.itemsize / split

    def leaf_cost(self, leaf: int, splits: Mapping[int, Choice]) -> tuple[float, float]:
        seconds = sum(self.cost.seconds(t) for t in self.leaf_traffic(leaf, splits))
        size = self.leaf_bytes(leaf, splits)
        items = size / self.model.leaves[leaf].dtype.itemsize
        # In training a gradient of the same type and two float32 moments are held beside it, and all are read and
        # written once.
        held = 2 * size + 8 * items if self.model.train else size
        return seconds + held / self.hardware.memory_bandwidth, held

    def traffic(self, splits: Mapping[int, Choice]) -> list[Traffic]:
        """Every collective of a layout, in program order."""
        found = [t for step, n in self.model.steps.items() for t in self.cost.cost(step, n, splits).traffic]
        found += [t for leaf in range(len(self.model.leaves)) for t in self.leaf_traffic(leaf, splits)]
        joined: dict[tuple, Traffic] = {}
        for t in found:
            key = t.kind, t.payload, t.axes, t.why
            before = joined[key].count if key in joined else 0
            joined[key] = dataclasses.replace(t, count=before + t.count)
        return [t for t in joined.values() if t.count]

    def seconds(self, splits: Mapping[int, Choice]) -> float:
        return sum(f(splits)[0] for f in self._factors)


def evaluate(
    model: Inferred, mesh_shape: Mapping[str, int], table: Mapping[str, Choice], hardware: str | Path | Hardware = "cpu"
) -> "Plan":
    """The plan of given rules (logical axis name -> mesh axes), with what it costs: for hand-written layouts."""
    problem = Problem(model, mesh_shape, find_hardware(hardware))
    problem._factors = problem.factors()
    splits = dict(problem.fixed)
    for axis in model.logical:
        wanted = tuple(p for m in table.get(axis.name, ()) for p in problem.parents.get(m, (m,)))
        for whole, parts in problem.parents.items():  # query heads over an axis that exceeds the kv heads
            if whole in table.get("q_heads", ()) and axis.name in ("kv_heads", "q_groups") and not wanted:
                wanted = (parts[0] if axis.name == "kv_heads" else parts[1],)
        if axis.id in problem.domains and wanted:
            splits[axis.id] = wanted
    costs = [f(splits) for f in problem._factors]
    return make_plan(problem, Layout(splits, sum(s for s, _ in costs), sum(b for _, b in costs)), None)


__all__ = ["Layout", "Problem", "evaluate", "search"]
