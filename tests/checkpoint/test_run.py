"""The levels that a run's configuration asks for, through `run` and the command line."""

import dataclasses
import io
import pathlib

import pytest
from rich.console import Console

from jaxscale import Callback, CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxscale.callbacks import read_metrics
from jaxscale.checkpoint import RemoteCheckpointer, diff_steps, list_steps
from jaxscale.checkpoint.levels import open_levels
from jaxscale.checkpoint.memory import wire
from jaxscale.cli import main
from jaxscale.models import presets
from jaxscale.run import run


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(rng.choice(["one", "step", "after", "another"], 60)))
    tiny = presets.tiny()
    return TrainConfig(
        model=dataclasses.replace(
            tiny, num_layers=1, embed_dim=16, mlp_dim=32, num_heads=2, num_kv_heads=2, head_dim=8
        ),
        out=str(tmp_path / "run"),
        steps=8,
        mesh=MeshConfig(fsdp=8),
        data=DataConfig(source=str(tmp_path / "text"), seq_len=16, batch_size=8, holdout=0.2),
        optimizer=OptimizerConfig(warmup_steps=2),
        eval_every=100,
    )


class Crash(Callback):
    def on_metrics(self, step, metrics):
        if step == 7:
            raise RuntimeError("the power is gone")


def losses(cfg):
    return {m["step"]: m["loss"] for m in read_metrics(pathlib.Path(cfg.out) / "metrics.jsonl") if "loss" in m}


@pytest.mark.slow
def test_a_crashed_run_goes_on_from_memory(config, tmp_path, monkeypatch):
    """Snapshots every 2 steps, the disk every 4, an object store every 8; it crashes at step 7."""
    whole = dataclasses.replace(config, out=f"{config.out}-whole")
    run(whole, console=Console(quiet=True))
    far = f"file://{tmp_path}/far"
    levels = CheckpointConfig(every=4, memory_every=2, remote=far, remote_every=8)
    config = dataclasses.replace(config, checkpoint=levels)
    keepers = []
    connect = wire.Connection.__init__
    monkeypatch.setattr(
        wire.Connection, "__init__", lambda self, *a, **k: keepers.append(a[:2]) or connect(self, *a, **k)
    )
    with pytest.raises(RuntimeError, match="power"):
        run(config, console=Console(quiet=True), callbacks=(Crash(),))
    assert [s.step for s in list_steps(f"{config.out}/checkpoints")] == [4]
    console = Console(record=True, file=io.StringIO())
    state = run(config, console=console)
    assert "resumed from step 6" in console.export_text()
    assert int(state.step) == 8 and losses(config) == losses(whole)
    assert RemoteCheckpointer(far).steps() == [8]
    assert diff_steps(f"{far}/8", f"{whole.out}/checkpoints") == []
    with pytest.raises(OSError, match="no keeper answers"):  # it ended with the run
        wire.Connection(*keepers[0], seconds=0)


def test_another_run_in_the_same_place_does_not_see_old_memory(config, tmp_path):
    """The directory of a crashed run is removed: its snapshot must not come back."""
    directory = pathlib.Path(config.out) / "checkpoints"
    config = CheckpointConfig(every=4, memory_every=2)
    first = open_levels(directory, config)
    first.save(2, {"x": 1.0})
    first.wait()
    first.__exit__(RuntimeError, RuntimeError("crash"), None)
    again = open_levels(directory, config)
    assert again.latest_step() == 2
    again.__exit__(RuntimeError, RuntimeError("crash"), None)
    directory.rmdir()
    with open_levels(directory, config) as new:
        assert new.latest_step() is None
        new.save(2, {"x": 2.0}, everywhere=True)
        new.wait()
        assert [level.store.steps() for level in new.levels] == [[2], [2]]
        assert new.restore({"x": 0.0}) == {"x": 2.0}


def test_options_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr("jaxscale.run.run", seen.append)
    options = ["--checkpoint.memory-every", "10", "--checkpoint.memory-hosts", "a:9100", "b:9100"]
    options += [
        "--checkpoint.memory-lost",
        "1",
        "--checkpoint.remote",
        "s3://bucket/run",
        "--checkpoint.on-error",
        "stop",
    ]
    assert main(["train", "tiny", *options]) == 0
    got = seen[0].checkpoint
    assert got.memory_hosts == ("a:9100", "b:9100") and got.memory_every == 10 and got.memory_lost == 1
    assert got.remote == "s3://bucket/run" and got.on_error == "stop"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_every": 0}, "memory_every=0 must be at least 1"),
        ({"remote_every": 100}, "remote_every=100 needs remote and a multiple of every=100"),
        ({"remote": "s3://b/c", "remote_every": 150}, "remote_every=150 needs remote and a multiple of every=100"),
        ({"memory_hosts": ("a:9100",)}, "named but nothing is kept there; set memory_every"),
        ({"memory_every": 1, "memory_hosts": ("a:9100", "b")}, "'b' is not address:port, as in 10.0.0.7:9100"),
        ({"memory_every": 1, "memory_hosts": ("a:65536",)}, "'a:65536' is not address:port"),
        ({"remote": "bucket/run"}, "remote='bucket/run' is no address; write it as in s3://bucket/path"),
        ({"memory_lost": 1}, r"memory_lost=1 of 1 host\(s\) must lie in 0..0; name more memory_hosts"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CheckpointConfig(**wrong)


def test_hosts_are_as_many_as_processes(tmp_path):
    with pytest.raises(ValueError, match=r"1 process\(es\) but memory_hosts names 2; give one address:port for each"):
        open_levels(tmp_path, CheckpointConfig(memory_every=1, memory_hosts=("a:1", "b:2")))
