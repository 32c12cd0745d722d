"""Frozen configurations. Every divisibility and range check stands here, with the numbers and the remedy."""

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from sharding_rules.rules import MESH_AXES

# How attention over a split sequence communicates, and how its tokens are dealt: jaxscale.parallel.context.
CPStrategy = Literal["all_gather", "ring", "bidirectional", "ulysses", "usp", "halo"]
CPLayout = Literal["contiguous", "zigzag", "striped", "packed"]


class _Range(NamedTuple):
    """What a number must be: a test that nan does not pass, and the words for it."""

    holds: Callable[[float], bool]
    words: str


_COUNT = _Range(lambda n: n >= 1, "at least 1")
_NUMBER = _Range(lambda x: -math.inf < x < math.inf, "finite")
_POSITIVE = _Range(lambda x: 0 < x < math.inf, "positive and finite")
_NOT_NEGATIVE = _Range(lambda x: 0 <= x < math.inf, "at least 0 and finite")
_FRACTION = _Range(lambda x: 0 <= x < 1, "at least 0 and less than 1")
_SHARE = _Range(lambda x: 0 <= x <= 1, "between 0 and 1")
_SEED = _Range(lambda n: 0 <= n < 2**63, "at least 0 and less than 2**63")


def _require(cfg: Any, wanted: _Range, *names: str) -> None:
    """Refuses a configuration one of whose fields `names` is a number (not None) outside of the range."""
    fields = {field.name: field for field in dataclasses.fields(cfg)}
    for name in names:
        value, default = getattr(cfg, name), fields[name].default
        if value is not None and not wanted.holds(value):
            usual = default is not dataclasses.MISSING and default not in (None, value)
            raise ValueError(f"{name}={value} must be {wanted.words}" + (f", such as {default}" if usual else ""))


def _require_known(cfg: Any, *names: str) -> None:
    """Refuses a configuration one of whose fields `names` is none of its type's Literals."""
    hints = _type_hints(type(cfg))
    for name in names:
        value, known = getattr(cfg, name), typing.get_args(hints[name])
        if value not in known:
            near = difflib.get_close_matches(str(value), known, 1)
            raise ValueError(f"{name}={value!r} is not one of {', '.join(known)}" + "".join(f"; {n}?" for n in near))


_type_hints = functools.cache(typing.get_type_hints)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context they were trained on.

    kind: "linear" (Chen et al. 2023), "llama3" (Llama 3.1 model card), "yarn" (Peng et al. 2023, arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int = 8192
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: the ramp begins and ends at whole dims (GPT-OSS: anywhere)
    attention_factor: float | None = None  # yarn: cos and sin are multiplied by it; None: as below
    # yarn as DeepSeek says it, with m(x) = 0.1 x ln(factor) + 1: cos and sin are multiplied by m(mscale) over
    # m(mscale_all_dim), or m(1) where one is not given; latent attention's logits by m(mscale_all_dim) ** 2.
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        _require(self, _COUNT, "original_max_seq_len")
        _require(self, _POSITIVE, "factor", "beta_fast", "beta_slow", "attention_factor")
        _require(self, _POSITIVE, "low_freq_factor", "high_freq_factor")
        _require(self, _NUMBER, "mscale", "mscale_all_dim")
        if self.kind == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be less than high_freq_factor={self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one vector of
    kv_rank numbers for each token, and one rotated key that all heads share. What a cache holds is these two."""

    kv_rank: int
    q_rank: int | None  # queries come from a vector of that many numbers; None: straight from the residual stream
    nope_dim: int  # of a query's and a key's head_dim: not rotated,
    rope_dim: int  # rotated
    value_dim: int  # of a value

    def __post_init__(self):
        _require(self, _COUNT, "kv_rank", "q_rank", "nope_dim", "rope_dim", "value_dim")
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd; rotary embeddings rotate pairs, use an even rope_dim")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A mixture of experts in place of the MLP: how tokens are routed, what the experts are, what keeps them balanced.

    router: "softmax" (Mixtral, Qwen3-MoE, GPT-OSS), "sigmoid" (DeepSeek-V3, arXiv 2412.19437: a bias chooses, scores
    weigh), "gshard" (arXiv 2006.16668: at most `capacity_factor` times its share of a row for each expert), "cosine"
    (X-MoE, arXiv 2204.09179), "expert_choice" (arXiv 2202.09368: experts choose tokens of a row; not causal).
    """

    num_experts: int
    top_k: int
    mlp_dim: int  # the hidden layer of one expert
    router: Literal["softmax", "sigmoid", "gshard", "cosine", "expert_choice"] = "softmax"
    dropless: bool = True
    capacity_factor: float | None = None  # gshard, expert_choice; None: no limit, and 1 for expert_choice
    norm_top_k: bool = True  # the weights of a token's experts sum to 1 before weight_scale
    weight_scale: float = 1.0
    num_groups: int = 1  # softmax, sigmoid: experts lie in groups, of which a token uses
    top_groups: int = 1
    router_bias: bool = False
    cosine_dim: int = 32
    shared_dim: int = 0  # the hidden layer of the experts that every token uses
    first_dense: int = 0  # that many first layers have a plain MLP
    activation: Literal["gated", "gpt_oss"] = "gated"  # gpt_oss: clamped, with biases
    # Experts that cost nothing (MoE++, arXiv 2410.07348); top_k counts them.
    num_zero: int = 0
    num_copy: int = 0
    num_constant: int = 0
    cheap_balance: float = 0.75  # tau: how much the load of those counts in the balance loss
    gating_residual: bool = False  # the router sees the logits of the layer before
    balance_weight: float = 0.01
    balance_rows: int | None = None  # rows whose load is balanced: None: the whole batch; 1: each sequence
    router_z_weight: float = 0.0
    num_replicas: int = 0  # places for further copies of busy experts (jaxscale.plan.placement); not to be trained
    dispatch: Literal["auto", "all_gather", "all_to_all", "remote_copy", "two_level"] = "auto"  # over ep
    ep_hosts: int | None = None  # hosts that ep spans, slow links between them; None: as the run's devices lie
    dispatch_chunks: int = 1  # parts of a device's tokens, one travels while another is computed

    def __post_init__(self):
        _require_known(self, "router", "activation", "dispatch")
        _require(self, _COUNT, "num_experts", "mlp_dim", "num_groups", "cosine_dim")
        _require(self, _COUNT, "balance_rows", "dispatch_chunks", "ep_hosts")
        _require(self, _NOT_NEGATIVE, "shared_dim", "first_dense", "num_zero", "num_copy", "num_constant")
        _require(self, _NOT_NEGATIVE, "num_replicas", "cheap_balance", "balance_weight", "router_z_weight")
        _require(self, _POSITIVE, "capacity_factor", "weight_scale")
        if not 1 <= self.top_k <= self.num_routed:
            raise ValueError(
                f"top_k={self.top_k} must lie between 1 and the {self.num_routed} experts that a router chooses from"
            )
        if self.num_experts % self.num_groups or not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(
                f"num_experts={self.num_experts} in num_groups={self.num_groups}, of which "
                f"top_groups={self.top_groups}: use num_groups in {_divisors(self.num_experts)} and top_groups up to it"
            )
        if self.num_groups > 1:
            reach = self.num_experts // self.num_groups * self.top_groups
            if self.router not in ("softmax", "sigmoid") or self.num_routed > self.num_experts:
                raise ValueError(
                    f"num_groups={self.num_groups} needs router='softmax' or 'sigmoid' without zero-computation experts"
                )
            if self.top_k > reach:
                raise ValueError(
                    f"top_k={self.top_k} experts do not lie in {self.top_groups} groups of {reach} experts"
                )
        drops = self.router == "gshard" and self.capacity_factor is not None
        if self.dropless and drops:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} drops tokens but dropless=True promises not to; set "
                f"dropless=False, or capacity_factor=None"
            )
        if self.capacity_factor is not None and self.router not in ("gshard", "expert_choice"):
            raise ValueError(
                f"capacity_factor={self.capacity_factor} with router={self.router!r}: use gshard or expert_choice, or "
                f"capacity_factor=None"
            )
        if self.router == "expert_choice" and (self.num_routed > self.num_experts or self.dropless):
            raise ValueError(
                "expert_choice leaves tokens without an expert and knows no zero-computation experts; "
                "set dropless=False and num_zero=num_copy=num_constant=0"
            )
        if self.dispatch == "two_level" and self.ep_hosts == 1:
            raise ValueError(
                "dispatch='two_level' sends tokens to hosts first, but ep_hosts=1; set it to the hosts that ep spans, "
                "or use dispatch='auto'"
            )
        if self.dispatch == "remote_copy" and (self.ep_hosts or 1) > 1:
            raise ValueError(
                f"dispatch='remote_copy' reaches the devices of one host or slice, but ep_hosts={self.ep_hosts}; use "
                "dispatch='two_level', which copies inside of each"
            )

    @property
    def num_places(self) -> int:
        """How many experts with weights there are, copies included: what is split over ep."""
        return self.num_experts + self.num_replicas

    @property
    def num_routed(self) -> int:
        """How many experts the router chooses from, those that cost nothing included."""
        return self.num_experts + self.num_zero + self.num_copy + self.num_constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama 2/3, Mistral, Qwen2/3, SmolLM2, Gemma 2/3, Mixtral, Qwen3-MoE, DeepSeek-V2/V3,
    GPT-OSS."""

    name: str = "custom"
    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 4096
    activation: Literal["silu", "gelu_tanh", "gelu"] = "silu"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0  # Gemma scales by 1 + w
    post_norms: bool = False  # Gemma 2/3 norm what a block returns as well
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = True
    scale_embeddings: bool = False  # Gemma multiplies embeddings by sqrt(D)
    query_scale: float | None = None  # None: head_dim ** -0.5
    attn_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None  # None: local layers rotate as the global ones do
    window: int | None = None  # how many tokens, itself included, a local layer sees
    layer_pattern: tuple[Literal["global", "local"], ...] = ("global",)  # repeated over the depth
    sinks: bool = False  # each query head has a learned logit that takes attention and gives nothing (GPT-OSS)
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the computation
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of the masters

    def __post_init__(self):
        _require(self, _COUNT, "vocab_size", "num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads")
        _require(self, _COUNT, "head_dim", "max_seq_len", "window")
        _require(self, _POSITIVE, "norm_eps", "query_scale", "attn_soft_cap", "logit_soft_cap")
        _require(self, _POSITIVE, "rope_theta", "local_rope_theta")
        _require(self, _NUMBER, "norm_offset")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
                f"use num_kv_heads in {_divisors(self.num_heads)}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary embeddings rotate pairs, use an even head_dim")
        if "local" in self.layer_pattern and not self.window:
            raise ValueError("layer_pattern has local layers but window is not set; set window to a number of tokens")
        if not self.layer_pattern:
            raise ValueError("layer_pattern is empty; use ('global',)")
        if self.moe is not None and self.moe.first_dense >= self.num_layers:
            raise ValueError(f"first_dense={self.moe.first_dense} leaves no layer of {self.num_layers} with experts")
        if self.mla is not None:
            self._check_mla(self.mla)

    def _check_mla(self, mla: MLAConfig) -> None:
        if self.head_dim != mla.nope_dim + mla.rope_dim or self.num_kv_heads != self.num_heads:
            raise ValueError(
                f"latent attention has a key for each query head, nope_dim + rope_dim long; set head_dim="
                f"{mla.nope_dim + mla.rope_dim} (got {self.head_dim}) and num_kv_heads={self.num_heads} "
                f"(got {self.num_kv_heads})"
            )
        odd = [f for f in ("qk_norm", "qkv_bias", "out_bias", "sinks", "attn_soft_cap") if getattr(self, f)]
        if odd or any(self.local_layers):
            raise ValueError(
                f"latent attention has no {', '.join(odd) or 'local layers'}; switch that off, or mla=None"
            )

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """For each layer whether it attends inside `window` only."""
        return tuple(self.layer_pattern[i % len(self.layer_pattern)] == "local" for i in range(self.num_layers))

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward matmul FLOPs for one token: 6 per weight it meets, and causal attention at seq_len."""
        D, N, H, Hv = self.embed_dim, self.num_heads, self.head_dim, self.head_dim
        attn = D * H * (2 * N + 2 * self.num_kv_heads)
        if (mla := self.mla) is not None:
            Hv = mla.value_dim
            queries = D * N * H if mla.q_rank is None else mla.q_rank * (D + N * H)
            keys_and_values = D * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * N * (mla.nope_dim + Hv)
            attn = queries + keys_and_values + N * Hv * D
        dense, hidden = self.num_layers, 0.0
        if self.moe is not None:  # of the experts, those that a token meets
            dense = self.moe.first_dense
            met = self.moe.top_k * self.moe.num_experts / self.moe.num_routed
            hidden = (self.num_layers - dense) * (met * self.moe.mlp_dim + self.moe.shared_dim)
        hidden += dense * self.mlp_dim
        weights = self.num_layers * attn + 3 * D * hidden + self.vocab_size * D
        keys = sum(min(seq_len / 2, self.window or seq_len) if local else seq_len / 2 for local in self.local_layers)
        return 6.0 * weights + 6.0 * N * (H + Hv) * keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes, outermost first. One of them may be -1: it takes the devices that are left.

    With cp > 1 the sequence is split: `cp_strategy` says how attention communicates, `cp_layout` how tokens are dealt;
    "auto" estimates what is fastest (jaxscale.parallel.context_cost). A strategy given by name is that of every layer.
    With pp > 1 layers are split into stages, which micro-batches pass (jaxscale.parallel.pipeline).
    """

    pp: int = 1
    dp: int = 1
    fsdp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    cp_strategy: CPStrategy | Literal["auto"] = "all_gather"
    cp_layout: CPLayout | Literal["auto"] = "contiguous"
    pp_micro_batches: int | None = None  # None: the most that divide, up to four for each stage
    pp_interleave: int = 1  # chunks of layers on each stage: more keep stages busier and send more

    def __post_init__(self):
        for field, kind in (("cp_strategy", CPStrategy), ("cp_layout", CPLayout)):
            if (value := getattr(self, field)) not in (known := ("auto", *typing.get_args(kind))):
                raise ValueError(f"{field}={value!r} is not one of {', '.join(known)}")
        _require(self, _COUNT, "pp_micro_batches", "pp_interleave")
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size == 0 or size < -1:
                raise ValueError(f"{axis}={size}: a mesh axis is a positive size, or -1 for what is left")
        if sum(getattr(self, axis) == -1 for axis in MESH_AXES) > 1:
            raise ValueError(f"only one mesh axis may be -1, got {self}")

    def __str__(self):
        shown = [f"{a}={getattr(self, a)}" for a in MESH_AXES if getattr(self, a) != 1]
        choices = [f for f in dataclasses.fields(self) if f.name not in MESH_AXES]
        shown += [f"{f.name}={getattr(self, f.name)}" for f in choices if getattr(self, f.name) != f.default]
        return ",".join(shown) or "one device"

    @classmethod
    def parse(cls, text: str) -> "MeshConfig":
        """`fsdp=4,tp=2` -> MeshConfig(fsdp=4, tp=2); `cp=8,cp_strategy=ring` names a choice as well."""
        sizes: dict[str, Any] = {}
        for part in filter(None, text.replace(" ", "").split(",")):
            axis, _, size = part.partition("=")
            if axis in sizes:
                raise ValueError(f"mesh {text!r}: {axis} is given twice, {sizes[axis]} and {size}; give it once")
            if axis in ("cp_strategy", "cp_layout"):
                sizes[axis] = size
                continue
            counts = (*MESH_AXES, "pp_micro_batches", "pp_interleave")
            if axis not in counts or not size.removeprefix("-").isdecimal():
                raise ValueError(f"mesh {text!r}: {part!r} is not axis=size with an axis of {' '.join(MESH_AXES)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def num_devices(self) -> int | None:
        """How many devices the mesh needs; None while an axis is -1."""
        sizes = [getattr(self, axis) for axis in MESH_AXES]
        return None if -1 in sizes else math.prod(sizes)

    def fill(self, num_devices: int) -> "MeshConfig":
        """The same mesh with its -1 resolved; raises ValueError when it does not multiply to num_devices."""
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        free = [axis for axis, size in sizes.items() if size == -1]
        known = math.prod(size for size in sizes.values() if size != -1)
        if free and num_devices % known == 0:
            sizes[free[0]] = num_devices // known
        elif free or known != num_devices:
            raise ValueError(
                f"mesh {self} needs {'a multiple of ' if free else ''}{known} devices but {num_devices} are there; "
                f"change a size, or set one axis to -1 to take what is left"
            )
        return dataclasses.replace(self, **sizes)

    def check_model(self, model: ModelConfig) -> None:
        """Refuse a mesh that cannot share out the experts or has none to share out, or on which tensor parallelism
        splits neither attention nor MLP."""
        if model.moe is None and self.ep > 1:
            raise ValueError(f"mesh {self}: {model.name} has no experts to split over ep; set ep=1 and use dp or fsdp")
        if model.moe is not None and (places := model.moe.num_places) % self.ep:
            copies = f" + num_replicas={model.moe.num_replicas}" if model.moe.num_replicas else ""
            raise ValueError(
                f"num_experts={model.moe.num_experts}{copies} is not divisible by ep={self.ep}; "
                f"use ep in {_divisors(places)}"
            )
        if self.tp > 1 and model.num_heads % self.tp and model.mlp_dim % self.tp:
            both = math.gcd(model.num_heads, model.mlp_dim)
            raise ValueError(
                f"tp={self.tp} divides neither num_heads={model.num_heads} nor mlp_dim={model.mlp_dim}; "
                f"use tp in {_divisors(both)}"
            )

    def check_rows(self, batch_size: int, accum_steps: int = 1) -> None:
        """Refuse a batch that devices cannot share evenly: each of them would compute all of its rows."""
        parts = self.pp * self.dp * self.fsdp * self.ep * accum_steps
        if batch_size % parts:
            below, pp = batch_size // parts * parts, "pp*" if self.pp > 1 else ""
            raise ValueError(
                f"batch_size={batch_size} rows are not divisible by {pp}dp*fsdp*ep*accum_steps={parts}; "
                f"use {f'{below} or ' if below else ''}{below + parts} rows, or a larger tp or cp"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) with linear warm-up and a decay; weight decay leaves norms and biases alone."""

    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the learning rate, at the last step
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # inf: nothing is clipped

    def __post_init__(self):
        _require(self, _POSITIVE, "learning_rate", "eps")
        _require(self, _NOT_NEGATIVE, "warmup_steps", "weight_decay")
        _require(self, _SHARE, "final_fraction")
        _require(self, _FRACTION, "b1", "b2")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm={self.clip_norm} must be positive; inf clips nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it is cut into rows."""

    source: str = "stdlib"  # "stdlib" (the running Python's own), a directory, a .jsonl or a text file
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")  # of the files taken from a directory
    text_key: str = "text"  # of a JSON line
    messages_key: str = ""  # of a JSON line that is a conversation; its answers alone are learnt
    tokenizer: str = "bytes"  # "bytes", "bpe:4096" (ids, trained on the corpus), a tokenizer.json, or as init_from
    seq_len: int = 512
    batch_size: int = 16  # rows in a step, over the whole mesh
    holdout: float = 0.02  # share of the documents kept for validation
    seed: int = 0

    def __post_init__(self):
        _require(self, _COUNT, "batch_size")
        _require(self, _SEED, "seed")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} must be at least 2: each token is asked for the next")
        if not self.source or not self.suffixes:
            raise ValueError(
                f"source={self.source!r} with suffixes={self.suffixes} names no text; stdlib is always there"
            )
        if self.messages_key and not self.source.endswith(".jsonl"):
            raise ValueError(
                f"messages_key={self.messages_key!r} is for conversations, a JSON object a line; "
                f"source={self.source!r} is no .jsonl file"
            )
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout={self.holdout} must lie between 0 and 1")
        kind, _, size = self.tokenizer.partition(":")
        if kind == "bpe" and not (size.isdecimal() and int(size) >= 257):
            raise ValueError(
                f"tokenizer={self.tokenizer!r} must name at least 257 ids (256 bytes, BOS), as bpe:4096 does"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save and what to keep: on disk, and if asked for in memory and in an object store."""

    every: int = 100
    """steps from one save on disk to the next"""
    keep_last: int = 2
    """how many of the newest steps stay on disk, and in the object store"""
    keep_every: int | None = None
    """steps on disk that are multiples of it are kept for good"""
    on_error: Literal["continue", "stop"] = "continue"
    """what a failed save does: training goes on and says so, or it stops at the next save"""
    memory_every: int | None = None
    """steps from one snapshot in host memory to the next; a run that crashed goes on from there"""
    memory_hosts: tuple[str, ...] = ()
    """address:port for the keeper of each process, the same list everywhere; one process needs none"""
    memory_lost: int = 0
    """how many of these hosts may be lost together with their memory"""
    remote: str | None = None
    """object store that steps on disk are copied to: s3://bucket/path, gs://bucket/path"""
    remote_every: int | None = None
    """steps from one copy to the next, a multiple of every; default: each that is saved on disk"""

    def __post_init__(self):
        _require(self, _COUNT, "every", "keep_last", "keep_every", "memory_every", "remote_every")
        if self.remote_every is not None and (self.remote is None or self.remote_every % self.every):
            raise ValueError(
                f"checkpoint remote_every={self.remote_every} needs remote and a multiple of every={self.every}"
            )
        for host in self.memory_hosts:
            name, _, port = host.rpartition(":")
            if not name or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(f"memory_hosts: {host!r} is not address:port, as in 10.0.0.7:9100")
        if self.memory_hosts and self.memory_every is None:
            raise ValueError("memory_hosts are named but nothing is kept there; set memory_every, as in 10")
        if self.remote is not None and not re.match(r"\w+://\S|\{", self.remote):
            raise ValueError(f"remote={self.remote!r} is no address; write it as in s3://bucket/path, gs://bucket/path")
        hosts = max(1, len(self.memory_hosts))
        if not 0 <= self.memory_lost < hosts:
            raise ValueError(
                f"checkpoint memory_lost={self.memory_lost} of {hosts} host(s) must lie in 0..{hosts - 1}; "
                "name more memory_hosts"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: everything that its result depends on."""

    model: ModelConfig
    init_from: str = ""
    """a model whose parameters the run begins with: smollm2-135m, a .gguf file, a Hugging Face directory, or the
    directory of another run; empty: drawn at random"""
    out: str = "runs/default"
    steps: int = 1000
    mesh: MeshConfig = MeshConfig(fsdp=-1)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    accum_steps: int = 1  # micro-batches in a step
    remat: Literal["none", "dots", "full"] = "none"
    precision: str = ""
    """of matmuls: fp8, fp8-current, int8; a recipe such as w4a16-g64 to train for it; empty: model.dtype"""
    precision_skip: str = ""
    """a regular expression: weights whose path holds it stay in model.dtype"""
    z_loss: float = 0.0  # weight of mean(logsumexp(logits) ** 2)
    loss_chunk: int = 2048  # tokens per device whose logits are held at a time
    eval_every: int = 100
    eval_batches: int = 8
    log_every: int = 10
    profile_at: int | None = None
    """a step: this one and the two after it are profiled, into tensorboard/"""
    seed: int = 0

    def __post_init__(self):
        _require(self, _COUNT, "steps", "accum_steps", "loss_chunk", "eval_every", "eval_batches", "log_every")
        if self.profile_at is not None and not 1 <= self.profile_at <= self.steps:
            raise ValueError(f"profile_at={self.profile_at} is none of the steps 1..{self.steps}")
        _require(self, _NOT_NEGATIVE, "z_loss")
        _require(self, _SEED, "seed")
        if not self.out:
            raise ValueError("out is empty; name the directory that the run is written to, as in runs/default")
        try:
            re.compile(self.precision_skip)
        except re.error as error:
            raise ValueError(
                f"precision_skip={self.precision_skip!r} is no regular expression: {error}; "
                f"to mean the characters themselves use {re.escape(self.precision_skip)}"
            ) from None
        if self.precision_skip and not self.precision:
            raise ValueError(
                f"precision_skip={self.precision_skip!r} leaves weights out of a precision; name one, as in "
                "precision='fp8'"
            )
        if self.data.batch_size % self.accum_steps:
            raise ValueError(
                f"batch_size={self.data.batch_size} is not divisible by accum_steps={self.accum_steps}; "
                f"use accum_steps in {_divisors(self.data.batch_size)}"
            )
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"seq_len={self.data.seq_len} is longer than the model's max_seq_len={self.model.max_seq_len}; "
                f"shorten the rows or raise model.max_seq_len"
            )


def from_dict[T](cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """A configuration from plain data (JSON, TOML); the inverse of dataclasses.asdict.

    Raises:
      ValueError: a field that the configuration does not have, with the nearest name.
    """
    hints = typing.get_type_hints(cls)
    known = {}
    for name, value in values.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; it has {', '.join(hints)}"
            raise ValueError(f"{cls.__name__} has no field {where + name!r}{hint}")
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        if nested and isinstance(value, Mapping):
            value = from_dict(nested[0], value, f"{where}{name}.")  # type: ignore[arg-type]
        known[name] = tuple(value) if isinstance(value, list) else value
    return cls(**known)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, 128) + 1) if n % d == 0]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError where generation cannot draw tokens so: said before a model is read, too."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (the likeliest token) or a positive number")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"top_k={top_k} and top_p={top_p} do nothing at temperature=0; set temperature=1.0, or drop them"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1")
