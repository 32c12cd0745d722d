"""The estimate against hand calculations, traced programs, and programs compiled for simulated devices."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from jaxscale.config import MeshConfig, MLAConfig, ModelConfig, MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.parallel import expert_remote
from jaxscale.parallel import pipeline as over_pp
from jaxscale.params import abstract_params, num_params
from jaxscale.plan.aot import abstract_batch, compile_step
from jaxscale.plan.estimate import _Step, cache_bytes, estimate
from jaxscale.plan.hardware import find_pod
from jaxscale.sharding import active_mesh
from sharding_rules.rules import MEGATRON_FSDP


def model(rng, **changes) -> ModelConfig:
    kv = int(rng.choice([2, 4]))
    sizes = {
        "vocab_size": 64 * int(rng.integers(2, 12)),
        "num_layers": int(rng.integers(2, 5)),
        "embed_dim": 64 * int(rng.integers(1, 3)),
        "mlp_dim": 64 * int(rng.integers(2, 5)),
        "num_heads": kv * int(rng.choice([1, 2])),
        "num_kv_heads": kv,
        "head_dim": 16,
        "tie_embeddings": bool(rng.integers(2)),
        "dtype": "float32",
    }
    return ModelConfig(**(sizes | changes))


def latent(rng) -> dict:
    """Changes to a model: attention over latents, values smaller than keys."""
    sizes = {"nope_dim": 32, "rope_dim": 16, "value_dim": 8 * int(rng.integers(1, 5))}
    sizes |= {"kv_rank": 16 * int(rng.integers(2, 5)), "q_rank": None if rng.integers(2) else 48}
    return {"mla": MLAConfig(**sizes), "num_heads": 4, "num_kv_heads": 4, "head_dim": 48}


def of_stages(rng) -> str:
    """A mesh with two stages."""
    inner = str(rng.choice(["fsdp=2", "dp=2", "tp=2", "cp=2"]))
    return f"pp=2,{inner}," + str(rng.choice(["pp_interleave=2", "pp_micro_batches=2", "pp_micro_batches=4"]))


@pytest.mark.parametrize("mesh", ["fsdp=4", "fsdp=2,tp=2", "fsdp=2,cp=2", "dp=2,fsdp=2", "stages"])
def test_traffic_and_state_are_those_of_the_compiled_step(mesh, rng):
    """Bytes of every (kind, axes) within 5 %, or within the scalars and norm scales that are summed on the way."""
    cfg = model(rng, **(latent(rng) if rng.integers(2) else {"post_norms": bool(rng.integers(2))}))
    remat = str(rng.choice(["none", "dots", "full"]))
    pod = find_pod("cpu:4")
    if mesh == "stages":
        mesh, cfg = of_stages(rng), model(rng, num_layers=4, post_norms=bool(rng.integers(2)))
        if rng.integers(2):  # no room to gather a stage's weights once
            pod = pod._replace(hardware=dataclasses.replace(pod.hardware, memory=1e6))
        print(mesh, pod.hardware.memory)
    sizes = {"batch_size": 8, "seq_len": 64, "remat": remat, "loss_chunk": 1024}
    compiled = compile_step(cfg, MeshConfig.parse(mesh), pod, **sizes)
    guess = estimate(cfg, MeshConfig.parse(mesh), pod, **sizes)
    assert compiled.findings == []
    wire = sum(t.bytes for t in guess.transfers)
    if "interleave" in mesh:  # the census counts the branch that scores in all 2 m - 2 ticks both ways, not m
        micro = over_pp.count(over_pp.plan(MeshConfig.parse(mesh), cfg, sizes["batch_size"]))
        row = 4 * sizes["batch_size"] * sizes["seq_len"] // 2 * cfg.embed_dim / micro  # halved by the other axis
        head = 4 * cfg.vocab_size * cfg.embed_dim if "cp=2" in mesh else 0  # its gradient
        wire += (micro - 2) * (2 * row + head)
    assert wire == pytest.approx(sum(r.bytes for r in compiled.census.rows), rel=0.05), (cfg, remat, compiled.census)
    gathers = {t.axes: t.bytes for t in guess.transfers if t.kind == "all-gather"}
    for axes, size in compiled.census.bytes["all-gather"].items():
        if axes == "pp" and "interleave" in mesh:
            continue  # the census counts the branch that scores in every tick
        assert gathers.get(axes, 0) == pytest.approx(size, rel=0.05, abs=4 * 8 * 64 * 4), (axes, cfg, remat)
    # The state is exact but for three counters, the key and padding.
    state = guess.memory.params + guess.memory.optimizer + guess.memory.batch
    assert 0 <= compiled.memory.arguments - state <= 64


MOE = {"num_experts": 4, "top_k": 4, "mlp_dim": 64}  # all are chosen: buffers have room for them


@pytest.mark.parametrize(
    ("mesh", "moe"),
    [
        ("ep=4", MOE | {"dispatch": "all_gather"}),
        ("ep=2,tp=2", MOE | {"top_k": 2, "dispatch": "all_to_all"}),  # with further rounds, which do not count
        ("cp=4,cp_strategy=ring", None),
        ("cp=4,cp_strategy=usp,cp_layout=striped", None),
        ("cp=4,cp_strategy=all_gather,cp_layout=zigzag", None),
    ],
)
def test_dispatch_and_strategies_send_what_the_compiled_step_sends(mesh, moe, rng):
    """Every (kind, axes) but for small ones; on CPU a scatter that no shard_map asks for is an all-reduce."""
    changes = {"num_heads": 8, "num_kv_heads": 2, "moe": MoEConfig(**moe) if moe else None, "num_layers": 2}
    cfg = model(rng, **changes)
    remat = str(rng.choice(["none", "dots", "full"]))
    sizes = {"batch_size": 8, "seq_len": 64, "remat": remat, "loss_chunk": 1024}
    shape = MeshConfig.parse(mesh)
    compiled = compile_step(cfg, shape, find_pod("cpu:4"), **sizes)
    guess = estimate(cfg, shape, "cpu:4", **sizes)
    by = {(t.kind, t.axes): t.bytes for t in guess.transfers}
    sent = {(r.kind, r.axes): r.bytes for r in compiled.census.rows}
    if moe:  # tp's own sums are the dense decoder's, tested above
        by, sent = ({k: n for k, n in x.items() if k[1] == "ep"} for x in (by, sent))
    assert sum(by.values()) == pytest.approx(sum(sent.values()), rel=0.05), (cfg, remat, compiled.census)
    for key, size in sent.items():
        assert by.get(key, 0) == pytest.approx(size, rel=0.05, abs=16384), (key, cfg, remat, guess.transfers)


def test_only_the_experts_that_a_token_meets_are_computed(rng):
    run = functools.partial(estimate, pod="h200:1x8", batch_size=32, seq_len=512, remat="none")
    cfg = model(rng, moe=MoEConfig(num_experts=16, top_k=2, mlp_dim=64))
    more = dataclasses.replace(cfg, moe=MoEConfig(num_experts=64, top_k=2, mlp_dim=64))
    one, many = run(cfg, MeshConfig(fsdp=8)), run(more, MeshConfig(fsdp=8))
    experts = 3 * 48 * cfg.embed_dim * 64 * cfg.num_layers  # 48 more of three matrices
    router = 48 * cfg.embed_dim * cfg.num_layers
    tokens = 4 * 512
    assert many.flops - one.flops == pytest.approx(6 * tokens * router)
    assert many.memory.params - one.memory.params == pytest.approx(4 * (experts + router) / 8, rel=0.01)
    split = run(cfg, MeshConfig(fsdp=2, ep=4))
    assert split.flops == pytest.approx(one.flops)  # the same work in all
    held = [t for t in split.transfers if t.kind == "all-gather" and t.axes == "fsdp"]
    whole = [t for t in one.transfers if t.kind == "all-gather" and t.axes == "fsdp"]
    assert held[0].bytes < whole[0].bytes  # a device gathers its own experts only


@pytest.mark.parametrize("attention", ["heads", "latent"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_residuals_are_what_the_traced_layers_keep(remat, attention, rng):
    cfg = model(rng, num_layers=5, dtype="bfloat16", **(latent(rng) if attention == "latent" else {}))
    mesh = MeshConfig()
    pod_mesh = jax.make_mesh((1,) * 6, ("pp", "dp", "fsdp", "ep", "cp", "tp"), devices=jax.devices()[:1])
    seq_len = 2048  # attention in chunks: its probabilities are not kept
    loss = functools.partial(decoder.loss_fn, cfg=cfg, remat=remat)
    with jax.set_mesh(pod_mesh):
        assert active_mesh() is not None
        params = abstract_params(decoder.param_specs(cfg), pod_mesh, MEGATRON_FSDP)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(params, abstract_batch(pod_mesh, 1, seq_len))
    layers = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == cfg.num_layers)
    kept = [v.aval for v in layers.outvars if v.aval.shape[:1] == (cfg.num_layers,)]
    # Bytes of a layer. Small vectors (a number a token, norm scales) are left out on both sides but for the logsumexp.
    tokens = [a for a in kept if seq_len in a.shape and math.prod(a.shape[1:]) >= cfg.num_heads * seq_len]
    found = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in tokens)
    expected = _Step(cfg, mesh, 1, seq_len, remat, 2048, MEGATRON_FSDP).residuals(remat)
    if remat == "none":  # plain XLA attention keeps its output in a layout of its own besides
        expected += seq_len * cfg.num_heads * (cfg.mla.value_dim if cfg.mla else cfg.head_dim) * 2
    assert found == expected, [a.str_short() for a in kept]


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_residuals_of_experts_are_what_the_traced_layers_keep(remat, rng, monkeypatch):
    """Tokens and weights are kept once more for each level whose buffers may overflow, and nothing of what travels."""
    monkeypatch.setattr(expert_remote, "unless_remote", lambda x: None)  # as if this were a TPU: only traced
    ways = [("auto", 1, 1), ("all_gather", 2, 1), ("all_to_all", 4, 1), ("two_level", 4, 2), ("remote_copy", 4, 1)]
    dispatch, ep, hosts = ways[int(rng.integers(len(ways)))]
    mlp_dim, seq_len = 64 * int(rng.integers(1, 4)), 2048
    moe = MoEConfig(num_experts=8 * ep, top_k=2, mlp_dim=mlp_dim, dispatch=dispatch, ep_hosts=hosts)
    cfg = model(rng, num_layers=5, embed_dim=64, num_heads=8, num_kv_heads=2, dtype="bfloat16", moe=moe)
    mesh = MeshConfig(ep=ep)
    devices = make_mesh(mesh, jax.devices()[:ep])
    loss = functools.partial(decoder.loss_fn, cfg=cfg, remat=remat)
    with jax.set_mesh(devices):
        params = abstract_params(decoder.param_specs(cfg), devices, MEGATRON_FSDP)
        jaxpr = jax.make_jaxpr(jax.grad(lambda p, b: loss(p, b)[0]))(params, abstract_batch(devices, ep, seq_len))
    layers = next(e for e in jaxpr.eqns if e.primitive.name == "scan" and e.params["length"] == cfg.num_layers)
    kept = [v.aval for v in layers.outvars if v.aval.shape[:1] == (cfg.num_layers,)]
    # Of one device; what has fewer numbers than the logsumexp, and indices, are left out on both sides.
    local = [(math.prod(a.sharding.shard_shape(a.shape)[1:]), a.dtype) for a in kept]
    large = [(n, d) for n, d in local if n >= cfg.num_heads * seq_len and jnp.issubdtype(d, jnp.floating)]
    expected = _Step(cfg, mesh, ep, seq_len, remat, 2048, MEGATRON_FSDP).residuals(remat)
    if remat == "none":  # plain XLA attention keeps its output in a layout of its own besides
        expected += seq_len * cfg.num_heads * cfg.head_dim * 2
    assert sum(n * d.itemsize for n, d in large) == expected, (dispatch, [a.str_short() for a in kept])


def test_state_and_flops_by_hand():
    cfg = ModelConfig(
        vocab_size=1000,
        num_layers=3,
        embed_dim=64,
        mlp_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        tie_embeddings=False,
        dtype="bfloat16",
    )
    found = estimate(cfg, MeshConfig(fsdp=4), "h200:1x4", batch_size=8, seq_len=128, remat="none", loss_chunk=10**6)
    numbers = num_params(decoder.param_specs(cfg))
    assert found.memory.params == numbers  # four bytes each, a quarter of them
    assert found.memory.optimizer == 2 * numbers
    layer = 64 * 16 * (4 + 4 + 2 + 2) + 3 * 64 * 128
    tokens = 2 * 128
    attention = 3 * tokens * 64 * 4 * 16 * 14  # 64 keys a query on average, 4 + 10 FLOPs for each number
    assert found.flops == 6 * tokens * (3 * layer + 1000 * 64) + attention
    assert found.model_flops == pytest.approx(cfg.flops_per_token(128) * tokens)
    again = estimate(cfg, MeshConfig(fsdp=4), "h200:1x4", batch_size=8, seq_len=128, remat="full", loss_chunk=10**6)
    assert again.flops - found.flops == 2 * tokens * 3 * layer + attention * 4 / 14
    assert again.memory.residuals < found.memory.residuals


def test_a_window_and_micro_batches_cost_what_they_should(rng):
    cfg = model(rng, window=128, layer_pattern=("local",))
    whole = dataclasses.replace(cfg, window=None, layer_pattern=("global",))
    run = functools.partial(estimate, mesh=MeshConfig(fsdp=8), pod="h200:1x8", batch_size=32, seq_len=512)
    assert run(cfg).flops < run(whole).flops
    one, four = run(whole), run(whole, accum_steps=4)
    assert four.memory.residuals == one.memory.residuals / 4
    assert four.flops == pytest.approx(one.flops)
    assert sum(t.bytes for t in four.transfers) == 4 * sum(t.bytes for t in one.transfers)


def test_cache_bytes_are_those_of_init_cache():
    cfg = ModelConfig(vocab_size=64, num_layers=2, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8)
    cache = jax.eval_shape(lambda: decoder.init_cache(cfg, 8, 32))
    whole = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in cache.values())
    assert cache_bytes(cfg, MeshConfig(), batch_size=8, max_len=32) == whole
    assert cache_bytes(cfg, MeshConfig(fsdp=4, tp=2), batch_size=8, max_len=32) == whole / 8
    assert cache_bytes(cfg, MeshConfig(tp=4), batch_size=8, max_len=32) == whole  # two heads do not split over four


@pytest.mark.parametrize(
    ("mesh", "batch_size", "seq_len", "says"),
    [
        (MeshConfig(fsdp=8), 12, 128, "use 8 or 16 rows"),
        (MeshConfig(fsdp=2, cp=4), 8, 130, "cp\\*tp=4"),
        (MeshConfig(tp=8), 8, 128, "num_heads=4"),
        (MeshConfig(ep=8), 8, 128, "set ep=1"),
        (MeshConfig(fsdp=3), 9, 128, "needs 3 devices but 8"),
    ],
)
def test_what_does_not_divide_is_said_in_one_line(mesh, batch_size, seq_len, says, rng):
    cfg = model(rng, num_heads=4, num_kv_heads=2)
    with pytest.raises((ValueError, NotImplementedError), match=says) as error:
        estimate(cfg, mesh, "h200:1x8", batch_size=batch_size, seq_len=seq_len)
    assert "\n" not in str(error.value)
