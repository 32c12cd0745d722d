"""The table of docs/rules.md: every model under its derived plan, its expert's layout and Redco's rules.

python -m tests.rules.table            # prints the table
python -m tests.rules.table --write    # and writes it into docs/rules.md
"""

import dataclasses
import os
import sys
from collections.abc import Callable
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


def derived(case: Case) -> Plan:
    """The plan for the model at its real size, on eight H200 hosts."""
    fn, params, args = case.build(**case.real)
    return search(infer(fn, params, *args), REAL_MESH, "h200", memory=1e13)


def at_tiny_size(case: Case, plan: Plan) -> Verification:
    fn, params, args = case.build(**case.tiny)
    return dataclasses.replace(plan, mesh_shape=MESH).verify(fn, params, *args)


def compiled_bytes(case: Case, make_specs: Callable[[Any], Any]) -> float:
    """Bytes on the wire of the tiny model under the specs that `make_specs(params)` writes by hand."""
    fn, params, args = case.build(**case.tiny)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    compiled, _ = compile_with(fn, mesh, make_specs(params), ("dp",), True, params, args)
    return sum(c.wire_bytes for c in collectives(compiled.as_text()))


def row(case: Case) -> str:
    """One line of the table."""
    plan = derived(case)
    found = at_tiny_size(case, plan)
    expert = compiled_bytes(case, case.expert_specs)
    redco = compiled_bytes(case, lambda params: redco_specs(params, MESH["tp"]))
    rules = ", ".join(f"{n}={'+'.join(a)}" for n, a in plan.rules.compute.items() if n != "batch")
    cells = (
        case.name, rules, f"{found.predicted_bytes / 1e3:,.0f}", f"{found.compiled_bytes / 1e3:,.0f}",
        f"{100 * found.byte_error:.1f} %", f"{expert / 1e3:,.0f}", f"{found.compiled_bytes / expert:.2f}",
        f"{redco / 1e3:,.0f}", f"{redco / found.compiled_bytes:.2f}", f"{found.error:.0e}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| model | derived rules (tp=8) | predicted kB | compiled kB | off | expert kB | ours / expert | Redco kB "
    "| Redco / ours | largest error |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    lines = [HEAD]
    for case in CASES.values():
        lines.append(row(case))
        print(lines[-1], flush=True)
    if "--write" in sys.argv:
        path = Path(__file__).parents[2] / "docs" / "rules.md"
        begin, end = "<!-- table: begin -->", "<!-- table: end -->"
        before, _, rest = path.read_text().partition(begin)
        path.write_text(before + begin + "\n" + "\n".join(lines) + "\n" + end + rest.partition(end)[2])


if __name__ == "__main__":
    main()
