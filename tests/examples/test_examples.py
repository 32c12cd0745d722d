"""The examples run, at a small size, as their users run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS = 300  # for one example on a busy machine


@pytest.fixture
def text(tmp_path, rng) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    words = ["the", "mesh", "splits", "every", "array", "and", "no", "number", "changes"]
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    return folder


def python(*arguments, **env: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_demo(text, tmp_path):
    """Its own checks decide: preempted and resumed, every step once, equal logits on three meshes."""
    out = python(EXAMPLES / "train_tiny.py", "--text", text, "--steps", 12, "--out", tmp_path / "demo")
    assert "preempted: saved at step" in out
    assert "resumed from step" in out
    assert out.count("✓") == 2  # steps, logits; a short run claims nothing of its loss
    assert "bits per byte (goal" not in out
    for picture in ("loss.png", "meshes.png"):
        assert (tmp_path / "demo" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_flax_nnx(text):
    """The same model on two meshes: held in parts as the mesh says, and the same losses."""
    sizes = {"steps": 11, "dim": 32, "length": 32, "depth": 1, "simulate": 8}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    bits = []
    for mesh, parts, key in (("fsdp=8", 8, "P('fsdp', None, None)"), ("dp=2,fsdp=2,tp=2", 2, "P('fsdp', 'tp', None)")):
        out = python(EXAMPLES / "flax_nnx.py", *options, "--text", text, "--mesh", mesh)
        counts = re.search(r"([\d,]+) parameters .* holds ([\d,]+)", out)
        assert counts is not None, out
        total, held = (int(n.replace(",", "")) for n in counts.groups())
        assert held * parts <= total, out
        assert f"blocks/0/attn/key/kernel: (32, 4, 8) as {key}" in out
        bits.append([float(b) for b in re.findall(r"([\d.]+) bits per byte", out)])
    assert len(bits[0]) == 3 and bits[0][-1] < bits[0][0] - 1
    assert bits[0] == pytest.approx(bits[1], abs=0.003)


@pytest.mark.slow
def test_train_llama_smoke(text, tmp_path):
    run = tmp_path / "run"
    python(EXAMPLES / "train_llama.py", "--smoke", "--text", text, "--out", run, "--steps", 6)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5
    config = json.loads((run / "config.json").read_text())
    assert config["mesh"]["tp"] == 4 and config["remat"] == "full"  # what the 8B run does, at a small size


@pytest.mark.slow
def test_train_moe(text):
    """Eight simulated devices, experts over four of them: it learns, drops nothing and places its experts."""
    out = python(EXAMPLES / "train_moe.py", "--steps", 11, "--text", text)
    losses = [float(x) for x in re.findall(r"nll ([\d.]+)", out)]
    assert losses[-1] < losses[0] - 1
    assert set(re.findall(r"router_dropped ([\d.]+)", out)) == {"0.000"}
    assert "mesh fsdp=2,ep=4" in out and "placed" in out


@pytest.mark.slow
def test_long_context(text, tmp_path):
    """It says what it chose for packed rows over cp, and learns."""
    mesh = ("--simulate", 4, "--mesh", "fsdp=2,cp=2")
    sizes = ("--seq-len", 256, "--steps", 8)
    out = python(EXAMPLES / "long_context.py", *mesh, *sizes, "--text", text, "--out", tmp_path / "run")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.5
    assert re.search(r"(ring|all_gather|ulysses|bidirectional)", out), out


def test_train_llama_dry_run():
    out = python(EXAMPLES / "train_llama.py", "--dry-run", "--devices", 1024, "--mesh", "fsdp=128,tp=8")
    assert "8,030,261,248 parameters" in out  # of Llama 3.1 8B
    held = 8_030_261_248 * 4 / 1024 / 2**20  # float32 masters, split over all devices but for the few in norms
    assert f"parameters {held:.1f} MiB + optimizer state {2 * held:.1f} MiB" in out
    assert "4,194,304 tokens per step" in out


@pytest.mark.slow
def test_notebook():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)  # kept small in git
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3").execute()
    outputs = [output for cell in code for output in cell.outputs]
    shown = [output.data for output in outputs if "data" in output]
    assert sum("<svg" in data.get("text/html", "") for data in shown) == 4
    assert sum("image/png" in data for data in shown) == 1
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "float32[2,64@fsdp,192@tp]" in printed
    assert "def " in printed
    assert float(re.search(r"'loss': ([\d.]+)", printed)[1]) < 7


@pytest.mark.slow
def test_quantize_and_generate():
    """The real SmolLM2, rounded to 8 bits: the right answer before, after, and from disk."""
    slow_to_run = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # unlike the others, which are slow to compile
    out = python(EXAMPLES / "quantize_and_generate.py", "--cache", "int8", **slow_to_run)
    assert out.count("The capital of France is Paris.") == 3, out
    assert "quantized 8 of 11 arrays: 8.0" in out
