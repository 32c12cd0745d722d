"""Reasons: why each parameter is split as it is, as text and as an HTML table."""

import html as html_
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sharding_rules.plan import Plan
    from sharding_rules.search import Layout, Problem


def text(plan: "Plan") -> str:
    rows = [("parameter", "shape", "axes", "spec", "bytes/device", "why"), *_rows(plan)]
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(r[:5], widths, strict=True)), r[5]]).rstrip() for r in rows]
    lines.insert(1, "  ".join("-" * w for w in [*widths, 3]))
    return "\n".join([*lines, "", *_summary(plan)])


def html(plan: "Plan") -> str:
    head = "".join(f"<th>{c}</th>" for c in ("parameter", "shape", "axes", "spec", "bytes/device", "why"))
    body = "".join("<tr>" + "".join(f"<td>{html_.escape(c)}</td>" for c in r) + "</tr>" for r in _rows(plan))
    summary = "".join(f"<div>{html_.escape(line)}</div>" for line in _summary(plan))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{summary}"


def _rows(plan: "Plan") -> list[tuple[str, ...]]:
    return [
        (
            leaf.path,
            "x".join(map(str, leaf.shape)) or "scalar",
            " ".join(a or "1" for a in leaf.axes),
            "P(" + ", ".join("·" if e is None else e if isinstance(e, str) else "+".join(e) for e in leaf.spec) + ")",
            quantity(leaf.bytes, "B"),
            leaf.why,
        )
        for leaf in plan.leaves
    ]


def _summary(plan: "Plan") -> list[str]:
    mesh = ", ".join(f"{a}={n}" for a, n in plan.mesh_shape.items())
    lines = [f"mesh {mesh}; rules " + rule_text(plan.rules.compute)]
    if plan.prediction:
        p = plan.prediction
        lines.append(
            f"predicted on {plan.hardware}: {quantity(p.seconds, 's')} a step, {quantity(p.wire_bytes, 'B')} sent and "
            f"{quantity(p.bytes, 'B')} held per device (activations not counted)"
        )
        joined: dict[tuple, list[float]] = {}
        for t in p.traffic:
            entry = joined.setdefault((t.kind, tuple(a.replace(":", ".") for a in t.axes)), [0, 0])
            entry[0] += t.count
            entry[1] += t.wire(p.mesh)
        for (kind, axes), (count, wire) in sorted(joined.items(), key=lambda item: -item[1][1]):
            lines.append(f"  {count:>5.0f} {kind} over {'+'.join(axes)}: {quantity(wire, 'B')}")
    if plan.runner_up and plan.prediction:
        table, seconds = plan.runner_up
        lines.append(f"runner-up {quantity(seconds, 's')}: {rule_text(table)}")
    if plan.visited:
        lines.append(f"optimal: {plan.visited}")
    return lines + [f"note: {note}" for note in plan.notes]


def rule_text(table: Mapping[str, tuple[str, ...]]) -> str:
    return ", ".join(f"{name}={'+'.join(axes)}" for name, axes in table.items() if axes) or "nothing is split"


def quantity(value: float, unit: str) -> str:
    """1536 -> "1.54 kB"."""
    if value == 0:
        return f"0 {unit}"
    power = min(4, max(-3, math.floor(math.log10(abs(value)) / 3)))
    if unit == "B":
        power = max(power, 0)
    return f"{value / 1000**power:.3g} {['n', 'u', 'm', '', 'k', 'M', 'G', 'T'][power + 3]}{unit}"


def reasons(problem: "Problem", best: "Layout") -> list[str]:
    """One line per parameter."""
    model = problem.model
    contracted, made, looked_up = _uses(problem)
    base = problem.seconds(best.splits)
    dearer: dict[int, float] = {}
    for i, options in problem.domains.items():
        if options[-1] != best.splits.get(i):
            dearer[i] = problem.seconds({**best.splits, i: options[-1]}) - base
    out = []
    for leaf, dims in enumerate(model.params):
        found = []
        for dim, axes in zip(dims, problem.place(leaf, best.splits), strict=True):
            free = [m for m in axes if m in problem.free or m in ("ep",)]
            if not free or not dim:
                continue
            name, over = model._dim_parts(dim)[0], "+".join(free)
            if (leaf, dim[0]) in looked_up:
                found.append(f"{name}-parallel lookup: rows elsewhere count as zero, one all-reduce over {over}")
            elif (leaf, dim[0]) in contracted and len(dims) > 1:
                found.append(f"row-parallel: {name} is summed over here, one all-reduce over {over}")
            elif (leaf, dim[0]) in made:
                users = sorted({model.paths[k] for k, i in contracted if i == dim[0] and k != leaf})
                ends = f"contracted next by {users[0]}, one all-reduce" if users else "kept split by what follows"
                found.append(f"column-parallel: {name} is {ends}")
            else:
                found.append(f"follows {name}, on which it acts")
        if not found:
            found.append(_whole(problem, leaf, best.splits, dearer))
        resting = problem.rest(leaf, best.splits)
        stored = [m for m in problem.stored if any(m in p for p in resting)]
        if stored:
            found.append(f"rests split over {'+'.join(stored)}")
        elif problem.stored:
            found.append("no dim divides by " + "+".join(problem.stored))
        out.append("; ".join(found))
    return out


def _whole(problem: "Problem", leaf: int, splits: Mapping[int, tuple[str, ...]], dearer: Mapping[int, float]) -> str:
    """Why a parameter is whole over the free axes."""
    model = problem.model
    free = [m for m in problem.free if problem.mesh_shape[m] > 1]
    if not free:
        return "whole: the mesh has no axis for it"
    sizes = "+".join(f"{m}={problem.mesh_shape[m]}" for m in free)
    whys = []
    for dim in model.params[leaf]:
        if not dim:
            continue
        axis = model.logical[dim[0]]
        label = "*".join(model._dim_parts(dim))
        if axis.loop:
            continue
        if axis.segments and not axis.loop:
            over = {splits.get(s[0], ()) for s in axis.segments if s} if model.cut(leaf) else set()
            if len(over) == 1 and any(over):
                found = f"each segment is split over {'+'.join(*over)} in computation, its gradient gathered"
                whys.append(f"{label}: {found}; {_permutation(problem, axis)}")
            else:
                whys.append(f"{label}: {_permutation(problem, axis)}")
        elif axis.why_whole:
            whys.append(f"{label}: {axis.why_whole}")
        elif axis.id in dearer:
            more = dearer[axis.id]
            whys.append(
                f"{label}: splitting it costs {quantity(more, 's')} more a step" if more > 0 else f"{label}: no gain"
            )
        elif axis.id in problem.domains:
            whys.append(f"{label}: rests whole, its heads are fewer than {sizes}")
        else:
            whys.append(f"{label}: {axis.size} is not divisible by {sizes}")
    return "whole: " + "; ".join(whys) if whys else "whole: nothing to split"


def _permutation(problem: "Problem", axis) -> str:
    """What would let a segmented dim be split inside each segment."""
    model = problem.model
    sizes = [math.prod(model.logical[i].size for i in s) for s in axis.segments]
    leads = [model.logical[s[0]] for s in axis.segments if s]
    for m in problem.free:
        n = problem.mesh_shape[m]
        if n > 1 and leads and all(a.size % n == 0 and not a.why_whole for a in leads):
            return (
                f"segments of {'+'.join(map(str, sizes))} lie one after another; stored as "
                f"concatenate([part {m} of each segment for each {m} rank], i.e. reshaped to "
                f"({n}, {'+'.join(str(s // n) for s in sizes)}), it could rest split over {m}={n}"
            )
    return f"segments of {'+'.join(map(str, sizes))} lie one after another and are not all divisible"


def permutation(sizes: list[int], n: int) -> list[int]:
    """Indices that put part r of every segment beside each other, for r < n: `w[..., permutation(sizes, n)]`.

    A contiguous split of the result in n gives each device its part of every segment.
    """
    if any(s % n for s in sizes):
        raise ValueError(f"segments of {sizes} are not all divisible by {n}")
    starts = [sum(sizes[:k]) for k in range(len(sizes))]
    return [
        start + r * (size // n) + j
        for r in range(n)
        for start, size in zip(starts, sizes, strict=True)
        for j in range(size // n)
    ]


def _uses(problem: "Problem"):
    """(leaf, axis) pairs that a product sums over, that it brings in, and that indices look up."""
    contracted, made, looked_up = set(), set(), set()
    for use in problem.model.uses:
        leaf, primitive, kinds = use
        for axis, kind in kinds:
            if primitive == "gather" and kind == "r":
                looked_up.add((leaf, axis))
            elif primitive in ("dot_general", "conv_general_dilated", "ragged_dot_general"):
                (contracted if kind == "r" else made).add((leaf, axis))
    return contracted, made - contracted, looked_up
