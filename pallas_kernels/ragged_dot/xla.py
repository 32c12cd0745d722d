"""Grouped matmul in plain XLA: what runs where no kernel does.

On a TPU XLA has an instruction for jax.lax.ragged_dot. Elsewhere it lowers to one dense matmul over all groups, with
the rows of the others masked: G times the work, and a copy of lhs for each group (9 TFLOP/s on an H200 with 64 groups).
That is taken only while it is small. Above, a loop over tiles, each with rows of one group, multiplies what there is to
multiply and no more than one tile of rows for each group beside it.
"""

import re

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dispatch
from pallas_kernels.ragged_dot.schedule import bounds, make_tiles

_DENSE_ROWS = 1 << 16  # rows of all groups' masked copies of lhs; a step of the loop costs a GPU some 10 us
_SMALLEST, _LARGEST = 16, 512  # rows of a tile

_CONTRACTION = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype, *, transposed: bool = False) -> jax.Array:
    """[M, N]: rows of group g times rhs[g] [K, N], or times the transpose of rhs[g] [N, K]; zeros past the groups."""
    M, G = lhs.shape[0], rhs.shape[0]
    N = rhs.shape[1 if transposed else 2]
    if _dense(M, G):
        contract = 2 if transposed else 1
        numbers = lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(([1], [contract]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
        )
        return _ragged(lhs, rhs, group_sizes, numbers).astype(dtype)
    block = _block(M, G)
    tiles = make_tiles(group_sizes, M, block)
    lhs = jnp.pad(lhs, ((0, block), (0, 0)))

    def step(out, tile):
        group, start = tile[0], tile[1]
        matrix = lax.dynamic_index_in_dim(rhs, group, keepdims=False)
        matrix = matrix.T if transposed else matrix
        rows = lax.dynamic_slice_in_dim(lhs, start, block)
        y = jnp.dot(rows, matrix, preferred_element_type=jnp.float32).astype(dtype)
        # Rows after the tile's own belong to later tiles, which write them again.
        return lax.dynamic_update_slice_in_dim(out, y, start, 0), None

    out = jnp.zeros_like(lhs, dtype=dtype, shape=(M + block, N))
    out = lax.scan(step, out, tiles.table)[0][:M]
    used = jnp.arange(M, dtype=jnp.int32) < bounds(group_sizes, M)[1][-1]
    return jnp.where(used[:, None], out, jnp.zeros((), dtype))


def contraction(lhs: jax.Array, grad: jax.Array, group_sizes: jax.Array, dtype) -> jax.Array:
    """[G, K, N]: lhs.T @ grad over the rows of each group."""
    M, G = lhs.shape[0], group_sizes.shape[0]
    if _dense(M, G):
        return _ragged(lhs, grad, group_sizes, _CONTRACTION).astype(dtype)
    block = _block(M, G)
    tiles = make_tiles(group_sizes, M, block)
    lhs, grad = (jnp.pad(x, ((0, block), (0, 0))) for x in (lhs, grad))

    def step(sums, tile):
        group, start, begin, end = (tile[i] for i in range(4))
        row = start + jnp.arange(block, dtype=jnp.int32)[:, None]
        own = (row >= begin) & (row < end)
        x, y = (lax.dynamic_slice_in_dim(a, start, block) for a in (lhs, grad))
        x, y = (jnp.where(own, a, jnp.zeros((), a.dtype)) for a in (x, y))
        product = jnp.dot(x.T, y, preferred_element_type=jnp.float32)
        # The rows after the last group go to a place that is cut off.
        return sums.at[group].add(product), None

    sums = jnp.zeros_like(lhs, dtype=jnp.float32, shape=(G + 1, lhs.shape[1], grad.shape[1]))
    return lax.scan(step, sums, tiles.table)[0][:G].astype(dtype)


def _ragged(x: jax.Array, y: jax.Array, group_sizes: jax.Array, numbers: lax.RaggedDotDimensionNumbers) -> jax.Array:
    """lax.ragged_dot_general, float32; under vmap, whose rule in JAX takes no operand that all share, one by one."""
    begins, ends = bounds(group_sizes, x.shape[0])
    dot = lambda x, y, sizes: lax.ragged_dot_general(x, y, sizes, numbers, preferred_element_type=jnp.float32)
    return jax.custom_batching.sequential_vmap(dot)(x, y, ends - begins)


def _dense(M: int, G: int) -> bool:
    return M * G <= _DENSE_ROWS or re.match("TPU", _dispatch.device_kind()) is not None


def _block(M: int, G: int) -> int:
    """A power of two near the mean size of a group: half of a tile per group is lost on the average."""
    block = _SMALLEST
    while block < _LARGEST and 2 * block * G <= M:
        block *= 2
    return block
