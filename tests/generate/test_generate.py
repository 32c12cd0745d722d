"""Generation against the full forward pass, on one device and on meshes, with random models and prompts."""

import contextlib
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale import generate as gen
from jaxscale.checkpoint.huggingface import import_hf, load_config
from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, param_shardings
from sharding_rules.rules import MEGATRON_FSDP

LLAMA = ModelConfig(
    name="llama-like",
    vocab_size=97,
    num_layers=3,
    embed_dim=36,
    mlp_dim=60,
    num_heads=6,
    num_kv_heads=3,
    head_dim=8,
    max_seq_len=256,
    dtype="float32",
)
GEMMA = dataclasses.replace(
    LLAMA,
    name="gemma-like",
    num_heads=4,
    num_kv_heads=2,
    activation="gelu_tanh",
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    scale_embeddings=True,
    attn_soft_cap=50.0,
    logit_soft_cap=30.0,
    local_rope_theta=300.0,
    window=5,
    num_layers=4,
    layer_pattern=("local", "global"),
)
UNTIED = dataclasses.replace(LLAMA, name="untied", tie_embeddings=False, window=7, layer_pattern=("local",))
MESHES = {  # sizes, devices
    "fsdp4": {"fsdp": 4},
    "tp2": {"tp": 2},
    "dp2_tp2": {"dp": 2, "tp": 2},
    "cp2_tp2": {"cp": 2, "tp": 2},
    "fsdp2_tp3": {"fsdp": 2, "tp": 3},
}


@functools.cache
def model(cfg):
    """Random parameters large enough that attention and the soft caps matter."""
    params = init_params(jax.random.key(0), decoder.param_specs(cfg))
    return jax.tree.map(lambda x: x * 1.5, params)


def mesh_of(name):
    sizes: Any = MESHES[name]
    return make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)


def place(params, cfg, mesh):
    return jax.device_put(params, param_shardings(decoder.param_specs(cfg), mesh, MEGATRON_FSDP))


def random_prompts(rng, cfg, lengths):
    return [rng.integers(0, cfg.vocab_size, n).tolist() for n in lengths]


@functools.partial(jax.jit, static_argnames="cfg")
def full_logits(params, tokens, cfg):
    return decoder.forward(params, tokens, cfg)


def greedy_reference(params, cfg, prompt, steps):
    """One row, no cache: a whole forward pass (of a fixed length, so one program) for each token."""
    tokens = np.zeros((1, 64), np.int32)
    tokens[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + steps):
        tokens[0, n] = int(jnp.argmax(full_logits(params, tokens, cfg)[0, n - 1]))
    return tokens[0, len(prompt) : len(prompt) + steps].tolist()


def incremental_logits(params, cfg, tokens, lengths, max_len, mesh=None):
    """Prefill of tokens[:, :lengths] and one decode_step for each further token: [B, steps + 1, V]."""
    pre = jax.jit(functools.partial(gen.prefill, cfg=cfg, max_len=max_len))
    step = jax.jit(functools.partial(gen.decode_step, cfg=cfg), donate_argnums=1)
    longest = int(lengths.max())
    rows = np.arange(len(lengths))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        logits, cache = pre(params, tokens[:, :longest], lengths)
        out = [np.asarray(logits)]
        for i in range(tokens.shape[1] - longest):
            logits, cache = step(params, cache, tokens[rows, lengths + i], lengths + np.int32(i))
            out.append(np.asarray(logits))
    return np.stack(out, axis=1)


@pytest.mark.parametrize("cfg", [LLAMA, GEMMA, UNTIED], ids=lambda cfg: cfg.name)
def test_incremental_logits_equal_the_full_forward_pass(cfg, rng):
    params = model(cfg)
    tokens = rng.integers(0, cfg.vocab_size, (3, 24)).astype(np.int32)
    lengths = np.array([16, 3, 9], np.int32)  # what the shorter rows hold beyond their length is padding to prefill
    full = np.asarray(full_logits(params, tokens, cfg))
    got = incremental_logits(params, cfg, tokens, lengths, max_len=32)
    assert full.std() > 0.1
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[row], full[row, n - 1 : n + 8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mesh_name", ["fsdp2_tp3", "cp2_tp2"])
def test_incremental_logits_on_a_mesh(mesh_name, rng):
    mesh = mesh_of(mesh_name)
    tokens = rng.integers(0, GEMMA.vocab_size, (2, 12)).astype(np.int32)
    lengths = np.array([8, 5], np.int32)
    full = np.asarray(full_logits(model(GEMMA), tokens, GEMMA))
    got = incremental_logits(place(model(GEMMA), GEMMA, mesh), GEMMA, tokens, lengths, 16, mesh)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(got[row], full[row, n - 1 : n + 4], rtol=1e-4, atol=1e-4)


def test_unequal_prompts_equal_one_by_one(rng):
    prompts = random_prompts(rng, GEMMA, [1, 30, 12])
    together = gen.generate(model(GEMMA), GEMMA, prompts, max_new_tokens=10)
    assert together == [greedy_reference(model(GEMMA), GEMMA, prompt, 10) for prompt in prompts]


@pytest.mark.parametrize("mesh_name", MESHES)
def test_sharded_tokens_equal_unsharded(mesh_name, rng):
    """Greedy and sampled, with three rows: most meshes do not divide them, and tp=2 does not divide the 3 kv heads."""
    mesh, params = mesh_of(mesh_name), model(LLAMA)
    prompts = random_prompts(rng, LLAMA, [5, 11, 2])
    assert gen.generate(place(params, LLAMA, mesh), LLAMA, prompts, max_new_tokens=6) == gen.generate(
        params, LLAMA, prompts, max_new_tokens=6
    )
    sampled = {"max_new_tokens": 6, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "key": jax.random.key(3)}
    one = gen.generate(params, LLAMA, prompts, **sampled)
    assert gen.generate(params, LLAMA, prompts, mesh=mesh, **sampled) == one  # moved to the mesh by generate


def test_layers_taken_apart_give_the_same_tokens(rng, monkeypatch):
    """As on a GPU, of a family of the golden models, drawn."""
    golden = pathlib.Path(__file__).parents[1] / "golden"
    families = sorted(f.parent for f in golden.rglob("config.json"))
    assert len(families) > 15
    family = families[rng.integers(len(families))]
    cfg = dataclasses.replace(load_config(family), dtype="float32", param_dtype="float32")
    params = jax.tree.map(jnp.asarray, import_hf(family, cfg=cfg)[0])
    prompts = random_prompts(rng, cfg, (3, 7))
    want = gen.generate(params, cfg, prompts, max_new_tokens=4)
    monkeypatch.setattr(gen, "_copied_by_xla", lambda params: True)
    assert gen.generate(params, cfg, prompts, max_new_tokens=4) == want, family.name


def test_programs_are_compiled_once_for_all_lengths_and_temperatures(rng):
    params, prompts = model(LLAMA), random_prompts(rng, LLAMA, [40, 3])
    settings = {"top_p": 0.9, "key": jax.random.key(0)}
    gen.generate(params, LLAMA, prompts, max_new_tokens=2, temperature=1.0, **settings)
    programs: Any = gen._prefill_and_sample, gen._decode_and_sample
    before = [p._cache_size() for p in programs]
    for lengths, new, temperature in ([(1, 7), 9, 0.5], [(64, 2), 20, 1.3]):
        prompts = random_prompts(rng, LLAMA, lengths)
        gen.generate(params, LLAMA, prompts, max_new_tokens=new, temperature=temperature, **settings)
    assert [p._cache_size() for p in programs] == before


def test_the_cache_is_updated_in_place(rng):
    """No copy of the cache in the compiled decode step, and its buffers are the donated ones."""
    cache = jax.eval_shape(lambda: decoder.init_cache(LLAMA, 3, 128))
    rows = jax.ShapeDtypeStruct((3,), jnp.int32)
    step = jax.jit(functools.partial(gen.decode_step, cfg=LLAMA), donate_argnums=1)
    compiled: Any = step.lower(model(LLAMA), cache, rows, rows).compile()
    memory = compiled.memory_analysis()
    size = sum(x.size * 4 for x in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size
    shape = "f32[3,3,128,3,8]"
    copies = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line and " copy(" in line]
    assert not copies


def test_stop_tokens_end_a_row(rng):
    params, prompts = model(LLAMA), random_prompts(rng, LLAMA, [4, 6])
    settings = {"temperature": 1.0, "key": jax.random.key(int(rng.integers(1 << 30)))}
    free = gen.generate(params, LLAMA, prompts, max_new_tokens=12, **settings)
    assert gen.generate(jax.device_get(params), LLAMA, prompts, max_new_tokens=12, **settings) == free  # numpy arrays
    stop = {free[0][5], free[1][2]}
    cut = [next((i for i, t in enumerate(row) if t in stop), len(row)) for row in free]
    heard = []
    got = gen.generate(
        params,
        LLAMA,
        prompts,
        max_new_tokens=12,
        stop_tokens=stop,
        on_token=lambda r, t: heard.append((r, t)),
        **settings,
    )
    assert got == [row[:n] for row, n in zip(free, cut)]
    assert [[t for r, t in heard if r == row] for row in (0, 1)] == got


def test_sampling_is_deterministic_and_depends_on_key_row_and_position(rng):
    params, prompt = model(LLAMA), random_prompts(rng, LLAMA, [5])[0]
    run = functools.partial(gen.generate, params, LLAMA, max_new_tokens=8, temperature=2.0)
    a = run([prompt, prompt], key=jax.random.key(1))
    assert a == run([prompt, prompt], key=jax.random.key(1))
    assert a[0] != a[1]  # 97 ** -8 is the chance
    assert a != run([prompt, prompt], key=jax.random.key(2))
    assert a[0] == run([prompt], key=jax.random.key(1))[0]


def draw(rng, logits, n, **settings):
    """n draws from one row of logits."""
    key = jax.random.key(int(rng.integers(1 << 30)))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32)[None], (n, len(logits)))
    return np.asarray(gen.sample(rows, jnp.zeros(n, jnp.int32), key=key, **settings))


def test_samples_follow_the_softmax(rng):
    logits = rng.uniform(-2, 2, 12)  # each is expected more than five times, as chi2 wants it
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    drawn = np.bincount(draw(rng, logits, 20_000, temperature=0.7), minlength=12)
    chi2 = ((drawn - 20_000 * p) ** 2 / (20_000 * p)).sum()
    assert chi2 < 45  # 11 degrees of freedom: exceeded once in 200,000 runs


def test_top_k_and_top_p_support(rng):
    logits = rng.normal(size=40) * 2
    order = np.argsort(-logits)
    assert set(draw(rng, logits, 4000, temperature=3.0, top_k=5)) == set(order[:5])
    p = np.exp(logits) / np.exp(logits).sum()
    for top_p in (1e-6, 0.5, 0.8):
        nucleus = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), top_p))]
        drawn = set(draw(rng, logits, 4000, temperature=1.0, top_p=top_p))
        assert drawn <= set(nucleus)
        assert {t for t in nucleus if p[t] > 0.01} <= drawn
    # after top_k the probabilities are those among the k
    p5 = np.exp(logits[order[:5]]) / np.exp(logits[order[:5]]).sum()
    kept = 1 + int(np.searchsorted(np.cumsum(p5), 0.6))
    assert set(draw(rng, logits, 4000, temperature=1.0, top_k=5, top_p=0.6)) <= set(order[:kept])


def test_a_low_temperature_is_greedy(rng):
    logits = rng.permutation(np.linspace(-2, 2, 50))  # 0.08 apart: 800 temperatures
    assert set(draw(rng, logits, 500, temperature=1e-4)) == {int(logits.argmax())}


def test_stream_text_holds_back_partial_characters():
    text = "naïve 日本 🙂!"

    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    parts = []
    on_token = gen.stream_text(Bytes(), lambda row, part: parts.append(part))
    for byte in text.encode():
        on_token(0, byte)
    assert parts == list(text)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1, 2], [3, 97]], {}, r"prompt 1 has token 97 at position 1, outside the vocabulary of 97 \(0 to 96\)"),
        ([[-1]], {}, "prompt 0 has token -1 at position 0"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([], {}, "no prompts"),
        ([[1.5]], {}, "prompt 0 must be a list of token ids"),
        ([[1] * 250], {"max_new_tokens": 7}, "250 tokens and max_new_tokens=7.*max_seq_len=256.*at most 6 new tokens"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"temperature": -0.5}, "temperature=-0.5"),
        ([[1]], {"temperature": float("nan")}, "temperature=nan"),
        ([[1]], {"temperature": 1.0}, "key=jax.random.key"),
        ([[1]], {"top_k": 3}, "top_k=3 .*temperature=0"),
        ([[1]], {"top_k": 0, "temperature": 1.0, "key": 0}, "top_k=0"),
        ([[1]], {"top_p": 1.2, "temperature": 1.0, "key": 0}, "top_p=1.2"),
    ],
)
def test_bad_input_is_named(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        gen.generate(model(LLAMA), LLAMA, prompts, **{"max_new_tokens": 4, **settings})
