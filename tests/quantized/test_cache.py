"""A key-value cache in 8 and 4 bits: what is written comes back within a step, and generation goes on from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxscale
from jaxscale.checkpoint import Checkpointer
from jaxscale.config import ModelConfig
from jaxscale.generate import decode_step, generate, prefill
from jaxscale.mesh import make_mesh
from jaxscale.models import cache, decoder
from jaxscale.params import init_params
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=128,
    num_layers=2,
    embed_dim=64,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=512,
    dtype="float32",
)
SPECS = decoder.param_specs(CFG)
# Of a number, in units of the largest of its token and head: half a step.
STEP = {"int8": 0.5 / 127, "float8_e4m3fn": 2.0**-4, "int4": 0.5 / 7}


def make(rng):
    return init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)


@pytest.mark.parametrize("format", STEP)
def test_the_cache_holds_keys_and_values_within_a_step(rng, format):
    params = make(rng)
    tokens, lengths = jnp.asarray(rng.integers(0, 128, size=(2, 8)), jnp.int32), jnp.asarray([8, 5], jnp.int32)
    run = jax.jit(prefill, static_argnames=("cfg", "max_len", "cache_format"))
    logits, cache = run(params, tokens, lengths, cfg=CFG, max_len=16, cache_format=format)
    whole, exact = run(params, tokens, lengths, cfg=CFG, max_len=16)
    assert cache["k"].dtype == format and cache["k_scale"].shape == (2, 2, 16, 2, 1)
    for name in ("k", "v"):  # of the first layer, whose keys nothing rounded came before
        back = np.asarray(cache[name][0], np.float32) * np.asarray(cache[f"{name}_scale"][0])
        want = np.asarray(exact[name][0])
        largest = np.abs(want).max(axis=-1, keepdims=True)
        assert (np.abs(back - want) <= 1.01 * STEP[format] * largest + 1e-6).all()
        assert np.abs(back - want).max() > 0
    assert 0 < np.abs(logits - whole).max() < 8 * STEP[format] * np.abs(whole).max()
    step = jax.jit(decode_step, static_argnames="cfg", donate_argnames="cache")
    after, new = step(params, cache, tokens[:, 0], lengths, cfg=CFG)
    want, _ = step(params, exact, tokens[:, 0], lengths, cfg=CFG)
    assert 0 < np.abs(after - want).max() < 8 * STEP[format] * np.abs(want).max()
    assert jax.tree.map(jnp.shape, new)["v_scale"] == (2, 2, 16, 2, 1)
    assert bool((new["k_scale"][:, 1, 5] > 0).all()) and bool((new["k_scale"][:, :, 9:] == 0).all())


@pytest.mark.usefixtures("optimized")  # XLA's maximum drops nan on CPUs where it is vectorized
@pytest.mark.parametrize("format", STEP)
def test_one_nan_of_a_key_is_nan_in_what_queries_read(rng, format):
    empty = cache.init_cache(CFG, 4, 64, format=format)
    key = jnp.asarray(rng.normal(size=(4, 64, 2, 32)), jnp.float32)
    at = tuple(rng.integers(n) for n in key.shape)
    positions = jnp.broadcast_to(jnp.arange(64, dtype=jnp.int32), (4, 64))

    @jax.jit
    def write_and_read(key):
        held = cache.update(empty, {"k": key, "v": key}, jnp.int32(1), positions, MEGATRON_FSDP)
        return cache.layer(held, "k", jnp.int32(1), jnp.float32, MEGATRON_FSDP)[0]

    assert np.isnan(write_and_read(key.at[at].set(jnp.nan))[at])
    assert np.isfinite(write_and_read(key)).all()


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_mesh_generates_what_one_device_does(rng, format):
    params, prompts = make(rng), [[1, 2, 3], [4, 5]]
    want = generate(params, CFG, prompts, max_new_tokens=5, cache_format=format)
    mesh = make_mesh(devices=jax.devices()[:4], fsdp=2, tp=2)
    assert generate(params, CFG, prompts, max_new_tokens=5, cache_format=format, mesh=mesh) == want


def test_an_unknown_format(rng):
    with pytest.raises(ValueError, match="a cache in 'int2' is unknown; use one of int8, float8_e4m3fn, int4"):
        generate(make(rng), CFG, [[1]], max_new_tokens=1, cache_format="int2")  # pyright: ignore


@pytest.mark.parametrize("recipe", ["w4a16-g32", "w8a8-fp8"])
def test_checkpoints_hold_quantized_weights(rng, tmp_path, recipe):
    """Saved from one mesh, restored onto another, bit for bit, as one node with its scales."""
    params = make(rng)
    small = jaxscale.quantize(params, recipe, SPECS)
    mesh = make_mesh(devices=jax.devices()[:2], tp=2)
    with Checkpointer(tmp_path / "c", on_error="stop") as checkpointer:
        checkpointer.save(1, small)
        checkpointer.wait()
        where = jaxscale.sharding.place(small, SPECS, mesh, MEGATRON_FSDP)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), small, where)
        back = checkpointer.restore(target)
    jax.tree.map(np.testing.assert_array_equal, back, small)
    assert back["layers"]["mlp"]["w_up"].activations == small["layers"]["mlp"]["w_up"].activations
    down = back["layers"]["mlp"]["w_down"].values
    assert down.sharding.shard_shape(down.shape) == (2, 64, 32)
