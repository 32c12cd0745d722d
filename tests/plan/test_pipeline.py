"""Pipelines in the estimate: by hand, and the set-ups of the Frontier study (arXiv 2312.12705)."""

import dataclasses

import pytest

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.plan.estimate import estimate
from jaxscale.plan.pipeline import estimate_pipeline, pipelines


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
# (github.com/sajal-vt/Megatron-DeepSpeed-ORNL); 1,600 rows for 1T are from memory of the
# paper. Optimizer state is split over the two replicas of 22B and 175B, which the library needs: it sums gradients in
# float32 beside those of the running micro-batch.
STUDY = [
    (gpt("gpt-22b", 48, 6144, 48), "mi250x:2x8", "pp=8,fsdp=2", 640, 0.3838, 10),
    (gpt("gpt-175b", 96, 12_288, 96), "mi250x:16x8", "pp=16,fsdp=2,tp=4", 1280, 0.3614, 4),
    (gpt("gpt-1t", 128, 25_600, 128), "mi250x:128x8", "pp=64,dp=2,tp=8", 1600, 0.3196, 1),
]


@pytest.mark.parametrize(("model", "pod", "mesh", "rows", "theirs", "place"), STUDY)
def test_the_set_ups_of_the_frontier_study_are_valid_and_near_the_top(model, pod, mesh, rows, theirs, place):
    chosen = estimate_pipeline(model, MeshConfig.parse(mesh), pod, batch_size=rows, seq_len=2048)
    assert chosen.fits
    found = pipelines(model, pod, batch_size=rows, seq_len=2048)
    assert [p.mesh for p in found].index(chosen.mesh) < place
    # Large matmuls are taken at 0.7 of the peak; the study reached less. The order stays, not the figure.
    assert theirs < chosen.flops / chosen.seconds / 191.5e12 < 2 * theirs


def test_a_pipeline_by_hand(rng):
    model = gpt("small", 8, 256, 4)
    rows = 8 * int(rng.integers(2, 6))
    one = estimate_pipeline(model, MeshConfig(fsdp=4), "h200:1x4", batch_size=rows, seq_len=128)
    whole = estimate(
        model, MeshConfig(fsdp=4), "h200:1x4", batch_size=rows, seq_len=128, remat="full", accum_steps=rows // 4
    )
    assert one.bubble == 0 and one.memory == whole.memory.total and one.seconds <= whole.seconds
    four = estimate_pipeline(model, MeshConfig(pp=4), "h200:1x4", batch_size=rows, seq_len=128)
    assert four.micro_batches == rows and four.bubble == pytest.approx(3 / (rows + 3))
    stage = estimate(
        dataclasses.replace(model, num_layers=2),
        MeshConfig(),
        "h200:1x1",
        batch_size=rows,
        seq_len=128,
        remat="full",
        accum_steps=rows,
    )
    assert four.memory == stage.memory.total + 3 * stage.memory.residuals  # four micro-batches in flight
    assert four.seconds > stage.seconds / (1 - four.bubble)


def test_stages_of_unequal_depth_are_refused():
    with pytest.raises(ValueError, match="num_layers=8 must be a multiple of pp=3"):
        estimate_pipeline(gpt("small", 8, 256, 4), MeshConfig(pp=3), "h200:1x3", batch_size=8, seq_len=128)
