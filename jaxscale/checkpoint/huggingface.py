"""Hugging Face checkpoints, in and out: config.json and safetensors <-> ModelConfig and the decoder's parameters.

What lies where is a layout (`hf_layout`); importing reads through its inverse, shard by shard.

params, cfg = import_hf("SmolLM2-135M")  # on the default device

cfg = load_config("Llama-3.1-8B")  # or straight into shards; each process reads only what its devices hold
params, cfg = import_hf("Llama-3.1-8B", shardings=param_shardings(param_specs(cfg), mesh, rules))
export_hf(params, cfg, "out/hf")
"""

import functools
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError

from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.huggingface_config import config_from_hf, config_to_hf
from jaxscale.checkpoint.huggingface_moe import model_type
from jaxscale.checkpoint.maps import Lazy, lazy
from jaxscale.checkpoint.ranks import open_safetensors, write_safetensors
from jaxscale.checkpoint.reading import read_into
from jaxscale.config import ModelConfig
from jaxscale.models.decoder import param_specs
from jaxscale.params import path_name

# Where each parameter lies: the tensor's name, and for each of its dims the dims of ours that are merged in it.
# ((1, 2), (0,)): wq [D, N, H] is q_proj [N*H, D]. For each {} in the name a leading dim is unstacked first: the layers,
# then the experts.
_LAYER = "model.layers.{}."
_TENSORS: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "embed": ("model.embed_tokens.weight", ((0,), (1,))),
    "head": ("lm_head.weight", ((1,), (0,))),
    "final_norm": ("model.norm.weight", ((0,),)),
    "layers/attn_norm": (_LAYER + "input_layernorm.weight", ((0,),)),
    "layers/attn/wq": (_LAYER + "self_attn.q_proj.weight", ((1, 2), (0,))),
    "layers/attn/wk": (_LAYER + "self_attn.k_proj.weight", ((1, 2), (0,))),
    "layers/attn/wv": (_LAYER + "self_attn.v_proj.weight", ((1, 2), (0,))),
    "layers/attn/wo": (_LAYER + "self_attn.o_proj.weight", ((2,), (0, 1))),
    "layers/attn/bq": (_LAYER + "self_attn.q_proj.bias", ((0, 1),)),
    "layers/attn/bk": (_LAYER + "self_attn.k_proj.bias", ((0, 1),)),
    "layers/attn/bv": (_LAYER + "self_attn.v_proj.bias", ((0, 1),)),
    "layers/attn/bo": (_LAYER + "self_attn.o_proj.bias", ((0,),)),
    "layers/attn/q_norm": (_LAYER + "self_attn.q_norm.weight", ((0,),)),
    "layers/attn/k_norm": (_LAYER + "self_attn.k_norm.weight", ((0,),)),
    "layers/attn/sinks": (_LAYER + "self_attn.sinks", ((0,),)),
    "layers/attn/wq_down": (_LAYER + "self_attn.q_a_proj.weight", ((1,), (0,))),
    "layers/attn/q_latent_norm": (_LAYER + "self_attn.q_a_layernorm.weight", ((0,),)),
    "layers/attn/wq_up": (_LAYER + "self_attn.q_b_proj.weight", ((1, 2), (0,))),
    "layers/attn/wkv_a": (_LAYER + "self_attn.kv_a_proj_with_mqa.weight", ((1,), (0,))),
    "layers/attn/kv_latent_norm": (_LAYER + "self_attn.kv_a_layernorm.weight", ((0,),)),
    "layers/attn/wkv_b": (_LAYER + "self_attn.kv_b_proj.weight", ((1, 2), (0,))),
    "layers/attn_post_norm": (_LAYER + "post_attention_layernorm.weight", ((0,),)),
    "layers/mlp_norm": (_LAYER + "pre_feedforward_layernorm.weight", ((0,),)),
    "layers/mlp/w_gate": (_LAYER + "mlp.gate_proj.weight", ((1,), (0,))),
    "layers/mlp/w_up": (_LAYER + "mlp.up_proj.weight", ((1,), (0,))),
    "layers/mlp/w_down": (_LAYER + "mlp.down_proj.weight", ((1,), (0,))),
    "layers/mlp/b_gate": (_LAYER + "mlp.gate_proj.bias", ((0,),)),
    "layers/mlp/b_up": (_LAYER + "mlp.up_proj.bias", ((0,),)),
    "layers/mlp/b_down": (_LAYER + "mlp.down_proj.bias", ((0,),)),
    "layers/moe/router/w": (_LAYER + "mlp.gate.weight", ((1,), (0,))),
    "layers/moe/router/b": (_LAYER + "mlp.router.bias", ((0,),)),
    "layers/moe/router/balance_bias": (_LAYER + "mlp.gate.e_score_correction_bias", ((0,),)),
    "layers/moe/shared/w_gate": (_LAYER + "mlp.shared_experts.gate_proj.weight", ((1,), (0,))),
    "layers/moe/shared/w_up": (_LAYER + "mlp.shared_experts.up_proj.weight", ((1,), (0,))),
    "layers/moe/shared/w_down": (_LAYER + "mlp.shared_experts.down_proj.weight", ((1,), (0,))),
    "layers/moe/experts/w_gate": (_LAYER + "mlp.experts.{}.gate_proj.weight", ((1,), (0,))),
    "layers/moe/experts/w_up": (_LAYER + "mlp.experts.{}.up_proj.weight", ((1,), (0,))),
    "layers/moe/experts/w_down": (_LAYER + "mlp.experts.{}.down_proj.weight", ((1,), (0,))),
    "layers/moe/experts/w_gate_up": (_LAYER + "mlp.experts.gate_up_proj", ((0,), (1,), (2,))),
    "layers/moe/experts/b_gate_up": (_LAYER + "mlp.experts.gate_up_proj_bias", ((0,), (1,))),
    "layers/moe/experts/b_down": (_LAYER + "mlp.experts.down_proj_bias", ((0,), (1,))),
    "layers/mlp_post_norm": (_LAYER + "post_feedforward_layernorm.weight", ((0,),)),
}

_MIXTRAL = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_GPT_OSS: dict[str, tuple[str, tuple[tuple[int, ...], ...]]] = {
    "layers/moe/router/w": (_LAYER + "mlp.router.weight", ((1,), (0,))),
    "layers/moe/experts/w_down": (_LAYER + "mlp.experts.down_proj", ((0,), (1,), (2,))),
}


def import_hf(path: str | Path, shardings: Any = None, cfg: ModelConfig | None = None) -> tuple[Any, ModelConfig]:
    """Parameters and configuration of a Hugging Face directory, read tensor by tensor.

    Args:
      path: holds config.json and model.safetensors, or model.safetensors.index.json and its parts.
      shardings: a tree of Sharding like `param_specs(cfg)`: of every tensor just the slices of this process's devices
        are read. None: whole arrays on the default device.
      cfg: instead of config.json, for example `dataclasses.replace(load_config(path), param_dtype="float32")`.

    Returns:
      (params, cfg), the parameters in cfg.param_dtype.

    Raises:
      ValueError: a damaged or missing file; tensors that are missing, unexpected or of another shape; a configuration
        that asks for what the decoder does not have.
    """
    path = Path(path)
    cfg = load_config(path) if cfg is None else cfg
    specs = param_specs(cfg)
    arrays = _expected(_open_tensors(path), cfg)
    layout = lay.inverse(hf_layout(cfg))
    stored = lay.apply_layout(arrays, layout)
    casts = [
        lay.cast(name, spec.dtype, old=stored[name].dtype.name)
        for name, spec in _named(specs).items()
        if stored[name].dtype != jnp.dtype(spec.dtype)
    ]
    target = jax.tree.map(
        lambda spec, where: jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype), sharding=where),
        specs,
        jax.tree.map(lambda _: None, specs) if shardings is None else shardings,
    )
    return jax.tree.map(jnp.asarray, read_into(target, arrays, (*layout, *casts))), cfg


def export_hf(
    params: Any,
    cfg: ModelConfig,
    path: str | Path,
    max_file_bytes: int = 5_000_000_000,
    tokenizer: str | Path | None = None,
) -> None:
    """Write a directory that transformers and `import_hf` read back bit by bit.

    Host memory holds one stacked parameter and one file at a time.

    Args:
      params: like `param_specs(cfg)`; every shard must be addressable by this process. Lazy arrays are read in turn.
      path: a new or empty directory. config.json is written last: a directory without it is half-written.
      max_file_bytes: what goes beyond it goes to further files, listed in an index.
      tokenizer: a directory with a tokenizer.json, such as a run's, which goes along.

    Raises:
      ValueError: the directory is not empty, or Hugging Face has no model_type that says what cfg says.
      OSError: it cannot be written, or the disk is full.
    """
    path = Path(path)
    hf_config = config_to_hf(cfg)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new directory to export to")
    path.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        _copy_tokenizer(Path(tokenizer), path)

    weight_map: dict[str, str] = {}
    tensors: dict[str, np.ndarray] = {}

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        try:
            write_safetensors(tensors, path / file, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path / file}: {error}") from None
        weight_map.update(dict.fromkeys(tensors, file))
        tensors.clear()

    for name, array in _exported(params, cfg):
        tensor = _contiguous(array)
        if tensors and sum(t.nbytes for t in tensors.values()) + tensor.nbytes > max_file_bytes:
            flush()
        tensors[name] = tensor
    flush()
    if len(files := set(weight_map.values())) == 1:
        (path / files.pop()).rename(path / "model.safetensors")
    else:
        total = {"total_size": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))}
        _write_json(path / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    _write_json(path / "config.json", hf_config | {"torch_dtype": str(jax.tree.leaves(params)[0].dtype)})


def _copy_tokenizer(source: Path, target: Path) -> None:
    shutil.copyfile(source / "tokenizer.json", target / "tokenizer.json")
    config = source / "tokenizer_config.json"
    # The class that takes tokenizer.json as it is: transformers would otherwise take the model's own.
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | (_read_json(config) if config.exists() else {})
    _write_json(target / "tokenizer_config.json", about)


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face directory, from its config.json."""
    return config_from_hf(_read_json(Path(path) / "config.json"))


def params_from_hf(state: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    """A state dict -> the nested dict of `param_specs(cfg)`, layers stacked, numpy arrays in the dtype that they have.

    Raises ValueError when tensors are missing, unexpected, or of another shape than cfg says.
    """
    arrays = {name: lazy(np.asarray(array)) for name, array in state.items()}
    mapped = lay.apply_layout(_expected(arrays, cfg), lay.inverse(hf_layout(cfg)))
    return jax.tree.map_with_path(lambda path, _: mapped[path_name(path)].whole(), param_specs(cfg))


def params_to_hf(params: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `params_from_hf`: contiguous numpy arrays by transformers' names; no head when it is tied."""
    return {name: _contiguous(array) for name, array in _exported(params, cfg)}


def hf_layout(cfg: ModelConfig) -> tuple[lay.Op, ...]:
    """From the parameters of `param_specs(cfg)` to the tensors of transformers."""
    shapes = {path: spec.shape for path, spec in _named(param_specs(cfg)).items()}
    ops = [*_one_stack(shapes), *_fused(shapes, cfg)]
    for path, shape in shapes.items():
        name, groups = _where(path, cfg)
        lead = name.count("{}")
        order = (*range(lead), *(lead + dim for dim in sum(groups, ())))
        if order != tuple(range(len(order))):
            ops.append(lay.transpose(path, order))
        for k, dims in enumerate(groups):
            if len(dims) > 1:
                ops.append(lay.merge_dims(path, lead + k, [shape[lead + dim] for dim in dims]))
        if lead == 0:
            ops.append(lay.rename(path, name))
            continue
        first, last = name.replace("{}", "{i}", 1), name.replace("{}", "{layer}", 1).replace("{}", "{i}")
        # What only layers with experts have begins after the plain ones.
        start = cfg.moe.first_dense if cfg.moe and path.startswith("layers/moe/") else 0
        ops.append(lay.unstack(path, first.replace("{}", "each"), first=start))
        if lead == 2:  # the experts of a layer, which were unstacked under the name of all
            ops.append(lay.unstack(first.replace("{i}", "{layer}").replace("{}", "each"), last))
    return tuple(ops)


def _where(name: str, cfg: ModelConfig) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """The tensor name of a parameter, with {} for its layer, and how its dims are merged."""
    name = name.removeprefix("dense_")
    if name == "layers/mlp_norm" and not cfg.post_norms:  # Llama names it as Gemma names the norm after attention
        name = "layers/attn_post_norm"
    kind = None if cfg.moe is None else model_type(cfg)
    tensor, groups = _GPT_OSS.get(name, _TENSORS[name]) if kind == "gpt_oss" else _TENSORS[name]
    if kind == "mixtral":
        for theirs, mixtral in _MIXTRAL.items():
            tensor = tensor.replace(theirs, mixtral)
    return tensor, groups


def _one_stack(shapes: dict[str, tuple[int, ...]]) -> Iterator[lay.Op]:
    """Plain layers before those with experts join them in what all layers have. Like `_fused` changes `shapes`."""
    for path in [p for p in shapes if p.startswith("dense_") and p.removeprefix("dense_") in shapes]:
        whole = path.removeprefix("dense_")
        sizes = shapes[path][0], shapes[whole][0]
        yield lay.fuse((path, whole), whole, axis=0, sizes=sizes)
        shapes[whole] = (sum(sizes), *shapes.pop(path)[1:])


def _fused(shapes: dict[str, tuple[int, ...]], cfg: ModelConfig) -> Iterator[lay.Op]:
    """What transformers holds in another order, or several parameters in one."""

    def fuse(parts, whole):
        sizes = [shapes[part][-1] for part in parts]
        shapes[whole] = (*shapes[parts[0]][:-1], sum(sizes))
        for part in parts:
            del shapes[part]
        return lay.fuse(parts, whole, axis=-1, sizes=sizes)

    if cfg.mla is not None:  # rotated dims are pairs there, halves here
        attn, nope, halves = "layers/attn/", cfg.mla.nope_dim, _alternating(cfg.mla.rope_dim)
        query = attn + ("wq" if cfg.mla.q_rank is None else "wq_up")
        yield lay.permute(query, -1, [*range(nope), *(nope + k for k in halves)])
        yield lay.permute(attn + "wk_rope", -1, halves)
        yield fuse((attn + "wkv_down", attn + "wk_rope"), attn + "wkv_a")
        yield fuse((attn + "wk_up", attn + "wv_up"), attn + "wkv_b")
    if cfg.moe is not None and model_type(cfg) == "gpt_oss":  # gate and up alternate there
        experts = "layers/moe/experts/"
        for kind in ("w", "b"):
            whole = f"{experts}{kind}_gate_up"
            yield fuse((f"{experts}{kind}_gate", f"{experts}{kind}_up"), whole)
            yield lay.permute(whole, -1, _alternating(shapes[whole][-1]))


def _alternating(size: int) -> list[int]:
    """Two halves as pairs: 0, size/2, 1, size/2 + 1, ..."""
    return [k // 2 + k % 2 * (size // 2) for k in range(size)]


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _exported(params: Any, cfg: ModelConfig) -> Iterator[tuple[str, Lazy]]:
    """(tensor name, tensor), those of one parameter after each other; it is on the host while they are read."""
    arrays = {}
    specs = param_specs(cfg)
    leaves = jax.tree.structure(specs).flatten_up_to(params)
    for (name, spec), array in zip(_named(specs).items(), leaves, strict=True):
        if array.shape != spec.shape:
            raise ValueError(f"{name} has shape {array.shape} but the configuration says {spec.shape}")
        arrays[name] = array
    whole = lambda array: array.whole() if isinstance(array, Lazy) else np.asarray(array)
    on_host = functools.lru_cache(maxsize=1)(lambda name: whole(arrays[name]))
    stored = {
        name: Lazy(x.shape, np.dtype(x.dtype), lambda box, name=name: on_host(name)[box]) for name, x in arrays.items()
    }
    yield from lay.apply_layout(stored, hf_layout(cfg)).items()


def _contiguous(array: Lazy) -> np.ndarray:
    """safetensors writes the bytes of a strided array in the wrong order without a word."""
    return np.ascontiguousarray(array.whole())


def _expected(state: Mapping[str, Lazy], cfg: ModelConfig) -> dict[str, Lazy]:
    """The tensors of `state`, whose names and shapes are those of the configuration, without a tied head's copy."""
    specs = {n: Lazy(s.shape, jnp.dtype(s.dtype), lambda box: np.empty(0)) for n, s in _named(param_specs(cfg)).items()}
    expected = {name: array.shape for name, array in lay.apply_layout(specs, hf_layout(cfg)).items()}
    given = {k for k in state if not k.endswith("rotary_emb.inv_freq")}  # old Llama checkpoints hold this constant
    if cfg.mla is not None:  # DeepSeek-V3's layer that predicts a further token
        given = {k for k in given if not k.startswith(_LAYER.format(cfg.num_layers))}
    if cfg.tie_embeddings:
        given.discard("lm_head.weight")
    for what, names in (("lacks", expected.keys() - given), ("has unexpected", given - expected.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"the checkpoint {what} {len(names)} of {len(expected)} tensors: {some}")
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise ValueError(f"{name} has shape {state[name].shape} but the configuration says {shape}")
    head, table = state.get("lm_head.weight"), state["model.embed_tokens.weight"]
    # Some checkpoints write the tied head as well.
    if cfg.tie_embeddings and head is not None and not np.array_equal(head.whole(), table.whole()):
        raise ValueError("lm_head.weight differs from the embedding; set tie_word_embeddings to false")
    return {name: state[name] for name in expected}


def _open_tensors(path: Path) -> dict[str, Lazy]:
    """Every tensor of a directory by name, still on disk; damaged headers and truncated files are refused."""
    index = path / "model.safetensors.index.json"
    whole = (path / "model.safetensors").exists()
    weight_map = None if whole else _read_json(index).get("weight_map", {})
    if weight_map is not None and not all(isinstance(x, str) for x in getattr(weight_map, "values", lambda: [None])()):
        raise ValueError(f"the weight_map of {index} does not say which file each tensor is in")
    state = {}
    for file in ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} points outside its directory: {file!r}")
        try:
            tensors = open_safetensors(path / file)
        except (ValueError, OSError) as e:
            raise ValueError(f"{path / file} cannot be read: {e}; fetch it again") from e
        for name, tensor in tensors.items():
            if tensor.dtype.name not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"{name} holds {tensor.dtype.name}; supported are float32, bfloat16 and float16")
            state[name] = tensor
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path} cannot be read: {e}; is the download or the export complete?") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where names and values are wanted")
    return found


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
