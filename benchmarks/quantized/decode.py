"""Tokens a second of an 8B model that decodes, weights in 4 bits beside bfloat16, on one GPU.

    python benchmarks/quantized/decode.py                            # llama3-8b with random weights, batch 1 and 16
    python benchmarks/quantized/decode.py --recipes bf16-unstacked bf16 w4a16-g128 --profile

What `generate` runs: its compiled decode step with greedy sampling, steps issued back to back, medians over turns.
`stacked` keeps the layers in stacks, as they are trained; else they are taken apart as `generate` does for 4 bits.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from benchmarks.quantized.training import kernels

TURNS, STEPS = 5, 32


def check(cfg, recipe: str, slots: int) -> float:
    """How far logits of two layers, taken apart and over a cache read as pages, are from those of the stacked ones."""
    import jaxscale
    from jaxscale.generate import decode_step
    from jaxscale.models import cache as kv
    from jaxscale.models import decoder
    from jaxscale.models.unstacked import unstack
    from jaxscale.params import init_params

    cfg = dataclasses.replace(cfg, num_layers=2, vocab_size=4096)
    params, specs = init_params(jax.random.key(1), decoder.param_specs(cfg)), decoder.param_specs(cfg)
    params = params if recipe.startswith("bf16") else jaxscale.quantize(params, recipe, specs)
    positions = jnp.asarray([5, slots // 2, slots - 2], jnp.int32)
    filled = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(2), x.shape, x.dtype), decoder.init_cache(cfg, 3, slots)
    )
    tokens = jnp.asarray([1, 2, 3], jnp.int32)
    step = lambda params: jax.jit(lambda p, c: decode_step(p, c, tokens, positions, cfg)[0])(params, filled)
    got = step(unstack(params))
    kernels, kv.KERNELS = kv.KERNELS, ()
    want = step(params)
    kv.KERNELS = kernels
    return float(jnp.abs(got - want).max() / jnp.abs(want).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--recipes", nargs="*", default=["bf16-unstacked", "bf16", "w4a16-g128"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--slots", type=int, default=1024, help="of the cache")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--stacked", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()

    import jaxscale
    from jaxscale.generate import _copied_by_xla, _decode_and_sample
    from jaxscale.models import decoder
    from jaxscale.models.presets import preset
    from jaxscale.models.unstacked import unstack
    from jaxscale.params import init_params
    from jaxscale.quantize.apply import num_bytes
    from sharding_rules.rules import MEGATRON_FSDP

    cfg = dataclasses.replace(preset(args.model), param_dtype="bfloat16")
    cfg = dataclasses.replace(cfg, num_layers=args.layers or cfg.num_layers)
    specs = decoder.param_specs(cfg)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {cfg.name}, {cfg.num_layers} layers")
    for recipe in args.recipes:
        print(f"check {recipe}: largest difference of logits {check(cfg, recipe, args.slots):.2e}", flush=True)
    print(f"{'weights':16}{'batch':>6}{'GB':>7}{'ms/step':>9}{'tokens/s':>10}{'x bf16':>8}{'GB/s':>7}{'compile s':>10}")
    first: dict[int, float] = {}
    greedy = {"key": None, "temperature": None, "top_p": None, "top_k": None, "rules": MEGATRON_FSDP, "coherent": False}
    dense = init_params(jax.random.key(0), specs)
    for recipe in args.recipes:
        params = dense if recipe.startswith("bf16") else jaxscale.quantize(dense, recipe, specs)
        if recipe == args.recipes[-1]:
            del dense
        if recipe == "bf16-unstacked" or (not args.stacked and _copied_by_xla(params)):
            params = unstack(params)
        size = num_bytes(params)
        for batch in args.batches:
            cache = decoder.init_cache(cfg, batch, args.slots)
            tokens = jnp.arange(batch, dtype=jnp.int32)
            positions = jnp.full(batch, args.slots // 2, jnp.int32)
            start = time.perf_counter()
            tokens, cache = jax.block_until_ready(_decode_and_sample(params, cache, tokens, positions, cfg, **greedy))
            compiled, turns = time.perf_counter() - start, []
            where = [positions + i for i in range(STEPS)]
            for _ in range(TURNS):
                start = time.perf_counter()
                for at in where:
                    tokens, cache = _decode_and_sample(params, cache, tokens, at, cfg, **greedy)
                jax.block_until_ready(tokens)
                turns.append((time.perf_counter() - start) / STEPS)
            seconds = statistics.median(turns)
            first.setdefault(batch, seconds)
            print(
                f"{recipe:16}{batch:6}{size / 1e9:7.2f}{seconds * 1e3:9.3f}{batch / seconds:10.1f}"
                f"{first[batch] / seconds:8.2f}{size / seconds / 1e9:7.0f}{compiled:10.1f}",
                flush=True,
            )
            if args.profile:
                rest = params, cache, tokens, positions, cfg
                kernels(lambda rest=rest: jax.block_until_ready(_decode_and_sample(*rest, **greedy)))
        del params


if __name__ == "__main__":
    main()
