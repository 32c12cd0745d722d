"""The table of docs/rules.md: every model under its derived plan, its expert's layout and Redco's rules.

python -m tests.rules.table            # prints the table
python -m tests.rules.table --write    # and writes it into docs/rules.md
"""

import dataclasses
import os

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sharding_rules import Plan, infer, search
from sharding_rules.hlo import collectives
from sharding_rules.verify import Verification, compile_with
from tests.rules.models.case import Case

MESH = {"dp": 2, "tp": 4}
REAL_MESH = {"dp": 8, "tp": 8}


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes that a device sends in one step of the tiny model."""

    name: str
    plan: Plan
    verification: Verification
    expert_bytes: float
    redco_bytes: float
    notes: str


def derived(case: Case) -> Plan:
    """The plan for the model at its real size, on eight H200 hosts."""
    fn, params, args = case.build(**case.real)
    return search(infer(fn, params, *args), REAL_MESH, "h200", memory=1e13)


def at_tiny_size(case: Case, plan: Plan) -> Verification:
    fn, params, args = case.build(**case.tiny)
    return dataclasses.replace(plan, mesh_shape=MESH).verify(fn, params, *args)


def compiled_bytes(case: Case, specs) -> float:
    """Bytes on the wire of the tiny model under hand-written specs; infinite where they do not compile."""
    fn, params, args = case.build(**case.tiny)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), tuple(MESH), axis_types=(AxisType.Auto,) * 2)
    compiled, _ = compile_with(fn, mesh, specs, ("dp",), True, params, args)
    return sum(c.wire_bytes for c in collectives(compiled.as_text()))
