"""GGUF import against files written here from random parameters, as llama.cpp's converter lays them out."""

import gguf
import jax
import numpy as np
import pytest

from jaxscale.checkpoint.gguf import import_gguf, open_gguf
from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, path_name
from jaxscale.pretrained import load_model
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=260,
    num_layers=3,
    embed_dim=64,
    mlp_dim=96,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
    max_seq_len=128,
    rope_theta=5000.0,
    tie_embeddings=False,
    dtype="float32",
)
NAMES = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "attn_norm": "attn_norm"}
NAMES |= {"mlp_norm": "ffn_norm", "w_gate": "ffn_gate", "w_up": "ffn_up", "w_down": "ffn_down"}


def byte_characters():
    """GPT-2's printable character for each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def write(path, params, *, change=None, arch="llama", skip=None, quantize=None):
    writer = gguf.GGUFWriter(str(path), arch)
    fields = {
        "context_length": CFG.max_seq_len,
        "embedding_length": CFG.embed_dim,
        "block_count": CFG.num_layers,
        "feed_forward_length": CFG.mlp_dim,
        "attention.head_count": CFG.num_heads,
        "attention.head_count_kv": CFG.num_kv_heads,
        "attention.key_length": CFG.head_dim,
        "attention.value_length": CFG.head_dim,
        "rope.dimension_count": CFG.head_dim,
    }
    for name, value in (fields | (change or {})).items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_name("tiny")
    writer.add_layer_norm_rms_eps(CFG.norm_eps)
    writer.add_rope_freq_base(CFG.rope_theta)
    characters = byte_characters()
    tokens = ["<|im_start|>", "<|im_end|>", *(characters[b] for b in range(256)), "ab", "abc"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key_path, array in jax.tree.leaves_with_path(params):
        name = path_name(key_path).split("/")[-1]
        for i in range(CFG.num_layers) if name in NAMES else [None]:
            w = np.asarray(array if i is None else array[i])
            if name in ("wq", "wk", "wv"):
                w = w.transpose(1, 2, 0)  # [heads, H, D]
                if name != "wv":  # neighbouring dims rotate together: (half, dim) -> (dim, half)
                    w = w.reshape(-1, 2, CFG.head_dim // 2, CFG.embed_dim).swapaxes(1, 2)
                w = w.reshape(-1, CFG.embed_dim)
            elif name == "wo":
                w = w.reshape(-1, CFG.embed_dim).T
            elif w.ndim == 2 and name != "embed":
                w = w.T
            top = {"embed": "token_embd", "head": "output", "final_norm": "output_norm"}
            full = f"{top[name] if i is None else f'blk.{i}.{NAMES[name]}'}.weight"
            if full == skip:
                continue
            w = np.ascontiguousarray(w)
            if quantize is not None and w.ndim == 2:
                writer.add_tensor(full, gguf.quantize(w, quantize), raw_dtype=quantize)
            else:
                writer.add_tensor(full, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def params(module_rng):
    key = jax.random.key(int(module_rng.integers(1 << 30)))
    specs = decoder.param_specs(CFG)
    # Norm scales are ones at first: make them differ from one another.
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), init_params(key, specs))


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "tp": 3}, {"fsdp": 4, "tp": 2}], ids=str)
def test_parameters_round_trip_into_shards(tmp_path, params, sizes):
    mesh = make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes) if sizes else None
    got, cfg, _ = import_gguf(write(tmp_path / "m.gguf", params), mesh=mesh)
    assert cfg == CFG
    jax.tree.map(np.testing.assert_array_equal, got, params)
    if mesh is not None:
        expected = init_params(jax.random.key(0), decoder.param_specs(CFG), mesh, MEGATRON_FSDP)
        jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), got, expected)


def test_quantized_tensors_are_dequantized(tmp_path, params):
    kind = gguf.GGMLQuantizationType.Q8_0
    got, _, _ = import_gguf(write(tmp_path / "m.gguf", params, quantize=kind), dtype="bfloat16")
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(params)):
        assert a.dtype == "bfloat16"
        error = np.abs(np.asarray(a, np.float32) - np.asarray(b)).max()
        assert error < np.abs(np.asarray(b)).max() / 100, path  # 8 bits a block of 32, then 8 bits of mantissa


def test_tokenizer_and_load_model(tmp_path, params):
    model = load_model(write(tmp_path / "m.gguf", params))
    encode = model.tokenizer.encode
    assert encode("abcab").tolist() == [259, 258]
    assert encode("<|im_start|>ab<|im_end|>", special=True).tolist() == [0, 258, 1]
    assert 0 not in encode("<|im_start|>")
    for text in ("naïve 日本\n\t🙂 12", "ab abc  c"):
        assert model.tokenizer.decode(encode(text)) == text
    assert model.stop_tokens == (1,)
    assert model.chat is None
    assert model.encode_chat("ab") == [258]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2'; supported is llama"),
        ({"skip": "blk.1.ffn_up.weight"}, r"lacks 1 tensors .*blk.1.ffn_up.weight"),
        ({"skip": "blk.2.attn_q.weight", "change": {"block_count": 2}}, "has unexpected 8 tensors"),
        ({"change": {"feed_forward_length": 64}}, r"ffn_down.weight has shape \(64, 96\).*\(64, 64\)|ffn_.*shape"),
        ({"change": {"rope.dimension_count": 16}}, "rope.dimension_count=16.*head_dim=32"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, params, options, message):
    path = write(tmp_path / "m.gguf", params, **options)
    with pytest.raises(ValueError, match=message):
        import_gguf(path)


def test_damaged_files(tmp_path, params):
    whole = write(tmp_path / "m.gguf", params).read_bytes()
    for name, content in {"no.gguf": b"no GGUF file at all", "cut.gguf": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} cannot be read as GGUF"):
            open_gguf(tmp_path / name)
    with pytest.raises(ValueError, match="is no model; give a name"):
        load_model(tmp_path / "absent")
