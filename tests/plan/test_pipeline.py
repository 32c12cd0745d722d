"""Pipelines in the estimate: the set-ups of the Frontier study (arXiv 2312.12705)."""

import dataclasses
from collections.abc import Iterator

import pytest

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.plan.estimate import Estimate, estimate
from jaxscale.plan.hardware import Pod, find_pod


def gpt(name: str, layers: int, width: int, heads: int) -> ModelConfig:
    """As many numbers as GPT's two matrices of 4 D have, in the decoder's three."""
    return ModelConfig(
        name=name,
        vocab_size=51_200,
        num_layers=layers,
        embed_dim=width,
        mlp_dim=8 * width // 3 // 64 * 64,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        max_seq_len=2048,
    )


# tp, pp, micro-batches of one row and nodes of eight dies: the study's launch files for 22B, 175B and 1T
# (github.com/sajal-vt/Megatron-DeepSpeed-ORNL). For 1T it took 1,600 rows (from memory of the paper), of which stages
# here share out 1,536. Optimizer state is split over the two replicas of 22B and 175B: sums are in float32 here.
STUDY = [
    (gpt("gpt-22b", 48, 6144, 48), "mi250x:2x8", "pp=8,fsdp=2", 640, 0.3838),
    (gpt("gpt-175b", 96, 12_288, 96), "mi250x:16x8", "pp=16,fsdp=2,tp=4", 1280, 0.3614),
    (gpt("gpt-1t", 128, 25_600, 128), "mi250x:128x8", "pp=64,dp=2,tp=8", 1536, 0.3196),
]


def of_rows(model: ModelConfig, mesh: MeshConfig, pod: Pod, rows: int, each: int) -> Estimate:
    """The step with micro-batches of `each` rows on a device."""
    count = rows // (mesh.dp * mesh.fsdp * each)
    mesh = dataclasses.replace(mesh, pp_micro_batches=count if mesh.pp > 1 else None)
    accum = max(1, count) if mesh.pp == 1 else 1
    return estimate(model, mesh, pod, batch_size=rows, seq_len=2048, remat="full", accum_steps=accum)


def meshes(model: ModelConfig, pod: Pod) -> Iterator[MeshConfig]:
    for pp in (p for p in range(1, model.num_layers + 1) if model.num_layers % p == 0 == pod.num_devices % p):
        for tp in (t for t in (1, 2, 4, 8) if pod.num_devices % (pp * t) == 0):
            replicas = pod.num_devices // (pp * tp)
            yield MeshConfig(pp=pp, dp=replicas, tp=tp)
            if replicas > 1:
                yield MeshConfig(pp=pp, fsdp=replicas, tp=tp)


@pytest.mark.parametrize(("model", "pod", "mesh", "rows", "theirs"), STUDY)
def test_the_set_ups_of_the_frontier_study_are_valid_and_near_the_top(model, pod, mesh, rows, theirs):
    pod = find_pod(pod)
    chosen = of_rows(model, MeshConfig.parse(mesh), pod, rows, 1)
    found = []
    for other in meshes(model, pod):
        for each in (1, 2, 4):
            try:
                found.append(of_rows(model, other, pod, rows, each))
            except ValueError:
                continue
    found = sorted((e for e in found if e.fits), key=lambda e: e.seconds)
    assert chosen.fits
    # Large matmuls are taken at 0.7 of the peak; the study reached less. The order stays, not the figure.
    assert theirs < chosen.flops / chosen.seconds / 191.5e12 < 2 * theirs
    assert chosen.seconds < 1.06 * found[0].seconds
