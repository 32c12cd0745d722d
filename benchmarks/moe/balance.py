"""Does balancing experts over the whole batch train better than over parts of it? A study on real text.

    python benchmarks/moe/balance.py --out runs/balance                                on a GPU
    JAX_PLATFORMS=cpu python benchmarks/moe/balance.py --out runs/balance --small      some minutes on a core

Small decoders (4 layers, 32 experts, 4 for each token; --small: 2 layers, 8 experts, 2 for each) learn the running
Python's standard library byte by byte; a row is a piece of one file. They differ in how many rows of a batch must use
all experts evenly together (`MoEConfig.balance_rows`): all 32 (--small: 16), 4, or 1, as in arXiv 2501.11873. A seed
gives the initial values and the order of the text, and is the same for each scope; one file in 20 is held out. What is
done is kept in --out and not done again; the table of all of it comes last. Processes that share --out may train a
scope each: compiling takes longer than training. The router's trace of the held-out text is kept as well:
benchmarks/moe/placement.py places experts by it.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
import sysconfig
import time
import zlib

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.config import ModelConfig, MoEConfig, OptimizerConfig
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from jaxscale.params import init_params
from jaxscale.train import make_train_state, make_train_step

SCOPES = {"global": None, "micro-batch": 4, "sequence": 1}
HELD_OUT = 16  # batches of text
MODEL = ModelConfig(
    name="balance-study",
    vocab_size=256,
    num_layers=4,
    embed_dim=256,
    mlp_dim=256,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    moe=MoEConfig(num_experts=32, top_k=4, mlp_dim=128),
)
SMALL = dataclasses.replace(
    MODEL,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    dtype="float32",
    moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=32),
)


def read_files() -> dict[bool, list[np.ndarray]]:
    """The bytes of the standard library's files, by whether they are held out."""
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(p for s in ("*.py", "*.txt") for p in root.rglob(s) if "site-packages" not in p.parts):
        data = path.read_bytes()
        if len(data) > 2048:
            held_out = zlib.crc32(str(path.relative_to(root)).encode()) % 20 == 0
            found[held_out].append(np.frombuffer(data, np.uint8))
    return found


def cut(files: list[np.ndarray], batches: int, rows: int, length: int, seed: int) -> dict[str, jax.Array]:
    """[batches, rows, length] random pieces, each of one file; longer files are met more often."""
    rng, sizes = np.random.default_rng(seed), np.array([len(f) for f in files], float)
    chosen = rng.choice(len(files), batches * rows, p=sizes / sizes.sum())
    starts = [rng.integers(len(files[i]) - length) for i in chosen]
    text = np.stack([files[i][s : s + length + 1] for i, s in zip(chosen, starts)]).astype(np.int32)
    text = jnp.asarray(text.reshape(batches, rows, length + 1))
    return {"tokens": text[..., :-1], "labels": text[..., 1:]}


class Study:
    """One scope: its programs, compiled once for all seeds."""

    def __init__(self, scope: str, weight: float, rate: float, steps: int, rows: int, length: int):
        model = SMALL if rows == 16 else MODEL
        moe = dataclasses.replace(model.moe, balance_rows=SCOPES[scope], balance_weight=weight)
        cfg = dataclasses.replace(model, moe=moe)
        loss = functools.partial(decoder.loss_fn, cfg=cfg)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=rate, warmup_steps=max(steps // 12, 1)), steps)
        step = make_train_step(loss, optimizer, donate=False)
        specs, self.steps, self.shape = decoder.param_specs(cfg), steps, (rows, length)

        def begin(key):
            return make_train_state(init_params(key, specs), optimizer, key)

        self.begin = jax.jit(begin)
        self.train = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
        evaluate = lambda params, batch: loss(params, batch)[1]
        self.evaluate = jax.jit(lambda params, batches: jax.lax.map(functools.partial(evaluate, params), batches))
        self.trace = jax.jit(functools.partial(decoder.router_trace, cfg=cfg))

    def run(self, files, seed: int) -> tuple[dict, np.ndarray]:
        """(what to report, the trace [L, rows, T, K] of held-out text)."""
        start = time.time()
        state = self.begin(jax.random.key(seed))
        state, seen = self.train(state, cut(files[False], self.steps, *self.shape, seed))
        valid = cut(files[True], HELD_OUT, *self.shape, 10_000)
        found = jax.tree.map(lambda x: float(x.mean()), self.evaluate(state.params, valid))
        last = jax.tree.map(lambda x: float(x[-20:].mean()), seen)
        report = {f"valid_{k}": found[k] for k in ("nll", "router_load", "router_balance")}
        report |= {f"train_{k}": last[k] for k in ("nll", "router_load", "router_balance")}
        rows = np.concatenate([np.asarray(self.trace(state.params, valid["tokens"][i]), np.int8) for i in range(2)], 1)
        return report | {"seconds": time.time() - start}, rows


def table(results: list[dict]) -> str:
    """Means over seeds, and each scope against the global batch seed by seed: mean and standard error."""
    lines = ["| balanced over | runs | validation nats (sd) | minus global, same seed | busiest expert / even |"]
    lines.append("|---" * 5 + "|")
    by = {scope: {r["seed"]: r for r in results if r["scope"] == scope} for scope in SCOPES}
    for scope, runs in by.items():
        if not runs:
            continue
        losses = np.array([r["valid_nll"] for r in runs.values()])
        pairs = np.array([r["valid_nll"] - by["global"][s]["valid_nll"] for s, r in runs.items() if s in by["global"]])
        deviation = lambda x: x.std(ddof=1) if len(x) > 1 else float("nan")
        against = f"{pairs.mean():+.4f} ± {deviation(pairs) / max(len(pairs), 1) ** 0.5:.4f}" if len(pairs) else ""
        load = np.mean([r["valid_router_load"] for r in runs.values()])
        loss = f"{losses.mean():.4f} ({deviation(losses):.4f})"
        lines.append(f"| {scope} | {len(runs)} | {loss} | {against} | {load:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="a directory for results and traces")
    parser.add_argument("--scopes", nargs="*", default=list(SCOPES), choices=SCOPES, help="what this process trains")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--weight", type=float, default=0.01, help="MoEConfig.balance_weight")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no run after this many")
    parser.add_argument("--small", action="store_true", help="a size for a CPU")
    options = parser.parse_args()
    rows, length = (16, 64) if options.small else (32, 256)
    runs = options.out / f"{options.steps} steps, weight {options.weight}, rate {options.rate}"
    runs.mkdir(parents=True, exist_ok=True)
    begun, studies, files = time.time(), {}, read_files()
    for seed, scope in itertools.product(range(options.seeds), options.scopes):
        file = runs / f"{scope}-{seed}.json"
        if file.exists() or time.time() - begun > options.seconds:
            continue
        if scope not in studies:
            studies[scope] = Study(scope, options.weight, options.rate, options.steps, rows, length)
        report, trace = studies[scope].run(files, seed)
        np.save(options.out / f"trace-{scope}-{seed}.npy", trace)
        file.write_text(json.dumps({"scope": scope, "seed": seed} | report, indent=1) + "\n")
        print(f"[{time.time() - begun:4.0f} s] {scope} {seed}: {report}", flush=True)
    print(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__} | vars(options), default=str))
    print(table([json.loads(file.read_text()) for file in sorted(runs.glob("*.json"))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
