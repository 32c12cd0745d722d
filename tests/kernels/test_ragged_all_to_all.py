"""ragged_all_to_all: every run at its place on the other device, by every backend; gradients go the other way.

The kernel runs in JAX's interpreter, which simulates remote copies between devices and looks for races. It starts all
devices together, so that they meet first is not seen here.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import ragged_all_to_all, ragged_all_to_all_implementation

ALL = P(("data", "ep"))
# mesh (data, ep), parts of ep that exchange among themselves, runs for each device, a row's numbers, dtype
CASES = [
    ((4, 2), None, 3, 130, "float32"),
    ((2, 4), None, 2, 48, "bfloat16"),
    ((2, 4), ((0, 2), (3, 1)), 2, 7, "bfloat16"),
    ((1, 8), None, 1, 256, "int8"),
    ((2, 4), None, 1, 12, "float32"),
    ((2, 4), None, 1, (8, 128), "bfloat16"),  # whole tiles
    ((4, 2), None, 2, (3, 5), "float32"),
]


def sets_of(shape, groups):
    """[sets, devices]: numbers of devices that exchange with each other."""
    ids = np.arange(8).reshape(shape)
    return ids if groups is None else np.concatenate([ids[:, list(g)] for g in groups])


def deal(rng, sets, runs, crowded):
    """Offsets and sizes of all 8 devices, [8, N] each; rows of source and target. Runs lie in any order at both ends,
    with gaps between; some are empty, and where `crowded`, nearly all go to one device."""
    size = sets.shape[1]
    count = size * runs
    starts, sizes, places = (np.zeros((8, count), np.int32) for _ in range(3))
    received = np.zeros((8, count), np.int32)
    for devices in sets:
        rows = rng.integers(0, 4, (size, size, runs)) * (rng.random((size, size, runs)) < 0.8)
        if crowded:
            rows[:, np.arange(size) != rng.integers(size)] = 0
        for me, device in enumerate(devices):
            sizes[device] = rows[me].reshape(-1)
            received[device] = rows[:, me].reshape(-1)
            for ends, order in ((starts, rows[me].reshape(-1)), (places, rows[:, me].reshape(-1))):
                at = np.zeros(count, np.int32)
                position = 0
                for run in rng.permutation(count):
                    position += rng.integers(2)
                    at[run] = position
                    position += order[run]
                if ends is starts:
                    starts[device] = at
                else:  # of the runs that come, by sender: it is the senders who say where
                    for sender, other in enumerate(devices):
                        places[other].reshape(size, runs)[me] = at.reshape(size, runs)[sender]
    return (starts, sizes, places, received), 5 * count


def expected(x, output, runs, sets):
    starts, sizes, places, _ = runs
    out, per = output.copy(), starts.shape[1] // sets.shape[1]
    for devices in sets:
        for device in devices:
            for run, rows in enumerate(sizes[device]):
                to, a, b = devices[run // per], starts[device, run], places[device, run]
                out[to, b : b + rows] = x[device, a : a + rows]
    return out


def interpreter(name):
    if name != "mosaic_tpu":
        return contextlib.nullcontext()
    pltpu.reset_tpu_interpret_mode_state()
    return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))


def races() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    found = interpret_pallas_call.races
    assert found is not None
    return found.races_found


def over(shape):
    return jax.make_mesh(shape, ("data", "ep"), axis_types=(AxisType.Explicit,) * 2)


def exchange(groups, name, anything=False):
    def local(x, output, *runs):
        into = jax.ShapeDtypeStruct(output.shape[1:], output.dtype) if anything else output[0]
        runs = (a[0] for a in runs)
        return ragged_all_to_all(x[0], into, *runs, axis_name="ep", axis_index_groups=groups, implementation=name)[None]

    return jax.shard_map(local, in_specs=(ALL,) * 6, out_specs=ALL)


def compare(rng, case, name):
    shape, groups, per, row, dtype = case
    row = row if isinstance(row, tuple) else (row,)
    width = math.prod(row)
    sets = sets_of(shape, groups)
    runs, rows = deal(rng, sets, per, rng.random() < 0.3)
    x, output = (rng.integers(-100, 100, (8, rows, *row)) for _ in range(2))
    want = expected(x, output, runs, sets)
    with jax.set_mesh(over(shape)), interpreter(name):
        put = lambda a, dtype=jnp.int32: jax.device_put(jnp.asarray(a, dtype), ALL)
        run, there = exchange(groups, name), [put(a) for a in runs]
        arrays = put(x, dtype), put(output, dtype)
        if dtype == "int8":
            out = jax.jit(run)(*arrays, *there)
        else:
            both = jax.jit(lambda x, output, grad, *runs: jax.vjp(lambda *a: run(*a, *runs), x, output)[1](grad))
            grad = put(want + 1, dtype)
            out, (to_x, to_output) = jax.jit(run)(*arrays, *there), both(*arrays, grad, *there)
    np.testing.assert_array_equal(np.asarray(out, np.int32), want)
    if dtype != "int8":  # linear: <grad, exchange(x, output)> for unit vectors, which is where every row came from
        rows_of = np.arange(8 * rows).reshape(8, rows, 1)
        origin = expected(rows_of, rows_of + 8 * rows, runs, sets)[..., 0].ravel()
        sums = np.zeros((16 * rows, width))
        np.add.at(sums, origin, np.asarray(grad, np.float32).reshape(-1, width))
        np.testing.assert_array_equal(np.asarray(to_x, np.float32).reshape(-1, width), sums[: 8 * rows])
        np.testing.assert_array_equal(np.asarray(to_output, np.float32).reshape(-1, width), sums[8 * rows :])
    assert name != "mosaic_tpu" or not races()


@pytest.mark.parametrize("name", ["reference", "mosaic_tpu"])
def test_every_run_at_its_place(name, rng):
    """One case of many; `test_every_case` has all of them."""
    compare(rng, CASES[rng.integers(len(CASES))], name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_case(case, rng):
    for name in ("reference", "mosaic_tpu"):
        compare(rng, case, name)


def tpus(shape=(2, 4)):
    """A mesh of TPUs that are not here."""
    device = jax.sharding.AbstractDevice("TPU v5", None, platform="tpu")
    return jax.sharding.AbstractMesh(shape, ("data", "ep"), (AxisType.Explicit,) * 2, abstract_device=device)


def abstract(mesh, rows, width, dtype, count):
    new = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, ALL))
    return [new((8, rows, width), dtype)] * 2 + [new((8, count), jnp.int32)] * 4


@pytest.mark.parametrize("name", ["mosaic_tpu", "xla"])
def test_lowers_for_tpus_under_remat_and_scan(name):
    """Mosaic's own lowering, which needs no libtpu. Where everything came from is asked once: an all_to_all."""
    mesh = tpus()
    with jax.sharding.use_abstract_mesh(mesh):
        layer = jax.checkpoint(lambda x, *runs: jnp.sin(exchange(None, name, anything=True)(x, x, *runs)))
        layers = lambda x, *runs: jax.lax.scan(lambda x, _: (layer(x, *runs), None), x, length=2)[0]
        loss = lambda x, output, *runs: layers(x, *runs).astype(jnp.float32).sum()
        traced = jax.jit(jax.grad(loss)).trace(*abstract(mesh, 64, 256, jnp.bfloat16, 8))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.all_to_all") == 1
    assert text.count("tpu_custom_call" if name == "mosaic_tpu" else "@ragged_all_to_all(") == 3  # one again, one back


def test_what_it_runs_on():
    x = jax.ShapeDtypeStruct((8, 128), jnp.bfloat16)
    assert ragged_all_to_all_implementation(x) == "reference"
    for name, reason in [("mosaic_tpu", "needs a TPU; this is cpu"), ("xla", "no ragged_all_to_all for CPUs")]:
        with pytest.raises(NotImplementedError, match=reason):
            ragged_all_to_all_implementation(x, implementation=name)
    with pytest.raises(ValueError, match="implementation='nccl' is unknown"):
        ragged_all_to_all_implementation(x, implementation="nccl")
    with jax.sharding.use_abstract_mesh(tpus()):
        with pytest.raises(NotImplementedError, match="over all axes of the mesh; data, ep are not manual here"):
            ragged_all_to_all_implementation(x, implementation="mosaic_tpu")
        wide = jax.ShapeDtypeStruct((8, 128), jnp.complex64)
        with pytest.raises(NotImplementedError, match=r"1, 2 or 4 bytes\. Got complex64"):
            ragged_all_to_all_implementation(wide, implementation="mosaic_tpu")
        assert ragged_all_to_all_implementation(x) == "xla"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (8, 9, 4)}, r"operand \[R,...\] and output \[S,...\] of one dtype. Got operand float32\(9, 4\)"),
        ({"x": (8, 9, 5), "dtype": jnp.bfloat16}, "of one dtype. Got operand bfloat16"),
        ({"x": (8, 0, 5)}, "neither array may be empty"),
        ({"sizes": (8, 7)}, r"all of one length. Got input_offsets int32\(8,\), send_sizes int32\(7,\)"),
        ({"count": 6}, "6 runs are not the same number for each of 4 devices of 'ep'; add runs of 0 rows, up to 8"),
        ({"integer": jnp.int8}, r"must be int32. Got input_offsets int8\(8,\)"),
        ({"axis": "tp"}, "axis_name='tp' is not an axis here; .* Axes of the mesh: data, ep"),
        ({"groups": [[0, 1], [2]]}, r"must split the 4 devices of 'ep' into equal parts. Got \(\(0, 1\), \(2,\)\)"),
    ],
)
def test_refuses(change, words):
    count, integer = change.get("count", 8), change.get("integer", jnp.int32)
    x, output = jnp.zeros(change.get("x", (8, 9, 5)), change.get("dtype", jnp.float32)), jnp.zeros((8, 9, 5))
    runs = [jnp.zeros((8, count), integer) for _ in range(4)]
    if "sizes" in change:
        runs[1] = jnp.zeros(change["sizes"], integer)
    options = {"axis_name": change.get("axis", "ep"), "axis_index_groups": change.get("groups")}
    local = lambda *arrays: ragged_all_to_all(*(a[0] for a in arrays), **options)[None]
    with jax.set_mesh(over((2, 4))), pytest.raises(ValueError, match=words):
        jax.shard_map(local, in_specs=(ALL,) * 6, out_specs=ALL)(*(jax.device_put(a, ALL) for a in (x, output, *runs)))


def test_outside_of_shard_map():
    x, runs = jnp.zeros((4, 8)), [jnp.zeros(2, jnp.int32)] * 4
    with pytest.raises(ValueError, match=r"call it inside of jax\.shard_map .* Axes of the mesh: none"):
        ragged_all_to_all(x, x, *runs, axis_name="ep")
