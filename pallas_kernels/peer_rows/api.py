"""The public functions: check their input, pick a backend, run it. Inside shard_map, over one mesh axis."""

import importlib

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has supported(rows, place, devices) -> None | reason, or can run any call, and
# the two functions.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.peer_rows.pallas_mosaic_gpu",
    "xla": "pallas_kernels.peer_rows.xla",
}


def spread_from_peers(
    x: jax.Array, token: jax.Array, place: jax.Array, axis: str, *, implementation: str | None = None
) -> jax.Array:
    """`spread_rows` of the rows of all devices of a mesh axis, one after the other, without gathering them first.

    Args:
      x: [n, D], of this device.
      token: int32 [R], a number among the S n rows of all S devices; S n or more: none.
      place: int32 [S n, K], the same from the other side: place[t, k] = r if and only if token[r] = t; R or more: none.

    Returns:
      [R, D]; a row without a token holds anything, nan included. No gradient: it is `collect_at_home`.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    devices = lax.axis_size(axis)
    _check(x, place, devices, token)
    if x.shape[0] * devices != place.shape[0]:
        raise ValueError(f"spread_from_peers takes places of {devices} x {x.shape[0]} rows. Got {place.shape}")
    backend = peer_rows_implementation(x, place, devices, implementation=implementation)
    x, token, place = unify_vma((x, token, place))
    return importlib.import_module(BACKENDS[backend]).spread_from_peers(x, token, place, axis)


def collect_at_home(y: jax.Array, place: jax.Array, axis: str, *, implementation: str | None = None) -> jax.Array:
    """The sum over a token's places on all devices of a mesh axis, each token's on the device that holds it.

    Args:
      y: [R, D], rows of this device.
      place: int32 [S n, K]: where on this device the tokens of all S devices have rows; R or more: nowhere.

    Returns:
      [n, D] in y's dtype: float32 sums of each device, rounded to it, added up. No gradient: it is `spread_from_peers`.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    devices = lax.axis_size(axis)
    _check(y, place, devices)
    backend = peer_rows_implementation(y, place, devices, implementation=implementation)
    y, place = unify_vma((y, place))
    return importlib.import_module(BACKENDS[backend]).collect_at_home(y, place, axis)


def peer_rows_implementation(rows, place, devices: int, *, implementation: str | None = None) -> str:
    """The backend that both run for rows [.., D] and place [devices * n, K], here; arrays may be ShapeDtypeStruct."""

    def check(name):
        supported = getattr(importlib.import_module(BACKENDS[name]), "supported", None)
        return lambda: supported(rows, place, devices) if supported else None

    return _dispatch.choose("peer_rows", implementation, {name: check(name) for name in BACKENDS})


def _check(rows, place, devices: int, *tables) -> None:
    shapes = f"rows {rows.shape}, place {place.dtype}{place.shape}, {devices} devices"
    if rows.ndim != 2 or place.ndim != 2 or place.shape[0] % devices or any(t.ndim != 1 for t in tables):
        raise ValueError(f"peer rows are [.., D], token [R], place [devices * n, K]. Got {shapes}")
    if any(table.dtype != jnp.int32 for table in (place, *tables)):
        raise ValueError(f"peer rows: token and place must be int32. Got {shapes}")
