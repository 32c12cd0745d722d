"""Generation over cp: the cache's slots are split, answers are those of one device, traffic does not grow with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import generate as gen
from jaxscale.config import MLAConfig, ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, param_shardings
from jaxscale.plan.hlo import census
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=16,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=2048,
    dtype="float32",
    window=40,
    layer_pattern=("local", "global"),
)


LATENT = dataclasses.replace(
    CFG,
    window=None,
    layer_pattern=("global",),
    num_kv_heads=4,
    head_dim=12,
    mla=MLAConfig(kv_rank=16, q_rank=None, nope_dim=8, rope_dim=4, value_dim=6),
)
SINKS = dataclasses.replace(CFG, sinks=True)


def params_on(mesh, cfg=CFG):
    params = jax.tree.map(lambda x: x * 1.5, init_params(jax.random.key(0), decoder.param_specs(cfg)))
    return jax.device_put(params, param_shardings(decoder.param_specs(cfg), mesh, MEGATRON_FSDP)) if mesh else params


@pytest.mark.parametrize(
    ("cfg", "sizes"), [(CFG, {"cp": 4}), (CFG, {"cp": 2, "tp": 2, "fsdp": 2}), (LATENT, {"cp": 2}), (SINKS, {"cp": 2})]
)
def test_generation_over_cp(rng, cfg, sizes):
    """Prompts of unequal lengths, so that new tokens go to slots of several devices; local and global layers, latents,
    sinks."""
    mesh = make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (130, 5)]
    want = gen.generate(params_on(None, cfg), cfg, prompts, max_new_tokens=5)
    assert gen.generate(params_on(mesh, cfg), cfg, prompts, max_new_tokens=5) == want


def test_cache_is_split_and_traffic_does_not_grow(rng):
    """Each device holds a quarter of the slots. What a step moves over cp is the same for four times as many."""
    mesh = make_mesh(devices=jax.devices()[:4], cp=4)
    params = params_on(mesh)
    moved = []
    with jax.set_mesh(mesh):
        for slots in (256, 1024):
            cache = decoder.init_cache(CFG, 2, slots)
            assert {x.addressable_shards[0].data.shape[2] for x in jax.tree.leaves(cache)} == {slots // 4}
            step = jax.jit(functools.partial(gen.decode_step, cfg=CFG), donate_argnums=1)
            rows = jnp.zeros((2,), jnp.int32)
            compiled = step.lower(params, cache, rows, rows).compile()
            moved.append(census(compiled, mesh=mesh).wire_bytes("cp"))
            logits, cache = step(params, cache, rows, rows + 200)
            assert {x.addressable_shards[0].data.shape[2] for x in jax.tree.leaves(cache)} == {slots // 4}
            assert np.isfinite(logits).all()
    assert moved[0] == moved[1] > 0
