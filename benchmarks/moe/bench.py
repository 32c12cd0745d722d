"""Grouped matmul on one GPU: is it right, then how fast, beside a dense matmul, jax.lax.ragged_dot, tokamax and torch.

    python benchmarks/moe/bench.py                     # everything, under nine minutes, one table last
    python benchmarks/moe/bench.py --only "64 groups"  # the jobs whose name holds a word
    JAX_PLATFORMS=cpu python benchmarks/moe/bench.py --tiny  # small sizes and no kernel: does the script run

Needs a checkout and jax; tokamax and torch are measured where they import. Jobs run one after another in a child
process that this one watches: a job that hangs costs its time limit, not the run. A variant that is not right is not
timed. Times are medians of rounds of calls issued back to back. TFLOP/s count the rows that are in groups, three times
for forward and backward; GB/s count the matrices of groups that have rows, and the rows in and out, once.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

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
}
SWEPT = ("8 groups", "64 groups")


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
    import importlib

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
    import numpy as np

    seed = int.from_bytes(os.urandom(3), "little")
    x = arrays(work, seed)
    wide = [a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in x]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(with_backward(make(work, "xla", "tuned")))(*wide)
    run = jax.jit(with_backward(make(work, implementation, variant)))
    got, again = run(*x), run(*x)
    norm = lambda a: float(jnp.sqrt(jnp.sum(jnp.square(a.astype(jnp.float32)))))
    errors = [norm(a.astype(jnp.float32) - b) / norm(b) for a, b in zip(got, exact, strict=True)]
    wrong = [f"{n} {e:.4f} > 0.01" for n, e in zip(("out", "d_lhs", "d_rhs"), errors) if not e <= 1e-2]
    if not all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True)):
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": float(np.max(errors)), "seed": seed}


def measure(run, args, rounds: int = 9, calls: int = 16) -> float:
    """Median milliseconds of one call."""
    import jax
    import numpy as np

    compiled = jax.jit(run).lower(*args).compile()
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times)) * 1e3


def timing(work: Work, implementation: str, variant: str) -> dict:
    if implementation == "torch":
        return torch_timing(work)
    if implementation == "dense":  # one matrix: the same FLOPs, not the same bytes
        work = dataclasses.replace(work, G=1)
    f = make(work, implementation, variant)
    lhs, rhs, grad, sizes = arrays(work, 0)
    return {
        "fwd": measure(f, (lhs, rhs, sizes)),
        "both": measure(with_backward(f), (lhs, rhs, grad, sizes)),
    }


def torch_timing(work: Work) -> dict:
    import torch

    ends = torch.tensor(group_sizes(work).cumsum(), device="cuda", dtype=torch.int32)
    new = lambda *s: torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    lhs, rhs = new(work.M, work.K), new(work.G, work.K, work.N)
    grad = torch.randn(work.M, work.N, device="cuda", dtype=torch.bfloat16)
    run = lambda: torch._grouped_mm(lhs, rhs, offs=ends)

    def median(f):
        for _ in range(3):
            f()
        times = []
        for _ in range(9):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(16):
                f()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 16)
        return sorted(times)[4]

    with torch.no_grad():
        forward = median(run)
    return {"fwd": forward, "both": median(lambda: torch.autograd.grad(run(), (lhs, rhs), grad))}


def ceilings() -> dict:
    """Bytes read and written a second by a copy of 4 GiB, and the rate of a large matmul."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    result = {"device": device.device_kind, "jax": jax.__version__}
    if device.platform == "cpu":
        return result
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    result["GB/s"] = 2 * 2**32 / measure(lambda x: x + 1, (x,)) / 1e6
    del x
    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    return result | {"TFLOP/s": 2 * 8192**3 / measure(lambda a: a @ a, (a,)) / 1e9}


def do(job) -> dict:
    kind, name, implementation, variant = job
    work = (WORKS | TINY).get(name)
    try:
        if work is None:
            return ceilings()
        return (check if kind == "check" else timing)(work, implementation, variant)
    except Exception as e:
        text = str(e).strip()
        return {"error": f"{type(e).__name__}: {text.splitlines()[0][:160] if text else ''}"}


def child() -> None:
    """Jobs as lines of JSON in, results out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is not a result
    for line in sys.stdin:
        print(json.dumps(do(json.loads(line))), file=out, flush=True)


# In the parent.


class Worker:
    """A child process; a fresh one after a job that did not answer in time or took the process down."""

    def __init__(self):
        self.process = None

    def run(self, job, seconds: float) -> dict:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            self.lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=self.read, args=(self.process, self.lines), daemon=True).start()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=seconds)
        except (queue.Empty, BrokenPipeError):
            line = ""
        if line:
            return json.loads(line)
        code = self.process.poll()
        self.stop()
        return {"error": f"no answer in {seconds:.0f} s" if code is None else f"the process ended with {code}"}

    @staticmethod
    def read(process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


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
    for name in SWEPT:
        for variant in list(VARIANTS)[1:]:
            yield "check", name, "mosaic_gpu", variant
            yield "time", name, "mosaic_gpu", variant


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="small sizes, in this process, on any device")
    parser.add_argument("--only", default="", help="run the jobs whose work, backend or variant holds this word")
    parser.add_argument("--seconds", type=float, default=510, help="start no job after this many seconds")
    args = parser.parse_args(argv)
    if args.child:
        child()
        return 0
    start, worker, results = time.perf_counter(), Worker(), {}
    for job in jobs(args.tiny):
        kind, name, implementation, variant = job
        left = args.seconds - (time.perf_counter() - start)
        if left < 5 or not (kind == "ceilings" or args.only in f"{name} {implementation} {variant}"):
            continue
        if kind == "time" and results.get(("check", *job[1:]), {}).get("error"):
            continue
        results[job] = do(job) if args.tiny else worker.run(job, min(JOB_SECONDS, left + 25))
        print(f"[{time.perf_counter() - start:4.0f} s]", *job, results[job], flush=True)
    worker.stop()
    print_table(results)
    return 1 if any(r.get("error") for (kind, *_), r in results.items() if kind == "check") else 0


def print_table(results) -> None:
    top = results[("ceilings", "", "", "")]
    print(f"\n{json.dumps(top)}")
    print(
        f"{'work':14}{'backend':22}{'worst err':>10}{'fwd ms':>9}{'TFLOP/s':>9}{'GB/s':>7}{'f+b ms':>9}{'TFLOP/s':>9}"
        "  share of dense: fwd, f+b"
    )
    for (kind, name, implementation, variant), r in results.items():
        if kind == "ceilings" or (kind == "check" and not r.get("error")):
            continue
        label = f"{implementation} {variant}".strip()
        if r.get("error"):
            print(f"{name:14}{label:22}{'WRONG' if kind == 'check' else 'FAILED':>10}  {r['error']}")
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
