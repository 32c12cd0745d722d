"""Attention on one GPU: is it right, then how fast, beside cuDNN, tokamax and torch.

    python benchmarks/attention/bench.py                  # everything, under nine minutes, one table last
    python benchmarks/attention/bench.py --only h128      # the jobs whose name holds a word
    python benchmarks/attention/bench.py --seconds 120

Needs a checkout and jax; tokamax and torch are measured where they import. Jobs run one after another in a child
process that this one watches: a job that hangs (a deadlock in a new configuration) costs its time limit, not the run. A
variant that is not right is not timed. Times are medians of rounds of calls issued back to back, peers' too: under load
a GPU meets its power limit and lowers its clock, which short rounds do not see. "kernels" are those of a forward and
backward by the profiler, after that. Inputs are random and several times the L2. TFLOP/s count the pairs of positions
that see each other, and 2.5 times the forward's work for a backward.
"""

import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

JOB_SECONDS = 60  # compiling three kernels takes about ten


@dataclasses.dataclass(frozen=True)
class Work:
    B: int
    T: int
    N: int
    K: int
    H: int
    Hv: int
    causal: bool = True
    window: int | None = None
    documents: int = 0


WORKS = {
    "h128": Work(4, 4096, 16, 16, 128, 128),
    "h128 full": Work(4, 4096, 16, 16, 128, 128, causal=False),
    "h128 16k": Work(1, 16384, 16, 16, 128, 128),
    "gqa 32/8": Work(4, 4096, 32, 8, 128, 128),
    "h64": Work(4, 4096, 16, 16, 64, 64),
    "h256": Work(2, 4096, 16, 16, 256, 256),
    "h80": Work(4, 4096, 16, 16, 80, 80),
    "mla 192/128": Work(2, 4096, 16, 16, 192, 128),
    "packed 16 in 16k": Work(1, 16384, 16, 16, 128, 128, documents=16),
    "window 1024 in 32k": Work(1, 32768, 16, 16, 128, 128, window=1024),
}

# What `tuned` should hold is decided from these: fields of Config that differ from it.
VARIANTS: dict[str, dict] = {
    "tuned": {},
    "kv64x4": {"block_kv": 64, "stages": 4},
    "kv128x3": {"stages": 3},
    "kv192": {"block_kv": 192},
    "kv256": {"block_kv": 256},
    "dq128": {"block_kv_dq": 128, "stages_dq": 2},
    "dq64x2": {"block_kv_dq": 64, "stages_dq": 2},
    "dkv64x2": {"block_q_dkv": 64, "stages_dkv": 2},
    "dkv128": {"block_q_dkv": 128},
}
SWEPT = ("h128", "h64")  # the works that time every variant


def lengths(work: Work):
    """Mixed document lengths, the same in each run: the benchmark compares times."""
    import numpy as np

    cuts = np.sort(np.random.default_rng(7).choice(np.arange(1, work.T), work.documents - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [work.T]]))


def pairs(work: Work) -> float:
    """Pairs of positions that see each other, in one row."""
    if work.documents:
        return float(sum(n * (n + 1) / 2 for n in lengths(work)))
    if work.window:
        return work.T * work.window - work.window * (work.window - 1) / 2
    return work.T * (work.T + 1) / 2 if work.causal else float(work.T) ** 2


def flops(work: Work, backward: bool) -> float:
    forward = 2 * work.B * work.N * pairs(work) * (work.H + work.Hv)
    return forward * (3.5 if backward else 1)


# In the child.

TUNED: dict = {}  # the library's own choice of a configuration, which a variant replaces


def arrays(work: Work, seed: int, dtype="bfloat16"):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(work.N, work.H), (work.K, work.H), (work.K, work.Hv), (work.N, work.Hv)]
    return [jax.random.normal(key, (work.B, work.T, *s), jnp.dtype(dtype)) for key, s in zip(keys, shapes)]


def make(work: Work, implementation: str, variant: str, blocks: int = 132):
    """The function q, k, v -> o; `blocks` of a persistent kernel."""
    import jax

    if implementation == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, is_causal=work.causal, implementation="cudnn")
    if implementation == "tokamax":
        import tokamax

        # Its kernel for Hopper by name: left to itself it may fall back to another.
        return functools.partial(tokamax.dot_product_attention, is_causal=work.causal, implementation="mosaic")

    gpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu")
    from pallas_kernels import attention

    base = TUNED.setdefault("tuned", gpu.tuned)(work.H, work.Hv)
    importlib.import_module("pallas_kernels.attention.schedule").SM_COUNT = blocks
    gpu.tuned = lambda H, Hv: dataclasses.replace(base, **VARIANTS[variant])
    return functools.partial(attention, **hidden(work), implementation=implementation)


def hidden(work: Work) -> dict:
    """The arguments of `attention` that hide keys."""
    import jax.numpy as jnp
    import numpy as np

    ids = None
    if work.documents:
        row = np.repeat(np.arange(1, work.documents + 1), lengths(work)).astype(np.int32)
        ids = jnp.asarray(np.broadcast_to(row, (work.B, work.T)))
    return {"causal": work.causal, "window": work.window, "segment_ids": ids}


def with_backward(f):
    import jax

    def run(q, k, v, do):
        o, vjp = jax.vjp(f, q, k, v)
        return o, vjp(do)

    return run


def check(work: Work, implementation: str, variant: str) -> dict:
    """Relative errors of o, dq, dk, dv against float32, cuDNN's beside them, and whether two runs agree bit by bit."""
    import jax
    import jax.numpy as jnp

    small = dataclasses.replace(
        work, B=2, T=1000 if work.documents or work.window else 1024, N=4, K=4 * work.K // work.N
    )
    small = dataclasses.replace(small, window=100 if work.window else None, documents=min(work.documents, 7))
    seed = int.from_bytes(os.urandom(3), "little")
    x = arrays(small, seed)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_backward(make(small, "reference", "tuned")))(*(a.astype(jnp.float32) for a in x))

    def errors(f):
        run = jax.jit(with_backward(f))
        got = run(*x)
        return runner.errors(got, exact), runner.same(got, run(*x))

    ours, same = errors(make(small, implementation, variant, blocks=24))  # so few that each has several tiles
    bound = [1e-2] * 4
    if not (work.documents or work.window) and work.H == work.Hv <= 128:
        bound = [min(1e-2, 1.5 * e) for e in errors(make(small, "cudnn", "tuned"))[0]]
    wrong = [f"{n} {e:.4f} > {b:.4f}" for n, e, b in zip(("o", "dq", "dk", "dv"), ours, bound) if not e <= b]
    if not same:
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": max(ours), "seed": seed}


def timing(work: Work, implementation: str, variant: str) -> dict:
    f = make(work, implementation, variant)
    q, k, v, do = arrays(work, 0)
    forward, compile_forward = runner.measure(f, q, k, v)
    both, compile_both = runner.measure(with_backward(f), q, k, v, do)
    kernels = runner.profile(with_backward(f), q, k, v, do)[0] / 1e3
    return {"fwd": forward, "both": both, "kernels": kernels, "compile": compile_forward + compile_both}


def torch_timing(work: Work) -> dict:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = lambda n, h: (work.B, n, work.T, h)
    new = lambda n, h: torch.randn(shape(n, h), device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = new(work.N, work.H), new(work.K, work.H), new(work.K, work.Hv)
    do = torch.randn_like(q)
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=work.causal, enable_gqa=work.K != work.N
    )

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            forward = runner.measure_torch(lambda: attend(q, k, v))
        both = runner.measure_torch(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do))
    return {"fwd": forward, "both": both, "compile": 0.0}


def do(job) -> dict:
    kind, name, implementation, variant = job
    if kind == "ceilings":
        return runner.ceilings()
    work = WORKS[name]
    if implementation == "torch":
        return torch_timing(work)
    return (check if kind == "check" else timing)(work, implementation, variant)


# In the parent.


def jobs():
    """Checks first; then the tuned kernels and their peers on every work, the most wanted first; then the variants."""
    yield "ceilings", "", "", ""
    for name in WORKS:
        yield "check", name, "mosaic_gpu", "tuned"
    for name in WORKS:
        yield "time", name, "mosaic_gpu", "tuned"
        if not (WORKS[name].documents or WORKS[name].window):
            yield "time", name, "cudnn", ""
    for kind in ("check", "time"):  # head_dim 80 as it is instead of filled up to 128
        yield kind, "h80", "triton", "tuned"
    for peer in ("torch", "tokamax"):
        for name in list(WORKS)[:5]:
            yield "time", name, peer, ""
    for variant in list(VARIANTS)[1:]:
        for name in SWEPT:
            yield "check", name, "mosaic_gpu", variant
            yield "time", name, "mosaic_gpu", variant


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 510).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(), do, args, JOB_SECONDS, __file__)
    print_table(results)
    return runner.status(results)


def print_table(results) -> None:
    ceilings = results.get(("ceilings", "", "", ""), {})
    print(f"\n{json.dumps(ceilings)}")
    print(
        f"{'work':20}{'backend':24}{'worst err':>10}{'fwd ms':>9}{'TFLOP/s':>9}{'f+b ms':>9}{'TFLOP/s':>9}"
        f"{'kernels':>9}  cuDNN's time over this: fwd, f+b"
    )
    rates = {}
    for job, r in results.items():
        kind, name, implementation, variant = job
        if kind == "ceilings" or (kind == "check" and not r.get("error")):
            continue
        label = implementation if not variant else f"{implementation} {variant}"
        if trouble := runner.trouble(job, r):
            print(f"{name:20}{label:24}{trouble}")
            continue
        work = WORKS[name]
        rate = flops(work, False) / r["fwd"] / 1e9, flops(work, True) / r["both"] / 1e9
        rates[name, label] = rate
        worst = results.get(("check", name, implementation, variant), {}).get("worst")
        peer = results.get(("time", name, "cudnn", ""), {})
        ratio = f"{peer['fwd'] / r['fwd']:.2f}, {peer['both'] / r['both']:.2f}" if "fwd" in peer else ""
        dense = rates.get(("h128 16k", "mosaic_gpu tuned"))
        if (work.documents or work.window) and dense:
            ratio = f"time / time at the dense rate: {dense[0] / rate[0]:.2f}, {dense[1] / rate[1]:.2f}"
        print(
            f"{name:20}{label:24}{'' if worst is None else f'{worst:.4f}':>10}"
            f"{r['fwd']:9.3f}{rate[0]:9.0f}{r['both']:9.3f}{rate[1]:9.0f}"
            f"{r.get('kernels', math.nan):9.3f}  {ratio}"
        )


if __name__ == "__main__":
    sys.exit(main())
