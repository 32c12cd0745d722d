"""The real SmolLM2-135M-Instruct from its own 4-bit file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.generate import generate
from jaxscale.models import decoder
from jaxscale.params import num_params
from jaxscale.pretrained import load_model
from jaxscale.quantize.apply import num_bytes

FOX = [504, 2365, 6354, 16438, 27003, 690, 260, 23790]


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_it_runs_from_its_packed_weights():
    """Logits within 1e-3 of the dequantized model's, and the memory that the file's own bits say."""
    model = load_model("smollm2-135m", quantize="stored")
    whole = load_model("smollm2-135m")
    forward = jax.jit(decoder.forward, static_argnames="cfg")
    tokens = jnp.asarray([FOX], jnp.int32)
    got, want = forward(model.params, tokens, cfg=model.cfg), forward(whole.params, tokens, cfg=model.cfg)
    assert np.abs(got - want).max() < 1e-3
    prompt = model.encode_chat("What is the capital of France?")
    [answer] = generate(model.params, model.cfg, [prompt], max_new_tokens=10, stop_tokens=model.stop_tokens)
    assert model.tokenizer.decode(answer) == "The capital of France is Paris."
    # 106.2 M numbers in Q4_1: 4 bits and 2 float16 a block of 32, 5 bits each; 28.3 M in Q8_0: 8.5; norms in float32.
    numbers = num_params(decoder.param_specs(model.cfg))
    embed, norms = 49152 * 576, 61 * 576
    expected = ((numbers - embed - norms) * 5 + embed * 8.5) / 8 + norms * 4
    assert num_bytes(model.params) == expected
    share = num_bytes(model.params) / (2 * numbers)
    assert 0.35 < share < 0.37  # the file itself: no exact import is smaller
