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

from pallas_kernels.decode_layer.api import add_norm, gate, kernels_fit, rotate_and_write

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


@backends
@pytest.mark.parametrize(("N", "K", "H"), [(16, 8, 128), (16, 16, 64), (4, 4, 256)])
def test_rotate_and_write(rng, name, N, K, H):
    P, B, L, S = int(rng.integers(1, 3)), 3, 2, 16
    parts = new(rng, P, B, N + 2 * K, H, dtype=jnp.float32)
    caches = new(rng, L, B, S, K, H), new(rng, L, B, S, K, H)
    angle = rng.uniform(0, 2 * np.pi, (B, H // 2))
    turn = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    slots = np.asarray([rng.integers(S), S - 1, [-1, S][rng.integers(2)]], np.int32)  # the last: nowhere
    index = int(rng.integers(L))
    q, *after = run(name, rotate_and_write, parts, *caches, jnp.int32(index), jnp.asarray(slots), *turn)

    total = wide(parts.sum(axis=0).astype(jnp.bfloat16))
    halves = total[..., : H // 2] + 1j * total[..., H // 2 :]
    turned = halves * np.exp(1j * angle)[:, None]
    turned = np.concatenate([turned.real, turned.imag], axis=-1)
    # XLA may leave out the rounding before the rotation.
    bound = lambda got, want: np.abs(wide(got) - want).max() <= 2.0**-6 * np.abs(want).max()
    assert q.shape == (B, N, H) and bound(q, turned[:, :N])
    for got, before, rows in zip(after, caches, (turned[:, N : N + K], total[:, N + K :]), strict=True):
        want = wide(before)
        want[index, np.arange(2), slots[:2]] = rows[:2]
        assert bound(got, want)
        untouched = np.ones((L, B, S), bool)
        untouched[index, np.arange(2), slots[:2]] = False
        np.testing.assert_array_equal(wide(got)[untouched], wide(before)[untouched])


def test_refused_calls_say_why():
    new = lambda *shape, dtype=jnp.bfloat16: jnp.zeros(shape, dtype)
    with pytest.raises(ValueError, match=r"parts \[P, B, D\].*\(1, 2, 8\)"):
        add_norm(new(3, 8), new(1, 2, 8), new(8), eps=1e-5)
    with pytest.raises(ValueError, match="2F"):
        gate(new(1, 2, 7), jnp.bfloat16)
    cache, turn, zero = new(1, 2, 4, 8, 8), new(2, 4), jnp.int32(0)
    with pytest.raises(ValueError, match="sizes disagree"):
        rotate_and_write(new(1, 2, 16, 8), cache, cache, zero, jnp.zeros(2, jnp.int32), turn, turn)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=r"a multiple of 512.*320"):
            add_norm(new(1, 320), None, new(320), eps=1e-5, implementation="mosaic_gpu")
        cache = jax.ShapeDtypeStruct((1, 2, 64, 8, 128), jnp.bfloat16)
        assert kernels_fit(new(2, 1, 512), cache, 16, 1024) and not kernels_fit(new(2, 1, 512), cache, 12, 1024)
    assert not kernels_fit(new(2, 1, 512), cache, 16, 1024)
