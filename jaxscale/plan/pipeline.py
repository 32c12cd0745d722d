"""Pipelines in the estimate: a stage's memory with the micro-batches in flight, the bubble, what passes between stages.

Arithmetic only, of a schedule that the library does not run (its own is jaxscale.parallel.pipeline). It serves to
compare published set-ups with what the search would choose.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.models.decoder import Remat
from jaxscale.plan.estimate import HEADROOM, Estimate, estimate
from jaxscale.plan.hardware import Pod, find_pod


class Pipeline(NamedTuple):
    """A step of a model cut into stages of equal depth, one forward and one backward in turn (1F1B)."""

    mesh: MeshConfig
    stage: Estimate  # the fullest stage: its layers, embedding and head
    micro_batches: int
    memory: float  # bytes of a device of the first stage
    bubble: float  # share of the step in which a stage waits
    seconds: float
    flops: float  # of one device and step, what is computed again included

    @property
    def fits(self) -> bool:
        return self.memory <= HEADROOM[self.stage.pod.platform] * self.stage.pod.hardware.memory


def estimate_pipeline(
    model: ModelConfig,
    mesh: MeshConfig,
    pod: Pod | str,
    *,
    batch_size: int,
    seq_len: int,
    micro_rows: int = 1,
    remat: Remat = "full",
) -> Pipeline:
    """One step over `mesh.pp` stages. Gradients are summed over the replicas once, after the last micro-batch.

    Args:
      batch_size: rows of a step over all devices; a replica takes them `micro_rows` at a time.

    Raises:
      ValueError: layers, rows or devices that do not divide, with the numbers.
    """
    pod = find_pod(pod) if isinstance(pod, str) else pod
    mesh = mesh.fill(pod.num_devices)
    rows = mesh.dp * mesh.fsdp * mesh.ep * micro_rows
    if model.num_layers % mesh.pp or batch_size % rows:
        raise ValueError(
            f"num_layers={model.num_layers} must be a multiple of pp={mesh.pp}, and batch_size={batch_size} one of "
            f"dp*fsdp*ep*micro_rows={rows}; change pp, or the batch"
        )
    count = batch_size // rows
    per_host = min(pod.grid[-1], pod.num_devices // mesh.pp)
    name = f"{pod.kind}:{pod.num_devices // mesh.pp // per_host}x{per_host}"
    layers = dataclasses.replace(model, num_layers=model.num_layers // mesh.pp)
    own = dataclasses.replace(mesh, pp=1)
    stage = estimate(
        layers,
        own,
        find_pod(name, pod.hardware),
        batch_size=batch_size,
        seq_len=seq_len,
        remat=remat,
        accum_steps=count,
    )
    gradients = [t for t in stage.transfers if t.kind != "all-gather" and set(t.axes.split("+")) <= {"dp", "fsdp"}]
    once = sum(t.seconds for t in gradients) / count
    inside = sum(t.seconds for t in stage.transfers) / count - once
    row = micro_rows * seq_len / mesh.cp / mesh.tp * model.embed_dim * jnp.dtype(model.dtype).itemsize
    sent = 2 * row / pod.hardware.outer_bandwidth if mesh.pp > 1 else 0.0  # forward and backward, a share of each of tp
    micro = (stage.compute_seconds + stage.memory_seconds) / count + inside + sent
    flight = min(mesh.pp, count)
    return Pipeline(
        mesh=mesh,
        stage=stage,
        micro_batches=count,
        memory=stage.memory.total + (flight - 1) * stage.memory.residuals,
        bubble=(mesh.pp - 1) / (count + mesh.pp - 1),
        seconds=(count + mesh.pp - 1) * micro + once,
        flops=stage.flops,
    )


def pipelines(model: ModelConfig, pod: Pod | str, *, batch_size: int, seq_len: int) -> list[Pipeline]:
    """Every pp, tp, dp or fsdp and micro-batch of up to four rows that divides and fits, remat full; fastest first."""
    pod = find_pod(pod) if isinstance(pod, str) else pod
    found = []
    for mesh in _meshes(model, pod):
        for micro_rows in (1, 2, 4):
            try:
                found.append(
                    estimate_pipeline(model, mesh, pod, batch_size=batch_size, seq_len=seq_len, micro_rows=micro_rows)
                )
            except ValueError:
                continue
    return sorted((p for p in found if p.fits), key=lambda p: p.seconds)


def _meshes(model: ModelConfig, pod: Pod) -> Iterator[MeshConfig]:
    n = pod.num_devices
    for pp in (p for p in range(1, model.num_layers + 1) if model.num_layers % p == 0 and n % p == 0):
        for tp in (t for t in (1, 2, 4, 8) if t <= pod.hardware.node and n % (pp * t) == 0):
            replicas = n // (pp * tp)
            yield MeshConfig(pp=pp, dp=replicas, tp=tp)
            if replicas > 1:
                yield MeshConfig(pp=pp, fsdp=replicas, tp=tp)
