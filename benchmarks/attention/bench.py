"""Attention on one GPU: is it right, then how fast, beside cuDNN, tokamax and torch.

    python benchmarks/attention/bench.py                  # everything, under nine minutes, one table last
    python benchmarks/attention/bench.py --only h128      # the jobs whose name holds a word
    python benchmarks/attention/bench.py --seconds 120

Needs a checkout and jax; tokamax and torch are measured where they import. Jobs run one after another in a child
process that this one watches: a job that hangs (a deadlock in a new configuration) costs its time limit, not the run. A
variant that is not right is not timed. Times are medians of rounds of calls issued back to back; inputs are random and
several times the L2. TFLOP/s count the pairs of positions that see each other, and 2.5 times the forward's work for a
backward.
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

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

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
    "dq128": {"block_kv_dq": 128},
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


def make(work: Work, implementation: str, variant: str):
    """The function q, k, v -> o."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    if implementation == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, is_causal=work.causal, implementation="cudnn")
    if implementation == "tokamax":
        import tokamax

        return functools.partial(tokamax.dot_product_attention, is_causal=work.causal)

    import importlib

    gpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu")
    from pallas_kernels import attention

    base = TUNED.setdefault("tuned", gpu.tuned)(work.H, work.Hv)
    gpu.tuned = lambda H, Hv: dataclasses.replace(base, **VARIANTS[variant])
    ids = None
    if work.documents:
        row = np.repeat(np.arange(1, work.documents + 1), lengths(work)).astype(np.int32)
        ids = jnp.asarray(np.broadcast_to(row, (work.B, work.T)))
    return functools.partial(
        attention, causal=work.causal, window=work.window, segment_ids=ids, implementation=implementation
    )


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
    import numpy as np

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
        got = jax.tree.leaves(run(*x))
        again = jax.tree.leaves(run(*x))
        same = all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again))
        norm = lambda a: float(np.linalg.norm(np.asarray(a, np.float64)))
        pairs = zip(got, jax.tree.leaves(exact))
        return [norm(a.astype(jnp.float32) - b) / norm(b) for a, b in pairs], same

    ours, same = errors(make(small, implementation, variant))
    bound = [1e-2] * 4
    if not (work.documents or work.window) and work.H == work.Hv <= 128:
        bound = [min(1e-2, 1.5 * e) for e in errors(make(small, "cudnn", "tuned"))[0]]
    wrong = [f"{n} {e:.4f} > {b:.4f}" for n, e, b in zip(("o", "dq", "dk", "dv"), ours, bound) if not e <= b]
    if not same:
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": max(ours), "seed": seed}


def measure(run, args) -> tuple[float, float]:
    """Median milliseconds of one call, and the seconds that compiling took."""
    import jax
    import numpy as np

    start = time.perf_counter()
    compiled = jax.jit(run).lower(*args).compile()
    seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        out = [compiled(*args) for _ in range(16)]
        jax.block_until_ready(out[-1])
        times.append((time.perf_counter() - start) / 16)
        del out
    return float(np.median(times)) * 1e3, seconds


def timing(work: Work, implementation: str, variant: str) -> dict:
    f = make(work, implementation, variant)
    q, k, v, do = arrays(work, 0)
    forward, compile_forward = measure(f, (q, k, v))
    both, compile_both = measure(with_backward(f), (q, k, v, do))
    return {"fwd": forward, "both": both, "compile": compile_forward + compile_both}


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

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            forward = median(lambda: attend(q, k, v))
        both = median(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), do))
    return {"fwd": forward, "both": both, "compile": 0.0}


def copy_bandwidth() -> dict:
    """Bytes read and written a second by a copy of 4 GiB, and the rate of a large matmul."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    ms, _ = measure(lambda x: x + 1, (x,))
    del x
    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    matmul, _ = measure(lambda a: a @ a, (a,))
    device = jax.devices()[0]
    return {
        "GB/s": 2 * 2**32 / ms / 1e6,
        "matmul": 2 * 8192**3 / matmul / 1e9,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def child() -> None:
    """Jobs as lines of JSON in, results out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is not a result
    for line in sys.stdin:
        kind, name, implementation, variant = json.loads(line)
        try:
            if kind == "ceilings":
                result = copy_bandwidth()
            elif kind == "check":
                result = check(WORKS[name], implementation, variant)
            elif implementation == "torch":
                result = torch_timing(WORKS[name])
            else:
                result = timing(WORKS[name], implementation, variant)
        except Exception as e:
            result = {"error": f"{type(e).__name__}: {str(e).strip().splitlines()[0][:160] if str(e).strip() else ''}"}
        print(json.dumps(result), file=out, flush=True)


# In the parent.


class Worker:
    """A child process; a fresh one after a job that did not answer in time or took the process down."""

    def __init__(self):
        self.process = None

    def run(self, job, seconds: float) -> dict:
        if self.process is None:
            environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
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
        if not line:
            code = self.process.poll()
            self.stop()
            return {"error": f"no answer in {seconds:.0f} s" if code is None else f"the process ended with {code}"}
        return json.loads(line)

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


def jobs():
    """Checks first; then the tuned kernels and their peers on every work, the most wanted first; then the variants."""
    yield "ceilings", "", "", ""
    for name in WORKS:
        yield "check", name, "mosaic_gpu", "tuned"
    for name in WORKS:
        yield "time", name, "mosaic_gpu", "tuned"
        if not (WORKS[name].documents or WORKS[name].window):
            yield "time", name, "cudnn", ""
    for peer in ("torch", "tokamax"):
        for name in list(WORKS)[:5]:
            yield "time", name, peer, ""
    for name in SWEPT:
        for variant in list(VARIANTS)[1:]:
            yield "check", name, "mosaic_gpu", variant
            yield "time", name, "mosaic_gpu", variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="run the jobs whose work, backend or variant holds this word")
    parser.add_argument("--seconds", type=float, default=510, help="start no job after this many seconds")
    args = parser.parse_args()
    if args.child:
        child()
        return
    start, worker, results = time.perf_counter(), Worker(), {}
    for job in jobs():
        kind, name, implementation, variant = job
        left = args.seconds - (time.perf_counter() - start)
        if left < 5 or not (kind == "ceilings" or args.only in f"{name} {implementation} {variant}"):
            continue
        if kind == "time" and results.get(("check", *job[1:]), {}).get("error"):
            continue
        if implementation == "tokamax" and any("No module" in r.get("error", "") for r in results.values()):
            continue
        results[job] = worker.run(job, min(JOB_SECONDS, left + 25))
        print(f"[{time.perf_counter() - start:4.0f} s]", *job, results[job], flush=True)
    worker.stop()
    print_table(results)


def print_table(results) -> None:
    ceilings = results.get(("ceilings", "", "", ""), {})
    print(f"\n{json.dumps(ceilings)}")
    print(
        f"{'work':20}{'backend':24}{'worst err':>10}{'fwd ms':>9}{'TFLOP/s':>9}{'f+b ms':>9}{'TFLOP/s':>9}"
        "  cuDNN's time over this: fwd, f+b"
    )
    rates = {}
    for (kind, name, implementation, variant), r in results.items():
        if kind == "ceilings" or (kind == "check" and not r.get("error")):
            continue
        label = implementation if not variant else f"{implementation} {variant}"
        if r.get("error"):
            print(f"{name:20}{label:24}{'WRONG' if kind == 'check' else 'FAILED':>10}  {r['error']}")
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
            f"{r['fwd']:9.3f}{rate[0]:9.0f}{r['both']:9.3f}{rate[1]:9.0f}  {ratio}"
        )


if __name__ == "__main__":
    main()
