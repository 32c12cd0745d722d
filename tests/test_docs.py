"""The Python of the guides runs as it stands: each page's blocks, top to bottom, with the names that a reader brings.

`CHANGES` makes them small enough for here, each a text that must still stand in the page. Blocks that need what is not
here (a network, hosts, a pod's compiler) are named in `ELSEWHERE`, with the test that runs the same.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.models import decoder, presets

DOCS = Path(__file__).parents[1] / "docs"
SIZES: dict[str, Any] = {"vocab_size": 64, "num_layers": 2, "embed_dim": 32, "mlp_dim": 64, "max_seq_len": 64}
CFG = dataclasses.replace(presets.tiny(), num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32", **SIZES)

CHANGES: dict[str, list[tuple[str, str]]] = {
    "sharding": [("presets.smollm2_135m()", "cfg")],
    "data": [
        ('source="stdlib", tokenizer="bpe:4096", seq_len=256, batch_size=64', "source=text, seq_len=16, batch_size=4")
    ],
    "moe": [
        ("num_experts=64, top_k=8, mlp_dim=1408, shared_dim=2816", "num_experts=8, top_k=2, mlp_dim=16, shared_dim=16"),
        ("loss, metrics", "params = init(cfg)\nloss, metrics"),
        ('import_hf("Mixtral-8x7B-v0.1")', "(params, cfg)"),
        ("num_experts=64, num_devices=8)  # HiGHS", "num_experts=8, num_devices=2)  # HiGHS"),
        ("num_experts=64, num_devices=8, num_replicas=8", "num_experts=8, num_devices=2, num_replicas=2"),
    ],
    "quantized": [("w4a16-g64", "w4a16-g32"), ("max_new_tokens=50", "max_new_tokens=2")],
    "rules": [
        ('{"fsdp": 8, "tp": 8}', '{"fsdp": 2, "tp": 2}'),
        ("make_mesh(fsdp=8, tp=8)", "make_mesh(devices=jax.devices()[:4], fsdp=2, tp=2)"),
        ('"rules.toml"', "toml"),
    ],
    "planner": [('"h200:16x8"', '"cpu:4"'), ("# shapes are enough", "#")],
}
ELSEWHERE = {
    "load_model(": "tests/generate/test_smollm2.py",
    "coherent=True": "tests/parallel/test_coherent.py",
    "compile_step(": "tests/contracts/test_presets_compile.py",
    "with Checkpointer(": "tests/checkpoint/test_store.py",
    "fused_target": "tests/checkpoint/test_layout.py",
    "paths_of_stages": "tests/checkpoint/test_ranks.py",
    "list_steps(": "tests/checkpoint/test_tools.py",
    "MemoryCheckpointer(": "tests/checkpoint/test_memory.py",
    "Levels(": "tests/checkpoint/test_levels.py",
}


def init(cfg: ModelConfig) -> Any:
    return jaxscale.init_params(jax.random.key(0), decoder.param_specs(cfg))


def tokens(rng, *shape: int) -> jax.Array:
    return jnp.asarray(rng.integers(0, 64, shape), jnp.int32)


def brought(page: str, rng, tmp_path) -> dict[str, Any]:
    """What a page's reader has: names that its blocks use and do not make."""
    batch = {name: tokens(rng, 8, 16) for name in ("tokens", "labels")}
    names: dict[str, Any] = {"cfg": CFG, "init": init, "batch": batch, "tokens": batch["tokens"], "jnp": jnp}
    names |= {"optimizer": optax.sgd(0.1), "key": jax.random.key(0)}
    names |= {"loss_fn": lambda params, batch: decoder.loss_fn(params, batch, CFG)[0], "params": init(CFG)}
    if page == "data":
        (tmp_path / "a.txt").write_text("the mesh splits every array\n" * 40)
        (tmp_path / "b.txt").write_text("and no number changes\n" * 40)
        names |= {"text": str(tmp_path), "loss_sum": lambda rows: 2.0 * (rows["labels"] >= 0).sum()}
    if page == "moe":
        names |= {"dense": CFG}
    if page == "quantized":
        names |= {"prompts": [[1, 2, 3]], "specs": decoder.param_specs(CFG), "batches": [tokens(rng, 8, 16)]}
    if page == "rules":  # a model that knows nothing of meshes
        names["params"] = {"embed": jnp.ones((64, 32)), "up": jnp.ones((32, 64)), "down": jnp.ones((64, 32))}
        names["loss_fn"] = lambda p, b: jnp.square(jax.nn.relu(p["embed"][b["tokens"]] @ p["up"]) @ p["down"]).mean()
        names |= {"toml": tmp_path / "rules.toml", **{f"small_{n}": names[n] for n in ("loss_fn", "params", "batch")}}
    return names


def blocks(page: str) -> list[str]:
    text = (DOCS / f"{page}.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for old, _ in CHANGES.get(page, []):
        assert any(old in block for block in found), f"docs/{page}.md no longer says {old!r}: change CHANGES with it"
    return [block for block in found if not any(mark in block for mark in ELSEWHERE)]


@pytest.mark.parametrize("page", ["sharding", "data", "moe or quantized", "rules", "planner"])
def test_a_page_runs(page, rng, tmp_path, monkeypatch):
    page = str(rng.choice(page.split(" or ")))  # one of those that take longest
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path / "cache"))
    names = brought(page, rng, tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(page):
            for old, new in CHANGES.get(page, []):
                block = block.replace(old, new)
            exec(compile(block, f"docs/{page}.md", "exec"), names)
    if page == "rules":
        with pytest.raises(ValueError, match="mesh of Auto axes and this one's are Explicit"):
            names["plan"].apply(names["loss_fn"], jaxscale.make_mesh(fsdp=8))
        want = names["small_loss_fn"](names["small_params"], names["small_batch"])
        assert float(names["metrics"]["loss"]) == pytest.approx(float(want), rel=1e-5)
    if page == "data":  # 2 nats for each label, and a byte is a token
        assert names["bits_per_byte"] == pytest.approx(2 / np.log(2), rel=0.1)


def zeros(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in shapes.items()}


def test_the_kernels_page_traces():
    """Names, shapes and arguments are what these blocks are about: nothing is computed."""
    B, T, N, K, H = 2, 128, 4, 2, 64
    ints = lambda *shape: jnp.ones(shape, jnp.int32)
    qkv = zeros(q=(B, T, N, H), k=(B, T, K, H), v=(B, T, K, H))
    rows = {
        "sizes": jnp.asarray([40, 24]),
        **zeros(lhs=(64, 128), rhs=(2, 128, 64), w_gate=(2, 128, 64), w_up=(2, 128, 64)),
    }
    brings: dict[str, dict[str, Any]] = {
        "import attention, ": qkv | {"ids": ints(B, T), "pos": ints(B, T), "at_q": ints(B, T), "at_kv": ints(B, T)},
        "import attention_float8": qkv,
        "import decode_attention, ": {
            **qkv,
            **zeros(q=(B, 1, N, H), k_pages=(4, 64, K, H), v_pages=(4, 64, K, H)),
            **dict.fromkeys(("page_table", "table"), ints(B, 2)),
            **dict.fromkeys(("k_int8", "v_int8"), jnp.ones((4, 64, K, H), jnp.int8)),
            **dict.fromkeys(("ks", "vs"), jnp.ones((4, K))),
            "lengths": ints(B),
            "K": K,
            "H": H,
        },
        "import ragged_dot, ": rows | {"group_sizes": rows["sizes"], "jnp": jnp},
        "import spread_rows": {"token": ints(16), "place": ints(8, 2), **zeros(x=(8, 64))},
        "import ragged_all_to_all": {
            **zeros(operand=(16, 64), output=(24, 64)),
            **dict.fromkeys(("input_offsets", "send_sizes", "output_offsets", "recv_sizes"), ints(4)),
        },
        "import QuantizedArray, ": zeros(x=(B, 256), dense=(256, 128)),
        'dense, "int4", group=128)  # dense [G': {**rows, "group_sizes": rows["sizes"], **zeros(dense=(2, 128, 64))},
        "import quantize_rows, ": {**zeros(x=(64, 256)), "groups": 2},
        "import float8_grads_implementation, ": {
            **zeros(x=(3, 128, 64), grad=(128, 64), gate=(128, 64), up=(128, 64)),
            "scale": jnp.ones(3),
            "scales": (jnp.ones(()),) * 3,
            "jnp": jnp,
        },
        "import norm_rope, ": {**zeros(x=(B, T, N, H)), "scale": jnp.ones(H), "cos": jnp.ones((B, T, H // 2))},
    }
    names: dict[str, Any] = {}
    for mark, found in brings.items():
        [block] = [block for block in blocks("kernels") if mark in block]
        names |= found | ({"sin": found["cos"]} if "cos" in found else {})
        with jax.numpy_dtype_promotion("standard"):
            run = functools.partial(exec, compile(block, "docs/kernels.md", "exec"), names)
            if "axis_name" in block:
                run = jax.shard_map(run, mesh=jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2]), out_specs=P())
            jax.eval_shape(run)
    assert len(brings) == len(blocks("kernels"))


def test_the_context_page_traces():
    """Its calls inside of a shard_map over cp, on rows of two documents."""
    config, local, step = blocks("context")
    names: dict[str, Any] = {"MeshConfig": jaxscale.MeshConfig, "optimizer": optax.sgd(0.1)}
    exec(config, names)

    def body(q, k, v, positions, ids):
        exec(local, names | {"q": q, "k": k, "v": v, "positions": positions, "ids": ids}, out := {})
        return out["out"]

    q, ids = jnp.zeros((1, 64, 2, 8)), jnp.ones((1, 64), jnp.int32)
    with jax.set_mesh(jaxscale.make_mesh(dp=4, cp=2)):
        q, ids = jax.reshard((q, ids), jax.P(None, "cp"))
        out = jax.eval_shape(jax.shard_map(body, out_specs=jax.P(None, "cp")), q, q, q, ids, ids)
    assert out.shape == q.shape
    from jaxscale.parallel import context

    names |= {"context": context, "jax": jax, "make_train_step": jaxscale.make_train_step, "loss_fn": lambda p, b: p}
    exec(step, names)


def test_what_is_not_run_here_is_tested_there():
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    for mark, where in ELSEWHERE.items():
        assert mark in pages, f"no page says {mark!r} any more"
        assert (DOCS.parent / where).exists()
