"""The best candidates of a search, asked of the real compiler: do they fit, and what do they send."""

import itertools
import math
from typing import NamedTuple

from jaxscale.config import MeshConfig
from jaxscale.plan.aot import CompiledStep, compile_step
from jaxscale.plan.estimate import Estimate
from jaxscale.plan.hardware import Pod
from jaxscale.plan.hlo import Census
from jaxscale.plan.search import Plan
from jaxscale.table import Table, human_bytes
from sharding_rules.rules import MESH_AXES

TOP = 3  # meshes that are compiled


class Candidate(NamedTuple):
    """An estimate with the compiler's answer."""

    estimate: Estimate
    compiled: CompiledStep | None  # None: the compiler finds no room
    seconds: float  # of a step, with the collectives that the compiled program has
    refused: str = ""

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.memory.total <= self.estimate.pod.hardware.memory


class Confirmed(NamedTuple):
    """A plan whose best mesh is the fastest of those that the compiler finds room for."""

    plan: Plan
    candidates: tuple[Candidate, ...]  # fastest first

    @property
    def best(self) -> Candidate:
        return self.candidates[0]

    def table(self) -> Table:
        rows = []
        for c in self.candidates:
            e, memory = c.estimate, c.compiled.memory.total if c.compiled else math.nan
            rows.append(
                (
                    f"{e.mesh}, {e.remat}" + (f", {e.accum_steps} micro-batches" if e.accum_steps > 1 else ""),
                    f"{e.seconds:.3f}",
                    f"{c.seconds:.3f}" if c.compiled else "-",
                    human_bytes(e.memory.total),
                    human_bytes(memory) if c.compiled else "-",
                    "yes" if c.fits else f"no: {c.refused}" if c.refused else "no",
                )
            )
        header = ("mesh", "seconds: estimate", "with compiled collectives", "memory: estimate", "compiler", "fits")
        return Table("Confirmed by the compiler", header, rows)

    def __str__(self) -> str:
        best = self.best
        parts = [self.table()]
        if best.compiled is not None:
            parts += [best.compiled.table(best.estimate), best.compiled.census.table(), best.compiled.held().table(12)]
        return "\n\n".join(map(str, parts))


def confirm(found: Plan, *, batch_size: int, seq_len: int, top: int = TOP, quick: bool = False) -> Confirmed:
    """Compiles the `top` fastest meshes of a search and orders them anew by what the compiler says.

    Args:
      batch_size, seq_len: those of the search.
      quick: as in `compile_step`.

    Raises:
      ImportError: no compiler for this hardware, with the command that installs it.
      ValueError: the compiler finds no room for any of them; with its words.
    """
    candidates = []
    for e in itertools.islice(found.fitting, top):
        sizes = {"batch_size": batch_size, "seq_len": seq_len, "remat": e.remat, "accum_steps": e.accum_steps}
        try:
            compiled = compile_step(found.model, e.mesh, found.pod, quick=quick, **sizes)
        except ValueError as error:
            candidates.append(Candidate(e, None, math.inf, str(error)))
            continue
        wire = sum(t.seconds for t in e.transfers)
        # What the estimate holds to be hidden is hidden of the compiled program's transfers too, in proportion.
        exposed = e.exposed_seconds / wire if wire else 1.0
        seconds = e.seconds - e.exposed_seconds + exposed * collective_seconds(compiled.census, found.pod, e.mesh)
        candidates.append(Candidate(e, compiled, seconds))
    candidates.sort(key=lambda c: (not c.fits, c.seconds))
    best = candidates[0]
    if not best.fits:
        tried = "; ".join(f"{c.estimate.mesh}: {c.refused or human_bytes(c.compiled.memory.total)}" for c in candidates)  # type: ignore[union-attr]
        raise ValueError(f"{found.model.name} on {found.pod.name}: the compiler finds no room; {tried}")
    others = [e for e in found.fitting if e.mesh != best.estimate.mesh]
    plan = found._replace(best=best.estimate, runner_up=others[0] if others else None)
    return Confirmed(plan, tuple(candidates))


def collective_seconds(census: Census, pod: Pod, mesh: MeshConfig) -> float:
    """What the collectives of a compiled program take on a pod's links, one after another."""
    shape = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    return sum(
        r.count * pod.hardware.seconds(r.kind, r.wire_bytes / r.count, tuple(r.axes.split("+")), shape)
        for r in census.rows
        if r.count
    )
