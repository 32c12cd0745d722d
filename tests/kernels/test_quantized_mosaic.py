"""The Mosaic kernels of quantized_matmul against the dequantized weight in float64 numpy.

They run in JAX's interpreter here; benchmarks/quantized/bench.py repeats the comparison on the device.
"""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
    QuantizedArray,
    quantize_array,
    quantize_rows,
    quantized_matmul,
    quantized_matmul_implementation,
)
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu as gpu
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu_few as few
from pallas_kernels.quantized_matmul import pallas_mosaic_gpu_many as many


def dense(w: QuantizedArray) -> np.ndarray:
    """[N, K] float64."""
    q = np.asarray(w.values.astype(jnp.float32), np.float64) + (8 if w.unsigned else 0)
    n, k = (np.arange(size) * parts // size for size, parts in zip(q.shape, w.scales.shape))
    full = np.asarray(w.scales, np.float64)[n][:, k] * q
    return full if w.offsets is None else full + np.asarray(w.offsets, np.float64)[n][:, k]


def weight(rng, N, K, format, group=None, **options) -> QuantizedArray:
    w = rng.normal(size=(K, N)) * rng.uniform(0.1, 10, size=(1, N))
    return quantize_array(jnp.asarray(w, jnp.float32), format, group=group, **options)


def rows(rng, M, K) -> jax.Array:
    return jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)


def check(x, w, got):
    """Products are exact and sums float32: what is left is the order of summation."""
    x = np.asarray(x, np.float64)
    want, size = x @ dense(w).T, np.abs(x) @ np.abs(dense(w)).T
    assert got.shape == want.shape and got.dtype == jnp.float32
    assert (np.abs(np.asarray(got) - want) <= 2.0**-20 * size + 1e-30).all()


def run(x, w, dtype=jnp.float32):
    with plgpu.force_gpu_interpret_mode():
        return quantized_matmul(x, w, implementation="mosaic_gpu", preferred_element_type=dtype)


@contextlib.contextmanager
def configured(module, config):
    before = module.tuned
    module.tuned = lambda *_: config
    try:
        yield
    finally:
        module.tuned = before


FEW = [  # M, N, K, format, group, options
    (1, 64, 512, "int4", 128, {}),
    (5, 72, 192, "int4", 32, {"symmetric": False}),  # N and K that tiles do not divide
    (3, 64, 512, "uint4", 64, {"scale_dtype": jnp.float16}),
    (9, 128, 768, "int4", 256, {"scale_dtype": jnp.float32}),
    (2, 64, 256, "int4", None, {}),
    (6, 64, 384, "int8", 128, {"symmetric": False}),
    (16, 256, 256, "int8", None, {}),
    (70, 256, 256, "int4", 128, {}),  # two parts, the second with few rows
    (4, 64, 256, "float8_e4m3fn", None, {}),
    (4, 64, 256, "float8_e5m2", 64, {}),
    (4, 64, 256, "float4_e2m1fn", 32, {}),
]


@pytest.mark.parametrize(("M", "N", "K", "format", "group", "options"), FEW)
def test_few_rows(rng, M, N, K, format, group, options):
    w, x = weight(rng, N, K, format, group, **options), rows(rng, M, K)
    check(x, w, run(x, w))


@pytest.mark.parametrize(
    ("format", "group"), [("int4", 128), ("uint4", 32), ("int8", None), ("float8_e4m3fn", 64), ("float4_e2m1fn", None)]
)
def test_interleaved_weights_are_the_same(rng, format, group):
    """K permuted ahead of time: the kernel takes it as it is, and all else takes it back."""
    (M, N), K = [(1, 72), (5, 72), (8, 128), (12, 72)][rng.integers(4)], 384
    w, x = weight(rng, N, K, format, group, scale_dtype=jnp.float32), rows(rng, M, K)
    laid = w.interleave()
    assert laid.interleaved and laid.interleave() is laid and (laid.values != w.values).any()
    check(x, w, run(x, laid))
    np.testing.assert_array_equal(laid.natural().values, w.values)
    # The zero of unsigned values went into the offsets, in float32; all else is the same to the bit.
    rounding = 2.0**-22 * 16 * float(w.scales.max()) if w.unsigned else 0.0
    np.testing.assert_allclose(laid.dequantize(), w.dequantize(), rtol=0, atol=rounding)
    for name in ("xla", "reference"):
        options = {"implementation": name, "preferred_element_type": jnp.float32}
        ours, theirs = (quantized_matmul(x, q, **options) for q in (laid, w))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rounding * np.abs(np.asarray(x, np.float32)).sum())


@pytest.mark.parametrize(
    ("config", "N", "K"),
    [
        (few.Config(2, 2, 2, blocks=3), 128, 2816),  # a tile of three blocks, the last with fewer steps
        (few.Config(1, 3, 2, 64, blocks=5), 72, 1280),  # two blocks that meet in a tile
        (few.Config(1, 2, 2, blocks=3), 200, 1024),  # a block that begins within a tile and ends within another
        (few.Config(1, 2, 2, blocks=2), 256, 1024),  # whole tiles, two of each block
    ],
)
def test_few_rows_shared_by_warpgroups_and_blocks(rng, config, N, K):
    M = int(rng.choice([1, 7, 17]))
    w, x = weight(rng, N, K, "int4", 128, scale_dtype=jnp.bfloat16), rows(rng, M, K)
    with configured(few, config):
        check(x, w, run(x, w))


@pytest.mark.parametrize("config", [few.Config(2, 1, 2, blocks=2), few.Config(2, 2, 2, blocks=3)])
def test_few_rows_gate_of_several_tiles(rng, config):
    """Blocks that go from tile to tile; tests/kernels/test_decode_layer.py has the rest."""
    M, F, eps = int(rng.choice([1, 7, 17])), 192, 0.1
    w, x = weight(rng, 2 * F, 512, "int4", 128), rows(rng, M, 512) * jnp.bfloat16(1 / 64)
    squares = np.pad(rng.uniform(0, 32, size=(M, 64)), ((0, max(8, 1 << (M - 1).bit_length()) - M), (0, 0)))
    with plgpu.force_gpu_interpret_mode():
        got = few.matmul_few_gate(x, w, config, few.Norm(jnp.asarray(squares, jnp.float32), eps))
    y = np.asarray(x, np.float64) / np.sqrt(squares[:M].sum(axis=1, keepdims=True) / 512 + eps)
    a, b = np.split(y @ dense(w).T, 2, axis=1)
    want = a / (1 + np.exp(-a)) * b
    # Gate and up are rounded, then the result; silu(a) changes by up to 1 + |a| of a change of a.
    assert (np.abs(np.asarray(got, np.float64) - want) <= 2.0**-8 * (3 + np.abs(a)) * np.abs(want) + 1e-4).all()


@pytest.mark.parametrize("config", [few.Config(1, 1, 2, blocks=3), few.Config(1, 2, 2, blocks=5)])
def test_few_rows_add_of_several_tiles(rng, config):
    M, N = int(rng.choice([1, 7, 17])), 1024
    w, x, to = weight(rng, N, 1024, "int4", 128), rows(rng, M, 1024), rows(rng, M, N)
    weights = jnp.asarray(rng.normal(size=N), jnp.float32)
    with plgpu.force_gpu_interpret_mode():
        total, scaled, squares = few.matmul_few_add(x, w, few.Add(to, weights, 0.5), config)
    product = np.asarray(x, np.float64) @ dense(w).T
    want, total = np.asarray(to, np.float64) + product, np.asarray(total, np.float64)
    assert (np.abs(total - want) <= 2.0**-8 * (np.abs(want) + np.abs(product)) + 1e-4).all()
    again = total * (np.asarray(weights, np.float64) + 0.5)
    assert (np.abs(np.asarray(scaled, np.float64) - again) <= 2.0**-8 * np.abs(again)).all()
    np.testing.assert_allclose(squares[:M].sum(axis=1), (total**2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("scales", [(1, 1), (32, 2)])
def test_few_rows_scales_of_tensors_and_tiles(rng, scales):
    values = jnp.asarray(rng.integers(-8, 8, size=(64, 256)), jnp.int4)
    w = QuantizedArray(values, jnp.asarray(rng.uniform(0.5, 2, size=scales), jnp.float32))
    x = rows(rng, 3, 256)
    check(x, w, run(x, w))


def test_zero_scales_and_extreme_values(rng):
    """A group of zeros gives zeros whatever its values; the ends of each format survive widening."""
    values = jnp.asarray(np.tile([-8, 7], (64, 128)), jnp.int4)
    scales = jnp.asarray(rng.uniform(0.5, 2, size=(64, 2)), jnp.bfloat16).at[::2, 0].set(0).at[5].set(0)
    w, x = QuantizedArray(values, scales), rows(rng, 2, 256)
    got = run(x, w)
    check(x, w, got)
    assert (got[:, 5] == 0).all()


MANY = [  # M, N, K, format, activations, group, config: blocks with several tiles, more steps than stages
    (100, 256, 384, "float8_e4m3fn", "float8_e4m3fn", 128, many.Config(2, 128, 2, blocks=2, wide=1)),
    (70, 192, 512, "float8_e4m3fn", "float8_e4m3fn", None, many.Config(3, 128, 3, 3, blocks=2)),
    (
        130,
        384,
        384,
        "int8",
        "int8",
        None,
        many.Config(2, 192, 2, None, blocks=3, wide=2),
    ),  # an odd number of pieces in a tile
    (200, 320, 256, "int4", "int8", None, many.Config(3, 128, 2, None, blocks=2, pair=True)),
    (200, 64, 256, "int4", "float8_e4m3fn", None, many.Config(3, 128, 2, 2, blocks=1)),
]


@pytest.mark.parametrize(("M", "N", "K", "format", "activations", "group", "config"), MANY)
def test_both_in_8_bits(rng, M, N, K, format, activations, group, config):
    w = weight(rng, N, K, format, group, activations=activations, scale_dtype=jnp.float32)
    if group:  # tiles of 128 x 128
        w = QuantizedArray(w.values, w.scales[::128], activations=activations)
    x = rows(rng, M, K).at[3].set(0).at[4, 5].set(1e4)  # one row of zeros, one outlier that all else is small beside
    with configured(many, config):
        got = run(x, w)
        before = run(quantize_rows(x, w.scales.shape[-1], activations), w)  # pyright: ignore
    np.testing.assert_array_equal(got, before)
    want = quantized_matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
    size = np.abs(np.asarray(want)).max(axis=1, keepdims=True)
    assert (np.abs(np.asarray(got) - np.asarray(want)) <= 2e-6 * size).all()
    assert (got[3] == 0).all()


def test_integers_with_scales_of_tiles_fall_back(rng):
    """The kernel scales tiles in float32 sums of float8 alone; it was chosen here, and failed."""
    values = jnp.asarray(rng.integers(-127, 128, size=(256, 256)), jnp.int8)
    scales, x = jnp.asarray(rng.uniform(0.5, 2, size=(2, 2)), jnp.float32), rows(rng, 193, 256)
    w = QuantizedArray(values, scales, activations="int8")
    with plgpu.force_gpu_interpret_mode():
        assert quantized_matmul_implementation(x, w) == "xla"
        with pytest.raises(NotImplementedError, match=r"tiles of 128 x 128, \[2, 2\]\. Got .* activations in int8"):
            quantized_matmul(x, w, implementation="mosaic_gpu")
    got = quantized_matmul(x, w, preferred_element_type=jnp.float32)
    want = quantized_matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("activations", ["int8", "float8_e4m3fn"])
def test_few_rows_of_8_bits(rng, activations):
    """They meet 4-bit values too."""
    w = weight(rng, 64, 256, "int4", activations=activations)
    x = rows(rng, 3, 256)
    want = quantized_matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
    got = run(x, w)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


def test_few_rows_of_4_and_8_bits_in_groups(rng):
    """They are rounded, then multiplied in bfloat16, which adds half of a unit in its last place to each."""
    w = weight(rng, 64, 256, "uint4", 64, activations="int4", scale_dtype=jnp.float16)
    w, x = dataclasses.replace(w, outliers=jnp.asarray([True, False, False, True])), rows(rng, 3, 256).at[:, 70].set(30)
    want = quantized_matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(dense(w).T) + 30 * np.abs(dense(w).T).max()
    assert (np.abs(np.asarray(run(x, w)) - np.asarray(want)) <= 2.0**-8 * size).all()
    assert np.abs(np.asarray(run(x, dataclasses.replace(w, outliers=None)) - want)).max() > 2.0**-8 * size.max()


TPU = [  # M, N, K, format, group, activations, options
    (5, 256, 512, "int4", 128, None, {}),
    (33, 128, 768, "uint4", 384, None, {"scale_dtype": jnp.float16}),
    (3, 128, 256, "int8", None, None, {}),
    (9, 128, 512, "int8", None, "int8", {}),
    (2, 128, 256, "int4", None, "int8", {}),
]


@pytest.mark.parametrize(("M", "N", "K", "format", "group", "activations", "options"), TPU)
def test_tpu(rng, M, N, K, format, group, activations, options):
    w, x = weight(rng, N, K, format, group, activations=activations, **options), rows(rng, M, K)
    with pltpu.force_tpu_interpret_mode():
        got = quantized_matmul(x, w, implementation="mosaic_tpu", preferred_element_type=jnp.float32)
    if activations is None:
        check(x, w, got)
    else:
        want = quantized_matmul(x, w, implementation="reference", preferred_element_type=jnp.float32)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))


REFUSED = {
    "rows": ({"M": 193}, "at most 192 rows"),
    "rows of 8 bits": ({"M": 65, "format": "int8", "group": None}, "at most 64 rows"),
    "dtype": ({"dtype": jnp.float32}, "bfloat16"),
    "N": ({"N": 68}, "multiple of 8"),
    "K": ({"K": 96}, "multiple of 64"),
    "group": ({"group": 16}, "groups of 32"),
    "tiles": ({"M": 193, "activations": "int8", "format": "int8", "group": 64}, "scales of channels"),
    "mixed": ({"M": 65, "format": "int8", "activations": "float8_e4m3fn", "group": None}, "dtype of the activations"),
    "offsets": ({"M": 193, "format": "uint4", "activations": "int8", "group": None}, "no offsets"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_calls_say_why_and_fall_back(rng, name):
    case, reason = REFUSED[name]
    case = {"M": 3, "N": 64, "K": 256, "dtype": jnp.bfloat16, "format": "int4", "group": 32, "activations": None} | case
    w = weight(rng, case["N"], case["K"], case["format"], case["group"], activations=case["activations"])
    x = rows(rng, case["M"], case["K"]).astype(case["dtype"])
    with plgpu.force_gpu_interpret_mode():
        assert quantized_matmul_implementation(x, w) != "mosaic_gpu"
        with pytest.raises(NotImplementedError, match=reason):
            quantized_matmul(x, w, implementation="mosaic_gpu")


def test_which_backend_runs(rng):
    x, w = rows(rng, 3, 256), weight(rng, 64, 256, "int4", 128)
    assert quantized_matmul_implementation(x, w) == "xla"
    assert "Hopper" in (gpu.supported(x, w.flat(), jnp.float32) or "")
    with plgpu.force_gpu_interpret_mode():
        assert quantized_matmul_implementation(x, w) == "mosaic_gpu"


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(
    ("hardware", "M", "options"),
    [
        ("mosaic_gpu", 8, {"group": 64, "symmetric": False}),
        ("mosaic_gpu", 512, {"activations": "int8"}),
        ("mosaic_tpu", 8, {"group": 128, "symmetric": False}),
    ],
)
def test_types_under_shard_map(rng, hardware, M, options, check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    w, x = weight(rng, 256, 256, "int4", **options), rows(rng, M, 256)
    interpreted = {"mosaic_gpu": plgpu.force_gpu_interpret_mode, "mosaic_tpu": pltpu.force_tpu_interpret_mode}[hardware]

    def loss(x, w):
        local = lambda x, w: quantized_matmul(x, w, implementation=hardware)
        specs = P("dp", None), jax.tree.map(lambda _: P("tp", None), w)
        return jax.shard_map(local, in_specs=specs, out_specs=P("dp", "tp"), check_vma=check_vma)(x, w).sum()

    with jax.set_mesh(mesh), interpreted():
        put = lambda v, *spec: jax.device_put(v, jax.NamedSharding(mesh, P(*spec)))
        grad = jax.eval_shape(jax.grad(loss), put(x, "dp", None), jax.tree.map(lambda v: put(v, "tp", None), w))
    assert (grad.shape, grad.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(
    ("M", "N", "runs"), [(7, 72, True), (8, 72, False), (12, 72, True), (70, 200, False), (16, 192, True)]
)
def test_few_rows_refuse_what_does_not_lower(M, N, runs):
    """As compiled ahead of time for an H200: N that 64 does not divide with 8, 16, ... rows, or 64 and more."""
    w = QuantizedArray(jnp.zeros((N, 512), jnp.int4), jnp.ones((N, 4), jnp.bfloat16))
    why = few.unfit_few(jnp.zeros((M, 512), jnp.bfloat16), w)
    assert why is None if runs else f"a multiple of 64 for 8, 16, ... rows of x, or 64 and more. Got N {N}" in why
