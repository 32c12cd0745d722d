"""A step that was compiled ahead of time, in a file: the job on the pod loads it and starts without compiling.

save_step(compile_step(model, mesh, "h200:1x8", ...), "step.bin")       # a laptop
step = load_step("step.bin", make_mesh(MeshConfig(fsdp=4, tp=2)))       # the pod, inside jax.set_mesh(mesh)
state, metrics = step(state, batch)
"""

import importlib
import json
import pickle
from pathlib import Path

import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from jaxscale.plan.aot import CompiledStep
from sharding_rules.hardware import hardware_of
from sharding_rules.rules import MESH_AXES

MAGIC = b"jaxscale step 1\n"
SAME_CODE = ({"h100", "h200"},)  # kinds that run each other's programs: one compute capability, other memories


def save_step(compiled: CompiledStep, path: str | Path) -> Path:
    """Writes a compiled step, and what it was compiled for, into one file.

    Raises:
      ValueError: this compiler's programs cannot be written.
    """
    program = pickle.dumps(serialize_executable.serialize(compiled.executable))
    header = {
        "pod": compiled.pod.name,
        "kind": compiled.pod.kind,
        "mesh": {axis: getattr(compiled.mesh, axis) for axis in MESH_AXES},
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }
    path = Path(path)
    path.write_bytes(MAGIC + json.dumps(header).encode() + b"\n" + program)
    return path


def load_step(path: str | Path, mesh: Mesh) -> jax.stages.Compiled:
    """The step of a file, on the devices of `mesh`: step(state, batch) -> (state, metrics), nothing is compiled.

    Whoever wrote the file can run code here: load only what you trust.

    Raises:
      ValueError: not such a file, or written for another mesh, kind of device or version of jax.
    """
    start, *rest = Path(path).read_bytes().split(b"\n", 2)
    if start + b"\n" != MAGIC or len(rest) != 2:
        raise ValueError(f"{path} holds no compiled step; save_step writes one")
    header, program = json.loads(rest[0]), rest[1]
    device = mesh.devices.flat[0]
    kind = hardware_of(device).name
    here = {"mesh": dict(mesh.shape), "jax": jax.__version__, "jaxlib": jaxlib.__version__, "kind": kind}
    if any({kind, header["kind"]} <= same for same in SAME_CODE):
        here["kind"] = header["kind"]
    wrong = [f"{name} {header[name]}, here {value}" for name, value in here.items() if header[name] != value]
    if wrong:
        raise ValueError(f"{path} was compiled for {'; '.join(wrong)}: compile it again with these")
    if device.platform == "gpu":  # its import tells XLA where the runtime of Mosaic's kernels lies
        importlib.import_module("jax.experimental.mosaic.gpu")
    payload, in_tree, out_tree = pickle.loads(program)
    return serialize_executable.deserialize_and_load(
        payload, in_tree, out_tree, backend=device.client, execution_devices=list(mesh.devices.flat)
    )
