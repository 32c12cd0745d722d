"""What stands between the matmuls of a layer that decodes: both backends against float64 numpy.

The kernels run in JAX's interpreter here; benchmarks/quantized/decode.py compares a model's logits on the device.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_layer.api import add_norm, gate, kernels_fit

backends = pytest.mark.parametrize("name", ["mosaic_gpu", "xla"])


def run(name, f, *args):
    with plgpu.force_gpu_interpret_mode() if name == "mosaic_gpu" else contextlib.nullcontext():
        return jax.jit(functools.partial(f, implementation=name))(*args)


def new(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def close(got, want, roundings=3):
    assert got.shape == want.shape and got.dtype == jnp.bfloat16
    assert (np.abs(wide(got) - want) <= 2.0**-8 * roundings * np.abs(want) + 1e-6).all()


@backends
def test_add_norm(rng, name):
    B, D, P = int(rng.integers(1, 4)), 512 * int(rng.integers(1, 3)), int(rng.integers(0, 4))
    x, scale, parts = new(rng, B, D), new(rng, D), new(rng, P, B, D, dtype=jnp.float32) if P else None
    total, norm = run(name, lambda *a, **k: add_norm(*a, eps=1e-2, offset=0.5, **k), x, parts, scale)
    want = wide(x) + (0.0 if parts is None else wide(parts.sum(axis=0).astype(jnp.bfloat16)))
    close(total, want)
    size = np.sqrt((wide(total) ** 2).mean(axis=-1, keepdims=True) + 1e-2)
    close(norm, wide(total) / size * (wide(scale) + 0.5))


@backends
def test_gate(rng, name):
    P, B, F = int(rng.integers(1, 4)), int(rng.integers(1, 4)), 1024 * int(rng.integers(1, 3))
    parts = new(rng, P, B, 2 * F, dtype=jnp.float32 if P > 1 else jnp.bfloat16)
    a, b = np.split(wide(parts.astype(jnp.float32).sum(axis=0).astype(jnp.bfloat16)), 2, axis=-1)
    got = run(name, lambda p, **k: gate(p, jnp.bfloat16, **k), parts)
    # XLA may leave out the rounding of gate and up; silu(a) changes by up to 1 + |a| of a change of a.
    close(got, a / (1 + np.exp(-a)) * b, roundings=3 + np.abs(a))


def test_refused_calls_say_why():
    new = lambda *shape, dtype=jnp.bfloat16: jnp.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"parts \[P, B, D\].*\(1, 2, 8\)"):
        add_norm(new(3, 8), new(1, 2, 8), new(8), eps=1e-5)
    with pytest.raises(ValueError, match="2F"):
        gate(new(1, 2, 7), jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=r"a multiple of 512.*320"):
            add_norm(new(1, 320), None, new(320), eps=1e-5, implementation="mosaic_gpu")
        assert kernels_fit(new(2, 1, 512), 1024) and not kernels_fit(new(2, 1, 512), 1000)
    assert not kernels_fit(new(2, 1, 512), 1024)
