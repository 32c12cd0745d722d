"""Small random models of each family with the logits that transformers computes for them.

Needs torch and transformers, which the project itself does not depend on; nothing is downloaded. From the
repository root, with a Python that holds the versions named in README.md:

    python tests/golden/make_golden.py

One directory per family:
    config_hub.json     the configuration as checkpoints on the hub spell it (rope_theta, rope_scaling, no defaults)
    config.json         the same one as transformers 5 writes it (rope_parameters, layer_types, every default said)
    model.safetensors   the state dict, bfloat16 (the logits come from exactly these values, held in float32)
    io.safetensors      tokens [B,T] int32 and logits [B,T,V] float32
and defaults.json: what each model_type means when its config.json says nothing.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

B, T, V = 2, 37, 101
HERE = Path(__file__).parent


def hub_config(model_type: str, **fields) -> dict:
    base = {
        "vocab_size": V,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {"model_type": model_type} | base | fields


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "moe_layer_freq": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# family: (hub configuration, changes that must each move the logits: proof that the feature is exercised at this size)
FAMILIES = {
    "llama2": (
        hub_config("llama", num_key_value_heads=3, hidden_act="silu", rms_norm_eps=1e-5),
        [{"rms_norm_eps": 1e-2}, {"rope_theta": 500.0}],
    ),
    "llama3": (
        hub_config(
            "llama",
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            rope_theta=10000.0,
            rope_scaling={**LLAMA3, "original_max_position_embeddings": 32},
        ),
        [{"rope_scaling": None}, {"rope_theta": 500000.0}],
    ),
    "llama_linear": (
        hub_config("llama", rope_theta=10000.0, rope_scaling={"type": "linear", "factor": 4.0}),
        [{"rope_scaling": None}],
    ),
    "llama_yarn": (
        hub_config("llama", rope_theta=100.0, rope_scaling={**YARN, "beta_fast": 4.0, "beta_slow": 1.0}),
        [{"rope_scaling": None}, {"rope_scaling": YARN}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}],
    ),
    "mistral": (
        hub_config("mistral", sliding_window=8, rope_theta=10000.0, rms_norm_eps=1e-5),
        [{"sliding_window": None}, {"sliding_window": 9}],
    ),
    "qwen2": (
        hub_config(
            "qwen2",
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_theta=1000000.0,
            use_sliding_window=False,
            sliding_window=8,
            max_window_layers=1,
        ),
        [{"use_sliding_window": True}, {"rope_theta": 10000.0}],
    ),
    "qwen3": (
        hub_config(
            "qwen3",
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
            rope_theta=1000000.0,
            attention_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            max_window_layers=2,
        ),
        [{"rms_norm_eps": 1e-2}],
    ),
    "smollm2": (
        hub_config(
            "llama",
            hidden_size=72,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rope_theta=100000.0,
            rope_scaling=None,
            rms_norm_eps=1e-5,
        ),
        [{"rope_theta": 10000.0}],
    ),
    "gemma2": (
        hub_config(
            "gemma2",
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=5.0,
            rope_theta=10000.0,
            hidden_activation="gelu_pytorch_tanh",
        ),
        [
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"sliding_window": 9},
            {"query_pre_attn_scalar": 16},
            {"hidden_activation": "gelu"},
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ],
    ),
    "gemma3": (
        hub_config(
            "gemma3_text",
            num_hidden_layers=7,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            query_pre_attn_scalar=12,
            sliding_window=8,
            sliding_window_pattern=6,
            rope_theta=10000.0,
            rope_local_base_freq=100.0,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
            hidden_activation="gelu_pytorch_tanh",
        ),
        [
            {"rope_scaling": None},
            {"rope_local_base_freq": 10000.0},
            {"rope_theta": 100.0},
            {"sliding_window": 9},
            {"sliding_window_pattern": 2},
            {"query_pre_attn_scalar": 8},
        ],
    ),
    "llama_bias": (
        hub_config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=10000.0),
        [{"rope_theta": 20000.0}],
    ),
    "qwen2_sliding": (
        hub_config(
            "qwen2",
            num_hidden_layers=3,
            rope_theta=10000.0,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        ),
        [{"use_sliding_window": False}, {"max_window_layers": 2}, {"sliding_window": 9}],
    ),
    # With experts: in folders of their own.
    "moe/mixtral": (
        hub_config(
            "mixtral",
            num_local_experts=6,
            num_experts_per_tok=2,
            sliding_window=None,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
        ),
        [{"num_experts_per_tok": 1}],
    ),
    "moe/qwen3_moe": (
        hub_config(
            "qwen3_moe",
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=24,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_theta=1000000.0,
        ),
        [{"norm_topk_prob": False}, {"num_experts_per_tok": 2}],
    ),
    "moe/deepseek_v2": (
        hub_config(
            "deepseek_v2",
            **EXPERTS,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=10,
            n_shared_experts=2,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=4.0,
            rope_theta=100.0,
            rope_scaling={**YARN, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 4.0, "beta_slow": 1.0},
            aux_loss_alpha=0.001,
            seq_aux=True,
        ),
        [
            {"topk_method": "greedy"},
            {"topk_group": 3},
            {"routed_scaling_factor": 1.0},
            {"rope_scaling": None},
            {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0}},
        ],
    ),
    "moe/deepseek_v3": (
        hub_config(
            "deepseek_v3",
            **EXPERTS,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=10,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=4,
            topk_group=2,
            topk_method="noaux_tc",
            scoring_func="sigmoid",
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=0,
            ep_size=1,
            rope_theta=100.0,
            rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.6, "beta_fast": 4.0, "beta_slow": 1.0},
        ),
        [
            {"n_group": 1, "topk_group": 1},
            {"topk_group": 3},
            {"norm_topk_prob": False},
            {"routed_scaling_factor": 1.0},
            {"rope_interleave": False},
            {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0}},
            {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        ],
    ),
    "moe/gpt_oss": (
        hub_config(
            "gpt_oss",
            num_hidden_layers=3,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            experts_per_token=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            tie_word_embeddings=False,
            attention_bias=True,
            hidden_act="silu",
            swiglu_limit=7.0,
            initial_context_length=64,
            rope_theta=1000.0,
            rms_norm_eps=1e-5,
            rope_scaling={**YARN, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": False},
        ),
        [
            {"num_experts_per_tok": 1},
            {"swiglu_limit": 100.0},
            {"sliding_window": 9},
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 1.0}},
        ],
    ),
}


def make_model(hub: dict) -> torch.nn.Module:
    hub = json.loads(json.dumps(hub))  # transformers writes into the nested dicts that it is given
    config = AutoConfig.for_model(hub.pop("model_type"), **hub)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Every value random and representable in bfloat16; large enough that attention is peaked and the caps bite."""
    biases = [(k, w) for k, w in model.named_buffers() if k.endswith("correction_bias")]  # DeepSeek-V3's choice
    for name, w in [*model.named_parameters(), *biases]:
        noise = torch.randn(w.shape, generator=generator)
        if "norm" in name:
            centre = 0.0 if model.config.model_type.startswith("gemma") else 1.0
            value = centre + 0.3 * noise
        elif "correction_bias" in name:
            value = 0.2 * noise
        elif name.endswith(("bias", "sinks")) or "embed_tokens" in name:
            value = 0.5 * noise
        elif name.endswith("experts.gate_up_proj") and model.config.model_type == "gpt_oss":  # some reach the clamp
            value = 3.0 * noise / w.shape[1] ** 0.5
        elif any(part in name for part in ("q_proj", "k_proj", "q_b_proj")):
            value = 1.5 * noise / w.shape[1] ** 0.5
        elif w.ndim == 3:  # experts
            value = noise / max(w.shape[1:]) ** 0.5
        else:
            value = noise / w.shape[1] ** 0.5
        w.copy_(value.bfloat16().float())


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens.long(), use_cache=False).logits


def make_family(name: str, hub: dict, changes: list[dict], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model = make_model(hub)
    randomize(model, generator)
    tokens = torch.randint(0, V, (B, T), generator=generator, dtype=torch.int32)
    logits = logits_of(model, tokens)
    state = dict(model.state_dict())
    for change in changes:
        other = make_model(hub | change)
        other.load_state_dict(state)
        for module in other.modules():  # a constant of the class, which no configuration changes
            if hasattr(module, "limit"):
                module.limit = change.get("swiglu_limit", module.limit)
        distance = (logits_of(other, tokens) - logits).abs().max().item()
        print(f"{name:13} {json.dumps(change):100} moves the logits by {distance:.3g}")
        assert distance > 1e-3, f"{name}: {change} moves less than ten times the tolerance of the tests"
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    if name.startswith("moe/"):  # transformers fuses the experts in memory and takes them apart as it saves
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            state = load_file(Path(saved) / "model.safetensors")
    save_file({k: v.bfloat16().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    save_file({"tokens": tokens, "logits": logits.contiguous()}, folder / "io.safetensors")
    for file, config in (("config_hub.json", hub), ("config.json", model.config.to_dict())):
        (folder / file).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir()) / 1024
    print(f"{name:13} {size:.0f} KB, logits std {logits.std():.2f}, max {logits.abs().max():.2f}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same sums in the same order, hence the same bytes
    chosen = sys.argv[1:] or list(FAMILIES)
    types = sorted({hub["model_type"] for hub, _ in FAMILIES.values()})
    defaults = {t: AutoConfig.for_model(t).to_dict() for t in types}
    (HERE / "defaults.json").write_text(json.dumps(defaults, indent=2, sort_keys=True) + "\n")
    for name in chosen:
        make_family(name, *FAMILIES[name], seed=list(FAMILIES).index(name))
