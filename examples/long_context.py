"""Trains a small decoder on packed long rows, the sequence split over devices.

    python examples/long_context.py                             # all devices over cp
    python examples/long_context.py --mesh fsdp=2,cp=4,cp_strategy=ring,cp_layout=packed
    python examples/long_context.py --simulate 4 --seq-len 2048 --steps 20    # four simulated devices of the CPU

Rows are text, by default the running Python's own source, many files in each: documents of any length, which no equal
cut of the row balances. The first lines say which strategy and layout were chosen, and why.
"""

import argparse
import dataclasses

import jax
from rich.console import Console

from jaxscale.config import DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxscale.run import run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=MeshConfig.parse, default=MeshConfig(cp=-1))
    parser.add_argument("--seq-len", type=int, default=65536)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--text", default="stdlib", help="a directory of text instead of Python's source")
    parser.add_argument("--out", default="runs/long_context")
    parser.add_argument("--simulate", type=int, help="train on this many simulated devices of the CPU")
    args = parser.parse_args()
    if args.simulate:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.simulate)
    mesh = args.mesh
    if (mesh.cp_strategy, mesh.cp_layout) == (MeshConfig.cp_strategy, MeshConfig.cp_layout):
        mesh = dataclasses.replace(mesh, cp_strategy="auto", cp_layout="auto")
    model = ModelConfig(
        vocab_size=256 + 1,
        num_layers=4,
        embed_dim=256,
        mlp_dim=768,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_seq_len=args.seq_len,
    )
    rows = max(1, mesh.dp * mesh.fsdp * mesh.ep)
    run(
        TrainConfig(
            model=model,
            mesh=mesh,
            out=args.out,
            steps=args.steps,
            remat="full",
            data=DataConfig(source=args.text, seq_len=args.seq_len, batch_size=rows),
        ),
        console=Console(),
    )


if __name__ == "__main__":
    main()
