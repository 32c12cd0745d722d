"""The planner's choice beside every mesh there is: each is compiled ahead of time and its own collectives are priced.

python benchmarks/plan/sweep.py --out benchmarks/plan/sweep.jsonl    # all rows, minutes each; h200 needs jax[cuda13]
python benchmarks/plan/sweep.py --table benchmarks/plan/sweep.jsonl  # the table of docs/planner.md
"""

import argparse
import dataclasses
import os
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import rows as benchmark

# model ("+experts": eight of them, two for a token), pod, rows, tokens of a row
ROWS = [
    ("tiny", "cpu:4", 8, 256),
    ("tiny", "cpu:8", 8, 256),
    ("tiny+experts", "cpu:4", 8, 256),
    ("smollm2-135m", "h200:1x8", 32, 2048),
]


def sweep(row: tuple[str, str, int, int]) -> list[dict]:
    """Every mesh of a row that fits, in the order of the estimate, with the seconds that the compiled program costs."""
    from jaxscale.config import MoEConfig
    from jaxscale.models.presets import preset
    from jaxscale.plan.confirm import confirm
    from jaxscale.plan.search import search

    name, pod, rows, seq_len = row
    model = preset(name.removesuffix("+experts"))
    if name.endswith("+experts"):
        experts = MoEConfig(num_experts=8, top_k=2, mlp_dim=model.mlp_dim)
        model = dataclasses.replace(model, moe=experts)
    sizes = {"batch_size": rows, "seq_len": seq_len}
    found = search(model, pod, **sizes)
    every = confirm(found, top=len(found.fitting), **sizes)
    cost = {str(c.estimate.mesh): c.seconds for c in every.candidates}
    return [{"mesh": str(e.mesh), "estimate": e.seconds, "compiled": cost[str(e.mesh)]} for e in found.fitting]


def verdict(meshes: list[dict], top: int) -> tuple[dict, dict, dict]:
    """What the estimate alone takes, the best of the `top` that are compiled, the best of all."""
    cost = lambda m: m["compiled"]
    return meshes[0], min(meshes[:top], key=cost), min(meshes, key=cost)


def measure(row: tuple[str, str, int, int], args: argparse.Namespace) -> dict:
    del args
    if row[1].startswith("cpu:"):
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={row[1][4:]}"
    meshes = sweep(row)
    return {"row": row, "date": time.strftime("%Y-%m-%d"), "cpu_seconds": time.process_time(), "meshes": meshes}


def table(path: Path) -> str:
    """Markdown: what is lost by the choice, a line for each row."""
    from jaxscale.plan.confirm import TOP

    lines = [
        "| model | pod | rows x tokens | meshes | by the estimate alone | loses | "
        f"the best of {TOP} compiled | loses | the best of all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in benchmark.newest(path, ROWS):
        name, pod, rows, seq_len = record["row"]
        first, chosen, best = verdict(record["meshes"], TOP)
        lost = lambda m: f"{m['compiled'] / best['compiled'] - 1:.1%}"  # noqa: B023
        lines.append(
            f"| {name} | {pod} | {rows} x {seq_len} | {len(record['meshes'])} | {first['mesh']} | {lost(first)} | "
            f"{chosen['mesh']} | {lost(chosen)} | {best['mesh']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    benchmark.main(__doc__, __file__, ROWS, measure, table)
