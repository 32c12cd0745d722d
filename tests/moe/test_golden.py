"""Mixtral and Qwen3-MoE against transformers, and their checkpoints in and out, bit by bit."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxscale.checkpoint.huggingface import import_hf, load_config, params_from_hf, params_to_hf
from jaxscale.checkpoint.huggingface_config import config_from_hf, config_to_hf
from jaxscale.models.decoder import forward

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("mixtral", "qwen3_moe")


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


@pytest.mark.parametrize("kind", FAMILIES)
def test_config_defaults(kind):
    said = config_from_hf(json.loads((GOLDEN / "defaults.json").read_text())[kind])
    silent = config_from_hf({"model_type": kind})
    assert said == dataclasses.replace(silent, dtype=said.dtype, param_dtype=said.param_dtype)


def test_layers_of_two_kinds_are_refused():
    hub = json.loads((GOLDEN / "moe" / "qwen3_moe" / "config_hub.json").read_text())
    with pytest.raises(ValueError, match="decoder_sparse_step=2"):
        config_from_hf(hub | {"decoder_sparse_step": 2})
