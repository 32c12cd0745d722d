"""The estimate beside the compiler, for pods that are not here, on a machine without accelerator: minutes a row.

python benchmarks/plan/accuracy.py --rows v5p --out benchmarks/plan/accuracy.jsonl   # needs jax[tpu] or jax[cuda13]
python benchmarks/plan/accuracy.py --table benchmarks/plan/accuracy.jsonl            # the table of docs/planner.md
"""

import argparse
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import rows as benchmark
from steps import model_of

# model, pod, mesh, rows, tokens of a row, remat, micro-batches
ROWS = [
    ("llama3-8b", "v5p:4x4x4", "fsdp=64", 64, 4096, "full", 1),
    ("llama3-8b", "v5p:4x4x4", "fsdp=16,tp=4", 64, 4096, "none", 1),
    ("llama3-8b", "v5p:4x4x4", "fsdp=16,tp=4", 64, 4096, "dots", 1),
    ("llama3-8b", "v5p:4x4x4", "fsdp=16,tp=4", 64, 4096, "full", 1),
    ("llama3-8b", "v5p:4x4x4", "fsdp=8,cp=2,tp=4", 32, 4096, "full", 1),
    ("llama3-70b", "v5p:8x8x8", "fsdp=64,tp=8", 512, 8192, "full", 1),
    ("qwen3-8b", "v6e:16x16", "fsdp=64,tp=4", 256, 4096, "full", 1),
    ("llama3-8b", "v6e:16x16", "fsdp=64,tp=4", 256, 4096, "dots", 1),
    ("llama3-70b", "v6e:16x16", "fsdp=32,tp=8", 128, 4096, "full", 1),
    ("llama3-70b", "tpu7x:4x4x4", "fsdp=16,tp=8", 128, 4096, "full", 1),
    ("llama3-8b", "tpu7x:4x4x4", "fsdp=32,tp=4", 128, 4096, "dots", 1),
    ("llama3-405b", "v5p:8x8x8", "fsdp=64,tp=8", 256, 8192, "full", 1),
    ("llama3-8b", "h200:8x8", "fsdp=64", 64, 4096, "full", 1),
    ("llama3-8b", "h200:8x8", "fsdp=64", 64, 4096, "dots", 1),
    ("llama3-8b", "h200:8x8", "fsdp=8,tp=8", 64, 4096, "none", 1),
    ("llama3-8b", "h200:8x8", "fsdp=8,tp=8", 64, 4096, "full", 1),
    ("llama3-8b", "h200:8x8", "dp=4,fsdp=16", 64, 4096, "full", 1),
    ("llama3-8b", "h200:8x8", "fsdp=8,cp=8", 16, 32768, "full", 1),
    ("llama3-8b", "h200:8x8", "fsdp=16,cp=2,tp=2", 32, 8192, "dots", 1),
    ("llama3-70b", "h200:128x8", "fsdp=128,tp=8", 1024, 8192, "full", 1),
    ("llama3-70b", "h200:32x8", "fsdp=32,tp=8", 128, 4096, "dots", 1),
    ("llama3-405b", "h200:128x8", "fsdp=128,tp=8", 512, 8192, "full", 1),
    ("qwen3-8b", "h200:4x8", "fsdp=32", 128, 4096, "full", 4),
    ("qwen3-0-6b", "h200:1x8", "dp=8", 64, 4096, "none", 1),
    ("smollm2-1-7b", "h200:1x8", "fsdp=8", 32, 4096, "none", 1),
    ("gemma2-9b", "h200:8x8", "fsdp=32,tp=2", 64, 8192, "full", 1),
]


SIZES = ("batch_size", "seq_len", "remat", "accum_steps")  # the last fields of a row


def measure(row: tuple, args: argparse.Namespace) -> dict:
    """Compiles one row in this process."""
    from jaxscale.config import MeshConfig
    from jaxscale.plan.aot import compile_step

    name, pod, mesh, *sizes = row
    compiled = compile_step(model_of(name), MeshConfig.parse(mesh), pod, **dict(zip(SIZES, sizes)), quick=args.quick)
    return {
        "row": row,
        "date": time.strftime("%Y-%m-%d"),
        "quick": args.quick,
        "memory": compiled.memory._asdict(),
        "census": [r._asdict() for r in compiled.census.rows],
        "seconds": compiled.trace_seconds + compiled.compile_seconds,
        "host_bytes": compiled.host_bytes,
    }


def compared(record: dict) -> tuple[float, float, float, float]:
    """Of a device, in bytes: memory that the compiler plans and today's estimate of it; what is sent, the same."""
    from jaxscale.config import MeshConfig
    from jaxscale.plan.estimate import estimate

    name, pod, mesh, *sizes = record["row"]
    guess = estimate(model_of(name), MeshConfig.parse(mesh), pod, **dict(zip(SIZES, sizes)))
    memory, payload = sum(record["memory"].values()), sum(r["bytes"] for r in record["census"])
    return memory, guess.memory.total, payload, sum(t.bytes for t in guess.transfers)


def table(path: Path) -> str:
    """Markdown: the newest measurement of each row beside today's estimate."""
    lines = [
        "| model | pod | mesh | rows x tokens | remat | memory: compiler | estimate | | payload: compiler | estimate | "
        "| seconds | host |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for record in benchmark.newest(path, ROWS):
        name, pod, mesh, rows, seq_len, remat, accum = record["row"]
        memory, guess, payload, moved = compared(record)
        micro = f", {accum} micro-batches" if accum > 1 else ""
        both = f"{payload / 1e9:.1f} GB | {moved / 1e9:.1f} | {moved / payload - 1:+.1%}" if payload else "- | - | -"
        lines.append(
            f"| {name} | {pod} | {mesh} | {rows} x {seq_len}{micro} | {remat} | {memory / 1e9:.2f} GB | "
            f"{guess / 1e9:.2f} | {guess / memory - 1:+.1%} | {both} | "
            f"{record['seconds']:.0f}{', quick' if record.get('quick') else ''} | "
            f"{record['host_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    benchmark.main(__doc__, __file__, ROWS, measure, table, quick="XLA's lowest optimisation level")
