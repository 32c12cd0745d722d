"""ragged_dot of QuantizedArrays: every backend against a loop over groups of dequantized matrices in float64 numpy.

Mosaic kernels run in JAX's interpreter here; benchmarks/quantized/bench.py repeats the comparison on the device.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    QuantizedArray,
    quantize_array,
    quantize_rows,
    ragged_dot,
    ragged_dot_implementation,
    ragged_dots,
)
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu_many as many
from pallas_kernels.quantized_matmul.array import Format
from pallas_kernels.quantized_ragged_dot import pallas_mosaic_gpu_few as few
from pallas_kernels.ragged_dot import pallas_mosaic_gpu as dense_kernel


def matrices(rng, G, K, N, format: Format = "int4", group=None, **options) -> QuantizedArray:
    w = jnp.asarray(rng.normal(size=(G, K, N)) * rng.uniform(0.1, 10, size=(G, 1, N)), jnp.float32)
    return quantize_array(w, format, group=group, **options)


def tiles(rng, G, K, N, **options) -> QuantizedArray:
    """float8 with scales for tiles of 128 x 128."""
    w = matrices(rng, G, K, N, "float8_e4m3fn", 128, activations="float8_e4m3fn", scale_dtype=jnp.float32, **options)
    return dataclasses.replace(w, scales=w.scales[:, ::128])


def dense(w: QuantizedArray) -> np.ndarray:
    """[G, K, N] float64, from the parts."""
    q = np.asarray(w.values.astype(jnp.float32), np.float64) + (8 if w.unsigned else 0)
    g, n, k = (np.arange(size) * parts // size for size, parts in zip(q.shape, w.scales.shape))
    spread = lambda x: np.asarray(x, np.float64)[g][:, n][:, :, k]
    full = spread(w.scales) * q + (0 if w.offsets is None else spread(w.offsets))
    full = full.transpose(0, 2, 1)
    return full if w.inputs is None else full * np.asarray(w.inputs, np.float64).reshape(-1, full.shape[1])[..., None]


def rounded(x, w: QuantizedArray) -> np.ndarray:
    """x in float64 as a matmul that rounds activations sees it."""
    if w.activations is None:
        return np.asarray(x, np.float64)
    near = quantize_rows(x, w.scales.shape[-1], w.activations)
    values = np.asarray(near.values.astype(jnp.float32), np.float64).reshape(*near.scales.shape, -1)
    return (values * np.asarray(near.scales, np.float64)[..., None]).reshape(x.shape)


def check(x, w, sizes, got, bound=2.0**-19):
    """Products are exact and sums float32: what is left is the order of summation."""
    x, matrices = rounded(x, w), dense(w)
    want, size, begin = np.zeros(got.shape), np.zeros(got.shape), 0
    for g, count in enumerate(sizes):
        rows = slice(begin, begin + count)
        want[rows], size[rows] = x[rows] @ matrices[g], np.abs(x[rows]) @ np.abs(matrices[g])
        begin += count
    assert got.dtype == jnp.float32
    assert (np.abs(np.asarray(got) - want) <= bound * size + 1e-30).all()


def rows(rng, M, K, dtype=jnp.bfloat16) -> jax.Array:
    return jnp.asarray(rng.normal(size=(M, K)), dtype)


def sizes_of(rng, M, G) -> list[int]:
    """G sizes, some of them 0, that may leave rows over."""
    weights = rng.exponential(size=G) * (rng.random(G) > 0.3) + 1e-9
    return [int(x) for x in np.floor(weights / weights.sum() * M * rng.choice([1.0, 0.8]))]


def run(x, w, sizes, name, **options):
    f = functools.partial(ragged_dot, implementation=name, preferred_element_type=jnp.float32, **options)
    if name == "mosaic_gpu":
        with plgpu.force_gpu_interpret_mode():
            return f(x, w, jnp.asarray(sizes, jnp.int32))
    return f(x, w, jnp.asarray(sizes, jnp.int32))


PLAIN = {
    "int4 g32": lambda rng: matrices(rng, 3, 64, 24, group=32),
    "uint4": lambda rng: matrices(rng, 3, 64, 24, "uint4", 32),
    "int8": lambda rng: matrices(rng, 3, 64, 24, "int8"),
    "float4": lambda rng: matrices(rng, 3, 64, 24, "float4_e2m1fn", 16),
    "int8 x int8": lambda rng: matrices(rng, 3, 64, 24, "int8", activations="int8"),
    "int4 x int8": lambda rng: matrices(rng, 3, 64, 24, "int4", activations="int8"),
    "int8 x int8 offsets": lambda rng: matrices(rng, 3, 64, 24, "int8", 32, symmetric=False, activations="int8"),
    "float8 channels": lambda rng: matrices(rng, 3, 64, 24, "float8_e4m3fn", activations="float8_e4m3fn"),
    "float8 tiles": lambda rng: tiles(rng, 2, 256, 128),
    "one scale": lambda rng: QuantizedArray(
        jnp.asarray(rng.integers(-8, 8, size=(3, 24, 64)), jnp.int4), jnp.asarray([[[0.5]]], jnp.float32)
    ),
}


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_backends(rng, name, implementation):
    w = PLAIN[name](rng)
    G, K, _ = w.shape
    x, sizes = rows(rng, 40, K, jnp.float32), sizes_of(rng, 40, G)
    check(x, w, sizes, run(x, w, sizes, implementation))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64)])
def test_inputs_belong_to_all_matrices_or_to_each(rng, shape):
    inputs = jnp.asarray(rng.uniform(0.5, 2, shape), jnp.float32)
    w = dataclasses.replace(matrices(rng, 3, 64, 24, group=32), inputs=inputs)
    x, sizes = rows(rng, 20, 64, jnp.float32), [7, 0, 9]
    check(x, w, sizes, run(x, w, sizes, "xla"), bound=2.0**-18)


FEW = [  # sizes, M, K, N, format, group, config: tiles of fewer rows than a group has, more tiles than blocks
    ([3, 0, 9, 4], 20, 512, 72, "int4", 128, few.Config(8, 2, 2, blocks=2)),
    ([17, 1, 0], 18, 192, 64, "int4", 32, few.Config(16, 1, 3, blocks=1)),
    ([40, 0, 2], 50, 256, 192, "int8", None, few.Config(32, 2, 2, 64, blocks=3)),
    ([5, 6], 11, 256, 64, "float8_e4m3fn", 64, few.Config(8, 1, 2, blocks=2)),
    ([0, 0, 7], 9, 256, 128, "float4_e2m1fn", None, few.Config(16, 2, 2, blocks=2)),
]


@pytest.mark.parametrize("draw", range(2))
def test_few_rows(rng, monkeypatch, draw):
    """Each draw is one of two or three."""
    sizes, M, K, N, format, group, config = FEW[int(rng.choice(np.arange(draw, len(FEW), 2)))]
    monkeypatch.setattr(few, "tuned", lambda *_: config)
    w, x = matrices(rng, len(sizes), K, N, format, group), rows(rng, M, K).at[sum(sizes) :].set(jnp.nan)
    got = run(x, w, sizes, "mosaic_gpu")
    check(jnp.nan_to_num(x), w, sizes, got)


@pytest.mark.parametrize("seed", range(3))
def test_layout_of_few_rows(rng, seed):
    """Each row of x stands in one tile of its group; no tile begins off the unit of 8 rows."""
    M, G, height = int(rng.integers(1, 60)), int(rng.integers(1, 9)), int(rng.choice([8, 16]))
    sizes = sizes_of(rng, M, G)
    table, count, source = (np.asarray(v) for v in few._tiles(jnp.asarray(sizes, jnp.int32), M, height))
    seen, ends = [], np.cumsum(sizes)
    for matrix, start, begin, left in table[: count[0]]:
        assert 0 < left <= height
        out = np.arange(begin, begin + left)
        seen.extend(out)
        assert (np.searchsorted(ends, out, side="right") == matrix).all()
        if matrix < G:
            assert start % 8 == 0 and (source[start : start + left] == out).all()
    assert sorted(seen) == list(range(M))
    assert count[0] <= len(table)


MANY = [  # matrices, sizes, M, config: blocks with several tiles, more steps than stages
    (lambda rng: tiles(rng, 3, 384, 256), [100, 0, 61], 170, many.Config(2, 128, 2, blocks=2, wide=1)),
    (
        lambda rng: matrices(rng, 2, 512, 192, "float8_e4m3fn", activations="float8_e4m3fn"),
        [9, 200],
        230,
        many.Config(3, 128, 3, 4, blocks=2),
    ),
    (
        lambda rng: matrices(rng, 3, 256, 64, "int8", activations="int8"),
        [30, 70, 0],
        100,
        many.Config(3, 128, 2, None, blocks=2),
    ),
    (
        lambda rng: matrices(rng, 2, 256, 64, "int4", activations="int8"),
        [3, 4],
        7,
        many.Config(2, promote=None, blocks=1),
    ),
]


@pytest.mark.parametrize("draw", range(2))
def test_both_in_8_bits(rng, monkeypatch, draw):
    """Each draw is one of two."""
    make, sizes, M, config = MANY[2 * draw + int(rng.integers(2))]
    monkeypatch.setattr(many, "tuned", lambda *_: config)
    w = make(rng)
    x = rows(rng, M, w.shape[1]).at[3].set(0).at[sum(sizes) :].set(jnp.nan)
    got = run(x, w, sizes, "mosaic_gpu")
    check(jnp.nan_to_num(x), w, sizes, got)
    assert (got[3] == 0).all() and (got[sum(sizes) :] == 0).all()


def test_rows_rounded_before(rng, monkeypatch):
    """Bit for bit the product of the array: in the kernel, of tiles or channels, with an odd M; and without it."""
    make, sizes, M, config = MANY[int(rng.integers(len(MANY)))]
    monkeypatch.setattr(many, "tuned", lambda *_: config)
    w, M = make(rng), M + int(rng.integers(8))
    x = rows(rng, M, w.shape[1]).at[sum(sizes) :].set(jnp.nan)
    near = quantize_rows(x, w.scales.shape[-1], w.activations)
    for name in ("mosaic_gpu", "xla"):
        got = run(near, w, sizes, name)
        np.testing.assert_array_equal(got, run(x, w, sizes, name))
        check(jnp.nan_to_num(x), w, sizes, got)
    two = ragged_dots(near, (w, w), jnp.asarray(sizes, jnp.int32))
    assert all(y.dtype == x.dtype for y in two)


def test_rounded_rows_that_do_not_fit(rng):
    x, sizes = rows(rng, 12, 64), jnp.asarray([5, 0, 4], jnp.int32)
    near = quantize_rows(x, 1, "int8")
    w = matrices(rng, 3, 64, 24, "int8", activations="int8")
    assert ragged_dot(near, w, sizes).shape == (12, 24)
    with pytest.raises(ValueError, match=r"takes quantize_rows\(x, 1, 'float8_e4m3fn'\). Got rows in int8"):
        ragged_dot(near, matrices(rng, 3, 64, 24, "int8", activations="float8_e4m3fn"), sizes)
    with pytest.raises(ValueError, match=r"takes quantize_rows\(x, 2, 'int8'\). Got rows in int8 with 1 scales"):
        ragged_dot(near, matrices(rng, 3, 64, 24, "int8", 32, activations="int8"), sizes)
    with pytest.raises(ValueError, match="takes none that are rounded"):
        ragged_dot(near, matrices(rng, 3, 64, 24, "int8"), sizes)
    with pytest.raises(ValueError, match="cannot be multiplied with the weight's inputs"):
        ragged_dot(near, dataclasses.replace(w, inputs=jnp.ones(64)), sizes)
    with pytest.raises(ValueError, match="rows in int8 beside QuantizedArrays"):
        ragged_dots(near, (w, w.dequantize(jnp.bfloat16)), sizes)
    with pytest.raises(ValueError, match="K=64 of lhs is not K=128"):
        ragged_dot(near, matrices(rng, 3, 128, 24, "int8", activations="int8"), sizes)
    loss = lambda scales: ragged_dot(dataclasses.replace(near, scales=scales), w, sizes).sum()
    with pytest.raises(NotImplementedError, match="rounded rows has no gradient; give it the array"):
        jax.grad(loss)(near.scales)


def test_many_rows_of_16_bits_are_multiplied_by_dequantized_matrices(rng, monkeypatch):
    monkeypatch.setattr(dense_kernel, "tuned", lambda *_: dense_kernel.Config(1, columns=128, blocks=1))
    w, x = matrices(rng, 1, 64, 64, "uint4", 32), rows(rng, 65, 64)
    with plgpu.force_gpu_interpret_mode():
        got = ragged_dot(x, w, jnp.asarray([65], jnp.int32), implementation="mosaic_gpu")
    want = np.asarray(x, np.float64) @ dense(w)[0]
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=1e-2 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_gradient_reaches_the_rows(rng, activations):
    w, sizes = matrices(rng, 3, 64, 24, "int8", activations=activations), [5, 0, 8]
    x, grad = rows(rng, 16, 64, jnp.float32), rows(rng, 16, 24, jnp.float32)
    _, vjp = jax.vjp(lambda x: ragged_dot(x, w, jnp.asarray(sizes, jnp.int32)), x)
    want, begin = np.zeros(x.shape), 0
    for g, count in enumerate(sizes):
        part = slice(begin, begin + count)
        want[part] = np.asarray(grad, np.float64)[part] @ dense(w)[g].T
        begin += count
    np.testing.assert_allclose(vjp(grad)[0], want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_gate_and_up_of_both_kinds(rng):
    w, sizes = matrices(rng, 2, 64, 32, group=32), jnp.asarray([4, 6], jnp.int32)
    x, plain = rows(rng, 10, 64), w.dequantize(jnp.bfloat16)
    one, other = ragged_dots(x, (w, plain), sizes)
    assert jnp.array_equal(one, ragged_dot(x, w, sizes)) and jnp.array_equal(other, ragged_dot(x, plain, sizes))


def test_refused_calls_say_why(rng):
    x, sizes = rows(rng, 8, 64), jnp.asarray([4, 4], jnp.int32)
    w = matrices(rng, 2, 64, 68, group=32)
    with plgpu.force_gpu_interpret_mode():
        assert ragged_dot_implementation(x, w, sizes) == "xla"
        with pytest.raises(NotImplementedError, match="N >= 64, a multiple of 8"):
            ragged_dot(x, w, sizes, implementation="mosaic_gpu")
        with pytest.raises(NotImplementedError, match="multiple of 128"):
            ragged_dot(x, dataclasses.replace(w, activations="int8"), sizes, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="3 group sizes for 2 matrices"):
        ragged_dot(x, w, jnp.asarray([4, 4, 0], jnp.int32))
    with pytest.raises(ValueError, match="K=64 of lhs is not K=128"):
        ragged_dot(x, matrices(rng, 2, 128, 64), sizes)
    with pytest.raises(ValueError, match="contraction"):
        ragged_dot(x, dataclasses.replace(w, contraction=(-1,)), sizes)
    with pytest.raises(ValueError, match=r"inputs \(32,\) must"):
        ragged_dot(x, dataclasses.replace(w, inputs=jnp.ones(32)), sizes)
    with pytest.raises(ValueError, match="int32"):
        ragged_dot(x, w, jnp.asarray([4.0, 4.0]))
    with pytest.raises(ValueError, match="at least one group"):
        ragged_dot(x, matrices(rng, 0, 64, 8), jnp.zeros(0, jnp.int32))
    assert ragged_dot(x, matrices(rng, 2, 64, 0), sizes).shape == (8, 0)


@pytest.mark.parametrize("activations", [None, "float8_e4m3fn"])
def test_types_under_shard_map(rng, activations):
    """Only traced: rows over dp, columns over tp, inside shard_map with its types checked."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    w = matrices(rng, 2, 128, 128, "float8_e4m3fn", activations=activations)
    x, sizes = rows(rng, 16, 128), jnp.asarray([4, 4], jnp.int32)

    def loss(x, w, sizes):
        f = lambda x, w, sizes: ragged_dot(x, w, sizes, implementation="mosaic_gpu")
        specs = P("dp", None), jax.tree.map(lambda _: P(None, "tp", None), w), P(None)
        return jax.shard_map(f, in_specs=specs, out_specs=P("dp", "tp"))(x, w, sizes).sum()

    put = lambda v, *spec: jax.device_put(v, jax.NamedSharding(mesh, P(*spec)))
    with jax.set_mesh(mesh), plgpu.force_gpu_interpret_mode():
        args = put(x, "dp", None), jax.tree.map(lambda v: put(v, None, "tp", None), w), put(sizes, None)
        grad = jax.eval_shape(jax.grad(loss), *args)
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)
