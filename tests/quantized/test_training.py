"""Rounded training: forward and gradients against their formula, randomness that is right on the average, a run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params
from jaxscale.quantize.training import FP8, INT8, Precision, RoundedWeight, round_tensor, rounded
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=64,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_seq_len=64,
    dtype="float32",
)
SPECS = decoder.param_specs(CFG)
loss = functools.partial(decoder.loss_fn, cfg=CFG)


def nearest(x, format):
    """By a search among all values of the format, in float64."""
    x = np.asarray(x, np.float64)
    if format == "int8":
        scale = np.abs(x).max() / 127
        return np.round(x / scale) * scale
    values = np.arange(256, dtype=np.uint8).view(jnp.dtype(format)).astype(np.float64)
    values = np.sort(values[np.isfinite(values)])
    scale = np.abs(x).max() / values.max()
    return values[np.abs(x[..., None] / scale - values).argmin(-1)] * scale


@pytest.mark.parametrize("precision", [FP8, dataclasses.replace(INT8, stochastic=False)], ids=["fp8", "int8"])
def test_a_matmul_and_its_gradients_are_those_of_rounded_operands(rng, precision):
    x, w, ct = (rng.normal(size=s).astype(np.float32) for s in ((2, 5, 32), (32, 16), (2, 5, 16)))
    run = lambda x, w: RoundedWeight(w, precision, (-2,)).matmul("BTD,DF->BTF", x, preferred_element_type=jnp.float32)
    out, pull = jax.vjp(run, jnp.asarray(x), jnp.asarray(w))
    dx, dw = pull(jnp.asarray(ct))
    qx, qw = nearest(x, precision.activations), nearest(w, precision.weights)
    qc = nearest(ct, precision.gradients)
    for got, want in ((out, qx @ qw), (dx, qc @ qw.T), (dw, np.einsum("BTD,BTF->DF", qx, qc))):
        # Ties may fall to either side.
        assert np.abs(np.asarray(got) - want).mean() < 2e-3 * np.abs(want).mean()
        assert np.abs(np.asarray(got) - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize("format", ["int8", "float8_e5m2", "float8_e4m3fn"])
def test_stochastic_rounding_is_right_on_the_average(rng, format):
    x = jnp.asarray(rng.normal(size=64), jnp.float32).at[0].set(4.0)
    many = jax.jit(jax.vmap(lambda r: round_tensor(x, format, r)))(
        jnp.asarray(rng.uniform(size=(4000, 64)), jnp.float32)
    )
    plain = round_tensor(x, format)
    step = float(jnp.abs(plain - x).max())
    assert len(np.unique(np.asarray(many[:, 1]))) == 2
    assert np.abs(np.asarray(many.mean(axis=0)) - x).max() < 0.1 * step


def batch_of(rng):
    tokens = jnp.asarray(rng.integers(1, 64, size=(8, 16)), jnp.int32)
    return {"tokens": tokens, "labels": (tokens * 7 + 3) % 64}  # a rule that can be learnt


@pytest.mark.parametrize(
    ("name", "precision"), [("fp8", FP8), ("int8", INT8), ("qat", Precision(weights="uint4", group=16))]
)
def test_a_run_ends_where_the_exact_one_does(rng, name, precision):
    optimizer = optax.sgd(0.5, momentum=0.9)
    start = init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)
    batches = [batch_of(rng) for _ in range(60)]

    def train(loss_fn):
        @jax.jit
        def step(params, state, batch):
            (value, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        params, state, losses = start, optimizer.init(start), []
        for batch in batches:
            params, state, value = step(params, state, batch)
            losses.append(float(value))
        return np.mean(losses[-10:]), losses[0]

    exact, first = train(loss)
    got, got_first = train(rounded(loss, SPECS, precision))
    assert exact < first - 0.5 and got < exact + 0.1 * (first - exact)
    assert got_first != first


def test_layers_opt_out(rng):
    params, batch = init_params(jax.random.key(0), SPECS), batch_of(rng)
    only = dataclasses.replace(FP8, only="w_up", keep="$^")
    value = lambda p: float(jax.jit(rounded(loss, SPECS, p))(params, batch)[0])
    assert value(dataclasses.replace(only, weights=None, activations=None)) == float(jax.jit(loss)(params, batch)[0])
    assert len({value(only), value(FP8), value(dataclasses.replace(FP8, keep="embed|head|mlp"))}) == 3
    with pytest.raises(ValueError, match=r"no weight has a path with 'w_top' .*layers/attn/wq"):
        rounded(loss, SPECS, dataclasses.replace(FP8, only="w_top"))
    with pytest.raises(ValueError, match="gradients='uint4' is unknown"):
        Precision(weights=None, gradients="uint4")


def test_a_mesh_trains_as_one_device_does(rng):
    params, batch = init_params(jax.random.key(3), SPECS), batch_of(rng)
    run = jax.jit(jax.value_and_grad(rounded(loss, SPECS, FP8), has_aux=True))
    (want, _), grads = run(params, batch)
    mesh = make_mesh(devices=jax.devices()[:4], fsdp=2, tp=2)
    there = jax.device_put(params, jaxscale.param_shardings(SPECS, mesh, MEGATRON_FSDP))
    with jax.set_mesh(mesh):
        (got, _), split = run(there, batch)
    np.testing.assert_allclose(got, want, rtol=1e-3)
    error = jax.tree.map(lambda a, b: float(jnp.abs(np.asarray(a) - b).mean() / jnp.abs(b).mean()), split, grads)
    assert max(jax.tree.leaves(error)) < 0.05
