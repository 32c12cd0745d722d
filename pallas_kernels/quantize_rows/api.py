"""The public function: checks its input, picks a backend, runs it."""

import functools
import importlib
from typing import get_args

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.quantize_rows.xla import held_as
from pallas_kernels.quantized_matmul.array import Activations

# In the order of preference. Each module has quantize_rows(x, groups, dtype, outliers), and
# supported(x, groups, outliers) -> None | reason.
BACKENDS = {
    "triton": "pallas_kernels.quantize_rows.triton",
    "xla": "pallas_kernels.quantize_rows.xla",
}


def quantize_rows(
    x: jax.Array,
    groups: int,
    dtype: Activations,
    outliers: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Activations [M, K] -> values [M, K] in int8 or float8 and float32 scales [M, groups], as matmuls take them.

    A scale makes its group's largest number the largest of the format; a group of zeros has a scale of 0, one with
    infinity or nan one that is not finite. Values of 4 bits, -7 to 7, are int8 too: what they are multiplied in where
    no matmul of 4 bits is to be had.

    Args:
      x: float32, bfloat16 or float16.
      groups: how many parts of a row have scales of their own; divides K.
      dtype: "int8", "int4" or "float8_e4m3fn".
      outliers: bool [groups]: where dtype is int4, the groups that keep 8 bits.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    if x.ndim != 2 or x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"quantize_rows takes [M, K] in float32, bfloat16 or float16. Got {x.dtype}{list(x.shape)}")
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"quantize_rows: {groups} groups do not divide the K={x.shape[1]} numbers of a row")
    if dtype not in get_args(Activations) or (
        outliers is not None and (dtype != "int4" or outliers.shape != (groups,) or outliers.dtype != jnp.bool)
    ):
        found = None if outliers is None else f"{outliers.dtype}{list(outliers.shape)}"
        raise ValueError(
            f"quantize_rows rounds to {get_args(Activations)}, outliers bool[{groups}] beside int4. "
            f"Got {dtype}, {found}"
        )
    backend = quantize_rows_implementation(x, groups, outliers, implementation=implementation)
    if x.size == 0:
        return jnp.zeros(x.shape, held_as(dtype)), jnp.zeros((x.shape[0], groups))
    if outliers is not None:
        x, outliers = unify_vma((x, outliers))
    return importlib.import_module(BACKENDS[backend]).quantize_rows(x, groups, dtype, outliers)


def quantize_rows_implementation(x, groups: int, outliers=None, *, implementation: str | None = None) -> str:
    """The backend that `quantize_rows` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    check = lambda name: importlib.import_module(BACKENDS[name]).supported(x, groups, outliers)
    return _dispatch.choose(
        "quantize_rows", implementation, {name: functools.partial(check, name) for name in BACKENDS}
    )
