"""The public functions: they check their input, pick a backend, run it."""

import functools
import importlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has round_both, gated_grads, and supported(arrays) -> None | reason.
BACKENDS = {
    "triton": "pallas_kernels.float8_grads.triton",
    "xla": "pallas_kernels.float8_grads.xla",
}
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


class Both(NamedTuple):
    """values [..., M, N], flipped [..., N, M], top: float32 scalar, the largest |x| before it was rounded."""

    values: jax.Array
    flipped: jax.Array
    top: jax.Array


class GatedGrads(NamedTuple):
    """Gradients of a gate's and an up's output [M, N], and the hidden layer, of which only [N, M] is wanted."""

    gate: Both
    up: Both
    hidden: jax.Array
    hidden_top: jax.Array


def round_both(x: jax.Array, scale: jax.Array, dtype: Any, *, implementation: str | None = None) -> Both:
    """`x / scale`, cut off at the largest number of `dtype` and rounded to it, as it lies and transposed.

    The matmuls of 8-bit tensor cores contract the last dim of both operands (Hopper), and the backward pass contracts
    each dim of a gradient once: both layouts in one pass over x, with the number that the next scale is made from.

    Args:
      x: [..., M, N] float32, bfloat16 or float16.
      scale: float32 [...], of each matrix.
      dtype: float8_e4m3fn or float8_e5m2.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    *lead, M, N = x.shape if x.ndim > 1 else (0, 0, *x.shape)
    _check("round_both", (x,), (scale,), (dtype,), (*lead, M, N), tuple(lead))
    module = _choose((x,), implementation)
    x, scale = unify_vma((x, scale))
    values, flipped, top = module.round_both(x.reshape(math.prod(lead), M, N), scale.reshape(-1), jnp.dtype(dtype))
    return Both(values.reshape(*lead, M, N), flipped.reshape(*lead, N, M), top)


def gated_grads(
    grad: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    scales: tuple[jax.Array, jax.Array, jax.Array],
    dtypes: tuple[Any, Any],
    activation: str,
    *,
    implementation: str | None = None,
) -> GatedGrads:
    """The backward pass of `h = act(gate) * up`, rounded as its matmuls take it, in one pass over its three operands.

    Computed in float32, rounded once: d_gate = grad * up * act'(gate), d_up = grad * act(gate), and h again.

    Args:
      grad, gate, up: [M, N] float32, bfloat16 or float16; grad is h's.
      scales: float32 scalars of d_gate, d_up and h, which are divided by them.
      dtypes: float8 of the gradients and of h.
      activation: a key of `ACTIVATIONS`.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown activation or implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_grads: activation={activation!r} is unknown; use one of {sorted(ACTIVATIONS)}")
    _check("gated_grads", (grad, gate, up), scales, dtypes, (*grad.shape, 0)[:2], ())
    module = _choose((grad, gate, up), implementation)
    (grad, gate, up), scales = unify_vma(((grad, gate, up), scales))
    made = module.gated_grads(grad, gate, up, scales, tuple(map(jnp.dtype, dtypes)), ACTIVATIONS[activation])
    return GatedGrads(Both(*made[:3]), Both(*made[3:6]), *made[6:])


def float8_grads_implementation(*arrays: Any, implementation: str | None = None) -> str:
    """The backend that both functions run for the same arrays, here; they may be jax.ShapeDtypeStruct."""
    check = lambda name: importlib.import_module(BACKENDS[name]).supported(arrays)
    return _dispatch.choose("float8_grads", implementation, {name: functools.partial(check, name) for name in BACKENDS})


def _choose(arrays, implementation):
    return importlib.import_module(BACKENDS[float8_grads_implementation(*arrays, implementation=implementation)])


def _check(op, arrays, scales, dtypes, shape, scale_shape):
    got = ", ".join(f"{x.dtype}{list(x.shape)}" for x in (*arrays, *scales))
    if any(x.shape != shape or x.dtype != arrays[0].dtype for x in arrays):
        raise ValueError(f"{op} takes matrices [M, N] of one shape and dtype. Got {got}")
    if arrays[0].dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(f"{op} takes float32, bfloat16 or float16; cast it. Got {got}")
    if any(s.shape != scale_shape or s.dtype != jnp.float32 for s in scales):
        raise ValueError(f"{op} takes a scale in float32 for each matrix. Got {got}")
    if any(d not in (jnp.float8_e4m3fn, jnp.float8_e5m2) for d in dtypes):
        raise ValueError(f"{op} rounds to float8_e4m3fn or float8_e5m2. Got {[jnp.dtype(d).name for d in dtypes]}")
