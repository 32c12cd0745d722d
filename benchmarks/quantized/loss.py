r"""Validation loss of runs in 8 bits beside the same runs in bfloat16, over seeds, on real text.

    python benchmarks/quantized/loss.py                                       # a small model on a CPU; some minutes
    python benchmarks/quantized/loss.py --model smollm2-135m --source stdlib \
        --lr 1e-3 --steps 600 --seq-len 1024                                  # on a GPU

Without --model, one of 0.5 M parameters, on the source of asyncio, byte by byte. Each seed draws other parameters and
reads the text in another order; runs of one seed differ in their matmuls alone. Validated in bfloat16, as it would be
used.
"""

import argparse
import asyncio
import dataclasses
import json
import pathlib
import statistics
import sys
import tempfile

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
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.model}, seeds {args.seeds}")
    print(f"{args.steps} steps of {args.rows} x {args.seq_len} bytes, bits per byte:")
    exact = [validation_loss("", seed, args) for seed in args.seeds]
    print("bf16        " + " ".join(f"{x:.4f}" for x in exact), flush=True)
    for precision in args.precisions:
        got = [validation_loss(precision, seed, args) for seed in args.seeds]
        change = [b / a - 1 for a, b in zip(exact, got)]
        print(
            f"{precision:12}"
            + " ".join(f"{x:.4f}" for x in got)
            + "   "
            + " ".join(f"{x:+.2%}" for x in change)
            + f"   mean {statistics.mean(change):+.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
