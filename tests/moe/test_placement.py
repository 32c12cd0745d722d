"""Placements: as good as the best of all, fewer crossings than dealing out, and the same function after applying."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import param_shardings
from jaxscale.plan import placement as placements
from jaxscale.plan.placement import (
    apply_placement,
    apply_replicas,
    balance,
    busiest_device,
    crossings,
    place,
    replicate,
    round_robin,
)
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    vocab_size=32,
    num_layers=3,
    embed_dim=16,
    mlp_dim=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    dtype="float32",
    moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=8, first_dense=1, num_copy=1, router="sigmoid"),
)


def test_balance_is_the_best_of_all(rng):
    load = rng.integers(0, 100, 8)
    groups, gap = balance(load, 2)
    best = min(max(load[list(g)].sum(), load.sum() - load[list(g)].sum()) for g in itertools.combinations(range(8), 4))
    assert sorted(np.concatenate(groups).tolist()) == list(range(8)) and {len(g) for g in groups} == {4}
    assert max(load[g].sum() for g in groups) == best
    assert 0 <= gap < 0.5


def test_affinity_keeps_tokens_where_they_are(rng):
    """Experts of two layers that always follow each other, under random names, end on one device."""
    first = rng.integers(0, 8, (1, 4, 500, 1))
    trace = np.concatenate([first, rng.permutation(8)[first]])
    there = place(trace, num_experts=8, num_devices=8)
    assert crossings(trace, there) == 0
    assert crossings(trace, round_robin(2, 8, 8)) > 0


def test_the_same_function(rng):
    params = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), decoder.param_specs(CFG))
    tokens = rng.integers(0, 32, (2, 9)).astype(np.int32)
    trace = np.asarray(decoder.router_trace(params, tokens, CFG))
    assert trace.shape == (2, 2, 9, 2)
    placement = place(trace, num_experts=8, num_devices=4)
    moved = apply_placement(params, CFG, placement)
    forward = jax.jit(decoder.forward, static_argnums=2)
    np.testing.assert_allclose(forward(moved, tokens, CFG), forward(params, tokens, CFG), atol=1e-5)
    again = np.asarray(decoder.router_trace(moved, tokens, CFG))
    named = np.concatenate([placement.order, np.full((2, 1), 8)], axis=1)
    assert (np.stack([named[i][again[i]] for i in range(2)]) == trace).all()


def test_large_cases_are_greedy_and_say_how_far_from_the_best(monkeypatch, rng):
    load = rng.integers(1, 1000, 32)
    exact, exact_gap = balance(load, 4)
    monkeypatch.setattr(placements, "_LARGEST", 64)
    greedy, gap = balance(load, 4)
    busiest = lambda groups: max(load[g].sum() for g in groups)
    assert sorted(np.concatenate(greedy).tolist()) == list(range(32)) and {len(g) for g in greedy} == {8}
    assert busiest(exact) <= busiest(greedy) <= busiest(exact) * (1 + gap) + 1e-6
    assert 0 <= exact_gap <= gap + 1e-9


def test_copies_of_a_busy_expert_even_the_load(rng):
    """Expert 5 takes half of the tokens: no order can help, copies do."""
    trace = np.where(rng.random((2, 4, 500, 1)) < 0.5, 5, rng.integers(0, 8, (2, 4, 500, 1)))
    busy = replicate(trace, num_experts=8, num_devices=4, num_replicas=4)
    assert busy.order.shape == (2, 12) and all(set(row) == set(range(8)) for row in busy.order.tolist())
    assert (np.bincount(busy.order[0])[5] >= 4) and busiest_device(trace, busy).max() < 1.3
    assert busiest_device(trace, place(trace, num_experts=8, num_devices=4)).min() > 2
    with pytest.raises(
        ValueError, match=r"num_replicas=3 is not divisible by num_devices=4; use num_replicas in \[0, 4\]"
    ):
        replicate(trace, num_experts=8, num_devices=4, num_replicas=3)


def test_copies_are_the_same_function(rng):
    """On one device and with the places, copies among them, split over ep; groups and residuals do not matter."""
    moe = dataclasses.replace(CFG.moe, num_copy=0, num_groups=2, top_groups=1)
    for cfg in (CFG, dataclasses.replace(CFG, moe=moe)):
        specs = decoder.param_specs(cfg)
        params = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), specs)
        tokens = rng.integers(0, 32, (4, 9)).astype(np.int32)
        forward = jax.jit(decoder.forward, static_argnums=2)
        want = forward(params, tokens, cfg)
        trace = np.asarray(decoder.router_trace(params, tokens, cfg))
        moved, copied = apply_replicas(params, cfg, replicate(trace, num_experts=8, num_devices=4, num_replicas=4))
        assert copied.moe.num_places == 12
        np.testing.assert_allclose(forward(moved, tokens, copied), want, atol=1e-5)
    mesh = make_mesh(ep=4, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(moved, param_shardings(decoder.param_specs(copied), mesh, MEGATRON_FSDP))
        np.testing.assert_allclose(forward(placed, tokens, copied), want, atol=1e-5)
    other = dataclasses.replace(CFG, num_layers=5)
    with pytest.raises(ValueError, match="2 layers of 8 experts but custom has 4 layers of 8 experts, 0 copies"):
        apply_replicas({}, other, replicate(trace, num_experts=8, num_devices=4, num_replicas=4))


def test_what_does_not_fit_is_said(rng):
    trace = rng.integers(0, 8, (2, 1, 5, 2))
    with pytest.raises(ValueError, match="num_experts=8 is not divisible by num_devices=3"):
        place(trace, num_experts=8, num_devices=3)
    with pytest.raises(ValueError, match=r"of experts' numbers. Got float32\(2, 1, 5, 2\); make it with router_trace"):
        place(trace.astype(np.float32), num_experts=8, num_devices=2)
    placement = place(trace, num_experts=8, num_devices=2)
    other = dataclasses.replace(CFG, num_layers=5)
    with pytest.raises(ValueError, match="2 layers of 8 experts but custom has 4 layers of 8"):
        apply_placement({}, other, placement)
