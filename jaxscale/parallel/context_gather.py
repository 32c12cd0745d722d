"""Context parallelism by gathering keys and values; their gradients are summed as they are scattered."""

import jax.numpy as jnp
from jax import lax

from jaxscale.parallel.context_blocks import Call, Cotangent, block, block_bwd
from jaxscale.parallel.context_rows import PairOfRows, dealt, in_order


def _gather(call: Call, x):
    return in_order(lax.all_gather(x, call.axis_name, axis=1, tiled=True), call.layout, call.size)


def all_gather(call: Call, q, k, v, rows: PairOfRows):
    own, keys = rows.queries(call, q, 1), rows.keys(call, k, call.size).at(0)
    return block(call, q, _gather(call, k), _gather(call, v), own, keys)


def all_gather_bwd(call: Call, q, k, v, rows: PairOfRows, cotangent: Cotangent):
    own, keys = rows.queries(call, q, 1), rows.keys(call, k, call.size).at(0)
    dq, dk, dv = block_bwd(call, q, _gather(call, k), _gather(call, v), own, keys, cotangent)

    def scatter(x):
        x = dealt(x.astype(jnp.float32), call.layout, call.size)
        return lax.psum_scatter(x, call.axis_name, scatter_dimension=1, tiled=True)

    return dq, scatter(dk), scatter(dv)
