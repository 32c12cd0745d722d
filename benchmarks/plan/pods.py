"""Four models on four pods that are not here: planned, then the best mesh compiled, each row in a process of its own.

python benchmarks/plan/pods.py --out benchmarks/plan/pods.jsonl    # all rows; needs jax[tpu] and jax[cuda13]
python benchmarks/plan/pods.py --rows tpu7x --out pods.jsonl       # those whose model or pod holds this text
python benchmarks/plan/pods.py --table benchmarks/plan/pods.jsonl  # the table of docs/planner.md, newest of each row
"""

import argparse
import itertools
import os
import resource
import time
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import rows as benchmark

MODELS = ("llama3-8b", "qwen3-30b-a3b", "llama3-70b", "llama3-405b")
PODS = ("v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4", "h200:128x8")
ROWS = list(itertools.product(MODELS, PODS))
SEQ_LEN = 8192
BATCH = 1024  # rows of a step: 8M tokens
QUICK = ("v5p", "v6e", "tpu7x")


def measure(row: tuple[str, str], args: argparse.Namespace) -> dict:
    """Plans and compiles one row in this process."""
    del args
    from jaxscale.models.presets import preset
    from jaxscale.plan.aot import compile_step
    from jaxscale.plan.search import search

    name, pod = row
    found = {
        "row": row,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {p: metadata.version(p) for p in ("jax", "libtpu", "jax-cuda13-plugin")},
        "load": os.getloadavg()[0],
    }
    start = time.perf_counter()
    try:
        plan = search(preset(name), pod, batch_size=BATCH, seq_len=SEQ_LEN)
    except ValueError as error:
        return found | {"refused": str(error), "seconds": time.perf_counter() - start} | _spent()
    planned = time.perf_counter() - start
    best, quick = plan.best, pod.startswith(QUICK)
    compiled = compile_step(
        preset(name),
        best.mesh,
        pod,
        batch_size=BATCH,
        seq_len=SEQ_LEN,
        remat=best.remat,
        accum_steps=best.accum_steps,
        quick=quick,
    )
    mesh = str(best.mesh)
    return (
        found
        | {
            "mesh": mesh,
            "remat": best.remat,
            "accum_steps": best.accum_steps,
            "step_seconds": best.seconds,
            "share_of_peak": best.share_of_peak,
            "estimate": {"memory": best.memory.total, "payload": sum(t.bytes for t in best.transfers)},
            "compiler": {"memory": compiled.memory.total, "payload": sum(r.bytes for r in compiled.census.rows)},
            "quick": quick,
            "seconds": time.perf_counter() - start,
            "parts": {"plan": planned, "trace": compiled.trace_seconds, "compile": compiled.compile_seconds},
        }
        | _spent()
    )


def _spent() -> dict:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "host_bytes": used.ru_maxrss * 1024}


def table(path: Path) -> str:
    """Markdown: the newest measurement of each row beside today's estimate of the mesh that was compiled."""
    from jaxscale.config import MeshConfig
    from jaxscale.models.presets import preset
    from jaxscale.plan.estimate import estimate

    lines = [
        "| model | pod | best mesh | step, estimated | of the matmul rate | memory: compiler | estimate | "
        "payload: estimate to compiler | seconds | CPU seconds | host |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in benchmark.newest(path, ROWS):
        model, pod = r["row"]
        spent = f"{r['seconds']:.0f}{', quick' if r.get('quick') else ''} | {r['cpu_seconds']:.0f} | "
        spent += f"{r['host_bytes'] / 1e9:.1f} GB |"
        if "refused" in r:
            lines.append(f"| {model} | {pod} | fits nowhere | - | - | - | - | - | {spent}")
            continue
        micro = f", {r['accum_steps']} micro-batches" if r["accum_steps"] > 1 else ""
        own, mesh = r["compiler"], MeshConfig.parse(r["mesh"])
        sizes = {"batch_size": BATCH, "seq_len": SEQ_LEN, "remat": r["remat"], "accum_steps": r["accum_steps"]}
        guess = estimate(preset(model), mesh, pod, **sizes)
        payload = sum(t.bytes for t in guess.transfers)
        lines.append(
            f"| {model} | {pod} | {r['mesh']}, {r['remat']}{micro} | {guess.seconds:.2f} s | "
            f"{guess.share_of_peak:.0%} | {own['memory'] / 1e9:.2f} GB | "
            f"{guess.memory.total / own['memory'] - 1:+.1%} | "
            f"{payload / own['payload'] - 1:+.1%} | {spent}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    benchmark.main(__doc__, __file__, ROWS, measure, table)
