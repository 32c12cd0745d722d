"""The tables of docs/rules.md: every model under its derived plan, its expert's layout and Redco's rules; and the
prediction on other meshes.

python -m tests.rules.table                      # prints the first two tables
python -m tests.rules.table --write              # and writes them into docs/rules.md
python -m tests.rules.table --only=Llama --meshes   # some models, the other meshes alone
python -m tests.rules.table --topologies         # hardware that is not here; needs jax[cuda13] and libtpu
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding_rules import Plan, infer, search
from sharding_rules.hlo import collectives
from sharding_rules.verify import Verification, compile_with
from tests.rules.models import CASES
from tests.rules.models.case import Case
from tests.rules.redco import specs as redco_specs

MESH = {"dp": 2, "tp": 4}
REAL_MESH = {"dp": 8, "tp": 8}
OTHER_MESHES = [{"fsdp": 8}, {"dp": 2, "fsdp": 2, "tp": 2}, {"fsdp": 2, "tp": 4}, {"tp": 8}]


def derived(case: Case, mesh: Mapping[str, int]) -> Plan:
    """The plan for the model at its real size, on H200s."""
    fn, params, args = case.build(**case.real)
    return search(infer(fn, params, *args), mesh, "h200", memory=1e13)


def at_tiny_size(case: Case, plan: Plan, mesh: Mapping[str, int]) -> Verification:
    fn, params, args = case.build(**case.tiny)
    return dataclasses.replace(plan, mesh_shape=mesh).verify(fn, params, *args)


def compiled_bytes(case: Case, make_specs: Callable[[Any], Any]) -> float:
    """Bytes on the wire of the tiny model under the specs that `make_specs(params)` writes by hand."""
    fn, params, args = case.build(**case.tiny)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    compiled, _ = compile_with(fn, mesh, make_specs(params), ("dp",), True, params, args)
    return sum(c.wire_bytes for c in collectives(compiled.as_text()))


def row(case: Case) -> str:
    """One line of the table."""
    plan = derived(case, REAL_MESH)
    found = at_tiny_size(case, plan, MESH)
    expert = compiled_bytes(case, case.expert_specs)
    redco = compiled_bytes(case, lambda params: redco_specs(params, MESH["tp"]))
    rules = ", ".join(f"{n}={'+'.join(a)}" for n, a in plan.rules.compute.items() if n != "batch")
    cells = (
        case.name, rules, f"{found.predicted_bytes / 1e3:,.0f}", f"{found.compiled_bytes / 1e3:,.0f}",
        f"{100 * found.byte_error:.1f} %", f"{expert / 1e3:,.0f}", f"{found.compiled_bytes / expert:.2f}",
        f"{redco / 1e3:,.0f}", f"{redco / found.compiled_bytes:.2f}", f"{found.error:.0e}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def other_row(case: Case) -> str:
    """One line of the table of other meshes: how far the prediction is off."""
    cells = [case.name]
    for mesh in OTHER_MESHES:
        found = at_tiny_size(case, derived(case, mesh), mesh)
        assert found.error is not None
        cells.append(f"{found.compiled_bytes / 1e3:,.0f} kB, {100 * found.byte_error:.1f} %, {found.error:.0e}")
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| model | derived rules (tp=8) | predicted kB | compiled kB | off | expert kB | ours / expert | Redco kB "
    "| Redco / ours | largest error |\n|---|---|---|---|---|---|---|---|---|---|"
)


PODS = ("v5p:2x2x2", "v6e:2x4", "h200:1x8")
TOPOLOGY_HEAD = "| model | " + " | ".join(PODS) + " |\n|" + "---|" * (1 + len(PODS))
OTHER_HEAD = (
    "| model | " + " | ".join(", ".join(f"{a}={n}" for a, n in mesh.items()) for mesh in OTHER_MESHES) + " |\n"
    "|" + "---|" * (1 + len(OTHER_MESHES))
)


def main() -> None:
    only = next((a.removeprefix("--only=") for a in sys.argv if a.startswith("--only=")), "")
    cases = [case for case in CASES.values() if only in case.name]
    tables = {
        "table": (HEAD, row), "meshes": (OTHER_HEAD, other_row), "topologies": (TOPOLOGY_HEAD, topology_row)
    }  # fmt: skip
    asked = [name for name in tables if f"--{name}" in sys.argv] or ["table", "meshes"]
    for name in asked:
        head, line = tables[name]
        lines = [head]
        print(head, flush=True)
        for case in cases:
            lines.append(line(case))
            print(lines[-1], flush=True)
        if "--write" in sys.argv:
            write(name, "\n".join(lines))


def topology_row(case: Case) -> str:
    """One line of the table of hardware that is not here: compiled bytes, and how far the prediction is off."""
    from jax.experimental.topologies import TopologyDescription

    from jaxscale.plan.aot import pod_devices
    from jaxscale.plan.hardware import find_pod

    plan, cells = derived(case, REAL_MESH), [case.name]
    fn, params, args = case.build(**case.tiny)
    for pod in PODS:
        topology = TopologyDescription(pod_devices(find_pod(pod)))
        found = dataclasses.replace(plan, mesh_shape=MESH).verify(fn, params, *args, topology=topology)
        cells.append(f"{found.compiled_bytes / 1e3:,.0f} kB, {100 * found.byte_error:.1f} %")
    return "| " + " | ".join(cells) + " |"


def write(name: str, text: str) -> None:
    """Replaces what stands between the marks of a table in docs/rules.md."""
    path = Path(__file__).parents[2] / "docs" / "rules.md"
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text().partition(begin)
    assert found, f"docs/rules.md has no {begin}"
    path.write_text(before + begin + "\n" + text + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
