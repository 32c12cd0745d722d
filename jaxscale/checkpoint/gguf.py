"""GGUF files of Llama-architecture models -> ModelConfig, parameters, tokenizer.

params, cfg, tokenizer = import_gguf("SmolLM2-135M-Instruct.Q4_1.gguf")
params, cfg, tokenizer = import_gguf(path, mesh=mesh, rules=MEGATRON_FSDP)  # straight into shards

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. What lies where is a layout
(`gguf_layout`), read through its inverse: rows are dequantized when a shard asks for them.
"""

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxscale.chatml import END, START, chatml
from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.int4_layouts import unpack_gguf
from jaxscale.checkpoint.maps import Box, Lazy
from jaxscale.checkpoint.reading import read_into
from jaxscale.config import ModelConfig
from jaxscale.models.decoder import param_specs
from jaxscale.params import param_shardings, path_name
from jaxscale.sharding import place
from pallas_kernels.quantized_matmul.array import QuantizedArray
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
    packed: bool = False,
) -> tuple[dict[str, Any], ModelConfig, "tokenizers.Tokenizer"]:
    """Parameters, configuration and tokenizer of a GGUF file.

    The host holds this process's shards of one stacked parameter at a time; of packed ones the whole parameter.

    Args:
      path: the file, or its reader.
      mesh, rules: where the parameters go; without a mesh, to the default device.
      dtype: "float32" or "bfloat16", of the parameters and the computation.
      packed: matrices in Q4_0, Q4_1 and Q8_0 become QuantizedArrays of the file's own values, scales and offsets.

    Raises:
      ValueError: not a GGUF file, an architecture or tokenizer that is not supported, missing or unexpected tensors.
    """
    reader = open_gguf(path) if isinstance(path, str | Path) else path
    cfg = config_from_gguf(reader, dtype=dtype)
    specs = param_specs(cfg)
    stored = _expected({tensor.name: _dequantized(tensor) for tensor in reader.tensors}, cfg)
    layout = lay.inverse(gguf_layout(cfg))
    named = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs)}
    layout += tuple(lay.cast(name, spec.dtype, old="float32") for name, spec in named.items() if dtype != "float32")
    shardings = jax.tree.map(lambda _: None, specs) if mesh is None else param_shardings(specs, mesh, rules)
    target = jax.tree.map(
        lambda spec, where: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=where), specs, shardings
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kept = {} if not packed else {name: w for name in named if (w := _packed(tensors, name, cfg)) is not None}
    if packed and not kept:
        kinds = sorted({t.tensor_type.name for t in reader.tensors})
        raise ValueError(f"the GGUF file has no matrix in Q4_0, Q4_1 or Q8_0 to keep packed; its types are {kinds}")
    read = read_into(target, stored, layout, only=[name for name in named if name not in kept])
    tree = jax.tree.map_with_path(lambda path, x: kept.get(path_name(path), x), read)
    if mesh is not None:
        tree = jax.device_put(tree, place(tree, specs, mesh, rules))
    return jax.tree.map(jnp.asarray, tree), cfg, tokenizer_from_gguf(reader)


def gguf_layout(cfg: ModelConfig) -> tuple[lay.Op, ...]:
    """From the parameters of `param_specs(cfg)` to the tensors of llama.cpp, dequantized."""
    N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    # ggml rotates neighbouring dims, we rotate halves: dim i of ours is stored at 2 i, dim H/2 + i at 2 i + 1.
    neighbours = [k // 2 + k % 2 * (H // 2) for k in range(H)]
    ops: list[lay.Op] = []
    for path, _ in jax.tree.leaves_with_path(param_specs(cfg)):
        name = path_name(path)
        part = name.rpartition("/")[2]
        if part in ("wq", "wk", "wv"):
            ops.append(lay.transpose(name, (0, 2, 3, 1)))
            if part != "wv":
                ops.append(lay.permute(name, 2, neighbours))
            ops.append(lay.merge_dims(name, 1, (N if part == "wq" else K, H)))
        elif part == "wo":
            ops += [lay.merge_dims(name, 1, (N, H)), lay.transpose(name, (0, 2, 1))]
        elif part in ("w_gate", "w_up", "w_down"):
            ops.append(lay.transpose(name, (0, 2, 1)))
        elif part == "head":
            ops.append(lay.transpose(name, (1, 0)))
        to = _TENSORS[name].replace("{}", "{i}")
        ops.append(lay.unstack(name, to) if "{i}" in to else lay.rename(name, to))
    return tuple(ops)


def open_gguf(path: str | Path) -> "gguf.GGUFReader":
    """The fields and tensors of a file, mapped into memory. Raises ValueError when it is no whole GGUF file."""
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            self.data = np.asarray(self.data)  # of a memmap a vocabulary's 50,000 slices take twice as long
            # What a header says is there may not be: without this a length of 1 << 60 is counted through.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"it ends after {len(self.data)} bytes, within what its header says it holds")
            return super()._get(offset, dtype, count, override_order)

    try:
        return Reader(path)
    except (OSError, ValueError, IndexError, KeyError, RecursionError) as e:
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
    if START not in template:
        return None, () if stop is None else (stop,)
    default = re.search(rf"{re.escape(START)}system\\?\n(.*?){re.escape(END)}", template, re.DOTALL)
    system = default.group(1) if default and "{" not in default.group(1) else None
    end = _field(reader, "tokenizer.ggml.tokens").index(END)
    return functools.partial(chatml, system=system), tuple(dict.fromkeys([end] if stop is None else [stop, end]))


_REQUIRED = object()


def _field(reader: "gguf.GGUFReader", name: str, default: Any = _REQUIRED) -> Any:
    field = reader.get_field(name)
    if field is not None:
        return field.contents()
    if default is _REQUIRED:
        raise ValueError(f"the GGUF file lacks the field {name}; is it a whole model?")
    return default


def _expected(tensors: Mapping[str, Lazy], cfg: ModelConfig) -> Mapping[str, Lazy]:
    """`tensors`, whose names and shapes are those of the configuration."""
    nothing = lambda box: np.empty(0)
    specs = {
        path_name(path): Lazy(spec.shape, np.dtype(np.float32), nothing)
        for path, spec in jax.tree.leaves_with_path(param_specs(cfg))
    }
    expected = {name: array.shape for name, array in lay.apply_layout(specs, gguf_layout(cfg)).items()}
    for what, names in (("lacks", expected.keys() - tensors), ("has unexpected", tensors.keys() - expected)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"the GGUF file {what} {len(names)} tensors for {len(expected)} expected: {some}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} has shape {tensors[name].shape} but the configuration says {shape}")
    return tensors


def _packed(tensors: Mapping[str, Any], name: str, cfg: ModelConfig) -> QuantizedArray | None:
    """A parameter as its tensors hold it, stacked; None when they are not all of one type that is kept packed."""
    stored = _TENSORS[name]
    layers = [tensors[stored.format(i)] for i in range(cfg.num_layers)] if "{}" in stored else [tensors[stored]]
    kinds = {t.tensor_type.name for t in layers}
    if len(kinds) > 1 or not kinds <= {"Q4_0", "Q4_1", "Q8_0"}:
        return None
    kind, part = kinds.pop(), name.rpartition("/")[2]
    parts = [unpack_gguf(np.asarray(t.data), kind) for t in layers]
    H, turned = cfg.head_dim, {"wq": cfg.num_heads, "wk": cfg.num_kv_heads, "wv": cfg.num_kv_heads}
    # Where our dim i of a head is stored: ggml rotates neighbours, we rotate halves.
    halves = [2 * i % H + 2 * i // H for i in range(H)] if part in ("wq", "wk") else slice(None)

    def rows(x: np.ndarray) -> np.ndarray:
        return x.reshape(turned[part], H, -1)[:, halves] if part in turned else x

    values, scales, offsets = ([None if x is None else rows(x) for x in layer] for layer in zip(*parts))
    stack = (lambda xs: np.stack(xs)) if "{}" in stored else (lambda xs: xs[0])
    values = stack(values)
    if part == "wo":
        values = values.reshape(*values.shape[:-1], cfg.num_heads, H)
    contraction = {"embed": (-1,), "wo": (-3, -2)} | dict.fromkeys(turned, (-3,))
    return QuantizedArray(
        jnp.asarray(values.astype(jnp.int8 if kind == "Q8_0" else jnp.int4)),
        jnp.asarray(stack(scales)),
        None if kind != "Q4_1" else jnp.asarray(stack(offsets)),
        contraction=contraction.get(part, (-2,)),
        unsigned=kind == "Q4_1",
    )


def _dequantized(tensor: Any) -> Lazy:
    """A tensor as a lazy float32 array; of a box its rows are dequantized."""
    import gguf

    data, kind = tensor.data, tensor.tensor_type
    shape = tuple(int(n) for n in reversed(tensor.shape))

    def read(box: Box) -> np.ndarray:
        # np.asarray: numpy.memmap is slow to slice. The rows of a matrix are quantized each by itself.
        rows = np.asarray(data[box[0]] if len(shape) > 1 else data)
        return gguf.dequantize(rows, kind)[(slice(None), *box[1:]) if len(shape) > 1 else box]

    return Lazy(shape, np.dtype(np.float32), read)
