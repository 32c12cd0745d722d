"""Whole runs on a small corpus: resuming continues the loss curve, and what does not fit together is refused."""

import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxscale import (
    Callback,
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    cli,
    distributed,
    make_mesh,
    runs,
)
from jaxscale.callbacks import read_metrics
from jaxscale.checkpoint import Checkpointer
from jaxscale.checkpoint.huggingface import export_hf
from jaxscale.data import HFTokenizer, train_bpe
from jaxscale.models import decoder, presets
from jaxscale.params import num_params
from jaxscale.plan import room
from jaxscale.run import load_run, run
from jaxscale.train import NonFiniteLoss, Preempted

WORDS = ["the", "mesh", "splits", "every", "array", "and", "no", "number", "changes"]


@pytest.fixture
def config(tmp_path, rng) -> TrainConfig:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 60)))
    model = dataclasses.replace(
        presets.tiny(), num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8
    )
    return TrainConfig(
        model=model,
        out=str(tmp_path / "run"),
        steps=8,
        mesh=MeshConfig(fsdp=4, tp=2),
        data=DataConfig(source=str(text), seq_len=32, batch_size=8, holdout=0.2),
        optimizer=OptimizerConfig(warmup_steps=2),
        checkpoint=CheckpointConfig(every=3),
        eval_every=4,
        eval_batches=2,
        log_every=1,
    )


def quiet():
    return Console(quiet=True)


def losses(cfg: TrainConfig) -> list[tuple[float, float]]:
    lines = read_metrics(_path(cfg) / "metrics.jsonl")
    return [(m["step"], m["loss"]) for m in lines if "loss" in m]


def _path(cfg):
    return Path(cfg.out)


class StopAt(Callback):
    """SIGTERM as it comes from outside, while step `step` is settled."""

    def __init__(self, step):
        self.step = step

    def on_metrics(self, step, metrics):
        if step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_preempted_run_continues_as_if_nothing_had_happened(config):
    whole = dataclasses.replace(config, out=config.out + "-whole")
    run(whole, console=quiet())
    with pytest.raises(Preempted):
        run(config, console=quiet(), callbacks=(StopAt(4),))
    assert 4 <= losses(config)[-1][0] < 8
    state = run(config, console=quiet())
    assert int(state.step) == 8
    assert losses(config) == losses(whole)  # every loss, to the last bit
    valid = [[m for m in read_metrics(_path(c) / "metrics.jsonl") if "valid_loss" in m][-1] for c in (config, whole)]
    assert valid[0]["valid_bits_per_byte"] == valid[1]["valid_bits_per_byte"]
    for name in ("config.json", "loss.png", "tensorboard", "tokenizer.json"):
        assert (_path(config) / name).exists(), name


def test_a_run_continues_on_another_mesh(config):
    whole = dataclasses.replace(config, out=config.out + "-whole")
    run(whole, console=quiet())
    with pytest.raises(Preempted):
        run(config, console=quiet(), callbacks=(StopAt(3),))
    run(dataclasses.replace(config, mesh=MeshConfig(dp=2, fsdp=2, tp=2)), console=quiet())
    steps, values = zip(*losses(config))
    assert list(steps) == list(range(1, 9))
    np.testing.assert_allclose(values, [v for _, v in losses(whole)], rtol=1e-5)


def test_a_finished_run_loads_anywhere(config):
    run(config, console=quiet())
    tokens = np.arange(16, dtype=np.int32).reshape(1, 16)
    logits = []
    for mesh in (make_mesh(fsdp=8), make_mesh(dp=2, tp=4), make_mesh(devices=jax.devices()[:1])):
        loaded = load_run(config.out, mesh)
        assert loaded.step == 8
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("mesh")) == "mesh"
        with jax.set_mesh(mesh):
            logits.append(jax.device_get(jax.jit(decoder.forward, static_argnums=2)(loaded.params, tokens, loaded.cfg)))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)
    np.testing.assert_allclose(logits[2], logits[0], atol=1e-5)


def test_a_run_goes_on_as_something_else_or_is_refused(config, monkeypatch):
    """Another model or tokenizer and rows that do not fit are refused and change nothing; another batch size goes on at
    the row where the data stood, another precision with the same optimizer state."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1), eval_every=100)
    with monkeypatch.context() as patch:  # a run that was begun before configurations had a precision
        asdict = lambda cfg: {k: v for k, v in dataclasses.asdict(cfg).items() if "precision" not in k}
        patch.setattr("jaxscale.run.dataclasses", types.SimpleNamespace(asdict=asdict, replace=dataclasses.replace))
        run(dataclasses.replace(config, steps=3), console=quiet())
    written = (_path(config) / "config.json").read_text()
    wider = dataclasses.replace(config, model=dataclasses.replace(config.model, mlp_dim=128))
    with pytest.raises(ValueError, match=r"w_up(.|\n)*64(.|\n)*128|w_up(.|\n)*128(.|\n)*64"):
        run(wider, console=quiet())
    of = lambda **data: dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    with pytest.raises(ValueError, match=r"begun with tokenizer='bytes' but this run says 'bpe:300'; set --data.tok"):
        run(of(tokenizer="bpe:300"), console=quiet())
    with pytest.raises(ValueError, match="seq_len=32 but this run has seq_len=16"):
        run(of(seq_len=16), console=quiet())
    with pytest.raises(ValueError, match="divisor of 24"):
        run(of(batch_size=16), console=quiet())
    with Checkpointer(_path(config) / "checkpoints") as other:
        other.claim()
        with pytest.raises(OSError, match="a directory has one writer"):
            run(dataclasses.replace(config, seed=1), console=quiet())
    assert (_path(config) / "config.json").read_text() == written

    halves = of(batch_size=4)
    state = run(dataclasses.replace(halves, steps=4, precision="fp8"), console=quiet())
    assert state.scales and max(float(x.max()) for x in jax.tree.leaves(state.scales)) > 0
    console = Console(record=True, width=200, file=io.StringIO())
    state = run(dataclasses.replace(halves, steps=5), console=console)
    counts = [int(x) for x in jax.tree.leaves(state.opt_state) if x.shape == ()]
    assert state.scales is None and counts and set(counts) == {5}
    with Checkpointer(_path(config) / "checkpoints") as ckpt:
        position = ckpt.metadata()["data"]
    assert (position["batch"], position["batch_size"]) == (3 * 2 + 2, 4)
    said = console.export_text(clear=False)
    assert (
        "resumed from step 4" in said and "changed since the last checkpoint: precision fp8 -> , steps 4 -> 5" in said
    )
    run(dataclasses.replace(halves, steps=5), console=console)
    assert "nothing is left to do of --steps 5" in console.export_text()


def test_nan_leaves_the_last_good_checkpoint(config):
    run(dataclasses.replace(config, steps=3), console=quiet())
    wild = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=1e30)
    with pytest.raises(NonFiniteLoss, match=r"step [45]: loss=(nan|inf|\d)"):
        run(dataclasses.replace(config, optimizer=wild), console=quiet())
    saved = [int(p.name) for p in (_path(config) / "checkpoints").iterdir() if p.name.isdigit()]
    assert saved == [3]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(load_run(config.out, make_mesh(fsdp=8)).params))


def test_tokenizer_larger_than_the_model(config):
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    with pytest.raises(ValueError, match=r"256 tokens but model.vocab_size=100; set --model.vocab-size 256"):
        run(small, console=quiet())


def test_a_torn_metrics_file_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2.5}\n\0\0\xff\n3\n{}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_metrics_hold_what_they_should(config):
    run(dataclasses.replace(config, steps=4), console=quiet())
    lines = [json.loads(line) for line in (_path(config) / "metrics.jsonl").read_text().splitlines()]
    train = [m for m in lines if "loss" in m]
    assert [m["step"] for m in train] == [1, 2, 3, 4]
    assert all({"loss", "nll", "grad_norm", "weight", "seconds"} <= set(m) for m in train)
    events = read_events(_path(config) / "tensorboard")
    assert [events[i, "loss"] for i in (1, 2, 3, 4)] == pytest.approx([m["loss"] for m in train])
    assert events[4, "valid_bits_per_byte"] == pytest.approx(lines[-1]["valid_bits_per_byte"])
    assert np.log(256) < train[0]["loss"] < np.log(256) + 1  # nothing is known yet: all bytes are nearly alike


def read_events(directory):
    """{(step, tag): value} of TensorBoard's files: records of length, CRC, an Event message, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    out = {}
    for path in directory.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            out |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
            at += 12 + size + 4
    return out


def test_a_run_begins_with_another_models_parameters(config, tmp_path):
    """Those of a run's last checkpoint or of a Hugging Face directory, whatever the mesh; what differs is said."""
    run(config, console=quiet())
    last = load_run(config.out, make_mesh(fsdp=8))
    export_hf(last.params, last.cfg, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text((_path(config) / "tokenizer.json").read_text())
    still = dataclasses.replace(config.optimizer, learning_rate=1e-30, weight_decay=0.0)
    for i, start in enumerate((config.out, str(tmp_path / "hf"))):
        other = dataclasses.replace(config, init_from=start, out=f"{config.out}{i}", mesh=MeshConfig(dp=2, tp=4))
        other = dataclasses.replace(other, steps=1, optimizer=still, seed=7, eval_every=1)
        log = io.StringIO()
        state = run(other, console=Console(file=log))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), jax.device_get(last.params))
        valid = [
            [m for m in read_metrics(_path(c) / "metrics.jsonl") if "valid_loss" in m][-1] for c in (config, other)
        ]
        np.testing.assert_allclose(valid[1]["valid_loss"], valid[0]["valid_loss"], rtol=1e-5)
        assert "unlike" not in log.getvalue() and "other tokens" not in log.getvalue()

    log = io.StringIO()
    changed = dataclasses.replace(
        other,
        out=config.out + "2",
        model=dataclasses.replace(config.model, rope_theta=77.0, vocab_size=300),
        data=dataclasses.replace(config.data, tokenizer="bpe:300"),
    )
    with pytest.raises(ValueError, match=r"hf has embed \(256, 32\), this run's model \(300, 32\); use its own"):
        run(changed, console=Console(file=log))
    model = dataclasses.replace(config.model, rope_theta=77.0)
    run(dataclasses.replace(other, out=config.out + "3", model=model), console=Console(file=log, soft_wrap=True))
    assert "hf, which it begins with: model.rope_theta 10000.0 -> 77.0" in log.getvalue()


def test_a_model_goes_on_by_its_name(config, tmp_path, monkeypatch):
    """`jaxscale train DIRECTORY` makes a run of it: its configuration in float32, its tokens."""
    run(dataclasses.replace(config, steps=1), console=quiet())
    joined = []
    monkeypatch.setattr(distributed, "initialize", lambda: joined.append(True))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu" if joined else pytest.fail("before the job was joined"))
    cfg = runs.go_on(config.out)
    monkeypatch.undo()
    assert dataclasses.replace(cfg.model, dtype=config.model.dtype) == config.model
    assert (cfg.init_from, cfg.data.tokenizer, cfg.out) == (config.out, config.out, "runs/run-tuned")
    text = {"source": config.data.source, "seq_len": 32, "holdout": 0.2}
    cfg = dataclasses.replace(
        cfg, steps=1, out=str(tmp_path / "tuned"), eval_every=9, data=dataclasses.replace(cfg.data, **text)
    )
    log = io.StringIO()
    run(cfg, console=Console(file=log))
    assert "other tokens" not in log.getvalue()
    shutil.rmtree(config.out)  # what has begun has no more need of it
    assert int(run(dataclasses.replace(cfg, steps=2), console=quiet()).step) == 2
    with pytest.raises(ValueError, match="nowhere is no model; give a name"):
        runs.go_on(str(tmp_path / "nowhere"))


def test_three_steps_are_profiled(config):
    log = io.StringIO()
    run(dataclasses.replace(config, profile_at=2, steps=5, eval_every=9), console=Console(file=log, soft_wrap=True))
    assert "steps from 2 on are profiled: tensorboard --logdir" in log.getvalue()
    assert list((_path(config) / "tensorboard" / "plugins" / "profile").glob("*/*.trace.json.gz"))
    with pytest.raises(ValueError, match=r"profile_at=9 is none of the steps 1\.\.8"):
        dataclasses.replace(config, profile_at=9)


def test_conversations_are_trained_on_and_answered(config, tmp_path, rng):
    """The loss is of the answers alone; what the run left behind is prompted as it was trained, and stops."""
    backend = train_bpe(WORDS * 4, 270).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    HFTokenizer(backend).save(tmp_path / "tokenizer.json")
    say = lambda: " ".join(rng.choice(WORDS, 5))
    turns = lambda: [{"role": "user", "content": say()}, {"role": "assistant", "content": say()}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": turns() + turns()}) + "\n" for _ in range(60)))
    data = dataclasses.replace(
        config.data, source=str(chats), messages_key="messages", tokenizer=str(tmp_path / "tokenizer.json")
    )
    model = dataclasses.replace(config.model, vocab_size=280)
    run(dataclasses.replace(config, model=model, data=data, steps=2, eval_every=2), console=quiet())
    read = read_metrics(_path(config) / "metrics.jsonl")
    assert 0 < read[0]["weight"] < 0.7 * 8 * 32  # of 8 rows of 32 tokens
    loaded = cli._load(config.out, None)
    prompt = loaded.encode_chat("mesh")
    assert (
        backend.decode(prompt, skip_special_tokens=False) == "<|im_start|>user\nmesh<|im_end|>\n<|im_start|>assistant\n"
    )
    assert loaded.stop_tokens == (backend.token_to_id("<|im_end|>"),)


def test_a_run_that_does_not_fit_says_what_would(config, monkeypatch):
    """Before it is compiled by the estimate, and when a device turns out to be full."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=256, mlp_dim=2048))
    state = 3 * 4 * num_params(decoder.param_specs(config.model)) / 8  # of each device
    monkeypatch.setattr(room, "device_memory", lambda: 1.6 * state)

    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 bytes.\nmore")

    monkeypatch.setattr("jaxscale.run.fit", full)
    said = io.StringIO()
    with pytest.raises(MemoryError, match=r"^a device's memory is full \(RESOURCE_EXHAUSTED.*bytes\.\); a step is est"):
        run(config, console=Console(file=said, width=1000))
    assert "a step is estimated to need" in said.getvalue() and "fits no mesh of cpu:8" in said.getvalue()
