"""Context parallelism on the GPUs of one host: is it right, how much faster than one of them is it, what overlaps.

    python benchmarks/context/bench.py            # two GPUs, about three minutes; the parts compile side by side
    python benchmarks/context/bench.py --quick    # tiny shapes, also on simulated CPU devices: does it run
    python benchmarks/context/bench.py --part speedup --length 65536

Parts, each in a process of its own; a lock lets one at a time use the devices:
- check: every strategy against one device, in float32 and with the kernels.
- speedup: forward and backward of one layer in bfloat16, N16 H128, causal, whole and packed with 64 documents, beside a
  plain ring (contiguous rows, no transfers in flight). A speed-up is the time of one device for the same rows over the
  time of all.
- auto: the choice of `context_cost.choose` against the fastest of all, on sixteen shapes.
- profile: what runs beside what, from a trace of one ring.
- options: XLA's settings for transfers, each alone in a process, for it may not work at all.
Times are medians of calls that are waited for one by one; speedup and options add those of calls in a row of eight, as
steps follow each other, which spares each the start from an idle device.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share the devices

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from jaxscale.parallel import context, context_cost
from jaxscale.parallel.context_layout import layout_order, permute, restore

SPEC = P(None, "cp")
STRATEGIES = ("ring", "bidirectional", "ulysses", "all_gather")
LOCK = pathlib.Path(tempfile.gettempdir()) / "jaxscale-context-bench.lock"
WAIT = os.environ.get("CONTEXT_BENCH_WAIT")  # a folder, and how many processes leave a file there once they compiled
LIMIT = {"xla_gpu_experimental_parallel_collective_overlap_limit": 4}
OPTIONS = {
    "as it comes": {},
    "one at a time, no scheduler": {"xla_gpu_enable_latency_hiding_scheduler": False},
    "limit 4": LIMIT,
    "limit 4, as early as possible": LIMIT | {"xla_gpu_experimental_collective_start_as_early_as_possible": True},
    "limit 4, several streams": LIMIT | {"xla_gpu_experimental_enable_collective_multi_streaming": True},
    "limit 4, 4 channels": LIMIT | {"xla_gpu_nccl_p2p_max_nchannels": 4},
    "limit 4, 8 channels": LIMIT | {"xla_gpu_nccl_p2p_max_nchannels": 8},
    "limit 4, no command buffers": LIMIT | {"xla_gpu_enable_command_buffer": ""},
    "limit 4, memcpy": LIMIT | {"xla_gpu_use_memcpy_local_p2p": True},
    "limit 4, peer memory": LIMIT | {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"},
    "limit 4, symmetric memory": LIMIT | {"xla_gpu_collective_permute_mode": "COLLECTIVES_SYMMETRIC_MEMORY"},
}
SAFE = list(OPTIONS)[:8]  # these share a process


def rows_of(T, documents, rng):
    """Positions and segment ids [1, T] of random documents."""
    starts = np.concatenate([[0], np.sort(rng.choice(np.arange(1, T), documents - 1, replace=False))])
    ids = np.searchsorted(starts, np.arange(T), side="right").astype(np.int32)
    return (np.arange(T) - starts[ids - 1]).astype(np.int32)[None], ids[None]


def value_and_grads(attend):
    def run(q, k, v, dout, *rows):
        out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *rows), q, k, v)
        return out, *vjp(dout)

    return run


def mapped(attend, **options):
    """An attention of a device's own tokens, over the devices of the mesh in context."""

    def body(q, k, v, *rows):
        return attend(q, k, v, **options, **dict(zip(("positions", "segment_ids"), rows)))

    return lambda *args: jax.shard_map(body, out_specs=SPEC)(*args)


@contextlib.contextmanager
def alone(seconds):
    """The devices for this process alone, once all have compiled, which would disturb those that time. It dies
    if it has not let go of the devices after so many seconds."""
    if WAIT:
        where, count = WAIT.rsplit(":", 1)
        (pathlib.Path(where) / str(os.getpid())).touch()
        deadline = time.perf_counter() + 300
        while len(list(pathlib.Path(where).iterdir())) < int(count) and time.perf_counter() < deadline:
            time.sleep(0.1)
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        signal.alarm(seconds)
        try:
            yield
        finally:
            signal.alarm(0)


class Bench:
    def __init__(self, quick, reps, strategies):
        self.strategies = strategies
        self.devices = jax.devices()
        self.cp, self.quick, self.reps = len(self.devices), quick, 1 if quick else reps
        self.mesh = Mesh(np.array(self.devices), ("cp",), axis_types=(AxisType.Explicit,))
        self.one = Mesh(np.array(self.devices[:1]), ("cp",), axis_types=(AxisType.Explicit,))
        self.rng = np.random.default_rng(0)
        self.gpu = jax.default_backend() == "gpu"

    def shapes(self, T, N, K, H, dtype, rows, mesh):
        where = NamedSharding(mesh, SPEC)
        found = [jax.ShapeDtypeStruct((1, T, n, H), dtype, sharding=where) for n in (N, K, K, N)]
        return found + [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x in rows]

    def compile(self, fn, shapes, options=None):
        with jax.set_mesh(shapes[0].sharding.mesh):
            return jax.jit(fn).lower(*shapes).compile(compiler_options=options if self.gpu else None)

    def single(self, shapes, **masks):
        return self.compile(value_and_grads(mapped(pallas_kernels.attention, **masks)), shapes)

    def split(self, shapes, strategy, layout, options=None, **masks):
        options = context.compiler_options(jax.default_backend()) if options is None else options
        attend = mapped(context.attention, strategy=strategy, layout=layout, **masks)
        return self.compile(value_and_grads(attend), shapes, options)

    def compile_all(self, tasks):
        """The results of {name: (function, *arguments)}, compiled programs, several at a time."""
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            futures = {name: pool.submit(*task) for name, task in tasks.items()}
            return {name: future.result() for name, future in futures.items()}

    def put(self, arrays, mesh):
        return [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in arrays]

    def random(self, shapes, order=None):
        """Normal numbers, the same on every mesh, dealt in that order."""
        arrays = []
        for key, x in zip(jax.random.split(jax.random.key(0), 4), shapes):
            with jax.default_device(self.devices[0]):
                array = jax.random.normal(key, x.shape, x.dtype)
                array = array if order is None else jnp.take(array, order.reshape(-1), axis=1)
            arrays.append(jax.device_put(array, x.sharding))
        return arrays

    def error(self, expected, found, order):
        """Of out, dq, dk and dv the largest difference over the largest number."""
        worst = 0.0
        for pair in zip(expected, found):
            with jax.default_device(self.devices[0]):
                a, b = (jax.device_put(x, jax.sharding.SingleDeviceSharding(self.devices[0])) for x in pair)
                a = a if order is None else jnp.take(a, order.reshape(-1), axis=1)
                a, b = a.astype(jnp.float32), b.astype(jnp.float32)
                worst = max(worst, float(jnp.abs(a - b).max() / jnp.abs(a).max()))
        return worst

    def seconds(self, fn, args, mesh):
        times = []
        with jax.set_mesh(mesh):
            for _ in range(2 + self.reps):
                start = time.perf_counter()
                jax.block_until_ready(fn(*args))
                times.append(time.perf_counter() - start)
        return float(np.median(times[2:]))

    def in_a_row(self, fn, args, mesh, calls=8):
        """The seconds of a call, of which so many are issued before the last one is waited for."""
        times = []
        with jax.set_mesh(mesh):
            for _ in range(1 + self.reps // 3):
                start = time.perf_counter()
                found = [fn(*args) for _ in range(calls)]
                jax.block_until_ready(found[-1])
                times.append((time.perf_counter() - start) / calls)
                del found
        return float(np.median(times[1:] or times))

    def check(self):
        """Every strategy against one device, packed and not: in float32, and with the kernels in bfloat16."""
        kinds: list[Any] = [(jnp.float32, "xla", 512 if self.quick else 2048, 1e-5)]
        if self.gpu:
            kinds.append((jnp.bfloat16, None, 8192, 2e-2))
        for dtype, implementation, T, tolerance in kinds:
            tasks, rows = {}, rows_of(T, 8, self.rng)
            masks = {"causal": True, "implementation": implementation}
            cases = [(s, "packed" if p else "zigzag", p, None) for p in (False, True) for s in STRATEGIES]
            cases += [("halo", "contiguous", p, T // 5) for p in (False, True)]
            for case in cases:
                strategy, layout, packed, window = case
                given = rows if packed else ()
                base = (packed, window)
                masks = {"causal": True, "implementation": implementation, "window": window}
                if base not in tasks:
                    shapes = self.shapes(T, 8, 4, 128, dtype, given, self.one)
                    tasks[base] = (functools.partial(self.single, **masks), shapes)
                shapes = self.shapes(T, 8, 4, 128, dtype, given, self.mesh)
                tasks[case] = (functools.partial(self.split, **masks), shapes, strategy, layout)
            with jax.default_matmul_precision("highest"):
                compiled = self.compile_all(tasks)
            arrays = [np.asarray(self.rng.normal(size=(1, T, n, 128)), dtype) for n in (8, 4, 4, 8)]
            worst, expected = {}, {}
            with alone(120):
                for case in cases:
                    strategy, packed, window = case[0], *case[2:]
                    layout: Any = case[1]
                    given = arrays + list(rows if packed else ())
                    if (base := (packed, window)) not in expected:
                        expected[base] = jax.device_get(compiled[base](*self.put(given, self.one)))
                    order = layout_order(layout, T, self.cp, *rows)
                    with jax.set_mesh(self.mesh):
                        found = jax.device_get(compiled[case](*self.put([permute(x, order) for x in given], self.mesh)))
                    for a, b in zip(expected[base], found):
                        a, b = (np.asarray(x, np.float32) for x in (a, restore(b, order)))
                        error = float(np.abs(a - b).max() / np.abs(a).max())
                        worst[strategy] = max(worst.get(strategy, 0.0), error)
                        assert error < tolerance, f"{case} in {dtype.__name__}: {error:.1e} off"
            text = ", ".join(f"{s} {e:.1e}" for s, e in worst.items())
            print(f"agrees with one device, {dtype.__name__}, {implementation or 'kernels'}, T {T}: {text}", flush=True)

    def speedup(self, T, documents):
        N, H = (4, 64) if self.quick else (16, 128)
        rows = rows_of(T, documents, self.rng) if documents else ()
        balanced = "packed" if documents else "zigzag"
        plain = {"xla_gpu_enable_latency_hiding_scheduler": False}
        shapes = {mesh: self.shapes(T, N, N, H, jnp.bfloat16, rows, mesh) for mesh in (self.one, self.mesh)}
        split = functools.partial(self.split, causal=True)
        tasks: dict[str, Any] = {"one device": (functools.partial(self.single, causal=True), shapes[self.one])}
        tasks["plain ring (contiguous)"] = (split, shapes[self.mesh], "ring", "contiguous", plain)
        tasks |= {f"{s} ({balanced})": (split, shapes[self.mesh], s, balanced) for s in STRATEGIES}
        if documents and "striped" in self.strategies:
            tasks |= {f"{s} (striped)": (split, shapes[self.mesh], s, "striped") for s in ("ring", "ulysses")}
        tasks = {name: task for name, task in tasks.items() if name.split(" (")[0] in ("one device", *self.strategies)}
        compiled = self.compile_all(tasks)
        base = expected = None
        with alone(120):
            for name in tasks:
                mesh = self.one if name == "one device" else self.mesh
                layout: Any = "contiguous" if mesh is self.one else name.rpartition("(")[2][:-1]
                order = layout_order(layout, T, self.cp, *rows)
                arrays = self.random(shapes[mesh][:4], order) + self.put([permute(x, order) for x in rows], mesh)
                with jax.set_mesh(mesh):
                    found = compiled[name](*arrays)
                expected = expected or found
                error = self.error(expected, found, order)
                del found
                seconds = self.seconds(compiled[name], arrays, mesh)
                row = self.in_a_row(compiled[name], arrays, mesh)
                base = base or (seconds, row)
                text = " | ".join(f"{x * 1e3:.2f} | {one / x:.3f}" for one, x in zip(base, (seconds, row)))
                print(f"| {T:,} | {documents or 1} | {name} | {text} | {error:.1e} |", flush=True)
                del arrays

    def auto(self, shapes):
        """The seconds of auto's choice over the best, and every strategy's, measured and estimated."""
        tasks = {}
        for shape in shapes:
            T, N, K, window = shape
            given = self.shapes(T, N, K, 128, jnp.bfloat16, (), self.mesh)
            choice = self.choice(*shape)
            rivals = {("ring", "zigzag"), ("all_gather", "zigzag"), ("ulysses", "contiguous"), choice[:2]}
            if window:
                rivals |= {("ring", "contiguous"), ("all_gather", "contiguous"), ("halo", "contiguous")}
            elif K == N:  # with fewer kv heads, on two devices, the same program as ring
                rivals |= {("bidirectional", "zigzag")}
            for strategy, layout in sorted(rivals):
                task = functools.partial(self.split, causal=True, window=window), given, strategy, layout
                tasks[shape, strategy, layout] = task
        compiled = self.compile_all(tasks)
        with alone(120):
            for shape in shapes:
                T, N, K, _ = shape
                arrays = self.random(self.shapes(T, N, K, 128, jnp.bfloat16, (), self.mesh))
                found = {
                    (s, layout): self.seconds(fn, arrays, self.mesh)
                    for (other, s, layout), fn in compiled.items()
                    if other == shape
                }
                choice, best = self.choice(*shape), min(found, key=lambda x: found[x])
                ratio = found[choice.strategy, choice.layout] / found[best]
                each = ", ".join(
                    f"{s} {layout} {x * 1e3:.3f} ({self.estimate(shape, s, layout) * 1e3:.2f})"
                    for (s, layout), x in found.items()
                )
                print(f"| {shape} | {choice.strategy} | {best[0]} | {ratio:.3f} | {each} |", flush=True)
                del arrays

    def shape_of(self, T, N, K, window):
        window = None if window is None else window - 1
        return context_cost.Shape(batch=1, seq_len=T, num_heads=N, num_kv_heads=K, head_dim=128, window=window)

    def choice(self, *shape):
        return context_cost.choose(self.shape_of(*shape), self.cp)

    def estimate(self, shape, strategy, layout):
        cost = context_cost.estimate(self.shape_of(*shape), self.cp, strategy, layout, context_cost.device_rates())
        return cost.seconds if cost else float("nan")

    def options(self, names, T, documents):
        N, H = (4, 64) if self.quick else (16, 128)
        rows = rows_of(T, documents, self.rng) if documents else ()
        layout: Any = "packed" if documents else "zigzag"
        order = layout_order(layout, T, self.cp, *rows)
        shapes = self.shapes(T, N, N, H, jnp.bfloat16, rows, self.mesh)
        attend = mapped(context.attention, strategy="ring", layout=layout, causal=True)
        with jax.set_mesh(self.mesh):
            lowered = jax.jit(value_and_grads(attend)).lower(*shapes)
        compiled = self.compile_all({name: (lowered.compile, OPTIONS[name] if self.gpu else None) for name in names})
        with alone(40):
            arrays = self.random(shapes[:4]) + self.put([permute(x, order) for x in rows], self.mesh)
            first = None
            for name in names:
                with jax.set_mesh(self.mesh):
                    found = compiled[name](*arrays)
                found = [np.asarray(x.addressable_shards[0].data[0, ::997], np.float32) for x in found]
                first = first or found
                off = max(np.abs(x - y).max() for x, y in zip(found, first))
                seconds = self.seconds(compiled[name], arrays, self.mesh)
                print(
                    f"| ring, {layout}, T {T:,}: {name} | {seconds * 1e3:.2f} ms | differs by {off:.1e} |", flush=True
                )

    def profile(self, T, options, documents):
        N, H = (4, 64) if self.quick else (16, 128)
        rows = rows_of(T, documents, self.rng) if documents else ()
        layout: Any = "packed" if documents else "zigzag"
        shapes = self.shapes(T, N, N, H, jnp.bfloat16, rows, self.mesh)
        run = self.split(shapes, "ring", layout, OPTIONS[options] if options else None, causal=True)
        with alone(60), tempfile.TemporaryDirectory() as where:
            order = layout_order(layout, T, self.cp, *rows)
            arrays = self.random(shapes[:4]) + self.put([permute(x, order) for x in rows], self.mesh)
            self.seconds(run, arrays, self.mesh)
            with jax.set_mesh(self.mesh), jax.profiler.trace(where):
                jax.block_until_ready(run(*arrays))
            (path,) = pathlib.Path(where).rglob("*.xplane.pb")
            print(timeline(path), flush=True)


def timeline(path, shortest=20e-6):
    """From a trace: the first device's events of `shortest` seconds and more, by stream; then where each device's time
    went: attention, transfers, how much of them ran beside attention, other kernels by name, and nothing at all."""
    lines = ["start ms | end ms | stream | what"]
    planes = [p for p in jax.profiler.ProfileData.from_file(str(path)).planes if "device:GPU:" in p.name]
    for number, plane in enumerate(sorted(planes, key=lambda p: p.name)):
        streams = [line for line in plane.lines if "Stream" in line.name]
        events = [(e.start_ns, e.start_ns + e.duration_ns, line.name, e.name) for line in streams for e in line.events]
        if not events:
            continue
        origin, end = min(e[0] for e in events), max(e[1] for e in events)
        for start, stop, stream, name in sorted(events) if number == 0 else ():
            if stop - start >= shortest * 1e9:
                lines.append(f"{(start - origin) / 1e6:.3f} | {(stop - origin) / 1e6:.3f} | {stream} | {name[:70]}")
        kinds = collections.defaultdict(list)
        for event in events:
            kinds[kind_of(event[3])].append(event)
        both = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in kinds["transfers"] for b in kinds["attention"])
        idle, at = 0, origin
        for start, stop, *_ in sorted(events):
            idle, at = idle + max(0, start - at), max(at, stop)
        spent = {kind: (sum(e[1] - e[0] for e in found) / 1e6, len(found)) for kind, found in kinds.items()}
        lines.append(f"{plane.name}: {(end - origin) / 1e6:.2f} ms from first to last event, idle {idle / 1e6:.2f}")
        lines.append(f"  transfers beside attention {both / 1e6:.2f} ms")
        longest = sorted(spent.items(), key=lambda x: -x[1][0])
        lines += [f"  {kind}: {ms:.3f} ms, {count} events" for kind, (ms, count) in longest]
    return "\n".join(lines) if lines[1:] else "the trace holds no streams of a GPU"


def kind_of(name):
    """Attention, a transfer, or the kind of fusion, without its number."""
    if "attention" in name.lower():
        return "attention"
    if any(word in name.lower() for word in ("nccl", "sendrecv", "p2p")):
        return "transfers"
    return re.sub(r"[_.]\d+$", "", name)[:50]


GRID = [(T, N, K, w) for T in (8192, 32768) for N, K in ((16, 16), (32, 8), (32, 2)) for w in (None, 1024)]
GRID += [(16384, 32, 4, None), (16384, 32, 8, 4096)]
GRID += [(16384, 24, 8, None), (32768, 16, 4, 2048)]  # the estimate was settled before these were timed


def parts_of(quick):
    """The arguments of each process, in two waves: the second may hang or die."""
    lengths, documents = ((512,), 8) if quick else ((65536, 131072), 64)
    grid = range(1) if quick else range(0, len(GRID), 2)
    first = [["check"]]
    first += [["speedup", "--length", str(T), "--documents", str(d)] for T in lengths for d in (0, documents)]
    first += [["auto", "--shapes", str(i), str(i + 1)] for i in grid]
    first += [["profile", "--length", str(lengths[0])], ["options", "--length", str(lengths[0])]]
    risky = [["options", "--length", str(lengths[0]), "--option", name] for name in OPTIONS if name not in SAFE]
    return first, [] if quick else risky


def orchestrate(args):
    """Runs all parts; prints the output of each as it is complete."""
    start = time.perf_counter()

    def run(part, environment):
        command = [sys.executable, __file__, "--reps", str(args.reps), "--part", *part, *["--quick"] * args.quick]
        left = max(1.0, start + args.budget - time.perf_counter())
        try:
            done = subprocess.run(
                command, env=environment, text=True, timeout=left, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        except subprocess.TimeoutExpired as late:
            return f"out of time: {late.output!r}"[-2000:]
        return done.stdout if done.returncode == 0 else f"failed, {done.returncode}: {done.stdout[-2000:]}"

    for wave in parts_of(args.quick):
        with tempfile.TemporaryDirectory() as where, concurrent.futures.ThreadPoolExecutor(len(wave) or 1) as pool:
            environment = os.environ | {"CONTEXT_BENCH_WAIT": f"{where}:{len(wave)}"}
            running = {pool.submit(run, part, environment): part for part in wave}
            for future in concurrent.futures.as_completed(running):
                print(f"\n## {' '.join(running[future])}, at {time.perf_counter() - start:.0f} s")
                print(future.result(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one repetition")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--part", choices=("check", "speedup", "auto", "profile", "options"))
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--documents", type=int, default=0)
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(GRID)), help="which of the grid of auto")
    parser.add_argument(
        "--strategies", nargs="*", default=("plain ring", *STRATEGIES, "striped"), help="those that speedup times"
    )
    parser.add_argument("--option", choices=OPTIONS, nargs="*", help="those that options times; profile takes one")
    parser.add_argument("--budget", type=float, default=230, help="seconds for all parts together")
    args = parser.parse_args()
    if args.part is None:
        return orchestrate(args)
    bench = Bench(args.quick, args.reps, args.strategies)
    if bench.cp < 2:
        sys.exit("context parallelism needs two devices; on CPU set XLA_FLAGS=--xla_force_host_platform_device_count=2")
    if args.part == "check":
        print(f"jax {jax.__version__}, {bench.cp} x {bench.devices[0].device_kind}", flush=True)
        bench.check()
    elif args.part == "speedup":
        bench.speedup(args.length, args.documents)
    elif args.part == "auto":
        bench.auto([(512, 4, 2, None)] if args.quick else [GRID[i] for i in args.shapes])
    elif args.part == "profile":
        bench.profile(args.length, *(args.option or [None]), args.documents)
    else:
        bench.options(args.option or (SAFE[:1] if args.quick else SAFE), args.length, args.documents)


if __name__ == "__main__":
    main()
