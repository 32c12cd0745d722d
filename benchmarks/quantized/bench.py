"""Quantized matmul on one Hopper GPU: is it right, then how fast, beside bfloat16 and XLA's own path.

    python benchmarks/quantized/bench.py                     # everything, under 150 seconds, one table last
    python benchmarks/quantized/bench.py --only "int4 g128"  # the works whose name holds a word
    python benchmarks/quantized/bench.py --json results.json

Needs a checkout and jax; torch is measured where it imports. Jobs run one after another in a child process that this
one watches: a job that hangs costs its time limit, not the run. A work that is not right is not timed. Times are what
the GPU's own profiler counts for all kernels of a call, the median of several. Calls with few rows go over several
weights in turn, which together are larger than the L2 cache: in a model, too, each weight is read from memory.
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

JOB_SECONDS = 45  # XLA's search for a float8 matmul takes 30


@dataclasses.dataclass(frozen=True)
class Work:
    M: int
    format: str = "int4"
    group: int | None = None
    activations: str | None = None
    scales: str = "bfloat16"
    N: int = 8192
    K: int = 8192

    @property
    def tiles(self) -> bool:
        """Whether scales are for tiles of 128 x 128."""
        return self.activations is not None and self.group is not None


FEW = (1, 8, 16, 64)
WORKS = (
    {f"int4 g128 M={M}": Work(M, group=128) for M in FEW}
    | {f"int8 M={M}": Work(M, "int8") for M in FEW[:3]}
    | {f"float8 M={M}": Work(M, "float8_e4m3fn") for M in FEW[:3]}
    | {f"int4 g32 f16 M={M}": Work(M, group=32, scales="float16") for M in (1, 16)}
    | {"float8 tiles": Work(8192, "float8_e4m3fn", 128, "float8_e4m3fn", "float32")}
    | {
        f"{name} channels": Work(8192, f, None, f, "float32")
        for name, f in (("float8", "float8_e4m3fn"), ("int8", "int8"))
    }
)

# Checked and not timed: every format, odd sizes.
CHECKS = {
    "uint4 g32": Work(5, "uint4", 32, None, "float16", 640, 1536),
    "int4 channels": Work(3, "int4", None, None, "bfloat16", 576, 1088),
    "int8 g128": Work(40, "int8", 128, None, "float32", 512, 2048),
    "float8_e5m2": Work(9, "float8_e5m2", 64, None, "float32", 640, 1536),
    "float4_e2m1fn g32": Work(9, "float4_e2m1fn", 32, None, "bfloat16", 640, 1536),
    "float8 tiles odd": Work(1000, "float8_e4m3fn", 128, "float8_e4m3fn", "float32", 640, 1280),
    "int8 channels odd": Work(1000, "int8", None, "int8", "float32", 704, 1280),
}


# In the child.


@functools.cache
def maker():
    import jax
    import jax.numpy as jnp

    from pallas_kernels import QuantizedArray, quantize_array

    @functools.partial(jax.jit, static_argnums=1)
    def weight(key, work: Work):
        w = jax.random.normal(key, (work.K, work.N), jnp.bfloat16)
        options = {"activations": work.activations, "scale_dtype": jnp.dtype(work.scales)}
        q = quantize_array(w, work.format, group=work.group, **options)  # pyright: ignore[reportArgumentType]
        if work.tiles:  # of 128 rows the first one's scales: any will do
            q = QuantizedArray(q.values, q.scales[::128], activations=q.activations)
        return q

    return weight


def arrays(work: Work, seed: int, count: int):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(seed), 2 * count)
    weights = [maker()(key, dataclasses.replace(work, M=0)) for key in keys[:count]]
    return [jax.random.normal(key, (work.M, work.K), jnp.bfloat16) for key in keys[count:]], weights


def check(work: Work) -> dict:
    """The largest difference to the float32 formula, relative to the largest output, and whether two runs agree."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import quantized_matmul

    (x,), (w,) = arrays(work, int.from_bytes(os.urandom(3), "little"), 1)
    run = lambda name: jax.jit(
        lambda x, w: quantized_matmul(x, w, implementation=name, preferred_element_type=jnp.float32)
    )
    got, again, want = run("mosaic_gpu")(x, w), run("mosaic_gpu")(x, w), run("reference")(x, w)
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    # Tensor cores sum products of float8 with 14 bits or so.
    limit = 2e-3 if work.activations == "float8_e4m3fn" else 1e-5
    wrong = [] if error < limit else [f"relative error {error:.2g} > {limit}"]
    if not bool(jnp.array_equal(got, again)):
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": error}


HELD: dict = {}


def held(work: Work, dense: bool):
    """Inputs of the last work, and as many weights as exceed the L2 cache threefold."""
    import jax
    import jax.numpy as jnp

    key = (dataclasses.replace(work, M=0), dense)
    count = 1 if work.M > 64 else 4 if dense else 8
    if key not in HELD:
        HELD.clear()
        if dense:
            keys = jax.random.split(jax.random.key(1), count)
            HELD[key] = [jax.random.normal(k, (work.K, work.N), jnp.bfloat16) for k in keys]
        else:
            HELD[key] = arrays(dataclasses.replace(work, M=8), 1, count)[1]
    keys = jax.random.split(jax.random.key(2), count)
    return [jax.random.normal(k, (work.M, work.K), jnp.bfloat16) for k in keys], HELD[key]


def timing(work: Work, implementation: str) -> dict:
    import jax
    import numpy as np
    from jax.experimental.mosaic.gpu import profiler

    from pallas_kernels import quantized_matmul

    xs, weights = held(work, implementation == "bf16")

    def calls(xs, weights):
        """One after another: XLA may not join their kernels."""
        outs: list[jax.Array] = []
        for x, w in zip(xs, weights, strict=True):
            if outs:
                x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))
            outs.append(x @ w if implementation == "bf16" else quantized_matmul(x, w, implementation=implementation))
        return outs

    start = time.perf_counter()
    compiled = jax.jit(calls).lower(xs, weights).compile()
    seconds = time.perf_counter() - start
    _, times = profiler.measure(compiled, iterations=5, aggregate=False)(xs, weights)
    assert times is not None
    us = float(np.median([sum(ms for _, ms in one) for one in times])) * 1e3 / len(xs)
    longest = {}
    for name, ms in times[0]:
        longest.setdefault(name, []).append(ms * 1e3)
    kernels = {name: round(float(np.median(t)), 1) for name, t in longest.items()}
    return {"us": us, "compile": seconds, "kernels": kernels}


def device() -> dict:
    """What the device is, and bytes read and written a second by a copy of 2 GiB."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental.mosaic.gpu import profiler

    x = jax.random.normal(jax.random.key(0), (2**29,), jnp.float32)
    _, times = profiler.measure(jax.jit(lambda x: x + 1), iterations=5)(x)
    assert times is not None
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "GB/s": 2 * 2**31 / np.median(times) / 1e6}


def child() -> None:
    """Jobs as lines of JSON in, results out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is not a result
    for line in sys.stdin:
        kind, name, implementation = json.loads(line)
        try:
            if kind == "device":
                result = device()
            elif kind == "check":
                result = check((WORKS | CHECKS)[name])
            else:
                result = timing(WORKS[name], implementation)
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
            command = [sys.executable, __file__, "--child"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
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
    """The device, checks, the kernels, then the peers."""
    yield "device", "", ""
    for name in [*WORKS, *CHECKS]:
        yield "check", name, "mosaic_gpu"
    for implementation in ("mosaic_gpu", "bf16", "xla"):
        for name in WORKS:
            yield "time", name, implementation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="run the works whose name holds this word")
    parser.add_argument("--seconds", type=float, default=150, help="start no job after this many seconds")
    parser.add_argument("--json", type=pathlib.Path, help="write all results to this file")
    args = parser.parse_args()
    if args.child:
        child()
        return
    start, worker, results = time.perf_counter(), Worker(), {}
    done: dict = {}  # bf16 does not depend on the format
    for job in jobs():
        kind, name, implementation = job
        left = args.seconds - (time.perf_counter() - start)
        if left < 3 or not (kind == "device" or args.only in name):
            continue
        if kind == "time" and results.get(("check", name, "mosaic_gpu"), {}).get("error"):
            continue
        key = (implementation, WORKS[name].M) if kind == "time" and implementation == "bf16" else job
        if key not in done:
            done[key] = worker.run(job, min(JOB_SECONDS, left))
        results[job] = done[key]
        print(f"{time.perf_counter() - start:6.1f} s  {' '.join(job):40} {results[job]}", file=sys.stderr, flush=True)
    worker.stop()
    if args.json:
        args.json.write_text(json.dumps([[*job, result] for job, result in results.items()], indent=1))
    print(results.get(("device", "", "")))
    print(f"{'work':22}{'error':>10}{'us':>9}{'TFLOP/s':>9}{'bf16 us':>9}{'xla us':>9}{'x bf16':>8}{'x xla':>7}")
    for name, work in (WORKS | CHECKS).items():
        checked = results.get(("check", name, "mosaic_gpu"), {})
        if not checked:
            continue
        us = [results.get(("time", name, i), {}).get("us", float("nan")) for i in ("mosaic_gpu", "bf16", "xla")]
        rate = 2e-6 * work.M * work.N * work.K / us[0]
        row = f"{name:22}{checked.get('worst', float('nan')):10.1e}{us[0]:9.1f}{rate:9.0f}{us[1]:9.1f}{us[2]:9.1f}"
        print(f"{row}{us[1] / us[0]:8.2f}{us[2] / us[0]:7.2f}  {checked.get('error', '')}")


if __name__ == "__main__":
    main()
