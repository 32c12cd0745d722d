"""Quantized models as files: bit for bit, half a byte a value; the commands that write and read them."""

import contextlib
import dataclasses
import importlib.util
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import jaxscale
from jaxscale.checkpoint.ranks import write_safetensors
from jaxscale.cli import main
from jaxscale.config import MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params
from jaxscale.pretrained import load_model, save_model
from jaxscale.quantize.files import load_quantized, save_quantized
from jaxscale.quantize.recipe import Recipe, Rounding
from pallas_kernels import QuantizedArray
from pallas_kernels.quantized_matmul.array import FORMATS

spec = importlib.util.spec_from_file_location("test_gguf", Path(__file__).parents[1] / "generate" / "test_gguf.py")
assert spec is not None and spec.loader is not None
gguf_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gguf_tests)
CFG = gguf_tests.CFG
SPECS = decoder.param_specs(CFG)
INIT = decoder.init_cache


def command(*arguments) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([str(a) for a in arguments]) == 0
    return out.getvalue()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_back_bit_for_bit(rng, tmp_path, format):
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    recipe = Recipe(rules=(("mlp/w_up", Rounding(format=format, group=32)),))
    small = jaxscale.quantize(params, recipe, SPECS)
    up = small["layers"]["mlp"]["w_up"]
    more: dict = {"inputs": jnp.ones((3, 64)), "activations": "float8_e4m3fn"}
    if "float" not in format:
        more |= {"outliers": jnp.asarray(rng.integers(2, size=(3, 2)), bool), "activations": "int4"}
    small["layers"]["mlp"]["w_up"] = dataclasses.replace(up, **more)
    save_quantized(small, tmp_path / "w.safetensors")
    back = load_quantized(tmp_path / "w.safetensors", SPECS)
    assert jax.tree.structure(back) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, back, small)
    numbers = up.values.size
    rest = sum(x.nbytes for x in jax.tree.leaves(params)) - 4 * numbers
    held = (tmp_path / "w.safetensors").stat().st_size - rest
    assert held < numbers * (0.5 if format in ("int4", "uint4", "float4_e2m1fn") else 1) + 4 * numbers / 32 + 8192


def test_a_file_goes_into_shards_and_damage_is_noticed(rng, tmp_path):
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    small = jaxscale.quantize(params, "w4a16-g32", SPECS)
    path = tmp_path / "w.safetensors"
    save_quantized(small, path)
    got = load_quantized(path, SPECS, make_mesh(devices=jax.devices()[:6], fsdp=2, tp=3))
    jax.tree.map(np.testing.assert_array_equal, got, small)
    values = got["layers"]["mlp"]["w_up"].values
    assert values.sharding.shard_shape(values.shape) == (3, 32, 32)
    other = decoder.param_specs(dataclasses.replace(CFG, mlp_dim=64))
    with pytest.raises(ValueError, match=r"w_down has shape \(3, 96, 64\) but the configuration says \(3, 64, 64\)"):
        load_quantized(path, other)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[rng.integers(len(whole) - 10_000, len(whole))] ^= 1 << rng.integers(8)
    for data in (whole[:1000], whole[:-1], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged"):
            load_quantized(path, SPECS)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, about: tensors.pop("embed.values"),
        lambda tensors, about: tensors.pop("embed.scales"),
        lambda tensors, about: tensors.update({"embed.scales": tensors["embed.scales"][:, :1].repeat(3, axis=1)}),
        lambda tensors, about: about.update(dtype="int3"),
        lambda tensors, about: about.update(dtype="int8"),
        lambda tensors, about: about.update(activations="int3"),
        lambda tensors, about: about.pop("unsigned"),
    ],
)
def test_parts_that_do_not_fit_together_are_noticed(rng, tmp_path, change):
    """In a file without checksums, as they were before there were any."""
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    save_quantized(jaxscale.quantize(params, "w4a16-g32", SPECS), tmp_path / "w")
    with safe_open(tmp_path / "w", "np") as file:
        about = json.loads(file.metadata()["quantized"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    change(tensors, about["embed"])
    write_safetensors(tensors, tmp_path / "w", {"quantized": json.dumps(about)})
    with pytest.raises(ValueError, match="is damaged: embed: "):
        load_quantized(tmp_path / "w", SPECS)


def test_convert_then_generate(rng, tmp_path, monkeypatch):
    """What convert wrote generates what quantizing on the fly does; packed, calibrated, refused twice."""
    import gguf

    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    source = gguf_tests.write(tmp_path / "m.gguf", params, quantize=gguf.GGMLQuantizationType.Q4_1)
    said = command("convert", "--model", source, "--quantize", "w4a16-g32", "--out", tmp_path / "small")
    assert "quantized 9 of 12 arrays: 5.0" in said
    options = ("--prompt", "abc ab", "--max-new-tokens", "4")
    want = command("generate", "--model", source, "--quantize", "w4a16-g32", *options)
    assert command("generate", "--model", tmp_path / "small", *options) == want
    packed = command("convert", "--model", source, "--quantize", "stored", "--out", tmp_path / "packed")
    assert "quantized 9 of 12 arrays" in packed
    model = load_model(tmp_path / "packed")
    assert model.stop_tokens == (1,) and dataclasses.replace(model.cfg, name="tiny") == CFG and model.chat is None
    assert isinstance(model.params["embed"], QuantizedArray) and model.params["embed"].unsigned
    text = tmp_path / "t.txt"
    text.write_text("ab abc cab bac " * 60)
    command("convert", "--model", source, "--quantize", "w4a4kv4-g32-fmpq", "--text", text, "--out", tmp_path / "mixed")
    mixed = load_model(tmp_path / "mixed")
    assert mixed.params["layers"]["mlp"]["w_up"].outliers.shape == (3, 2) and mixed.cache_format == "int4"
    used: list[str] = []
    monkeypatch.setattr(
        decoder, "init_cache", lambda *a, format, **k: used.append(format) or INIT(*a, format=format, **k)
    )
    command("generate", "--model", tmp_path / "mixed", *options)
    assert used == ["int4"]

    # Whatever the decoder can be, Hugging Face's configurations or not: here a shared expert after a plain layer.
    moe = MoEConfig(num_experts=4, top_k=2, mlp_dim=32, shared_dim=32, first_dense=1, dispatch="all_gather")
    cfg = dataclasses.replace(CFG, moe=moe, dtype="float32")
    specs = decoder.param_specs(cfg)
    small = jaxscale.quantize(init_params(jax.random.key(1), specs), "w4a16-g32", specs)
    save_model(dataclasses.replace(model, cfg=cfg, params=small), tmp_path / "experts")
    experts = load_model(tmp_path / "experts")
    assert load_model(tmp_path / "experts", dtype="bfloat16").cfg == dataclasses.replace(cfg, dtype="bfloat16")
    assert experts.cfg == cfg and jax.tree.structure(experts.params) == jax.tree.structure(small)
    jax.tree.map(np.testing.assert_array_equal, experts.params, small)

    with pytest.raises(ValueError, match="is not empty"):
        save_model(model, tmp_path / "packed")
    about = tmp_path / "experts" / "quantized.json"
    about.write_text(about.read_text()[:-9])
    with pytest.raises(ValueError, match=r"quantized\.json is damaged"):
        load_model(tmp_path / "experts")
    about.unlink()
    with pytest.raises(ValueError, match=r"has no quantized\.json"):
        load_model(tmp_path / "experts")
    with pytest.raises(ValueError, match="quantized already"):
        load_model(tmp_path / "packed", quantize="w8a16")
    with pytest.raises(ValueError, match=r"no \.gguf file to keep packed"):
        load_model(tmp_path / "packed", quantize="stored")


def test_recipes_that_cannot_be_are_refused_before_the_model_is_read(capsys):
    for args, message in [
        ("generate --quantize w4a16-g32-awq", "awq needs a calibration set: jaxscale convert --text FILE"),
        ("generate --quantize w4a16-g32-aqw", "no recipe 'w4a16-g32-aqw'"),
        ("convert --quantize w4a16-g32-awq --out x", "awq needs a calibration set: --text FILE"),
        ("convert --quantize w4a16-g32-awq --out x --text README.md --calibration-tokens -5", "must be at least 1"),
    ]:
        command, *options = args.split()
        assert main([command, "--model", "there is none", *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="awq needs a calibration set"):
        load_model("there is none", quantize="w4a16-g32-awq")


def test_groups_and_places_to_write_are_looked_at_before_a_model_is_read(rng, tmp_path, monkeypatch, capsys):
    """The run and the Hugging Face directory are without parameters; those of the GGUF file are out of reach."""
    from jaxscale.checkpoint import gguf
    from jaxscale.checkpoint.huggingface import export_hf
    from jaxscale.config import TrainConfig
    from jaxscale.data.tokenizers import train_bpe

    params = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    source = gguf_tests.write(tmp_path / "m.gguf", params)
    monkeypatch.setattr(gguf, "read_into", lambda *a, **k: pytest.fail("the parameters are read"))
    export_hf(params, CFG, tmp_path / "hf")
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    train = TrainConfig(model=dataclasses.replace(CFG, max_seq_len=512))
    (tmp_path / "run" / "config.json").write_text(json.dumps(dataclasses.asdict(train)))
    for folder in ("hf", "run"):
        train_bpe(["ab abc cab bac " * 60], 300).save(tmp_path / folder / "tokenizer.json")
    text = tmp_path / "t.txt"
    text.write_text("ab abc cab bac " * 60)

    def refused(message, *args):
        assert main([str(a) for a in args]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err.strip().splitlines()) == 1

    # D = 64, N H = 192, F = 96: 64 does not divide the last.
    groups = "groups of 64 do not divide the 96 numbers that a matmul by layers/mlp/w_down contracts; use one of [16,"
    for model in (source, tmp_path / "hf", tmp_path / "run"):
        awq = ("--quantize", "w4a16-g64-awq", "--text", text)
        refused(groups, "convert", "--model", model, *awq, "--out", tmp_path / "new" / "x")
        refused(groups, "convert", "--model", model, "--quantize", "w4a16-g64", "--out", tmp_path / "new" / "x")
        refused(groups, "generate", "--model", model, "--quantize", "w4a16-g64")
    split = ("generate", "--model", source, "--quantize", "w4a16-g32", "--mesh", "tp=2")
    refused("layers/mlp/w_down: ", *split)  # 3 groups of 32 on two devices

    for out in (text / "x" / "y", "/proc/nowhere", source):
        assert main(["convert", "--model", "there is none", "--quantize", "w8a16", "--out", str(out)]) == 2
        assert str(out) in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_is_quantized_and_mistakes_are_one_line(tmp_path, capsys):
    from jaxscale.checkpoint import Checkpointer
    from jaxscale.config import TrainConfig
    from jaxscale.data.tokenizers import train_bpe
    from jaxscale.optim import make_optimizer
    from jaxscale.train import make_train_state

    run = tmp_path / "run"
    tokenizer = train_bpe(["ab abc cab bac " * 60], 300)
    moe = MoEConfig(num_experts=4, top_k=2, mlp_dim=32)
    train = TrainConfig(model=dataclasses.replace(CFG, vocab_size=tokenizer.vocab_size, max_seq_len=512, moe=moe))
    mesh = make_mesh(devices=jax.devices()[:1])
    params = init_params(jax.random.key(0), decoder.param_specs(train.model), mesh, jaxscale.MEGATRON_FSDP)
    with jax.set_mesh(mesh), Checkpointer(run / "checkpoints") as ckpt:
        ckpt.save(1, make_train_state(params, make_optimizer(train.optimizer, train.steps), jax.random.key(1)))
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(train)))
    tokenizer.save(run / "tokenizer.json")
    text = tmp_path / "t.txt"
    text.write_text("ab abc cab bac " * 300)
    small = tmp_path / "small"
    assert "quantized" in command("convert", "--model", run, "--quantize", "w8a16", "--out", small)
    options = ("--prompt", "ab", "--max-new-tokens", "4")
    want = command("generate", "--model", run, "--quantize", "w8a16", *options)
    assert command("generate", "--model", small, *options) == want
    awq = ("--quantize", "w8a16-awq", "--text", text)
    command("convert", "--model", run, *awq, "--out", tmp_path / "awq")
    capsys.readouterr()
    new = ("--out", tmp_path / "new")
    assert main(["train", str(small)]) == 2
    assert "are quantized; go on from the model that it was made from" in capsys.readouterr().err
    for args, message in [
        (("--model", small, *awq, *new), "are quantized; go on from the model"),
        (("--model", run, *awq, "--out", small), "is not empty"),
        (("--model", run, *awq, "--calibration-tokens", "5", *new), "5 tokens of"),
        (("--model", run, "--quantize", "stored", *new), "is no .gguf file to keep packed"),
    ]:
        assert main(["convert", *map(str, args)]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "new").exists()
