"""gate, up and the hidden layer of experts in one Hopper kernel, beside two matmuls and XLA's fusion.

    python benchmarks/moe/gated.py          # one Hopper GPU, a minute

Microseconds are those of all kernels of a call by the GPU's profiler, medians of 5. Right comes first: against float32,
then two runs bit by bit. (That writes gate and up as well, as a gradient needs them, was no faster than two matmuls.)
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from benchmarks import runner
from benchmarks.moe.bench import WORKS, group_sizes
from pallas_kernels import ragged_dots
from pallas_kernels.ragged_dot.gated import gated_reference, ragged_dot_gated

JOB_SECONDS = 60
CHOSEN = ("64 groups", "64 uneven", "64 random", "decode")


def separate(lhs, gate, up, weights, sizes):
    return gated_reference(*ragged_dots(lhs, (gate, up), sizes), weights)


def inputs(work):
    keys = jax.random.split(jax.random.key(int.from_bytes(os.urandom(3), "little")), 4)
    matrices = [0.05 * jax.random.normal(k, (work.G, work.K, work.N), jnp.bfloat16) for k in keys[:2]]
    lhs = jax.random.normal(keys[2], (work.M, work.K), jnp.bfloat16)
    weights = jax.random.uniform(keys[3], (work.M, 1), jnp.float32, 0.1, 1.0)
    return lhs, *matrices, weights, jnp.asarray(group_sizes(work))


WAYS = {
    "separate": separate,
    "gated": ragged_dot_gated,
}


def do(job) -> dict:
    kind, name, way, _ = job
    if kind == "ceilings":
        return runner.ceilings()
    args = inputs(WORKS[name])
    if kind == "time":
        us, launches = runner.profile(jax.jit(WAYS[way]), *args)
        return {"us": us, "kernels": {kernel: sum(times) for kernel, times in launches.items()}}
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in args]
    with jax.default_matmul_precision("highest"):
        want = (jax.jit(separate)(*wide),)
    run = jax.jit(WAYS[way])
    got = (run(*args),)
    worst = max(runner.errors(got, want))
    wrong = "" if worst < 1e-2 else f"relative error {worst:.4f}"
    return {"worst": worst, "error": wrong if runner.same(got, (run(*args),)) else f"{wrong} two runs differ"}


def jobs():
    yield "ceilings", "", "", ""
    for name in CHOSEN:
        yield "check", name, "gated", ""
        for way in WAYS:
            yield "time", name, way, ""


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 240).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(), do, args, JOB_SECONDS, __file__)
    for job, r in results.items():
        if "us" in r:
            longest = sorted(r["kernels"].items(), key=lambda kernel: -kernel[1])[:4]
            print(f"{job[1]:14}{job[2]:18}{r['us']:9.1f} us  ", *(f"{name[:28]} {us:.1f}" for name, us in longest))
    return runner.status(results)


if __name__ == "__main__":
    sys.exit(main())
