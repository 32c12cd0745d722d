"""What config.json of Hugging Face says about experts and latent attention <-> MoEConfig and MLAConfig."""

from collections.abc import Mapping
from typing import Any

from jaxscale.config import MLAConfig, ModelConfig, MoEConfig

# What a config.json that is silent means, beside what huggingface_config says of every decoder.
MIXTRAL = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8}
MIXTRAL |= {"num_experts_per_tok": 2}
QWEN3_MOE = {"attention_bias": False, "use_sliding_window": False, "sliding_window": None, "layer_types": None}
QWEN3_MOE |= {"num_experts": None, "num_local_experts": None, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
QWEN3_MOE |= {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 28}
GPT_OSS = {"rms_norm_eps": 1e-5, "rope_theta": 150000.0, "sliding_window": 128, "layer_types": None}
GPT_OSS |= {"attention_bias": True, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0}
GPT_OSS |= {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
}
_MLA = {"kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_MLA |= {"qk_head_dim": None, "rope_interleave": True, "moe_layer_freq": 1}
DEEPSEEK_V2 = _MLA | {"first_k_dense_replace": 0, "n_group": None, "topk_group": None, "n_routed_experts": 64}
DEEPSEEK_V2 |= {"n_shared_experts": 2, "num_experts_per_tok": None, "moe_intermediate_size": 1407}
DEEPSEEK_V2 |= {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "topk_method": "greedy"}
DEEPSEEK_V2 |= {"scoring_func": "softmax", "mlp_bias": False}
DEEPSEEK_V3 = _MLA | {"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "n_routed_experts": 256}
DEEPSEEK_V3 |= {"n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048}
DEEPSEEK_V3 |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "topk_method": "noaux_tc"}
DEEPSEEK_V3 |= {"scoring_func": "sigmoid"}
# How the model is split or trained, and the layers that predict further tokens, which are not imported.
BOOKKEEPING = ("auto_map", "aux_loss_alpha", "ep_size", "experts_per_token", "initial_context_length", "seq_aux")
BOOKKEEPING += ("num_nextn_predict_layers", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")

# Of MoEConfig, what config.json does not say.
TRAINING = ("balance_weight", "balance_rows", "router_z_weight", "cheap_balance")
TRAINING += ("dispatch", "dispatch_chunks", "ep_hosts")


def model_type(cfg: ModelConfig) -> str:
    """The model_type of Hugging Face that is nearest to a configuration with experts or latent attention.

    Raises ValueError for latent attention without experts, which no model_type has.
    """
    if cfg.mla is not None:
        if cfg.moe is None:
            raise ValueError("deepseek_v2, the nearest model_type of Hugging Face, cannot say moe=None")
        return "deepseek_v3" if cfg.moe.router == "sigmoid" else "deepseek_v2"
    return "gpt_oss" if cfg.sinks else "qwen3_moe" if cfg.qk_norm else "mixtral"


def moe_from_hf(kind: str, c: Mapping[str, Any]) -> MoEConfig | None:
    """Raises ValueError for what the decoder does not compute, with the field and its value."""
    if kind == "mixtral":
        return MoEConfig(
            num_experts=c["num_local_experts"], top_k=c["num_experts_per_tok"], mlp_dim=c["intermediate_size"]
        )
    if kind == "gpt_oss":
        _only(kind, c, swiglu_limit=(7.0,))
        return MoEConfig(
            num_experts=c["num_local_experts"],
            top_k=c["num_experts_per_tok"],
            mlp_dim=c["intermediate_size"],
            router_bias=True,
            activation="gpt_oss",
        )
    if kind.startswith("deepseek"):
        return _deepseek_moe(kind, c)
    if kind != "qwen3_moe":
        return None
    if c["decoder_sparse_step"] != 1 or c["mlp_only_layers"]:
        raise ValueError(
            f"decoder_sparse_step={c['decoder_sparse_step']}, mlp_only_layers={c['mlp_only_layers']} mix layers with "
            "and without experts; supported are experts in every layer"
        )
    return MoEConfig(
        num_experts=c["num_experts"] or c["num_local_experts"] or 128,
        top_k=c["num_experts_per_tok"],
        mlp_dim=c["moe_intermediate_size"],
        norm_top_k=c["norm_topk_prob"],
    )


def _deepseek_moe(kind: str, c: Mapping[str, Any]) -> MoEConfig:
    v3 = kind == "deepseek_v3"
    methods = ("noaux_tc", None) if v3 else ("greedy", "group_limited_greedy")
    _only(kind, c, moe_layer_freq=(1,), topk_method=methods, scoring_func=("sigmoid" if v3 else "softmax",))
    if not v3:  # transformers' DeepSeek-V2 never normalises
        _only(kind, c, norm_topk_prob=(False,))
    if c["num_experts_per_tok"] is None:
        raise ValueError(f"{kind} config does not say num_experts_per_tok; set it, as 6 in DeepSeek-V2")
    grouped = v3 or c["topk_method"] == "group_limited_greedy"
    return MoEConfig(
        num_experts=c["n_routed_experts"],
        top_k=c["num_experts_per_tok"],
        mlp_dim=c["moe_intermediate_size"],
        router="sigmoid" if v3 else "softmax",
        norm_top_k=c["norm_topk_prob"],
        weight_scale=c["routed_scaling_factor"],
        num_groups=(grouped and c["n_group"]) or 1,
        top_groups=(grouped and c["topk_group"]) or 1,
        shared_dim=c["n_shared_experts"] * c["moe_intermediate_size"],
        first_dense=c["first_k_dense_replace"],
    )


def mla_from_hf(kind: str, c: Mapping[str, Any]) -> MLAConfig | None:
    if not kind.startswith("deepseek"):
        return None
    _only(kind, c, rope_interleave=(True,))
    return MLAConfig(
        kv_rank=c["kv_lora_rank"],
        q_rank=c["q_lora_rank"],
        nope_dim=c["qk_nope_head_dim"],
        rope_dim=c["qk_rope_head_dim"],
        value_dim=c["v_head_dim"],
    )


def moe_to_hf(m: MoEConfig) -> dict[str, Any]:
    """The fields of every family; those of the others are left out by the caller."""
    softmax = "group_limited_greedy" if m.num_groups > 1 else "greedy"
    return {
        "num_local_experts": m.num_experts,
        "num_experts": m.num_experts,
        "n_routed_experts": m.num_experts,
        "num_experts_per_tok": m.top_k,
        "moe_intermediate_size": m.mlp_dim,
        "norm_topk_prob": m.norm_top_k,
        "routed_scaling_factor": m.weight_scale,
        "n_group": m.num_groups,
        "topk_group": m.top_groups,
        "n_shared_experts": m.shared_dim // m.mlp_dim,
        "first_k_dense_replace": m.first_dense,
        "topk_method": "noaux_tc" if m.router == "sigmoid" else softmax,
        "scoring_func": m.router,
    }


def mla_to_hf(m: MLAConfig) -> dict[str, Any]:
    return {
        "kv_lora_rank": m.kv_rank,
        "q_lora_rank": m.q_rank,
        "qk_nope_head_dim": m.nope_dim,
        "qk_rope_head_dim": m.rope_dim,
        "qk_head_dim": m.nope_dim + m.rope_dim,
        "v_head_dim": m.value_dim,
        "head_dim": m.rope_dim,  # as transformers writes it
    }


def _only(kind: str, c: Mapping[str, Any], **supported: tuple[Any, ...]) -> None:
    for field, values in supported.items():
        if c[field] not in values:
            raise ValueError(f"{kind} config has {field}={c[field]!r}; supported is {' or '.join(map(repr, values))}")
