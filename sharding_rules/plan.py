"""A plan: rules and the PartitionSpec of every parameter, with reasons; saved as a TOML file that a person edits."""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules.applied import Cut, applied
from sharding_rules.cost import Traffic
from sharding_rules.rules import Rules

if TYPE_CHECKING:
    from sharding_rules.search import Layout, Problem
    from sharding_rules.verify import Verification

Parts = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """One parameter: `parts` names the logical axes of each dim, `computed` and `spec` say what splits it."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    parts: Parts
    computed: P  # in computation
    spec: P  # at rest
    bytes: int  # per device, at rest
    cut: Cut | None = None  # how it is computed by segments
    why: str = ""

    @property
    def axes(self) -> tuple[str | None, ...]:
        return tuple("*".join(part) or None for part in self.parts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan costs: one step on one device."""

    seconds: float
    bytes: float  # held: parameters, gradients and moments
    traffic: tuple[Traffic, ...]
    mesh: Mapping[str, int]  # sizes of the axes in `traffic`

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one step."""
        return sum(t.wire(self.mesh) for t in self.traffic)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rules for one model on one mesh; `print(plan.explain())` for the table, `plan.save("rules.toml")` for the file.

    Attributes:
      mesh_shape: mesh axis -> size.
      rules: logical axis -> mesh axes, at rest and in computation.
      sizes: logical axis -> size.
      segments: fused axis -> the axes of each segment, for those that are computed by segments.
      leaves: every parameter, in the order of the tree.
      prediction, runner_up: what it costs, and the second best layout (its rules and its prediction).
      notes: what could not be split as asked.
    """

    mesh_shape: Mapping[str, int]
    hardware: str
    rules: Rules
    sizes: Mapping[str, int]
    leaves: tuple[Leaf, ...]
    segments: Mapping[str, Parts] = dataclasses.field(default_factory=dict)
    treedef: Any = None
    prediction: Prediction | None = None
    runner_up: tuple[Mapping[str, tuple[str, ...]], float] | None = None
    visited: str = ""
    notes: tuple[str, ...] = ()

    @property
    def specs(self) -> Any:
        """The tree of PartitionSpecs at rest; {path: spec} for a plan that was loaded without its parameters."""
        return self._tree([leaf.spec for leaf in self.leaves])

    @property
    def compute_specs(self) -> Any:
        """The tree of PartitionSpecs that parameters have in computation, after stored parts are gathered."""
        return self._tree([leaf.computed for leaf in self.leaves])

    def shardings(self, mesh: Mesh) -> Any:
        """`specs` as NamedShardings on `mesh`: what jax.device_put, or jaxscale's parity(shardings=...), takes."""
        return self._tree([NamedSharding(mesh, leaf.spec) for leaf in self.leaves])

    def _tree(self, values: Sequence[Any]) -> Any:
        if self.treedef is None:
            return dict(zip((leaf.path for leaf in self.leaves), values, strict=True))
        return jax.tree.unflatten(self.treedef, values)

    def explain(self) -> str:
        """The table of parameters with reasons, the collectives, the cost and the runner-up, as text."""
        from sharding_rules.explain import text

        return text(self)

    def _repr_html_(self) -> str:
        from sharding_rules.explain import html

        return html(self)

    def __str__(self) -> str:
        return self.explain()

    def save(self, path: str | Path) -> None:
        """Writes the rules as TOML; `Plan.load` reads it back, edited or not."""
        Path(path).write_text(_toml(self))

    def apply(self, fn: Callable, mesh: Mesh) -> Callable:
        """`fn` with the plan said inside, to be compiled with `specs` on a mesh of Auto axes; see `applied.applied`."""
        return applied(self, fn, mesh)

    def verify(self, fn: Callable, params: Any, *args: Any, **options: Any) -> "Verification":
        """Compiles `fn` under the plan, counts its collectives and compares its numbers; see `verify.verify`."""
        from sharding_rules.verify import verify

        return verify(self, fn, params, *args, **options)

    @classmethod
    def load(cls, path: str | Path, params: Any = None) -> "Plan":
        """Reads a saved plan and resolves its rules anew.

        Args:
          path: the file.
          params: the parameters or their shapes, to check the file against and to give `specs` their tree.

        Raises:
          ValueError: the file contradicts itself, the mesh or the parameters; with the line.
        """
        return _load(Path(path), params)


def make_plan(problem: "Problem", best: "Layout", second: "Layout | None") -> Plan:
    from sharding_rules.explain import reasons

    model, mesh = problem.model, problem.mesh_shape
    table = problem.table(best.splits)
    stored = {"embed": (*table.get("embed", ()), *problem.stored)} if problem.stored else {}
    rules = Rules(
        params={n: a for n, a in (table | stored).items() if n in model.sizes and n not in ("batch", "seq")},
        compute=table,
        spill=problem.stored,
    )
    why = reasons(problem, best)
    leaves = []
    for i, (path, array) in enumerate(zip(model.paths, model.leaves, strict=True)):
        leaves.append(
            make_leaf(
                path, array.shape, str(array.dtype), model.parts(i), table, problem.stored, model.sizes, mesh,
                model.segments,
            )
        )  # fmt: skip
        leaves[-1] = dataclasses.replace(leaves[-1], why=why[i])
    runner_up = (problem.table(second.splits), second.seconds) if second else None
    options = math.prod(map(len, problem.domains.values()))
    return Plan(
        mesh_shape=dict(mesh),
        hardware=problem.hardware.name,
        rules=rules,
        sizes=model.sizes,
        leaves=tuple(leaves),
        segments=model.segments,
        treedef=model.treedef,
        prediction=Prediction(
            seconds=best.seconds, bytes=best.bytes, traffic=tuple(problem.traffic(best.splits)), mesh=problem.mesh
        ),
        runner_up=runner_up,
        visited=f"{problem.visited} of {options} layouts evaluated in full, the others cannot be better",
        notes=(
            *dict.fromkeys(problem.notes),
            *(f"the primitive {n} is not known: its dims stay whole" for n in model.unknown),
        ),
    )


def make_leaf(path, shape, dtype, parts: Parts, table, stored, sizes, mesh, segments: Mapping[str, Parts]) -> Leaf:
    computed = place(parts, table, sizes, mesh)
    fused = [d for d, part in enumerate(parts) if part and part[0] in segments]
    cut = _cut(parts, fused[0], table, sizes, mesh, segments) if fused else None
    resting = store(shape, parts, computed, stored, mesh)
    split = math.prod(mesh[m] for p in resting for m in p)
    size = math.prod(shape) * jax.numpy.dtype(dtype).itemsize // split
    return Leaf(path=path, shape=tuple(shape), dtype=dtype, parts=parts, computed=_spec(computed), spec=_spec(resting),
                bytes=size, cut=cut)  # fmt: skip


def _cut(parts: Parts, d: int, table, sizes, mesh, segments: Mapping[str, Parts]) -> Cut | None:
    """How the fused dim d is computed by segments: split alike in all of them, or not at all."""
    inside = [(*segment, *parts[d][1:]) for segment in segments[parts[d][0]]]
    axes = {tuple(place((*parts[:d], names, *parts[d + 1 :]), table, sizes, mesh)[d]) for names in inside}
    if len(axes) > 1 or axes == {()}:
        return None
    (split,) = axes
    widths = tuple(math.prod(sizes[name] for name in names) for names in inside)
    return Cut(dim=d - len(parts), sizes=widths, groups=math.prod(mesh[m] for m in split), axes=split)


def place(parts: Parts, table: Mapping[str, Sequence[str]], sizes: Mapping[str, int], mesh) -> list[list[str]]:
    """Mesh axes of each dim of a parameter in computation.

    A mesh axis splits the first dim that asks for it. Within a fused dim only the leading part is split, unless the
    parts before are used up: heads stay whole.
    """
    used: set[str] = set()
    placed: list[list[str]] = []
    for dim in parts:
        found: list[str] = []
        for name in dim:
            degree = 1
            for m in table.get(name, ()):
                if m not in used and mesh.get(m, 1) > 1 and sizes[name] % (degree * mesh[m]) == 0:
                    found.append(m)
                    used.add(m)
                    degree *= mesh[m]
            if degree != sizes[name]:
                break
        placed.append(found)
    return placed


def store(shape, parts: Parts, placed: Sequence[Sequence[str]], stored: Sequence[str], mesh) -> list[list[str]]:
    """Adds the storage axes: to the embed dim if it divides, otherwise to the largest that does."""
    placed = [list(p) for p in placed]
    for axis in stored:
        if any(axis in p for p in placed):
            continue
        fits = []
        for d, names in enumerate(parts):
            split = math.prod(mesh[m] for m in placed[d]) * mesh[axis]
            if names and not names[0].startswith("layers") and shape[d] % split == 0:
                fits.append((names[0] == "embed", shape[d] // split, -d))
        if fits:
            placed[-max(fits)[2]].append(axis)
    return placed


def _spec(placed: Sequence[Sequence[str]]) -> P:
    return P(*(None if not p else p[0] if len(p) == 1 else tuple(p) for p in placed))


# The file ------------------------------------------------------------------------------------------------------------


def _toml(plan: Plan) -> str:
    def listing(names: Sequence[str]) -> str:
        return json.dumps(list(names))

    lines = [
        "# Tensor-parallel rules. [rules] says which mesh axes split each logical axis: edit there, then load it.",
        "# A fused dim is written major*minor; only its leading part is split. [stored] axes also split a parameter at",
        "# rest, which is then gathered where it is used.",
        f"hardware = {json.dumps(plan.hardware)}",
        f"stored = {listing(plan.rules.spill)}",
        "",
        "[mesh]",
        *(f"{axis} = {size}" for axis, size in plan.mesh_shape.items()),
        "",
        "[axes]",
        *(f"{_key(name)} = {size}" for name, size in plan.sizes.items()),
        "",
        "[rules]",
    ]
    for name in plan.sizes:
        lines.append(f"{_key(name)} = {listing(plan.rules.compute.get(name, ()))}")
    if plan.segments:
        lines += ["", "# Fused axes that are computed by segments: the axes of each segment.", "[segments]"]
        for name, segments in plan.segments.items():
            lines.append(f"{_key(name)} = {listing(['*'.join(segment) for segment in segments])}")
    lines += ["", "[params]"]
    for leaf in plan.leaves:
        axes = listing([axis or "" for axis in leaf.axes])
        lines += [
            f"# {leaf.spec}: {leaf.why}" if leaf.why else f"# {leaf.spec}",
            f"{_key(leaf.path)} = {{ shape = {list(leaf.shape)}, dtype = {json.dumps(leaf.dtype)}, axes = {axes} }}",
        ]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _load(path: Path, params: Any) -> Plan:
    text = path.read_text()
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None

    def fail(section: str, key: str, message: str):
        raise ValueError(f"{path}:{_line(text, section, key)}: {message}")

    for section in ("mesh", "axes", "rules", "params"):
        if not isinstance(data.get(section), dict):
            raise ValueError(f"{path}: the section [{section}] is missing")
    mesh, sizes, table = data["mesh"], data["axes"], {n: tuple(a) for n, a in data["rules"].items()}
    for axis, size in mesh.items():
        if not isinstance(size, int) or size < 1:
            fail("mesh", axis, f"mesh axis {axis} = {size!r}: expected a size of at least 1")
    for name, axes in table.items():
        if name not in sizes:
            fail("rules", name, f"no logical axis is named {name!r}{_near(name, sizes)}")
        for m in axes:
            if m not in mesh:
                fail("rules", name, f"{name} names mesh axis {m!r}{_near(m, mesh)}; the mesh has {', '.join(mesh)}")
        if len(set(axes)) != len(axes):
            fail("rules", name, f"{name} = {list(axes)} names a mesh axis twice")
        n = math.prod(mesh[m] for m in axes)
        if sizes[name] % n:
            fail("rules", name, f"{name}={sizes[name]} is not divisible by {n}, the size of {'*'.join(axes)}")
    stored = tuple(data.get("stored", ()))
    for m in stored:
        if m not in mesh:
            raise ValueError(f"{path}:{_line(text, '', 'stored')}: stored names mesh axis {m!r}{_near(m, mesh)}")
    segments = {
        n: tuple(tuple(s.split("*")) if s else () for s in entry) for n, entry in data.get("segments", {}).items()
    }
    for name, inside in segments.items():
        for part in (part for segment in inside for part in segment):
            if part not in sizes:
                fail("segments", name, f"no logical axis is named {part!r}{_near(part, sizes)}")
        if (total := sum(math.prod(sizes[part] for part in segment) for segment in inside)) != sizes.get(name, total):
            fail("segments", name, f"{name}={sizes[name]} cannot be segments of {total} together")
    leaves = []
    for name, entry in data["params"].items():
        parts = tuple(tuple(a.split("*")) if a else () for a in entry["axes"])
        shape = tuple(entry["shape"])
        if len(parts) != len(shape):
            fail("params", name, f"{name} has {len(shape)} dims but {len(parts)} axes")
        owner: dict[str, str] = {}
        for size, dim in zip(shape, parts, strict=True):
            for part in dim:
                if part not in sizes:
                    fail("params", name, f"no logical axis is named {part!r}{_near(part, sizes)}")
            if math.prod(sizes[part] for part in dim) != size:
                fail("params", name, f"a dim of {size} cannot be {'*'.join(dim)} = {[sizes[p] for p in dim]}")
            lead = dim[0] if dim else ""
            for m in table.get(lead, ()):
                if owner.setdefault(m, lead) != lead and mesh[m] > 1:
                    fail(
                        "rules",
                        lead,
                        f"{lead} and {owner[m]} are both split over {m} but meet in {name}; take {m} from one of them",
                    )
        leaves.append(make_leaf(name, shape, entry["dtype"], parts, table, stored, sizes, mesh, segments))
    treedef = None
    if params is not None:
        leaves, treedef = _match(path, text, leaves, params)
    rules = Rules(
        params={n: a for n, a in table.items() if a and n not in ("batch", "seq")}
        | ({"embed": (*table.get("embed", ()), *stored)} if stored else {}),
        compute={n: a for n, a in table.items() if a},
        spill=stored,
    )
    return Plan(
        mesh_shape=mesh, hardware=data.get("hardware", "cpu"), rules=rules, sizes=sizes, leaves=tuple(leaves),
        segments=segments, treedef=treedef,
    )  # fmt: skip


def _match(path: Path, text: str, leaves: list[Leaf], params: Any):
    from sharding_rules.infer import path_name

    found = {leaf.path: leaf for leaf in leaves}
    ordered = []
    for key, array in jax.tree_util.tree_leaves_with_path(params):
        name = path_name(key)
        if name not in found:
            raise ValueError(f"{path}: the parameter {name!r} has no line{_near(name, found)}")
        if tuple(array.shape) != found[name].shape:
            raise ValueError(
                f"{path}:{_line(text, 'params', name)}: {name} is written as {list(found[name].shape)} "
                f"but the parameter is {list(array.shape)}"
            )
        ordered.append(found.pop(name))
    for name in found:
        raise ValueError(f"{path}:{_line(text, 'params', name)}: the model has no parameter {name!r}")
    return ordered, jax.tree.structure(params)


def _near(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _line(text: str, section: str, key: str) -> int:
    """The line of a key in a section, from 1."""
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[(\w+)\]", line):
            here = match[1]
        elif here == section and re.match(rf"\s*(?:{re.escape(key)}|{re.escape(json.dumps(key))})\s*=", line):
            return number
    return 0
