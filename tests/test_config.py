"""Configurations refuse what cannot work, with the numbers and the remedy."""

import dataclasses
import json

import pytest

from jaxscale import MeshConfig, ModelConfig, TrainConfig, runs
from jaxscale.config import DataConfig, from_dict
from jaxscale.models import presets


def model(**changes):
    return dataclasses.replace(presets.tiny(), **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: model(num_heads=6, num_kv_heads=4),
            r"num_heads=6 .* num_kv_heads=4; use num_kv_heads in \[1, 2, 3, 6\]",
        ),
        (lambda: model(head_dim=7), "head_dim=7 is odd"),
        (lambda: model(layer_pattern=("local", "global")), "window is not set"),
        (lambda: model(num_layers=0), "num_layers=0 must be at least 1"),
        (lambda: MeshConfig(fsdp=0), "fsdp=0"),
        (lambda: MeshConfig(fsdp=-1, dp=-1), "only one mesh axis may be -1"),
        (lambda: MeshConfig(fsdp=4, tp=4).fill(8), "fsdp=4,tp=4 needs 16 devices but 8 are there"),
        (lambda: MeshConfig(fsdp=-1, tp=3).fill(8), "a multiple of 3 devices but 8 are there"),
        (lambda: MeshConfig.parse("fdsp=2"), "'fdsp=2' is not axis=size"),
        (lambda: MeshConfig(tp=5).check_model(presets.tiny()), r"tp=5 divides neither num_heads=4 nor mlp_dim=384"),
        (lambda: DataConfig(seq_len=1), "seq_len=1"),
        (
            lambda: TrainConfig(model=presets.tiny(), data=DataConfig(seq_len=4096)),
            "longer than the model's max_seq_len",
        ),
        (lambda: TrainConfig(model=presets.tiny(), accum_steps=3), "batch_size=16 is not divisible by accum_steps=3"),
        (lambda: from_dict(ModelConfig, {"vocab_sise": 3}), "no field 'vocab_sise'; did you mean 'vocab_size'"),
        (lambda: from_dict(TrainConfig, {"data": {"seqlen": 3}}), "no field 'data.seqlen'; did you mean 'seq_len'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("run", [runs.tiny, runs.llama3_8b])
def test_a_config_survives_json(run):
    cfg = run()
    assert from_dict(TrainConfig, json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg


def test_mesh_text_round_trip():
    assert MeshConfig.parse("fsdp=4, tp=2") == MeshConfig(fsdp=4, tp=2)
    assert str(MeshConfig(fsdp=4, tp=2)) == "fsdp=4,tp=2"
    assert MeshConfig(dp=2, fsdp=-1, tp=2).fill(16) == MeshConfig(dp=2, fsdp=4, tp=2)


def test_flops_count_every_matmul():
    """Against a count by hand for one layer without windows."""
    cfg = model(num_layers=1, vocab_size=10, embed_dim=4, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=6)
    weights = 4 * 12 + 2 * 4 * 6 + 12 * 4 + 3 * 4 * 8 + 10 * 4
    causal_scores_and_values = 2 * 2 * 12 * 16 / 2  # two matmuls of N*H, half of 16 keys each, multiply and add
    assert cfg.flops_per_token(16) == 6 * weights + 3 * causal_scores_and_values
