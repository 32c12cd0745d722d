"""jaxscale.quantize: a decoder of QuantizedArrays computes what their dense arrays do, on one device and on meshes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.generate import generate
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, path_name
from jaxscale.quantize.apply import contraction_of, num_bytes, summary
from jaxscale.quantize.calibrate import gather_statistics
from jaxscale.quantize.recipe import Recipe, Rounding, parse_recipe
from jaxscale.sharding import place, place_quantized
from pallas_kernels import QuantizedArray, quantize_array
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=256,
    num_layers=2,
    embed_dim=64,
    mlp_dim=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=256,
    tie_embeddings=True,
    dtype="float32",
)
UNTIED = dataclasses.replace(CFG, tie_embeddings=False)
MESHES: Any = {"tp2": {"tp": 2}, "fsdp4": {"fsdp": 4}, "fsdp2_tp2": {"fsdp": 2, "tp": 2}, "dp2_cp2": {"dp": 2, "cp": 2}}
forward = jax.jit(decoder.forward, static_argnames="cfg")


def is_quantized(x):
    return isinstance(x, QuantizedArray)


def dense(params):
    return jax.tree.map(lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized)


def make(cfg, rng):
    return init_params(jax.random.key(int(rng.integers(1 << 30))), decoder.param_specs(cfg))


def tokens_of(rng, shape=(4, 16)):
    return jnp.asarray(rng.integers(0, CFG.vocab_size, size=shape), jnp.int32)


@pytest.mark.parametrize(
    ("cfg", "recipe"),
    [(CFG, "w4a16-g32"), (UNTIED, "w4a16-g32"), (CFG, "w8a16"), (UNTIED, "w8a16-fp8"), (UNTIED, "w4a16")],
)
def test_forward_is_that_of_the_dequantized_model(rng, cfg, recipe):
    params, tokens = make(cfg, rng), tokens_of(rng)
    small = jaxscale.quantize(params, recipe, decoder.param_specs(cfg))
    for path, x in jax.tree.leaves_with_path(small, is_leaf=is_quantized):
        assert is_quantized(x) != path_name(path).endswith("norm"), path
    got, want = forward(small, tokens, cfg=cfg), forward(dense(small), tokens, cfg=cfg)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    whole = forward(params, tokens, cfg=cfg)
    assert np.abs(got - whole).max() > 1e-4 * np.abs(want).max()  # it is quantized


def test_loss_goes_through_a_quantized_vocabulary(rng):
    params = make(CFG, rng)
    small = jaxscale.quantize(params, "w8a16", decoder.param_specs(CFG))
    batch = {"tokens": tokens_of(rng), "labels": tokens_of(rng)}
    got, _ = jax.jit(decoder.loss_fn, static_argnames="cfg")(small, batch, cfg=CFG)
    want, _ = jax.jit(decoder.loss_fn, static_argnames="cfg")(dense(small), batch, cfg=CFG)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "recipe"), [*((m, "w4a16-g32") for m in MESHES), ("fsdp2_tp2", "w8a8"), ("fsdp4", "w8a16-fp8")]
)
def test_a_mesh_computes_what_one_device_does(rng, mesh, recipe):
    """Quantized on the mesh, bit for bit as on one device; values rest in shards; the same logits and tokens."""
    cfg, specs, sizes = UNTIED, decoder.param_specs(UNTIED), MESHES[mesh]
    mesh = make_mesh(devices=jax.devices()[:4][: int(np.prod(list(sizes.values())))], **sizes)
    params, tokens = make(cfg, rng), tokens_of(rng)
    one = jaxscale.quantize(params, recipe, specs)
    there = jax.device_put(params, jaxscale.param_shardings(specs, mesh, MEGATRON_FSDP))
    small = jaxscale.quantize(there, recipe, specs)
    jax.tree.map(np.testing.assert_array_equal, small, one)
    up = small["layers"]["mlp"]["w_up"].values
    assert np.prod(up.sharding.shard_shape(up.shape)) * np.prod([n for a, n in sizes.items() if a != "dp"]) == up.size
    with jax.set_mesh(mesh):
        got = np.asarray(forward(small, tokens, cfg=cfg))
    want = np.asarray(forward(one, tokens, cfg=cfg))
    if (
        recipe == "w8a8"
    ):  # over tp each device rounds activations with the scale of its own part: no worse than rounding
        whole = np.asarray(forward(params, tokens, cfg=cfg))
        assert 0 < np.abs(got - want).mean() < 1.2 * np.abs(want - whole).mean()
        assert np.abs(got - whole).mean() < 1.2 * np.abs(want - whole).mean()
        return
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    if sizes == MESHES["fsdp2_tp2"]:
        prompts = [[1, 2, 3], [4, 5]]
        want = generate(one, cfg, prompts, max_new_tokens=4)
        assert generate(small, cfg, prompts, max_new_tokens=4) == want
        assert generate(one, cfg, prompts, max_new_tokens=4, mesh=mesh) == want


@pytest.mark.parametrize("tile", [(16, 16), (8, 32), (64, 16), (32, 64)])
def test_scales_of_tiles_go_with_their_values(rng, tile):
    """One scale for some outputs and inputs, as float8 files of others have: over tp each device finds its own."""
    params, tokens = jaxscale.quantize(make(CFG, rng), "w8a16", decoder.param_specs(CFG)), tokens_of(rng)
    mlp = params["layers"]["mlp"]
    for name in ("w_gate", "w_up", "w_down"):
        L, N, K = mlp[name].values.shape
        scales = rng.uniform(0.001, 0.01, size=(L, N // tile[0], K // tile[1]))
        mlp[name] = dataclasses.replace(mlp[name], scales=jnp.asarray(scales, jnp.float32))
    want = np.asarray(forward(params, tokens, cfg=CFG))
    for sizes in ({"tp": 2}, {"fsdp": 2, "tp": 2}, {"fsdp": 4}):
        mesh = make_mesh(devices=jax.devices()[: int(np.prod([*sizes.values()]))], **sizes)
        there = jax.device_put(params, place(params, decoder.param_specs(CFG), mesh, MEGATRON_FSDP))
        with jax.set_mesh(mesh):
            got = np.asarray(forward(there, tokens, cfg=CFG))
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def test_shards_inside_of_tiles_are_refused(rng):
    w = quantize_array(jnp.asarray(rng.normal(size=(64, 96)), jnp.float32), "int8")
    w = dataclasses.replace(w, scales=jnp.ones((3, 1)))
    assert place_quantized(w, P(None, "tp"), {"tp": 3}).scales == P("tp", None)
    with pytest.raises(ValueError, match="outputs of 96, split 2 ways into 48, inside of tiles of 32"):
        place_quantized(w, P(None, "tp"), {"tp": 2})
    assert place_quantized(w, P(None, "tp"), {"tp": 2}, rest=True).scales == P(None, None)


def test_gradients_reach_what_is_not_quantized(rng):
    params, tokens = make(CFG, rng), tokens_of(rng)
    small = jaxscale.quantize(params, "w8a16", decoder.param_specs(CFG))
    full = dense(small)

    def loss(norm, params):
        return decoder.forward(params | {"final_norm": norm}, tokens, CFG).sum()

    got, want = (jax.jit(jax.grad(loss))(params["final_norm"], p) for p in (small, full))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * float(jnp.abs(want).max()))


def test_recipes_choose_by_path(rng):
    params, specs = make(CFG, rng), decoder.param_specs(CFG)
    recipe = Recipe(
        rules=(("mlp/w_down", None), ("mlp", Rounding(format="int4", group=64)), ("wq", Rounding(format="int8")))
    )
    small = jaxscale.quantize(params, recipe, specs)
    formats = {
        path_name(path): x.format
        for path, x in jax.tree.leaves_with_path(small, is_leaf=is_quantized)
        if is_quantized(x)
    }
    assert formats == {"layers/mlp/w_gate": "int4", "layers/mlp/w_up": "int4", "layers/attn/wq": "int8"}
    assert small["layers"]["mlp"]["w_down"] is params["layers"]["mlp"]["w_down"]


def test_what_one_recipe_leaves_another_rounds(rng):
    params, specs = make(CFG, rng), decoder.param_specs(CFG)
    one, other = (Recipe(rules=((p, Rounding(format=f, group=32)),)) for p, f in (("mlp", "uint4"), ("attn", "int8")))
    both = Recipe(rules=(*one.rules, *other.rules))
    got = jaxscale.quantize(jaxscale.quantize(params, one, specs), other, specs)
    want = jaxscale.quantize(params, both, specs)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_memory_is_counted_in_bits(rng):
    params = make(CFG, rng)
    small = jaxscale.quantize(params, "w4a16-g32", decoder.param_specs(CFG))
    matrices = sum(x.values.size for x in jax.tree.leaves(small, is_leaf=is_quantized) if is_quantized(x))
    norms = (2 * CFG.num_layers + 1) * CFG.embed_dim
    assert num_bytes(small) == matrices * (4 + 2 * 16 / 32) / 8 + 4 * norms
    held = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(small))
    assert num_bytes(small) <= held < 1.02 * num_bytes(small) + 4096
    assert summary(small).startswith("quantized 8 of 11 arrays: 5.0")


def test_contractions():
    specs = decoder.param_specs(UNTIED)
    found = {path_name(p): contraction_of(s) for p, s in jax.tree.leaves_with_path(specs) if len(s.shape) > 2}
    attention = {"wq": (-3,), "wk": (-3,), "wv": (-3,), "wo": (-3, -2)}
    mlp = {"w_gate": (-2,), "w_up": (-2,), "w_down": (-2,)}
    assert found == {f"layers/attn/{k}": v for k, v in attention.items()} | {
        f"layers/mlp/{k}": v for k, v in mlp.items()
    }
    assert contraction_of(specs["embed"]) == (-1,) and contraction_of(specs["head"]) == (-2,)


def test_recipe_names():
    assert parse_recipe("w4a16-g64").rounding("layers/attn/wq") == Rounding(format="uint4", group=64)
    w8a8 = parse_recipe("w8a8-smoothquant")
    assert w8a8.method == "smoothquant" and w8a8.rounding("layers/mlp/w_up") == Rounding(
        format="int8", activations="int8"
    )
    assert w8a8.rounding("embed") == Rounding(format="int8")
    assert parse_recipe("w8a8-fp8").rounding("x") == Rounding(format="float8_e4m3fn", activations="float8_e4m3fn")
    for name, why in {
        "w3a16": "no recipe 'w3a16'",
        "w4a16-fp8": "fp8 has 8 bits",
        "w8a16-smoothquant": "use w8a8-smo",
    }.items():
        with pytest.raises(ValueError, match=why):
            parse_recipe(name)
    with pytest.raises(ValueError, match="no regular expression"):
        Recipe(rules=(("(", None),))
    with pytest.raises(ValueError, match="method='exl2' is unknown"):
        Recipe(rules=(), method="exl2")  # pyright: ignore[reportArgumentType]


def test_bad_input(rng):
    params, specs = make(CFG, rng), decoder.param_specs(CFG)
    with pytest.raises(ValueError, match=r"groups of 48 do not divide the 64 numbers .*use one of \[16, 32, 64\]"):
        jaxscale.quantize(params, "w4a16-g48", specs)
    small = jaxscale.quantize(params, "w8a16", specs)
    with pytest.raises(ValueError, match=r"8 weights are quantized already, embed the first; .*\('embed', None\)"):
        jaxscale.quantize(small, "w4a16-g32", specs)
    with pytest.raises(ValueError, match="7 weights are quantized already, layers/attn/wk the first"):
        gather_statistics(small, specs, lambda p, x: forward(p, x, cfg=CFG), [tokens_of(rng)])
    with pytest.raises(ValueError, match=r"no rule of the recipe chooses a weight; .*layers/mlp/w_up"):
        jaxscale.quantize(params, Recipe(rules=(("norm", Rounding(format="int8")),)), specs)
    with pytest.raises(ValueError, match="awq needs a calibration set"):
        jaxscale.quantize(params, "w4a16-g32-awq", specs)
    mesh = make_mesh(devices=jax.devices()[:4], tp=4)
    there = jax.device_put(params, jaxscale.param_shardings(specs, mesh, MEGATRON_FSDP))
    with pytest.raises(
        ValueError, match=r"K=128, split 4 ways into 32, inside of groups of 64; quantize in groups of \[16, 32\]"
    ):
        jaxscale.quantize(there, "w4a16-g64", specs)
