"""Decoding over layers that are taken apart and over a cache read as pages: the logits of the stacked model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.generate import decode_step, generate, prefill
from jaxscale.mesh import make_mesh
from jaxscale.models import cache, decoder, few_rows, unstacked
from jaxscale.models.unstacked import unstack
from jaxscale.params import init_params
from jaxscale.quantize.files import load_quantized, save_quantized
from jaxscale.quantize.recipe import Recipe, Rounding
from jaxscale.sharding import compute_spec
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=512,
    dtype="float32",
    qkv_bias=True,
)
SPECS = decoder.param_specs(CFG)


def steps(params, tokens, cfg=CFG, count=2):
    """Logits [B, count, V] of a prompt's next tokens."""
    B, T = tokens.shape
    logits, kept = jax.jit(functools.partial(prefill, cfg=cfg, max_len=256))(params, tokens, jnp.full(B, T, jnp.int32))
    out = [logits]
    step = jax.jit(functools.partial(decode_step, cfg=cfg))
    for i in range(count):
        following = jnp.argmax(out[-1], axis=-1).astype(jnp.int32)
        logits, kept = step(params, kept, following, jnp.full(B, T + i, jnp.int32))
        out.append(logits)
    return np.stack(jax.device_get(out), axis=1)


@pytest.fixture
def params(rng):
    made = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    noise = lambda path, x: x + jnp.asarray(rng.normal(size=x.shape) * 0.1, x.dtype)
    return jax.tree.map_with_path(noise, made)


def test_layers_apart_are_the_same_model(rng, params):
    recipe = [None, "w4a16-g16", "w8a8"][rng.integers(3)]
    print(recipe)
    params = params if recipe is None else jaxscale.quantize(params, recipe, SPECS)
    tokens = jnp.asarray(rng.integers(1, 64, size=(2, 8)), jnp.int32)
    want = steps(params, tokens)
    apart = unstack(params)
    assert len(apart["layers"]) == 2 and set(apart["layers"][0]["mlp"]) == {"w_gate_up", "w_down"}
    assert "wqkv" in apart["layers"][1]["attn"] and "wq" not in apart["layers"][1]["attn"]
    np.testing.assert_allclose(steps(apart, tokens), want, rtol=1e-4, atol=1e-4)
    assert set(unstack(params, join=False)["layers"][0]["mlp"]) == {"w_gate", "w_up", "w_down"}


def test_weights_laid_out_for_a_kernel_are_the_same_model(rng, params, monkeypatch, tmp_path):
    """Other backends and files take the layout back."""
    monkeypatch.setattr(unstacked, "quantized_matmul_implementation", lambda x, w: "mosaic_gpu")
    params = jaxscale.quantize(params, ["w4a16-g16", "w8a16"][rng.integers(2)], SPECS)
    tokens = jnp.asarray(rng.integers(1, 64, size=(2, 8)), jnp.int32)
    apart, laid = unstack(params, interleave=False), unstack(params)
    weights = [w["mlp"]["w_down"] for w in laid["layers"]]
    assert all(w.interleaved for w in weights) and not apart["layers"][0]["mlp"]["w_down"].interleaved
    np.testing.assert_allclose(steps(laid, tokens), steps(apart, tokens), rtol=1e-4, atol=1e-4)
    spec = SPECS["layers"]["mlp"]["w_down"]
    spec = {"w": dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])}
    save_quantized({"w": weights[0]}, tmp_path / "w")
    np.testing.assert_array_equal(
        load_quantized(tmp_path / "w", spec)["w"].values, apart["layers"][0]["mlp"]["w_down"].values
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_are_written_where_they_belong(rng, rows):
    before = rng.normal(size=(2, rows, 6, 2, 4)).astype(np.float32)
    new = rng.normal(size=(rows, 1, 2, 4)).astype(np.float32)
    for at in (rng.integers(6, size=rows), np.full(rows, 5), np.full(rows, -1), np.full(rows, 6)):  # the last: nowhere
        positions = jnp.asarray(at, jnp.int32)[:, None]
        got = cache.write(jnp.asarray(before), jnp.asarray(new), jnp.int32(1), positions, MEGATRON_FSDP)
        want = before.copy()
        for row, slot in enumerate(at):
            if 0 <= slot < 6:
                want[1, row, slot] = new[row, 0]
        np.testing.assert_array_equal(got, want)


def test_weights_that_are_not_alike_stay_apart(params):
    rules = (("wk|w_up", Rounding(format="int8")), ("wq|wv|w_gate", None))
    mixed = jaxscale.quantize(params, Recipe(rules=rules), SPECS)
    assert "wq" in unstack(mixed)["layers"][0]["attn"] and "w_up" in unstack(mixed)["layers"][0]["mlp"]


def test_a_cache_read_as_pages(rng, params, monkeypatch):
    """Rows at positions of their own, windows and soft caps, rounded keys and values; on a mesh too."""
    format = [None, "int8", "float8_e4m3fn", "int4"][rng.integers(4)]
    print(format)
    cfg = dataclasses.replace(CFG, window=[None, 70][rng.integers(2)], attn_soft_cap=[None, 5.0][rng.integers(2)])
    tokens = jnp.asarray(rng.integers(1, 64, size=(4, 100)), jnp.int32)
    lengths = jnp.asarray(rng.integers(40, 100, size=4), jnp.int32)
    run = jax.jit(functools.partial(prefill, cfg=cfg, max_len=256, cache_format=format))
    step = lambda: jax.jit(functools.partial(decode_step, cfg=cfg))
    _, kept = run(params, tokens, lengths)
    want, _ = step()(params, kept, tokens[:, 0], lengths)
    monkeypatch.setattr(cache, "KERNELS", ("xla",))
    calls = []
    monkeypatch.setattr(cache, "decode_attention", lambda *a, **k: calls.append(1) or KERNEL(*a, **k))
    got, _ = step()(params, kept, tokens[:, 0], lengths)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert calls
    mesh = make_mesh(devices=jax.devices()[:4], dp=2, tp=2)
    with jax.set_mesh(mesh):
        there = jax.device_put(params, jaxscale.param_shardings(SPECS, mesh, MEGATRON_FSDP))
        # The very same cache: a mesh sums in another order, and what is near the middle rounds to the other side.
        lie = lambda x: jax.NamedSharding(mesh, compute_spec(x.shape, cache.CACHE) or jax.P())
        kept = jax.device_put(kept, jax.tree.map(lie, kept))
        before = len(calls)
        got, _ = step()(there, kept, tokens[:, 0], lengths)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert len(calls) > before


def test_generate_over_layers_apart(rng, params, monkeypatch):
    small = jaxscale.quantize(params, "w4a16-g16", SPECS)
    prompts = [rng.integers(1, 64, size=n).tolist() for n in (3, 7)]
    want = generate(small, CFG, prompts, max_new_tokens=4)
    monkeypatch.setattr("jaxscale.generate._copied_by_xla", lambda params: True)
    assert generate(small, CFG, prompts, max_new_tokens=4) == want


KERNEL = cache.decode_attention


@pytest.mark.parametrize("interpreted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_step_of_few_kernels_is_the_same_model(rng, interpreted, monkeypatch):
    """Logits and cache of the layers that XLA puts together; in the interpreter of a GPU's kernels too."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16", qkv_bias=False, window=[None, 20][rng.integers(2)])
    if interpreted:
        cfg = dataclasses.replace(cfg, embed_dim=512, mlp_dim=512, num_heads=4, num_kv_heads=4, head_dim=128)
    specs, recipe = decoder.param_specs(cfg), ["w4a16-g32-sym", "w4a16-g32", "w8a16"][rng.integers(3)]
    print(recipe, cfg.window)
    params = jaxscale.quantize(init_params(jax.random.key(int(rng.integers(1 << 30))), specs), recipe, specs)
    kept = jax.tree.map(lambda c: jnp.asarray(rng.normal(size=c.shape), c.dtype), decoder.init_cache(cfg, 2, 64))
    tokens, positions = jnp.asarray(rng.integers(1, 64, size=2), jnp.int32), jnp.asarray([5, 60], jnp.int32)
    step = lambda: jax.jit(functools.partial(decode_step, cfg=cfg))(unstack(params), kept, tokens, positions)
    want = step()
    ran = []
    monkeypatch.setattr(few_rows, "hidden", lambda *a, f=few_rows.hidden: ran.append(1) or f(*a))
    if interpreted:
        with plgpu.force_gpu_interpret_mode():
            assert unstack(params)["layers"][0]["attn"]["wqkv"].interleaved
            got = step()
    else:
        monkeypatch.setattr(few_rows, "kernels_fit", lambda *a: True)
        monkeypatch.setattr(cache, "KERNELS", ("xla",))
        got = step()
    assert ran
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02 * np.abs(b).max())
