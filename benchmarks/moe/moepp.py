"""Experts that cost nothing (MoE++, arXiv 2410.07348): expert-forward throughput over that of a vanilla layer.

    python benchmarks/moe/moepp.py                           one GPU, 32k tokens, under a minute
    JAX_PLATFORMS=cpu python benchmarks/moe/moepp.py --tiny  small sizes on any device: does the script run

Throughput is the paper's: tokens a second through the experts, those that cost nothing included, the router left out.
The sizes are its 0.6B/(8+4)E and 7B/(16+4)E layers, 2 experts for each token. tau (`MoEConfig.cheap_balance`) sets how
much of the load the balance loss leaves to expensive experts, tau N / (tau N + Z) of N expensive and Z cheap ones;
experts are drawn with these odds, two different ones for each token. `ideal` is what the share of expensive experts
alone would give. Each layer is compared with a loop over experts in float32 before it is timed.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from jaxscale.config import ModelConfig, MoEConfig
from jaxscale.models import moe, routing
from jaxscale.parallel.expert import apply_experts
from sharding_rules.rules import MEGATRON_FSDP

TAUS = (0.1, 0.25, 0.5, 0.75, 1.0)
# Expensive experts, cheap ones as (zero, copy, constant), width, an expert's hidden layer.
SIZES = {"0.6B/(8+4)E": (8, (1, 1, 2), 768, 2048), "7B/(16+4)E": (16, (1, 1, 2), 1536, 4096)}
TINY = {"tiny/(8+4)E": (8, (1, 1, 2), 64, 128)}


def configuration(experts: int, cheap: tuple[int, int, int], D: int, F: int) -> ModelConfig:
    m = MoEConfig(num_experts=experts, top_k=2, mlp_dim=F, num_zero=cheap[0], num_copy=cheap[1], num_constant=cheap[2])
    sizes = {"vocab_size": 8, "num_layers": 1, "mlp_dim": F, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64}
    return ModelConfig(embed_dim=D, moe=m, dtype="bfloat16", param_dtype="bfloat16", **sizes)


def forward(m: MoEConfig, p, x, experts, weights):
    """What all experts of a layer, expensive and cheap, add."""
    out = apply_experts(x, experts, weights, p["experts"])
    if m.num_routed == m.num_experts:
        return out
    return out + moe._cheap(p.get("constant"), x, routing.Routing(experts, weights, weights), m, MEGATRON_FSDP)


def loop(m: MoEConfig, p, x, experts, weights):
    """The same, an expert after the other, in numpy and float64."""
    p, x = jax.tree.map(lambda a: np.asarray(a.astype(jnp.float32), np.float64), (p, x))
    weight = lambda e: np.where(np.asarray(experts) == e, np.asarray(weights), 0.0).sum(axis=-1)[..., None]
    out, copies = np.zeros_like(x), m.num_experts + m.num_zero
    for e in range(m.num_experts):
        w = {k: a[e] for k, a in p["experts"].items()}
        gate = x @ w["w_gate"]
        out += weight(e) * ((gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"])
    for e in range(copies, copies + m.num_copy):
        out += weight(e) * x
    for i in range(m.num_constant):
        mix = np.exp(x @ p["constant"]["w"][:, 2 * i : 2 * i + 2])
        mix /= mix.sum(axis=-1, keepdims=True)
        out += weight(copies + m.num_copy + i) * (mix[..., :1] * x + mix[..., 1:] * p["constant"]["value"][i])
    return out


def draw(m: MoEConfig, tokens: int, tau: float, seed: int = 5):
    """(experts [1, T, 2], weights): two different ones for each token, with odds of tau and 1."""
    rng = np.random.default_rng(seed)
    odds = np.where(np.arange(m.num_routed) < m.num_experts, tau, 1.0)
    best = np.argsort(-(np.log(odds) + rng.gumbel(size=(tokens, m.num_routed))), axis=-1)[None, :, :2]
    first = rng.uniform(0.5, 1.0, (1, tokens, 1))
    return jnp.asarray(best, jnp.int32), jnp.asarray(np.concatenate([first, 1 - first], axis=-1), jnp.float32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    tokens = 512 if options.tiny else 32_768
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "tokens": tokens}))
    rows, ok = [], True
    for name, size in (TINY if options.tiny else SIZES).items():
        cfg = configuration(*size)
        m = cfg.moe
        vanilla = dataclasses.replace(m, num_zero=0, num_copy=0, num_constant=0)
        leaves, tree = jax.tree.flatten(moe.param_specs(cfg, 1))
        keys = jax.random.split(jax.random.key(2), len(leaves) + 1)
        new = lambda key, s: jax.random.normal(key, s.shape[1:], s.dtype) * s.shape[-2] ** -0.5
        p = jax.tree.unflatten(tree, [new(*each) for each in zip(keys[1:], leaves, strict=True)])
        x = jax.random.normal(keys[0], (1, tokens, cfg.embed_dim), jnp.bfloat16)
        run = {kind: jax.jit(functools.partial(forward, kind)) for kind in (m, vanilla)}
        for kind, f in run.items():
            few, (experts, weights) = x[:, :256], draw(kind, 256, 0.5)
            want, got = loop(kind, p, few, experts, weights), np.asarray(f(p, few, experts, weights), np.float64)
            error = np.linalg.norm(got - want) / np.linalg.norm(want)
            ok &= bool(error < 1e-2)
            print(f"{name} {kind.num_routed} experts: relative error {error:.4f}", flush=True)
        plain = runner.measure(run[vanilla], p, x, *draw(vanilla, tokens, 1.0))[0]
        for tau in TAUS:
            experts, weights = draw(m, tokens, tau)
            share = float((experts < m.num_experts).mean())
            ms = runner.measure(run[m], p, x, experts, weights)[0]
            times = f"{plain:.3f} | {ms:.3f} | {plain / ms:.2f}"
            rows.append(f"| {name} | {tau} | {share:.2f} | {times} | {1 / share:.2f} |")
    print("\n| layer | tau | expensive share | vanilla ms | MoE++ ms | throughput ratio | ideal |\n" + "|---" * 7 + "|")
    print("\n".join(rows))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
