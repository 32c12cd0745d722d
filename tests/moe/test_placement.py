"""Placements: as good as the best of all, fewer crossings than dealing out, and the same function after applying."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.models import decoder
from jaxscale.plan.placement import apply_placement, balance, crossings, place, round_robin

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


def test_what_does_not_fit_is_said(rng):
    trace = rng.integers(0, 8, (2, 1, 5, 2))
    with pytest.raises(ValueError, match="num_experts=8 is not divisible by num_devices=3"):
        place(trace, num_experts=8, num_devices=3)
    placement = place(trace, num_experts=8, num_devices=2)
    other = dataclasses.replace(CFG, num_layers=5)
    with pytest.raises(ValueError, match="2 layers of 8 experts but custom has 4 layers of 8"):
        apply_placement({}, other, placement)
