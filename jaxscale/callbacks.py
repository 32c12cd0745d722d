"""What a run writes and shows: progress, metrics.jsonl, TensorBoard events, loss.png, validation, checkpoints."""

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jax
import numpy as np

from jaxscale.train import Callback, TrainState

if TYPE_CHECKING:
    from jaxscale.checkpoint import Levels


class Validate(Callback):
    """Mean loss over the same held-out batches each time, in nats per token and in bits per byte of text.

    Args:
      eval_step: (params, batch) -> (nll, weight): mean loss over `weight` labelled tokens.
      batches: makes the held-out batches, each time the same ones.
      num_bytes: how many bytes of text their labels stand for, all processes together: bits per byte follow, which no
        tokenizer can flatter.
    """

    def __init__(
        self,
        eval_step: Callable[..., tuple[jax.Array, jax.Array]],
        batches: Callable[[], Iterable[Any]],
        num_bytes: float,
        every: int,
    ):
        self.eval_step, self.batches, self.num_bytes, self.every = eval_step, batches, num_bytes, every

    def on_state(self, step: int, state: TrainState) -> dict[str, float]:
        parts = [self.eval_step(state.params, batch) for batch in self.batches()]
        nll, weight = (np.asarray(column, np.float64) for column in zip(*jax.device_get(parts)))
        nats = float((nll * weight).sum())
        return {"valid_loss": nats / float(weight.sum()), "valid_bits_per_byte": nats / math.log(2) / self.num_bytes}


class Checkpoints(Callback):
    """Saves the state, asynchronously, as often as each level asks, at the end, and when the run is preempted."""

    def __init__(self, levels: "Levels", metadata: Callable[[int], dict[str, Any]]):
        self.levels, self.metadata, self.every = levels, metadata, levels.every
        self.last, self.safe = -1, False

    def on_start(self, step: int, steps: int) -> None:
        self.last = steps

    def on_state(self, step: int, state: TrainState) -> None:
        self.safe = step == self.last
        self.levels.save(step, state, metadata=self.metadata(step), everywhere=self.safe)

    def on_preempt(self, step: int, state: TrainState) -> None:
        self.safe = True
        self.levels.save(step, state, metadata=self.metadata(step), everywhere=True)
        self.levels.wait()

    def on_end(self) -> None:
        """After an error what is in the keepers' memory stays there, for the run that comes back."""
        self.levels.__exit__(*((None, None, None) if self.safe else sys.exc_info()))


class MetricsFile(Callback):
    """One JSON object a step in metrics.jsonl. A resumed run first drops the lines that it will write again."""

    def __init__(self, path: Path):
        self.path = path
        self.file: IO[str] | None = None

    def on_start(self, step: int, steps: int) -> None:
        kept = [m for m in read_metrics(self.path) if m["step"] <= step]
        write_whole(self.path, "".join(json.dumps(m) + "\n" for m in kept))
        self.file = self.path.open("a")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if self.file:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()

    def on_end(self) -> None:
        if self.file:
            self.file.close()


class TensorBoard(Callback):
    """Scalars for `tensorboard --logdir`, a step in every `log_every`."""

    def __init__(self, directory: Path, log_every: int):
        self.directory, self.log_every = directory, log_every
        self.writer: Any = None

    def on_start(self, step: int, steps: int) -> None:
        from tensorboardX import SummaryWriter

        self.writer = SummaryWriter(str(self.directory), purge_step=step + 1)

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if step % self.log_every == 0 or "valid_loss" in metrics:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def on_end(self) -> None:
        if self.writer:
            self.writer.close()


class Profile(Callback):
    """A trace of three steps, from `at` on, for TensorBoard's profile page, XProf or Perfetto. Each process writes its
    own; what the first step compiles is in it where that is among them."""

    def __init__(self, console: Any, directory: Path, at: int):
        self.console, self.directory, self.at = console, directory, at
        self.running = False

    def on_start(self, step: int, steps: int) -> None:
        self.on_metrics(step, {})

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.at - 1 and not self.running:
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.directory)
            self.running = True
        elif step >= self.at + 2:
            self.on_end()

    def on_end(self) -> None:
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            self.console.print(
                f"steps from {self.at} on are profiled: tensorboard --logdir {self.directory} (with `pip install "
                f"xprof`), or {self.directory}/plugins/profile/*/*.trace.json.gz in ui.perfetto.dev",
                highlight=False,
            )


class LossPlot(Callback):
    """loss.png beside metrics.jsonl, drawn when the run ends for whatever reason."""

    def __init__(self, metrics: Path, picture: Path):
        self.metrics, self.picture = metrics, picture

    def on_end(self) -> None:
        plot_loss(read_metrics(self.metrics), self.picture)


class Progress(Callback):
    """A progress bar with loss, tokens/s, TFLOP/s, share of peak and memory; a table of step times at the end.

    Without a terminal it prints a plain line every `log_every` steps instead.
    """

    def __init__(self, console: Any, tokens_per_step: int, flops_per_step: float, peak: float | None, log_every: int):
        self.console, self.tokens, self.flops, self.peak = console, tokens_per_step, flops_per_step, peak
        self.log_every = log_every
        self.times: list[float] = []
        self.recent: deque[float] = deque(maxlen=20)
        self.bar: Any = None
        self.task: Any = None
        self.valid = ""

    def on_start(self, step: int, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.steps = steps
        if self.console.is_terminal:
            columns = ("[bold]train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("train", total=steps, completed=step, text="compiling")

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        if "valid_bits_per_byte" in metrics:
            self.valid = f"  valid {metrics['valid_bits_per_byte']:.3f} bits/byte"
            self.console.print(f"step {step:>6}{self.valid}", highlight=False)
        if "seconds" not in metrics:
            return
        self.times.append(metrics["seconds"])
        self.recent.append(metrics["seconds"])
        if self.bar is None and step % self.log_every and step != self.steps:
            return
        rate = 1.0 / max(float(np.median(self.recent)), 1e-9)
        text = f"loss {metrics['loss']:.3f}  {self.tokens * rate:,.0f} tok/s  {self.flops * rate / 1e12:.3g} TFLOP/s"
        if self.peak:
            text += f"  {self.flops * rate / self.peak:.1%} of peak"
        memory = device_memory()
        if memory:
            text += f"  {memory / 2**30:.1f} GiB"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
        else:
            self.console.print(f"step {step:>6}  {text}", highlight=False)

    def on_end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        if len(self.times) > 2:
            p = np.percentile(self.times[1:], [50, 90, 99]) * 1e3  # the first step compiles
            self.console.print(
                f"step time p50 {p[0]:.0f} ms, p90 {p[1]:.0f} ms, p99 {p[2]:.0f} ms over {len(self.times) - 1} steps; "
                f"first step (with compilation) {self.times[0]:.1f} s",
                highlight=False,
            )


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; what a crash cut off or left as other bytes is left out."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [m for m in out if isinstance(m, dict) and "step" in m]


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or as it was, whenever the process ends."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_text(text)
    part.replace(path)


def plot_loss(metrics: list[dict[str, float]], picture: Path, marks: dict[str, float] | None = None) -> None:
    """Training loss and validation bits per byte by step; `marks` are vertical lines, name -> step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    valid = [(m["step"], m["valid_bits_per_byte"]) for m in metrics if "valid_bits_per_byte" in m]
    if not train:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*train), lw=0.8, color="tab:blue", label="training loss (nats per token)")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    lines = axes.get_lines()[:]
    if valid:
        right = axes.twinx()
        lines += right.plot(*zip(*valid), "o-", ms=4, color="tab:orange", label="validation (bits per byte)")
        right.set_ylabel("bits per byte")
        right.annotate(f"{valid[-1][1]:.3f}", valid[-1], textcoords="offset points", xytext=(-6, 8), ha="right")
    for name, step in (marks or {}).items():
        axes.axvline(step, ls="--", lw=1, color="gray")
        axes.annotate(name, (step, axes.get_ylim()[1]), textcoords="offset points", xytext=(4, -12), color="gray")
    axes.legend(handles=lines)
    axes.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def device_memory() -> int | None:
    """Bytes in use on this process's first device, where the backend says."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_in_use") if stats else None


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device by its vendor's datasheet; None for a device that is not listed."""
    for name, teraflops in _PEAK_TERAFLOPS.items():
        if name in device_kind:
            return teraflops * 1e12
    return None


_PEAK_TERAFLOPS = {  # the first name that the device's kind holds
    "B200": 2250,
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "TPU7x": 2307,
    "TPU v6": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v4": 275,
}
