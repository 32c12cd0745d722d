"""The composition checker: refusals before anything is traced, the table of docs/planner.md, pairs run for real."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.config import DataConfig, MeshConfig, MoEConfig, TrainConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.models.presets import preset
from jaxscale.parallel import context_cost
from jaxscale.parallel.context_layout import permute_batch
from jaxscale.params import init_params, param_shardings
from jaxscale.plan.check import FEATURES, attention_backend, check_config, configure, verdict
from jaxscale.quantize import training as quantized
from jaxscale.quantize.apply import abstract_quantized, quantize
from jaxscale.run import run
from jaxscale.train import put_batch
from sharding_rules.rules import MEGATRON_FSDP

ROOT = Path(__file__).parents[2]


def config(model=None, seq_len=64, source="stdlib", rows=8, **mesh) -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(preset("tiny"), **(model or {})),
        mesh=MeshConfig(**mesh),
        data=DataConfig(batch_size=rows, seq_len=seq_len, source=source),
    )


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (config(pp=2, fsdp=4), "3 layers are not divisible by pp.interleave=2; use pp in .1, 3."),
        (config({"num_layers": 4}, pp=4, pp_micro_batches=6, fsdp=2), "micro_batches=6 do not share out 4 rows"),
        (config({"num_layers": 4}, rows=12, pp=4, fsdp=2), "pp.dp.fsdp.ep.accum_steps=8; use 8 or 16 rows"),
        (
            dataclasses.replace(config({"num_layers": 4}, pp=2, fsdp=2, tp=2), precision="int8"),
            "precision=int8 does not run over pp=2 with tp=2",
        ),
        (
            dataclasses.replace(config({"num_layers": 4}, pp=2, fsdp=4), precision="w4a16-g16"),
            "precision=w4a16-g16 does not run over pp=2: .* use fp8 or int8",
        ),
        (config(cp=8, cp_strategy="halo"), "none of halo runs"),
        (config(cp=2, fsdp=4, cp_strategy="usp"), "none of usp runs"),
        (config(cp=8, cp_strategy="ulysses"), "none of ulysses runs"),
        (config(seq_len=60, cp=8, cp_strategy="ring"), "seq_len=60 is not divisible by cp=8"),
        (
            config(seq_len=72, cp=8, cp_layout="zigzag"),
            r"seq_len=72 is not divisible by 2 \* cp=8, as a zigzag layout needs; use 64 or 80",
        ),
        (config(seq_len=60, cp=8), "seq_len=60 is not divisible by cp=8, .* use 56 or 64, or a cp that divides"),
        (config(ep=8), "has no experts to split over ep; set ep=1"),
        (config(rows=7, fsdp=8), "batch_size=7 rows are not divisible by .*=8; use 8 rows, or a larger tp or cp"),
        (config(rows=12, fsdp=8), "use 8 or 16 rows"),
        (config(tp=8, fsdp=2), "needs 16 devices but 8"),
        (config({"moe": MoEConfig(num_experts=6, top_k=2, mlp_dim=64)}, ep=4, fsdp=2), "not divisible by ep=4"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_traced(cfg, says, monkeypatch):
    monkeypatch.setattr(jax, "jit", None)
    monkeypatch.setattr(jax, "eval_shape", None)
    with pytest.raises((ValueError, NotImplementedError), match=says) as error:
        check_config(cfg, 8)
    assert "\n" not in str(error.value)


def test_a_run_is_refused_before_its_corpus_is_read(tmp_path):
    cfg = config(cp=8, cp_strategy="halo", source=str(tmp_path / "no corpus"))
    with pytest.raises(ValueError, match="none of halo runs"):
        run(dataclasses.replace(cfg, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 8}, {"pp": 3, "rows": 6}, {"cp": 8, "cp_strategy": "ring", "cp_layout": "zigzag"}, {"tp": 4}]
)
def test_what_works_passes(mesh):
    check_config(config(**mesh), math.prod(v for k, v in mesh.items() if k != "rows" and isinstance(v, int)))


def composition():
    spec = importlib.util.spec_from_file_location("composition", ROOT / "benchmarks" / "plan" / "composition.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_holds_the_features_and_what_is_not_there():
    script = composition()
    text = (ROOT / "docs" / "planner.md").read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    listed = re.search(r"^Features: (.*)\.$", text, re.MULTILINE)
    missing = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text.partition("| feature |")[0], re.MULTILINE)[1:])
    assert listed is not None and set(listed[1].split(", ")) | set(missing) == set(FEATURES)
    for name, why in missing.items():
        found = verdict([name], "h200")
        assert not found.runs and script.short(found.why) == why


def test_the_pages_pairs_are_what_the_code_says_today(rng):
    """All refused pairs, and a fresh sample of the others. `python benchmarks/plan/composition.py` writes it anew."""
    script = composition()
    whole = (ROOT / "docs" / "planner.md").read_text()
    page, text = script.refused(whole), whole.partition(script.BEGIN)[2].partition(script.END)[0]
    assert len(page) == int(re.search(r"(\d+) are refused", text)[1])  # type: ignore[index]
    for pair, why in page.items():
        a, b = sorted(pair, key=list(FEATURES).index)
        found = verdict([a, b], "h200")
        assert found.state == "refused" and script.short(found.why) == why
    listed = re.search(r"^Features: (.*)\.$", text, re.MULTILINE)
    assert listed is not None
    pairs = [p for p in itertools.combinations(listed[1].split(", "), 2) if frozenset(p) not in page]
    for at in rng.choice(len(pairs), 5, replace=False):
        a, b = pairs[at]
        hardware = str(rng.choice(script.hardware_of(FEATURES[a], FEATURES[b])))
        found = verdict([a, b], hardware)
        assert found.state in ("runs", "alternatives", "apart"), (a, b, hardware, found)


def test_the_pages_kernels_are_what_attention_chooses():
    """`python benchmarks/plan/composition.py --kernels` writes the table anew."""
    script = composition()
    text = (ROOT / "docs" / "planner.md").read_text()
    assert text.partition(script.KERNELS[0])[2].partition(script.KERNELS[1])[0].strip() == "\n".join(script.kernels())
    kernel, why = attention_backend("h200", 320, "bfloat16")
    assert kernel == "xla" and "mosaic_gpu takes head_dim" in why


PAIRS = [
    ("cp=ring", "windows"),
    ("cp=ulysses", "soft caps"),
    ("cp=usp", "packed rows"),
    ("layout=zigzag", "norms of q and k"),
    ("layout=packed", "router=softmax"),
    ("dispatch=all_to_all", "tp"),
    ("fsdp", "router=expert_choice"),
    ("ep", "shared experts"),
    ("tp", "local and global layers"),
    ("dispatch=two_level", "shared experts"),
    ("dispatch=two_level", "tp"),
    ("tp", "trained for 4 bits"),
    ("cp=ring", "trained for 4 bits"),
]


def test_pairs_that_run_give_what_one_device_gives(rng):
    """Loss and gradients of a fresh pair on as many simulated devices as it asks for."""
    names = PAIRS[int(rng.integers(len(PAIRS)))]
    cfg, packed, _ = configure([FEATURES[name] for name in names])
    model = dataclasses.replace(cfg.model, dtype="float32")
    rows, T = 8, cfg.data.seq_len
    batch = {n: rng.integers(0, model.vocab_size, (rows, T)).astype(np.int32) for n in ("tokens", "labels")}
    cut = int(rng.integers(1, T - 1))
    segments = np.where(np.arange(T) < cut, 1, 2) if packed else np.ones(T)
    batch["segment_ids"] = np.broadcast_to(segments.astype(np.int32), (rows, T))
    positions = np.where(segments == 2, np.arange(T) - cut, np.arange(T))
    batch["positions"] = np.broadcast_to(positions.astype(np.int32), (rows, T))
    specs = decoder.param_specs(model)
    params = init_params(jax.random.key(int(rng.integers(2**31))), specs)

    def step(context=None):
        loss_fn = lambda p, b: decoder.loss_fn(p, b, model, context=context)[0]
        if cfg.precision:
            loss_fn = quantized.rounded(loss_fn, specs, quantized.parse_precision(cfg.precision))
        return jax.jit(jax.value_and_grad(loss_fn))

    want = step()(params, jax.tree.map(jnp.asarray, batch))
    size = cfg.mesh.num_devices
    mesh = make_mesh(cfg.mesh, jax.devices()[:size])
    context = None
    if cfg.mesh.cp > 1:
        context, _ = context_cost.plan(cfg.mesh, model, rows, T, rates=context_cost.UNKNOWN)
        batch = permute_batch(batch, context.layout, cfg.mesh.cp)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(specs, mesh, MEGATRON_FSDP))
        got = step(context)(placed, put_batch(batch, mesh))
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        a, b = np.asarray(a), np.asarray(b)
        close(b, a, atol=1e-4 * max(np.abs(a).max(), 1e-3), err_msg=str(names))


def test_weights_that_are_not_there_are_placed_as_quantized_ones(rng):
    """Of a fresh recipe and mesh: shapes, types and places that decoding is traced with are those `quantize` gives."""
    name = str(rng.choice([n for n, f in FEATURES.items() if f.kind == "weights"]))
    axis = str(rng.choice(["fsdp", "tp"]))
    cfg, _, recipe = configure([FEATURES[axis], FEATURES[name]])
    specs, mesh = decoder.param_specs(cfg.model), make_mesh(cfg.mesh, jax.devices()[:2])
    with jax.set_mesh(mesh):
        params = init_params(jax.random.key(0), specs, mesh, MEGATRON_FSDP)
    got, want = quantize(params, recipe, specs), abstract_quantized(recipe, specs, mesh)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
