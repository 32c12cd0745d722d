"""The Triton kernels on one NVIDIA GPU: are they right, then how fast, beside Mosaic GPU, cuDNN and XLA.

    python benchmarks/triton/bench.py                  # checks, then the tuned kernels and their peers
    python benchmarks/triton/bench.py --sweep          # and every configuration of the lists below
    python benchmarks/triton/bench.py --only attention

Runs from compute capability 8.0 on; what a GPU cannot run is left out and said. Inputs are fresh random numbers; times
are medians of rounds of calls issued back to back, quantized weights taken in turn so that none comes from the L2.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from pallas_kernels import attention, quantize_array, quantized_matmul, ragged_dot

att = importlib.import_module("pallas_kernels.attention.triton")
ragged = importlib.import_module("pallas_kernels.ragged_dot.triton")
quantized = importlib.import_module("pallas_kernels.quantized_matmul.triton")

# (B, T, N, K, H, Hv), all causal.
ATTENTION = {
    "h128": (4, 4096, 16, 16, 128, 128),
    "h64": (4, 4096, 16, 16, 64, 64),
    "h256": (2, 4096, 16, 16, 256, 256),
    "mla 192/128": (2, 4096, 16, 16, 192, 128),
    "gqa 32/8": (4, 4096, 32, 8, 128, 128),
}
B = att.Blocks
FORWARD = [B(128, 64, 4, 3), B(128, 64, 8, 3), B(128, 128, 8, 2), B(128, 32, 8, 2), B(64, 64, 4, 3)]
DQ = [B(128, 64, 8, 2), B(128, 64, 8, 3), B(64, 64, 4, 2), B(64, 32, 8, 2), B(128, 128, 8, 2)]
DKV = [B(64, 128, 8, 2), B(64, 128, 8, 3), B(32, 128, 8, 2), B(64, 64, 4, 2), B(32, 64, 8, 2)]
SWEPT = ("h128", "h64", "h256")

# (M, K, N, groups)
RAGGED = {"8 groups": (16384, 4096, 14336, 8), "64 groups": (32768, 2048, 1408, 64), "decode": (512, 2048, 768, 128)}
C = ragged.Config
TILES = [
    C(128, 128, 32, 4, 4),
    C(128, 128, 64, 4, 3),
    C(128, 128, 64, 8, 3),
    C(128, 256, 64, 8, 3),
    C(256, 128, 64, 8, 3),
]
SHORT = [C(16, 128, 64, 4, 4), C(16, 64, 128, 4, 4), C(16, 128, 128, 4, 3), C(16, 256, 64, 8, 3)]

# M, format, group of a weight [8192, 8192]
QUANTIZED = [
    (1, "int4", 128),
    (16, "int4", 128),
    (64, "int4", 128),
    (1, "int8", None),
    (16, "int8", None),
    (64, "int8", None),
]
Q = quantized.Config
FEW = [Q(64, 64, 128, 2, 4, 4), Q(64, 64, 128, 4, 4, 4), Q(64, 64, 256, 4, 4, 3), Q(64, 32, 256, 2, 4, 4)]
FEW += [Q(64, 128, 128, 4, 4, 4), Q(64, 128, 128, 8, 8, 4), Q(64, 32, 512, 2, 4, 3), Q(64, 64, 128, 8, 4, 5)]

START = time.perf_counter()
HOPPER = getattr(jax.devices()[0], "compute_capability", "") == "9.0"
PEERS = ("triton", "mosaic_gpu") if HOPPER else ("triton",)


def say(*words) -> None:
    print(f"[{time.perf_counter() - START:4.0f} s]", *words, flush=True)


def normal(shape, dtype=jnp.bfloat16):
    seed = int.from_bytes(os.urandom(4), "little")
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def with_gradients(f, count: int):
    def run(*args):
        *args, cotangent = args
        rest = args[count:]
        y, vjp = jax.vjp(lambda *x: f(*x, *rest), *args[:count])
        return y, vjp(cotangent.astype(y.dtype))

    return run


def verdict(what: str, run, *args, want, bound: float) -> bool:
    run = jax.jit(run)
    try:
        got, again = run(*args), run(*args)
    except Exception as e:
        say("check", what, "FAILED", runner.message(e))
        return False
    e, same = max(runner.errors(got, want)), runner.same(got, again)
    fine = e <= bound and same
    say("check", what, f"{e:.2e}", "" if fine else f"WRONG (bound {bound:.0e}, repeats bit by bit: {same})")
    return fine


# Right?


def check_attention() -> bool:
    rng = np.random.default_rng()
    ids = jnp.asarray(np.sort(rng.integers(0, 6, (2, 1000)), axis=1), jnp.int32)
    sinks = normal((4,), jnp.float32)
    fine = True
    for name, (H, Hv, K), options in (
        ("causal, packed, sinks", (128, 128, 2), {"causal": True, "segment_ids": ids, "sinks": sinks}),
        ("window, soft cap", (64, 64, 4), {"causal": True, "window": 100, "soft_cap": 5.0}),
        ("traced window", (80, 80, 1), {"window": jnp.int32(150)}),
        ("all", (256, 256, 2), {}),
        ("latent, causal", (192, 128, 4), {"causal": True}),
    ):
        args = [normal((2, 1000, n, h)) for n, h in ((4, H), (K, H), (K, Hv), (4, Hv))]
        run = lambda name, options=options: with_gradients(
            functools.partial(attention, **options, implementation=name), 3
        )
        want = jax.jit(run("reference"))(*(a.astype(jnp.float32) for a in args))
        fine &= verdict(f"attention {name} {H}/{Hv}", run("triton"), *args, want=want, bound=1e-2)
    return fine


def check_ragged() -> bool:
    fine = True
    for name, M, K, N, sizes in (
        ("uneven", 1100, 200, 328, [3, 0, 700, 260, 100]),
        ("short", 40, 128, 96, [0, 7, 0, 5, 20]),
    ):
        args = normal((M, K)), normal((len(sizes), K, N)), jnp.asarray(sizes, jnp.int32), normal((M, N))
        run = lambda name: with_gradients(functools.partial(ragged_dot, implementation=name), 2)
        want = jax.jit(run("reference"))(args[0].astype(jnp.float32), args[1].astype(jnp.float32), *args[2:])
        fine &= verdict(f"ragged_dot {name}", run("triton"), *args, want=want, bound=1e-2)
    return fine


def check_quantized() -> bool:
    fine = True
    for M, N, K, format, group, options in (
        (1, 640, 1024, "int4", 128, {}),
        (20, 200, 640, "uint4", 32, {}),
        (70, 512, 768, "int8", 256, {"symmetric": False}),
        (5, 320, 1000, "int8", None, {}),
        (300, 256, 512, "int4", None, {"activations": "int8"}),
    ):
        w = quantize_array(normal((K, N), jnp.float32), format, group=group, **options)
        run = lambda name: functools.partial(quantized_matmul, implementation=name, preferred_element_type=jnp.float32)
        x = normal((M, K))
        want = jax.jit(run("reference"))(x, w)
        fine &= verdict(
            f"quantized_matmul {M} x {K} x {N} {format} {group} {options}", run("triton"), x, w, want=want, bound=1e-5
        )
    return fine


# How fast?


def run_jobs(jobs, rows: list) -> None:
    """Compiles them side by side, then times one after another. A job: label, function, arguments, calls in it."""

    def prepare(job):
        _, f, args, _ = job
        try:
            return jax.jit(f).lower(*args).compile()
        except Exception as e:
            return e

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(prepare, jobs))
    for (label, _, args, calls), run in zip(jobs, compiled, strict=True):
        try:
            if isinstance(run, Exception):
                raise run
            ms = runner.measure(run, *args, rounds=5)[0] / calls
        except Exception as e:
            rows.append((*label, runner.message(e)))
            say(*label, "FAILED", rows[-1][-1])
            continue
        rows.append((*label, ms))
        say(*label, f"{ms:.4f} ms")


def time_attention(rows, sweep: bool) -> None:
    for name, (b, t, n, k, h, hv) in ATTENTION.items():
        args = [normal((b, t, *s)) for s in ((n, h), (k, h), (k, hv), (n, hv))]
        peers = {x: functools.partial(attention, causal=True, implementation=x) for x in PEERS}
        if h == hv <= 128:
            peers["cudnn"] = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        jobs = []
        for peer, f in peers.items():
            jobs.append((("attention", name, peer, "fwd"), f, args[:3], 1))
            jobs.append((("attention", name, peer, "fwd+bwd"), with_gradients(f, 3), args, 1))
        if sweep and name in SWEPT:
            options = att.Options(True, (None, None), h**-0.5, None)
            numbers = normal((b, n, t), jnp.float32)
            forward = lambda b, o, *x: att._forward(att.Inputs(*x), o, b)
            backward = lambda run, b, o, q, k, v, *x: run(att.Inputs(q, k, v), o, b, *x)
            dq, dkv = functools.partial(backward, att._backward_dq), functools.partial(backward, att._backward_dkv)
            for kind, run, candidates, more in (
                ("fwd", forward, FORWARD, []),
                ("dq", dq, DQ, [args[3], numbers, numbers]),
                ("dkv", dkv, DKV, [args[3], numbers, numbers]),
            ):
                for blocks in candidates:
                    f = functools.partial(run, blocks, options)
                    jobs.append((("attention", name, kind, blocks), f, [*args[:3], *more], 1))
        run_jobs(jobs, rows)


def time_ragged(rows, sweep: bool) -> None:
    for name, (m, k, n, g) in RAGGED.items():
        sizes = jnp.full(g, m // g, jnp.int32)
        lhs, rhs, grad = normal((m, k)), normal((g, k, n)), normal((m, n))
        jobs = [(("ragged_dot", name, "dense", "fwd"), lambda x, y: x @ y[0], [lhs, rhs], 1)]
        for peer in PEERS:
            f = functools.partial(ragged_dot, implementation=peer)
            jobs.append((("ragged_dot", name, peer, "fwd"), f, [lhs, rhs, sizes], 1))
            jobs.append((("ragged_dot", name, peer, "fwd+bwd"), with_gradients(f, 2), [lhs, rhs, sizes, grad], 1))
        for config in (SHORT if name == "decode" else TILES) if sweep else ():
            f = functools.partial(ragged.grouped, dtype=jnp.bfloat16, config=config)
            jobs.append((("ragged_dot", name, "fwd", config), f, [lhs, rhs, sizes], 1))
            f = functools.partial(f, transposed=True)
            jobs.append((("ragged_dot", name, "d_lhs", config), f, [grad, rhs, sizes], 1))
            if name != "decode":
                f = functools.partial(ragged.contraction, dtype=jnp.bfloat16, config=config)
                jobs.append((("ragged_dot", name, "d_rhs", config), f, [lhs, grad, sizes], 1))
        run_jobs(jobs, rows)


def time_quantized(rows, sweep: bool) -> None:
    turns = 8

    def each(f):
        return lambda x, weights: [f(x, w) for w in weights]

    dense = [normal((8192, 8192)) for _ in range(turns)]
    for format, group in {x[1:]: None for x in QUANTIZED}:
        weights = [quantize_array(w, format, group=group) for w in dense]
        jobs = []
        for M in [x[0] for x in QUANTIZED if x[1:] == (format, group)]:
            x, work = normal((M, 8192)), f"M={M} {format}"
            jobs.append((("quantized", work, "bf16", ""), each(jnp.matmul), [x, dense], turns))
            for peer in (*PEERS, "xla"):
                f = each(functools.partial(quantized_matmul, implementation=peer))
                jobs.append((("quantized", work, peer, ""), f, [x, weights], turns))
            for config in FEW if sweep else ():
                f = each(lambda x, w, c=config: quantized.matmul(x, w.flat(), jnp.bfloat16, c))
                jobs.append((("quantized", work, "sweep", config), f, [x, weights], turns))
        run_jobs(jobs, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="attention, ragged or quantized")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    device = jax.devices()[0]
    say(f"jax {jax.__version__}, {device.device_kind}")
    parts = {
        "attention": (check_attention, time_attention),
        "ragged": (check_ragged, time_ragged),
        "quantized": (check_quantized, time_quantized),
    }
    chosen = {name: part for name, part in parts.items() if args.only in name}
    right = {name: check() for name, (check, _) in chosen.items()}
    rows: list = []
    for name, (_, timing) in chosen.items():
        if right[name]:  # what is wrong is not timed
            timing(rows, args.sweep)
    print(f"\n{device.device_kind}, jax {jax.__version__}")
    for *label, ms in rows:  # or why there is none
        words = [str(dataclasses.astuple(x)) if dataclasses.is_dataclass(x) else x for x in label]
        shown = ms if isinstance(ms, str) else f"{ms:10.4f} ms"
        print(f"{words[0]:12}{words[1]:14}{words[2]:12}{words[3]:24}{shown}")
    return 0 if all(right.values()) and not any(isinstance(ms, str) for *_, ms in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
