"""spread_rows: each row at each of its places, by every backend; what stands at nobody's place never matters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxscale.parallel import permute
from jaxscale.parallel.expert import apply_experts
from pallas_kernels import spread_rows, spread_rows_implementation
from pallas_kernels.spread_rows import pallas_mosaic_gpu


def places(rng, n, K, rows):
    """token, place: some rows are nobody's, some choices have no row."""
    place = np.full(n * K, rows, np.int32)
    pairs = rng.permutation(n * K)[: rng.integers(1, min(n * K, rows) + 1)]
    place[pairs] = rng.permutation(rows)[: len(pairs)]
    token = np.full(rows, n, np.int32)
    token[place[pairs]] = pairs // K
    return jnp.asarray(token), jnp.asarray(place.reshape(n, K))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
@pytest.mark.parametrize(
    ("n", "K", "D", "dtype"), [(37, 3, 64, "bfloat16"), (90, 1, 256, "float32"), (50, 4, 128, "float8_e4m3fn")]
)
def test_every_row_at_its_places(implementation, n, K, D, dtype, rng, monkeypatch):
    monkeypatch.setattr(pallas_mosaic_gpu, "_BLOCKS", 2)  # fewer to interpret, with more rows each
    rows = int(rng.integers(1, n * K + 20))
    token, place = places(rng, n, K, rows)
    x = jnp.asarray(rng.standard_normal((n, D)), dtype)
    run = functools.partial(spread_rows, implementation=implementation)
    if implementation == "mosaic_gpu":
        with plgpu.force_gpu_interpret_mode():
            out = run(x, token, place)
    else:
        out = run(x, token, place)
    used = np.asarray(token) < n
    out, x = (np.asarray(a.astype(jnp.float32)) for a in (out, x))
    np.testing.assert_array_equal(out[used], x[np.asarray(token)[used]])


def test_what_it_runs_on():
    new = jax.ShapeDtypeStruct
    call = new((4, 64), jnp.bfloat16), new((9,), jnp.int32), new((4, 2), jnp.int32)
    assert spread_rows_implementation(*call) == "xla"
    with plgpu.force_gpu_interpret_mode():
        assert spread_rows_implementation(*call) == "mosaic_gpu"
        for x, place, reason in [
            (new((4, 65), jnp.bfloat16), call[2], "multiple of 64"),
            (call[0], new((4, 17), jnp.int32), "up to 16 places"),
            (new((4, 64), np.float64), call[2], "1, 2 or 4 bytes"),
            (new((4, 2**15), jnp.float32), call[2], "two rows of each"),
        ]:
            with pytest.raises(NotImplementedError, match=reason):
                spread_rows_implementation(x, call[1], place, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"place \[n,K\]. Got x \(4, 64\)"):
        spread_rows(jnp.zeros((4, 64)), jnp.zeros(9, jnp.int32), jnp.zeros((5, 2), jnp.int32))
    with pytest.raises(ValueError, match="must be int32"):
        spread_rows(jnp.zeros((4, 64)), jnp.zeros(9), jnp.zeros((4, 2), jnp.int32))


def test_what_is_nobodys_does_not_matter(rng, monkeypatch):
    """nan where no token stands changes neither outputs nor gradients, biases included."""
    E, D, F, n, K = 4, 8, 8, 13, 2
    new = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    p = {"w_gate": new(E, D, F), "w_up": new(E, D, F), "w_down": new(E, F, D)}
    p |= {"b_gate": new(E, F), "b_up": new(E, F), "b_down": new(E, D)}
    x, weights, grad = new(1, n, D), new(1, n, K), new(1, n, D)
    experts = jnp.asarray(rng.integers(-1, E + 2, (1, n, K)), jnp.int32)  # many are nobody's

    def run():
        layer = lambda x, weights, p: apply_experts(x, experts, weights, p, activation="gpt_oss")
        out, vjp = jax.vjp(layer, x, weights, p)
        return out, vjp(grad)

    expected = run()
    poisoned = lambda x, token, place: jnp.take(x, token, axis=0, mode="fill", fill_value=np.nan)
    monkeypatch.setattr(permute, "spread_rows", poisoned)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_tokens():
    rows = spread_rows(jnp.zeros((0, 8)), jnp.zeros(5, jnp.int32), jnp.zeros((0, 2), jnp.int32))
    assert rows.shape == (5, 8)
