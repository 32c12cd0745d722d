"""Every decoder family against transformers (tests/golden), and Hugging Face checkpoints in and out, bit by bit."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxscale.checkpoint.huggingface import export_hf, import_hf, load_config, params_from_hf, params_to_hf
from jaxscale.checkpoint.huggingface_config import config_from_hf, config_to_hf
from jaxscale.config import MeshConfig, ModelConfig, MoEConfig, RopeScaling
from jaxscale.mesh import make_mesh
from jaxscale.models.decoder import forward, param_specs
from jaxscale.params import param_shardings
from sharding_rules.rules import MEGATRON_FSDP

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(p.parent.name for p in GOLDEN.glob("*/config.json"))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape), path
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), path


def random_state(state: dict, rng: np.random.Generator) -> dict:
    """The same names, shapes and dtypes with fresh bits."""
    return {k: rng.standard_normal(v.shape, np.float32).astype(v.dtype) for k, v in state.items()}


def test_all_families_are_there():
    expected = {"llama2", "llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen3", "smollm2"}
    assert set(FAMILIES) == expected | {"llama_bias", "qwen2_sliding", "gemma2", "gemma3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family):
    io = load_file(GOLDEN / family / "io.safetensors")
    cfg = load_config(GOLDEN / family)
    params, cfg = import_hf(GOLDEN / family, cfg=dataclasses.replace(cfg, dtype="float32", param_dtype="float32"))
    logits = jax.jit(forward, static_argnums=2)(params, io["tokens"], cfg)
    assert logits.dtype == jnp.float32
    assert np.abs(np.asarray(logits) - io["logits"]).max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_round_trip(family, rng):
    cfg = load_config(GOLDEN / family)
    state = random_state(load_file(GOLDEN / family / "model.safetensors"), rng)
    params = params_from_hf(state, cfg)
    specs = param_specs(cfg)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, specs)
    assert_same_bits(params_to_hf(params, cfg), state)
    # The layout itself, by an independent spelling: y W^T of torch is an einsum over our first dims.
    x = rng.standard_normal(cfg.embed_dim, np.float32)
    layer = cfg.num_layers - 1
    weights = {k: v.astype(np.float32) for k, v in state.items()}
    for ours, theirs in (("wq", "q_proj"), ("wv", "v_proj")):
        ours_out = np.einsum("D,DNH->NH", x, params["layers"]["attn"][ours][layer].astype(np.float32))
        theirs_out = weights[f"model.layers.{layer}.self_attn.{theirs}.weight"] @ x
        np.testing.assert_allclose(ours_out.ravel(), theirs_out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_spellings_agree(family):
    """transformers 5 and the hub's older spelling are one configuration, and ours is written back without loss."""
    new, hub = (config_from_hf(read_json(GOLDEN / family / f"{n}.json")) for n in ("config", "config_hub"))
    assert new == dataclasses.replace(hub, dtype="float32", param_dtype="float32")
    assert config_from_hf(config_to_hf(new)) == new


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_config_defaults(kind):
    said = config_from_hf(read_json(GOLDEN / "defaults.json")[kind])
    silent = config_from_hf({"model_type": kind})
    assert said == dataclasses.replace(silent, dtype=said.dtype, param_dtype=said.param_dtype)


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        ("llama2", {"hidden_act": "relu2"}, "hidden_act='relu2'"),
        ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ("llama2", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ("llama2", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ("llama2", {"num_local_experts": 8}, "num_local_experts=8"),
        ("llama2", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama2", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama2", {"model_type": "phi3"}, "model_type='phi3'"),
        ("llama2", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn'"),
        ("llama2", {"sliding_window": 4}, "sliding_window=4"),
        ("qwen3", {"layer_types": ["linear_attention"] * 2}, "linear_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}, "window is not set"),
        ("qwen3", {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters"),
    ],
)
def test_config_refuses_what_it_does_not_know(family, change, named):
    with pytest.raises(ValueError, match=named.replace("[", r"\[")):
        config_from_hf(read_json(GOLDEN / family / "config_hub.json") | change)


def test_config_from_hf_real_spellings():
    """Fields as they stand in published checkpoints."""
    qwen = config_from_hf(
        {
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
            "num_hidden_layers": 5,
            "torch_dtype": "bfloat16",
            "max_position_embeddings": 64,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        }
    )
    assert qwen.local_layers == (False, False, False, True, True)
    assert qwen.window == 8
    assert qwen.rope_scaling == RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=16)
    assert (qwen.dtype, qwen.param_dtype, qwen.qkv_bias, qwen.out_bias) == ("bfloat16", "bfloat16", True, False)
    llama = config_from_hf({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}})
    assert llama.rope_scaling.original_max_seq_len == 2048  # max_position_embeddings, as transformers fills it in


def test_config_to_hf_refuses_what_it_cannot_say():
    cfg = load_config(GOLDEN / "llama2")
    with pytest.raises(ValueError, match="logit_soft_cap=30"):
        config_to_hf(dataclasses.replace(cfg, logit_soft_cap=30.0))
    with pytest.raises(ValueError, match="layer_pattern"):
        config_to_hf(dataclasses.replace(cfg, layer_pattern=("local", "global"), window=4))
    # Experts of a run: what only training knows, and the unused width of plain layers, need no word of config.json.
    moe = MoEConfig(num_experts=4, top_k=2, mlp_dim=cfg.mlp_dim // 2, ep_hosts=2, dispatch="two_level")
    mixtral = dataclasses.replace(cfg, moe=moe)
    assert config_to_hf(mixtral)["intermediate_size"] == moe.mlp_dim
    with pytest.raises(ValueError, match=r"cannot say moe\.weight_scale=2\.0, moe\.shared_dim=8$"):
        config_to_hf(dataclasses.replace(mixtral, moe=dataclasses.replace(moe, shared_dim=8, weight_scale=2.0)))


def test_state_dict_errors_name_the_tensor(rng):
    cfg = load_config(GOLDEN / "smollm2")
    state = load_file(GOLDEN / "smollm2" / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 1 of .*model\.norm\.weight"):
        params_from_hf({k: v for k, v in state.items() if k != "model.norm.weight"}, cfg)
    with pytest.raises(ValueError, match=r"unexpected 1 of .*visual"):
        params_from_hf(state | {"visual.weight": np.zeros(3, np.float32)}, cfg)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\) but the configuration says \(72,\)"):
        params_from_hf(state | {"model.norm.weight": np.zeros(3, np.float32)}, cfg)
    table = state["model.embed_tokens.weight"]
    assert_same_bits(params_from_hf(state | {"lm_head.weight": table}, cfg), params_from_hf(state, cfg))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        params_from_hf(state | {"lm_head.weight": -table}, cfg)


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000])
@pytest.mark.parametrize("family", ["llama3", "gemma3", "qwen2"])
def test_export_then_import(family, max_file_bytes, tmp_path, rng):
    state = random_state(load_file(GOLDEN / family / "model.safetensors"), rng)
    cfg = dataclasses.replace(load_config(GOLDEN / family), param_dtype="bfloat16", dtype="bfloat16")
    params = jax.tree.map(jnp.asarray, params_from_hf(state, cfg))
    export_hf(params, cfg, tmp_path / "out", max_file_bytes=max_file_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {k: v for f in files for k, v in load_file(f).items()}
    assert_same_bits(written, state)
    if max_file_bytes < 10**9:
        assert len(files) > 1
        assert all(f.stat().st_size < max_file_bytes + 5_000 for f in files)  # the header comes on top
    again, cfg_again = import_hf(tmp_path / "out")
    assert_same_bits(again, params)
    assert dataclasses.replace(cfg_again, name=cfg.name) == cfg
    with pytest.raises(ValueError, match="is not empty"):
        export_hf(params, cfg, tmp_path / "out")


@pytest.mark.parametrize("mesh", ["fsdp=2,tp=3", "fsdp=8", "dp=2,tp=4"])
def test_import_into_shards(mesh, tmp_path, rng):
    """Nine heads of smollm2: tp=3 splits them, tp=4 does not; what each device gets is its slice of the whole."""
    cfg = dataclasses.replace(load_config(GOLDEN / "smollm2"), param_dtype="float32", dtype="float32")
    path = tmp_path / "model"
    params = params_from_hf(random_state(load_file(GOLDEN / "smollm2" / "model.safetensors"), rng), cfg)
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    export_hf(params, cfg, path, max_file_bytes=50_000)
    config = MeshConfig.parse(mesh)
    devices = jax.devices()[: config.pp * config.dp * config.fsdp * config.ep * config.cp * config.tp]
    shardings = param_shardings(param_specs(cfg), make_mesh(config, devices=devices), MEGATRON_FSDP)
    sharded, _ = import_hf(path, shardings)
    assert jax.tree.map(lambda x: x.sharding, sharded) == shardings
    assert any(not s.is_fully_replicated for s in jax.tree.leaves(shardings))
    assert_same_bits(sharded, params)
    export_hf(sharded, cfg, tmp_path / "again", max_file_bytes=50_000)
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name


def test_import_reads_only_the_slices(monkeypatch, rng):
    """A device's part of wq costs its heads, not the tensor."""
    from jaxscale.checkpoint.huggingface import hf_layout
    from jaxscale.checkpoint.layout import apply_layout, inverse
    from jaxscale.checkpoint.maps import Lazy

    cfg = load_config(GOLDEN / "smollm2")
    state = load_file(GOLDEN / "smollm2" / "model.safetensors")
    asked = []

    def recorded(array):
        def read(box):
            asked.append(array[box].size)
            return array[box]

        return Lazy(array.shape, array.dtype, read)

    whole = params_from_hf(state, cfg)["layers"]["attn"]["wq"]
    box = (slice(1, 2), slice(0, 36), slice(3, 6), slice(0, 8))
    lazily = apply_layout({name: recorded(array) for name, array in state.items()}, inverse(hf_layout(cfg)))
    part = lazily["layers/attn/wq"].read(box)
    assert part.tobytes() == whole[box].tobytes()
    assert sum(asked) == part.size


def test_import_casts_to_the_parameters_dtype():
    cfg = dataclasses.replace(load_config(GOLDEN / "llama2"), param_dtype="float32")
    params, _ = import_hf(GOLDEN / "llama2", cfg=cfg)
    stored = params_from_hf(load_file(GOLDEN / "llama2" / "model.safetensors"), cfg)
    assert stored["embed"].dtype == jnp.bfloat16
    assert_same_bits(params, jax.tree.map(lambda x: x.astype(np.float32), stored))


def test_damaged_directories(tmp_path):
    source = GOLDEN / "llama2"
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json cannot be read"):
        import_hf(tmp_path)
    data = (source / "model.safetensors").read_bytes()
    for broken in (data[:-1], data[: len(data) // 2], b"", b"\xff" * 64, data + b"x"):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
            import_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its directory"):
        import_hf(tmp_path)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-1\.safetensors cannot be read"):
        import_hf(tmp_path)
    save_file({"model.norm.weight": np.zeros(48, np.int8)}, tmp_path / "model-1.safetensors")
    with pytest.raises(ValueError, match="holds int8"):
        import_hf(tmp_path)


def test_config_of_a_decoder_of_our_own_has_an_export():
    cfg = ModelConfig(
        vocab_size=11,
        num_layers=3,
        embed_dim=8,
        mlp_dim=12,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        window=5,
        layer_pattern=("local",),
    )
    back = config_from_hf(config_to_hf(cfg))
    assert dataclasses.replace(back, name=cfg.name, dtype=cfg.dtype) == cfg
