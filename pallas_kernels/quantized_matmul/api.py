"""The public function: checks its input, picks a backend, runs it; the gradient to the activations."""

import dataclasses
import functools
import importlib
import math
import types

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.quantize_rows.api import check_rounded
from pallas_kernels.quantized_matmul.array import QuantizedArray, QuantizedRows, check_activations

# In the order of preference. Each module has matmul(x [M, K], w, dtype) -> [M, N] for a w from `QuantizedArray.flat`
# without `inputs`, and may have supported(x, w, dtype) -> None | reason.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.quantized_matmul.pallas_mosaic_gpu",
    "triton": "pallas_kernels.quantized_matmul.triton",
    "mosaic_tpu": "pallas_kernels.quantized_matmul.pallas_mosaic_tpu",
    "xla": "pallas_kernels.quantized_matmul.xla",
    "reference": "pallas_kernels.quantized_matmul.reference",
}

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_VALUES = (jnp.int4, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float4_e2m1fn)


def quantized_matmul(
    x: jax.Array | QuantizedRows,
    w: QuantizedArray,
    *,
    preferred_element_type=None,
    implementation: str | None = None,
) -> jax.Array:
    """`x @ w` for a quantized w, over all of its contracted dims: `jnp.tensordot` of x's last dims with those of w.

    Sums are float32. The gradient reaches x alone, through the weight as it is (activations that are rounded pass it
    on straight-through); the weight has none, nor have rows that are rounded already.

    Args:
      x: [..., *contracted], float32, bfloat16 or float16; or [M, K] from `quantize_rows` as w asks for it, with the K
        numbers that w contracts: what meets several weights is rounded once.
      w: values [*outputs, *contracted].
      preferred_element_type: dtype of the output, floating; that of x by default.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [..., *outputs].

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    dtype = _check(x, w, preferred_element_type)
    inner = len(w.contraction)
    outputs = w.values.shape[: w.ndim - inner]
    if isinstance(x, QuantizedRows):
        rows = x.shape[:1]
    else:
        rows = x.shape[: x.ndim - inner]
        x = x.reshape(math.prod(rows), math.prod(x.shape[x.ndim - inner :]))
    if w.inputs is not None:
        assert isinstance(x, jax.Array)
        x = x * w.inputs.astype(x.dtype)[None]
    flat = dataclasses.replace(w.flat(), inputs=None)
    backend = _choose(x, flat, dtype, implementation)
    if 0 in (*x.shape, *flat.shape):
        return jnp.zeros((*rows, *outputs), dtype)
    x, flat = unify_vma((x, flat))
    return jnp.asarray(_matmul(x, flat, dtype, backend)).reshape(*rows, *outputs)


def quantized_matmul_implementation(x, w, *, preferred_element_type=None, implementation=None) -> str:
    """The backend that `quantized_matmul` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    dtype = _check(x, w, preferred_element_type)

    def flat(x, w):
        if isinstance(x, QuantizedRows):
            return x, w.flat()
        return x.reshape(-1, math.prod(x.shape[len(x.shape) - len(w.contraction) :])), w.flat()

    x, w = jax.eval_shape(flat, x, w)
    return _choose(x, w, dtype, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x: jax.Array | QuantizedRows, w: QuantizedArray, dtype, backend: str) -> jax.Array:
    return _module(backend).matmul(x, w if backend == "mosaic_gpu" else w.natural(), dtype)


def _matmul_fwd(x: jax.Array | QuantizedRows, w: QuantizedArray, dtype, backend: str):
    """Residuals: the weight, and an array that says the dtype of x."""
    if isinstance(x, QuantizedRows):
        raise NotImplementedError("quantized_matmul of rounded rows has no gradient; give it the array")
    return _matmul(x, w, dtype, backend), (w, jnp.zeros((), x.dtype))


def _matmul_bwd(dtype, backend: str, residuals, grad: jax.Array):
    del dtype, backend
    w, like = residuals
    d_x = jnp.dot(grad.astype(like.dtype), w.dequantize(like.dtype).T, preferred_element_type=jnp.float32)
    return d_x.astype(like.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _module(backend: str) -> types.ModuleType:
    return importlib.import_module(BACKENDS[backend])


def _choose(x, w, dtype, implementation: str | None) -> str:
    def check(name):
        supported = getattr(_module(name), "supported", None)
        return supported(x, w, dtype) if supported else None

    return _dispatch.choose(
        "quantized_matmul", implementation, {name: functools.partial(check, name) for name in BACKENDS}
    )


def _check(x, w: QuantizedArray, preferred_element_type):
    """Every check of the public function's input; the dtype of the output."""
    check_array("quantized_matmul", w)
    inner = len(w.contraction)
    contracted = w.values.shape[w.ndim - inner :]
    for name, part in (("inputs", w.inputs), ("outliers", w.outliers)):
        if part is not None and len(part.shape) != 1:
            raise ValueError(
                f"quantized_matmul: {name} {part.shape} are those of several weights; scan or vmap over these"
            )
    if isinstance(x, QuantizedRows):
        check_rounded(x, w)
        inner, contracted = 1, (math.prod(contracted),)
    if tuple(x.shape[len(x.shape) - inner :]) != tuple(contracted) or len(x.shape) < inner:
        raise ValueError(
            f"quantized_matmul: x must end in the dims {tuple(contracted)} that w {w.shape} contracts. Got x {x.shape}"
        )
    if x.dtype not in _FLOATS:
        raise ValueError(f"quantized_matmul takes x in float32, bfloat16 or float16. Got {x.dtype}")
    dtype = jnp.dtype(x.dtype if preferred_element_type is None else preferred_element_type)
    if dtype not in _FLOATS:
        raise ValueError(
            f"quantized_matmul: preferred_element_type must be float32, bfloat16 or float16, or None. Got {dtype}"
        )
    return dtype


def check_array(op: str, w: QuantizedArray) -> None:
    """ValueError where a QuantizedArray's parts do not fit together; shapes and dtypes alone are looked at."""
    if not isinstance(w, QuantizedArray):
        raise ValueError(f"{op} takes a QuantizedArray. Got {type(w).__name__}; see quantize_array")
    inner = len(w.contraction)
    if not 1 <= inner < w.ndim or any(not -w.ndim <= d < 0 for d in w.contraction):
        raise ValueError(
            f"contraction {w.contraction} must name some dims of {w.ndim}, negative, and leave at least one"
        )
    if w.values.dtype not in _VALUES or (w.unsigned and w.values.dtype != jnp.int4):
        names = ", ".join(jnp.dtype(v).name for v in _VALUES)
        raise ValueError(f"values must be one of {names} (int4 where unsigned). Got {w.values.dtype}")
    outputs, K = w.values.shape[: w.ndim - inner], math.prod(w.values.shape[w.ndim - inner :])
    divides = lambda s, n: s == n or (s > 0 and n % s == 0)
    fits = len(w.scales.shape) == len(outputs) + 1 and w.scales.shape[-1] > 0
    if not fits or not all(map(divides, w.scales.shape, (*outputs, K))):
        raise ValueError(
            f"scales {w.scales.shape} do not divide the values' outputs and K, {(*outputs, K)}; give one scale per "
            f"channel {(*outputs, 1)} or a group size that divides K={K}"
        )
    if w.offsets is not None and w.offsets.shape != w.scales.shape:
        raise ValueError(f"offsets {w.offsets.shape} must have the shape of the scales {w.scales.shape}")
    if w.inputs is not None and w.inputs.shape[-1:] != (K,):
        raise ValueError(f"inputs {w.inputs.shape} must end in the K={K} numbers that the matmul contracts")
    for name, part in (("scales", w.scales), ("offsets", w.offsets), ("inputs", w.inputs)):
        if part is not None and not jnp.issubdtype(part.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating. Got {part.dtype}")
    check_activations(w.format, w.activations)
    if w.outliers is not None and (
        w.activations != "int4" or w.outliers.shape[-1:] != w.scales.shape[-1:] or w.outliers.dtype != jnp.bool
    ):
        raise ValueError(
            f"outliers {w.outliers.dtype}{list(w.outliers.shape)} must be bool and end in the {w.scales.shape[-1]} "
            f"groups, beside activations='int4'. Got activations={w.activations!r}"
        )
