"""Hugging Face checkpoints, in and out: config.json and safetensors <-> ModelConfig and the decoder's parameters.

params, cfg = import_hf("SmolLM2-135M")  # on the default device

cfg = load_config("Llama-3.1-8B")  # or straight into shards; each process reads only what its devices hold
params, cfg = import_hf("Llama-3.1-8B", shardings=param_shardings(param_specs(cfg), mesh, rules))
export_hf(params, cfg, "out/hf")
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxscale.checkpoint.huggingface_config import config_from_hf, config_to_hf
from jaxscale.config import ModelConfig
from jaxscale.models.decoder import param_specs
from jaxscale.params import ParamSpec, path_name

# Where each parameter lies: the tensor's name, and for each of its dims the dims of ours that are merged in it.
# ((1, 2), (0,)) reads wq [D, N, H] from q_proj [N*H, D]. Layers are unstacked first.
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
    "layers/attn_post_norm": (_LAYER + "post_attention_layernorm.weight", ((0,),)),
    "layers/mlp_norm": (_LAYER + "pre_feedforward_layernorm.weight", ((0,),)),
    "layers/mlp/w_gate": (_LAYER + "mlp.gate_proj.weight", ((1,), (0,))),
    "layers/mlp/w_up": (_LAYER + "mlp.up_proj.weight", ((1,), (0,))),
    "layers/mlp/w_down": (_LAYER + "mlp.down_proj.weight", ((1,), (0,))),
    "layers/mlp/b_gate": (_LAYER + "mlp.gate_proj.bias", ((0,),)),
    "layers/mlp/b_up": (_LAYER + "mlp.up_proj.bias", ((0,),)),
    "layers/mlp/b_down": (_LAYER + "mlp.down_proj.bias", ((0,),)),
    "layers/mlp_post_norm": (_LAYER + "post_feedforward_layernorm.weight", ((0,),)),
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
    leaves, treedef = jax.tree.flatten_with_path(param_specs(cfg))
    targets = [None] * len(leaves) if shardings is None else treedef.flatten_up_to(shardings)
    with _open_tensors(path) as state:
        _check(state, cfg)
        params = [_put(state, *_where(p, cfg), spec, target) for (p, spec), target in zip(leaves, targets)]
    return treedef.unflatten(params), cfg


def export_hf(params: Any, cfg: ModelConfig, path: str | Path, max_file_bytes: int = 5_000_000_000) -> None:
    """Write a directory that transformers and `import_hf` read back bit by bit.

    Host memory holds one stacked parameter and one file at a time.

    Args:
      params: like `param_specs(cfg)`; every shard must be addressable by this process.
      path: a new or empty directory. config.json is written last: a directory without it is half-written.
      max_file_bytes: what goes beyond it goes to further files, listed in an index.

    Raises:
      ValueError: the directory is not empty, or Hugging Face has no model_type that says what cfg says.
    """
    path = Path(path)
    hf_config = config_to_hf(cfg)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new directory to export to")
    path.mkdir(parents=True, exist_ok=True)

    weight_map, tensors, source, host = {}, {}, None, np.empty(0)

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
        tensors.clear()

    for name, array, layer, groups in _entries(params, cfg):
        if source is not array:  # the layers of one stacked parameter follow each other
            source, host = array, np.asarray(array)
        tensor = _to_hf(host, layer, groups)
        if tensors and sum(t.nbytes for t in tensors.values()) + tensor.nbytes > max_file_bytes:
            flush()
        tensors[name] = tensor
    flush()
    if len(files := set(weight_map.values())) == 1:
        (path / files.pop()).rename(path / "model.safetensors")
    else:
        total = {"total_size": sum(x.nbytes for x in jax.tree.leaves(params))}
        _write_json(path / "model.safetensors.index.json", {"metadata": total, "weight_map": weight_map})
    _write_json(path / "config.json", hf_config | {"torch_dtype": str(jax.tree.leaves(params)[0].dtype)})


def load_config(path: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face directory, from its config.json."""
    return config_from_hf(_read_json(Path(path) / "config.json"))


def params_from_hf(state: Mapping[str, np.ndarray], cfg: ModelConfig) -> dict[str, Any]:
    """A state dict -> the nested dict of `param_specs(cfg)`, layers stacked, numpy arrays in the dtype that they have.

    Raises ValueError when tensors are missing, unexpected, or of another shape than cfg says.
    """
    _check(state, cfg)
    return jax.tree.map_with_path(
        lambda p, spec: _read(state, *_where(p, cfg), spec.shape, tuple(slice(0, n) for n in spec.shape)),
        param_specs(cfg),
    )


def params_to_hf(params: Any, cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `params_from_hf`: contiguous numpy arrays by transformers' names; no head when it is tied."""
    return {name: _to_hf(np.asarray(array), layer, groups) for name, array, layer, groups in _entries(params, cfg)}


def _where(path: tuple[Any, ...], cfg: ModelConfig) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """The tensor name of a parameter, with {} for its layer, and how its dims are merged."""
    name = path_name(path)
    if name == "layers/mlp_norm" and not cfg.post_norms:  # Llama names it as Gemma names the norm after attention
        name = "layers/attn_post_norm"
    return _TENSORS[name]


def _entries(params: Any, cfg: ModelConfig) -> Iterator[tuple[str, Any, int | None, tuple[tuple[int, ...], ...]]]:
    """(tensor name, our array, the layer of it or None, merged dims) of every tensor of a model."""
    leaves, treedef = jax.tree.flatten_with_path(param_specs(cfg))
    for (path, spec), array in zip(leaves, treedef.flatten_up_to(params)):
        if array.shape != spec.shape:
            raise ValueError(f"{path_name(path)} has shape {array.shape} but the configuration says {spec.shape}")
        name, groups = _where(path, cfg)
        for layer in range(spec.shape[0]) if "{}" in name else [None]:
            yield name.format(layer), array, layer, groups


def _to_hf(array: np.ndarray, layer: int | None, groups: tuple[tuple[int, ...], ...]) -> np.ndarray:
    one = array if layer is None else array[layer]
    merged = [math.prod(one.shape[d] for d in dims) for dims in groups]
    # safetensors writes the bytes of a strided array in the wrong order without a word: always contiguous.
    return np.ascontiguousarray(one.transpose(sum(groups, ())).reshape(merged))


def _read(state: Mapping[str, Any], name: str, groups, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """The part `index` of one of our parameters; of each tensor no more is read than that part's leading dims need."""
    if "{}" in name:
        layers = range(*index[0].indices(shape[0]))
        return np.stack([_read(state, name.format(i), groups, shape[1:], index[1:]) for i in layers])
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape)]
    rows, split, inside = [], [], []
    for lead, *rest in groups:
        inner = math.prod(shape[d] for d in rest)
        start, stop = bounds[lead]
        rows.append(slice(start * inner, stop * inner))
        split += [stop - start] + [shape[d] for d in rest]
        inside += [slice(None)] + [slice(*bounds[d]) for d in rest]
    part = np.asarray(state[name][tuple(rows)]).reshape(split)[tuple(inside)]
    return part.transpose(np.argsort(sum(groups, ())))


def _put(state: Mapping[str, Any], name: str, groups, spec: ParamSpec, sharding: Any) -> jax.Array:
    @functools.cache  # replicas share what was read
    def part(index):
        return _read(state, name, groups, spec.shape, index).astype(jnp.dtype(spec.dtype), copy=False)

    if sharding is None:
        return jnp.asarray(part((slice(None),) * len(spec.shape)))
    return jax.make_array_from_callback(spec.shape, sharding, part)


def _check(state: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Names and shapes of the tensors are those of the configuration."""
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), param_specs(cfg))
    expected = {}
    for name, array, layer, groups in _entries(abstract, cfg):
        shape = array.shape if layer is None else array.shape[1:]
        expected[name] = tuple(math.prod(shape[d] for d in dims) for dims in groups)
    given = {k for k in state if not k.endswith("rotary_emb.inv_freq")}  # old Llama checkpoints hold this constant
    if cfg.tie_embeddings:
        given.discard("lm_head.weight")
    for what, names in (("lacks", expected.keys() - given), ("has unexpected", given - expected.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"the checkpoint {what} {len(names)} of {len(expected)} tensors: {some}")
    for name, shape in expected.items():
        found = tuple(state[name].shape if isinstance(state[name], np.ndarray) else state[name].get_shape())
        if found != shape:
            raise ValueError(f"{name} has shape {found} but the configuration says {shape}")
    if cfg.tie_embeddings and "lm_head.weight" in state:  # some checkpoints write the tied head as well
        head, table = state["lm_head.weight"], state["model.embed_tokens.weight"]
        if not np.array_equal(head[:], table[:]):
            raise ValueError("lm_head.weight differs from the embedding; set tie_word_embeddings to false")


@contextlib.contextmanager
def _open_tensors(path: Path) -> Iterator[dict[str, Any]]:
    """Every tensor of a directory by name, still on disk; safe_open refuses damaged headers and truncated files."""
    index = path / "model.safetensors.index.json"
    whole = (path / "model.safetensors").exists()
    weight_map = None if whole else _read_json(index).get("weight_map", {})
    state = {}
    with contextlib.ExitStack() as stack:
        for file in ["model.safetensors"] if weight_map is None else sorted(set(weight_map.values())):
            if Path(file).name != file:
                raise ValueError(f"{index} points outside its directory: {file!r}")
            try:
                tensors = stack.enter_context(safe_open(path / file, framework="np"))
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{path / file} cannot be read: {e}; fetch it again") from e
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                state[name] = tensors.get_slice(name)
                if state[name].get_dtype() not in ("F32", "BF16", "F16"):
                    raise ValueError(f"{name} holds {state[name].get_dtype()}; supported are F32, BF16 and F16")
        yield state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise ValueError(f"{path} cannot be read: {e}; is the download or the export complete?") from e


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
