"""The features whose combinations `jaxscale.plan.check` traces: what each sets in a tiny run's configuration."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Feature(NamedTuple):
    """One feature. Of two features of a kind a run has only one; `use` names the program that it is in, "" any."""

    kind: str
    # Of TrainConfig as nested dicts; `packed`: rows hold several documents; `weights`: the recipe they are decoded by.
    changes: Mapping[str, Any]
    use: str = ""


BASE: Mapping[str, Any] = {
    "model": {
        "name": "pair",
        "vocab_size": 256,
        "num_layers": 2,
        "embed_dim": 64,
        "mlp_dim": 128,
        "num_heads": 16,
        "num_kv_heads": 4,
        "head_dim": 64,
        "max_seq_len": 256,
    },
    "mesh": {},
    "data": {"batch_size": 16, "seq_len": 256},
}


_LATENT = {"kv_rank": 32, "q_rank": 48, "nope_dim": 32, "rope_dim": 32, "value_dim": 64}


def _model(kind: str, **fields: Any) -> Feature:
    return Feature(kind, {"model": fields})


def _experts(kind: str, **fields: Any) -> Feature:
    return _model(kind, moe={"num_experts": 8, "top_k": 2, "mlp_dim": 128} | fields)


def _split(strategy: str, **model: Any) -> Feature:
    # Eight devices and four kv heads: usp makes two groups of four. The default layout suits every strategy.
    return Feature("cp", {"mesh": {"cp": 8, "cp_strategy": strategy}, "model": model}, use="train")


def _dealt(layout: str) -> Feature:
    changes = {"mesh": {"cp": 8, "cp_layout": layout}} | ({"packed": True} if layout == "packed" else {})
    return Feature("layout", changes, use="train")


# Those that others build on come first: in a pair the later one's values are taken.
FEATURES: Mapping[str, Feature] = {
    "dp": Feature("dp", {"mesh": {"dp": 2}}),
    "fsdp": Feature("fsdp", {"mesh": {"fsdp": 2}}),
    "tp": Feature("tp", {"mesh": {"tp": 2}}),
    "ep": Feature("ep", {**_experts("").changes, "mesh": {"ep": 2}}),
    "pp": Feature("pp", {"mesh": {"pp": 2}}, use="train"),
    "cp=all_gather": _split("all_gather"),
    "cp=ring": _split("ring"),
    "cp=bidirectional": _split("bidirectional"),
    "cp=ulysses": _split("ulysses"),
    "cp=usp": _split("usp"),
    "cp=halo": _split("halo", window=64, layer_pattern=["local"]),
    "layout=zigzag": _dealt("zigzag"),
    "layout=striped": _dealt("striped"),
    "layout=packed": _dealt("packed"),
    "packed rows": Feature("rows", {"packed": True}, use="train"),
    "windows": _model("layers", window=64, layer_pattern=["local"]),
    "local and global layers": _model("layers", window=64, layer_pattern=["local", "global"]),
    "soft caps": _model("soft caps", attn_soft_cap=50.0, logit_soft_cap=30.0),
    "norms of q and k": _model("qk_norm", qk_norm=True),
    "biases": _model("biases", qkv_bias=True, out_bias=True, mlp_bias=True),
    "head of its own": _model("head", tie_embeddings=False),
    "dispatch=all_gather": Feature("dispatch", {**_experts("", dispatch="all_gather").changes, "mesh": {"ep": 2}}),
    "dispatch=all_to_all": Feature("dispatch", {**_experts("", dispatch="all_to_all").changes, "mesh": {"ep": 2}}),
    "dispatch=remote_copy": Feature("dispatch", {**_experts("", dispatch="remote_copy").changes, "mesh": {"ep": 2}}),
    "dispatch=two_level": Feature(
        "dispatch", {**_experts("", dispatch="two_level", ep_hosts=2).changes, "mesh": {"ep": 4}}
    ),
    "dispatch in chunks": Feature("chunks", {**_experts("", dispatch_chunks=2).changes, "mesh": {"ep": 2}}),
    "router=softmax": _experts("router", router="softmax"),
    "router=sigmoid": _experts("router", router="sigmoid", num_groups=4, top_groups=2),
    "router=gshard": _experts("router", router="gshard", dropless=False, capacity_factor=1.25),
    "router=cosine": _experts("router", router="cosine"),
    "router=expert_choice": _experts("router", router="expert_choice", dropless=False),
    "experts that cost nothing": _experts("cheap experts", num_zero=1, num_copy=1, num_constant=1),
    "shared experts": _experts("shared", shared_dim=64),
    "gating residuals": _experts("gating", gating_residual=True),
    "first layers dense": _experts("dense", first_dense=1),
    "remat=dots": Feature("remat", {"remat": "dots"}, use="train"),
    "remat=full": Feature("remat", {"remat": "full"}, use="train"),
    "micro-batches": Feature("accum", {"accum_steps": 2}, use="train"),
    "float32": _model("dtype", dtype="float32"),
    "float16": _model("dtype", dtype="float16"),
    "float8 activations": _model("dtype", dtype="float8_e4m3fn"),
    "head_dim=80": _model("head_dim", head_dim=80),
    "head_dim=128": _model("head_dim", head_dim=128),
    "head_dim=256": _model("head_dim", head_dim=256),
    "latent attention": _model("attention", num_kv_heads=16, mla=_LATENT),
    "precision=fp8": Feature("precision", {"precision": "fp8"}, use="train"),
    "precision=fp8-current": Feature("precision", {"precision": "fp8-current"}, use="train"),
    "precision=int8": Feature("precision", {"precision": "int8"}, use="train"),
    "trained for 4 bits": Feature("precision", {"precision": "w4a16-g32"}, use="train"),
    "weights=w8a8": Feature("weights", {"weights": "w8a8"}, use="decode"),
    "weights=w8a8-fp8": Feature("weights", {"weights": "w8a8-fp8"}, use="decode"),
    "weights=w4a16-g32": Feature("weights", {"weights": "w4a16-g32"}, use="decode"),
    "decode": Feature("use", {}, use="decode"),
    "export to Hugging Face": Feature("use", {}, use="export"),
}
