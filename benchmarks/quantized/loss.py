r"""Validation loss of runs in 8 bits beside the same runs in bfloat16, over seeds, on real text.

    python benchmarks/quantized/loss.py                                       # a small model on a CPU; some minutes
    python benchmarks/quantized/loss.py --model smollm2-135m --source stdlib \
        --lr 4e-4 --steps 500 --seq-len 1024 --rows 8                         # on a GPU

Without --model, one of 0.5 M parameters, on the source of asyncio, byte by byte. Each seed draws other parameters and
reads the text in another order; runs of one seed differ in their matmuls alone, which is enough for 0.7 % of loss
either way: only many seeds tell. Validated in bfloat16, as it would be used.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
from rich.console import Console

from jaxscale import runs
from jaxscale.config import DataConfig
from jaxscale.models.presets import preset
from jaxscale.run import run

SOURCE = str(pathlib.Path(asyncio.__file__).parent)


def validation_loss(precision: str, seed: int, args: argparse.Namespace) -> float:
    """Bits per byte of held-out text after the last step."""
    cfg, steps = runs.tiny(), args.steps
    with tempfile.TemporaryDirectory() as out:
        cfg = dataclasses.replace(
            cfg,
            out=out,
            steps=steps,
            precision=precision,
            seed=seed,
            model=dataclasses.replace(preset(args.model), dtype="bfloat16", vocab_size=256, max_seq_len=args.seq_len),
            data=DataConfig(source=args.source, seq_len=args.seq_len, batch_size=args.rows, seed=seed, holdout=0.1),
            optimizer=dataclasses.replace(
                cfg.optimizer,
                learning_rate=args.lr,
                warmup_steps=min(cfg.optimizer.warmup_steps, steps // 10),
            ),
            checkpoint=dataclasses.replace(cfg.checkpoint, every=steps),
            eval_every=steps,
            eval_batches=32,
        )
        run(cfg, console=Console(quiet=True))
        lines = [json.loads(line) for line in (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line["valid_bits_per_byte"] for line in lines if "valid_bits_per_byte" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="*", default=["fp8", "fp8-current", "int8"])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--model", default="tiny", help="a preset")
    parser.add_argument("--source", default=SOURCE, help="stdlib, a folder or a file of text")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    names = ["bf16", *args.precisions]
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.model}, ", end="")
    print(f"{args.steps} steps of {args.rows} x {args.seq_len}")
    print("bits per byte" + "".join(f"{name:>16}" for name in names))
    changes = []
    for seed in args.seeds:
        losses = []
        for name in names:
            losses.append(validation_loss("" if name == "bf16" else name, seed, args))
        changes.append([loss / losses[0] - 1 for loss in losses[1:]])
        print(f"seed {seed:<8}" + "".join(f"{loss:16.4f}" for loss in losses), flush=True)
    print(f"{'beside bf16':29}" + "".join(f"{summary(column):>16}" for column in zip(*changes)))


def summary(changes: Sequence[float]) -> str:
    """Their mean, and its standard error where there are several."""
    mean = f"{statistics.mean(changes):+.2%}"
    return f"{mean} ± {statistics.stdev(changes) / len(changes) ** 0.5:.2%}" if len(changes) > 1 else mean


if __name__ == "__main__":
    main()
