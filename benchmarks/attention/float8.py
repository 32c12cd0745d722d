"""The float8 forward on one Hopper GPU: is it right, then how fast, beside the bfloat16 forward of the same run.

    python benchmarks/attention/float8.py    # under a minute

Errors: of o against float32 attention of the same rounded numbers (what rounding the probabilities adds), and against
float32 attention of the numbers as they were, the bfloat16 kernel's beside it. Times: the whole call, which rounds q, k
and v first, and by the GPU's profiler the kernel alone.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner
from benchmarks.attention.bench import WORKS, Work, arrays, flops, hidden

JOB_SECONDS = 60
NAMES = ("h128", "h128 full", "h128 16k", "gqa 32/8", "h64", "packed 16 in 16k", "window 1024 in 32k")


def attend(work: Work, implementation: str):
    from pallas_kernels import attention, attention_float8

    if implementation == "bfloat16":
        return functools.partial(attention, **hidden(work), implementation="mosaic_gpu")
    return functools.partial(attention_float8, **hidden(work), implementation=implementation)


def do(job) -> dict:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from pallas_kernels import attention

    kind, name, implementation, _ = job
    if kind == "ceilings":
        return runner.ceilings()
    work = WORKS[name]
    if kind == "time":
        x = arrays(work, 0)[:3]
        f = jax.jit(attend(work, implementation))
        _, kernels = runner.profile(f, *x)
        alone = sum(sum(us) for kernel, us in kernels.items() if "attention" in kernel) / 1e3
        return {"fwd": runner.measure(f, *x)[0], "alone": alone}
    # Long enough that blocks have several tiles of all lengths.
    window = 300 if work.window else None
    work = dataclasses.replace(work, B=1, T=4000, N=8, K=8 * work.K // work.N, window=window)
    x = arrays(work, 1)[:3]
    f = jax.jit(attend(work, implementation))
    got = f(*x)
    with jax.default_matmul_precision("highest"):
        rounded = jax.jit(attend(work, "xla"))(*x)
        exact = jax.jit(functools.partial(attention, **hidden(work), implementation="xla"))(
            *(a.astype(jnp.float32) for a in x)
        )
    added, whole = runner.errors(got, rounded)[0], runner.errors(got, exact)[0]
    wrong = "" if added < 2**-4 / 3**0.5 else f"{added:.4f} beside the rounded numbers' own"
    if not runner.same(got, f(*x)):
        wrong += " two runs differ"
    bf16 = runner.errors(jax.jit(attend(work, "bfloat16"))(*x), exact)[0]
    return {"error": wrong, "added": added, "whole": whole, "bfloat16": bf16}


def jobs():
    yield "ceilings", "", "", ""
    for name in NAMES:
        yield "check", name, "mosaic_gpu", ""
    for name in NAMES:
        for implementation in ("mosaic_gpu", "bfloat16"):
            yield "time", name, implementation, ""


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 120).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(), do, args, JOB_SECONDS, __file__)
    print(f"{'work':14}{'backend':14}{'call ms':>9}{'TFLOP/s':>9}{'kernel ms':>11}{'TFLOP/s':>9}")
    for job, r in results.items():
        if job[0] == "time" and "fwd" in r:
            work = flops(WORKS[job[1]], False) / 1e9
            rates = work / r["fwd"], work / r["alone"]
            print(f"{job[1]:14}{job[2]:14}{r['fwd']:9.3f}{rates[0]:9.0f}{r['alone']:11.3f}{rates[1]:9.0f}")
    return runner.status(results)


if __name__ == "__main__":
    sys.exit(main())
