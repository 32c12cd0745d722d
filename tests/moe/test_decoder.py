"""Decoders with experts: every mesh equals one device, loss and gradients, with every router; what routers promise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale.config import MeshConfig, MLAConfig, ModelConfig, MoEConfig
from jaxscale.generate import generate
from jaxscale.models import decoder, moe, routing
from jaxscale.parity import parity
from jaxscale.train import make_train_state, make_train_step

MIXTURE = MoEConfig(num_experts=4, top_k=2, mlp_dim=24, router_z_weight=1e-2, balance_weight=0.1)
BASE = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=24,
    mlp_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,
    dtype="float32",
    moe=MIXTURE,
)
ROUTERS = {
    "sigmoid": {"router": "sigmoid", "num_groups": 2, "top_groups": 1, "shared_dim": 16, "first_dense": 1},
    "gshard": {"router": "gshard", "capacity_factor": 1.0, "dropless": False},
    "cosine": {"router": "cosine", "cosine_dim": 8, "balance_rows": 1},
    "expert_choice": {"router": "expert_choice", "dropless": False, "balance_rows": 2},
    "gpt_oss": {"activation": "gpt_oss", "router_bias": True},
    "moe++": {"num_zero": 1, "num_copy": 1, "num_constant": 2, "gating_residual": True},
}


def model(**changes) -> ModelConfig:
    return dataclasses.replace(BASE, moe=dataclasses.replace(MIXTURE, **changes))


def random_params(cfg, rng):
    draw = lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32)
    params = jax.tree.map(draw, decoder.param_specs(cfg))
    if "temperature" in params["layers"]["moe"]["router"]:
        params["layers"]["moe"]["router"]["temperature"] = np.full((cfg.num_layers, 1), 0.2, np.float32)
    return params


def batch_of(cfg, rng, rows=8, length=6):
    shape = (rows, length)
    segments = np.where(np.arange(length) < length - 1, 1, 0) * np.ones(shape, int)
    return {
        "tokens": rng.integers(0, cfg.vocab_size, shape).astype(np.int32),
        "labels": np.where(segments > 0, rng.integers(0, cfg.vocab_size, shape), -1).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
    }


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_on_a_mesh(router, rng):
    cfg = model(**ROUTERS[router])
    mesh = "ep=4,cp=2" if router in ("gshard", "expert_choice") else "fsdp=2,ep=2,tp=2"
    loss = functools.partial(decoder.loss_fn, cfg=cfg, remat="dots")
    parity(loss, random_params(cfg, rng), batch_of(cfg, rng), [mesh], specs=decoder.param_specs(cfg))


def route(rng, rows=2, length=16, bias=None, mask=None, **changes):
    m = dataclasses.replace(MIXTURE, num_experts=8, **changes)
    logits = rng.standard_normal((rows, length, m.num_routed), np.float32)
    mask = np.ones((rows, length), bool) if mask is None else mask
    return m, logits, routing.route(jnp.asarray(logits), bias, mask, m)


def test_softmax_takes_the_best_and_weighs_them(rng):
    _, logits, chosen = route(rng, top_k=3)
    for scores, experts, weights in zip(
        *(x.reshape(-1, x.shape[-1]) for x in (logits, chosen.experts, chosen.weights))
    ):
        best = np.argsort(-scores)[:3]
        assert experts.tolist() == best.tolist()
        np.testing.assert_allclose(weights, np.exp(scores[best]) / np.exp(scores[best]).sum(), rtol=1e-5)


def test_groups_and_a_bias_that_only_chooses(rng):
    """DeepSeek-V3, spelled out for each token."""
    bias = (0.3 * rng.standard_normal(8)).astype(np.float32)
    _, logits, chosen = route(
        rng, router="sigmoid", bias=jnp.asarray(bias), num_groups=4, top_groups=2, top_k=3, weight_scale=2.5
    )
    for z, experts, weights in zip(*(x.reshape(-1, x.shape[-1]) for x in (logits, chosen.experts, chosen.weights))):
        score = 1 / (1 + np.exp(-z))
        best = np.argsort(-(score + bias).reshape(4, 2).sum(axis=1))[:2]
        allowed = [e for e in range(8) if e // 2 in best]
        expected = sorted(allowed, key=lambda e: -(score + bias)[e])[:3]
        assert experts.tolist() == expected
        np.testing.assert_allclose(weights, 2.5 * score[expected] / score[expected].sum(), rtol=1e-4)


def test_capacity_serves_first_choices_first(rng):
    mask = rng.random((2, 16)) < 0.8
    m, logits, chosen = route(rng, router="gshard", capacity_factor=0.75, dropless=False, mask=mask)
    room = routing.capacity(m, 16)
    assert room == 3
    for row in range(2):
        ranked = np.argsort(-logits[row], axis=-1)[:, :2]
        taken = np.zeros(8, int)
        expected = np.full((16, 2), -1)
        for choice in range(2):
            for t in np.flatnonzero(mask[row]):
                e = ranked[t, choice]
                if taken[e] < room:
                    expected[t, choice], taken[e] = e, taken[e] + 1
        assert np.asarray(chosen.experts[row]).tolist() == expected.tolist()


def test_experts_choose_their_share(rng):
    m, _, chosen = route(rng, router="expert_choice", dropless=False)
    counts = np.stack([(np.asarray(chosen.experts) == e).sum(axis=(1, 2)) for e in range(8)])
    assert (counts == routing.capacity(m, 16)).all()


def test_bias_balancing_evens_the_load(rng):
    """Loss-free: only the bias moves, and the load of a router that favours few experts becomes even."""
    m = dataclasses.replace(MIXTURE, num_experts=8, router="sigmoid")
    logits = jnp.asarray(rng.standard_normal((4, 64, 8), np.float32) + np.linspace(-1, 1, 8, dtype=np.float32))
    mask, bias = np.ones((4, 64), bool), np.zeros(8, np.float32)
    load = lambda b: np.bincount(
        np.asarray(routing.route(logits, jnp.asarray(b), mask, m).experts).ravel(), minlength=8
    )
    before = load(bias)
    for _ in range(150):
        bias = bias - 0.01 * np.sign(load(bias) - load(bias).mean()).astype(np.float32)
    assert load(bias).max() < 1.25 * load(bias).mean() < before.max()


def test_it_trains_and_the_bias_goes_its_own_way(rng):
    cfg = model(router="sigmoid", shared_dim=8)
    optimizer = moe.with_bias_balancing(optax.adam(1e-2), rate=0.01)
    params = jax.tree.map(jnp.asarray, random_params(cfg, rng))
    bias = np.array(params["layers"]["moe"]["router"]["balance_bias"])
    state = make_train_state(params, optimizer, jax.random.key(0))
    step = make_train_step(functools.partial(decoder.loss_fn, cfg=cfg), optimizer)
    batch, seen = batch_of(cfg, rng), []
    for _ in range(12):
        state, metrics = step(state, batch)
        seen.append({k: float(v) for k, v in metrics.items()})
    assert seen[-1]["nll"] < seen[0]["nll"] - 0.3
    assert seen[0]["router_dropped"] == 0 and 0 < seen[0]["router_entropy"] <= np.log(4) + 1e-6
    moved = np.abs(np.asarray(state.params["layers"]["moe"]["router"]["balance_bias"]) - bias)
    assert 0 < moved.max() <= 12 * 0.01 + 1e-6


def test_a_router_that_looks_ahead_cannot_decode(rng):
    cfg = model(router="expert_choice", dropless=False)
    with pytest.raises(ValueError, match=r"cannot decode: with router='expert_choice' each of its 4 experts chooses"):
        generate(jax.tree.map(jnp.asarray, random_params(cfg, rng)), cfg, [[1, 2, 3]], max_new_tokens=2)


def test_groups_whose_best_expert_scores_highest(rng):
    """DeepSeek-V2, spelled out for each token."""
    _, logits, chosen = route(rng, num_groups=4, top_groups=2, top_k=3, weight_scale=4.0, norm_top_k=False)
    for z, experts, weights in zip(*(x.reshape(-1, x.shape[-1]) for x in (logits, chosen.experts, chosen.weights))):
        score = np.exp(z) / np.exp(z).sum()
        best = np.argsort(-score.reshape(4, 2).max(axis=1))[:2]
        expected = sorted((e for e in range(8) if e // 2 in best), key=lambda e: -score[e])[:3]
        assert experts.tolist() == expected
        np.testing.assert_allclose(weights, 4.0 * score[expected], rtol=1e-4)


def test_bad_configurations_say_the_numbers():
    for changes, said in (
        ({"top_k": 5}, "top_k=5 must lie between 1 and the 4 experts"),
        ({"router": "gshard", "capacity_factor": 1.0}, "drops tokens but dropless=True promises not to"),
        ({"router": "sigmoid", "num_groups": 3}, "num_groups=3"),
        ({"router": "expert_choice"}, "leaves tokens without an expert"),
        ({"num_groups": 2, "top_groups": 1, "top_k": 3}, "top_k=3 experts do not lie in 1 groups of 2 experts"),
        ({"router": "cosine", "num_groups": 2}, "num_groups=2 needs router='softmax' or 'sigmoid'"),
        ({"num_replicas": -1}, "num_replicas=-1 must be at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            model(**changes)
    with pytest.raises(ValueError, match=r"num_experts=4 is not divisible by ep=8; use ep in \[1, 2, 4\]"):
        MeshConfig(ep=8).check_model(BASE)
    with pytest.raises(ValueError, match=r"num_experts=4 \+ num_replicas=2 is not divisible by ep=4; use ep in \[1, 2"):
        MeshConfig(ep=4).check_model(model(num_replicas=2))
    with pytest.raises(ValueError, match="first_dense=2 leaves no layer"):
        model(first_dense=2)
    mla = MLAConfig(kv_rank=8, q_rank=None, nope_dim=8, rope_dim=4, value_dim=8)
    with pytest.raises(ValueError, match=r"set head_dim=12 \(got 8\) and num_kv_heads=2 \(got 2\)"):
        dataclasses.replace(BASE, mla=mla)
    with pytest.raises(ValueError, match="latent attention has no sinks"):
        dataclasses.replace(BASE, mla=mla, head_dim=12, sinks=True)
    with pytest.raises(ValueError, match="rope_dim=3 is odd"):
        dataclasses.replace(mla, rope_dim=3)
