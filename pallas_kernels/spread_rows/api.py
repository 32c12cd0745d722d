"""The public function: checks its input, picks a backend, runs it."""

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has supported(x, token, place) -> None | reason, or can run any call, and
# spread_rows(x, token, place).
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.spread_rows.pallas_mosaic_gpu",
    "xla": "pallas_kernels.spread_rows.xla",
}


def spread_rows(x: jax.Array, token: jax.Array, place: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """out[r] = x[token[r]]: tokens to their experts. A row r without a token holds anything, nan included.

    Args:
      x: [n, D].
      token: int32 [R]; n or more: none.
      place: int32 [n, K], the same from the other side: place[t, k] = r if and only if token[r] = t; R or more: none.
        A kernel reads each row of x once and writes it K times, where a gather reads it K times.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [R, D]. No gradient: that of `jaxscale.parallel.permute.spread` is a gather too.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    shapes = f"x {x.shape}, token {token.dtype}{token.shape}, place {place.dtype}{place.shape}"
    if x.ndim != 2 or token.ndim != 1 or place.ndim != 2 or place.shape[0] != x.shape[0]:
        raise ValueError(f"spread_rows takes x [n,D], token [R], place [n,K]. Got {shapes}")
    if token.dtype != jnp.int32 or place.dtype != jnp.int32:
        raise ValueError(f"spread_rows: token and place must be int32. Got {shapes}")
    backend = _choose(x, token, place, implementation)
    x, token, place = unify_vma((x, token, place))
    if x.size == 0:  # no row has a token
        return jnp.zeros_like(x, shape=(token.shape[0], x.shape[1]))
    return importlib.import_module(BACKENDS[backend]).spread_rows(x, token, place)


def spread_rows_implementation(x, token, place, *, implementation: str | None = None) -> str:
    """The backend that `spread_rows` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    return _choose(x, token, place, implementation)


def _choose(x, token, place, implementation: str | None) -> str:
    def check(name):
        supported = getattr(importlib.import_module(BACKENDS[name]), "supported", None)
        return lambda: supported(x, token, place) if supported else None

    return _dispatch.choose("spread_rows", implementation, {name: check(name) for name in BACKENDS})
