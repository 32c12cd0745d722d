"""config.json of Hugging Face <-> ModelConfig. What is not understood is refused by name, never ignored."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxscale.checkpoint import huggingface_moe as hf_moe
from jaxscale.config import ModelConfig, RopeScaling

# ModelConfig fields that config.json holds under another name and with the same meaning.
_FIELDS = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "attn_soft_cap": "attn_logit_softcapping",
    "logit_soft_cap": "final_logit_softcapping",
}
# What a config.json that is silent means (transformers 5.17; tests/golden/defaults.json is the witness).
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")
_SAID = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": None, "rope_parameters": None}
_SILU = _SAID | {"hidden_act": "silu", "tie_word_embeddings": False}
_LLAMA = _SILU | {"attention_bias": False, "mlp_bias": False}
_QWEN = _SILU | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
_GEMMA = _SAID | {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "attention_bias": False}
_GEMMA |= {"query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "final_logit_softcapping": None}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA3 = _GEMMA | {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
_MODELS: dict[str, tuple[str, dict[str, Any], tuple[int | None, ...]]] = {
    "llama": ("Llama", _LLAMA, (32000, 4096, 11008, 32, 32, None, None, 2048)),
    "mistral": ("Mistral", _SILU | {"sliding_window": 4096}, (32000, 4096, 14336, 32, 32, 8, None, 131072)),
    "qwen2": ("Qwen2", _QWEN, (151936, 4096, 22016, 32, 32, 32, None, 32768)),
    "qwen3": ("Qwen3", _QWEN | {"attention_bias": False}, (151936, 4096, 22016, 32, 32, 32, 128, 32768)),
    "mixtral": ("Mixtral", _SILU | hf_moe.MIXTRAL, (32000, 4096, 14336, 32, 32, 8, None, 131072)),
    "qwen3_moe": ("Qwen3Moe", _SILU | hf_moe.QWEN3_MOE, (151936, 2048, 6144, 24, 32, 4, None, 32768)),
    "deepseek_v2": ("DeepseekV2", _SILU | hf_moe.DEEPSEEK_V2, (102400, 4096, 11008, 32, 32, None, None, 2048)),
    "deepseek_v3": ("DeepseekV3", _SILU | hf_moe.DEEPSEEK_V3, (129280, 7168, 18432, 61, 128, None, None, 4096)),
    "gpt_oss": ("GptOss", _SILU | hf_moe.GPT_OSS, (201088, 2880, 2880, 36, 64, 8, 64, 131072)),
    "gemma2": ("Gemma2", _GEMMA2, (256000, 2304, 9216, 26, 8, 4, 256, 8192)),
    "gemma3_text": ("Gemma3", _GEMMA3, (262208, 2304, 9216, 26, 8, 4, 256, 131072)),
}
_DEFAULTS = {kind: silent | dict(zip(_SIZES, sizes)) for kind, (_, silent, sizes) in _MODELS.items()}
# Fields that say nothing about the forward pass.
_BOOKKEEPING = """_name_or_path _sliding_window_pattern architectures bos_token_id cache_implementation dtype
    eos_token_id hidden_act id2label initializer_range is_encoder_decoder chunk_size_feed_forward problem_type
    is_llama_config label2id model_type pad_token_id pretraining_tp
    return_dict torch_dtype transformers.js_config transformers_version use_cache""".split()  # noqa: SIM905
_YARN = ["original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale"]
_ROPE_KEYS = {  # rope type: the fields that it needs, and those that it may have
    "default": ([], []),
    "linear": (["factor"], []),
    "llama3": (["factor", "low_freq_factor", "high_freq_factor"], ["original_max_position_embeddings"]),
    "yarn": (["factor"], [*_YARN, "mscale_all_dim"]),
}
_MOST_LAYERS = 10_000
_ACTIVATIONS: dict[str, Any] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}


def config_from_hf(hf_config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a config.json, spelled as transformers 4 or 5 writes it.

    Raises ValueError that names each field, or value of one, that the decoder does not know: what is not understood is
    never ignored. A field that is None or False counts as a feature switched off.
    """
    kind = hf_config.get("model_type")
    if kind not in _DEFAULTS:
        raise ValueError(f"model_type={kind!r} is not supported; supported are {', '.join(_DEFAULTS)}")
    known = {*_DEFAULTS[kind], *_BOOKKEEPING, *hf_moe.BOOKKEEPING}
    odd = [f"{k}={v!r}" for k, v in hf_config.items() if k not in known and v not in (None, False)]
    if odd:
        raise ValueError(f"{kind} config has {', '.join(sorted(odd))}, which the decoder does not know")
    c = {**_DEFAULTS[kind], **hf_config}
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        if type(c[name]) is not int or c[name] < 1:
            raise ValueError(f"{name}={c[name]!r} must be a whole number of 1 or more")
    if c["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={c['num_hidden_layers']} is more than any model has ({_MOST_LAYERS})")
    gemma = kind.startswith("gemma")
    act_field = "hidden_activation" if gemma else "hidden_act"
    if c[act_field] not in _ACTIVATIONS:
        raise ValueError(f"{act_field}={c[act_field]!r} is not supported; supported are {', '.join(_ACTIVATIONS)}")
    stored = c.get("dtype") or c.get("torch_dtype")
    if stored not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"torch_dtype={stored!r} is not supported; use float32, bfloat16 or float16")
    fields: dict[str, Any] = {ours: c.get(theirs) for ours, theirs in _FIELDS.items()}
    if stored is not None:
        fields |= {"dtype": stored, "param_dtype": "float32" if stored == "float16" else stored}
    head_dim = c["head_dim"] or c["hidden_size"] // c["num_attention_heads"]
    mla = hf_moe.mla_from_hf(kind, c)
    if mla is not None:  # where transformers' head_dim is what is rotated
        head_dim = mla.nope_dim + mla.rope_dim
    scalar = c.get("query_pre_attn_scalar", head_dim)
    pattern = _layer_pattern(kind, c)
    theta, scaling, local_theta = _rope_from_hf(kind, c)
    return ModelConfig(
        name=c.get("_name_or_path") or kind,
        num_kv_heads=c["num_key_value_heads"] or c["num_attention_heads"],
        head_dim=head_dim,
        activation=_ACTIVATIONS[c[act_field]],
        norm_offset=1.0 if gemma else 0.0,
        post_norms=gemma,
        moe=hf_moe.moe_from_hf(kind, c),
        mla=mla,
        sinks=kind == "gpt_oss",
        qk_norm=kind in ("qwen3", "qwen3_moe", "gemma3_text"),
        qkv_bias=kind == "qwen2" or bool(c.get("attention_bias")),
        out_bias=bool(c.get("attention_bias")),
        mlp_bias=bool(c.get("mlp_bias")),
        scale_embeddings=gemma,
        query_scale=None if scalar == head_dim else scalar**-0.5,
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        window=c["sliding_window"] if "local" in pattern and c.get("use_sliding_window", True) else None,
        layer_pattern=pattern,
        **fields,
    )


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read; torch_dtype is cfg.param_dtype.

    Raises ValueError, naming the fields, when no model_type of Hugging Face says what cfg says.
    """
    local = cfg.local_layers
    if cfg.moe is not None or cfg.mla is not None:
        kind = hf_moe.model_type(cfg)
    elif cfg.norm_offset:
        kind = "gemma3_text" if cfg.qk_norm else "gemma2"
    elif cfg.qk_norm or (cfg.qkv_bias and not cfg.out_bias):
        kind = "qwen3" if cfg.qk_norm else "qwen2"
    else:
        kind = "mistral" if any(local) else "llama"
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == cfg.activation)
    fields = {theirs: getattr(cfg, ours) for ours, theirs in _FIELDS.items()} | {
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_to_hf(cfg.rope_scaling),
        "rope_local_base_freq": cfg.local_rope_theta or cfg.rope_theta,
        "attention_bias": cfg.out_bias,
        "mlp_bias": cfg.mlp_bias,
        "sliding_window": cfg.window,
        "use_sliding_window": any(local),
        "layer_types": ["sliding_attention" if x else "full_attention" for x in local],
        "query_pre_attn_scalar": round((cfg.query_scale or cfg.head_dim**-0.5) ** -2),
    }
    fields |= hf_moe.moe_to_hf(cfg.moe) if cfg.moe is not None else {}
    fields |= hf_moe.mla_to_hf(cfg.mla) if cfg.mla is not None else {}
    if cfg.moe is not None and kind in ("mixtral", "gpt_oss"):  # whose every hidden layer is an expert's
        fields["intermediate_size"] = cfg.moe.mlp_dim
    hf_config = {k: v for k, v in fields.items() if k in _DEFAULTS[kind]}
    hf_config |= {
        "model_type": kind,
        "architectures": [_MODELS[kind][0] + "ForCausalLM"],
        "torch_dtype": cfg.param_dtype,
    }
    back = dataclasses.replace(config_from_hf(hf_config), name=cfg.name, dtype=cfg.dtype)
    if cfg.moe is not None and back.moe is not None:  # how it is trained is not config.json's to say
        ours = {k: getattr(cfg.moe, k) for k in hf_moe.TRAINING}
        back = dataclasses.replace(back, moe=dataclasses.replace(back.moe, **ours))
        if not cfg.moe.first_dense:  # no layer has a plain MLP
            back = dataclasses.replace(back, mlp_dim=cfg.mlp_dim)
    if back.local_layers == local:  # one pattern may be written in several ways
        back = dataclasses.replace(back, layer_pattern=cfg.layer_pattern)
    lost = _differences(cfg, back)
    if lost:
        raise ValueError(f"{kind}, the nearest model_type of Hugging Face, cannot say {', '.join(lost)}")
    return hf_config


def _differences(cfg: Any, back: Any, prefix: str = "") -> list[str]:
    """The fields of cfg that back has another value for; inside of a nested configuration where both have one."""
    out = []
    for name, value in vars(cfg).items():
        other = getattr(back, name)
        if dataclasses.is_dataclass(value) and type(value) is type(other):
            out += _differences(value, other, f"{name}.")
        elif value != other:
            out.append(f"{prefix}{name}={value!r}")
    return out


def _layer_pattern(kind: str, c: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shortest pattern of "global" and "local" that repeats to the depth of the model."""
    depth, types = c["num_hidden_layers"], c.get("layer_types")
    if types:
        odd = sorted(set(types) - _LAYER_TYPES.keys())
        if odd or len(types) != depth:
            raise ValueError(f"layer_types: {len(types)} entries for {depth} layers, of which unknown {odd}")
        kinds = tuple(_LAYER_TYPES[t] for t in types)
    else:
        is_local = {
            "llama": lambda i: False,
            "deepseek_v2": lambda i: False,
            "deepseek_v3": lambda i: False,
            "gpt_oss": lambda i: i % 2 == 0,
            "mixtral": lambda i: c["sliding_window"] is not None,
            "mistral": lambda i: c["sliding_window"] is not None,
            "gemma2": lambda i: i % 2 == 0,
            "gemma3_text": lambda i: (i + 1) % c["sliding_window_pattern"] != 0,
        }.get(kind, lambda i: c["use_sliding_window"] and i >= c["max_window_layers"])
        kinds = tuple("local" if is_local(i) else "global" for i in range(depth))
    return next(kinds[:n] for n in range(1, depth + 1) if kinds == (kinds[:n] * depth)[:depth])


def _rope_from_hf(kind: str, c: Mapping[str, Any]) -> tuple[float, RopeScaling | None, float | None]:
    """(rope_theta, rope_scaling, local_rope_theta), from transformers 4's rope_scaling or 5's rope_parameters."""
    if kind != "gemma3_text":
        params = c["rope_scaling"] or c["rope_parameters"] or {}
        return params.get("rope_theta", c["rope_theta"]), _rope_scaling(params, c), None
    by_type = c["rope_parameters"] or {}
    if by_type.keys() - _LAYER_TYPES.keys():
        raise ValueError(f"rope_parameters has {sorted(by_type)}; gemma3_text needs one dict for each layer type")
    params = {**(by_type.get("full_attention") or {}), **(c["rope_scaling"] or {})}
    local = by_type.get("sliding_attention") or {}
    theta, scaling = params.get("rope_theta", c["rope_theta"]), _rope_scaling(params, c)
    local_theta = local.get("rope_theta", c["rope_local_base_freq"])
    if _rope_scaling(local, c) is not None:
        raise ValueError(f"rope type {local['rope_type']!r} of sliding_attention layers is not supported; use default")
    return theta, scaling, None if local_theta == theta and scaling is None else local_theta


def _rope_scaling(params: Mapping[str, Any], c: Mapping[str, Any]) -> RopeScaling | None:
    kind = params.get("rope_type") or params.get("type") or "default"
    if kind not in _ROPE_KEYS:
        raise ValueError(f"rope type {kind!r} is not supported; supported are {', '.join(_ROPE_KEYS)}")
    need, may = _ROPE_KEYS[kind]
    given = {k: v for k, v in params.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    odd = [f"{k}={v!r}" for k, v in given.items() if k not in need + may]
    missing = [k for k in need if k not in given]
    if odd or missing:
        raise ValueError(f"rope type {kind!r} needs {need}, may have {may}; unknown {odd}, missing {missing}")
    if may:
        given["original_max_seq_len"] = given.pop("original_max_position_embeddings", c["max_position_embeddings"])
    return None if kind == "default" else RopeScaling(kind=kind, **given)


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    fields = vars(scaling) | {"original_max_position_embeddings": scaling.original_max_seq_len}
    need, may = _ROPE_KEYS[scaling.kind]
    said = [k for k in need + may if fields[k] is not None and not (k == "truncate" and fields[k])]
    return {"rope_type": scaling.kind} | {k: fields[k] for k in said}
