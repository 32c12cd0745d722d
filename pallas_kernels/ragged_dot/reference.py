"""The formula: a loop over groups, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_dot.schedule import bounds


def grouped(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype, *, transposed: bool = False) -> jax.Array:
    """[M, N]: rows of group g times rhs[g] [K, N], or times the transpose of rhs[g] [N, K]; zeros past the groups."""
    out = jnp.zeros((lhs.shape[0], rhs.shape[1 if transposed else 2]), jnp.float32)
    for g, rows in enumerate(_rows(group_sizes, lhs.shape[0])):
        matrix = rhs[g].T if transposed else rhs[g]
        out = jnp.where(rows[:, None], _dot(lhs, matrix), out)
    return out.astype(dtype)


def contraction(lhs: jax.Array, grad: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """[G, K, N]: lhs.T @ grad over the rows of each group."""
    rows = _rows(group_sizes, lhs.shape[0])
    pick = lambda x, mine: jnp.where(mine[:, None], x, jnp.zeros((), x.dtype))
    return jnp.stack([_dot(pick(lhs, mine).T, pick(grad, mine)) for mine in rows]).astype(dtype)


def _rows(group_sizes: jax.Array, M: int) -> list[jax.Array]:
    """bool [M] of each group: its rows."""
    row = jnp.arange(M, dtype=jnp.int32)
    begins, ends = bounds(group_sizes, M)
    return [(row >= begins[g]) & (row < ends[g]) for g in range(group_sizes.shape[0])]


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")
