"""Configurations refuse what cannot work, with the numbers and the remedy."""

import dataclasses
import functools
import json
import math

import pytest

from jaxscale import MeshConfig, ModelConfig, TrainConfig, runs
from jaxscale.config import DataConfig, MoEConfig, OptimizerConfig, RopeScaling, from_dict
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
            lambda: MeshConfig(fsdp=2, ep=4).check_model(presets.tiny()),
            "fsdp=2,ep=4: tiny has no experts .* set ep=1 and use dp or fsdp",
        ),
        (lambda: MeshConfig(fsdp=8).check_rows(7), r"batch_size=7 .* dp\*fsdp\*ep\*accum_steps=8; use 8 rows"),
        (lambda: MeshConfig(fsdp=4, dp=2).check_rows(18, 2), "accum_steps=16; use 16 or 32 rows"),
        (
            lambda: TrainConfig(model=presets.tiny(), precision_skip="w_down"),
            "precision_skip='w_down' leaves weights out of a precision; name one, as in precision='fp8'",
        ),
        (
            lambda: TrainConfig(model=presets.tiny(), precision_skip="w("),
            r"precision_skip='w\(' is no regular expression: missing \).*; .* use w\\\($",
        ),
        (lambda: TrainConfig(model=presets.tiny(), seed=2**63), r"less than 2\*\*63, such as 0"),
        (lambda: OptimizerConfig(clip_norm=math.nan), "clip_norm=nan must be positive; inf clips nothing"),
        (lambda: OptimizerConfig(final_fraction=5), "final_fraction=5 must be between 0 and 1, such as 0.1"),
        (lambda: DataConfig(source=""), "source='' .* names no text; stdlib is always there"),
        (lambda: DataConfig(suffixes=()), r"suffixes=\(\) names no text"),
        (lambda: TrainConfig(model=presets.tiny(), out=""), "out is empty; name the directory"),
        (lambda: RopeScaling(kind="llama3", factor=8, low_freq_factor=4), "low_freq_factor=4 must be less than"),
        (
            lambda: TrainConfig(model=presets.tiny(), data=DataConfig(seq_len=4096)),
            "longer than the model's max_seq_len",
        ),
        (lambda: TrainConfig(model=presets.tiny(), accum_steps=3), "batch_size=16 is not divisible by accum_steps=3"),
        (
            lambda: MoEConfig(num_experts=4, top_k=2, mlp_dim=8, dispatch="all-to-all"),  # pyright: ignore
            "dispatch='all-to-all' is not one of auto, .*, two_level; all_to_all?",
        ),
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


POSITIVE = {
    "norm_eps query_scale attn_soft_cap logit_soft_cap rope_theta local_rope_theta": model,
    "learning_rate eps clip_norm": OptimizerConfig,
    "factor beta_fast beta_slow attention_factor high_freq_factor": functools.partial(
        RopeScaling, kind="yarn", factor=4.0
    ),
    "weight_scale capacity_factor": functools.partial(
        MoEConfig, num_experts=4, top_k=2, mlp_dim=8, router="gshard", dropless=False
    ),
}
NOT_NEGATIVE = {
    "warmup_steps final_fraction weight_decay b1 b2": OptimizerConfig,
    "z_loss": functools.partial(TrainConfig, model=presets.tiny()),
    "balance_weight router_z_weight cheap_balance shared_dim": functools.partial(
        MoEConfig, num_experts=4, top_k=2, mlp_dim=8
    ),
}


@pytest.mark.parametrize(("makers", "zero"), [(POSITIVE, False), (NOT_NEGATIVE, True)])
def test_numbers_have_a_range(makers, zero, rng):
    """Of every field: nan, a negative number and minus infinity are refused with it, what lies within is not."""
    for names, make in makers.items():
        for name in names.split():
            below = -float(rng.uniform(0.01, 9))
            for bad in (math.nan, -math.inf, below, *(() if zero else (0,))):
                with pytest.raises(ValueError, match=f"^{name}={bad} must be ".replace("+", r"\+")) as error:
                    make(**{name: bad})
                assert "\n" not in str(error.value)
            make(**{name: float(rng.uniform(0.01, 0.99))})


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
