"""Quantization-aware training: weights, and what they meet, are rounded and multiplied in their own dtype."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale.quantize.layouts import whole
from jaxscale.quantize.recipe import Rounding
from jaxscale.sharding import Weight, active_mesh
from pallas_kernels.quantize_rows.api import quantize_rows
from pallas_kernels.quantized_matmul.array import quantize_array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("rounding", "contraction"))
@dataclasses.dataclass(frozen=True)
class FakeQuantized(Weight):
    """A weight in quantization-aware training: it and what it meets are rounded and multiplied in their own dtype."""

    value: jax.Array
    rounding: Rounding
    contraction: tuple[int, ...]

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        r, w = self.rounding, self.value

        def fake_weight(w):
            q = quantize_array(w, r.format, contraction=self.contraction, group=r.group, symmetric=r.symmetric)
            return q.dequantize(w.dtype)

        def fake_rows(x):
            assert r.activations is not None
            rows = x.reshape(-1, math.prod(w.shape[d] for d in self.contraction))
            groups = 1 if r.group is None else rows.shape[1] // r.group
            near = quantize_rows(rows, groups, r.activations, implementation="xla")  # on any mesh
            return near.dequantize().reshape(x.shape).astype(x.dtype)

        if r.activations is not None:
            x = straight_through(fake_rows, x)
        return jnp.einsum(subscripts, x, straight_through(fake_weight, w), **options)


def straight_through(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """fn(x), with the gradient of x; on a mesh left to the partitioner."""
    if active_mesh() is None:
        return x + jax.lax.stop_gradient(fn(jax.lax.stop_gradient(x)) - x)
    spec = jax.typeof(x).sharding.spec
    there = jax.sharding.auto_axes(fn, out_sharding=P(*spec.partitions))

    @jax.custom_vjp
    def through(x):
        return jax.reshard(there(whole(x)), spec)

    through.defvjp(lambda x: (through(x), None), lambda _, grad: (grad,))
    return through(x)
