"""Pipelines beside the compiler: the estimate for pods that are not here, on a machine without accelerator.

python benchmarks/plan/stages.py --quick --out benchmarks/plan/stages.jsonl    # needs jax[tpu] and jax[cuda13]; minutes
python benchmarks/plan/stages.py --table benchmarks/plan/stages.jsonl          # the table of docs/pipeline.md
"""

from pathlib import Path

import accuracy
import rows as benchmark

# model (NAME/N: its first N layers), pod, mesh, rows, tokens of a row, remat, micro-batches
ROWS = [
    ("llama3-8b/8", "h200:2x8", "pp=2,fsdp=8", 64, 4096, "full", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,fsdp=4,tp=2", 64, 4096, "full", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,fsdp=4,tp=2", 64, 4096, "dots", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,fsdp=4,tp=2", 64, 4096, "none", 1),
    ("llama3-8b/8", "h200:2x8", "pp=4,fsdp=4", 64, 4096, "none", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,dp=2,tp=4", 64, 4096, "full", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,dp=2,fsdp=2,tp=2", 64, 4096, "full", 1),
    ("llama3-8b/8", "h200:2x8", "pp=2,fsdp=8,pp_interleave=2", 64, 4096, "dots", 1),
    ("llama3-8b/8", "v5p:2x2x4", "pp=2,fsdp=8", 64, 4096, "full", 1),
    ("llama3-8b/8", "v5p:2x2x4", "pp=2,fsdp=8,pp_interleave=2", 64, 4096, "full", 1),
    ("llama3-70b", "h200:32x8", "pp=4,fsdp=8,tp=8", 256, 4096, "full", 1),
    ("llama3-70b", "h200:16x8", "pp=16,tp=8", 32, 4096, "dots", 1),
    ("llama3-70b", "h200:16x8", "pp=8,dp=2,tp=8", 32, 4096, "dots", 1),
    ("llama3-70b", "v5p:8x8x8", "pp=4,fsdp=16,tp=8", 256, 4096, "full", 1),
]


def table(path: Path) -> str:
    """Markdown: the newest measurement of each row beside today's estimate."""
    lines = [
        "| model | pod | mesh | remat | memory: compiler | estimate | payload: compiler | estimate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in benchmark.newest(path, ROWS):
        name, pod, mesh, rows, _, remat, _ = record["row"]
        memory, guess, payload, moved = accuracy.compared(record)
        few = f" ({rows} rows)" if rows == 32 else ""
        lines.append(
            f"| {name} | {pod} | {mesh}{few} | {remat} | {memory / 1e9:.2f} GB | {guess / memory - 1:+.1%} | "
            f"{payload / 1e9:.1f} GB | {moved / payload - 1:+.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    benchmark.main(__doc__, __file__, ROWS, accuracy.measure, table, quick="XLA's lowest optimisation level")
