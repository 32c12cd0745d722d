"""Published models as configurations (`llama3_8b()`, `preset("llama3-8b")`), a mesh for each (`preset_mesh(cfg, 64)`).

The values are those of each model's config.json on the Hugging Face hub, under the id in the comment.
"""

import difflib
import math
from collections.abc import Callable
from typing import Any

from jaxscale.config import MeshConfig, MLAConfig, ModelConfig, MoEConfig, RopeScaling


def preset(name: str) -> ModelConfig:
    """The configuration with this name, as in "llama3-8b" or "llama3_8b"; ValueError names the nearest ones."""
    make = PRESETS.get(name.lower().replace("_", "-").replace(".", "-"))
    if make is None:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the models are {', '.join(PRESETS)}"
        raise ValueError(f"no model is called {name!r}; {hint}")
    return make()


def preset_mesh(cfg: ModelConfig, num_devices: int) -> MeshConfig:
    """A mesh that trains this model well to begin with.

    Tensor parallelism only where a layer is wide enough to pay for it (or, from 7B on, where more than 128 devices
    would each need a row of the batch), never beyond 8 (one host's fast links) and only over whole kv heads; experts
    spread over up to 16, but no further than the rest is sharded; then parameters fully sharded over what divides the
    width, up to 256; replicas beyond.
    """
    widest = 8 if cfg.embed_dim >= 8192 else 4 if cfg.embed_dim >= 3072 and num_devices > 128 else 1
    tp = math.gcd(math.gcd(cfg.num_kv_heads, cfg.mlp_dim), math.gcd(num_devices, widest))
    rest = num_devices // tp
    spread = math.gcd(cfg.moe.num_experts, rest) if cfg.moe is not None else 1
    ep = max(d for d in range(1, 17) if spread % d == 0 and d * d <= rest)
    rest //= ep
    fsdp = max(d for d in range(1, min(rest, 256) + 1) if rest % d == 0 and cfg.embed_dim % d == 0)
    return MeshConfig(dp=rest // fsdp, fsdp=fsdp, ep=ep, tp=tp)


def tiny() -> ModelConfig:
    """For tests and the demo: 3 layers that train on a CPU."""
    return ModelConfig(
        name="tiny",
        vocab_size=256,
        num_layers=3,
        embed_dim=128,
        mlp_dim=384,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_seq_len=1024,
        dtype="float32",
    )


def llama2_7b() -> ModelConfig:
    # meta-llama/Llama-2-7b-hf
    return ModelConfig(
        name="llama2-7b",
        vocab_size=32_000,
        num_layers=32,
        embed_dim=4096,
        mlp_dim=11_008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_seq_len=4096,
        tie_embeddings=False,
    )


def llama3_8b() -> ModelConfig:
    # meta-llama/Llama-3.1-8B
    return _llama3("llama3-8b", num_layers=32, embed_dim=4096, mlp_dim=14_336, num_heads=32)


def llama3_70b() -> ModelConfig:
    # meta-llama/Llama-3.1-70B
    return _llama3("llama3-70b", num_layers=80, embed_dim=8192, mlp_dim=28_672, num_heads=64)


def llama3_405b() -> ModelConfig:
    # meta-llama/Llama-3.1-405B (the revision with 8 kv heads)
    return _llama3("llama3-405b", num_layers=126, embed_dim=16_384, mlp_dim=53_248, num_heads=128)


def mistral_7b() -> ModelConfig:
    # mistralai/Mistral-7B-v0.1
    return ModelConfig(
        name="mistral-7b",
        vocab_size=32_000,
        num_layers=32,
        embed_dim=4096,
        mlp_dim=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=32_768,
        tie_embeddings=False,
        window=4096,
        layer_pattern=("local",),
    )


def qwen2_7b() -> ModelConfig:
    # Qwen/Qwen2-7B
    return ModelConfig(
        name="qwen2-7b",
        vocab_size=152_064,
        num_layers=28,
        embed_dim=3584,
        mlp_dim=18_944,
        num_heads=28,
        num_kv_heads=4,
        head_dim=128,
        max_seq_len=131_072,
        norm_eps=1e-6,
        qkv_bias=True,
        tie_embeddings=False,
        rope_theta=1e6,
    )


def qwen3_0_6b() -> ModelConfig:
    # Qwen/Qwen3-0.6B
    return _qwen3("qwen3-0-6b", num_layers=28, embed_dim=1024, mlp_dim=3072, num_heads=16, tie_embeddings=True)


def qwen3_8b() -> ModelConfig:
    # Qwen/Qwen3-8B
    return _qwen3("qwen3-8b", num_layers=36, embed_dim=4096, mlp_dim=12_288, num_heads=32, tie_embeddings=False)


def qwen3_32b() -> ModelConfig:
    # Qwen/Qwen3-32B
    return _qwen3("qwen3-32b", num_layers=64, embed_dim=5120, mlp_dim=25_600, num_heads=64, tie_embeddings=False)


def smollm2_135m() -> ModelConfig:
    # HuggingFaceTB/SmolLM2-135M
    return ModelConfig(
        name="smollm2-135m",
        vocab_size=49_152,
        num_layers=30,
        embed_dim=576,
        mlp_dim=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_seq_len=8192,
        rope_theta=100_000.0,
    )


def smollm2_1_7b() -> ModelConfig:
    # HuggingFaceTB/SmolLM2-1.7B
    return ModelConfig(
        name="smollm2-1-7b",
        vocab_size=49_152,
        num_layers=24,
        embed_dim=2048,
        mlp_dim=8192,
        num_heads=32,
        num_kv_heads=32,
        head_dim=64,
        max_seq_len=8192,
        rope_theta=130_000.0,
    )


def gemma2_2b() -> ModelConfig:
    # google/gemma-2-2b
    return _gemma2("gemma2-2b", num_layers=26, embed_dim=2304, mlp_dim=9216, num_heads=8, num_kv_heads=4)


def gemma2_9b() -> ModelConfig:
    # google/gemma-2-9b
    return _gemma2("gemma2-9b", num_layers=42, embed_dim=3584, mlp_dim=14_336, num_heads=16, num_kv_heads=8)


def gemma3_1b() -> ModelConfig:
    # google/gemma-3-1b-pt: the only one with a window of 512 and without scaled positions
    return _gemma3(
        "gemma3-1b",
        vocab_size=262_144,
        num_layers=26,
        embed_dim=1152,
        mlp_dim=6912,
        num_heads=4,
        num_kv_heads=1,
        max_seq_len=32_768,
        window=512,
        rope_scaling=None,
    )


def gemma3_4b() -> ModelConfig:
    # google/gemma-3-4b-pt, its text model
    return _gemma3("gemma3-4b", num_layers=34, embed_dim=2560, mlp_dim=10_240, num_heads=8, num_kv_heads=4)


def gemma3_12b() -> ModelConfig:
    # google/gemma-3-12b-pt, its text model
    return _gemma3("gemma3-12b", num_layers=48, embed_dim=3840, mlp_dim=15_360, num_heads=16, num_kv_heads=8)


def mixtral_8x7b() -> ModelConfig:
    # mistralai/Mixtral-8x7B-v0.1
    return ModelConfig(
        name="mixtral-8x7b",
        vocab_size=32_000,
        num_layers=32,
        embed_dim=4096,
        mlp_dim=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=32_768,
        tie_embeddings=False,
        rope_theta=1e6,
        moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=14_336),
    )


def qwen3_30b_a3b() -> ModelConfig:
    # Qwen/Qwen3-30B-A3B
    moe = MoEConfig(num_experts=128, top_k=8, mlp_dim=768)
    sizes = {"num_layers": 48, "embed_dim": 2048, "mlp_dim": 6144, "num_heads": 32, "num_kv_heads": 4}
    return _qwen3("qwen3-30b-a3b", tie_embeddings=False, moe=moe, **sizes)


def qwen3_235b_a22b() -> ModelConfig:
    # Qwen/Qwen3-235B-A22B
    moe = MoEConfig(num_experts=128, top_k=8, mlp_dim=1536)
    sizes = {"num_layers": 94, "embed_dim": 4096, "mlp_dim": 12_288, "num_heads": 64, "num_kv_heads": 4}
    return _qwen3("qwen3-235b-a22b", tie_embeddings=False, moe=moe, **sizes)


def deepseek_v2_lite() -> ModelConfig:
    # deepseek-ai/DeepSeek-V2-Lite
    return ModelConfig(
        name="deepseek-v2-lite",
        vocab_size=102_400,
        num_layers=27,
        embed_dim=2048,
        mlp_dim=10_944,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        max_seq_len=163_840,
        norm_eps=1e-6,
        tie_embeddings=False,
        rope_scaling=_deepseek_scaling(mscale=0.707),
        mla=MLAConfig(kv_rank=512, q_rank=None, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoEConfig(num_experts=64, top_k=6, mlp_dim=1408, norm_top_k=False, shared_dim=2 * 1408, first_dense=1),
    )


def deepseek_v3() -> ModelConfig:
    # deepseek-ai/DeepSeek-V3, without its layer that predicts a second token
    return ModelConfig(
        name="deepseek-v3",
        vocab_size=129_280,
        num_layers=61,
        embed_dim=7168,
        mlp_dim=18_432,
        num_heads=128,
        num_kv_heads=128,
        head_dim=192,
        max_seq_len=163_840,
        norm_eps=1e-6,
        tie_embeddings=False,
        rope_scaling=_deepseek_scaling(mscale=1.0),
        mla=MLAConfig(kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        moe=MoEConfig(
            num_experts=256,
            top_k=8,
            mlp_dim=2048,
            router="sigmoid",
            weight_scale=2.5,
            num_groups=8,
            top_groups=4,
            shared_dim=2048,
            first_dense=3,
        ),
    )


def gpt_oss_20b() -> ModelConfig:
    # openai/gpt-oss-20b
    return _gpt_oss("gpt-oss-20b", num_layers=24, num_experts=32)


def gpt_oss_120b() -> ModelConfig:
    # openai/gpt-oss-120b
    return _gpt_oss("gpt-oss-120b", num_layers=36, num_experts=128)


def _llama3(name: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=128_256,
        num_kv_heads=8,
        head_dim=128,
        max_seq_len=131_072,
        tie_embeddings=False,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_seq_len=8192),
        **sizes,
    )


def _qwen3(name: str, *, tie_embeddings: bool, num_kv_heads: int = 8, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=151_936,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        max_seq_len=40_960,
        norm_eps=1e-6,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
        rope_theta=1e6,
        **sizes,
    )


def _gemma2(name: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=256_000,
        head_dim=256,
        max_seq_len=8192,
        activation="gelu_tanh",
        norm_eps=1e-6,
        norm_offset=1.0,
        post_norms=True,
        scale_embeddings=True,
        query_scale=256**-0.5,
        attn_soft_cap=50.0,
        logit_soft_cap=30.0,
        window=4096,
        layer_pattern=("local", "global"),
        **sizes,
    )


_GEMMA3_SCALING = RopeScaling(kind="linear", factor=8.0)


def _gemma3(
    name: str,
    *,
    vocab_size: int = 262_208,
    max_seq_len: int = 131_072,
    window: int = 1024,
    rope_scaling: RopeScaling | None = _GEMMA3_SCALING,
    **sizes: Any,
) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=vocab_size,
        head_dim=256,
        max_seq_len=max_seq_len,
        activation="gelu_tanh",
        norm_eps=1e-6,
        norm_offset=1.0,
        post_norms=True,
        qk_norm=True,
        scale_embeddings=True,
        query_scale=256**-0.5,
        rope_theta=1e6,
        rope_scaling=rope_scaling,
        local_rope_theta=10_000.0,
        window=window,
        layer_pattern=("local", "local", "local", "local", "local", "global"),
        **sizes,
    )


def _deepseek_scaling(mscale: float) -> RopeScaling:
    return RopeScaling(kind="yarn", factor=40.0, original_max_seq_len=4096, mscale=mscale, mscale_all_dim=mscale)


def _gpt_oss(name: str, *, num_layers: int, num_experts: int) -> ModelConfig:
    return ModelConfig(
        name=name,
        vocab_size=201_088,
        num_layers=num_layers,
        embed_dim=2880,
        mlp_dim=2880,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        max_seq_len=131_072,
        qkv_bias=True,
        out_bias=True,
        tie_embeddings=False,
        rope_theta=150_000.0,
        rope_scaling=RopeScaling(kind="yarn", factor=32.0, original_max_seq_len=4096, truncate=False),
        window=128,
        layer_pattern=("local", "global"),
        sinks=True,
        moe=MoEConfig(num_experts=num_experts, top_k=4, mlp_dim=2880, router_bias=True, activation="gpt_oss"),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    make.__name__.replace("_", "-"): make
    for make in (
        tiny,
        llama2_7b,
        llama3_8b,
        llama3_70b,
        llama3_405b,
        mistral_7b,
        qwen2_7b,
        qwen3_0_6b,
        qwen3_8b,
        qwen3_32b,
        smollm2_135m,
        smollm2_1_7b,
        gemma2_2b,
        gemma2_9b,
        gemma3_1b,
        gemma3_4b,
        gemma3_12b,
        mixtral_8x7b,
        qwen3_30b_a3b,
        qwen3_235b_a22b,
        deepseek_v2_lite,
        deepseek_v3,
        gpt_oss_20b,
        gpt_oss_120b,
    )
}
