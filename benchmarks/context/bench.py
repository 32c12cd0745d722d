"""Context parallelism on the GPUs of one host: is it right, and how much faster than one of them is it.

    python benchmarks/context/bench.py            # two GPUs, under nine minutes
    python benchmarks/context/bench.py --quick    # also on simulated CPU devices: does it run

First every strategy is compared with one device; nothing is timed if one differs. Then forward and backward of one
layer in bfloat16, N16 H128, causal, at T = 65,536 and 131,072, whole and packed with 64 documents, beside a plain ring
(contiguous rows, no transfers in flight) and all-gather; then `auto` against the fastest of all on twelve shapes. Times
are medians; a speed-up is the time of one device for the same rows over the time of all.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

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


def split_attention(strategy, layout, **masks):
    def body(q, k, v, *rows):
        extra = dict(zip(("positions", "segment_ids"), rows))
        return context.attention(q, k, v, strategy=strategy, layout=layout, **masks, **extra)

    return lambda *args: jax.shard_map(body, out_specs=SPEC)(*args)


def single_attention(**masks):
    def attend(q, k, v, *rows):
        return pallas_kernels.attention(q, k, v, **masks, **dict(zip(("positions", "segment_ids"), rows)))

    return attend


def arrays(T, N, K, H, dtype, rng):
    return [rng.normal(size=(1, T, n, H)).astype("f").astype(dtype) for n in (N, K, K, N)]


def median_seconds(fn, args, reps):
    out = jax.block_until_ready(fn(*args))
    jax.block_until_ready(fn(*args))
    times = []
    for _ in range(reps):
        start = time.perf_counter()
        jax.block_until_ready(fn(*args))
        times.append(time.perf_counter() - start)
    del out
    return float(np.median(times))


class Bench:
    def __init__(self, reps):
        self.devices = jax.devices()
        self.cp, self.reps = len(self.devices), reps
        self.mesh = Mesh(np.array(self.devices), ("cp",), axis_types=(AxisType.Explicit,))
        self.rng = np.random.default_rng(0)

    def alone(self, given, **masks):
        given = jax.device_put(given, self.devices[0])
        return jax.jit(value_and_grads(single_attention(**masks))), given

    def split(self, given, strategy, layout, overlap=True, rows=None, **masks):
        order = layout_order(layout, given[0].shape[1], self.cp, *(rows or ()))
        where = NamedSharding(self.mesh, SPEC)
        dealt = [jax.device_put(permute(np.asarray(x), order), where) for x in given]
        options = context.compiler_options(jax.default_backend()) if overlap else {}
        if not overlap and jax.default_backend() == "gpu":
            options = {"xla_gpu_enable_latency_hiding_scheduler": False}
        run = jax.jit(value_and_grads(split_attention(strategy, layout, **masks)), compiler_options=options)

        def call(*args):
            with jax.set_mesh(self.mesh):
                return run(*args)

        return call, dealt, order

    def check(self, T):
        """Every strategy against one device in float32, packed and not."""
        worst = 0.0
        for packed in (False, True):
            rows = rows_of(T, 8, self.rng) if packed else None
            given = arrays(T, 8, 4, 128, jnp.float32, self.rng) + list(rows or ())
            fn, args = self.alone(given, causal=True, implementation="xla")
            expected = jax.device_get(fn(*args))
            for strategy in STRATEGIES:
                layout = "packed" if packed else "zigzag"
                fn, args, order = self.split(given, strategy, layout, rows=rows, causal=True, implementation="xla")
                for a, b in zip(expected, jax.device_get(fn(*args))):
                    error = float(np.abs(restore(b, order) - a).max() / np.abs(a).max())
                    worst = max(worst, error)
                    assert error < 1e-5, f"{strategy}, packed={packed}: {error:.1e} off"
        return worst

    def speedups(self, T, N, H, documents):
        rows = rows_of(T, documents, self.rng) if documents else None
        given = arrays(T, N, N, H, jnp.bfloat16, self.rng) + list(rows or ())
        base = median_seconds(*self.alone(given, causal=True), self.reps)
        balanced = "packed" if documents else "zigzag"
        cases = [("plain ring", "ring", "contiguous", False)]
        cases += [(s, s, balanced, True) for s in STRATEGIES]
        yield T, documents, "one device", base, 1.0
        for name, strategy, layout, overlap in cases:
            fn, args, _ = self.split(given, strategy, layout, overlap, rows=rows, causal=True)
            seconds = median_seconds(fn, args, self.reps)
            yield T, documents, f"{name} ({layout})", seconds, base / seconds

    def auto(self, T, N, K, window):
        """The seconds of auto's choice over the best."""
        given = arrays(T, N, K, 128, jnp.bfloat16, self.rng)
        shape = context_cost.Shape(
            batch=1, seq_len=T, num_heads=N, num_kv_heads=K, head_dim=128, window=None if window is None else window - 1
        )
        choice = context_cost.choose(shape, self.cp)
        layouts = dict.fromkeys(STRATEGIES, "zigzag") | ({"halo": "contiguous"} if window else {})
        layouts[choice.strategy] = choice.layout
        seconds = {}
        for strategy, layout in layouts.items():
            fn, args, _ = self.split(given, strategy, layout, causal=True, window=window)
            seconds[strategy] = median_seconds(fn, args, self.reps)
        best = min(seconds, key=lambda s: seconds[s])
        return (
            choice.strategy,
            best,
            seconds[choice.strategy] / seconds[best],
            choice.seconds / seconds[choice.strategy],
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one repetition")
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    start = time.perf_counter()
    bench = Bench(1 if args.quick else args.reps)
    print(f"jax {jax.__version__}, {bench.cp} x {bench.devices[0].device_kind}", flush=True)
    if bench.cp < 2:
        sys.exit("context parallelism needs two devices; on CPU set XLA_FLAGS=--xla_force_host_platform_device_count=2")
    print(f"all strategies agree with one device, float32: {bench.check(256 if args.quick else 4096):.1e}", flush=True)

    lengths, N, H = ((512,), 4, 64) if args.quick else ((65536, 131072), 16, 128)
    table = []
    for T in lengths:
        for documents in (0, 8 if args.quick else 64):
            for row in bench.speedups(T, N, H, documents):
                table.append(row)
                print(row, flush=True)
    shapes = [(T, N, K, w) for T in (8192, 32768) for N, K in ((16, 16), (32, 8), (32, 2)) for w in (None, 1024)]
    grid = []
    for shape in [(512, 4, 2, None)] if args.quick else shapes:
        if time.perf_counter() - start > 480:
            print("out of time: the rest of the grid is left out", flush=True)
            break
        grid.append((shape, *bench.auto(*shape)))
        print(grid[-1], flush=True)

    print(f"\n{time.perf_counter() - start:.0f} s in all\n")
    print("| T | documents | | ms | times one device |\n|---|---|---|---|---|")
    for T, documents, name, seconds, speedup in table:
        print(f"| {T:,} | {documents or 1} | {name} | {seconds * 1e3:.2f} | {speedup:.2f} |")
    print("\n| T, N, K, window | auto | fastest | auto / fastest | estimate / measured |\n|---|---|---|---|---|")
    for shape, chosen, best, ratio, estimate in grid:
        print(f"| {shape} | {chosen} | {best} | {ratio:.3f} | {estimate:.2f} |")


if __name__ == "__main__":
    main()
