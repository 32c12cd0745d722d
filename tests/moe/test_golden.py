"""Decoders with experts against transformers, and their checkpoints in and out, bit by bit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxscale.checkpoint.huggingface import import_hf, load_config, params_from_hf, params_to_hf
from jaxscale.checkpoint.huggingface_config import config_from_hf, config_to_hf
from jaxscale.generate import decode_step, prefill
from jaxscale.models.decoder import forward

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    folder = GOLDEN / "moe" / family
    io = load_file(folder / "io.safetensors")
    cfg = dataclasses.replace(load_config(folder), dtype="float32", param_dtype="float32")
    params, cfg = import_hf(folder, cfg=cfg)
    logits = jax.jit(forward, static_argnums=2)(params, io["tokens"], cfg)
    assert np.abs(np.asarray(logits) - io["logits"]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips(family, rng):
    folder = GOLDEN / "moe" / family
    cfg = load_config(folder)
    state = load_file(folder / "model.safetensors")
    state = {k: rng.standard_normal(v.shape, np.float32).astype(v.dtype) for k, v in state.items()}
    again = params_to_hf(params_from_hf(state, cfg), cfg)
    assert again.keys() == state.keys()
    assert all(again[k].tobytes() == state[k].tobytes() for k in state)
    assert config_from_hf(config_to_hf(cfg)) == cfg
    hub = config_from_hf(json.loads((folder / "config_hub.json").read_text()))
    assert dataclasses.replace(hub, dtype="float32", param_dtype="float32") == cfg


@pytest.mark.parametrize("kind", [f for f in FAMILIES if f != "deepseek_v2"])
def test_config_defaults(kind):
    said = config_from_hf(json.loads((GOLDEN / "defaults.json").read_text())[kind])
    silent = config_from_hf({"model_type": kind})
    assert said == dataclasses.replace(silent, dtype=said.dtype, param_dtype=said.param_dtype)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_decoding_gives_the_same_logits(family):
    """Prefill and single steps through the cache; transformers computed all tokens at once."""
    folder = GOLDEN / "moe" / family
    io = load_file(folder / "io.safetensors")
    params, cfg = import_hf(
        folder, cfg=dataclasses.replace(load_config(folder), dtype="float32", param_dtype="float32")
    )
    tokens, want = io["tokens"], io["logits"]
    lengths = np.full(2, 30, np.int32)
    prompt = np.where(np.arange(32) < 30, tokens[:, :32], 0)
    logits, cache = jax.jit(prefill, static_argnames=("cfg", "max_len"))(params, prompt, lengths, cfg=cfg, max_len=64)
    assert np.abs(np.asarray(logits) - want[:, 29]).max() < 1e-4
    step = jax.jit(decode_step, static_argnames="cfg")
    for t in range(30, 37):
        logits, cache = step(params, cache, tokens[:, t], np.full(2, t, np.int32), cfg=cfg)
        assert np.abs(np.asarray(logits) - want[:, t]).max() < 1e-4, t


def test_rotated_pairs_and_fused_tensors_by_another_spelling(rng):
    """DeepSeek-V3's latents and GPT-OSS's alternating columns, spelled out for one vector."""
    cfg = load_config(GOLDEN / "moe" / "deepseek_v3")
    state = load_file(GOLDEN / "moe" / "deepseek_v3" / "model.safetensors")
    state = {k: rng.standard_normal(v.shape, np.float32) for k, v in state.items()}
    params, m = params_from_hf(state, cfg), cfg.mla
    for layer, (stack, at) in enumerate([("dense_layers", 0), ("layers", 0), ("layers", 1)]):
        attn, prefix = params[stack]["attn"], f"model.layers.{layer}.self_attn."
        x, latent = rng.standard_normal(cfg.embed_dim), rng.standard_normal(m.kv_rank)
        theirs = state[prefix + "kv_a_proj_with_mqa.weight"] @ x
        np.testing.assert_allclose(x @ attn["wkv_down"][at], theirs[: m.kv_rank], rtol=1e-4, atol=1e-4)
        pairs = theirs[m.kv_rank :].reshape(-1, 2)
        np.testing.assert_allclose(x @ attn["wk_rope"][at], pairs.T.ravel(), rtol=1e-4, atol=1e-4)
        theirs = (state[prefix + "kv_b_proj.weight"] @ latent).reshape(cfg.num_heads, -1)
        for name, part in (("wk_up", slice(0, m.nope_dim)), ("wv_up", slice(m.nope_dim, None))):
            ours = np.einsum("R,RNH->NH", latent, attn[name][at])
            np.testing.assert_allclose(ours, theirs[:, part], rtol=1e-4, atol=1e-4)
    cfg = load_config(GOLDEN / "moe" / "gpt_oss")
    state = load_file(GOLDEN / "moe" / "gpt_oss" / "model.safetensors")
    experts = params_from_hf(state, cfg)["layers"]["moe"]["experts"]
    fused = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert experts["w_gate"][1].tobytes() == np.ascontiguousarray(fused[..., 0::2]).tobytes()
    assert experts["w_up"][1].tobytes() == np.ascontiguousarray(fused[..., 1::2]).tobytes()


def test_a_layer_that_predicts_further_tokens_is_left_out(rng):
    cfg = load_config(GOLDEN / "moe" / "deepseek_v3")
    state = load_file(GOLDEN / "moe" / "deepseek_v3" / "model.safetensors")
    more = {f"model.layers.{cfg.num_layers}.eh_proj.weight": np.zeros((4, 8), np.float32)}
    assert params_from_hf(state | more, cfg).keys() == params_from_hf(state, cfg).keys()
    with pytest.raises(ValueError, match=r"unexpected 1 of .*layers\.4\."):
        params_from_hf(state | {"model.layers.4.eh_proj.weight": np.zeros((4, 8), np.float32)}, cfg)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=True; supported is False"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "does not say num_experts_per_tok"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method='greedy'; supported is 'noaux_tc'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=False; supported is True"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias=True"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0; supported is 7.0"),
    ],
)
def test_what_is_not_computed_is_refused(family, change, named):
    hub = json.loads((GOLDEN / "moe" / family / "config_hub.json").read_text())
    with pytest.raises(ValueError, match=named):
        config_from_hf(hub | change)
