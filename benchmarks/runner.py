"""What the kernels' benchmarks share: jobs in a child process that is watched, times, errors, and compiling ahead.

A bench.py gives its jobs as tuples of words, (kind, work, implementation, variant), and a function that does one and
returns numbers. A job that raises, hangs or takes its process down is a row that says so, and the next one runs; the
exit status is 1 then. A peer that is not installed is "absent", which is no failure. Jobs of kind "check" come before
those that time the same thing: what is not right is not timed.

A compile_ahead.py gives calls, (name, function, arrays); a row for each kernel in them says what the compiler said.
"""

import argparse
import json
import os
import pathlib
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).parent
PEERS = ("torch", "tokamax")

# Jobs.


def parser(doc: str | None, seconds: float) -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    new.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    new.add_argument("--only", default="", help="run the jobs whose work, backend or variant holds this expression")
    new.add_argument("--seconds", type=float, default=seconds, help="start no job after this many seconds")
    new.add_argument("--json", type=pathlib.Path, help="write all results to this file")
    return new


def message(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).strip() or ' ').splitlines()[0][:200]}"


def attempt(do, job) -> dict:
    try:
        return do(tuple(job))
    except ModuleNotFoundError as e:
        return {"absent" if e.name in PEERS else "error": message(e)}
    except Exception as e:
        return {"error": message(e)}


def serve(do) -> int:
    """The child: jobs as lines of JSON in, results out."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is not a result
    for line in sys.stdin:
        print(json.dumps(attempt(do, json.loads(line))), file=out, flush=True)
    return 0


class Worker:
    """A child process; a fresh one after a job that did not answer in time or took the process down."""

    def __init__(self, script: str):
        self.script, self.process = script, None

    def run(self, job, seconds: float) -> dict:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, self.script, "--child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            )
            self.lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=self.read, args=(self.process, self.lines), daemon=True).start()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            if line := self.lines.get(timeout=seconds):
                return json.loads(line)
            why = f"the process ended with {self.process.wait(10)}"
        except BrokenPipeError:
            why = f"the process ended with {self.process.wait(10)}"
        except queue.Empty:
            why = f"no answer in {seconds:.0f} s"
        self.stop()
        return {"error": why}

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


def run(jobs, do, args, job_seconds: float, script: str | None) -> dict:
    """Results by job. script: the file whose `--child` serves them; None: this process does them itself."""
    start, results, late = time.perf_counter(), {}, 0
    worker = Worker(script) if script else None
    for job in jobs:
        kind, *rest = job
        if kind != "ceilings" and not re.search(args.only, " ".join(rest)):
            continue
        if kind == "time" and results.get(("check", *rest), {}).get("error"):
            continue
        left = args.seconds - (time.perf_counter() - start)
        if left < 5:
            late += 1
            continue
        results[job] = worker.run(job, min(job_seconds, left + 10)) if worker else attempt(do, job)
        print(f"[{time.perf_counter() - start:4.0f} s]", *job, results[job], flush=True)
    if worker:
        worker.stop()
    if late:
        print(f"{late} jobs were not started within --seconds {args.seconds:.0f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([[*job, result] for job, result in results.items()], indent=1))
    return results


def trouble(job, result) -> str:
    """What a table shows instead of numbers; empty for a job that went well."""
    if result.get("absent"):
        return f"absent  {result['absent']}"
    return f"{'WRONG' if job[0] == 'check' else 'FAILED':>10}  {result['error']}" if result.get("error") else ""


def status(results) -> int:
    """The exit status, and a line that names what failed."""
    failed = [" ".join(job).strip() for job, result in results.items() if result.get("error")]
    if failed:
        print(f"{len(failed)} of {len(results)} failed: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


# Numbers.


def measure(run, *args, rounds: int = 9, seconds: float = 0.05) -> tuple[float, float]:
    """(median milliseconds of a call, seconds that compiling took). A round is calls issued back to back, as many as
    take `seconds`, so that waiting for the last one costs nothing; on a CPU it is one call, since simulated devices
    stop where collectives of several calls meet."""
    import jax
    import numpy as np

    start = time.perf_counter()
    compiled = run if isinstance(run, jax.stages.Compiled) else jax.jit(run).lower(*args).compile()
    compiling = time.perf_counter() - start
    jax.block_until_ready(compiled(*args))
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    calls = int(np.clip(seconds / (time.perf_counter() - start), 2, 64)) if jax.default_backend() != "cpu" else 1
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = compiled(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return float(np.median(times)) * 1e3, compiling


def measure_torch(f, rounds: int = 9) -> float:
    """Median milliseconds of a call, by the device's clock; as many calls a round as `measure` issues, for under load a
    GPU soon meets its power limit and lowers its clock, which shorter rounds would not see."""
    import torch

    def elapsed(calls):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            f()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / calls

    elapsed(3)
    calls = min(max(int(50 / elapsed(1)), 2), 64)
    return sorted(elapsed(calls) for _ in range(rounds))[rounds // 2]


def profile(run, *args, iterations: int = 5) -> tuple[float, dict[str, list[float]]]:
    """By the GPU's own profiler: median microseconds of all kernels of a call; those of each launch, by kernel."""
    import numpy as np
    from jax.experimental.mosaic.gpu import profiler

    _, calls = profiler.measure(run, iterations=iterations, aggregate=False)(*args)
    assert calls is not None and iterations > 1
    kernels: dict[str, list[float]] = {}
    for name, ms in calls[0]:
        kernels.setdefault(name, []).append(ms * 1e3)
    return float(np.median([sum(ms for _, ms in call) for call in calls])) * 1e3, kernels


def errors(got, want) -> list[float]:
    """Relative errors of two trees' arrays, by norm."""
    import jax
    import jax.numpy as jnp

    wide = lambda x: jnp.asarray(x).astype(jnp.float32)
    norm = lambda x: float(jnp.sqrt(jnp.sum(jnp.square(x))))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return [norm(wide(a) - wide(b)) / max(norm(wide(b)), 1e-30) for a, b in pairs]


def same(got, again) -> bool:
    """Whether two runs agree bit by bit."""
    import jax
    import jax.numpy as jnp

    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(again), strict=True)
    return all(bool(jnp.array_equal(a, b)) for a, b in pairs)


def ceilings() -> dict:
    """Bytes read and written a second by a copy of 4 GiB, and the rate of a large matmul; on a CPU its name alone."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    result = {"device": device.device_kind, "jax": jax.__version__}
    if device.platform == "cpu":
        return result
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.float32)
    result["GB/s"] = 2 * 2**32 / measure(lambda x: x + 1, x)[0] / 1e6
    del x
    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    return result | {"TFLOP/s": 2 * 8192**3 / measure(lambda a: a @ a, a)[0] / 1e9}


# Compiling for hardware that is not here.

GPUS = {"h200": "attention/h200.txtpb", "a100": "triton/a100.txtpb", "l4": "triton/l4.txtpb"}
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def ask_compilers() -> None:
    """Makes ptxas report to what `compile_for` reads, for Mosaic and for Triton; comes before JAX is imported."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=3"}
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    # libtpu lets one process at a time own the chips; here are none, and several may compile.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def device(target: str):
    from jax.experimental import topologies

    if target in TPUS:
        return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]
    config = (HERE / GPUS[target]).read_text()
    return topologies.get_topology_desc(
        platform="cuda", topology_name=target, target_config=config, topology="1x1x1"
    ).devices[0]


def compile_for(target: str, f, arrays) -> str:
    """Compiles f of abstract arrays for one device; what the compilers printed."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array([device(target)]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arrays)
    with jax.set_mesh(mesh), tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            jax.jit(f).lower(*arrays).compile()
        finally:
            for fd, old in enumerate(kept, 1):
                os.dup2(old, fd)
                os.close(old)
            file.seek(0)
            printed = file.read().decode(errors="replace")
    return printed


def kernels(printed: str) -> list[tuple[str, int, int, list[str]]]:
    """(kernel, registers, bytes of them spilled, warnings) by ptxas' report. C7512 to C7514 say that tensor core
    instructions run one after another."""
    report = r"Compiling entry function '(\w+)' for '\w+'\s.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    suffix = "_mosaic_gpu_kernel"
    ours = f"\\w+{suffix}$|attention|ragged|quantized"  # and not XLA's fusions
    serial = set(re.findall(r"\((C751[234])\).*?function '(\w+)'", printed))
    found = dict.fromkeys(re.findall(report, printed, re.DOTALL))  # Mosaic and XLA both print Mosaic's
    return [
        (
            name.removesuffix(suffix),
            int(registers),
            int(spilled),
            sorted(code for code, where in serial if where == name),
        )
        for name, spilled, registers in found
        if re.match(ours, name)
    ]


def compile_ahead(doc: str | None, targets, calls, spill: int | None = 0) -> int:
    """Compiles `calls(target)` for each target and prints a table; the exit status is 1 where a kernel does not
    compile, is serialised, or spills more than `spill` bytes (None: however many)."""
    import jax

    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=list(targets), choices=list(targets))
    parser.add_argument("--only", default="", help="calls whose name holds this")
    args = parser.parse_args()
    failed = 0
    print(f"jax {jax.__version__}")
    print(f"{'target':8}{'call':26}{'kernel':26}{'registers':>10}{'spilled B':>11}{'most SMEM B':>13}  warnings")
    for target in args.targets:
        for name, f, arrays in calls(target):
            if args.only not in name:
                continue
            start = time.perf_counter()
            try:
                printed = compile_for(target, f, arrays)
                found = kernels(printed)
                assert found or target in TPUS, "no kernel is in the program"
            except Exception as e:
                failed += 1
                print(f"{target:8}{name:26}FAILED {type(e).__name__}: {str(e)[:1000]}", flush=True)
                continue
            smem = max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", printed)), default="")
            for kernel, registers, spilled, codes in found:
                failed += bool(codes) or (spill is not None and spilled > spill)
                print(
                    f"{target:8}{name:26}{kernel:26}{registers:>10}{spilled:>11}{smem:>13}  {' '.join(codes)}",
                    flush=True,
                )
            if not found:
                print(f"{target:8}{name:26}compiled in {time.perf_counter() - start:.1f} s", flush=True)
    return 1 if failed else 0
