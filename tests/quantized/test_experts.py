"""Routed and shared experts under the recipes: the dequantized model's logits, on a mesh too."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxscale
from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.parallel import expert_local
from jaxscale.parallel.expert import apply_experts
from jaxscale.params import init_params, path_name
from pallas_kernels import QuantizedArray, quantize_array, quantize_rows
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


ROUNDED = {"w8a8": "int8", "w8a8-fp8": "float8_e4m3fn", "w8a8-fp8-g16": "float8_e4m3fn"}


def experts_of(rng, recipe, E=4, D=32, F=16):
    """x [4,6,D], the experts and weights of 2 choices each, one of them nobody's now and then; rounded matrices."""
    shapes = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    group = 16 if recipe.endswith("g16") else None
    format = ROUNDED[recipe]
    p = {
        name: quantize_array(jnp.asarray(rng.normal(size=s), jnp.float32), format, group=group, activations=format)
        for name, s in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(4, 6, D)), jnp.float32)
    experts = np.argsort(rng.random((4, 6, E)), axis=-1)[..., :2]
    experts = jnp.asarray(np.where(rng.random(experts.shape) < 0.2, E + 1, experts), jnp.int32)
    return x, experts, jnp.asarray(rng.random(experts.shape), jnp.float32), p


def by_hand(x, experts, weights, p):
    """float64, an expert at a time, each matmul's input rounded for itself."""

    def near(x, w):
        format, S = w.activations, w.scales.shape[-1]
        return np.asarray(quantize_rows(jnp.asarray(x, jnp.float32), S, format).dequantize(), np.float64)

    x, weights = np.asarray(x).reshape(-1, x.shape[-1]), np.asarray(weights, np.float64).reshape(-1, 2)
    out, experts = np.zeros(x.shape), np.asarray(experts).reshape(-1, 2)
    matrices = {name: np.asarray(w.dequantize(), np.float64) for name, w in p.items()}
    for t, k in np.argwhere(experts < len(matrices["w_up"])):
        e, row = experts[t, k], x[t : t + 1]
        gate, up = (near(row, p[name]) @ matrices[name][e] for name in ("w_gate", "w_up"))
        hidden = gate / (1 + np.exp(-gate)) * up * weights[t, k]
        out[t] += (near(hidden, p["w_down"]) @ matrices["w_down"][e])[0]
    return out


@pytest.mark.parametrize("recipe", ROUNDED)
def test_tokens_are_rounded_before_they_are_spread(rng, monkeypatch, recipe):
    """Bit for bit what rounding each of their rows gives; the gradient is that of the other way."""
    x, experts, weights, p = experts_of(rng, recipe)
    seen = []
    move = expert_local.spread
    monkeypatch.setattr(expert_local, "spread", lambda a, places: seen.append(a.dtype) or move(a, places))
    run = lambda x, weights: apply_experts(x, experts, weights, p)
    got = run(x, weights)
    assert jnp.dtype(p["w_up"].activations) in seen and x.dtype == got.dtype
    grads = jax.grad(lambda *args: (run(*args) ** 2).sum(), argnums=(0, 1))(x, weights)
    monkeypatch.setattr(expert_local, "_rounding", lambda p: None)
    seen.clear()
    want = run(x, weights)
    assert jnp.dtype(p["w_up"].activations) not in seen
    np.testing.assert_array_equal(got, want)
    wanted = jax.grad(lambda *args: (run(*args) ** 2).sum(), argnums=(0, 1))(x, weights)
    for one, other in zip(grads, wanted, strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_array_equal(one, other)
    # int8 and float8 hidden values next to a half may round the other way: one step of one number.
    exact = by_hand(x, experts, weights, p)
    np.testing.assert_allclose(got.reshape(exact.shape), exact, atol=0.02 * np.abs(exact).max(), rtol=0)


@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all", "two_level"])
def test_rounded_tokens_travel(rng, monkeypatch, dispatch):
    x, experts, weights, p = experts_of(rng, str(rng.choice(list(ROUNDED))))
    mesh = make_mesh(devices=jax.devices()[:4], ep=4)
    hosts = 2 if dispatch == "two_level" else 1

    def run(x, weights):
        fn = functools.partial(apply_experts, dispatch=dispatch, hosts=hosts)
        with jax.set_mesh(mesh):
            there = lambda a, *spec: jax.device_put(a, jax.NamedSharding(mesh, P(*spec)))
            args = [there(a, "ep") for a in (x, experts, weights)]
            split = jax.tree.map(lambda a: there(a, "ep"), p)
            compiled = jax.jit(fn).lower(*args, split).compile()
            return np.asarray(compiled(*args, split)), compiled.as_text()

    got, program = run(x, weights)
    short = {"int8": "s8", "float8_e4m3fn": "f8e4m3fn"}[p["w_up"].activations]
    assert re.search(rf"{short}\[[^=]*(all-gather|all-to-all)\(", program) or short == "f8e4m3fn"  # CPUs send it as f16
    monkeypatch.setattr(expert_local, "_rounding", lambda p: None)
    want, program = run(x, weights)
    assert not re.search(rf"{short}\[[^=]*(all-gather|all-to-all)\(", program)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_allclose(got, apply_experts(x, experts, weights, p), rtol=1e-4, atol=1e-4)
