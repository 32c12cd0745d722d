"""Pipelines equal one device: the op against lax.scan, the decoder in loss and every gradient, a whole run; what they
send, how many ticks they take, what they hold."""

import dataclasses
import functools
import io

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
from jaxscale.parallel import pipeline
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.plan.hlo import census
from jaxscale.run import load_run, run

B, T, D = 16, 3, 4


def layer(rows, x, stacked):
    w, shift = stacked
    x = jnp.tanh(x @ w) + shift + 0.1 * rows[..., None].astype(x.dtype)
    return x, {"sum": x.sum(), "first": w[0]}


def problem(rng, depth):
    """Weights that do not grow what they meet: else 24 layers make of float32's last bit what a bound must allow."""
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return (
        draw(B, T, D),
        (draw(depth, D, D) * np.float32(0.35), draw(depth)),
        rng.integers(0, 5, (B, T)).astype(np.int32),
        draw(B, T, D),
    )


def value(pipe, x, stacked, rows, weights):
    x, out = pipeline.scan(layer, x, stacked, rows, pipe)
    return (x * weights).sum() + (out["sum"] * jnp.cos(jnp.arange(len(stacked[1])))).sum(), (x, out)


def on_mesh(size, data, x, stacked, rows, weights):
    mesh = make_mesh(pp=size, dp=data, devices=jax.devices()[: size * data])
    batch = jax.NamedSharding(mesh, P(("pp", "dp")))
    place = lambda where, tree: jax.tree.map(lambda a: jax.device_put(a, where), tree)
    return mesh, (place(batch, x), place(jax.NamedSharding(mesh, P("pp")), stacked), *place(batch, (rows, weights)))


@pytest.mark.parametrize("size", [2, 4])
def test_values_gradients_and_what_layers_report(size, rng):
    data, interleave = (int(rng.choice(n)) for n in ((1, 2), (1, 2, 3)))
    x, stacked, rows, weights = problem(rng, size * interleave * int(rng.integers(1, 3)))
    count = size * int(rng.choice([1, 2, 4] if size * data <= 4 else [1, 2]))
    pipe = Pipeline(count, interleave)
    print(size, data, pipe)
    grad = lambda *args: jax.value_and_grad(functools.partial(value, pipe), (0, 1), has_aux=True)(*args)
    (_, (y, out)), _ = jax.jit(grad)(x, stacked, rows, weights)
    mesh, args = on_mesh(size, data, x, stacked, rows, weights)
    with jax.set_mesh(mesh):
        (_, (got_y, got_out)), got_grads = jax.jit(grad)(*args)
    # Sums over a micro-batch's rows on a replica: their mean is that of the batch over the number of both.
    np.testing.assert_allclose(got_y, y, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got_out["sum"] * count * data, out["sum"], rtol=2e-5, atol=2e-4)
    np.testing.assert_allclose(got_out["first"], out["first"], rtol=1e-6)
    want = grads_of_means(x, stacked, rows, weights, count * data)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-4)
    assert got_grads[1][0].sharding.spec[0] == "pp"


def grads_of_means(x, stacked, rows, weights, count):
    """The gradients where each layer reports the mean over micro-batches, not the sum."""

    def mean(x, stacked):
        y, out = pipeline.scan(layer, x, stacked, rows)
        return (y * weights).sum() + (out["sum"] / count * jnp.cos(jnp.arange(len(stacked[1])))).sum()

    return jax.jit(jax.grad(mean, (0, 1)))(x, stacked)


@pytest.mark.parametrize(("size", "pipe"), [(4, Pipeline(8)), (2, Pipeline(4, 3))])
def test_what_is_sent_and_how_many_ticks_there_are(size, pipe, rng):
    """Forward a tick sends two micro-batches, one each way, and one comes home at the end; backward the same again.

    With chunks each weight first goes where it is computed with, chunk by chunk, and so does its gradient back.
    """
    depth = size * pipe.interleave
    mesh, args = on_mesh(size, 1, *problem(rng, depth))
    fn = lambda *args: value(pipe, *args)[0]
    with jax.set_mesh(mesh):
        forward = census(jax.jit(fn).lower(*args).compile(), mesh=mesh)
        both = census(jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*args).compile(), mesh=mesh)
    ticks = pipe.interleave * pipe.micro_batches + size - 1
    assert ticks == pipeline.ticks(pipe, size)
    micro, chunk = B // pipe.micro_batches * T * D * 4, 4 * (D * D + 1)
    chunks = pipe.interleave // 2  # of the layers 0 to 2 of the first of two stages, layer 1 is computed on the second
    sent = lambda c: sum(r.bytes for r in c.rows if r.kind == "collective-permute" and r.axes == "pp")
    assert sent(forward) == (2 * ticks + 1) * micro + chunks * chunk
    assert sent(both) == 2 * sent(forward)
    assert {r.kind for r in both.rows} <= {"collective-permute", "all-gather", "all-reduce"}
    moved = [r.bytes for r in both.rows if r.kind != "collective-permute"]
    assert sum(moved) <= B * T * 4 + depth * (D + 1) * 8 + 8, "rows, what layers report, and the value itself"
    assert pipeline.bubble(pipe, size) == pytest.approx((size - 1) / ticks)


def test_chunks_come_where_they_are_computed(rng):
    size, v = int(rng.integers(2, 7)), int(rng.integers(2, 5))
    held = [[-1] * v for _ in range(size)]
    for sends, receives, perm in pipeline._exchanges(size, v):
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


def test_what_a_tick_keeps():
    """A stage keeps what each of its layers was given in each tick, or with chunks what each tick was: counted in
    micro-batches, by what twice the rows take more."""
    size, wide, depth, count = 2, 64, 16, 16
    mesh = make_mesh(pp=size, devices=jax.devices()[:size])

    def deep(rows, x, w):
        for _ in range(4):
            x = jnp.sin(x @ w)
        return x, None

    def temporary(rows, pipe):
        body = jax.checkpoint(deep, prevent_cse=False)
        loss = lambda x, w: (pipeline.scan(body, x, w, None, pipe)[0] ** 2).sum()
        at = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.NamedSharding(mesh, P("pp")))
        with jax.set_mesh(mesh):
            step = jax.jit(jax.grad(loss, (0, 1))).lower(at(rows, wide), at(depth, wide, wide)).compile()
        stats = step.memory_analysis()
        assert stats is not None
        return stats.temp_size_in_bytes

    for interleave in (1, 2):
        pipe = Pipeline(count, interleave)
        more = (temporary(1024, pipe) - temporary(512, pipe)) / (512 // count * wide * 4)
        layers = depth // size if interleave == 1 else 1
        kept = pipeline.ticks(pipe, size) * layers
        print(pipe, more, kept)
        # Beside it: this device's rows as they go in, as they come back, and their gradients; what one tick holds.
        own = count // size
        assert kept <= more <= kept + 4 * own


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
