"""Routed and shared experts under the recipes: the dequantized model's logits, on a mesh too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import jaxscale
from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, path_name
from pallas_kernels.quantized_matmul.array import QuantizedArray
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    mlp_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    moe=MoEConfig(num_experts=4, top_k=2, mlp_dim=32, shared_dim=32),
)
SPECS = decoder.param_specs(CFG)


def is_quantized(w):
    return isinstance(w, QuantizedArray)


def test_experts_in_few_bits(rng):
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    tokens = jnp.asarray(rng.integers(1, 64, size=(4, 8)), jnp.int32)
    small = jaxscale.quantize(params, "w4a16-g8", SPECS)
    leaves = jax.tree.leaves_with_path(small, is_leaf=is_quantized)
    rounded = {path_name(path) for path, w in leaves if is_quantized(w)}
    assert {f"layers/moe/{part}/{n}" for part in ("experts", "shared") for n in ("w_gate", "w_up", "w_down")} <= rounded
    assert not any("router" in name for name in rounded)
    dense = jax.tree.map(lambda w: w.dequantize() if is_quantized(w) else w, small, is_leaf=is_quantized)
    run = jax.jit(functools.partial(decoder.forward, cfg=CFG))
    want = run(dense, tokens)
    assert float(jnp.abs(want - run(params, tokens)).max()) > 0.01  # rounding is seen
    np.testing.assert_allclose(run(small, tokens), want, rtol=1e-4, atol=1e-4)
    mesh = make_mesh(devices=jax.devices()[:8], ep=2, tp=2, fsdp=2)
    there = jax.device_put(params, jaxscale.param_shardings(SPECS, mesh, MEGATRON_FSDP))
    split = jaxscale.quantize(there, "w4a16-g8", SPECS)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(split, tokens), want, rtol=1e-4, atol=1e-4)
