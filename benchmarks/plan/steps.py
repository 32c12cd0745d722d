"""The planner's seconds beside measured steps, on the GPUs that are here: one, two or four of one host.

python benchmarks/plan/steps.py --out steps.jsonl    # the rows for as many devices as are here; half a minute each
python benchmarks/plan/steps.py --table benchmarks/plan/steps.jsonl     # the table of docs/planner.md
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxscale.config import ModelConfig

# model (NAME/N: its first N layers), devices, mesh, rows, tokens of a row, remat, micro-batches
ROWS = [
    ("qwen3-0-6b", 1, "", 4, 4096, "dots", 1),
    ("qwen3-0-6b", 1, "", 2, 8192, "full", 1),
    ("qwen3-0-6b", 1, "", 2, 4096, "none", 1),
    ("smollm2-1-7b", 1, "", 4, 4096, "full", 2),
    ("llama3-8b/4", 1, "", 4, 4096, "full", 1),
    ("smollm2-135m", 1, "", 8, 4096, "dots", 1),
    ("smollm2-1-7b", 2, "tp=2", 4, 4096, "full", 1),
    ("qwen3-30b-a3b/4", 2, "ep=2", 8, 4096, "full", 1),
    ("qwen3-0-6b", 2, "cp=2,cp_strategy=ring,cp_layout=zigzag", 2, 16384, "full", 1),
    ("qwen3-0-6b", 2, "fsdp=2", 4, 4096, "none", 1),
    ("smollm2-1-7b", 2, "fsdp=2", 8, 4096, "dots", 1),
    ("qwen3-0-6b", 2, "dp=2", 8, 4096, "dots", 1),
    ("qwen3-0-6b", 2, "fsdp=2", 16, 4096, "full", 1),
    ("qwen3-0-6b", 2, "pp=2,pp_micro_batches=2", 16, 4096, "full", 1),
    ("qwen3-0-6b", 2, "pp=2,pp_micro_batches=4", 16, 4096, "full", 1),
    ("qwen3-0-6b", 2, "pp=2,pp_micro_batches=8", 16, 4096, "full", 1),
    ("qwen3-0-6b", 2, "pp=2,pp_micro_batches=16", 16, 4096, "full", 1),
    ("qwen3-0-6b", 4, "fsdp=4", 16, 4096, "full", 1),
    ("qwen3-0-6b", 4, "pp=2,fsdp=2,pp_micro_batches=4", 16, 4096, "full", 1),
    ("qwen3-0-6b", 4, "pp=4,pp_micro_batches=8", 16, 4096, "full", 1),
    ("smollm2-1-7b", 4, "fsdp=2,tp=2", 8, 4096, "full", 1),
    ("qwen3-30b-a3b/4", 4, "fsdp=2,ep=2", 8, 4096, "full", 1),
    ("qwen3-0-6b", 4, "fsdp=2,cp=2", 4, 16384, "full", 1),
]
TURNS, STEPS = 3, 5  # medians of turns; in a turn steps are issued back to back


def model_of(name: str) -> "ModelConfig":
    """A preset, or with /N the first N of its layers."""
    from jaxscale.models.presets import preset

    whole, _, layers = name.partition("/")
    return dataclasses.replace(preset(whole), num_layers=int(layers)) if layers else preset(whole)


def measure(row: tuple) -> dict:
    """Seconds of a training step of `row`, the median over turns, and what compiling it took."""
    from jaxscale import MeshConfig, init_params, make_mesh, make_train_state, make_train_step, put_batch
    from jaxscale.config import OptimizerConfig
    from jaxscale.models import decoder
    from jaxscale.optim import make_optimizer
    from jaxscale.parallel import context
    from jaxscale.parallel.context_cost import Context
    from jaxscale.plan.estimate import pipeline_of
    from jaxscale.plan.hardware import pod_of
    from sharding_rules.rules import MEGATRON_FSDP

    name, count, mesh_text, rows, seq_len, remat, accum = row
    model, config = model_of(name), MeshConfig.parse(mesh_text)
    mesh = make_mesh(config, jax.devices()[:count])
    tx = make_optimizer(OptimizerConfig(), 1000)
    over_cp = Context(config.cp_strategy, config.cp_layout) if config.cp > 1 else None
    sizes = {"batch_size": rows, "seq_len": seq_len, "remat": remat, "accum_steps": accum, "loss_chunk": 2048}
    pipeline = pipeline_of(model, config, pod_of(jax.devices()[:count]), **sizes, rules=MEGATRON_FSDP)
    loss_fn = functools.partial(decoder.loss_fn, cfg=model, remat=remat, context=over_cp, pipeline=pipeline)
    options = context.compiler_options(jax.default_backend()) if config.cp > 1 else None
    step = make_train_step(loss_fn, tx, accum_steps=accum, compiler_options=options)
    with jax.set_mesh(mesh):
        params = init_params(jax.random.key(0), decoder.param_specs(model), mesh, MEGATRON_FSDP)
        state = make_train_state(params, tx, jax.random.key(1))
        tokens = jax.device_get(jax.random.randint(jax.random.key(2), (rows, seq_len + 1), 0, model.vocab_size))
        batch = put_batch({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, mesh)
        start = time.perf_counter()
        state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        compiled = time.perf_counter() - start
        turns = []
        for _ in range(TURNS):
            start = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            turns.append((time.perf_counter() - start) / STEPS)
    return {
        "row": row,
        "device": jax.devices()[0].device_kind,
        "seconds": statistics.median(turns),
        "spread": max(turns) / min(turns) - 1,
        "compile_seconds": compiled,
        "loss": loss,
    }


def table(path: Path) -> str:
    """Markdown: each measured row beside today's estimate."""
    from jaxscale.config import MeshConfig
    from jaxscale.plan.estimate import estimate

    lines = [
        "| model | devices | mesh | rows x tokens | remat | measured ms | estimate | | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for record in map(json.loads, path.read_text().splitlines()):
        name, count, mesh, rows, seq_len, remat, accum = record["row"]
        kind = record["device"].lower().split()[1]  # "NVIDIA H200"
        guess = estimate(
            model_of(name),
            MeshConfig.parse(mesh),
            f"{kind}:1x{count}",
            batch_size=rows,
            seq_len=seq_len,
            remat=remat,
            accum_steps=accum,
        )
        micro = f", {accum} micro-batches" if accum > 1 else ""
        seconds = record["seconds"]
        lines.append(
            f"| {name} | {count} {kind} | {mesh or '-'} | {rows} x {seq_len}{micro} | {remat} | {seconds * 1e3:.0f} | "
            f"{guess.seconds * 1e3:.0f} | {guess.seconds / seconds - 1:+.1%} | {rows * seq_len / seconds:,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="rows that hold this text")
    parser.add_argument("--out", type=Path, default=Path("steps.jsonl"))
    parser.add_argument("--table", type=Path, help="print the table of a file that --out wrote")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    for row in ROWS:
        if row[1] == len(jax.devices()) and args.rows in "|".join(map(str, row)):
            record = measure(row)
            print(json.dumps(record), flush=True)
            with args.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            jax.clear_caches()


if __name__ == "__main__":
    main()
