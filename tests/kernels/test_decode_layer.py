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

from pallas_kernels import quantize_array
from pallas_kernels.decode_layer.api import kernels_fit, matmul_add, matmul_gate, matmul_parts
from pallas_kernels.decode_layer.rows import to_rows

backends = pytest.mark.parametrize("name", ["mosaic_gpu", "xla"])


def run(name, f, *args):
    with plgpu.force_gpu_interpret_mode() if name == "mosaic_gpu" else contextlib.nullcontext():
        return jax.jit(functools.partial(f, implementation=name))(*args)


def new(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.normal(size=shape), dtype)


def wide(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def close(got, want, roundings=3, least=1e-6):
    assert got.shape == want.shape and got.dtype == jnp.bfloat16
    assert (np.abs(wide(got) - want) <= 2.0**-8 * roundings * np.abs(want) + least).all()


FORMATS = ("int4", 32, True), ("uint4", 64, False), ("int8", None, True)


def weight(rng, *shape, inner=1, kind=None):
    """A weight [*contracted, *outputs], as `unstack` lays it out or not, and its numbers as a matrix."""
    K = int(np.prod(shape[:inner]))
    format, group, symmetric = kind or FORMATS[rng.integers(3)]
    dense = jnp.asarray(rng.normal(size=shape) / K**0.5, jnp.float32)
    w = quantize_array(
        dense, format, group=group, symmetric=symmetric, contraction=range(-len(shape), inner - len(shape))
    )
    print(format, group, w.shape)
    return w.interleave() if rng.integers(2) else w, wide(w.dequantize()).reshape(K, -1)


def normed(rng, B, D):
    """Rows of B x D, and what they stand for."""
    x, scale = new(rng, B, D), new(rng, D)
    rows = to_rows(x, scale, 0.5)
    close(rows.scaled, wide(x) * (wide(scale) + 0.5), roundings=1)
    return rows, wide(rows.scaled) / np.sqrt((wide(x) ** 2).mean(axis=-1, keepdims=True) + EPS)


def slack(name, x, dense):
    """Of a product: XLA rounds a weight in groups to bfloat16 first; else sums are float32."""
    return (2.0**-9 if name == "xla" else 2.0**-18) * (np.abs(x) @ np.abs(dense))


EPS = 1e-2
BATCHES = 1, 5, 9, 20


@backends
def test_matmul_parts(rng, name):
    B = int(rng.choice(BATCHES))
    (rows, y), (w, dense) = normed(rng, B, 512), weight(rng, 512, 6, 64)
    parts = run(name, lambda *a, **k: matmul_parts(*a, eps=EPS, **k), rows, w)
    assert parts.shape[1:] == (B, 6, 64)
    got, want = wide(parts).sum(axis=0).reshape(B, -1), y @ dense
    assert (np.abs(got - want) <= 2.0**-8 * np.abs(want) + slack(name, y, dense)).all()


@backends
def test_matmul_gate(rng, name):
    B, F = int(rng.choice(BATCHES)), 64 * int(rng.integers(1, 4))
    (rows, y), (w, dense) = normed(rng, B, 512), weight(rng, 512, 2 * F)
    (a, b), (of_a, of_b) = (np.split(x, 2, axis=-1) for x in (y @ dense, slack(name, y, dense)))
    got = run(name, lambda *a, **k: matmul_gate(*a, eps=EPS, **k), rows, w)
    # silu(a) changes by up to 1 + |a| of a change of a, in its own size, and by 1.1 of it.
    least = 1.1 * of_a * (np.abs(b) + of_b) + of_b * np.abs(a)
    close(got, a / (1 + np.exp(-a)) * b, roundings=4 + np.abs(a), least=least)


@backends
@pytest.mark.parametrize("kind", FORMATS)
def test_matmul_add(rng, name, kind):
    """And the next matmul's rows, whose squares come in as many parts as there are tiles."""
    B = int(rng.choice(BATCHES))
    D = 1024 if B > 16 else 512 * int(rng.integers(1, 3))  # more rows take wider outputs
    x, scale, h = new(rng, B, D), new(rng, D), new(rng, B, 8, 128)
    w, dense = weight(rng, 8, 128, D, inner=2, kind=kind)
    total, rows = run(name, lambda *a, **k: matmul_add(*a, offset=0.5, **k), h, w, x, scale)
    product = wide(h).reshape(B, -1) @ dense
    want = wide(x) + product
    assert total.shape == want.shape and total.dtype == jnp.bfloat16
    bound = 2.0**-8 * (np.abs(want) + np.abs(product)) + 2 * slack(name, wide(h).reshape(B, -1), dense)
    assert (np.abs(wide(total) - want) <= bound).all()
    close(rows.scaled, wide(total) * (wide(scale) + 0.5), roundings=1)
    np.testing.assert_allclose(rows.squares[:B].sum(axis=1), (wide(total) ** 2).sum(axis=1), rtol=1e-5)


def test_refused_calls_say_why(rng):
    new = lambda *shape, dtype=jnp.bfloat16: jnp.zeros(shape, dtype)
    w = quantize_array(jnp.ones((512, 520)), "int4", group=64)
    rows = lambda B: to_rows(new(B, 512), new(512))
    with pytest.raises(ValueError, match=r"x \[B, D\].*\(2, 512\)"):
        matmul_add(new(2, 512), w, new(2, 512), new(512))
    with pytest.raises(ValueError, match=r"\[D, 2F\].*512, 2, 4"):
        matmul_gate(rows(2), quantize_array(jnp.ones((512, 2, 4)), "int8", contraction=(0,)), eps=1e-5)
    with pytest.raises(ValueError, match="contracts other numbers"):
        matmul_parts(to_rows(new(2, 8), new(8)), w, eps=1e-5)
    forced = {"eps": 1e-5, "implementation": "mosaic_gpu"}
    channels = quantize_array(jnp.ones((512, 128)), "int8", symmetric=False)
    with plgpu.force_gpu_interpret_mode():
        with pytest.raises(NotImplementedError, match=r"at most 64 rows.*65"):
            matmul_parts(rows(65), w, **forced)
        with pytest.raises(NotImplementedError, match="no offsets of channels"):
            matmul_parts(rows(1), channels, **forced)
        with pytest.raises(NotImplementedError, match=r"multiple of 128.*520"):
            matmul_gate(rows(1), w, **forced)
        for B, N in ((33, 512), (1, 520)):
            w = quantize_array(jnp.ones((512, N)), "int4", group=64)
            with pytest.raises(NotImplementedError, match=r"at most 16 rows of x for N a multiple of 512"):
                matmul_add(new(B, 512), w, new(B, N), new(N), implementation="mosaic_gpu")
        assert kernels_fit(new(2, 1, 512)) and not kernels_fit(new(2, 1, 512, dtype=jnp.float32))
    assert not kernels_fit(new(2, 1, 512))
