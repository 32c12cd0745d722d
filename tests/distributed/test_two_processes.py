"""Jobs of two processes with four simulated devices each, joined over the loopback: the losses of one process."""

import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxscale.callbacks import read_metrics
from jaxscale.cli import EXIT_PREEMPTED
from jaxscale.run import run

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 540  # for a whole job on a busy machine
# Rows apart and tp within a process; all rows in both processes, the sequence split between them.
MESHES = ("fsdp=4,tp=2", "cp=2,tp=4")

pytestmark = pytest.mark.slow


@pytest.fixture
def text(tmp_path, rng) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    words = ["the", "mesh", "splits", "every", "array", "and", "no", "number", "changes"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    return folder


def worker():
    spec = importlib.util.spec_from_file_location("worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Job:
    """Two processes of one command. Whatever happens they end with the block."""

    def __init__(self, *command: str | Path, logs: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [logs / f"process{i}.log" for i in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            }
            with log.open("w") as out:
                self.processes.append(
                    subprocess.Popen([sys.executable, *map(str, command)], env=env, stdout=out, stderr=out)
                )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self) -> list[int]:
        """The exit status of each; one that fails takes the other with it, which would wait for it in vain."""
        end = time.monotonic() + SECONDS
        while any(p.poll() is None for p in self.processes):
            failed = any(p.poll() not in (None, 0, EXIT_PREEMPTED) for p in self.processes)
            if failed or time.monotonic() > end:
                time.sleep(2)
                status = [p.poll() for p in self.processes]
                self.__exit__()
                logs = "\n\n".join(f"{log.name}: ...{log.read_text()[-3000:]}" for log in self.logs)
                pytest.fail(f"exit statuses {status} (None: still running after {SECONDS} s)\n{logs}")
            time.sleep(0.1)
        return [p.wait() for p in self.processes]


def test_losses_of_one_process(text, tmp_path):
    alone = worker().on_mesh("fsdp=8", text, tmp_path / "alone")
    run(alone, console=Console(quiet=True))
    with Job(WORKER, text, tmp_path / "pair", *MESHES, logs=tmp_path) as job:
        assert job.wait() == [0, 0]
    want = read_metrics(Path(alone.out) / "metrics.jsonl")
    assert [m["step"] for m in want if "loss" in m] == [1, 2, 3, 4]
    for mesh in MESHES:
        got = read_metrics(tmp_path / "pair" / mesh / "metrics.jsonl")
        for name in ("loss", "grad_norm", "weight", "valid_loss", "valid_bits_per_byte"):
            column = [[m[name] for m in metrics if name in m] for metrics in (got, want)]
            np.testing.assert_allclose(*column, rtol=1e-5, err_msg=f"{name} on {mesh}")


def test_preempted_together_and_resumed_by_one_process(text, tmp_path):
    """SIGTERM reaches one process; both save the same step and leave. One process goes on, on another mesh."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    command = [
        "-m",
        "jaxscale.cli",
        "train",
        f"{WORKER}:config",
        "--steps",
        "100000",
        "--mesh.dp",
        "2",
        "--mesh.tp",
        "4",
    ]
    command += ["--data.source", text, "--out", tmp_path / "run", "--checkpoint.every", "100000"]
    with Job(*command, logs=tmp_path) as job:
        end = time.monotonic() + SECONDS
        while len(read_metrics(metrics)) < 3 and time.monotonic() < end and job.processes[0].poll() is None:
            time.sleep(0.1)
        job.processes[1].send_signal(signal.SIGTERM)
        assert job.wait() == [EXIT_PREEMPTED] * 2
    stopped = [m["step"] for m in read_metrics(metrics) if "loss" in m][-1]

    cfg = worker().on_mesh("dp=2,fsdp=4", text, tmp_path)
    run(dataclasses.replace(cfg, out=str(tmp_path / "run"), steps=stopped + 2), console=Console(quiet=True))
    lines = [m for m in read_metrics(metrics) if "loss" in m]
    assert [m["step"] for m in lines] == list(range(1, stopped + 3))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_every_process_lowers_the_same_program():
    """The order of a set of strings is another in each process; processes with other programs wait for each other."""
    meshes = ("cp=2,tp=4", "dp=2,fsdp=2,tp=2")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{WORKER.parent}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, WORKER.with_name("lowered.py"), *meshes]
    runs = [
        subprocess.run(command, env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True).stdout
        for seed in ("0", "3", "27")  # which order sets of axes in the three ways that differ
    ]
    assert [line.split()[0] for line in runs[0].splitlines()] == list(meshes)
    assert runs[0] == runs[1] == runs[2]
