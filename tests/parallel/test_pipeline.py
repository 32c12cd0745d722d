"""Pipelines equal one device: the op against lax.scan, the decoder in loss and every gradient, a whole run; what they
send, how many ticks they take, what they hold."""

import dataclasses
import io
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from rich.console import Console

from jaxscale import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from jaxscale.callbacks import read_metrics
from jaxscale.generate import generate
from jaxscale.mesh import make_mesh
from jaxscale.models import presets
from jaxscale.parallel import pipeline, pipeline_parts
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.parallel.pipeline_step import Task, scored, slots_of
from jaxscale.plan.hlo import census
from jaxscale.run import load_run, run

B, T, D, V = 16, 3, 4, 5


def layer(rows, x, stacked):
    w, shift, index = stacked
    x = jnp.tanh(x @ w) + shift + 0.1 * rows[..., None].astype(x.dtype) + 0.01 * index.astype(x.dtype)
    return x, {"sum": x.sum(), "squares": (x * x).sum()}


def finish(ends, x, targets):
    y = x @ ends["w"]
    return ((y * y).sum(axis=-1) * targets["weight"]).sum(), {"sum": (y.sum(axis=-1) * targets["weight"]).sum()}


def weigh(out):
    return out["sum"] + 0.3 * out["squares"]


TASK = Task(layer, finish, weigh=weigh)
UNIT = np.float32(0.01)


def problem(rng, depth):
    """Weights that do not grow what they meet: else 24 layers make of float32's last bit what a bound must allow."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    stacked = draw(depth, D, D) * np.float32(0.35), draw(depth), np.arange(depth, dtype=np.int32)
    rows, targets = rng.integers(0, 5, (B, T)).astype(np.int32), {"weight": draw(B, T)}
    return draw(B, T, D), stacked, {"w": draw(D, V)}, rows, targets


def on_mesh(fn, mesh, x, stacked, ends, rows, targets):
    """By turns weights may rest over fsdp, ends over pp too."""
    place = lambda spec, tree: jax.tree.map(lambda a: jax.device_put(a, jax.NamedSharding(mesh, P(*spec))), tree)
    batch = [("pp", "dp", "fsdp")]
    whole = mesh.shape["pp"] * mesh.shape["fsdp"]
    over = [("pp", "fsdp") if D % whole == 0 else "pp"] if fn is by_turns else []
    stacked = place(["pp", None, *["fsdp"] * (fn is by_turns)], stacked[0]), *place(["pp"], stacked[1:])
    return place(batch, x), stacked, place(over, ends), *place(batch, (rows, targets))


def by_turns(pipe, x, stacked, ends, rows, targets):
    loss, metrics, out = scored(TASK, x, stacked, rows, ends, targets, UNIT, pipe)
    return loss, (metrics, out)


def all_forward_first(pipe, x, stacked, ends, rows, targets):
    x, out = pipeline.scan(layer, x, stacked, rows, pipe)
    loss, metrics = finish(ends, x, targets)
    return loss + (UNIT * weigh(out)).sum(), (metrics, out)


def gradients(fn, pipe, args):
    """Of rows, layers and ends; layers hold their integers apart."""

    def learned(x, w, shift, ends, *rest):
        index, rows, targets = rest
        return fn(pipe, x, (w, shift, index), ends, rows, targets)

    x, (w, shift, index), ends, rows, targets = args
    return jax.jit(jax.value_and_grad(learned, (0, 1, 2, 3), has_aux=True))(x, w, shift, ends, index, rows, targets)


@pytest.mark.parametrize("fn", [by_turns, all_forward_first])
@pytest.mark.parametrize("size", [2, 4])
def test_values_gradients_and_what_layers_report(size, fn, rng):
    data, interleave = str(rng.choice(["dp", "fsdp"])), int(rng.choice((1, 2, 3)))
    shape = {"pp": size, data: int(rng.choice([1, 2])), "tp": 1}
    mesh = make_mesh(**shape, devices=jax.devices()[: size * shape[data]])
    args = problem(rng, size * interleave * int(rng.integers(1, 3)))
    count = size * int(rng.choice([1, 2, 4] if mesh.size <= 4 else [1, 2]))
    once = get_args(pipeline.Once)[rng.integers(3)]
    pipe = Pipeline(count, interleave, once)
    print(shape, pipe)
    want = gradients(fn, pipe, args)
    with jax.set_mesh(mesh):
        got = gradients(fn, pipe, on_mesh(fn, mesh, *args))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4)
    assert got[1][1].sharding.spec[0] == "pp"


@pytest.mark.parametrize("fn", [by_turns, all_forward_first])
@pytest.mark.parametrize(("size", "pipe"), [(4, Pipeline(8)), (2, Pipeline(4, 3))])
def test_what_is_sent_and_how_many_ticks_there_are(size, pipe, fn, rng):
    """A tick sends two micro-batches forward, one each way, and as many backward.

    All forward first one more comes home at the end, each way. By turns each is shared out over the stages to be
    scored, and its gradient gathered. With chunks each weight first goes where it is computed with, chunk by chunk, and
    so does its gradient back.
    """
    depth = size * pipe.interleave
    mesh = make_mesh(pp=size, devices=jax.devices()[:size])
    with jax.set_mesh(mesh):
        x, stacked, ends, rows, targets = on_mesh(fn, mesh, *problem(rng, depth))
        loss = lambda x, w, shift, ends: fn(pipe, x, (w, shift, stacked[2]), ends, rows, targets)[0]
        step = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
        both = census(step.lower(x, *stacked[:2], ends).compile(), mesh=mesh)
    ticks = pipe.interleave * pipe.micro_batches + size - 1
    assert ticks == pipeline.ticks(pipe, size)
    assert pipeline.bubble(pipe, size) == pytest.approx((size - 1) / ticks)
    micro, chunk = B // pipe.micro_batches * T * D * 4, 4 * (D * D + 1)
    chunks = pipe.interleave // 2  # of the layers 0 to 2 of the first of two stages, layer 1 is computed on the second
    indices = 4 * chunks
    sent = lambda kind: sum(r.bytes for r in both.rows if r.kind == kind and r.axes == "pp")
    home = 0 if fn is by_turns else 2
    assert sent("collective-permute") == (4 * ticks + home) * micro + 2 * chunks * chunk + indices
    assert {r.kind for r in both.rows} <= {"collective-permute", "all-gather", "all-reduce", "reduce-scatter"}
    small = 4 * (2 * B * T + 2 * D * V + 3 * depth + 4)  # rows, targets, ends, what layers report, the value itself
    # Tokens in equal parts: 3 on 4 stages are 4. With chunks not each tick scores, but the census counts them all.
    scores = ticks + 1 - pipe.interleave * size if fn is by_turns else 0
    shared = scores * micro * 4 // 3
    assert sum(r.bytes for r in both.rows if r.kind != "collective-permute") <= small + 2 * shared


def test_chunks_come_where_they_are_computed(rng):
    size, v = int(rng.integers(2, 7)), int(rng.integers(2, 5))
    held = [[-1] * v for _ in range(size)]
    for sends, receives, perm in pipeline_parts.exchanges(size, v):
        assert sorted(s for s, _ in perm) == sorted(d for _, d in perm) == list(range(size))
        for s, d in perm:
            held[d][receives[d]] = s * v + sends[s]
    assert held == [[r * size + s for r in range(v)] for s in range(size)]


@pytest.mark.parametrize(
    ("mesh", "rows", "says"),
    [
        ("pp=2", 8, "3 layers are not divisible by pp.interleave=2; use pp in .1, 3."),
        ("pp=3,pp_interleave=2", 9, "3 layers are not divisible by pp.interleave=6; use interleave in .1."),
        ("pp=3,pp_micro_batches=4", 12, "micro_batches=4 do not share out 12 rows .* over pp=3; use one of .3, 6, 12."),
        ("fsdp=2,pp_micro_batches=4", 8, "there is no pipeline with pp=1; leave pp_micro_batches"),
    ],
)
def test_what_does_not_divide_is_said_with_what_would(mesh, rows, says):
    with pytest.raises(ValueError, match=says):
        pipeline.plan(MeshConfig.parse(mesh), presets.tiny(), rows)


def test_micro_batches_are_four_for_each_stage_where_rows_allow():
    plan = lambda mesh, rows, accum=1: pipeline.plan(MeshConfig.parse(mesh), presets.tiny(), rows, accum).micro_batches
    assert plan("pp=3,fsdp=2", 48) == 12 and plan("pp=3", 18) == 9 and plan("pp=3", 36, 4) == 9
    assert plan("pp=3,pp_micro_batches=3", 36) == 3


@pytest.mark.parametrize("interleave", [1, 2])
def test_what_a_stage_keeps(interleave):
    """By turns: for each chunk what its layers were given of a few micro-batches, however many there are. All forward
    first: of each tick, or with chunks what the tick was given. By what twice the rows take more, in micro-batches."""
    size, wide, depth, count = 2, 64, 16, 16
    mesh, pipe = make_mesh(pp=size, devices=jax.devices()[:size]), Pipeline(count, interleave)

    def deep(rows, x, w):
        for _ in range(4):
            x = jnp.sin(x @ w)
        return x, None

    layer = jax.checkpoint(deep, prevent_cse=False)
    finish = lambda ends, x, targets: ((x * x).sum(), {})
    take = lambda x: x[:, None]

    def by_turns(x, w):
        return scored(Task(layer, finish, take), x, w, None, {}, {}, jnp.float32(0), pipe)[0]

    def all_forward_first(x, w):
        return (pipeline.scan(layer, x, w, None, pipe)[0] ** 2).sum()

    def temporary(loss, rows):
        at = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, P("pp")))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, (0, 1))).lower(at(rows, wide), at(depth, wide, wide)).compile()
        stats = step.memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes

    layers = depth // (size * interleave)
    kept = {
        by_turns: sum(slots_of(interleave, size)) * layers,
        all_forward_first: pipeline.ticks(pipe, size) * (layers if interleave == 1 else 1),
    }
    for loss, micro_batches in kept.items():
        more = (temporary(loss, 1024) - temporary(loss, 512)) / (512 // count * wide * 4)
        print(loss.__name__, interleave, more, micro_batches)
        # Beside it: this device's rows as they go in, as they come back, and their gradients; what one tick holds.
        assert micro_batches <= more <= micro_batches + 4 * (count // size)


@pytest.mark.slow
def test_a_run_over_stages_is_the_run_on_one_device(tmp_path, rng):
    """Three steps of training with the losses of one device; what was saved is restored on another mesh, and text is
    generated where there is no pipeline."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(" ".join(rng.choice(["stage", "ring", "tick", "chunk", "round"], 40)))
    model = dataclasses.replace(presets.tiny(), num_layers=4, embed_dim=32, mlp_dim=64, head_dim=8)
    base = TrainConfig(
        model=model,
        out=str(tmp_path / "one"),
        steps=3,
        mesh=MeshConfig(),
        data=DataConfig(source=str(text), seq_len=32, batch_size=8, holdout=0.2),
        optimizer=OptimizerConfig(warmup_steps=1),
        eval_every=3,
        eval_batches=1,
    )
    devices = jax.devices()
    mesh = MeshConfig.parse("pp=2,fsdp=4,pp_micro_batches=2,pp_interleave=2")
    staged = dataclasses.replace(base, out=str(tmp_path / "staged"), mesh=mesh)
    lines = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        run(staged, console=Console(file=lines, width=500))
        patch.setattr(jax, "devices", lambda *_: devices[:1])
        run(base, console=Console(quiet=True))
    assert "2 micro-batches over 2 stages of 2 chunk(s) of layers: 20% of" in lines.getvalue()
    got, want = (list(read_metrics(tmp_path / d / "metrics.jsonl")) for d in ("staged", "one"))
    assert len(got) == len(want) > 3
    for a, b in zip(got, want):
        for name in ("loss", "grad_norm", "valid_loss"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-5), (name, a, b)

    where = make_mesh(fsdp=2, devices=devices[:2])
    saved, one = (load_run(tmp_path / d, where) for d in ("staged", "one"))
    mesh = make_mesh(pp=2, devices=devices[:2])
    with pytest.raises(ValueError, match="a cache takes no pipeline, and the mesh has pp=2; use one with pp=1"):
        generate(load_run(tmp_path / "one", mesh).params, one.cfg, [[1, 2]], max_new_tokens=2, mesh=mesh)
    layers = lambda run: np.asarray(run.params["layers"]["mlp"]["w_up"])
    np.testing.assert_allclose(layers(saved), layers(one), atol=2e-4)  # in the order of the model, chunks or not
    assert len(generate(saved.params, saved.cfg, [[1, 2]], max_new_tokens=1, mesh=where)[0]) == 1
