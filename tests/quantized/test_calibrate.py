"""Calibration: statistics against a loop over layers in numpy, methods against their definitions and each other."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxscale
from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params
from jaxscale.quantize import calibrate
from jaxscale.quantize.calibrate import Statistics, gather_statistics, quantize_calibrated
from jaxscale.quantize.recipe import Rounding
from pallas_kernels import quantize_array, quantized_matmul
from sharding_rules.rules import MEGATRON_FSDP

CFG = ModelConfig(
    name="tiny",
    vocab_size=128,
    num_layers=2,
    embed_dim=64,
    mlp_dim=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=64,
    dtype="float32",
)
SPECS = decoder.param_specs(CFG)
forward = functools.partial(decoder.forward, cfg=CFG)


def make(rng):
    return init_params(jax.random.key(int(rng.integers(1 << 30))), SPECS)


def batches_of(rng, n=2):
    return [jnp.asarray(rng.integers(0, 128, size=(2, 16)), jnp.int32) for _ in range(n)]


def correlated(rng, rows, K):
    """Activations with outliers, and inputs that go together."""
    x = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, K)) + 0.5 * rng.normal(size=(rows, K))
    return (x * np.exp(rng.normal(size=K))).astype(np.float32)


def statistics_of(x) -> Statistics:
    return Statistics(jnp.asarray(x.T @ x), jnp.asarray(np.abs(x).sum(0)), jnp.asarray(np.abs(x).max(0)))


def test_statistics_are_those_of_the_activations(rng):
    """w_up's input is the norm of the residual: written here from the model's own parts, layer 0 without a scan."""
    params, batches = make(rng), batches_of(rng)
    got = gather_statistics(params, SPECS, forward, batches)
    assert len(got) == 7
    first = jax.tree.map(lambda x: x[0], params["layers"])
    x = np.concatenate([np.asarray(params["embed"])[np.asarray(b)] for b in batches]).astype(np.float64)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CFG.norm_eps) * np.asarray(first["attn_norm"])
    x = x.reshape(-1, 64)
    s = got["layers/attn/wq"]
    assert s.hessian.shape == (2, 64, 64) and got["layers/attn/wo"].top.shape == (2, 64)
    np.testing.assert_allclose(s.hessian[0], x.T @ x, rtol=1e-3, atol=1e-4 * (x * x).sum(0).max())
    np.testing.assert_allclose(s.total[0], np.abs(x).sum(0), rtol=1e-4)
    np.testing.assert_allclose(s.top[0], np.abs(x).max(0), rtol=1e-4)


def test_statistics_on_a_mesh_are_those_of_one_device(rng):
    params, batches = make(rng), batches_of(rng, 1)
    want = gather_statistics(params, SPECS, forward, batches, only="w_down|wo")
    assert set(want) == {"layers/mlp/w_down", "layers/attn/wo"}
    mesh = make_mesh(devices=jax.devices()[:4], fsdp=2, tp=2)
    there = jax.device_put(params, jaxscale.param_shardings(SPECS, mesh, MEGATRON_FSDP))
    with jax.set_mesh(mesh):
        got = gather_statistics(there, SPECS, forward, batches, only="w_down|wo")
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("format", ["uint4", "int4"])
def test_methods_change_the_outputs_less_than_rounding_to_the_nearest(rng, format):
    x, w = correlated(rng, 512, 128), rng.normal(size=(128, 24)).astype(np.float32)
    rounding = Rounding(format=format, group=32)
    nearest = quantize_array(jnp.asarray(w), format, group=32)

    def error(q):
        out = np.asarray(quantized_matmul(jnp.asarray(x), q, implementation="reference"))
        return ((out - x @ w) ** 2).sum()

    awq, gptq = (f(jnp.asarray(w), statistics_of(x), (-2,), rounding) for f in (calibrate.awq, calibrate.gptq))
    assert error(awq) < 0.95 * error(nearest) and error(gptq) < 0.6 * error(nearest)
    assert gptq.format == awq.format == format and gptq.group == 32 and gptq.scales.shape == nearest.scales.shape


def test_gptq_is_its_definition(rng):
    """Column by column in float64, with the inverse of what is left of the Hessian computed anew for each.

    The oracle goes on from the values that were chosen: each is the nearest to what the oracle has there, up to the
    error of float32, which the Hessian's condition bounds (of a factorisation K * eps * condition), and a tie that fell
    to the other side changes nothing that follows.
    """
    K, N, group = 16, 32, 8
    x, w = correlated(rng, 64, K), rng.normal(size=(K, N)).astype(np.float32)
    got = calibrate.gptq(jnp.asarray(w), statistics_of(x), (-2,), Rounding(format="int4", group=group))
    values, scales = np.asarray(got.values).astype(np.float64), np.asarray(got.scales.astype(jnp.float32), np.float64)
    H = x.astype(np.float64).T @ x
    H += np.eye(K) * calibrate.DAMPING * np.diagonal(H).mean()
    error = 4 * K * np.finfo(np.float32).eps * np.linalg.cond(H)
    assert error < 0.02  # far below one half: what passes is the formula
    rows = w.T.astype(np.float64)
    for k in range(K):
        size, scale = np.abs(rows).max(), scales[:, k // group]
        if k % group == 0:
            block = rows[:, k : k + group]
            exact = np.maximum(block.max(1) / 7, block.min(1) / -8)
            assert (np.abs(scale - exact) <= 2.0**-8 * exact + error * size).all()  # rounded to bfloat16
        nearest = np.clip(rows[:, k] / scale, -8, 7)
        assert (np.abs(values[:, k] - nearest) <= 0.5 + error * size / scale).all()
        inverse = np.linalg.inv(H[k:, k:])
        rows[:, k:] -= np.outer((rows[:, k] - values[:, k] * scale) / inverse[0, 0], inverse[0])


@pytest.mark.parametrize("group", [None, 32])
def test_gptq_of_many_dims_and_of_channels(rng, group):
    w = jnp.asarray(rng.normal(size=(2, 32, 10)), jnp.float32)
    x = correlated(rng, 256, 64)
    q = calibrate.gptq(w, statistics_of(x), (-3, -2), Rounding(format="int8", group=group))
    assert q.values.shape == (10, 2, 32) and q.scales.shape == (10, 64 // (group or 64))
    rows = np.asarray(x, np.float64)  # what it keeps is the product: weights themselves move to make up for others
    off = np.tensordot(rows, (np.asarray(q.dequantize()) - w).reshape(64, 10), 1)
    assert np.linalg.norm(off) < 0.02 * np.linalg.norm(np.tensordot(rows, np.asarray(w).reshape(64, 10), 1))


def test_smoothquant_moves_outliers_into_the_weight(rng):
    x, w = correlated(rng, 256, 64), rng.normal(size=(64, 16)).astype(np.float32)
    x[:, 5] *= 100.0
    rounding = Rounding(format="int8", activations="int8")
    smooth = calibrate.smoothquant(jnp.asarray(w), statistics_of(x), (-2,), rounding)
    plain = quantize_array(jnp.asarray(w), "int8", activations="int8")
    error = lambda q: np.abs(np.asarray(quantized_matmul(jnp.asarray(x), q)) - x @ w).mean()
    assert error(smooth) < 0.5 * error(plain)
    assert smooth.inputs is not None
    scale = np.sqrt(np.abs(x).max(0) / np.abs(w).max(1))
    np.testing.assert_allclose(smooth.inputs, 1 / scale, rtol=1e-5)


@pytest.mark.parametrize("recipe", ["w4a16-g32-awq", "w8a8-smoothquant"])
def test_a_model_is_quantized_with_its_calibration_set(rng, recipe):
    params, batches = make(rng), batches_of(rng)
    small = quantize_calibrated(params, recipe, SPECS, gather_statistics(params, SPECS, forward, batches))
    nearest = jaxscale.quantize(params, recipe.rpartition("-")[0], SPECS)
    got, plain, want = (np.asarray(jax.jit(forward)(p, batches[0])) for p in (small, nearest, params))
    assert 0 < np.abs(got - want).mean() < 1.2 * np.abs(plain - want).mean()
    assert small["layers"]["mlp"]["w_up"].inputs.shape == (2, 64) and small["embed"].inputs is None


def test_bfloat16_weights_are_rounded_as_the_same_numbers_in_float32(rng):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make(rng))
    whole = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    statistics = gather_statistics(whole, SPECS, forward, batches_of(rng))
    run = lambda params, recipe: quantize_calibrated(params, recipe, SPECS, statistics)
    jax.tree.map(
        np.testing.assert_array_equal,
        run(half, "w4a16-g32-awq")["layers"]["mlp"],
        run(whole, "w4a16-g32-awq")["layers"]["mlp"],
    )
    keys = [run(params, "w4a4kv4-g32-fmpq")["layers"]["attn"]["wk"].dequantize() for params in (half, whole)]
    step = 2 / 15 * float(jnp.abs(keys[1]).max())  # scaled keys are bfloat16 again: a tie may go the other way
    np.testing.assert_allclose(*keys, atol=1.1 * step)


@pytest.mark.usefixtures("optimized")
def test_a_nan_is_not_lost(rng):
    """One among many numbers, in a weight and in what then meets the next one."""
    params: Any = make(rng)
    up = params["layers"]["mlp"]["w_up"]
    params["layers"]["mlp"]["w_up"] = up.at[1, rng.integers(up.shape[1]), rng.integers(up.shape[2])].set(jnp.nan)
    with pytest.raises(ValueError, match=r"layers/mlp/w_up: 1 of \d+ scales are not finite"):
        jaxscale.quantize(params, "w4a16-g32", SPECS)
    with pytest.raises(ValueError, match=r"layers/mlp/w_down met activations that are not finite"):
        gather_statistics(params, SPECS, forward, batches_of(rng), only="w_down")


def test_bad_input(rng):
    params: Any = make(rng)
    with pytest.raises(ValueError, match="the calibration set is empty; give at least one batch"):
        gather_statistics(params, SPECS, forward, [])
    with pytest.raises(ValueError, match=r"no statistics of layers/attn/wk, .*gather them"):
        quantize_calibrated(params, "w4a16-g32-awq", SPECS, {})
    with pytest.raises(ValueError, match="needs no calibration set"):
        quantize_calibrated(params, "w4a16-g32", SPECS, {})
    broken = params | {"final_norm": params["final_norm"], "embed": params["embed"].at[3].set(jnp.nan)}
    with pytest.raises(ValueError, match=r"embed: 2 of 256 scales are not finite"):
        jaxscale.quantize(broken, "w4a16-g32", SPECS)
    tokens = jnp.full((1, 8), 3, jnp.int32)
    with pytest.raises(ValueError, match=r"layers/attn/wq met activations that are not finite"):
        gather_statistics(broken, SPECS, forward, [tokens], only="wq")
