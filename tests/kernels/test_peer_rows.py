"""spread_from_peers and collect_at_home, each the gradient of the other, against loops over tokens.

The kernels need GPUs with access to each other: benchmarks/moe/devices.py compares a layer there. Here they are traced.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxscale.mesh import make_mesh
from jaxscale.parallel.permute import Places, collect_over, spread_over
from pallas_kernels import collect_at_home, peer_rows_implementation, spread_from_peers


def tables(rng, devices, n, K, rows):
    """token [devices, rows], place [devices, devices * n, K]: some rows are nobody's, some choices have no row."""
    token = np.full((devices, rows), devices * n, np.int32)
    place = np.full((devices, devices * n * K), rows, np.int32)
    for d in range(devices):
        pairs = rng.permutation(devices * n * K)[: rng.integers(1, min(devices * n * K, rows) + 1)]
        place[d, pairs] = rng.permutation(rows)[: len(pairs)]
        token[d, place[d, pairs]] = pairs // K
    return token, place.reshape(devices, devices * n, K)


@pytest.mark.parametrize("devices", [2, 4])
def test_rows_travel_to_their_places_and_sums_home(devices, rng):
    n, K, D, rows = 7, 3, 8, 25
    token, place = tables(rng, devices, n, K, rows)
    x = rng.standard_normal((devices * n, D), np.float32)
    y = rng.standard_normal((devices, rows, D), np.float32)
    y[token == devices * n] = 0.0  # what stands at nobody's place is the caller's to leave out
    sums = np.zeros_like(x)
    for d in range(devices):
        for r in np.flatnonzero(token[d] < devices * n):
            sums[token[d, r]] += y[d, r]

    def run(x, y, token, place):
        places = Places(token, place)
        spread, back = jax.vjp(lambda x: spread_over("ep", x, places), x)
        home, out = jax.vjp(lambda y: collect_over("ep", y, places), y)
        return spread, back(y)[0], home, out(x)[0]

    mesh = make_mesh(devices=jax.devices()[:devices], ep=devices)
    with jax.set_mesh(mesh):
        flat = (jax.device_put(a, jax.NamedSharding(mesh, P("ep"))) for a in (
            x, y.reshape(-1, D), token.reshape(-1), place.reshape(-1, K)))  # fmt: skip
        spread, back, home, out = jax.jit(jax.shard_map(run, out_specs=P("ep")))(*flat)
    used = token.reshape(-1) < devices * n
    for rows_of_tokens in (spread, out):
        np.testing.assert_array_equal(np.asarray(rows_of_tokens)[used], x[token.reshape(-1)[used]])
    for total in (back, home):
        np.testing.assert_allclose(total, sums, atol=1e-5)


def traced(devices, dtype="bfloat16", D=512, K=8):
    """Types of both kernels under shard_map that checks what varies."""
    split = jax.NamedSharding(jax.sharding.get_mesh(), P("ep"))
    new = functools.partial(jax.ShapeDtypeStruct, sharding=split)
    shapes = new((devices * 6, D), dtype), new((devices * 40,), jnp.int32), new((devices * devices * 6, K), jnp.int32)
    run = functools.partial(spread_from_peers, axis="ep", implementation="mosaic_gpu")
    home = functools.partial(collect_at_home, axis="ep", implementation="mosaic_gpu")
    both = lambda x, token, place: (rows := run(x, token, place), home(rows, place))
    return jax.eval_shape(jax.shard_map(both, out_specs=P("ep")), *shapes)


def test_kernels_are_traced():
    with jax.set_mesh(make_mesh(devices=jax.devices()[:4], ep=4)), plgpu.force_gpu_interpret_mode():
        rows, sums = traced(4)
    assert (rows.shape, sums.shape, sums.dtype) == ((160, 512), (24, 512), jnp.bfloat16)


def test_what_it_runs_on():
    new = jax.ShapeDtypeStruct
    x, place = new((6, 512), jnp.bfloat16), new((12, 8), jnp.int32)
    mesh = make_mesh(devices=jax.devices()[:2], ep=2)
    with jax.set_mesh(mesh):
        assert peer_rows_implementation(x, place, 2) == "xla"
    with plgpu.force_gpu_interpret_mode():
        with jax.set_mesh(mesh):
            assert peer_rows_implementation(x, place, 2) == "mosaic_gpu"
            for args, reason in [
                ((x, place, 1), "2 to 8 devices"),
                ((new((6, 520), jnp.bfloat16), place, 2), "multiple of 256"),
                ((x, new((12, 9), jnp.int32), 2), "up to 8 places"),
                ((new((6, 512), jnp.int8), place, 2), "2 or 4 bytes"),
                ((new((6, 8192), jnp.bfloat16), place, 2), "rows of two tokens"),
            ]:
                with pytest.raises(NotImplementedError, match=reason):
                    peer_rows_implementation(*args, implementation="mosaic_gpu")
        two = make_mesh(devices=jax.devices()[2:4], ep=2)
        wrong = pytest.raises(NotImplementedError, match=r"in this order, all on one axis. Got \[2, 3\]")
        with jax.set_mesh(two), wrong:
            peer_rows_implementation(x, place, 2, implementation="mosaic_gpu")


def test_bad_input():
    def call(x, token, place):
        return jax.eval_shape(jax.shard_map(lambda *a: spread_from_peers(*a, "ep"), in_specs=P(), out_specs=P()), *(
            jax.ShapeDtypeStruct(*s) for s in (x, token, place)))  # fmt: skip

    with jax.set_mesh(make_mesh(devices=jax.devices()[:2], ep=2)):
        with pytest.raises(ValueError, match=r"takes places of 2 x 6 rows. Got \(10, 2\)"):
            call(((6, 8), "float32"), ((9,), "int32"), ((10, 2), "int32"))
        with pytest.raises(ValueError, match="must be int32"):
            call(((6, 8), "float32"), ((9,), "int16"), ((12, 2), "int32"))
        with pytest.raises(ValueError, match=r"place \[devices \* n, K\]. Got rows \(6, 8\)"):
            call(((6, 8), "float32"), ((9,), "int32"), ((11, 2), "int32"))
