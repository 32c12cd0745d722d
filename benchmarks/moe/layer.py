"""A whole layer of experts, router to combine, forward and backward, beside its three grouped matmuls alone.

    python benchmarks/moe/layer.py                     # one GPU: Qwen3-30B-A3B's layer, 32k tokens
    python benchmarks/moe/layer.py --kernels           # and the time of each kernel in it
    JAX_PLATFORMS=cpu python benchmarks/moe/layer.py --tiny  # small sizes on any device: does the script run

Weights and activations are bfloat16, as they are once a training step has cast them; the balance loss and the metrics
are in the layer. The grouped matmuls alone get the sizes of the layer's own routing. Before anything is timed the
layer's output and gradients are compared with float32 on a few tokens. Times are medians of rounds of calls issued back
to back.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from typing import Literal

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.models import moe
from jaxscale.sharding import saveable
from pallas_kernels import ragged_dot, ragged_dot_implementation
from sharding_rules.rules import MEGATRON_FSDP

REMATS = ("none", "dots", "full")


def configuration(tiny: bool, dtype: Literal["float32", "bfloat16"], **options) -> ModelConfig:
    size = lambda n, k, f: MoEConfig(num_experts=n, top_k=k, mlp_dim=f, **options)
    D, experts = (64, size(8, 2, 64)) if tiny else (2048, size(128, 8, 768))
    return ModelConfig(
        vocab_size=64,
        embed_dim=D,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=64,
        moe=experts,
        dtype=dtype,
        param_dtype=dtype,
    )


def parameters(cfg: ModelConfig):
    """Of one layer, random; the router so strong that it has preferences."""
    specs = moe.param_specs(cfg, 1)
    leaves, tree = jax.tree.flatten(specs, is_leaf=lambda s: hasattr(s, "shape"))
    keys = jax.random.split(jax.random.key(3), len(leaves))
    new = lambda key, s: jax.random.normal(key, s.shape[1:], cfg.param_dtype) * s.shape[-2] ** -0.5
    return jax.tree.unflatten(tree, [new(k, s) for k, s in zip(keys, leaves, strict=True)]), specs


def layer(cfg: ModelConfig, specs, remat: str):
    """params, x, cotangent -> output, gradients of both."""

    def block(params, x):
        p = moe.gather(params, specs, cfg, x.shape[:2], MEGATRON_FSDP)
        out, stats, _ = moe.block(p, x, cfg, MEGATRON_FSDP, None, None)
        return out, moe.losses({name: x[None] for name, x in stats.items()}, cfg)[0]  # of one layer

    if remat != "none":
        block = jax.checkpoint(block, policy=functools.partial(saveable, remat))

    def run(params, x, grad):
        (out, _), vjp = jax.vjp(block, params, x)
        return out, *vjp((grad, jnp.ones((), jnp.float32)))

    return run


def matmuls(p, h, sizes, gradients):
    """The three grouped matmuls, forward and backward; what lies between them is left out."""
    outs = []
    for name, lhs, grad in zip(("w_gate", "w_up", "w_down"), (h["in"], h["in"], h["hidden"]), gradients, strict=True):
        out, vjp = jax.vjp(lambda lhs, rhs: ragged_dot(lhs, rhs, sizes), lhs, p[name])
        outs.append((out, vjp(grad)))
    return outs


def inputs(cfg: ModelConfig, rows: int, length: int):
    keys = jax.random.split(jax.random.key(5), 2)
    return [jax.random.normal(k, (rows, length, cfg.embed_dim), cfg.dtype) for k in keys]


def check(cfg: ModelConfig, rows: int, length: int) -> float:
    """The worst relative error of the output and the gradients against float32, by norm."""
    params, specs = parameters(cfg)
    params["router"] = jax.tree.map(lambda x: x.astype(jnp.float32), params["router"])
    x, grad = inputs(cfg, rows, length)
    exact = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    with jax.default_matmul_precision("highest"):
        want = jax.jit(layer(exact, specs, "none"))(wide(params), wide(x), wide(grad))
        got = jax.jit(layer(cfg, specs, "dots"))(params, x, grad)
    return max(runner.errors(got, want))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any device")
    parser.add_argument("--kernels", action="store_true", help="the time of each kernel (CUDA)")
    parser.add_argument("--remat", nargs="*", default=REMATS, choices=REMATS)
    args = parser.parse_args(argv)
    cfg = configuration(args.tiny, "float32" if args.tiny else "bfloat16")
    m = cfg.moe
    assert m is not None
    rows, length = (2, 33) if args.tiny else (8, 4096)
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__}))
    worst = check(cfg, 1, 33 if args.tiny else 1024)
    print(f"worst relative error against float32: {worst:.4f}", flush=True)
    if not worst <= 2e-2:
        return 1

    params, specs = parameters(cfg)
    x, grad = inputs(cfg, rows, length)
    logits = moe.router_logits(jax.tree.map(lambda a: a.astype(jnp.float32), params["router"]), x, m)
    chosen = np.asarray(jax.lax.top_k(logits, m.top_k)[1]).reshape(-1)
    sizes = jnp.asarray(np.bincount(chosen, minlength=m.num_experts), jnp.int32)
    new = lambda i, width: jax.random.normal(jax.random.key(i), (chosen.size, width), cfg.dtype)
    wide, narrow = cfg.embed_dim, m.mlp_dim
    h = {"in": new(10, wide), "hidden": new(11, narrow)}
    alone = params["experts"], h, sizes, (new(12, narrow), new(13, narrow), new(14, wide))
    flops = 9 * 2.0 * chosen.size * wide * narrow
    backend = ragged_dot_implementation(h["in"], params["experts"]["w_gate"], sizes)
    bare, _ = runner.measure(matmuls, *alone)
    print(f"{rows * length} tokens, {m.top_k} of {m.num_experts} experts, {wide} x {narrow}; largest group "
          f"{int(sizes.max())}, smallest {int(sizes.min())}; {backend}")  # fmt: skip
    print(f"{'three grouped matmuls':24}{bare:9.3f} ms {flops / bare / 1e9:7.1f} TFLOP/s", flush=True)
    for remat in args.remat:
        run = jax.jit(layer(cfg, specs, remat)).lower(params, x, grad).compile()
        ms, _ = runner.measure(run, params, x, grad)
        print(
            f"{f'layer, remat {remat}':24}{ms:9.3f} ms {flops / ms / 1e9:7.1f} TFLOP/s {ms / bare:6.3f} x", flush=True
        )
        if args.kernels:
            print("milliseconds, launches, kernel")
            _, launches = runner.profile(run, params, x, grad, iterations=2)
            for name, us in sorted(launches.items(), key=lambda kernel: -sum(kernel[1]))[:40]:
                print(f"{sum(us) / 1e3:9.4f}{len(us):5} {name[:90]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
