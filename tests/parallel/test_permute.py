"""Rows to their places and back: values and gradients against loops in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.parallel import permute
from jaxscale.parallel.permute import Places, collect, merge_sorted, sort_pairs, spread


def some_places(rng, n, K, R):
    """Each place has at most one token, each token at most K places, in any of its columns."""
    token, place = np.full(R, n), np.full((n, K), R)
    for r in rng.permutation(R)[: int(0.7 * R)]:
        free = np.argwhere(place == R)
        if len(free):
            t, k = free[rng.integers(len(free))]
            token[r], place[t, k] = t, r
    return Places(jnp.asarray(token, jnp.int32), jnp.asarray(place, jnp.int32))


@pytest.mark.parametrize(("n", "K", "R"), [(7, 3, 15), (5, 1, 9), (4, 19, 40)])  # 19: more than are written out
def test_spread_and_collect(rng, n, K, R):
    places = some_places(rng, n, K, R)
    token = np.asarray(places.token)
    assert K < 19 or np.any(np.asarray(places.place)[:, permute.UNROLLED :] < R)
    x, y = rng.standard_normal((n, 6), np.float32), rng.standard_normal((R, 6), np.float32)
    held = token < n  # the other places hold anything
    out = x[token[held]]
    back = np.zeros((n + 1, 6))
    np.add.at(back, token, y.astype(np.float64))
    got, vjp = jax.vjp(jax.jit(lambda x: spread(x, places)), x)
    np.testing.assert_array_equal(got[held], out)
    np.testing.assert_allclose(vjp(y)[0], back[:n], atol=1e-5)
    got, vjp = jax.vjp(jax.jit(lambda y: collect(y, places)), y)
    np.testing.assert_allclose(got, back[:n], atol=1e-5)
    np.testing.assert_array_equal(vjp(x)[0][held], out)


def test_dtypes(rng):
    """Sums are float32, gradients have the dtype of what they belong to."""
    places = some_places(rng, 4, 2, 8)
    x, y = jnp.ones((4, 3), jnp.bfloat16), jnp.ones((8, 3), jnp.bfloat16)
    out, vjp = jax.vjp(lambda x: spread(x, places), x)
    assert out.dtype == vjp(out)[0].dtype == jnp.bfloat16
    out, vjp = jax.vjp(lambda y: collect(y, places), y)
    assert out.dtype == jnp.float32 and vjp(out)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("limit", [2**31, 0], ids=["one number", "two numbers"])
@pytest.mark.parametrize(("m", "keys"), [(40, 5), (1, 1)])
def test_sort_pairs(rng, monkeypatch, m, keys, limit):
    monkeypatch.setattr(permute, "_ONE_NUMBER", limit)
    key = rng.integers(0, keys + 1, size=m)
    pairs = jax.jit(functools.partial(sort_pairs, keys=keys))(jnp.asarray(key, jnp.int32))
    order = np.argsort(key, kind="stable")
    np.testing.assert_array_equal(pairs.pair, order)
    np.testing.assert_array_equal(np.asarray(pairs.place)[order], np.arange(m))
    np.testing.assert_array_equal(pairs.starts, np.searchsorted(key[order], np.arange(keys + 1)))


def test_merge_sorted(rng):
    """Lists that were sorted apart, by keys of which the merged order has some: as if they were sorted as one."""
    lists, m, first, keys = rng.integers(1, 4), rng.integers(1, 30), 2, 3
    key = jnp.asarray(rng.integers(0, 8, size=(lists, m)), jnp.int32)
    each = [sort_pairs(k, 7) for k in key]
    place, starts = (jnp.stack([getattr(pairs, name) for pairs in each]) for name in ("place", "starts"))
    local = jnp.where((key >= first) & (key < first + keys), key - first, keys)
    got = jax.jit(merge_sorted)(local, place, starts[:, first : first + keys + 1])
    want = sort_pairs(local.reshape(-1), keys)
    used = int(want.starts[-1])
    np.testing.assert_array_equal(got.starts, want.starts)
    np.testing.assert_array_equal(got.pair[:used], want.pair[:used])
    here = np.asarray(want.place) < used
    np.testing.assert_array_equal(np.asarray(got.place)[here], np.asarray(want.place)[here])
    assert (np.asarray(got.place)[~here] >= used).all()


def test_expand(rng):
    """The first rows of the sorted pairs, six tokens of three pairs each, some of them nobody's."""
    key = rng.integers(0, 5, size=18)  # 4: nobody's
    pairs = sort_pairs(jnp.asarray(key, jnp.int32), 4)
    rows = int((key < 4).sum()) + 2
    tokens, single = pairs.expand(rows, 3)
    for r, pair in enumerate(np.asarray(single.token)):
        mine = r < rows - 2
        assert (pair < 18) == mine and np.asarray(tokens.token)[r] == pair // 3
        if mine:
            assert np.asarray(single.place)[pair, 0] == r and np.asarray(tokens.place)[pair // 3, pair % 3] == r
    assert np.sum(np.asarray(tokens.place) < rows) == rows - 2
