"""What a compiled program communicates, by kind and mesh axis, and what the partitioner could not do well.

with jax.set_mesh(mesh):
    compiled, findings = compile_with_findings(jax.jit(step).lower(state, batch))
census(compiled).counts  # {"all-gather": {"fsdp": 10}, "reduce-scatter": {"tp": 4}}
"""

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxscale.table import Table, human_bytes
from sharding_rules import hlo


class CensusRow(NamedTuple):
    """One kind of collective over one set of mesh axes, everything that one run of the program executes."""

    kind: str
    axes: str  # "fsdp", "fsdp+cp": the mesh axes along which the devices of a group differ
    count: int
    bytes: int  # payload of one device: gathered results, reduced operands
    wire_bytes: int  # what one device sends, by the bandwidth-optimal algorithm
    trips_known: bool  # False: inside a loop of unknown length, counted as one trip


class Census(NamedTuple):
    """The collectives of a program. `counts` and `bytes` are plain dicts, to compare in a test."""

    rows: tuple[CensusRow, ...]

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        return self._by("count")

    @property
    def bytes(self) -> dict[str, dict[str, int]]:
        return self._by("bytes")

    def wire_bytes(self, axis: str | None = None) -> int:
        """Bytes that one device sends in a run, over all axes or in the collectives that involve `axis`."""
        return sum(r.wire_bytes for r in self.rows if axis is None or axis in r.axes.split("+"))

    def table(self) -> Table:
        rows = [
            (
                r.kind,
                r.axes,
                f"{r.count}" if r.trips_known else f">={r.count}",
                human_bytes(r.bytes),
                human_bytes(r.wire_bytes),
            )
            for r in self.rows
        ]
        total = ("all", "", str(sum(r.count for r in self.rows)), "", human_bytes(self.wire_bytes()))
        return Table("Collectives of one run, per device", ("kind", "axes", "count", "payload", "sent"), [*rows, total])

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _by(self, field: str) -> dict[str, dict[str, int]]:
        out: dict[str, dict[str, int]] = {}
        for row in self.rows:
            out.setdefault(row.kind, {})[row.axes] = getattr(row, field)
        return out


class Finding(NamedTuple):
    """Something that the partitioner did but should not have to. `count` lines said so, `message` is the first."""

    name: str
    message: str
    count: int


def census(program: Any, *args: Any, mesh: Any = None, **kwargs: Any) -> Census:
    """Counts the collectives that one run of a program executes; loops are multiplied by their trip counts.

    Args:
      program: a compiled or lowered program, its HLO text, or a jitted function, then with its arguments.
      mesh: the mesh whose axes name the groups; by default the one of the program's inputs, or the one in context.

    Raises:
      ValueError: no mesh is given and none is found.
    """
    if callable(program) and hasattr(program, "lower"):
        program = program.lower(*args, **kwargs)
    if isinstance(program, jax.stages.Lowered):
        program = program.compile()
    mesh = mesh or _mesh_of(program)
    sums: dict[tuple[str, str], CensusRow] = {}
    text = program if isinstance(program, str) else program.as_text()
    # tpu7x runs collectives beside computation as asynchronous calls: each is counted where it starts.
    for c in hlo.collectives(text.replace(" call-start(", " call(")):
        if c.group_size <= 1 or not (axes := "+".join(c.axes(mesh.shape))):
            continue  # a group of one device moves nothing
        old = sums.get((c.kind, axes), CensusRow(c.kind, axes, 0, 0, 0, True))
        sums[c.kind, axes] = old._replace(
            count=old.count + c.count,
            bytes=old.bytes + c.bytes * c.count,
            wire_bytes=old.wire_bytes + c.wire_bytes,
            trips_known=old.trips_known and c.trips_known,
        )
    return Census(tuple(sums[key] for key in sorted(sums, key=lambda k: (hlo.KINDS.index(k[0]), k[1]))))


def compile_with_findings(
    lowered: jax.stages.Lowered, options: dict[str, Any] | None = None
) -> tuple[jax.stages.Compiled, list[Finding]]:
    """Compiles, and returns what the partitioner complained about (it writes to the C++ stderr only).

    The compilation cache is left out, since a program that is read from it was partitioned earlier and says nothing.
    """
    was = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with _captured_stderr() as said:
            compiled = lowered.compile(options)
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
    return compiled, parse_findings(said())


def parse_findings(log: str) -> list[Finding]:
    """The named findings in a compiler's log."""
    found = []
    for name, pattern in _FINDINGS.items():
        lines = [line for line in log.splitlines() if pattern.search(line)]
        if lines:
            found.append(Finding(name, lines[0].strip(), len(lines)))
    return found


_FINDINGS = {
    # An array had to be whole on every device on its way from one sharding to another.
    "involuntary-full-rematerialization": re.compile(r"involuntary full rematerialization", re.IGNORECASE),
}


def _mesh_of(program: Any) -> Any:
    if not isinstance(program, str):
        for sharding in jax.tree.leaves(program.input_shardings):
            if isinstance(sharding, jax.sharding.NamedSharding):
                return sharding.mesh
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError("no mesh is known for this program; pass mesh= to name the axes of its collectives")
    return mesh


_capture = threading.Lock()


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Any]:
    """Redirects file descriptor 2, which C++ writes to; gives a function that returns what was written.

    What is not a finding is passed on afterwards, so that nothing is lost.
    """
    with _capture, tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        saved = os.dup(2)
        text = ""
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: text
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            file.seek(0)
            text = file.read().decode(errors="replace")
            other = [line for line in text.splitlines(True) if not any(p.search(line) for p in _FINDINGS.values())]
            os.write(2, "".join(other).encode())
            os.close(saved)
