"""The whole story on a laptop: train on real text over eight simulated devices, be preempted, resume, reshard, speak.

    make demo                                          (or: python examples/train_tiny.py)
    python examples/train_tiny.py --text ~/my-notes    any directory of text in place of Python's own source
    python examples/train_tiny.py --steps 20           a quick look

Leaves in demo_out/: loss.png, meshes.png, metrics.jsonl, tensorboard/, checkpoints/. Exits with 1 if a check fails.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from rich.console import Console

from jaxscale import MeshConfig, TrainConfig, runs
from jaxscale.callbacks import plot_loss, read_metrics
from jaxscale.cli import EXIT_PREEMPTED
from jaxscale.generate import generate
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.run import load_run

console = Console(width=110)
GOAL = 3.2  # bits per byte on held-out text
MESHES = {"fsdp=8": DEVICES, "dp=2,tp=4": DEVICES, "one device": 1}


def main() -> int:
    options = parse_options()
    started = time.monotonic()
    out = Path(options.out)
    if (out / "config.json").exists():
        shutil.rmtree(out)

    console.rule("1. train, until SIGTERM arrives halfway")
    killed_at = train_and_preempt(options, out)
    console.rule("2. the same command again: it resumes by itself")
    run_to_end(options)

    metrics = read_metrics(out / "metrics.jsonl")
    bits = [m["valid_bits_per_byte"] for m in metrics if "valid_bits_per_byte" in m][-1]
    steps = [m["step"] for m in metrics if "loss" in m]
    plot_loss(metrics, out / "loss.png", {f"preempted at {killed_at}": killed_at})

    console.rule("3. the final checkpoint on other meshes: the same logits")
    spread = compare_meshes(out)
    console.rule("4. generate")
    show_samples(out)

    minutes = (time.monotonic() - started) / 60
    checks = {
        f"every step ran exactly once, over a preemption at {killed_at}": steps == list(range(1, len(steps) + 1)),
        f"logits on {', '.join(MESHES)} agree within {spread:.1e} of the largest (goal: 1e-5)": spread <= 1e-5,
    }
    if options.steps is None:  # a run cut short is not held to the goal, and does not claim it
        checks[f"validation {bits:.3f} bits per byte (goal: below {GOAL})"] = bits < GOAL
    console.rule()
    for text, ok in checks.items():
        console.print(f"{'[green]✓[/]' if ok else '[red]✗[/]'} {text}", highlight=False)
    console.print(f"{minutes:.1f} minutes; pictures: {out}/loss.png, {out}/meshes.png", highlight=False)
    return 0 if all(checks.values()) else 1


def train_and_preempt(options: argparse.Namespace, out: Path) -> int:
    """Start the run as a process of its own and send SIGTERM when half of its steps are done."""
    half = (options.steps or config().steps) // 2
    process = subprocess.Popen(command(options), stderr=subprocess.STDOUT)
    while process.poll() is None and last_step(out) < half:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    status = process.wait()
    if status != EXIT_PREEMPTED:
        sys.exit(f"the run ended with status {status}; expected {EXIT_PREEMPTED} after SIGTERM")
    return last_step(out)


def run_to_end(options: argparse.Namespace) -> None:
    status = subprocess.call(command(options))
    if status:
        sys.exit(f"the resumed run ended with status {status}")


def compare_meshes(out: Path) -> float:
    """Restore onto each mesh, draw where a parameter lies, and return the largest difference between their logits.

    It is given as a part of the largest logit: what float32 rounds off grows with the numbers that it adds.
    """
    logits, pictures = {}, {}
    for name, num_devices in MESHES.items():
        mesh = make_mesh(MeshConfig.parse("" if num_devices == 1 else name), jax.devices()[:num_devices])
        started = time.monotonic()
        run = load_run(out, mesh)
        tokens = np.arange(2 * 64, dtype=np.int32).reshape(2, 64) % run.cfg.vocab_size
        with jax.set_mesh(mesh):
            forward = jax.jit(lambda params, tokens, cfg=run.cfg: decoder.forward(params, tokens, cfg))
            logits[name] = jax.device_get(forward(run.params, tokens))
        pictures[name] = run.params["layers"]["mlp"]["w_up"]
        console.print(f"restored onto {name} in {time.monotonic() - started:.1f} s", highlight=False)
    draw_meshes(pictures, out / "meshes.png")
    first, *others = logits.values()
    return max(float(np.abs(first - other).max()) for other in others) / float(np.abs(first).max())


def show_samples(out: Path) -> None:
    mesh = make_mesh(fsdp=-1, tp=2)
    run = load_run(out, mesh)
    prompts = ["def ", "class ", "import os\n\n", "    for "]
    ids = [[run.tokenizer.bos_id, *run.tokenizer.encode(text).tolist()] for text in prompts]
    new_ids = generate(
        run.params, run.cfg, ids, max_new_tokens=48, temperature=0.7, top_p=0.95, key=jax.random.key(0), mesh=mesh
    )
    for text, new in zip(prompts, new_ids):
        console.print(text + run.tokenizer.decode(np.asarray(new)), style="cyan", highlight=False, markup=False)
        console.print()


def draw_meshes(arrays: dict[str, jax.Array], picture: Path) -> None:
    """Which device holds which part of one layer's w_up [D, F], for each mesh."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(arrays), figsize=(4 * len(arrays), 3.4), layout="constrained")
    for axes, (name, array) in zip(panels, arrays.items()):
        _, rows, columns = array.shape
        held: dict[tuple[int, int, int, int], list[int]] = {}
        for shard in array.addressable_shards:
            _, r, c = shard.index
            box = (r.start or 0, r.stop or rows, c.start or 0, c.stop or columns)
            held.setdefault(box, []).append(shard.device.id)
        for i, ((top, bottom, left, right), ids) in enumerate(sorted(held.items())):
            color = plt.get_cmap("tab10" if len(held) <= 10 else "tab20")(i % 20)
            axes.add_patch(
                plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="white", lw=2)
            )
            text = ",".join(map(str, sorted(ids)))
            axes.text((left + right) / 2, (top + bottom) / 2, text, ha="center", va="center", color="white", fontsize=9)
        axes.set(xlim=(0, columns), ylim=(rows, 0), title=name, xlabel="mlp", ylabel="embed")
    figure.suptitle("Which devices hold which part of w_up [embed, mlp]")
    figure.savefig(picture, dpi=110)


def command(options: argparse.Namespace) -> list[str]:
    run = [sys.executable, "-m", "jaxscale.cli", "train", f"{__file__}:config", "--simulate", str(DEVICES)]
    run += ["--out", options.out]
    run += ["--data.source", options.text] if options.text else []
    return run + (["--steps", str(options.steps)] if options.steps else [])


def config() -> TrainConfig:
    """The demo's run: every number of it can be changed on the command line."""
    return runs.tiny()


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except json.JSONDecodeError:
        return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo_out", help="where the run goes; a run that is there is replaced")
    parser.add_argument("--text", help="a directory of text (default: the running Python's own source)")
    parser.add_argument("--steps", type=int, help="stop early; the goal for validation is then not checked")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
