"""Grouped matmul on one GPU: is it right, then how fast, beside a dense matmul, jax.lax.ragged_dot, tokamax and torch.

    python benchmarks/moe/bench.py                     # everything, under nine minutes, one table last
    python benchmarks/moe/bench.py --only "64 groups"  # the jobs whose name holds a word
    JAX_PLATFORMS=cpu python benchmarks/moe/bench.py --tiny  # small sizes and no kernel: does the script run

Needs a checkout and jax; tokamax and torch are measured where they import. Jobs run one after another in a child
process that this one watches: a job that hangs costs its time limit, not the run. A variant that is not right is not
timed. Times are medians of rounds of calls issued back to back. TFLOP/s count the rows that are in groups, three times
for forward and backward; GB/s count the matrices of groups that have rows, and the rows in and out, once.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

JOB_SECONDS = 90


@dataclasses.dataclass(frozen=True)
class Work:
    M: int
    K: int
    N: int
    G: int
    routing: str = "even"  # even; zipf: the g-th group in proportion to 1 / g; few: a quarter of the groups; random


WORKS = {
    "8 groups": Work(16384, 4096, 14336, 8),
    "64 groups": Work(32768, 2048, 1408, 64),
    "64 uneven": Work(32768, 2048, 1408, 64, "zipf"),
    "64, 48 empty": Work(32768, 2048, 1408, 64, "few"),
    "64 random": Work(32768, 2048, 1408, 64, "random"),
    "decode": Work(512, 2048, 768, 128, "random"),  # 64 tokens, 8 of 128 experts each
}
TINY = {"tiny": Work(48, 16, 24, 3, "zipf"), "tiny random": Work(40, 16, 16, 4, "random")}

# What `tuned` should hold is decided from these: fields of Config that differ from it.
VARIANTS: dict[str, dict] = {
    "tuned": {},
    "64x256": {"rows": 64, "columns": 256, "stages": 4},
    "128x128": {"rows": 128, "columns": 128, "stages": 4},
    "64x128x6": {"rows": 64, "columns": 128, "stages": 6},
    "wide 4": {"wide": 4},
    "wide 16": {"wide": 16},
    "wide 32": {"wide": 32},
    "pairs": {"pairs": True},
}
SWEPT = ("8 groups", "64 groups")
UNEVEN = ("64 uneven", "64 random", "64, 48 empty")  # these time "pairs" alone


def group_sizes(work: Work):
    """The same in each run: the benchmark compares times."""
    import numpy as np

    rng = np.random.default_rng(7)
    share = np.ones(work.G)
    if work.routing == "zipf":
        share = rng.permutation(1 / np.arange(1, work.G + 1))
    elif work.routing == "few":
        share = rng.permutation(np.arange(work.G) < max(work.G // 4, 1)).astype(float)
    if work.routing == "random":
        return np.bincount(rng.integers(work.G, size=work.M), minlength=work.G).astype(np.int32)
    ends = np.round(np.cumsum(share) / share.sum() * work.M)
    return np.diff(ends, prepend=0).astype(np.int32)


def flops(work: Work) -> float:
    return 2.0 * work.M * work.K * work.N


def bytes_read(work: Work) -> float:
    return 2.0 * (int((group_sizes(work) > 0).sum()) * work.K * work.N + work.M * (work.K + work.N))


# In the child.

TUNED: dict = {}  # the library's own choice of a configuration, which a variant replaces


def arrays(work: Work, seed: int):
    """lhs, rhs, the cotangent, group sizes."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (work.M, work.K), (work.G, work.K, work.N), (work.M, work.N)
    return *(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes)), jnp.asarray(group_sizes(work))


def make(work: Work, implementation: str, variant: str):
    """The function lhs, rhs, group sizes -> out."""
    import jax

    if implementation == "dense":
        return lambda lhs, rhs, sizes: lhs @ rhs[0]
    if implementation == "lax":
        return jax.lax.ragged_dot
    if implementation == "tokamax":
        import tokamax

        return tokamax.ragged_dot
    gpu: Any = importlib.import_module("pallas_kernels.ragged_dot.pallas_mosaic_gpu")
    from pallas_kernels import ragged_dot

    tuned = TUNED.setdefault("tuned", gpu.tuned)
    gpu.tuned = lambda height, width: dataclasses.replace(tuned(height, width), **VARIANTS[variant or "tuned"])
    return functools.partial(ragged_dot, implementation=implementation)


def with_backward(f):
    import jax

    def run(lhs, rhs, grad, sizes):
        out, vjp = jax.vjp(lambda lhs, rhs: f(lhs, rhs, sizes), lhs, rhs)
        return out, *vjp(grad)

    return run


def check(work: Work, implementation: str, variant: str) -> dict:
    """Relative errors of the output and both gradients against float32 at full size, and whether two runs agree."""
    import jax
    import jax.numpy as jnp

    seed = int.from_bytes(os.urandom(3), "little")
    x = arrays(work, seed)
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in x]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_backward(make(work, "xla", "tuned")))(*wide)
    run = jax.jit(with_backward(make(work, implementation, variant)))
    got, again = run(*x), run(*x)
    errors = runner.errors(got, exact)
    wrong = [f"{n} {e:.4f} > 0.01" for n, e in zip(("out", "d_lhs", "d_rhs"), errors) if not e <= 1e-2]
    if not runner.same(got, again):
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": max(errors), "seed": seed}


def timing(work: Work, implementation: str, variant: str) -> dict:
    if implementation == "torch":
        return torch_timing(work)
    if implementation == "dense":  # one matrix: the same FLOPs, not the same bytes
        work = dataclasses.replace(work, G=1)
    f = make(work, implementation, variant)
    lhs, rhs, grad, sizes = arrays(work, 0)
    return {
        "fwd": runner.measure(f, lhs, rhs, sizes)[0],
        "both": runner.measure(with_backward(f), lhs, rhs, grad, sizes)[0],
    }


def torch_timing(work: Work) -> dict:
    import torch

    ends = torch.tensor(group_sizes(work).cumsum(), device="cuda", dtype=torch.int32)
    new = lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lhs, rhs = new(work.M, work.K), new(work.G, work.K, work.N)
    grad = torch.randn(work.M, work.N, device="cuda", dtype=torch.bfloat16)
    run = lambda: torch._grouped_mm(lhs, rhs, offs=ends)

    with torch.no_grad():
        forward = runner.measure_torch(run)
    return {"fwd": forward, "both": runner.measure_torch(lambda: torch.autograd.grad(run(), (lhs, rhs), grad))}


def do(job) -> dict:
    kind, name, implementation, variant = job
    if kind == "ceilings":
        return runner.ceilings()
    return (check if kind == "check" else timing)((WORKS | TINY)[name], implementation, variant)


# In the parent.


def jobs(tiny: bool):
    """Checks first; then our kernels and their peers, the most wanted first; then the variants."""
    yield "ceilings", "", "", ""
    if tiny:
        for name in TINY:
            yield "check", name, "reference", ""
            for implementation in ("dense", "lax", "xla"):
                yield "time", name, implementation, ""
        return
    for name in WORKS:
        yield "check", name, "mosaic_gpu", "tuned"
    for name in WORKS:
        yield "time", name, "dense", ""
        yield "time", name, "mosaic_gpu", "tuned"
    for peer in ("torch", "xla", "lax", "tokamax"):
        for name in ("8 groups", "64 groups", "64 uneven", "decode"):
            yield "time", name, peer, ""
    for name in (*UNEVEN, *SWEPT):
        for variant in ("pairs",) if name in UNEVEN else list(VARIANTS)[1:]:
            yield "check", name, "mosaic_gpu", variant
            yield "time", name, "mosaic_gpu", variant


def main(argv: list[str] | None = None) -> int:
    parser = runner.parser(__doc__, 510)
    parser.add_argument("--tiny", action="store_true", help="small sizes, in this process, on any device")
    args = parser.parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(args.tiny), do, args, JOB_SECONDS, None if args.tiny else __file__)
    print_table(results)
    return runner.status(results)


def print_table(results) -> None:
    top = results[("ceilings", "", "", "")]
    print(f"\n{json.dumps(top)}")
    print(
        f"{'work':14}{'backend':22}{'worst err':>10}{'fwd ms':>9}{'TFLOP/s':>9}{'GB/s':>7}{'f+b ms':>9}{'TFLOP/s':>9}"
        "  share of dense: fwd, f+b"
    )
    for job, r in results.items():
        kind, name, implementation, variant = job
        if kind == "ceilings" or (kind == "check" and not r.get("error")):
            continue
        label = f"{implementation} {variant}".strip()
        if trouble := runner.trouble(job, r):
            print(f"{name:14}{label:22}{trouble}")
            continue
        work = (WORKS | TINY)[name]
        worst = results.get(("check", name, implementation, variant), {}).get("worst")
        dense = results.get(("time", name, "dense", ""), {})
        share = f"{dense['fwd'] / r['fwd']:.2f}, {dense['both'] / r['both']:.2f}" if "fwd" in dense else ""
        print(
            f"{name:14}{label:22}{'' if worst is None else f'{worst:.4f}':>10}{r['fwd']:9.3f}"
            f"{flops(work) / r['fwd'] / 1e9:9.1f}{bytes_read(work) / r['fwd'] / 1e6:7.0f}"
            f"{r['both']:9.3f}{3 * flops(work) / r['both'] / 1e9:9.1f}  {share}"
        )


if __name__ == "__main__":
    sys.exit(main())
