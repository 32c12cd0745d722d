"""`jaxscale checkpoint` as someone types it: layouts from files, Hugging Face directories, one line for a mistake."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxscale import MEGATRON_FSDP, init_params, make_mesh
from jaxscale.checkpoint import Checkpointer, open_step
from jaxscale.checkpoint.huggingface import import_hf, load_config
from jaxscale.cli import EXIT_USER_ERROR, main
from jaxscale.config import TrainConfig
from jaxscale.data import ByteTokenizer, train_bpe
from jaxscale.models import presets
from jaxscale.models.decoder import param_specs
from jaxscale.optim import make_optimizer
from jaxscale.train import make_train_state

LAYOUTS = """
from jaxscale.checkpoint import layout as lay

def turned():
    return (lay.transpose("w", (1, 0)), lay.rename("w", "v"))

def back():
    return lay.inverse(turned())

def wrong():
    return "transpose"

def unmatched():
    return (lay.rename("nothing", "something"),)
"""


def call(capsys, *args):
    status = main(["checkpoint", *map(str, args)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def run(tmp_path, rng):
    with Checkpointer(tmp_path / "run") as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"params": {"w": rng.normal(size=(3, 5)).astype(np.float32), "b": np.arange(4)}})
    (tmp_path / "layouts.py").write_text(LAYOUTS)
    return tmp_path / "run"


def test_layouts_from_a_file(run, tmp_path, capsys):
    layouts = tmp_path / "layouts.py"
    assert call(capsys, "convert", run, tmp_path / "turned", "--layout", f"{layouts}:turned")[0] == 0
    stored = open_step(run)["params/w"].whole()
    np.testing.assert_array_equal(open_step(tmp_path / "turned")["params/v"].whole(), stored.T)
    status, out, _ = call(capsys, "diff", tmp_path / "turned", run, "--layout", f"{layouts}:back")
    assert (status, out) == (0, "the same\n")
    status, out, _ = call(capsys, "diff", tmp_path / "turned", run)
    assert status == 1 and "params/v  only in the first" in out and "2 array(s) differ" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "RUN", "OUT", "--layout", "FILE:wrong"], "wrong returned str; a layout is a tuple of operations"),
        (["convert", "RUN", "OUT", "--layout", "FILE:turnt"], "has no function 'turnt' (did you mean 'turned'?)"),
        (["convert", "RUN", "OUT", "--layout", "FILE:unmatched"], "rename nothing -> something matches no array"),
        (["convert", "RUN", "OUT", "--layout", "gone.py:f"], "gone.py is not a file"),
        (["convert", "RUN", "OUT", "--layout", "hf"], "does not say which model it holds"),
        (["convert", "RUN", "OUT", "params/*", "--layout", "hf"], "takes no patterns"),
        (["convert", "RUN", "OUT", "parms/*"], "only='parms/*' matches none of 2 arrays such as params/"),
        (["convert", "RUN", "RUN"], "has step 2 already; choose another directory"),
        (["convert", "RUN"], "required: directory"),
        (["convert", "RUN", "OUT", "--layuot", "hf"], "unrecognized arguments: --layuot"),
        (["verify", "RUN/7"], "RUN/7 is no complete checkpoint and holds none: there is no such path"),
        (["ls", "FILE"], "FILE is a file"),
        (["verify", "FILE"], "FILE is a file"),
        (["ls", "OUT"], "no complete step in"),
        (["lst", "RUN"], "invalid choice: 'lst'"),
    ],
)
def test_mistakes_are_answered_in_one_line(run, tmp_path, capsys, args, message):
    places = {"RUN": str(run), "OUT": str(tmp_path / "out"), "FILE": str(tmp_path / "layouts.py")}
    for word, path in places.items():
        args, message = [a.replace(word, path) for a in args], message.replace(word, path)
    status, out, err = call(capsys, *args)
    assert status == EXIT_USER_ERROR and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err, err
    assert not (tmp_path / "out").exists()


def test_a_step_becomes_a_hugging_face_directory(tmp_path, rng, capsys):
    cfg = dataclasses.replace(presets.tiny(), num_layers=2, embed_dim=16, mlp_dim=32, num_heads=2, head_dim=8)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), param_specs(cfg))
    config = json.loads(json.dumps(dataclasses.asdict(TrainConfig(model=cfg))))
    (tmp_path / "plain").touch()
    with Checkpointer(tmp_path / "run" / "checkpoints") as ckpt:
        ckpt.save(3, {"params": params, "step": 3}, metadata={"config": config})
    assert call(capsys, "ls", tmp_path / "run")[1].startswith("step        3")
    status, out, _ = call(capsys, "convert", tmp_path / "run", tmp_path / "hf", "--layout", "hf")
    assert status == 0 and f"arrays to {tmp_path / 'hf'}" in out
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}
    modes = {p.stat().st_mode for p in (tmp_path / "hf").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}  # as the umask says
    back, loaded = import_hf(tmp_path / "hf")
    assert loaded == load_config(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert "is not empty" in call(capsys, "convert", tmp_path / "run", tmp_path / "hf", "--layout", "hf")[2]
    # A damaged step is not exported.
    damaged = max((tmp_path / "run" / "checkpoints" / "3" / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    status, _, err = call(capsys, "convert", tmp_path / "run", tmp_path / "hf2", "--layout", "hf")
    assert status == EXIT_USER_ERROR and "damaged" in err and not (tmp_path / "hf2").exists()


def test_an_export_generates_as_its_run_does(tmp_path, rng, capsys):
    """With the run's tokenizer; transformers is told to take it as it is."""
    kind = rng.choice(["bpe", "bytes"])
    run, hf = tmp_path / "run", tmp_path / "hf"
    tokenizer = train_bpe(["the mesh splits every array " * 50], 300) if kind == "bpe" else ByteTokenizer()
    sizes = {"num_layers": 1, "embed_dim": 16, "mlp_dim": 32, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    model = dataclasses.replace(presets.tiny(), vocab_size=tokenizer.vocab_size, **sizes)
    train = TrainConfig(model=model)
    mesh = make_mesh(devices=jax.devices()[:1])
    params = init_params(jax.random.key(0), param_specs(model), mesh, MEGATRON_FSDP)
    params = jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding), params)
    config = json.loads(json.dumps(dataclasses.asdict(train)))
    with jax.set_mesh(mesh), Checkpointer(run / "checkpoints") as ckpt:
        state = make_train_state(params, make_optimizer(train.optimizer, train.steps), jax.random.key(1))
        ckpt.save(1, state, metadata={"config": config})
    (run / "config.json").write_text(json.dumps(config))
    tokenizer.save(run / "tokenizer.json")
    assert call(capsys, "convert", run / "checkpoints" / "1", hf, "--layout", "hf")[0] == 0
    said = []
    for source in (run, hf):
        assert main(["generate", "--model", str(source), "--prompt", "the mesh", "--max-new-tokens", "8"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()
    about = json.loads((hf / "tokenizer_config.json").read_text())
    assert about == {"tokenizer_class": "PreTrainedTokenizerFast"} | ({"bos_token": "<|bos|>"} if kind == "bpe" else {})
