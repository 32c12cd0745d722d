"""How much of a training step of the tiny model is spent inside the compiled function: the rest is our host code.

    python benchmarks/step_overhead.py [--steps 60] [--mesh fsdp=8]

`fit` runs the real loop (loader, device_put, metrics, metrics.jsonl) and its wall time per step is compared with the
compiled function called alone on a batch that is already there, both over the same state. On a machine that does
other work as well, pairs of the two are taken in turns and the medians compared.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

from jaxscale import MeshConfig, fit, init_params, make_mesh, make_train_state, make_train_step, put_batch, runs
from jaxscale.callbacks import MetricsFile
from jaxscale.data import make_dataset
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from sharding_rules.rules import MEGATRON_FSDP

BLOCK = 10  # steps measured at a time, in turns


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--mesh", default="fsdp=8")
    options = parser.parse_args()

    cfg = runs.tiny()
    mesh = make_mesh(MeshConfig.parse(options.mesh))
    data = make_dataset(cfg.data)
    optimizer = make_optimizer(cfg.optimizer, options.steps)
    step = make_train_step(lambda params, batch: decoder.loss_fn(params, batch, cfg.model), optimizer)
    batches = (put_batch(batch, mesh) for batch in data.batches())
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        params = init_params(jax.random.key(0), decoder.param_specs(cfg.model), mesh, MEGATRON_FSDP)
        state = make_train_state(params, optimizer, jax.random.key(1))
        state, _ = step(state, next(batches))
        metrics = MetricsFile(Path(folder) / "metrics.jsonl")
        inside, loop = [], []
        for _ in range(options.steps // BLOCK):
            batch = jax.block_until_ready(next(batches))
            start = time.perf_counter()
            for _ in range(BLOCK):
                state, result = step(state, batch)
                jax.block_until_ready(result)
            inside.append((time.perf_counter() - start) / BLOCK)
            start = time.perf_counter()
            state = fit(state, step, batches, steps=int(state.step) + BLOCK, callbacks=[metrics])
            loop.append((time.perf_counter() - start) / BLOCK)
    share = statistics.median(inside) / statistics.median(loop)
    device = jax.devices()[0].device_kind
    print(
        f"jax {jax.__version__}, {jax.device_count()} x {device}, mesh {options.mesh}, "
        f"{options.steps} steps in turns of {BLOCK}"
    )
    print(f"compiled function alone {statistics.median(inside) * 1e3:.1f} ms (min {min(inside) * 1e3:.1f})")
    print(f"step of the whole loop  {statistics.median(loop) * 1e3:.1f} ms (min {min(loop) * 1e3:.1f})")
    print(f"inside the compiled function: {min(1.0, share):.1%} (goal: at least 95 %)")
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
