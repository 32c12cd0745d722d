"""Every valid mesh, remat policy and micro-batch by the estimate: the best, the runner-up and why it lost."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.models.decoder import Remat
from jaxscale.parallel.context_cost import Context
from jaxscale.plan.estimate import HEADROOM, Estimate, check, context_of, estimate
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.table import Table, human_bytes

MAX_MICRO_BATCHES = 64


class Plan(NamedTuple):
    """What was found for a model on a pod."""

    model: ModelConfig
    pod: Pod
    best: Estimate
    runner_up: Estimate | None  # the fastest on another mesh
    pareto: tuple[Estimate, ...]  # nothing else is faster with less memory; fastest first
    considered: int
    meshes: int  # that were looked at
    fitting: tuple[Estimate, ...]  # the fastest on each mesh, fastest first

    @property
    def why(self) -> str:
        """What the runner-up loses by."""
        if self.runner_up is None:
            return "no other mesh fits" if self.meshes > 1 else "none, there was one mesh to look at"
        parts = {
            "computation": lambda e: e.compute_seconds,
            "memory traffic": lambda e: e.memory_seconds,
            "transfers not hidden": lambda e: e.exposed_seconds,
        }
        lost = {name: of(self.runner_up) - of(self.best) for name, of in parts.items()}
        text = ", ".join(f"{name} {s * 1e3:+.0f} ms" for name, s in lost.items() if abs(s) >= 5e-4)
        behind = self.runner_up.seconds / self.best.seconds - 1
        # The compiler may have put another one first than the estimate.
        slower = f"{behind:.1%} slower" if behind >= 0 else f"{-behind:.1%} faster by the estimate alone"
        return f"{_name(self.runner_up)} is {slower}: {text or 'the same within a millisecond'}"

    def table(self) -> Table:
        """Time against memory: what is worth choosing from."""
        rows = [
            (
                str(e.mesh),
                e.remat,
                str(e.accum_steps),
                f"{e.seconds:.3f}",
                f"{e.share_of_peak:.1%}",
                f"{e.tokens / e.seconds:,.0f}",
                human_bytes(e.memory.total),
                "yes" if e.fits else "no",
            )
            for e in self.pareto
        ]
        header = ("mesh", "remat", "micro-batches", "seconds", "of matmul rate", "tokens/s", "bytes per device", "fits")
        return Table(f"{self.model.name} on {self.pod.name}: time against memory", header, rows)

    def __str__(self) -> str:
        b = self.best
        head = (
            f"{self.model.name} on {self.pod.name}, {b.tokens:,} tokens a step: {_name(b)}, about {b.seconds:.3g} s "
            f"({b.share_of_peak:.0%} of the matmul rate), {human_bytes(b.memory.total)} of "
            f"{human_bytes(self.pod.hardware.memory)}; {self.considered} alternatives on {self.meshes} mesh(es)"
        )
        return "\n\n".join([head, str(self.table()), f"Runner-up: {self.why}", str(b.table()), str(b.traffic_table())])


def search(
    model: ModelConfig,
    pod: Pod | str,
    *,
    batch_size: int,
    seq_len: int,
    mesh: MeshConfig | None = None,
    remats: Sequence[Remat] = get_args(Remat),
    loss_chunk: int = 2048,
) -> Plan:
    """The fastest way that fits, by the estimate.

    Args:
      batch_size: rows of a step over all devices.
      mesh: only this one; by default all that are valid for the model, the batch and the pod.

    Raises:
      ValueError: no mesh divides the batch, or none fits, with what would.
    """
    pod = find_pod(pod) if isinstance(pod, str) else pod
    shapes = [mesh.fill(pod.num_devices)] if mesh else list(meshes(model, pod, batch_size=batch_size, seq_len=seq_len))
    if mesh:
        check(model, shapes[0], batch_size=batch_size, seq_len=seq_len)
    if not shapes:
        raise ValueError(
            f"{batch_size} rows of {seq_len} tokens divide over no mesh of {pod.num_devices} devices; "
            f"use a multiple of {_rows_needed(model, pod)} rows"
        )
    found = []
    for shape, remat in itertools.product(shapes, remats):
        rows = batch_size // (shape.pp * shape.dp * shape.fsdp * shape.ep)
        if shape.pp_micro_batches:  # of all rows of a step
            rows = 1
        for accum_steps in (n for n in range(1, min(rows, MAX_MICRO_BATCHES) + 1) if rows % n == 0):
            found.append(
                estimate(
                    model,
                    shape,
                    pod,
                    batch_size=batch_size,
                    seq_len=seq_len,
                    remat=remat,
                    accum_steps=accum_steps,
                    loss_chunk=loss_chunk,
                )
            )
            if found[-1].fits:
                break  # more micro-batches only cost more
    fitting = sorted((e for e in found if e.fits), key=lambda e: (e.seconds, e.memory.total))
    if not fitting:
        raise ValueError(_fits_nowhere(model, pod, min(found, key=lambda e: e.memory.total), one_mesh=mesh is not None))
    fastest: dict[MeshConfig, Estimate] = {}
    for e in fitting:
        fastest.setdefault(e.mesh, e)
    best, *others = fastest.values()
    return Plan(
        model=model,
        pod=pod,
        best=best,
        runner_up=others[0] if others else None,
        fitting=tuple(fastest.values()),
        pareto=tuple(pareto(found)),
        considered=len(found),
        meshes=len(shapes),
    )


def meshes(model: ModelConfig, pod: Pod, *, batch_size: int, seq_len: int) -> Iterator[MeshConfig]:
    """Every mesh of the pod's devices that this model and batch divide over; tp stays within a host of GPUs.

    ep for models with experts. pp over hosts of GPUs, without cp. Over cp the partitioner's gather, and what
    context_cost finds fastest beside it.
    """
    n = pod.num_devices
    most_tp = min(pod.hardware.node, 64) if pod.platform == "cuda" else 64
    for pp, tp, cp in itertools.product(_stages(model, pod), _divisors(n), _divisors(n)):
        if tp > most_tp or n % (pp * tp * cp) or (pp > 1 and cp > 1):
            continue
        left = n // (pp * tp * cp)
        for fsdp, ep in itertools.product(_divisors(left), _divisors(model.moe.num_experts if model.moe else 1)):
            if left % (fsdp * ep):
                continue
            mesh = MeshConfig(pp=pp, dp=left // (fsdp * ep), fsdp=fsdp, ep=ep, cp=cp, tp=tp)
            try:
                check(model, mesh, batch_size=batch_size, seq_len=seq_len)
            except ValueError:
                continue
            yield mesh
            held = _divisors(batch_size // (pp * mesh.dp * fsdp * ep))
            groups = max((n for n in held if n <= MAX_MICRO_BATCHES // pp), default=1)
            if pp > 1 and groups > 4:  # as many micro-batches as there are rows
                yield dataclasses.replace(mesh, pp_micro_batches=groups * pp)
            if cp > 1:
                auto = dataclasses.replace(mesh, cp_strategy="auto", cp_layout="auto")
                context = context_of(model, auto, pod, batch_size=batch_size, seq_len=seq_len)
                if context is not None and context != Context():
                    yield dataclasses.replace(auto, cp_layout=context.layout)


def _stages(model: ModelConfig, pod: Pod) -> list[int]:
    """Numbers of stages worth a try: one, or such that each is whole hosts of GPUs, with slow links between."""
    hosts = pod.num_devices // pod.hardware.node if pod.platform == "cuda" else 1
    return [1, *(p for p in _divisors(max(hosts, 1)) if 1 < p <= model.num_layers)]


def pareto(found: Sequence[Estimate]) -> Iterator[Estimate]:
    """Those that no other beats in both time and memory, fastest first."""
    least = math.inf
    for e in sorted(found, key=lambda e: (e.seconds, e.memory.total)):
        if e.memory.total < least:
            least = e.memory.total
            yield e


def _fits_nowhere(model: ModelConfig, pod: Pod, smallest: Estimate, *, one_mesh: bool) -> str:
    room = HEADROOM[pod.platform] * pod.hardware.memory
    state = smallest.memory.params + smallest.memory.optimizer + smallest.memory.gradients
    rest = smallest.memory.total - state
    needs = f"{human_bytes(smallest.memory.total)} of {human_bytes(room)} a device may hold"
    if one_mesh:
        large, remedy = "activations and buffers", "use fewer or shorter rows, or a larger tp or cp"
        if state > rest:
            large, remedy = "state", "split it further (fsdp, tp, ep)"
        return (
            f"{model.name} on {pod.name}: {_name(smallest)} needs least and does not fit: {needs}, "
            f"{human_bytes(max(state, rest))} of it {large}; {remedy}, or leave the mesh out to search all"
        )
    text = f"{model.name} fits no mesh of {pod.name}: {_name(smallest)} needs least, {needs}"
    if rest < room:
        needed = math.ceil(pod.num_devices * state / (room - rest))
        return f"{text}; with this split at least {needed} devices hold its state, or use a smaller model"
    text = f"{text}, {human_bytes(rest)} of it activations and buffers; use fewer or shorter rows, or a larger tp"
    if state < room:
        return text
    return f"{text}, and more than {math.floor(pod.num_devices * state / room)} devices, which its state alone fills"


def _rows_needed(model: ModelConfig, pod: Pod) -> int:
    split = max(d for d in _divisors(pod.num_devices) if d <= 8 and model.num_heads % d == 0)
    return pod.num_devices // split


def _name(e: Estimate) -> str:
    micro = f", {e.accum_steps} micro-batches" if e.accum_steps > 1 else ""
    return f"{e.mesh} with remat {e.remat}{micro}"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
