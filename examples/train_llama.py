"""Llama 3.1 8B on a pod or a cluster: `jaxscale train llama3_8b` as a script to copy and change.

Look first, without a device; then at a small size on a laptop:

    python examples/train_llama.py --dry-run --devices 64          memory, shardings and tokens per step
    python examples/train_llama.py --smoke                         small sizes on 8 simulated devices, 20 steps

Slurm, 8 nodes of 8 GPUs. `srun` starts a process for each GPU; JAX finds the others by what Slurm sets. Slurm warns two
minutes before it takes the nodes, the run saves itself, leaves with 75 and is put back into the queue:

    #!/bin/bash
    #SBATCH --nodes=8 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=12 --exclusive
    #SBATCH --signal=TERM@120 --requeue --open-mode=append
    srun .venv/bin/python examples/train_llama.py --text /shared/corpus --out /shared/runs/llama3-8b
    [ $? -eq 75 ] && scontrol requeue $SLURM_JOB_ID

TPU pod (v5p-128: 64 chips), the same command on all of its hosts:

    gcloud compute tpus tpu-vm ssh $NAME --worker=all --command \\
        "cd jaxscale && .venv/bin/python examples/train_llama.py --text /mnt/corpus --out /mnt/runs/llama3-8b"

GKE: a Job with completionMode: Indexed, a headless service, `google.com/tpu: 4` (or `nvidia.com/gpu: 8`) in each pod, a
restartPolicy of OnFailure, and

    command: [python, examples/train_llama.py, --text, /mnt/corpus, --out, /mnt/runs/llama3-8b]

On TPU slices JAX finds the pods by what GKE sets; on GPUs it asks Kubernetes (pip install jax[k8s]), unless the three
variables of the next paragraph are set.

Plain hosts, on host number $I of 8, the first of which is 10.0.0.1:

    JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=8 JAX_PROCESS_ID=$I \\
        python examples/train_llama.py --text /shared/corpus --out /shared/runs/llama3-8b

Text and --out lie where all hosts see them. SIGTERM saves and exits with 75; the same command resumes, on other numbers
of hosts too.
"""

import argparse
import dataclasses
import math
import sys

import jax

from jaxscale import MeshConfig, TrainConfig, distributed, make_abstract_mesh, runs
from jaxscale.cli import EXIT_PREEMPTED
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from jaxscale.params import path_name, resolve_param
from jaxscale.run import run
from jaxscale.table import Table, human_bytes
from jaxscale.train import Preempted, abstract_train_state
from sharding_rules.rules import MEGATRON_FSDP


def main() -> int:
    options = parse_options()
    cfg = config(options)
    if options.dry_run:
        dry_run(cfg, options.devices)
        return 0
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    else:
        distributed.initialize()
    try:
        run(cfg)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


def config(options: argparse.Namespace) -> TrainConfig:
    cfg = runs.llama3_8b()
    if options.smoke:
        cfg = shrink(cfg)
    changes = {name: getattr(options, name) for name in ("out", "steps") if getattr(options, name) is not None}
    data = dataclasses.replace(cfg.data, source=options.text or cfg.data.source)
    mesh = MeshConfig.parse(options.mesh) if options.mesh else cfg.mesh
    return dataclasses.replace(cfg, data=data, mesh=mesh, **changes)


def shrink(cfg: TrainConfig) -> TrainConfig:
    """The same architecture, mesh axes and options with sizes for a laptop."""
    sizes = {"vocab_size": 256, "num_layers": 2, "embed_dim": 64, "mlp_dim": 128, "num_heads": 8, "num_kv_heads": 4}
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, **sizes, head_dim=16, max_seq_len=512, dtype="float32"),
        out="runs/llama3-smoke",
        steps=20,
        data=dataclasses.replace(cfg.data, seq_len=64, batch_size=16, tokenizer="bytes"),
        optimizer=dataclasses.replace(cfg.optimizer, learning_rate=3e-3, warmup_steps=5),
        checkpoint=dataclasses.replace(cfg.checkpoint, every=10, keep_every=None),
        eval_every=10,
        eval_batches=2,
        log_every=5,
    )


def dry_run(cfg: TrainConfig, num_devices: int) -> None:
    """What every device would hold, from shapes alone: nothing is allocated and no device is needed."""
    sizes = cfg.mesh.fill(num_devices)
    sizes.check_model(cfg.model)
    mesh = make_abstract_mesh(sizes)
    specs = decoder.param_specs(cfg.model)
    state = abstract_train_state(specs, make_optimizer(cfg.optimizer, cfg.steps), mesh)

    rows = []
    for (path, spec), array in zip(jax.tree.leaves_with_path(specs), jax.tree.leaves(state.params), strict=True):
        where, notes = array.sharding.spec, resolve_param(spec, mesh, MEGATRON_FSDP).notes
        shape = " x ".join(f"{axis or ''}={n}" for axis, n in zip(spec.axes, spec.shape))
        rows.append((path_name(path), shape, str(where), human_bytes(bytes_per_device(array)), "; ".join(notes)))
    print(Table(f"{cfg.model.name} on {sizes}", ("parameter", "shape", "split", "per device", ""), rows))

    params, moments = (sum(map(bytes_per_device, jax.tree.leaves(x))) for x in (state.params, state.opt_state))
    tokens = cfg.data.batch_size * cfg.data.seq_len
    flops = cfg.model.flops_per_token(cfg.data.seq_len) * tokens
    print(
        f"\n{sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)):,} parameters\n"
        f"per device: parameters {human_bytes(params)} + optimizer state {human_bytes(moments)} "
        f"= {human_bytes(params + moments)}; gradients ({human_bytes(params)}) and activations come on top\n"
        f"{tokens:,} tokens per step: {cfg.data.batch_size} rows of {cfg.data.seq_len}; "
        f"{flops / num_devices / 1e12:,.0f} TFLOP per device and step"
    )


def bytes_per_device(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a directory, .jsonl or text file that every host sees")
    parser.add_argument("--out", help="where the run goes; every host sees it")
    parser.add_argument("--mesh", help="axis=size, ...; default fsdp=-1,tp=4")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--dry-run", action="store_true", help="print what each device would hold, and stop")
    parser.add_argument("--smoke", action="store_true", help="small sizes on simulated devices")
    parser.add_argument("--devices", type=int, help="of --dry-run (64) and of --smoke (8)")
    options = parser.parse_args()
    options.devices = options.devices or (64 if options.dry_run else 8)
    return options


if __name__ == "__main__":
    sys.exit(main())
