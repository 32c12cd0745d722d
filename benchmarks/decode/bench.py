"""Decode attention on one GPU: is it right, then how fast, against the copy bandwidth of the same run.

    python benchmarks/decode/bench.py                        # everything, under 100 seconds, one table last
    python benchmarks/decode/bench.py --only "8 tokens"      # the works and variants whose name holds a word
    python benchmarks/decode/bench.py --json results.json

Needs a checkout and jax; torch is measured where it imports. Jobs run one after another in a child process that this
one watches: a job that hangs costs its time limit, not the run. A work that is not right is not timed. Times are
medians of rounds of calls issued back to back. GB/s count the keys and values of all sequences once, nothing else.
"""

import dataclasses
import functools
import importlib
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

JOB_SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Work:
    B: int = 128
    S: int = 8192  # tokens in each cache; the mean of them when ragged
    T: int = 1
    N: int = 64
    K: int = 8
    H: int = 128
    page: int = 64
    pages: str = "bfloat16"
    tokens: bool = False  # pages of 8 bits have a scale for each token
    ragged: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False


WORKS = {
    "1 token": Work(),
    "8 tokens": Work(T=8),
    "4 tokens": Work(T=4),
    "ragged": Work(ragged=True),
    "float8": Work(pages="float8_e4m3fn"),
    "int8": Work(pages="int8"),
    "int8, scales of tokens": Work(pages="int8", tokens=True),
    "float8, scales of tokens": Work(pages="float8_e4m3fn", tokens=True),
    "page 16": Work(page=16),
    "page 128": Work(page=128),
    "1 sequence of 128k": Work(B=1, S=131072),
    "32/8 heads": Work(N=32),
    "head_dim 64": Work(H=64),
    "head_dim 256": Work(H=256, N=16, K=4),
}

# Checked and not timed.
CHECKS = {"window, cap, sinks": Work(T=3, page=16, window=150, soft_cap=20.0, sinks=True)}

# Fields of Config that differ from the tuned one.
VARIANTS: dict[str, dict] = {
    "tuned": {},
    "head by head": {"together": False},
    "1 worker x5": {"workers": 1, "stages": 5},
}
SWEPT = ("1 token", "8 tokens")


def lengths(work: Work, rng):
    """Their mean is S; ragged ones lie between S / 16 and 31 S / 16."""
    import numpy as np

    if not work.ragged:
        return np.full(work.B, work.S, np.int32)
    x = np.linspace(work.S // 16, 2 * work.S - work.S // 16, work.B).astype(np.int32)
    return rng.permutation(x)


def cache_bytes(work: Work) -> float:
    size = 2 if work.pages == "bfloat16" else 1
    return 2.0 * work.B * work.S * work.K * work.H * size


# In the child.


def arrays(work: Work, seed: int):
    """The arguments of decode_attention; every page of the pool belongs to one place of one sequence."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(seed)
    length = lengths(work, rng)
    M = -(-int(length.max()) // work.page)
    counts = -(-length // work.page)
    table = np.full((work.B, M), -1, np.int32)
    free = rng.permutation(int(counts.sum())).astype(np.int32)
    for b, n in enumerate(counts):
        table[b, :n], free = free[:n], free[n:]
    shape = (int(counts.sum()), work.page, work.K, work.H)
    dtype = jnp.dtype(work.pages)
    keys = jax.random.split(jax.random.key(seed), 6)

    @functools.partial(jax.jit, static_argnums=1)
    def pool(key, shape):
        if dtype == jnp.int8:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)
        return jax.random.normal(key, shape, jnp.bfloat16).astype(dtype)

    args = {
        "q": jax.random.normal(keys[0], (work.B, work.T, work.N, work.H), jnp.bfloat16),
        "k_pages": pool(keys[1], shape),
        "v_pages": pool(keys[2], shape),
        "page_table": jnp.asarray(table),
        "lengths": jnp.asarray(length),
    }
    if work.pages != "bfloat16":
        unit = 1 / 60 if work.pages == "int8" else 1.0
        for name, key in (("k_scales", keys[3]), ("v_scales", keys[4])):
            own = shape[:3] if work.tokens else (shape[0], work.K)
            args[name] = unit * jnp.exp(0.3 * jax.random.normal(key, own))
    if work.sinks:
        args["sinks"] = jax.random.normal(keys[5], (work.N,))
    return args


def make(work: Work, implementation: str, variant: str):
    import jax

    from pallas_kernels import decode_attention

    gpu = importlib.import_module("pallas_kernels.decode_attention.pallas_mosaic_gpu")
    if not hasattr(gpu, "library_tuned"):
        gpu.library_tuned = gpu.tuned
    gpu.tuned = lambda *sizes: dataclasses.replace(gpu.library_tuned(*sizes), **VARIANTS[variant])
    return jax.jit(
        lambda args: decode_attention(**args, window=work.window, soft_cap=work.soft_cap, implementation=implementation)
    )


def dense(work: Work, args):
    """Attention over each sequence's own keys, in numpy float64."""
    import jax.numpy as jnp
    import numpy as np

    host = {name: np.asarray(jnp.asarray(x).astype(jnp.float32)).astype(np.float64) for name, x in args.items()}
    table, length = np.asarray(args["page_table"]), np.asarray(args["lengths"])
    out = np.zeros((work.B, work.T, work.N, work.H))
    for b, n in enumerate(length):
        used = table[b, : -(-n // work.page)]
        k, v = host["k_pages"][used], host["v_pages"][used]
        if "k_scales" in args:
            scales = (host[s][used] if work.tokens else host[s][used][:, None] for s in ("k_scales", "v_scales"))
            k, v = (x * s[..., None] for x, s in zip((k, v), scales))
        k, v = (np.repeat(x.reshape(-1, work.K, work.H)[:n], work.N // work.K, axis=1) for x in (k, v))
        logits = np.einsum("TNH,SNH->NTS", host["q"][b], k) * work.H**-0.5
        if work.soft_cap:
            logits = work.soft_cap * np.tanh(logits / work.soft_cap)
        ahead = np.arange(n)[None] - (n - work.T + np.arange(work.T))[:, None]
        see = (ahead <= 0) if work.window is None else (ahead <= 0) & (ahead > -work.window)
        logits = np.where(see[None], logits, -np.inf)
        sink = host["sinks"][:, None, None] if work.sinks else np.full((work.N, 1, 1), -np.inf)
        top = np.maximum(logits.max(axis=2, keepdims=True), sink)
        p = np.exp(logits - top)
        out[b] = np.einsum("NTS,SNH->TNH", p / (p.sum(axis=2, keepdims=True) + np.exp(sink - top)), v)
    return out


def check(work: Work, implementation: str, variant: str) -> dict:
    """Relative error against float64 on a small ragged batch, and whether two runs agree bit by bit."""
    import jax.numpy as jnp
    import numpy as np

    seed = int.from_bytes(os.urandom(3), "little")
    small = dataclasses.replace(work, B=7, S=700, ragged=True)
    args = arrays(small, seed)
    after = np.asarray(args["lengths"])  # whatever stands behind a sequence's end must not matter
    for name in ("k_pages", "v_pages"):
        pages = np.array(args[name].astype(jnp.float32))
        for b, n in enumerate(after):
            if n % small.page:
                pages[np.asarray(args["page_table"])[b, n // small.page], n % small.page :] = np.nan
        if work.pages != "int8":
            args[name] = jnp.asarray(pages).astype(args[name].dtype)
    f = make(small, implementation, variant)
    got, again = f(args), f(args)
    exact = dense(small, args)
    error = float(np.linalg.norm(np.asarray(got, np.float64) - exact) / np.linalg.norm(exact))
    wrong = [] if error < 1e-2 else [f"relative error {error:.4f} > 0.01"]
    if not runner.same(got, again):
        wrong.append("two runs differ")
    return {"error": "; ".join(wrong), "worst": error, "seed": seed}


HELD: dict = {}  # the arrays of the last timed work: drawing 4 GB takes longer than reading them


def held(work: Work):
    key = dataclasses.replace(work, T=0)
    if key not in HELD:
        HELD.clear()
        HELD[key] = arrays(dataclasses.replace(work, T=8), 0)
    args = HELD[key]
    return {**args, "q": args["q"][:, : work.T]}


def timing(work: Work, implementation: str, variant: str) -> dict:
    args = held(work)
    run = make(work, implementation, variant)
    ms, seconds = runner.measure(run, args)
    kernels = runner.profile(run, args)[1] if implementation == "mosaic_gpu" else {}
    return {"ms": ms, "compile": seconds, "kernels": {name: round(sum(us), 1) for name, us in kernels.items()}}


def torch_timing(work: Work) -> dict:
    """torch's attention over a contiguous cache of the same size: no pages to look up."""
    import torch

    new = lambda n, t: torch.randn((work.B, n, t, work.H), device="cuda", dtype=torch.bfloat16)
    q, k, v = new(work.N, work.T), new(work.K, work.S), new(work.K, work.S)
    attend = lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with torch.no_grad():
        return {"ms": runner.measure_torch(attend, rounds=5), "compile": 0.0}


def do(job) -> dict:
    kind, name, implementation, variant = job
    if kind == "ceilings":
        return runner.ceilings()
    work = (WORKS | CHECKS)[name]
    if implementation == "torch":
        HELD.clear()
        return torch_timing(work)
    return (check if kind == "check" else timing)(work, implementation, variant)


# In the parent.


def jobs():
    """What the copy takes, the two works that matter, everything else, the peers, the variants."""
    yield "ceilings", "", "", ""
    for name in SWEPT:
        yield "check", name, "mosaic_gpu", "tuned"
    for name in SWEPT:
        yield "time", name, "mosaic_gpu", "tuned"
    for name in [*WORKS, *CHECKS]:
        if name not in SWEPT:
            yield "check", name, "mosaic_gpu", "tuned"
        if name in WORKS and name not in SWEPT:
            yield "time", name, "mosaic_gpu", "tuned"
    yield "time", "1 token", "xla", "tuned"
    for name in SWEPT:
        yield "time", name, "torch", ""
    for name in SWEPT:
        for variant in list(VARIANTS)[1:]:
            yield "check", name, "mosaic_gpu", variant
            yield "time", name, "mosaic_gpu", variant


def main(argv: list[str] | None = None) -> int:
    args = runner.parser(__doc__, 90).parse_args(argv)
    if args.child:
        return runner.serve(do)
    results = runner.run(jobs(), do, args, JOB_SECONDS, __file__)
    print_table(results)
    return runner.status(results)


def print_table(results) -> None:
    copy = results.get(("ceilings", "", "", ""), {})
    print(f"\n{json.dumps(copy)}")
    print(f"{'work':20}{'backend':24}{'worst err':>10}{'ms':>9}{'GB/s':>8}{'of copy':>9}")
    for job, r in results.items():
        kind, name, implementation, variant = job
        if kind == "ceilings" or (kind == "check" and name in WORKS and not r.get("error")):
            continue
        label = f"{implementation} {variant}"
        if trouble := runner.trouble(job, r):
            print(f"{name:20}{label:24}{trouble}")
            continue
        worst = results.get(("check", name, implementation, variant), {}).get("worst")
        line = f"{name:20}{label:24}{'' if worst is None else f'{worst:.4f}':>10}"
        if kind == "time":
            rate = cache_bytes(WORKS[name]) / r["ms"] / 1e6
            line += f"{r['ms']:9.3f}{rate:8.0f}" + (f"{rate / copy['GB/s']:9.1%}" if "GB/s" in copy else "")
        print(line)


if __name__ == "__main__":
    sys.exit(main())
