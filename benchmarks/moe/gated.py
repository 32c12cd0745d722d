"""gate, up and the hidden layer of experts in one Hopper kernel, beside two matmuls and XLA's fusion.

    python benchmarks/moe/gated.py          # one Hopper GPU, a minute

Microseconds are those of all kernels of a call by the GPU's profiler, medians of 5; "kept" writes gate and up too, as a
training step needs them. Right comes first: every output and gradient against float32, then two runs bit by bit.
"""

import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from benchmarks import runner
from benchmarks.moe.bench import WORKS, group_sizes
from pallas_kernels import ragged_dots
from pallas_kernels.ragged_dot import pallas_mosaic_gpu as kernels
from pallas_kernels.ragged_dot.gated import gated_reference, ragged_dot_gated

CHOSEN = ("64 groups", "64 uneven", "64 random", "decode")


def separate(lhs, gate, up, weights, sizes):
    return gated_reference(*ragged_dots(lhs, (gate, up), sizes), weights)


def separate_kept(lhs, gate, up, weights, sizes):
    sides = ragged_dots(lhs, (gate, up), sizes)
    return gated_reference(*sides, weights), *sides


def kept(lhs, gate, up, weights, sizes):
    return kernels.gated(lhs, (gate, up), weights[:, 0], sizes, lhs.dtype)


def with_gradients(f):
    def run(lhs, gate, up, weights, sizes, grad):
        out, vjp = jax.vjp(lambda *x: f(*x, sizes), lhs, gate, up, weights)
        return out, vjp(grad)

    return run


def inputs(work):
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 5)
    matrices = [0.05 * jax.random.normal(k, (work.G, work.K, work.N), jnp.bfloat16) for k in keys[:2]]
    lhs = jax.random.normal(keys[2], (work.M, work.K), jnp.bfloat16)
    weights = jax.random.uniform(keys[3], (work.M, 1), jnp.float32, 0.1, 1.0)
    grad = jax.random.normal(keys[4], (work.M, work.N), jnp.bfloat16)
    return lhs, *matrices, weights, jnp.asarray(group_sizes(work)), grad


def check(args) -> float:
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args]
    with jax.default_matmul_precision("highest"):
        want = jax.jit(with_gradients(separate))(*wide)
    run = jax.jit(with_gradients(ragged_dot_gated))
    got = run(*args)
    worst = max(runner.errors(got, want))
    if not worst < 1e-2 or not runner.same(got, run(*args)):
        raise ArithmeticError(f"error {worst:.4f}, or two runs differ")
    return worst


def main() -> int:
    failed = 0
    print(json.dumps(runner.ceilings()))
    for name in CHOSEN:
        *args, grad = inputs(WORKS[name])
        try:
            print(f"{name:14} worst error {check((*args, grad)):.4f}", flush=True)
        except Exception as e:
            failed += 1
            print(f"{name:14} WRONG {runner.message(e)}", flush=True)
            continue
        ways = ("separate", separate), ("gated", ragged_dot_gated)
        rows = [(label, f, args) for label, f in (*ways, ("separate, kept", separate_kept), ("gated, kept", kept))]
        rows += [(f"{label}, f+b", with_gradients(f), (*args, grad)) for label, f in ways]
        for label, f, values in rows:
            try:
                us, launches = runner.profile(jax.jit(f), *values)
            except Exception as e:
                failed += 1
                print(f"{name:14}{label:18} FAILED {runner.message(e)}", flush=True)
                continue
            longest = sorted(launches.items(), key=lambda kernel: -sum(kernel[1]))[:4]
            print(f"{name:14}{label:18}{us:9.1f} us  ", *(f"{n[:28]} {sum(t):.1f}" for n, t in longest), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
