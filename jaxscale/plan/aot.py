"""The real compiler's answer for hardware that is not here: a training step compiled ahead of time, and what it holds.

compiled = compile_step(preset("llama3-70b"), MeshConfig(fsdp=64, tp=8), "v5p:8x8x8", batch_size=512, seq_len=8192)
compiled.memory.total, compiled.census, compiled.code_bytes
"""

import functools
import importlib.util
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxscale.config import MeshConfig, ModelConfig, OptimizerConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from jaxscale.plan.buffers import Held, held_at_peak
from jaxscale.plan.estimate import Estimate, context_of, pipeline_of
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.plan.hlo import Census, Finding, census, compile_with_findings
from jaxscale.table import Table, human_bytes
from jaxscale.train import abstract_train_state, make_train_step
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

DATA = Path(__file__).parent / "data"
BATCH = ("tokens", "labels", "segment_ids", "positions")
STEPS = 1000
# XLA's lowest level, and of the TPU backend, which comes after buffers and schedule are settled, what takes longest: it
# generates code for each kernel of the sparse cores (half of the time on tpu7x) and orders instructions in bundles.
QUICK: dict[str, dict[str, Any]] = {
    "tpu": {"xla_sc_backend_opt_level": "O2", "xla_jf_llo_level": 0, "xla_jf_vliw_scheduler": False},
}


class MemoryUse(NamedTuple):
    """Bytes of one device, as the compiler assigned them."""

    arguments: int  # the state and the batch
    temporaries: int
    outputs: int  # what is not written over the arguments
    code: int

    @property
    def total(self) -> int:
        return sum(self)


class CompiledStep(NamedTuple):
    """A training step, compiled for a pod that need not be here."""

    pod: Pod
    mesh: MeshConfig
    memory: MemoryUse
    census: Census
    findings: list[Finding]
    trace_seconds: float
    compile_seconds: float
    host_bytes: int  # the most memory that this process has held
    executable: jax.stages.Compiled

    def held(self) -> Held:
        """The largest buffers, with the source lines that made them."""
        return held_at_peak(self.executable.as_text() or "")

    def table(self, estimated: Estimate) -> Table:
        """What the compiler says beside the estimate."""
        hw, memory = self.pod.hardware, self.memory
        guess, moved = estimated.memory.total, sum(r.bytes for r in self.census.rows)
        payload = sum(t.bytes for t in estimated.transfers)
        rows = [
            ("bytes per device", human_bytes(memory.total), human_bytes(guess), f"{guess / memory.total - 1:+.1%}"),
            ("share of its memory", f"{memory.total / hw.memory:.0%}", f"{guess / hw.memory:.0%}", ""),
            ("payload of collectives", human_bytes(moved), human_bytes(payload), f"{payload / max(moved, 1) - 1:+.1%}"),
            ("code", human_bytes(memory.code), "", ""),
            ("seconds to trace and compile", f"{self.trace_seconds + self.compile_seconds:.0f}", "", ""),
            ("memory of this process", human_bytes(self.host_bytes), "", ""),
        ]
        title = f"Compiled ahead of time for {self.pod.name}, mesh {self.mesh}; findings: {len(self.findings)}"
        return Table(title, ("what", "compiler", "estimate", "error"), rows)


def compile_step(
    model: ModelConfig,
    mesh: MeshConfig,
    pod: Pod | str,
    *,
    batch_size: int,
    seq_len: int,
    remat: decoder.Remat = "full",
    accum_steps: int = 1,
    loss_chunk: int = 2048,
    optimizer: OptimizerConfig | None = None,
    steps: int = STEPS,
    rules: Rules = MEGATRON_FSDP,
    quick: bool = False,
) -> CompiledStep:
    """Compiles the library's training step for `pod`, kernels included.

    Args:
      batch_size: rows of a step over the whole mesh, each of seq_len tokens.
      steps: of the learning-rate schedule, a constant in the program; what `stored.save_step` keeps runs with it.
      quick: XLA's lowest optimisation level: two to three times faster for v6e and tpu7x, with the same collectives and
        the memory within 5 % (docs/planner.md). Not the program to run.

    Raises:
      ValueError: the mesh or the batch does not fit the pod, or the TPU compiler finds no room for the program.
      ImportError: the compiler for this hardware is not installed; the message holds the command that installs it.
    """
    pod = find_pod(pod) if isinstance(pod, str) else pod
    mesh = mesh.fill(pod.num_devices)
    mesh.check_model(model)
    devices = make_mesh(mesh, pod_devices(pod))
    start = time.perf_counter()
    tx = make_optimizer(optimizer or OptimizerConfig(), steps)
    state = abstract_train_state(decoder.param_specs(model), tx, devices, rules)
    context = context_of(model, mesh, pod, batch_size=batch_size, seq_len=seq_len)
    sizes = {"batch_size": batch_size, "seq_len": seq_len, "remat": remat, "accum_steps": accum_steps}
    pipeline = pipeline_of(model, mesh, pod, **sizes, loss_chunk=loss_chunk, rules=rules)
    options = {"chunk": loss_chunk, "rules": rules, "context": context, "pipeline": pipeline}
    loss_fn = functools.partial(decoder.loss_fn, cfg=model, remat=remat, **options)
    step = make_train_step(loss_fn, tx, accum_steps=accum_steps)
    with jax.set_mesh(devices):
        traced = step.trace(state, abstract_batch(devices, batch_size, seq_len, rules))
        lowered = traced.lower(lowering_platforms=(pod.platform,))
    return compile_lowered(lowered, pod, mesh, devices, trace_seconds=time.perf_counter() - start, quick=quick)


def compile_lowered(
    lowered: jax.stages.Lowered, pod: Pod, mesh: MeshConfig, devices: Mesh, *, trace_seconds: float, quick: bool
) -> CompiledStep:
    """Compiles a program that was lowered for `devices` of a pod; raises what `compile_step` does."""
    start = time.perf_counter()
    options: dict[str, Any] = {"optimization_level": "O0"} | QUICK.get(pod.platform, {}) if quick else {}
    if pod.platform == "cuda":  # without a GPU nothing is tuned, and the tiles of untuned Triton matmuls are 16 x 8
        options["xla_gpu_enable_triton_gemm"] = False
    executable, findings = _compile(lowered, pod, options)
    return CompiledStep(
        pod=pod,
        mesh=mesh,
        memory=memory_use(executable),
        census=census(executable, mesh=devices),
        findings=findings,
        trace_seconds=trace_seconds,
        compile_seconds=time.perf_counter() - start,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        executable=executable,
    )


def abstract_batch(
    mesh: Mesh | AbstractMesh, batch_size: int, seq_len: int, rules: Rules = MEGATRON_FSDP
) -> dict[str, Any]:
    """A global batch [batch_size, seq_len] as ShapeDtypeStructs on `mesh`."""
    shape = (batch_size, seq_len)
    spec = resolve_spec(shape, ("batch", "seq"), rules.compute, dict(mesh.shape)).spec
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, spec)) for name in BATCH}


def memory_use(executable: jax.stages.Compiled) -> MemoryUse:
    """What one device must hold to run a program.

    On TPU the statistics' temp_size is more than is allocated (2.35 GB where the dumped buffer assignment has one block
    of 1.80 GB). total_allocation_bytes is the total of that assignment, and is taken where it is set.
    """
    stats: Any = executable.memory_analysis()
    arguments = stats.argument_size_in_bytes
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    allocated = getattr(stats, "total_allocation_bytes", 0)
    return MemoryUse(
        arguments=arguments,
        temporaries=allocated - arguments - outputs if allocated else stats.temp_size_in_bytes,
        outputs=outputs,
        code=stats.generated_code_size_in_bytes,
    )


def pod_devices(pod: Pod) -> list[Any]:
    """The devices of a pod that is not here, to compile for.

    Raises:
      ImportError: no compiler for it is installed, with the command that installs it.
      ValueError: the compiler knows no such pod.
    """
    if pod.platform == "cpu":
        if len(jax.devices("cpu")) < pod.num_devices:
            raise ValueError(
                f"{pod.name} needs {pod.num_devices} simulated devices, {len(jax.devices('cpu'))} are here; "
                f"start with --simulate {pod.num_devices}"
            )
        return jax.devices("cpu")[: pod.num_devices]
    if pod.platform == "tpu":
        _need("libtpu", "jax[tpu]", pod)
        # No chip is touched: another process may hold libtpu, and there is no metadata server to ask.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{pod.kind}-{pod.num_devices}")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        if not list(Path("/dev").glob("accel*")) and not Path("/dev/vfio").exists():
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        name = f"{pod.kind}:{'x'.join(map(str, pod.grid))}"
        return _topology(pod, platform="tpu", topology_name=name)
    target = DATA / f"{pod.kind}.txtpb"
    if not target.exists():  # before a compiler is asked for that would not help
        raise ValueError(f"{pod.name}: no target file {target.name}; there are {_targets()}; the estimate needs none")
    plugin = "jax_cuda12_plugin" if importlib.util.find_spec("jax_cuda12_plugin") else "jax_cuda13_plugin"
    _need(plugin, "jax[cuda13]", pod)
    hosts, local = pod.grid
    return _topology(
        pod,
        platform="cuda",
        topology_name=pod.kind,
        target_config=target.read_text(),
        topology=f"1x{hosts}x{local}",
    )


def _topology(pod: Pod, **options: Any) -> list[Any]:
    try:
        devices = list(topologies.get_topology_desc(**options).devices)
    except RuntimeError as error:
        raise ValueError(f"{pod.name}: the compiler refuses this topology: {str(error).splitlines()[0]}") from error
    if len(devices) != pod.num_devices:
        raise ValueError(f"{pod.name}: expected {pod.num_devices} devices but the compiler has {len(devices)}")
    return devices


def _compile(
    lowered: jax.stages.Lowered, pod: Pod, options: dict[str, Any]
) -> tuple[jax.stages.Compiled, list[Finding]]:
    try:
        return compile_with_findings(lowered, options)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = next((x for x in str(error).splitlines() if "hbm" in x.lower()), str(error).splitlines()[0])
        raise ValueError(
            f"{pod.name}: the compiler finds no room: {line.strip()}; "
            "use more devices, a larger fsdp or tp, more micro-batches, or remat full"
        ) from error


def _need(module: str, package: str, pod: Pod) -> None:
    if importlib.util.find_spec(module) is None:
        raise ImportError(
            f"compiling for {pod.name} needs {module}: pip install '{package}' (the estimate needs no compiler)"
        )


def _targets() -> str:
    return ", ".join(sorted(p.stem for p in DATA.glob("*.txtpb")))
