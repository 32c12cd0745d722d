"""Hugging Face checkpoints, in and out: config.json and safetensors <-> ModelConfig and the decoder's parameters.

    params, cfg = import_hf("SmolLM2-135M")  # on the default device

    cfg = load_config("Llama-3.1-8B")  # or straight into shards; each process reads only what its devices hold
    params, cfg = import_hf("Llama-3.1-8B", shardings=param_shardings(param_specs(cfg), mesh, rules))
    export_hf(params, cfg, "out/hf")
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxscale.config import ModelConfig, RopeScaling
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

# What a config.json that is silent means, by model_type (transformers 5.17; tests/golden/defaults.json is the witness).
_ANY = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0, "rope_scaling": None}
_ANY |= {"rope_parameters": None, "head_dim": None, "num_key_value_heads": None}
_SILU = _ANY | {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu"}
_LLAMA = {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
_MISTRAL = {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "num_key_value_heads": 32}
_QWEN |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA = _ANY | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
_GEMMA |= {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True, "attention_bias": False}
_GEMMA |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
_GEMMA |= {"sliding_window": 4096, "layer_types": None}
_GEMMA2 = {"vocab_size": 256000, "max_position_embeddings": 8192}
_GEMMA2 |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = {"vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None}
_GEMMA3 |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _SILU | _LLAMA | {"attention_bias": False, "mlp_bias": False},
    "mistral": _SILU | _MISTRAL | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _SILU | _QWEN,
    "qwen3": _SILU | _QWEN | {"head_dim": 128, "attention_bias": False},
    "gemma2": _GEMMA | _GEMMA2,
    "gemma3_text": _GEMMA | _GEMMA3,
}
# Fields that say nothing about the forward pass, and fields of which one value is supported.
_BOOKKEEPING = set(
    """_name_or_path _sliding_window_pattern architectures bos_token_id cache_implementation chunk_size_feed_forward
    dtype eos_token_id hidden_act id2label initializer_range is_llama_config label2id model_type pad_token_id
    pretraining_tp return_dict torch_dtype transformers.js_config transformers_version use_cache""".split()
)
_FIXED = {"attention_dropout": 0.0, "partial_rotary_factor": 1.0}
_ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim"}
    | {"beta_fast", "beta_slow", "truncate"},
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


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

    files: list[list] = [[]]
    size = 0
    for name, array, layer, groups in _entries(params, cfg):
        nbytes = array.nbytes // (1 if layer is None else array.shape[0])
        if files[-1] and size + nbytes > max_file_bytes:
            files.append([])
            size = 0
        files[-1].append((name, array, layer, groups))
        size += nbytes

    weight_map = {}
    source = host = None  # the stacked parameter whose layers are being written, and its values
    for i, entries in enumerate(files):
        file = "model.safetensors" if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for name, array, layer, groups in entries:
            if source is not array:
                source, host = array, np.asarray(array)
            tensors[name] = _to_hf(host, layer, groups)
            weight_map[name] = file
        save_file(tensors, path / file, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(x.nbytes for x in jax.tree.leaves(params))
        _write_json(
            path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    dtype = str(jax.tree.leaves(params)[0].dtype)
    _write_json(path / "config.json", hf_config | {"torch_dtype": dtype})


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
    """The inverse of `params_from_hf`: contiguous numpy arrays under the names of transformers; a tied head is left out."""
    return {name: _to_hf(np.asarray(array), layer, groups) for name, array, layer, groups in _entries(params, cfg)}


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json, spelled as transformers 4 or 5 writes it.

    Raises ValueError that names each field, or value of one, that the decoder does not know: what is not understood is
    never ignored. A field that is None or False counts as a feature switched off.
    """
    kind = hf_config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type={kind!r} is not supported; supported are {', '.join(_DEFAULTS)}")
    known = _DEFAULTS[kind].keys() | _BOOKKEEPING
    odd = [f"{k}={v!r}" for k, v in hf_config.items() if k not in known and v not in (None, False, _FIXED.get(k))]
    if odd:
        raise ValueError(f"{kind} config has {', '.join(sorted(odd))}, which the decoder does not know")
    c = _DEFAULTS[kind] | hf_config
    gemma = kind.startswith("gemma")
    activation = c["hidden_activation" if gemma else "hidden_act"]
    if activation not in _ACTIVATIONS:
        name = "hidden_activation" if gemma else "hidden_act"
        raise ValueError(f"{name}={activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    pattern = _layer_pattern(kind, c)
    theta, scaling, local_theta = _rope_from_hf(kind, c)
    stored = c.get("dtype") or c.get("torch_dtype")
    dtypes = {} if stored is None else {"dtype": stored, "param_dtype": "float32" if stored == "float16" else stored}
    return ModelConfig(
        name=c.get("_name_or_path") or kind,
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        embed_dim=c["hidden_size"],
        mlp_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=head_dim,
        max_seq_len=c["max_position_embeddings"],
        activation=_ACTIVATIONS[activation],
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        qk_norm=kind in ("qwen3", "gemma3_text"),
        qkv_bias=kind == "qwen2" or bool(c.get("attention_bias")),
        out_bias=bool(c.get("attention_bias")),
        mlp_bias=bool(c.get("mlp_bias")),
        tie_embeddings=c["tie_word_embeddings"],
        scale_embeddings=gemma,
        query_scale=c["query_pre_attn_scalar"] ** -0.5 if gemma and c["query_pre_attn_scalar"] != head_dim else None,
        attn_soft_cap=c.get("attn_logit_softcapping"),
        logit_soft_cap=c.get("final_logit_softcapping"),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        window=c["sliding_window"] if "local" in pattern else None,
        layer_pattern=pattern,
        **dtypes,
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read; torch_dtype is cfg.param_dtype.

    Raises ValueError, naming the fields, when no model_type of Hugging Face says what cfg says.
    """
    gemma, local = cfg.norm_offset == 1.0, any(cfg.local_layers)
    if gemma:
        kind, arch = ("gemma3_text", "Gemma3") if cfg.qk_norm else ("gemma2", "Gemma2")
    elif cfg.qk_norm:
        kind, arch = "qwen3", "Qwen3"
    elif cfg.qkv_bias and not cfg.out_bias:
        kind, arch = "qwen2", "Qwen2"
    else:
        kind, arch = ("mistral", "Mistral") if local else ("llama", "Llama")
    activation = next(k for k, v in _ACTIVATIONS.items() if v == cfg.activation)
    types = ["sliding_attention" if x else "full_attention" for x in cfg.local_layers]
    scaling = _rope_to_hf(cfg.rope_scaling)
    fields = {
        "vocab_size": cfg.vocab_size,
        "num_hidden_layers": cfg.num_layers,
        "hidden_size": cfg.embed_dim,
        "intermediate_size": cfg.mlp_dim,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_seq_len,
        "hidden_activation" if gemma else "hidden_act": activation,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": scaling,
        "rope_local_base_freq": cfg.local_rope_theta or cfg.rope_theta,
        "attention_bias": cfg.out_bias,
        "mlp_bias": cfg.mlp_bias,
        "sliding_window": cfg.window if local or kind != "gemma2" else 4096,
        "use_sliding_window": local,
        "layer_types": types,
        "query_pre_attn_scalar": round((cfg.query_scale or cfg.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": cfg.attn_soft_cap,
        "final_logit_softcapping": cfg.logit_soft_cap,
    }
    hf_config = {"model_type": kind, "architectures": [f"{arch}ForCausalLM"], "torch_dtype": cfg.param_dtype}
    hf_config |= {k: v for k, v in fields.items() if k in _DEFAULTS[kind]}
    back = config_from_hf(hf_config)
    lost = [
        f"{f.name}={getattr(cfg, f.name)!r}"
        for f in dataclasses.fields(cfg)
        if f.name not in ("name", "dtype", "layer_pattern") and getattr(cfg, f.name) != getattr(back, f.name)
    ]
    if lost or cfg.local_layers != back.local_layers:
        lost = lost or [f"layer_pattern={cfg.layer_pattern}"]
        raise ValueError(f"{kind}, the nearest model_type of Hugging Face, cannot say {', '.join(lost)}")
    return hf_config
