"""Quantized matmul on one Hopper GPU: is it right, then how fast, beside bfloat16 and XLA's own path.

    python benchmarks/quantized/bench.py                     # everything, under 150 seconds, one table last
    python benchmarks/quantized/bench.py --only "int4|8 M=1"  # the works whose name holds this
    python benchmarks/quantized/bench.py --json results.json

Needs a checkout and jax; torch is measured where it imports. Jobs run one after another in a child process that this
one watches: a job that hangs costs its time limit, not the run. A work that is not right is not timed. Times are what
the GPU's own profiler counts for all kernels of a call, the median of several. Calls with few rows go over several
weights in turn, which together are larger than the L2 cache: in a model, too, each weight is read from memory.
"""

import dataclasses
import functools
import os
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

JOB_SECONDS = 45  # XLA's search for a float8 matmul takes 30


F8 = "float8_e4m3fn"


@dataclasses.dataclass(frozen=True)
class Work:
    M: int
    format: str = "int4"
    group: int | None = None
    activations: str | None = None
    scales: str = "bfloat16"
    N: int = 8192
    K: int = 8192
    G: int = 0  # matrices; 0: one for all rows
    routing: str = "even"  # even; random; zipf: the g-th group in proportion to 1 / g
    rounded: bool = False  # x is, before the call
    top_k: int = 0  # x is M / top_k tokens, rounded where the weight asks for it, then spread to so many rows each

    @property
    def tiles(self) -> bool:
        """Whether scales are for tiles of 128 x 128."""
        return self.activations == F8 and self.group is not None

    @property
    def few(self) -> bool:
        """Whether the weights are what takes the time."""
        return 64 * max(self.G, 1) >= self.M


EXPERTS: dict[str, Any] = {"N": 1408, "K": 2048, "G": 64}
DECODE: dict[str, Any] = {"N": 768, "K": 2048, "G": 128, "routing": "random"}  # 64 tokens, 8 of 128 experts each

FEW = (1, 8, 16, 64)
WORKS = (
    {f"int4 g128 M={M}": Work(M, group=128) for M in FEW}
    | {f"int8 M={M}": Work(M, "int8") for M in (*FEW[:3], 32, 64)}
    | {f"float8 M={M}": Work(M, F8) for M in FEW[:3]}
    | {f"int4 g32 f16 M={M}": Work(M, group=32, scales="float16") for M in (1, 16)}
    | {"float8 tiles": Work(8192, F8, 128, F8, "float32")}
    | {f"{name} channels": Work(8192, f, None, f, "float32") for name, f in (("float8", F8), ("int8", "int8"))}
    | {
        "64 groups float8 tiles": Work(32768, F8, 128, F8, "float32", **EXPERTS),
        "64 groups float8": Work(32768, F8, None, F8, "float32", **EXPERTS),
        "64 groups int8": Work(32768, "int8", None, "int8", "float32", **EXPERTS),
        "64 uneven float8": Work(32768, F8, None, F8, "float32", routing="zipf", **EXPERTS),
    }
    | {
        f"{what} {name}": Work(32768, F8, group, F8, "float32", routing=routing, **more, **EXPERTS)
        for what, more in (("rounded", {"rounded": True}), ("tokens", {"top_k": 8}))
        for name, group, routing in (("tiles", 128, "even"), ("tiles uneven", 128, "zipf"), ("channels", None, "even"))
    }
    | {
        "decode int4 g128": Work(512, group=128, **DECODE),
        "decode int8": Work(512, "int8", **DECODE),
        "decode float8 tiles": Work(512, F8, 128, F8, "float32", **DECODE),
        "64 rows each int4": Work(8192, group=128, **DECODE),
    }
)

# Checked and not timed: every format, odd sizes.
CHECKS = {
    "uint4 g32": Work(5, "uint4", 32, None, "float16", 640, 1536),
    "int4 channels": Work(3, "int4", None, None, "bfloat16", 576, 1088),
    "int8 g128": Work(40, "int8", 128, None, "float32", 512, 2048),
    "float8_e5m2": Work(9, "float8_e5m2", 64, None, "float32", 640, 1536),
    "float4_e2m1fn g32": Work(9, "float4_e2m1fn", 32, None, "bfloat16", 640, 1536),
    "float8 tiles odd": Work(1000, F8, 128, F8, "float32", 640, 1280),
    "int8 channels odd": Work(1000, "int8", None, "int8", "float32", 704, 1280),
    "groups float8 tiles odd": Work(1000, F8, 128, F8, "float32", 640, 1280, 7, "zipf"),
    "tokens float8 odd": Work(1002, F8, None, F8, "float32", 640, 1280, 7, "zipf", top_k=6),
    "groups int4 g32 odd": Work(100, "int4", 32, None, "float16", 584, 1088, 7, "zipf"),
    "groups float4 odd": Work(300, "float4_e2m1fn", 64, None, "float32", 640, 1536, 9, "random"),
}


# In the child.


def group_sizes(work: Work):
    """int32 [G], the same in each run: the benchmark compares times. A compiled call takes it, lest XLA know it."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(7)
    if work.routing == "random":
        return jnp.asarray(np.bincount(rng.integers(work.G, size=work.M), minlength=work.G), jnp.int32)
    share = rng.permutation(1 / np.arange(1, work.G + 1)) if work.routing == "zipf" else np.ones(work.G)
    return jnp.asarray(np.diff(np.round(np.cumsum(share) / share.sum() * work.M), prepend=0), jnp.int32)


def routed(work: Work):
    """What the function of `multiply` takes last: sizes, and where tokens are spread each one's rows, in any order."""
    import jax.numpy as jnp
    import numpy as np

    if not work.top_k:
        return group_sizes(work)
    pair = np.random.default_rng(8).permutation(work.M)
    place = np.empty_like(pair)
    place[pair] = np.arange(work.M)
    token, place = pair // work.top_k, place.reshape(-1, work.top_k)
    return group_sizes(work), jnp.asarray(token, jnp.int32), jnp.asarray(place, jnp.int32)


def rows(key, work: Work):
    """x, in bfloat16."""
    import jax
    import jax.numpy as jnp

    return jax.random.normal(key, (work.M // max(work.top_k, 1), work.K), jnp.bfloat16)


def round_for(work: Work, x):
    from pallas_kernels import quantize_rows

    return quantize_rows(x, work.K // work.group if work.group else 1, work.activations)  # pyright: ignore


def bytes_read(work: Work) -> float:
    """The weights' values."""
    bits = 4 if work.format in ("int4", "uint4", "float4_e2m1fn") else 8
    return max(work.G, 1) * work.N * work.K * bits / 8


def multiply(work: Work, implementation: str | None, dtype=None):
    """The function x, w, `routed` -> x @ w of quantized_matmul, or of ragged_dot where there are groups."""
    import jax

    from pallas_kernels import quantized_matmul, ragged_dot, spread_rows

    options = {"implementation": implementation, "preferred_element_type": dtype}

    def spread(x, w, routed):
        sizes, token, place = routed
        x = round_for(work, x) if work.activations else x
        return ragged_dot(jax.tree.map(lambda a: spread_rows(a, token, place), x), w, sizes, **options)

    if work.top_k:
        return spread
    if work.G:
        return lambda x, w, sizes: ragged_dot(x, w, sizes, **options)
    return lambda x, w, sizes: quantized_matmul(x, w, **options)


@functools.cache
def maker():
    import jax
    import jax.numpy as jnp

    from pallas_kernels import quantize_array

    @functools.partial(jax.jit, static_argnums=1)
    def weight(key, work: Work):
        w = jax.random.normal(key, (work.G, work.K, work.N) if work.G else (work.K, work.N), jnp.bfloat16)
        options = {"activations": work.activations, "scale_dtype": jnp.dtype(work.scales)}
        q = quantize_array(w, work.format, group=work.group, **options)  # pyright: ignore[reportArgumentType]
        # Tiles: of 128 rows the first one's scales, any will do.
        return dataclasses.replace(q, scales=q.scales[..., ::128, :]) if work.tiles else q

    return weight


def arrays(work: Work, seed: int, count: int):
    import jax

    keys = jax.random.split(jax.random.key(seed), 2 * count)
    weights = [maker()(key, dataclasses.replace(work, M=0)) for key in keys[:count]]
    return [rows(key, work) for key in keys[count:]], weights


def check(work: Work) -> dict:
    """The largest difference to the float32 formula, relative to the largest output, and whether two runs agree."""
    import jax
    import jax.numpy as jnp

    (x,), (w,) = arrays(work, int.from_bytes(os.urandom(3), "little"), 1)
    w = laid_out(w, work)
    run = lambda name: jax.jit(multiply(work, name, jnp.float32))
    where, ours = routed(work), run("mosaic_gpu")
    given = round_for(work, x) if work.rounded else x
    got, again = ours(given, w, where), ours(given, w, where)
    with jax.default_matmul_precision("highest"):  # the reference has a step for each matrix: minutes to compile
        want = run("xla")(x.astype(jnp.float32), w, where) if work.G else run("reference")(x, w, where)
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    # Tensor cores sum products of float8 with 14 bits or so.
    limit = 2e-3 if work.activations == F8 else 1e-5
    wrong = [] if error < limit else [f"relative error {error:.2g} > {limit}"]
    if not runner.same(got, again):
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": error}


HELD: dict = {}


def held(work: Work, dense: bool):
    """Inputs of the last work, and as many weights as exceed the L2 cache threefold."""
    import jax
    import jax.numpy as jnp

    key = (dataclasses.replace(work, M=0, rounded=False, top_k=0), dense)
    matrix = max(work.G, 1) * work.N * work.K
    count = max(1, 2**29 // (matrix * (4 if dense else 1))) if work.few else 1
    count = min(count, 8)
    if key not in HELD:
        HELD.clear()
        if dense:
            keys = jax.random.split(jax.random.key(1), count)
            shape = (work.G, work.K, work.N) if work.G else (work.K, work.N)
            HELD[key] = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys]
        else:
            HELD[key] = arrays(dataclasses.replace(work, M=8, top_k=0), 1, count)[1]
    keys = jax.random.split(jax.random.key(2), count)
    xs = [rows(k, work) for k in keys]
    return [round_for(work, x) for x in xs] if work.rounded and not dense else xs, HELD[key]


def laid_out(w, work: Work):
    """As `generate` has weights that few rows meet."""
    import jax

    return jax.jit(lambda w: w.interleave())(w) if work.few and not work.G and not work.activations else w


@functools.cache  # bf16 does not depend on the format, and is asked for each
def timing(work: Work, implementation: str) -> dict:
    import jax

    from pallas_kernels import ragged_dot

    xs, weights = held(work, implementation == "bf16")
    run = multiply(work, implementation)
    if implementation == "mosaic_gpu":
        weights = [laid_out(w, work) for w in weights]
    if implementation == "bf16":
        run = ragged_dot if work.G else lambda x, w, where: x @ w
        if work.top_k:
            run = multiply(dataclasses.replace(work, activations=None), None)

    def calls(xs, weights, where):
        """One after another: XLA may not join their kernels."""
        outs: list[jax.Array] = []
        for x, w in zip(xs, weights, strict=True):
            if outs:
                x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))
            outs.append(run(x, w, where))
        return outs

    us, launches = runner.profile(jax.jit(calls), xs, weights, routed(work))
    return {"us": us / len(xs), "kernels": {name: round(statistics.median(t), 1) for name, t in launches.items()}}


def do(job) -> dict:
    kind, name, implementation, _ = job
    if kind == "ceilings":
        return runner.ceilings()
    work = (WORKS | CHECKS)[name]
    if kind == "check":
        return check(work)
    if implementation == "bf16":
        work = Work(work.M, N=work.N, K=work.K, G=work.G, routing=work.routing, top_k=work.top_k)
    return timing(work, implementation)


# In the parent.


def jobs():
    """The device, checks, the kernels, then the peers."""
    yield "ceilings", "", "", ""
    for name in [*WORKS, *CHECKS]:
        yield "check", name, "mosaic_gpu", ""
    for implementation in ("mosaic_gpu", "bf16", "xla"):
        for name, work in WORKS.items():
            if implementation == "xla" and (work.rounded or work.top_k):
                continue  # as without
            yield "time", name, implementation, ""


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 150).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(), do, args, JOB_SECONDS, __file__)
    print_table(results)
    return runner.status(results)


def print_table(results) -> None:
    print(results.get(("ceilings", "", "", "")))
    print("us: all kernels of a call; own: ours alone, without what rounds, spreads, permutes and pads the rows")
    print(
        f"{'work':26}{'error':>9}{'us':>9}{'own us':>9}{'TFLOP/s':>9}{'GB/s':>7}{'bf16 us':>9}{'xla us':>9}"
        f"{'x bf16':>8}{'own x':>7}{'x xla':>7}"
    )
    for name, work in (WORKS | CHECKS).items():
        checked = results.get(("check", name, "mosaic_gpu", ""), {})
        if not checked:
            continue
        timed = [results.get(("time", name, i, ""), {}) for i in ("mosaic_gpu", "bf16", "xla")]
        us, bf16, xla = (t.get("us", float("nan")) for t in timed)
        wrong = "; ".join(x["error"] for x in (checked, *timed) if x.get("error"))
        worst = checked.get("worst", float("nan"))
        own = sum(t for kernel, t in timed[0].get("kernels", {}).items() if "quantized" in kernel) or float("nan")
        rate, bandwidth = 2e-6 * work.M * work.N * work.K / own, bytes_read(work) / own / 1e3
        print(
            f"{name:26}{worst:9.1e}{us:9.1f}{own:9.1f}{rate:9.0f}{bandwidth:7.0f}{bf16:9.1f}{xla:9.1f}"
            f"{bf16 / us:8.2f}{bf16 / own:7.2f}{xla / us:7.2f}  {wrong}"
        )


if __name__ == "__main__":
    sys.exit(main())
