"""A training step compiled on a machine without accelerator, carried to one that has it, and run beside jit's.

python benchmarks/plan/stored.py --write step.bin --on h200:1x1    # here; needs jax[cuda13] or jax[tpu]
python benchmarks/plan/stored.py --run step.bin                    # there
"""

import argparse
import functools
import statistics
import time
from pathlib import Path

import jax
import numpy as np

MODEL, ROWS, SEQ_LEN, REMAT = "qwen3-0-6b", 4, 4096, "dots"
TURNS, STEPS = 3, 5


def write(path: Path, on: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    from jaxscale.config import MeshConfig
    from jaxscale.models.presets import preset
    from jaxscale.plan.aot import compile_step
    from jaxscale.plan.stored import save_step

    compiled = compile_step(preset(MODEL), MeshConfig(fsdp=-1), on, batch_size=ROWS, seq_len=SEQ_LEN, remat=REMAT)
    size = save_step(compiled, path).stat().st_size
    print(f"{on}: traced and compiled in {compiled.trace_seconds + compiled.compile_seconds:.0f} s, {size:,} B")


def run(path: Path) -> None:
    from jaxscale import MeshConfig, init_params, make_mesh, make_train_state, make_train_step, put_batch
    from jaxscale.config import OptimizerConfig
    from jaxscale.models import decoder
    from jaxscale.models.presets import preset
    from jaxscale.optim import make_optimizer
    from jaxscale.plan.stored import load_step
    from sharding_rules.rules import MEGATRON_FSDP

    cfg, mesh = preset(MODEL), make_mesh(MeshConfig(fsdp=-1))
    tx = make_optimizer(OptimizerConfig(), 1000)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (ROWS, SEQ_LEN + 1), dtype=np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "segment_ids": np.ones((ROWS, SEQ_LEN), np.int32),
        "positions": np.tile(np.arange(SEQ_LEN, dtype=np.int32), (ROWS, 1)),
    }
    loss_fn = functools.partial(decoder.loss_fn, cfg=cfg, remat=REMAT, rules=MEGATRON_FSDP)

    def fresh_state():
        params = init_params(jax.random.key(0), decoder.param_specs(cfg), mesh, MEGATRON_FSDP)
        return make_train_state(params, tx, jax.random.key(1))

    with jax.set_mesh(mesh):
        batch = put_batch(batch, mesh)
        for name in ("carried", "jit"):
            state = fresh_state()
            jax.block_until_ready((state, batch))
            start = time.perf_counter()
            step = load_step(path, mesh) if name == "carried" else make_train_step(loss_fn, tx)
            state, metrics = step(state, batch)
            losses = [float(metrics["loss"])]
            first = time.perf_counter() - start
            print(f"{name}: {first:.2f} s to the first loss, {losses[0]}", flush=True)
            for _ in range(3):
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            norm, turns = float(metrics["grad_norm"]), []
            for _ in range(TURNS):
                start = time.perf_counter()
                for _ in range(STEPS):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
                turns.append((time.perf_counter() - start) / STEPS)
            print(
                f"{jax.devices()[0].device_kind}, {name}: "
                f"{statistics.median(turns) * 1e3:.1f} ms a step, losses {losses}, gradient norm {norm:.6f}",
                flush=True,
            )
            del state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--on", default="h200:1x1")
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    if args.write:
        write(args.write, args.on)
    if args.run:
        run(args.run)


if __name__ == "__main__":
    main()
