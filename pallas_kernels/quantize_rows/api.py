"""The public function: checks its input, picks a backend, runs it."""

import functools
import importlib
from typing import get_args

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.quantize_rows.xla import held_as
from pallas_kernels.quantized_matmul.array import Activations, QuantizedArray, QuantizedRows

# In the order of preference. Each module has quantize_rows(x, groups, dtype, outliers) -> values, scales, and
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
) -> QuantizedRows:
    """Activations [M, K] rounded to int8 or float8, as `quantized_matmul` and `ragged_dot` take them.

    A scale makes its group's largest number the largest of the format; a group of zeros has a scale of 0, one with
    infinity or nan one that is not finite. Values of 4 bits, -7 to 7, are int8 too: what they are multiplied in where
    no matmul of 4 bits is to be had. No gradient: matmuls that are given x, and round it, pass one on straight-through.

    Args:
      x: float32, bfloat16 or float16.
      groups: how many parts of a row have scales of their own; divides K.
      dtype: "int8", "int4" or "float8_e4m3fn".
      outliers: bool [groups]: where dtype is int4, the groups that keep 8 bits.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call; a gradient is asked for.
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
    x = jnp.asarray(_without_gradient(x))
    if outliers is not None:
        x, outliers = unify_vma((x, outliers))
    if x.size == 0:
        values, scales = jnp.zeros(x.shape, held_as(dtype)), jnp.zeros((x.shape[0], groups))
        return QuantizedRows(values, scales, dtype, jnp.dtype(x.dtype))
    values, scales = importlib.import_module(BACKENDS[backend]).quantize_rows(x, groups, dtype, outliers)
    return QuantizedRows(values, scales, dtype, jnp.dtype(x.dtype))


def rows_for(x: jax.Array | QuantizedRows, w: QuantizedArray, *, implementation: str | None = None) -> QuantizedRows:
    """x [M, K] rounded as w [.., K, N] asks for it; rows that are rounded already as they are."""
    if isinstance(x, QuantizedRows):
        return x
    assert w.activations is not None
    return quantize_rows(x, w.scales.shape[-1], w.activations, w.outliers, implementation=implementation)


def check_rounded(rows: QuantizedRows, w: QuantizedArray) -> None:
    """ValueError where rows that are rounded already are not as w [.., K, N] asks for them."""
    if w.inputs is not None:
        raise ValueError("rows that are rounded already cannot be multiplied with the weight's inputs; give the array")
    S = w.scales.shape[-1]
    if (rows.format, rows.scales.shape[-1]) != (w.activations, S):
        asked = "none that are rounded" if w.activations is None else f"quantize_rows(x, {S}, {w.activations!r})"
        raise ValueError(
            f"the weight takes {asked}. Got rows in {rows.format} with {rows.scales.shape[-1]} scales each"
        )


@jax.custom_vjp
def _without_gradient(x: jax.Array) -> jax.Array:
    return x


def _refuse(*_):
    raise NotImplementedError(
        "quantize_rows has no gradient; give the matmul the array: it rounds it, and passes the gradient on"
    )


_without_gradient.defvjp(_refuse, _refuse)


def quantize_rows_implementation(x, groups: int, outliers=None, *, implementation: str | None = None) -> str:
    """The backend that `quantize_rows` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    check = lambda name: importlib.import_module(BACKENDS[name]).supported(x, groups, outliers)
    return _dispatch.choose(
        "quantize_rows", implementation, {name: functools.partial(check, name) for name in BACKENDS}
    )
