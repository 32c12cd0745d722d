"""FMPQ: the channels' order changes nothing, outliers come first, their groups keep 8 bits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params
from jaxscale.quantize.calibrate import (
    Statistics,
    _rounded,
    gather_statistics,
    nearest,
    quantize_calibrated,
    smoothquant,
)
from jaxscale.quantize.channels import outliers_first, smooth_keys
from jaxscale.quantize.recipe import Recipe, Rounding, parse_recipe
from pallas_kernels import quantized_matmul
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=64,
    num_layers=2,
    embed_dim=64,
    mlp_dim=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=64,
    dtype="float32",
)


def make(rng, cfg):
    """Parameters whose norms scale a few channels of the residual stream up, and one of a hidden layer."""
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), decoder.param_specs(cfg))
    noise = lambda path, x: x + jnp.asarray(rng.normal(size=x.shape) * 0.02, x.dtype)
    params = jax.tree.map_with_path(noise, params)
    loud = rng.choice(cfg.embed_dim, size=3, replace=False)
    layers = params["layers"]
    for norm in ("attn_norm", "mlp_norm"):
        layers[norm] = layers[norm].at[:, loud].mul(10.0)
    layers["mlp"]["w_up"] = layers["mlp"]["w_up"].at[..., rng.integers(cfg.mlp_dim)].mul(40.0)
    attn = layers["attn"]
    attn["wk"] = attn["wk"] * jnp.asarray(np.tile(np.exp(rng.normal(size=(2, 1, 2, 8))), 2), jnp.float32)
    return params, set(loud.tolist())


def test_outliers_come_first_and_keep_8_bits(rng):
    """Neither the order nor the keys' units change anything, with biases and an untied head too; nor does a mesh."""
    biases = bool(rng.integers(2))
    cfg = dataclasses.replace(CFG, out_bias=biases, mlp_bias=biases, tie_embeddings=not biases)
    params, loud = make(rng, cfg)
    tokens, specs = jnp.asarray(rng.integers(0, 64, size=(2, 24)), jnp.int32), decoder.param_specs(cfg)
    statistics = gather_statistics(params, specs, functools.partial(decoder.forward, cfg=cfg), [tokens])
    run = jax.jit(decoder.forward, static_argnames="cfg")
    want = np.asarray(run(params, tokens, cfg=cfg))
    error = lambda p: np.abs(np.asarray(run(p, tokens, cfg=cfg)) - want)

    moved, there = outliers_first(params, specs, statistics)
    assert error(moved).max() < 1e-3 * np.abs(want).max()
    assert loud == {params["final_norm"].tolist().index(float(x)) for x in moved["final_norm"][:3]}
    before, after = statistics["layers/mlp/w_down"], there["layers/mlp/w_down"]
    order = np.argsort(-np.asarray(before.top), axis=1)
    for i in range(cfg.num_layers):
        np.testing.assert_array_equal(after.hessian[i], before.hessian[i][order[i]][:, order[i]])
    np.testing.assert_array_equal(after.top, -np.sort(-np.asarray(before.top), axis=1))

    keys = smooth_keys(params, specs, statistics)
    assert error(keys).max() < 1e-3 * np.abs(want).max()
    assert 0.3 < _spread(keys) / _spread(params) < 0.8  # half as far apart, on a logarithmic scale

    four = Rounding(format="uint4", group=16, activations="int4")
    rules = (("w_up|w_down|wo", four), ("", None))
    small = quantize_calibrated(params, Recipe(rules=rules, method="fmpq"), specs, statistics)
    assert small["layers"]["mlp"]["w_up"].outliers.tolist() == [[True, False, False, False]] * 2
    assert error(small).max() > 0

    mesh = make_mesh(devices=jax.devices()[:4], fsdp=2, tp=2)
    on_mesh = jax.device_put(params, jaxscale.param_shardings(specs, mesh, MEGATRON_FSDP))
    split = quantize_calibrated(on_mesh, Recipe(rules=rules, method="fmpq", cache="int4"), specs, statistics)
    jax.tree.map(np.testing.assert_array_equal, split["layers"]["mlp"], small["layers"]["mlp"])
    with jax.set_mesh(mesh):
        got = np.asarray(run(split, tokens, cfg=cfg))
    # A number in 4 bits that lies halfway may be rounded the other way where sums over tp end in another last place: a
    # token then differs by a step of its own, and no other does.
    off = np.abs(got - run(small, tokens, cfg=cfg)).max(axis=-1) / np.abs(want).max()
    assert (off < 1e-3).mean() > 0.9 and off.max() < 0.05, off


def _spread(params):
    """How far the channels of a head's keys lie apart, as far as their weights say."""
    return np.log(np.square(params["layers"]["attn"]["wk"]).sum(axis=1)).std(axis=-1).mean()


def test_a_group_with_an_outlier_keeps_8_bits(rng):
    """It then spoils nothing; where smoothing has divided it away, no group does."""
    x = rng.uniform(-1, 1, (200, 64)).astype(np.float32)
    x[:, 40] *= 8  # smoothed, about the root of 8 times the others, below the 4 of an outlier
    w = jnp.asarray(rng.uniform(0.5, 1, (64, 8)) * rng.choice([-1, 1], (64, 8)), jnp.float32)
    s = Statistics(jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0)), jnp.asarray(np.abs(x).max(0)))
    rounding = Rounding(format="int8", group=16, activations="int4")
    mixed, smooth = (_rounded(method, w, s, (-2,), rounding) for method in (nearest, smoothquant))
    assert mixed.outliers.tolist() == [False, False, True, False] and smooth.outliers.tolist() == [False] * 4
    error = lambda q: float(np.abs(np.asarray(quantized_matmul(jnp.asarray(x), q)) - x @ np.asarray(w)).mean())
    assert 0 < error(mixed) < 0.5 * error(dataclasses.replace(mixed, outliers=None))


def test_recipe_names():
    recipe = parse_recipe("w4a4kv4-g64-fmpq")
    assert recipe.rounding("layers/attn/wq") == Rounding(format="uint4", group=64, activations="int4")
    assert (recipe.method, recipe.cache) == ("fmpq", "int4")
    assert parse_recipe("w8a8kv8").cache == "int8" and parse_recipe("w8a8kv8-fp8").cache == "float8_e4m3fn"
    assert parse_recipe("w4a4-g64").cache is None
    for name, why in {
        "w4a8-g64-fmpq": "use w4a4-g64-fmpq",
        "w8a8kv4-fp8": "fp8 has 8 bits",
        "w4a4kv3": "no recipe",
    }.items():
        with pytest.raises(ValueError, match=why):
            parse_recipe(name)
