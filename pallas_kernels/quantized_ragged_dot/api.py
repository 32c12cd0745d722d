"""ragged_dot of a QuantizedArray: checks its input, picks a backend, runs it; the gradient to the rows."""

import dataclasses
import functools
import importlib
import types

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.quantize_rows.api import check_rounded
from pallas_kernels.quantized_matmul.api import check_array
from pallas_kernels.quantized_matmul.array import QuantizedArray, QuantizedRows
from pallas_kernels.ragged_dot.checks import check_rows
from pallas_kernels.ragged_dot.schedule import row_groups

# In the order of preference. Each module has grouped(lhs, rhs, group_sizes, dtype) -> [M, N] for an rhs from
# `prepare`, and may have supported(lhs, rhs, dtype) -> None | reason.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.quantized_ragged_dot.pallas_mosaic_gpu",
    "xla": "pallas_kernels.quantized_ragged_dot.xla",
    "reference": "pallas_kernels.quantized_ragged_dot.reference",
}


def quantized_ragged_dot(
    lhs: jax.Array | QuantizedRows,
    rhs: QuantizedArray,
    group_sizes: jax.Array,
    *,
    preferred_element_type=None,
    implementation: str | None = None,
) -> jax.Array:
    """`ragged_dot`, which see, by quantized matrices: rows in groups, each group times a matrix of its own.

    Sums are float32. The gradient reaches lhs alone, through the matrices as they are (activations that are rounded
    pass it on straight-through); they have none, nor have rows that are rounded already.

    Args:
      lhs: [M, K], float32, bfloat16 or float16; or what `quantize_rows` makes of it as rhs asks for it.
      rhs: a QuantizedArray of shape [G, K, N]: values [G, N, K].
      group_sizes: int32 [G], in rows.
      preferred_element_type: dtype of the output, floating; that of lhs by default.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [M, N].

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    dtype = _check(lhs, rhs, group_sizes, preferred_element_type)
    if rhs.inputs is not None:
        assert isinstance(lhs, jax.Array)
        lhs = lhs * _inputs(rhs, group_sizes, lhs)
    rhs = prepare(rhs.natural())
    backend = _choose(lhs, rhs, dtype, implementation)
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    lhs, group_sizes, rhs = unify_vma((lhs, group_sizes, rhs))
    return _grouped(lhs, rhs, group_sizes, dtype, backend)


def quantized_ragged_dot_implementation(
    lhs, rhs, group_sizes, *, preferred_element_type=None, implementation=None
) -> str:
    """The backend that `quantized_ragged_dot` runs for the same arguments; arrays may be jax.ShapeDtypeStruct."""
    dtype = _check(lhs, rhs, group_sizes, preferred_element_type)
    return _choose(lhs, jax.eval_shape(prepare, rhs), dtype, implementation)


def prepare(w: QuantizedArray) -> QuantizedArray:
    """The same matrices without `inputs`, their offsets, where there are any, float32 for values as they lie."""
    return dataclasses.replace(w, offsets=w.effective_offsets(), unsigned=False, inputs=None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped(
    lhs: jax.Array | QuantizedRows, rhs: QuantizedArray, group_sizes: jax.Array, dtype, backend: str
) -> jax.Array:
    return _module(backend).grouped(lhs, rhs, group_sizes, dtype)


def _grouped_fwd(lhs: jax.Array | QuantizedRows, rhs: QuantizedArray, group_sizes: jax.Array, dtype, backend: str):
    """Residuals: the matrices, the sizes, and an array that says the dtype of lhs."""
    if isinstance(lhs, QuantizedRows):
        raise NotImplementedError("ragged_dot of rounded rows has no gradient; give it the array")
    return _grouped(lhs, rhs, group_sizes, dtype, backend), (rhs, group_sizes, jnp.zeros((), lhs.dtype))


def _grouped_bwd(dtype, backend: str, residuals, grad: jax.Array):
    del dtype, backend
    from pallas_kernels.ragged_dot.api import ragged_dot

    rhs, group_sizes, like = residuals
    transposed = rhs.dequantize(like.dtype).transpose(0, 2, 1)
    return ragged_dot(grad.astype(like.dtype), transposed, group_sizes), None, None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)


def _inputs(rhs: QuantizedArray, group_sizes: jax.Array, lhs: jax.Array) -> jax.Array:
    """What each row of lhs is multiplied with: [M, K], or [1, K] where all matrices share it."""
    assert rhs.inputs is not None
    inputs = rhs.inputs.reshape(-1, rhs.inputs.shape[-1]).astype(lhs.dtype)
    return inputs if inputs.shape[0] == 1 else inputs[row_groups(group_sizes, lhs.shape[0])]


def _module(backend: str) -> types.ModuleType:
    return importlib.import_module(BACKENDS[backend])


def _choose(lhs, rhs: QuantizedArray, dtype, implementation: str | None) -> str:
    def check(name):
        supported = getattr(_module(name), "supported", None)
        return supported(lhs, rhs, dtype) if supported else None

    return _dispatch.choose(
        "ragged_dot of a QuantizedArray", implementation, {name: functools.partial(check, name) for name in BACKENDS}
    )


def _check(lhs, rhs: QuantizedArray, group_sizes, preferred_element_type):
    """Every check of the public function's input; the dtype of the output."""
    check_array("ragged_dot", rhs)
    takes = "a QuantizedArray [G,K,N] that contracts its dim -2"
    if rhs.contraction != (-2,):
        raise ValueError(f"ragged_dot takes {takes} as rhs. Got {rhs.shape}, contraction {rhs.contraction}")
    dtype = check_rows(lhs, rhs, group_sizes, preferred_element_type, takes)
    if rhs.inputs is not None and rhs.inputs.shape not in ((rhs.shape[1],), (1, rhs.shape[1]), rhs.shape[:2]):
        raise ValueError(
            f"ragged_dot: inputs {rhs.inputs.shape} must be [K] or [G, K] = {rhs.shape[:2]}, "
            "one row for all matrices or one for each"
        )
    if isinstance(lhs, QuantizedRows):
        check_rounded(lhs, rhs)
    if rhs.outliers is not None:
        raise ValueError(
            f"ragged_dot rounds all groups of a row alike; leave outliers {rhs.outliers.shape} out, or use "
            "activations='int8'"
        )
    return dtype
