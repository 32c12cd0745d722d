"""The training step against one written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxscale import make_mesh, make_train_state, make_train_step
from jaxscale.config import OptimizerConfig
from jaxscale.optim import decays, make_optimizer, make_schedule


def linear_loss(params, batch):
    """Weighted least squares: its micro-batches hold different weights."""
    error = batch["x"] @ params["w"] + params["b"] - batch["y"]
    weight = batch["mask"].sum()
    return (batch["mask"] * error**2).sum() / weight, {"weight": weight}


def problem(rng, rows=16):
    params = {"w": rng.normal(size=5), "b": rng.normal(size=())}
    batch = {
        "x": rng.normal(size=(rows, 5)),
        "y": rng.normal(size=rows),
        "mask": (rng.random(rows) < 0.6) | (np.arange(rows) < 4),
    }
    as_f32 = lambda x: jnp.asarray(x, jnp.float32)
    return jax.tree.map(as_f32, params), jax.tree.map(as_f32, batch)


def by_hand(params, batch):
    x, y, mask = (np.asarray(batch[k], np.float64) for k in ("x", "y", "mask"))
    error = x @ np.asarray(params["w"], np.float64) + float(params["b"]) - y
    return {"w": 2 * (mask * error) @ x / mask.sum(), "b": 2 * (mask * error).sum() / mask.sum()}


@pytest.mark.parametrize("accum_steps", [1, 2, 4])
def test_sgd_step_equals_the_formula(rng, accum_steps):
    params, batch = problem(rng)
    grads = by_hand(params, batch)
    expected = {k: np.asarray(params[k]) - 0.1 * grads[k] for k in params}
    state = make_train_state(params, optax.sgd(0.1), jax.random.key(0))
    state, metrics = make_train_step(linear_loss, optax.sgd(0.1), accum_steps=accum_steps)(state, batch)
    for name in expected:
        np.testing.assert_allclose(state.params[name], expected[name], rtol=1e-5, atol=1e-6)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    assert metrics["weight"] == batch["mask"].sum()
    assert int(state.step) == 1


def test_accumulation_keeps_shards(rng):
    mesh = make_mesh(fsdp=4, tp=2)
    with jax.set_mesh(mesh):
        params = {
            "w": jax.device_put(
                rng.normal(size=(8, 6)).astype(np.float32), jax.NamedSharding(mesh, jax.P("fsdp", "tp"))
            )
        }
        x = jax.device_put(rng.normal(size=(8, 8)).astype(np.float32), jax.NamedSharding(mesh, jax.P("fsdp")))

        def loss(params, batch):
            w = jax.reshard(params["w"], jax.P(None, "tp"))
            return (jnp.einsum("BD,DF->BF", batch["x"], w) ** 2).mean()

        one, two = (make_train_step(loss, optax.adam(1e-2), accum_steps=n, donate=False) for n in (1, 2))
        state = make_train_state(params, optax.adam(1e-2), jax.random.key(0))
        assert jax.typeof(state.opt_state[0].mu["w"]) == jax.typeof(params["w"])
        (a, ma), (b, mb) = one(state, {"x": x}), two(state, {"x": x})
    assert jax.typeof(a.params["w"]) == jax.typeof(b.params["w"]) == jax.typeof(params["w"])
    np.testing.assert_allclose(ma["grad_norm"], mb["grad_norm"], rtol=1e-6)
    np.testing.assert_allclose(a.params["w"], b.params["w"], rtol=1e-5)


def test_batch_that_does_not_split(rng):
    params, batch = problem(rng, rows=10)
    state = make_train_state(params, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(ValueError, match="batch dim 10 is not divisible by accum_steps=4"):
        make_train_step(linear_loss, optax.sgd(0.1), accum_steps=4)(state, batch)


def test_loss_with_a_key_gets_a_fresh_one_each_step():
    def loss(params, batch, key):
        return params["w"] * 0.0 + jax.random.uniform(key)

    state = make_train_state({"w": jnp.zeros(())}, optax.sgd(0.1), jax.random.key(0))
    step = make_train_step(loss, optax.sgd(0.1), donate=False)
    next_state, first = step(state, {"x": jnp.zeros(2)})
    _, second = step(next_state, {"x": jnp.zeros(2)})
    _, again = step(state, {"x": jnp.zeros(2)})
    assert first["loss"] == again["loss"] != second["loss"]


def test_schedule_rises_and_falls():
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_fraction=0.1)
    rate = make_schedule(cfg, 100)
    np.testing.assert_allclose([rate(0), rate(9), rate(100)], [0.1, 1.0, 0.1], rtol=1e-5)
    assert all(rate(i) <= rate(i + 1) + 1e-7 for i in range(9))
    assert all(rate(i) >= rate(i + 1) - 1e-7 for i in range(10, 100))


def test_weight_decay_leaves_norms_and_biases():
    params = {"layers": {"attn": {"wq": 0, "bq": 0, "q_norm": 0}, "attn_norm": 0}, "embed": 0, "final_norm": 0}
    assert decays(params) == {
        "layers": {"attn": {"wq": True, "bq": False, "q_norm": False}, "attn_norm": False},
        "embed": True,
        "final_norm": False,
    }


def test_clipping_bounds_the_update(rng):
    cfg = OptimizerConfig(learning_rate=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=1e-3)
    optimizer = make_optimizer(cfg, 10)
    params = {"w": jnp.asarray(rng.normal(size=4), jnp.float32)}
    grads = {"w": jnp.asarray([3e3, -4e3, 0.0, 0.0], jnp.float32)}
    with jax.numpy_dtype_promotion("standard"):
        _, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["w"], 0.1 * np.array([6e-4, -8e-4, 0, 0]), rtol=1e-4)


def test_compiler_options_reach_the_compiler(rng):
    params, batch = problem(rng, rows=8)
    state = make_train_state(params, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        make_train_step(linear_loss, optax.sgd(0.1), compiler_options={"no_such_option": 1})(state, batch)
