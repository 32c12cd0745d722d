"""Grouped matmul: every backend against a loop over groups in float64 numpy, values and both gradients.

Mosaic kernels run in JAX's interpreters here; benchmarks/moe/bench.py repeats the comparison on the device.
"""

import contextlib
import functools
import importlib.util
import pathlib
import sys

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxscale.parallel import expert_local
from pallas_kernels import _triton, ragged_dot, ragged_dot_implementation, ragged_dots
from pallas_kernels.ragged_dot import gated, pallas_mosaic_gpu, pallas_mosaic_tpu, schedule, xla
from pallas_kernels.spread_rows.pallas_mosaic_gpu import spread_rows as spread_rows_gpu

PLAIN = ["xla", "xla loop", "reference"]


def oracle(lhs, rhs, sizes, grad):
    """The output, and the gradients of sum(output * grad)."""
    lhs, rhs, grad = (np.asarray(x, np.float64) for x in (lhs, rhs, grad))
    out, d_lhs, d_rhs = np.zeros(grad.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    begin = 0
    for g, size in enumerate(sizes):
        rows = slice(begin, min(begin + max(size, 0), len(lhs)))
        out[rows], d_lhs[rows] = lhs[rows] @ rhs[g], grad[rows] @ rhs[g].T
        d_rhs[g] = lhs[rows].T @ grad[rows]
        begin = rows.stop
    return out, d_lhs, d_rhs


@contextlib.contextmanager
def running(name):
    """What the name means: "xla loop" is xla.py with its loop over tiles at any size; kernels run interpreted."""
    if name == "mosaic_gpu":
        with plgpu.force_gpu_interpret_mode():
            yield name
    elif name == "mosaic_tpu":
        with pltpu.force_tpu_interpret_mode():
            yield name
    elif name == "xla loop":
        before, xla._DENSE_ROWS = xla._DENSE_ROWS, 0
        try:
            yield "xla"
        finally:
            xla._DENSE_ROWS = before
    else:
        yield name


def random_sizes(rng, M, G, *, empty=0.3, total=None):
    """G sizes that add up to `total`, some of them 0."""
    weights = rng.exponential(size=G) * (rng.random(G) > empty)
    weights[rng.integers(G)] += 0.1
    total = M if total is None else total
    sizes = np.floor(weights / weights.sum() * total).astype(int)
    sizes[np.argmax(sizes)] += total - sizes.sum()
    return [int(x) for x in sizes]


def check(rng, name, sizes, *, M, K, N, dtype=jnp.float32, out=None, run=None, bound=None):
    """Values and gradients of one backend against the oracle, as a part of the largest number."""
    G = len(sizes)
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    lhs, rhs, grad = new(M, K), new(G, K, N), new(M, N)
    with running(name) as implementation:
        f = run or functools.partial(ragged_dot, preferred_element_type=out, implementation=implementation)

        @jax.jit
        def both(lhs, rhs, sizes, grad):
            y, vjp = jax.vjp(lambda lhs, rhs: f(lhs, rhs, sizes), lhs, rhs)
            return y, *vjp(grad.astype(y.dtype))

        got = both(lhs, rhs, jnp.asarray(sizes, jnp.int32), grad)
    assert [x.dtype for x in got] == [out or dtype, dtype, dtype]
    bound = bound or (1e-5 if dtype == jnp.float32 else 1e-2)
    for what, x, want in zip(("out", "d_lhs", "d_rhs"), got, oracle(lhs, rhs, sizes, grad), strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), want, rtol=0, atol=bound * np.abs(want).max() + 1e-30, err_msg=f"{what} {sizes}"
        )


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_and_gradients(rng, name, dtype):
    check(rng, name, random_sizes(rng, 70, 5), M=70, K=12, N=20, dtype=dtype)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("M", "sizes"),
    [
        (33, [0, 33, 0]),  # all to one
        (33, [0, 0, 0]),  # none at all
        (40, [7, 0, 13]),  # rows past the groups
        (20, [9, 30, 5]),  # more than there are rows
        (20, [9, -4, 5, 2**31 - 1, 2**31 - 1]),
        (1, [0, 1]),
        (12, [1] * 12),
    ],
    ids=str,
)
def test_sizes(rng, name, M, sizes):
    check(rng, name, sizes, M=M, K=6, N=9)


@pytest.mark.parametrize("name", PLAIN)
def test_output_dtype(rng, name):
    check(rng, name, [3, 0, 9], M=14, K=8, N=4, dtype=jnp.bfloat16, out=jnp.float32)


@pytest.mark.parametrize("name", PLAIN)
def test_rows_past_the_groups_may_hold_anything(rng, name):
    lhs = jnp.asarray(rng.normal(size=(40, 4)), jnp.float32).at[30:].set(jnp.nan)
    rhs = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    with running(name) as implementation:
        f = lambda lhs, rhs: ragged_dot(lhs, rhs, jnp.asarray([20, 10], jnp.int32), implementation=implementation)
        y, vjp = jax.vjp(f, lhs, rhs)
        grads = vjp(jnp.ones_like(y).at[30:].set(jnp.nan))
    assert not np.any(np.asarray(y)[30:]) and not np.any(np.asarray(grads[0])[30:])
    assert all(np.all(np.isfinite(x)) for x in (y, *grads))


@pytest.mark.parametrize("name", PLAIN)
def test_scan_and_remat(rng, name):
    """Two layers of one scan, recomputed in the backward pass."""
    sizes = jnp.asarray(random_sizes(rng, 24, 3), jnp.int32)
    rhs = jnp.asarray(rng.normal(size=(2, 3, 8, 8)), jnp.float32)
    lhs = jnp.asarray(rng.normal(size=(24, 8)), jnp.float32)

    def loss(dot, lhs, rhs):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(dot(x, w, sizes)), None))
        return jnp.sum(jax.lax.scan(layer, lhs, rhs)[0] ** 2)

    with running(name) as implementation:
        got = jax.grad(functools.partial(loss, functools.partial(ragged_dot, implementation=implementation)), (0, 1))
        got = got(lhs, rhs)
    want = jax.grad(functools.partial(loss, jax.lax.ragged_dot), (0, 1))(lhs, rhs)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("own", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
def test_vmap_of_what_each_has_of_its_own(rng, own):
    sizes = np.asarray([random_sizes(rng, 40, 3) for _ in range(4)], np.int32)
    arrays = [rng.normal(size=(4, *s)).astype(np.float32) for s in ((40, 8), (3, 8, 6))]
    lhs, rhs, sizes = (x if mine else x[0] for x, mine in zip((*arrays, sizes), own))
    grad = rng.normal(size=(4, 40, 6)).astype(np.float32)

    def one(lhs, rhs, sizes, grad):
        out, pull = jax.vjp(lambda x, y: ragged_dot(x, y, sizes, implementation="xla"), lhs, rhs)
        return out, *pull(grad)

    got = jax.vmap(one, in_axes=(*(0 if mine else None for mine in own), 0))(lhs, rhs, sizes, grad)
    for i in range(4):
        want = oracle(*(x[i] if mine else x for x, mine in zip((lhs, rhs, sizes), own)), grad[i])
        for x, y in zip(got, want):
            assert np.abs(np.asarray(x[i]) - y).max() < 1e-5 * max(1, np.abs(y).max())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_shard_map(rng, name, check_vma):
    """Rows split over one axis, columns of the matrices over another: gradients of what is replicated add up."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    lhs, rhs = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((40, 6), (3, 6, 8)))
    sizes = jnp.asarray([random_sizes(rng, 20, 3) for _ in range(2)], jnp.int32)

    def loss(implementation, lhs, rhs, sizes):
        local = lambda lhs, rhs, sizes: ragged_dot(lhs, rhs, sizes[0], implementation=implementation)
        specs = (P("dp", None), P(None, None, "tp"), P("dp", None))
        y = jax.shard_map(local, in_specs=specs, out_specs=P("dp", "tp"), check_vma=check_vma)(lhs, rhs, sizes)
        return jnp.sum(jnp.sin(y))

    def whole(lhs, rhs):
        return sum(jnp.sum(jnp.sin(jax.lax.ragged_dot(lhs[20 * i : 20 * i + 20], rhs, sizes[i]))) for i in range(2))

    want = jax.grad(whole, (0, 1))(lhs, rhs)
    with jax.set_mesh(mesh), running(name) as implementation:
        put = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
        args = put(lhs, "dp", None), put(rhs, None, None, "tp"), put(sizes, "dp", None)
        got = jax.jit(jax.grad(functools.partial(loss, implementation), (0, 1)))(*args)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize(
    ("name", "words", "shape", "dtype"),
    [
        ("mosaic_gpu", "multiples of 64.*K=96", (8, 96, 64), jnp.bfloat16),
        ("mosaic_gpu", "bfloat16 and float16. Got float32", (8, 64, 64), jnp.float32),
        ("mosaic_tpu", "multiples of 128 or at most 3072. Got K=128, N=3080", (8, 128, 3080), jnp.bfloat16),
        ("mosaic_tpu", "float32 and bfloat16. Got float16", (8, 128, 128), jnp.float16),
    ],
)
def test_mosaic_says_what_it_cannot_do(name, words, shape, dtype):
    M, K, N = shape
    arrays = jnp.zeros((M, K), dtype), jnp.zeros((2, K, N), dtype), jnp.zeros(2, jnp.int32)
    with running(name), pytest.raises(NotImplementedError, match=words):
        ragged_dot(*arrays, implementation=name)
    with pytest.raises(NotImplementedError, match="this is cpu"):
        ragged_dot(*arrays, implementation=name)


# The Mosaic kernels, in the interpreters: two blocks that walk over tiles of a few steps.


@pytest.mark.parametrize(
    ("config", "dtype", "M", "K", "N", "sizes"),
    [
        # Two warpgroups; ends inside of units of 8 rows; a full tile; columns past the end; rows past the groups.
        ({"stages": 2, "wide": 1}, jnp.bfloat16, 150, 64, 192, [3, 0, 131, 10]),
        # Tiles of 128 rows for each warpgroup: of 3, 2 and 1 units of 64. Half of the blocks start in the middle.
        ({"rows": 128}, jnp.float16, 304, 128, 128, [136, 128, 40]),
        ({"warpgroups": 1}, jnp.bfloat16, 20, 128, 128, [0, 7, 0, 5]),  # decode
    ],
    ids=["ragged", "tall", "short"],
)
def test_mosaic_gpu(rng, monkeypatch, config, dtype, M, K, N, sizes):
    config = pallas_mosaic_gpu.Config(**({"blocks": 2, "columns": 128, "stages": 3} | config))
    monkeypatch.setattr(pallas_mosaic_gpu, "tuned", lambda height, width: config)
    check(rng, "mosaic_gpu", sizes, M=M, K=K, N=N, dtype=dtype)


def test_mosaic_gpu_past_the_groups(rng):
    """nan there reaches no gradient: the contraction masks both sides in the last group's last step, one elsewhere."""
    sizes, M = jnp.asarray([70, 5, 13], jnp.int32), 96
    lhs, grad = (jnp.asarray(rng.normal(size=(M, 128)), jnp.bfloat16) for _ in range(2))
    poisoned = [x.at[88:].set(jnp.nan) for x in (lhs, grad)]
    config = pallas_mosaic_gpu.Config(blocks=2, columns=128, stages=2)
    with plgpu.force_gpu_interpret_mode():
        out = pallas_mosaic_gpu.contraction(*poisoned, sizes, jnp.float32, config=config)
    ends = np.cumsum(sizes)
    wide = [np.asarray(x, np.float64) for x in (lhs, grad)]
    for g, end in enumerate(ends):
        a, b = (x[end - int(sizes[g]) : end] for x in wide)
        np.testing.assert_allclose(out[g], a.T @ b, atol=1e-3)


def two_matrices(rng, name, sizes, *, M, K, N, dtype):
    """Values and gradients of ragged_dots with two matrices for each group, against the oracle of both."""
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    lhs, a, b = new(M, K), new(len(sizes), K, N), new(len(sizes), K, N)
    grads = new(M, N), new(M, N)
    with running(name) as implementation:
        f = lambda lhs, a, b, sizes: ragged_dots(lhs, (a, b), sizes, implementation=implementation)
        out, vjp = jax.vjp(lambda *x: f(*x, jnp.asarray(sizes, jnp.int32)), lhs, a, b)
        d_lhs, d_a, d_b = vjp(grads)
    one, two = (oracle(lhs, r, sizes, g) for r, g in zip((a, b), grads, strict=True))
    want = one[0], two[0], one[1] + two[1], one[2], two[2]
    for x, y in zip((*out, d_lhs, d_a, d_b), want, strict=True):
        assert x.dtype == dtype
        bound = 1e-5 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=bound * np.abs(y).max())


@pytest.mark.parametrize("name", PLAIN)
def test_two_matrices(rng, name):
    two_matrices(rng, name, random_sizes(rng, 30, 4), M=30, K=7, N=9, dtype=jnp.float32)


def test_two_matrices_mosaic_gpu(rng, monkeypatch):
    config = pallas_mosaic_gpu.Config(warpgroups=1, blocks=2, columns=128, stages=3)
    monkeypatch.setattr(pallas_mosaic_gpu, "tuned", lambda height, width: config)
    two_matrices(rng, "mosaic_gpu", [0, 13, 5], M=24, K=64, N=128, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "M", "K", "N", "sizes"),
    [
        (jnp.float32, 140, 256, 384, [0, 37, 0, 60, 3, 0]),  # rows past the groups, empty groups at both ends
        (jnp.bfloat16, 96, 192, 320, [32, 64]),
    ],
    ids=["ragged", "even"],
)
def test_mosaic_tpu(rng, monkeypatch, dtype, M, K, N, sizes):
    monkeypatch.setattr(pallas_mosaic_tpu, "TUNED", pallas_mosaic_tpu.Config(rows=32, depth=128, columns=256))
    check(rng, "mosaic_tpu", sizes, M=M, K=K, N=N, dtype=dtype)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_mosaic_types_under_shard_map(name, check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    specs = P("dp", None), P(None, None, "tp"), P("dp", None)
    shapes = [((80, 128), jnp.bfloat16), ((3, 128, 256), jnp.bfloat16), ((2, 3), jnp.int32)]

    def loss(*args):
        local = lambda lhs, rhs, sizes: ragged_dot(lhs, rhs, sizes[0], implementation=name)
        y = jax.shard_map(local, in_specs=specs, out_specs=P("dp", "tp"), check_vma=check_vma)(*args)
        return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(mesh), running(name):
        args = [jax.ShapeDtypeStruct(*x, sharding=jax.NamedSharding(mesh, s)) for x, s in zip(shapes, specs)]
        grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1)), *args)
    assert [(x.shape, x.dtype) for x in grads] == shapes[:2]


@pytest.mark.parametrize(
    ("block", "align", "unit"),
    [(16, 1, None), (16, 8, None), (64, 8, None), (128, 128, None), (16, 8, 8), (128, 8, 64)],
)
def test_tiles_cover_each_row_once(rng, block, align, unit):
    for M, total in ((300, 300), (300, 211), (64, 64), (5, 5), (128, 0)):
        sizes = random_sizes(rng, M, 7, total=total)
        args = jnp.asarray(sizes, jnp.int32), M, block, align
        tiles = schedule.make_tiles(*args, unit=unit)
        with _triton.force_interpret_mode():
            kernels = schedule.make_tiles(*args, unit=unit)
        assert all(map(jnp.array_equal, tiles, kernels))
        table, (count,), (short,) = (np.asarray(x) for x in tiles)
        owner = np.full(M, -1)
        for group, start, begin, end in table[:count]:
            assert start % align == 0 and start <= begin < end <= start + block
            assert np.all(owner[begin:end] == -1)
            owner[begin:end] = group
        assert np.array_equal(owner, np.repeat(np.arange(8), [*sizes, M - total]))
        assert np.all(table[count:, 2] == table[count:, 3])
        begins = np.cumsum(sizes) - sizes
        length = np.where(sizes, begins % align + sizes, 0)
        assert short == np.sum((length > 0) & (length < block))
        if unit is not None:
            own = table[:count][table[:count, 0] < 7]
            assert np.all(np.diff(np.asarray(sizes)[own[:, 0]]) <= 0)  # large groups first
            for group in set(own[:, 0].tolist()):
                units = [-(-(end - start) // unit) for g, start, _, end in own if g == group]
                assert max(units) - min(units) <= 1 and len(units) == -(-length[group] // block)


@pytest.mark.parametrize("block", [16, 128])
def test_groups_without_rows_have_a_tile_when_asked(rng, block):
    sizes = jnp.asarray(random_sizes(rng, 300, 7), jnp.int32)
    groups = np.asarray(schedule.make_tiles(sizes, 300, block, empty=True).table)[:, 0]
    assert set(range(7)) <= set(groups.tolist()) and np.all(np.diff(groups) >= 0)


def test_no_gradient_is_dense_over_groups():
    """The loop does the work of the rows, not of rows times groups."""
    lhs, rhs = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((4096, 16), (64, 16, 16)))
    sizes = jax.ShapeDtypeStruct((64,), jnp.int32)
    f = jax.grad(lambda *x: jnp.sum(ragged_dot(*x, implementation="xla")), argnums=(0, 1))
    memory = jax.jit(f).lower(lhs, rhs, sizes).compile().memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 4 * 64 * 4096 * 16 / 4  # a quarter of one masked copy


def test_which_implementation_runs():
    lhs, rhs = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((8, 4), (2, 4, 4)))
    sizes = jax.ShapeDtypeStruct((2,), jnp.int32)
    assert ragged_dot_implementation(lhs, rhs, sizes) == "xla"
    assert ragged_dot_implementation(lhs, rhs, sizes, implementation="reference") == "reference"
    with plgpu.force_gpu_interpret_mode():
        half = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
        assert ragged_dot_implementation(half(8, 64), half(2, 64, 64), sizes) == "mosaic_gpu"
        assert ragged_dot_implementation(half(8, 64), half(2, 64, 96), sizes) == "xla"
        assert ragged_dot_implementation(lhs, rhs, sizes) == "xla"


@pytest.mark.parametrize("shape", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_nothing_to_multiply(shape):
    M, K, N = shape
    f = lambda lhs: ragged_dot(lhs, jnp.ones((2, K, N)), jnp.asarray([1, 2], jnp.int32))
    y, vjp = jax.vjp(f, jnp.ones((M, K)))
    assert y.shape == (M, N) and not np.any(y) and not np.any(vjp(y)[0])


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (r"lhs \[M,K\], rhs \[G,K,N\]", {"lhs": jnp.zeros((2, 8, 4))}),
        (r"K=4 of lhs is not K=5", {"rhs": jnp.zeros((3, 5, 2))}),
        (r"3 group sizes for 2 matrices", {"rhs": jnp.zeros((2, 4, 2))}),
        (r"at least one group", {"rhs": jnp.zeros((0, 4, 2)), "group_sizes": jnp.zeros(0, jnp.int32)}),
        (r"one dtype.*float32 and bfloat16", {"rhs": jnp.zeros((3, 4, 2), jnp.bfloat16)}),
        (r"must be int32. Got float32", {"group_sizes": jnp.zeros(3)}),
        (r"preferred_element_type.*int8", {"preferred_element_type": jnp.int8}),
        (r"'cublas' is unknown", {"implementation": "cublas"}),
    ],
)
def test_bad_input(words, change):
    arguments = {"lhs": jnp.zeros((8, 4)), "rhs": jnp.zeros((3, 4, 2)), "group_sizes": jnp.zeros(3, jnp.int32)}
    with pytest.raises(ValueError, match=words):
        ragged_dot(**(arguments | change))


def test_benchmark_runs_in_small(capsys):
    """The same script as on a GPU: every job gives a number, and the table comes last."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "moe" / "bench.py"
    spec = importlib.util.spec_from_file_location("bench_moe", path)
    assert spec is not None and spec.loader is not None
    bench = sys.modules["bench_moe"] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(bench)
        assert bench.main(["--tiny", "--only", "tiny random"]) == 0
    finally:
        del sys.modules["bench_moe"]
    out = capsys.readouterr().out
    table = out.splitlines()[-3:]
    assert [row.split()[2] for row in table] == ["dense", "lax", "xla"] and "FAILED" not in out and "WRONG" not in out


def sides_of(rng, M, K, N, G):
    """Sizes, lhs, gate, up, weights; and in float64 what gate and up give each row."""
    sizes = random_sizes(rng, M, G, total=int(rng.integers(M - 20, M + 1)))
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    lhs, gate, up = new(M, K), new(G, K, N), new(G, K, N)
    weights = jnp.asarray(rng.uniform(0.2, 1, (M, 1)), jnp.float32)
    return sizes, (lhs, gate, up, weights), [oracle(lhs, w, sizes, np.zeros((M, N)))[0] for w in (gate, up)]


def close(got, want, bound=1e-2):
    got, want = np.asarray(jnp.asarray(got).astype(jnp.float32), np.float64), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound * np.abs(want).max())


def test_gated_in_one_kernel(rng):
    """silu(gate) * up * weights by the Hopper kernel beside float64."""
    sizes, args, (a, b) = sides_of(rng, 100, 64, 128, 3)
    with running("mosaic_gpu"):
        got = jax.jit(gated.ragged_dot_gated)(*args, jnp.asarray(sizes, jnp.int32))
    close(got, a / (1 + np.exp(-a)) * b * np.asarray(args[3]))


def test_experts_use_one_kernel_where_no_gradient_is_asked_for(rng, monkeypatch):
    """And two matmuls where one is: outputs and gradients beside float64."""
    M, K, N, G = 60, 12, 20, 4
    calls = []

    def one_kernel(lhs, gate, up, weights, sizes):
        calls.append(lhs.shape)
        return gated.gated_reference(*(xla.grouped(lhs, r, sizes, lhs.dtype) for r in (gate, up)), weights)

    monkeypatch.setattr(gated, "supported", lambda *_: None)
    monkeypatch.setattr(gated, "ragged_dot_gated", one_kernel)
    sizes, args, (a, b) = sides_of(rng, M, K, N, G)
    lhs, gate, up, weights = args

    def hidden(lhs, gate, up, weights):
        p = {"w_gate": gate, "w_up": up}
        return expert_local._into_hidden("silu", lhs, weights, jnp.asarray(sizes, jnp.int32), None, p)

    s, w = 1 / (1 + np.exp(-a)), np.asarray(weights)
    close(jax.jit(hidden)(*args), a * s * b * w, 2e-2)
    assert calls == [(M, K)]
    grad = jnp.asarray(rng.normal(size=(M, N)), jnp.bfloat16)
    g = np.asarray(grad.astype(jnp.float32), np.float64)
    d_a, d_b = g * w * b * s * (1 + a * (1 - s)), g * w * a * s
    (_, x, d_gate), (_, y, d_up) = (oracle(lhs, *rest) for rest in ((gate, sizes, d_a), (up, sizes, d_b)))
    want = a * s * b * w, x + y, d_gate, d_up, (g * a * s * b).sum(axis=1, keepdims=True)
    for wrap in (lambda f: f, jax.checkpoint):
        out, vjp = jax.vjp(wrap(hidden), *args)
        for got, expected in zip((out, *vjp(grad)), want, strict=True):
            close(got, expected, 2e-2)


def kernels_of(jaxpr):
    """The kernel jaxprs of a program, in order, those inside of other programs' too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield eqn.params["jaxprs"][0]
        else:
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from kernels_of(inner)


def test_equal_calls_share_a_kernel():
    """Which Mosaic then lowers and compiles once: by identity, since that is what JAX's cache of lowerings goes by."""
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    M, K, N, G = 512, 128, 256, 4
    sizes, place = jax.ShapeDtypeStruct((G,), jnp.int32), jax.ShapeDtypeStruct((M, 1), jnp.int32)

    def step(x, a, b, down, sizes, place):
        run = lambda *args, **kw: pallas_mosaic_gpu.grouped(*args, sizes, jnp.bfloat16, **kw)
        gate, up = run(x, a), run(x, b)
        hidden = run(gate * up, down)
        back = run(hidden, down, transposed=True)
        grads = [pallas_mosaic_gpu.contraction(x, g, sizes, jnp.bfloat16) for g in (gate, back)]
        return grads, [spread_rows_gpu(rows, place[:, 0], place) for rows in (x, x * 2)]

    jaxpr = jax.make_jaxpr(step)(shape(M, K), *[shape(G, K, N)] * 2, shape(G, N, K), sizes, place).jaxpr
    found = [id(kernel) for kernel in kernels_of(jaxpr)]
    assert [found.index(kernel) for kernel in found] == [0, 0, 2, 3, 4, 4, 6, 6]
