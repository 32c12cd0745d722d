"""GGUF files of Llama-architecture models -> ModelConfig, parameters, tokenizer.

params, cfg, tokenizer = import_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
params, cfg, tokenizer = import_gguf(path, mesh=mesh, rules=MEGATRON_FSDP)  # straight into shards

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantized tensors are dequantized one at a time.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxscale.config import ModelConfig
from jaxscale.models.decoder import param_specs
from jaxscale.params import ParamSpec, param_shardings, path_name
from sharding_rules.rules import MEGATRON_FSDP, Rules

if TYPE_CHECKING:
    import gguf
    import tokenizers

# Our path -> the tensor's name, {} for the layer. Matrices are stored [out, in].
_TENSORS = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "layers/attn_norm": "blk.{}.attn_norm.weight",
    "layers/attn/wq": "blk.{}.attn_q.weight",
    "layers/attn/wk": "blk.{}.attn_k.weight",
    "layers/attn/wv": "blk.{}.attn_v.weight",
    "layers/attn/wo": "blk.{}.attn_output.weight",
    "layers/mlp_norm": "blk.{}.ffn_norm.weight",
    "layers/mlp/w_gate": "blk.{}.ffn_gate.weight",
    "layers/mlp/w_up": "blk.{}.ffn_up.weight",
    "layers/mlp/w_down": "blk.{}.ffn_down.weight",
}


def import_gguf(
    path: "str | Path | gguf.GGUFReader",
    *,
    mesh: Mesh | None = None,
    rules: Rules = MEGATRON_FSDP,
    dtype: str = "float32",
) -> tuple[dict[str, Any], ModelConfig, "tokenizers.Tokenizer"]:
    """Parameters, configuration and tokenizer of a GGUF file.

    The host holds one dequantized tensor and this process's shards of one stacked parameter at a time.

    Args:
      path: the file, or its reader.
      mesh, rules: where the parameters go; without a mesh, to the default device.
      dtype: "float32" or "bfloat16", of the parameters and the computation.

    Raises:
      ValueError: not a GGUF file, an architecture or tokenizer that is not supported, missing or unexpected tensors.
    """
    reader = open_gguf(path) if isinstance(path, str | Path) else path
    cfg = config_from_gguf(reader, dtype=dtype)
    tensors = {t.name: t for t in reader.tensors}
    _check(tensors, cfg)
    specs = param_specs(cfg)
    leaves, treedef = jax.tree.flatten_with_path(specs)
    targets = [None] * len(leaves)
    if mesh is not None:
        targets = treedef.flatten_up_to(param_shardings(specs, mesh, rules))
    params = []
    for (key_path, spec), target in zip(leaves, targets):
        name = path_name(key_path)
        params.append(_put(lambda layer, name=name: _read(tensors, name, layer, cfg), name, spec, target))
    return treedef.unflatten(params), cfg, tokenizer_from_gguf(reader)


def open_gguf(path: str | Path) -> "gguf.GGUFReader":
    """The fields and tensors of a file, mapped into memory. Raises ValueError when it is no whole GGUF file."""
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise ValueError(f"{path} cannot be read as GGUF: {e}; is the download complete?") from e


def config_from_gguf(reader: "gguf.GGUFReader", *, dtype: str = "float32") -> ModelConfig:
    """The ModelConfig that the metadata of a file says."""
    arch = _field(reader, "general.architecture")
    if arch != "llama":
        raise ValueError(f"the GGUF file holds a model of architecture {arch!r}; supported is llama")
    scaling = _field(reader, "llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"the GGUF file asks for rope scaling {scaling!r}, which its import does not know")
    num_heads, embed_dim = _field(reader, "llama.attention.head_count"), _field(reader, "llama.embedding_length")
    head_dim = _field(reader, "llama.attention.key_length", embed_dim // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := _field(reader, key, head_dim)) != head_dim:
            raise ValueError(f"the GGUF file says {key}={found}; the decoder needs it equal to head_dim={head_dim}")
    return ModelConfig(
        name=_field(reader, "general.name", "gguf"),
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        num_layers=_field(reader, "llama.block_count"),
        embed_dim=embed_dim,
        mlp_dim=_field(reader, "llama.feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=_field(reader, "llama.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_seq_len=_field(reader, "llama.context_length"),
        # Stored as float32: 9.999999747378752e-06 means 1e-5.
        norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_theta=float(_field(reader, "llama.rope.freq_base", 10_000.0)),
        tie_embeddings="output.weight" not in {t.name for t in reader.tensors},
        dtype=dtype,  # pyright: ignore[reportArgumentType]
        param_dtype=dtype,  # pyright: ignore[reportArgumentType]
    )


def tokenizer_from_gguf(reader: "gguf.GGUFReader") -> "tokenizers.Tokenizer":
    """The byte-level BPE tokenizer inside a file; its control tokens are special tokens, matched before the rest."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    kind, pre = _field(reader, "tokenizer.ggml.model"), _field(reader, "tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    if kind != "gpt2" or pre not in splits:
        raise ValueError(
            f"the GGUF file's tokenizer is {kind!r} with pre-tokenizer {pre!r}; "
            f"supported is 'gpt2' (byte-level BPE) with {', '.join(splits)}"
        )
    tokens, types = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = splits[pre]
    tokenizer.decoder = decoders.ByteLevel()
    # token_type: 1 normal, 3 control, 4 user-defined (ggml's enum).
    special = [tokenizers.AddedToken(t, special=True, normalized=False) for t, kind in zip(tokens, types) if kind == 3]
    added = [tokenizers.AddedToken(t, special=False, normalized=False) for t, kind in zip(tokens, types) if kind == 4]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    return tokenizer


def bos_from_gguf(reader: "gguf.GGUFReader") -> str | None:
    """The token that begins a text."""
    bos = _field(reader, "tokenizer.ggml.bos_token_id", None)
    return None if bos is None else _field(reader, "tokenizer.ggml.tokens")[bos]


def chat_from_gguf(
    reader: "gguf.GGUFReader",
) -> tuple[Callable[[list[dict[str, str]]], str] | None, tuple[int, ...]]:
    """The chat template of a file as a function (None when it has none, or one that is not ChatML), and the tokens that
    end an answer."""
    stop = _field(reader, "tokenizer.ggml.eos_token_id", None)
    template = _field(reader, "tokenizer.chat_template", "")
    if "<|im_start|>" not in template:
        return None, () if stop is None else (stop,)
    default = re.search(r"<\|im_start\|>system\\?\n(.*?)<\|im_end\|>", template, re.DOTALL)
    system = default.group(1) if default and "{" not in default.group(1) else None
    end = _field(reader, "tokenizer.ggml.tokens").index("<|im_end|>")
    return lambda messages: chatml(messages, system), tuple(dict.fromkeys([end] if stop is None else [stop, end]))


def chatml(messages: list[dict[str, str]], system: str | None = None) -> str:
    """Messages {"role", "content"} as ChatML text that asks for the assistant's next one.

    Args:
      system: said first when the messages do not begin with a system message of their own.
    """
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


_REQUIRED = object()


def _field(reader: "gguf.GGUFReader", name: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"the GGUF file lacks the field {name}; is it a whole model?")
    return default


def _check(tensors: dict[str, Any], cfg: ModelConfig) -> None:
    """Names and shapes of the tensors are those of the configuration."""
    expected = {}
    for key_path, spec in jax.tree.leaves_with_path(param_specs(cfg)):
        name = path_name(key_path)
        shape = _file_shape(name, spec)
        for layer in range(cfg.num_layers) if name.startswith("layers/") else [0]:
            expected[_TENSORS[name].format(layer)] = shape
    for what, names in (("lacks", expected.keys() - tensors), ("has unexpected", tensors.keys() - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"the GGUF file {what} {len(names)} tensors for {len(expected)} expected: {some}")
    for name, shape in expected.items():
        found = tuple(int(n) for n in reversed(tensors[name].shape))
        if found != shape:
            raise ValueError(f"{name} has shape {found} but the configuration says {shape}")


def _file_shape(name: str, spec: ParamSpec) -> tuple[int, ...]:
    shape = spec.shape[1:] if name.startswith("layers/") else spec.shape
    if name.endswith(("wq", "wk", "wv")):
        return shape[1] * shape[2], shape[0]
    if name.endswith("wo"):
        return shape[2], shape[0] * shape[1]
    return shape if name == "embed" else shape[::-1]


def _read(tensors: dict[str, Any], name: str, layer: int, cfg: ModelConfig) -> np.ndarray:
    """One layer of a parameter, float32, in our shape."""
    import gguf

    tensor = tensors[_TENSORS[name].format(layer)]
    w = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)  # numpy.memmap is slow to slice
    H = cfg.head_dim
    if name.endswith(("wq", "wk")):
        # ggml rotates neighbouring dims, we rotate halves: dim i of ours is stored at 2 i, dim H/2 + i at 2 i + 1.
        w = w.reshape(-1, H // 2, 2, cfg.embed_dim).swapaxes(1, 2)
    if name.endswith(("wq", "wk", "wv")):
        return np.moveaxis(w.reshape(-1, H, cfg.embed_dim), 2, 0)
    if name.endswith("wo"):
        return w.T.reshape(-1, H, cfg.embed_dim)
    return w if name == "embed" else w.T


def _put(read: Callable[[int], np.ndarray], name: str, spec: ParamSpec, sharding: Any) -> jax.Array:
    """A parameter on its devices. Each layer is dequantized once; of it the shards of this process are kept."""
    dtype = jnp.dtype(spec.dtype)
    whole = (slice(None),) * len(spec.shape)
    indices: Any = [whole] if sharding is None else sharding.addressable_devices_indices_map(spec.shape).values()
    bounds = {_bounds(index, spec.shape) for index in indices}
    shards = {b: np.empty([stop - start for start, stop in b], dtype) for b in bounds}
    for layer in range(spec.shape[0]) if name.startswith("layers/") else [None]:
        values = read(layer or 0)
        for b, shard in shards.items():
            if layer is None:
                shard[...] = values[_slices(b)]
            elif b[0][0] <= layer < b[0][1]:
                shard[layer - b[0][0]] = values[_slices(b[1:])]
    if sharding is None:
        return jax.device_put(shards[_bounds(whole, spec.shape)])
    return jax.make_array_from_callback(spec.shape, sharding, lambda index: shards[_bounds(index or whole, spec.shape)])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def _slices(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)
