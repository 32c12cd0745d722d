"""report.html: a plan as one page with pictures, no server, no script; `write_report(found, "report.html")`."""

import html
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder
from jaxscale.params import resolve_param
from jaxscale.plan.aot import CompiledStep
from jaxscale.plan.estimate import Estimate
from jaxscale.plan.search import Plan
from jaxscale.sharding import axes_of
from jaxscale.table import Table, human_bytes
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules

WIDTH = 880  # pixels of every picture
MOST_CELLS = 4096  # devices drawn one by one
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9c6ade", "#a0a0a0", "#c98b5c", "#97bbf5")


def write_report(found: Plan, path: str | Path, compiled: CompiledStep | None = None) -> Path:
    """Writes `report(found, compiled)`; returns where."""
    path = Path(path)
    path.write_text(report(found, compiled), encoding="utf-8")
    return path


def report(found: Plan, compiled: CompiledStep | None = None) -> str:
    """One HTML page: mesh, sharding of each parameter, memory, a step's time, roofline, the alternatives.

    Args:
      compiled: the compiler's answer for the best one; adds its figures beside the estimate's.
    """
    best = found.best
    title = f"{found.model.name} on {found.pod.name}"
    figures = (
        ("mesh", str(best.mesh)),
        ("devices", f"{found.pod.num_devices:,}"),
        ("a step", f"{best.seconds:.3g} s"),
        ("of the matmul rate", f"{best.share_of_peak:.0%}"),
        ("tokens/s", f"{best.tokens / best.seconds:,.0f}"),
        ("memory", f"{best.memory.total / found.pod.hardware.memory:.0%} of {human_bytes(found.pod.hardware.memory)}"),
        ("remat", best.remat),
        ("micro-batches", str(best.accum_steps)),
    )
    cards = "".join(f"<div><b>{_text(value)}</b><span>{_text(name)}</span></div>" for name, value in figures)
    sections = [
        ("Mesh", mesh_picture(best), "One cell is a device; its colour is its place along the innermost split axis."),
        ("Memory of a device", memory_picture(best, compiled), "The estimate; the line is what the device has."),
        ("One step", timeline(best), "Estimated. Pale: hidden behind computation. The order in a phase is schematic."),
        ("Roofline", roofline(best), "FLOPs of the step against the bytes that memory and each link carry for them."),
        ("Alternatives", alternatives_picture(found) + _table(found.table()), f"Runner-up: {found.why}"),
        ("Parameters", _table(parameter_table(found)), "Split at rest and in computation; bytes of one device."),
        ("Collectives", _table(best.traffic_table()), "Payload of one device in one step, by the estimate."),
    ]
    if compiled is not None:
        tables = compiled.table(best), compiled.census.table(), compiled.held().table()
        text = "".join(map(_table, tables))
        sections.insert(0, ("What the compiler says", text, "Compiled ahead of time; no such device is here."))
    body = "".join(
        f"<section><h2>{_text(name)}</h2>{picture}<p>{_text(note)}</p></section>" for name, picture, note in sections
    )
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{_text(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head>"
        f"<body><h1>{_text(title)}</h1><div class='cards'>{cards}</div>{body}</body></html>\n"
    )


STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:920px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
h1{font-size:1.6em;margin-bottom:.4em}h2{font-size:1.15em;margin:0 0 .6em}
section{border-top:1px solid #ddd;padding:1.2em 0}p{color:#666;margin:.5em 0 0}
.cards{display:flex;flex-wrap:wrap;gap:.6em;margin-bottom:1.4em}
.cards div{background:#f3f4f6;border-radius:6px;padding:.5em .8em;display:flex;flex-direction:column}
.cards b{font-size:1.1em}.cards span{color:#666;font-size:.85em}
svg{max-width:100%;height:auto;display:block}svg text{font:12px system-ui,sans-serif;fill:#333}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.85em;margin:.6em 0}caption{text-align:left;color:#666}
th,td{padding:.2em .7em;border-bottom:1px solid #eee;text-align:left;white-space:nowrap}
"""


class Bar(NamedTuple):
    """A stretch of one lane of the timeline."""

    lane: str
    name: str
    start: float  # seconds
    seconds: float
    hidden: bool = False


def schedule(e: Estimate) -> list[Bar]:
    """The estimate laid out in time: forward, backward, update; transfers beside or after the computation they serve.

    What computation hides runs beside it, what it does not hide follows it, so that the last bar ends at e.seconds.
    """
    hw, memory = e.pod.hardware, e.memory
    update = (2 * (memory.params + memory.optimizer) + memory.gradients) / hw.memory_bandwidth
    layers = e.compute_seconds + e.memory_seconds - update
    forward = layers / (4 if e.remat == "full" else 3)
    all_transfers = sum(t.seconds for t in e.transfers)
    exposed = e.exposed_seconds / all_transfers if all_transfers else 0.0
    bars, now = [], 0.0
    for phase, seconds in (("forward", forward), ("backward", layers - forward)):
        bars.append(Bar("computation", phase, now, seconds))
        beside, after = dict[str, float](), now + seconds
        for t in e.transfers:
            part = t.seconds * _share(t.kind, phase)
            if part == 0:
                continue
            lane, name = f"over {t.axes}", f"{t.kind} over {t.axes}, {phase}"
            if exposed < 1:
                start = beside.get(lane, now)  # links of different axes carry at the same time
                bars.append(Bar(lane, f"{name}, hidden", start, part * (1 - exposed), hidden=True))
                beside[lane] = start + part * (1 - exposed)
            if exposed > 0:
                bars.append(Bar(lane, name, after, part * exposed))
                after += part * exposed
        now = after
    bars.append(Bar("computation", "update", now, e.seconds - now))
    return [b for b in bars if b.seconds > 0]


def _share(kind: str, phase: str) -> float:
    """Weights are gathered in both passes; what sums gradients runs in the backward pass alone."""
    if kind in ("all-gather", "all-to-all", "collective-permute"):
        return 0.5
    return 1.0 if phase == "backward" else 0.0


def timeline(e: Estimate) -> str:
    """The schedule as a drawing: a lane for computation and one for each set of mesh axes."""
    bars = schedule(e)
    lanes = list(dict.fromkeys(b.lane for b in bars))
    left, high = 150, 30
    scale = (WIDTH - left - 10) / e.seconds
    names = list(dict.fromkeys(b.name.split(",")[0].split(" over")[0] for b in bars))
    out = []
    for i, lane in enumerate(lanes):
        out.append(f"<text x='{left - 8}' y='{i * high + 20}' text-anchor='end'>{_text(lane)}</text>")
    for b in bars:
        colour = COLOURS[names.index(b.name.split(",")[0].split(" over")[0]) % len(COLOURS)]
        y = lanes.index(b.lane) * high + 4
        out.append(
            f"<rect x='{left + b.start * scale:.1f}' y='{y}' width='{max(b.seconds * scale, 0.5):.1f}' height='22' "
            f"fill='{colour}' opacity='{0.35 if b.hidden else 1}'><title>{_text(b.name)}: {b.seconds * 1e3:.1f} ms"
            f"</title></rect>"
        )
    y = len(lanes) * high
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = left + share * e.seconds * scale
        out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{y}' stroke='#bbb' stroke-dasharray='2 3'/>")
        out.append(
            f"<text x='{x:.1f}' y='{y + 15}' text-anchor='{'end' if share == 1 else 'middle'}'>"
            f"{share * e.seconds:.3g} s</text>"
        )
    return _svg(y + 50, [*out, *_legend(names, y + 40)])


def mesh_picture(e: Estimate) -> str:
    """The devices in mesh order: rows of the outer axes, hosts outlined, coloured along the innermost split axis."""
    sizes = {a: getattr(e.mesh, a) for a in MESH_AXES if getattr(e.mesh, a) > 1}
    total = math.prod(sizes.values())
    inner = list(sizes)[-1] if sizes else ""
    width = math.prod(sizes[a] for a in list(sizes)[-2:])
    while width > 64:
        width = -(-width // 2)
    while width < 32 and width * 2 <= total and total // width > 8:
        width *= 2
    drawn = min(total, MOST_CELLS)
    cell = min(26.0, (WIDTH - 10) / width, 640 / -(-drawn // width))
    steps = {a: math.prod(list(sizes.values())[i + 1 :]) for i, a in enumerate(sizes)}
    out = []
    for d in range(drawn):
        at = {a: d // steps[a] % sizes[a] for a in sizes}
        x, y = d % width * cell, d // width * cell
        hue = 360 * at[inner] / sizes[inner] if inner else 210
        light = 45 + 20 * ((d // (steps[inner] * sizes[inner])) % 2 if inner else 0)
        where = ", ".join(f"{a} {i}" for a, i in at.items())
        out.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{cell * 0.92:.1f}' height='{cell * 0.92:.1f}' "
            f"fill='hsl({hue:.0f},50%,{light}%)'><title>device {d}: {where}</title></rect>"
        )
    node = e.pod.hardware.node
    if e.pod.platform == "cuda" and node <= width and width % node == 0:
        for first in range(0, drawn, node):
            x, y = first % width * cell, first // width * cell
            out.append(
                f"<rect x='{x - 0.5:.1f}' y='{y - 0.5:.1f}' width='{node * cell:.1f}' height='{cell:.1f}' fill='none' "
                f"stroke='#222' stroke-width='0.6'/>"
            )
    y = -(-drawn // width) * cell + 18
    text = ", ".join(f"{a}={n}" for a, n in sizes.items()) or "one device"
    within = [a for a in sizes if steps[a] * sizes[a] <= node]
    text += f"; a host or slice of {min(node, total)} holds whole groups of {', '.join(within) or 'no axis'}"
    more = f"; the first {drawn} of {total} devices" if drawn < total else ""
    return _svg(y + 8, [*out, f"<text x='0' y='{y:.0f}'>{_text(text + more)}</text>"])


def memory_picture(e: Estimate, compiled: CompiledStep | None = None) -> str:
    """A waterfall of what fills a device, up to its memory; with the compiler's total as a bar of its own."""
    capacity, left, high = e.pod.hardware.memory, 150, 26
    scale = (WIDTH - left - 110) / max(capacity, e.memory.total)
    rows: list[tuple[str, float, float]] = []
    at = 0.0
    for name, size in e.memory._asdict().items():
        rows.append((name, at, size))
        at += size
    rows.append(("all", 0.0, e.memory.total))
    if compiled is not None:
        rows.append(("the compiler says", 0.0, compiled.memory.total))
    out = []
    for i, (name, start, size) in enumerate(rows):
        x, y = left + start * scale, i * high + 3
        colour = COLOURS[0] if i < len(e.memory) else COLOURS[2] if size > capacity else COLOURS[3]
        out.append(f"<text x='{left - 8}' y='{y + 15}' text-anchor='end'>{_text(name)}</text>")
        out.append(f"<rect x='{x:.1f}' y='{y}' width='{max(size * scale, 0.5):.1f}' height='20' fill='{colour}'/>")
        out.append(f"<text x='{x + size * scale + 5:.1f}' y='{y + 15}'>{human_bytes(size)}</text>")
    x, y = left + capacity * scale, len(rows) * high
    out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{y + 4}' stroke='#d33' stroke-width='1.5'/>")
    out.append(f"<text x='{x:.1f}' y='{y + 18}' text-anchor='end'>{human_bytes(capacity)} of {e.pod.kind}</text>")
    return _svg(y + 24, out)


def roofline(e: Estimate) -> str:
    """FLOP/s that memory and each link allow at the step's FLOPs per byte; logarithmic axes."""
    hw = e.pod.hardware
    sources: list[tuple[str, float, float]] = [("memory", hw.memory_bandwidth, e.memory_seconds * hw.memory_bandwidth)]
    seconds: dict[str, float] = {}
    for t in e.transfers:
        seconds[t.axes] = seconds.get(t.axes, 0.0) + t.seconds
    shape = {a: getattr(e.mesh, a) for a in MESH_AXES}
    for axes, time in seconds.items():
        rate = min(hw.link(a, shape) for a in axes.split("+"))
        sources.append((f"links of {axes}", rate, time * rate))
    points = [(name, rate, e.flops / moved) for name, rate, moved in sources if moved > 0]
    turns = [hw.flops / rate for _, rate, _ in points]
    low = math.floor(math.log10(min([p[2] for p in points] + turns) / 3))
    high = math.ceil(math.log10(max([p[2] for p in points] + turns) * 3))
    top = math.log10(hw.flops) + 0.2
    bottom = min(math.log10(hw.flops) - 3, *(math.log10(min(hw.flops, r * i)) - 0.4 for _, r, i in points))
    left, tall = 70, 300
    x = lambda v: left + (math.log10(v) - low) / (high - low) * (WIDTH - left - 20)
    y = lambda v: 10 + (top - math.log10(v)) / (top - bottom) * (tall - 10)
    out = [f"<rect x='{left}' y='10' width='{WIDTH - left - 20}' height='{tall - 10}' fill='none' stroke='#ccc'/>"]
    for power in range(low, high + 1):
        out.append(f"<text x='{x(10**power):.0f}' y='{tall + 15}' text-anchor='middle'>1e{power}</text>")
    for power in range(math.ceil(bottom), math.floor(top) + 1):
        out.append(f"<text x='{left - 6}' y='{y(10**power) + 4:.0f}' text-anchor='end'>1e{power}</text>")
    out.append(f"<text x='{WIDTH / 2}' y='{tall + 32}' text-anchor='middle'>FLOPs per byte</text>")
    out.append(f"<text x='{left + 6}' y='{y(hw.flops) - 5:.0f}'>matmuls {hw.flops / 1e12:.0f} TFLOP/s</text>")
    for i, (name, rate, intensity) in enumerate(points):
        colour = COLOURS[i % len(COLOURS)]
        start = max(10.0**low, 10**bottom / rate)
        line = [(start, rate * start), (hw.flops / rate, hw.flops), (10.0**high, hw.flops)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
        reached = min(hw.flops, rate * intensity)
        out.append(f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.5'/>")
        out.append(
            f"<circle cx='{x(intensity):.1f}' cy='{y(reached):.1f}' r='5' fill='{colour}'><title>{_text(name)}: "
            f"{intensity:.3g} FLOPs per byte, at most {reached / 1e12:.3g} TFLOP/s</title></circle>"
        )
    return _svg(tall + 62, [*out, *_legend([p[0] for p in points], tall + 52)])


def alternatives_picture(found: Plan) -> str:
    """Time against memory of what is worth choosing from, and the runner-up."""
    shown = [*found.pareto, *([found.runner_up] if found.runner_up else [])]
    slowest, largest = max(e.seconds for e in shown), max(e.memory.total for e in shown)
    capacity, left, tall = found.pod.hardware.memory, 80, 240
    x = lambda v: left + v / (slowest * 1.05) * (WIDTH - left - 20)
    y = lambda v: tall - v / (max(largest, capacity) * 1.08) * (tall - 10)
    out = [
        f"<line x1='{left}' x2='{WIDTH - 20}' y1='{tall}' y2='{tall}' stroke='#999'/>",
        f"<line x1='{left}' x2='{left}' y1='10' y2='{tall}' stroke='#999'/>",
        f"<line x1='{left}' x2='{WIDTH - 20}' y1='{y(capacity):.1f}' y2='{y(capacity):.1f}' stroke='#d33'/>",
        f"<text x='{left - 6}' y='{y(capacity) + 4:.1f}' text-anchor='end'>{human_bytes(capacity)}</text>",
        f"<text x='{left - 6}' y='{tall}' text-anchor='end'>0</text>",
        f"<text x='{WIDTH - 20}' y='{tall + 16}' text-anchor='end'>{slowest * 1.05:.3g} s</text>",
    ]
    for e in shown:
        kind = 0 if e == found.best else 2 if e == found.runner_up else 5
        size = human_bytes(e.memory.total)
        out.append(
            f"<circle cx='{x(e.seconds):.1f}' cy='{y(e.memory.total):.1f}' r='{7 if kind == 0 else 5}' "
            f"fill='{COLOURS[kind]}'><title>{_text(str(e.mesh))}, remat {e.remat}, {e.accum_steps} micro-batches: "
            f"{e.seconds:.3g} s, {size}</title></circle>"
        )
    names = {"chosen": 0, "runner-up": 2, "others": 5}
    return _svg(tall + 46, [*out, *_legend(list(names), tall + 38, list(names.values()))])


def bars(rows: list[tuple[str, list[float]]], names: tuple[str, ...], limit: float = 0.0) -> str:
    """A bar for each row, of parts one after another; a line at `limit` if it is given."""
    left, high = 210, 24
    scale = (WIDTH - left - 80) / max(limit, *(sum(values) for _, values in rows), 1e-30)
    out = []
    for i, (name, values) in enumerate(rows):
        x, y = float(left), i * high + 3
        out.append(f"<text x='{left - 8}' y='{y + 14}' text-anchor='end'>{_text(name)}</text>")
        for j, value in enumerate(values):
            wide = value * scale
            out.append(f"<rect x='{x:.1f}' y='{y}' width='{wide:.1f}' height='18' fill='{COLOURS[j]}'/>")
            x += wide
        out.append(f"<text x='{x + 5:.1f}' y='{y + 14}'>{sum(values):.3g}</text>")
    y = len(rows) * high
    if limit:
        x = left + limit * scale
        out.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='0' y2='{y}' stroke='#d33' stroke-width='1.5'/>")
    return _svg(y + 26, [*out, *_legend(list(names), y + 18)])


def parameter_table(found: Plan, rules: Rules = MEGATRON_FSDP) -> Table:
    """Every parameter of the library's decoder on the chosen mesh."""
    mesh = make_abstract_mesh(found.best.mesh)
    sizes = {a: getattr(found.best.mesh, a) for a in MESH_AXES}
    rows = []
    for path, spec in _walk(decoder.param_specs(found.model)):
        rest = resolve_param(spec, mesh, rules).spec
        used = resolve_spec(spec.shape, spec.axes, rules.compute, sizes).spec
        held = math.prod(spec.shape) * jnp.dtype(spec.dtype).itemsize / math.prod(sizes[a] for a in axes_of(rest))
        dims = " ".join(f"{name or '-'}={size}" for name, size in zip(spec.axes, spec.shape))
        rows.append((path, dims, _spec(rest), _spec(used), human_bytes(held)))
    header = ("parameter", "dims", "at rest", "in computation", "bytes")
    return Table(f"Parameters of {found.model.name}", header, rows)


def _walk(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _spec(spec: Any) -> str:
    return ", ".join("-" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec) or "whole"


def _table(table: Table) -> str:
    return f"<div class='scroll'>{table._repr_html_()}</div>"


def _legend(names: list[str], y: float, colours: list[int] | None = None) -> list[str]:
    out, x = [], 0
    for i, name in enumerate(names):
        colour = COLOURS[(colours[i] if colours else i) % len(COLOURS)]
        out.append(f"<rect x='{x}' y='{y - 10:.0f}' width='11' height='11' fill='{colour}'/>")
        out.append(f"<text x='{x + 16}' y='{y:.0f}'>{_text(name)}</text>")
        x += 34 + 7 * len(name)
    return out


def _svg(height: float, parts: list[str]) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height:.0f}' width='{WIDTH}' role='img'>{''.join(parts)}</svg>"


def _text(text: str) -> str:
    return html.escape(text)
