"""The formulas in jax.numpy, left to XLA: the kernels' oracle, and their fallback."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.array import largest


def supported(arrays) -> str | None:
    del arrays
    return None


def round_both(x: jax.Array, scale: jax.Array, dtype) -> tuple[jax.Array, ...]:
    """x [L, M, N], scale [L]."""
    x = x.astype(jnp.float32)
    values = rounded(x, scale[:, None, None], dtype)
    return values, values.mT, largest(x)


def gated_grads(grad, gate, up, scales, dtypes, act) -> tuple[jax.Array, ...]:
    wide = lambda x: x.astype(jnp.float32)
    d_gate, d_up, hidden = gated(wide(grad), wide(gate), wide(up), act)
    gradient, forward = dtypes
    out = ()
    for x, scale, dtype in ((d_gate, scales[0], gradient), (d_up, scales[1], gradient), (hidden, scales[2], forward)):
        values = rounded(x, scale, dtype)
        out += values, values.T, largest(x)
    return *out[:6], *out[7:]


def gated(grad, gate, up, act):
    """Gradients of gate and up, and the hidden layer."""
    value, pull = jax.vjp(act, gate)
    (d_gate,) = pull(grad * up)
    return d_gate, grad * value, value * up


def rounded(x: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """x / scale in 8 bits, cut off at the largest number; nan stays nan. Scales are powers of two, or nearly right."""
    most = float(jnp.finfo(dtype).max)
    q = x * (1.0 / scale)
    return jnp.where(q > most, most, jnp.where(q < -most, -most, q)).astype(dtype)
