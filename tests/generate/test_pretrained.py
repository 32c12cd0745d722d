"""load_model on a Hugging Face directory, written here by export_hf and a tokenizer trained on a few lines."""

import dataclasses
import json

import jax
import pytest

from jaxscale import init_params, make_mesh
from jaxscale.checkpoint.huggingface import export_hf
from jaxscale.data import train_bpe
from jaxscale.generate import generate
from jaxscale.models import decoder, presets
from jaxscale.pretrained import load_model


@pytest.fixture
def directory(tmp_path):
    tokenizer = train_bpe(["the mesh splits every array"] * 50, 300)
    cfg = dataclasses.replace(presets.tiny(), vocab_size=tokenizer.vocab_size, num_layers=2, embed_dim=32, mlp_dim=64)
    export_hf(init_params(jax.random.key(0), decoder.param_specs(cfg)), cfg, tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    return tmp_path / "model"


def test_a_hugging_face_directory_loads_and_speaks_the_same_on_a_mesh(directory):
    alone, sharded = (
        load_model(directory),
        load_model(directory, mesh=make_mesh(fsdp=2, tp=2, devices=jax.devices()[:4])),
    )
    assert alone.stop_tokens == sharded.stop_tokens == (7,)
    assert alone.chat is None
    prompt = alone.encode_chat("the mesh")
    assert alone.tokenizer.decode(prompt) == "the mesh"
    answers = [
        generate(m.params, m.cfg, [prompt], max_new_tokens=6, stop_tokens=m.stop_tokens) for m in (alone, sharded)
    ]
    assert answers[0] == answers[1]


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ValueError, match="is no model; give a name"):
        load_model(tmp_path)
