"""Attention whose two matmuls take float8 (e4m3): twice the tensor cores' rate, forward only."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention.api import choose, empty, normalize
from pallas_kernels.attention.inputs import Inputs, Options, unify_vma

DTYPE = jnp.float8_e4m3fn
LARGEST = 448.0

# In the order of preference; each module has supported(inputs, options) -> None | reason.
BACKENDS = {
    "mosaic_gpu": ("pallas_kernels.attention.pallas_mosaic_gpu_float8", "attention_float8_mosaic_gpu"),
    "xla": ("pallas_kernels.attention.float8", "attention_float8_xla"),
}


def attention_float8(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    segment_ids=None,
    positions=None,
    window=None,
    soft_cap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """`attention` of q, k, v rounded to float8: q by a scale for each token and head, k and v by one for each kv head.

    Kernels round the probabilities to float8 as well (relative error at most 2**-4 each); sums and softmax are float32.

    Args:
      q, k, v, and what hides keys: as in `attention`; no bias.
      return_lse: also return the logsumexp of the rounded logits.
      implementation: "mosaic_gpu", "xla" (float32 attention of the rounded numbers), or None: the first that can run.

    Returns:
      [B, T, N, Hv] in q's dtype; with return_lse, also [B, T, N] float32.

    Raises:
      ValueError, NotImplementedError: as `attention` does. NotImplementedError also where a gradient is asked for.
    """
    inputs, options = normalize(q, k, v, causal, segment_ids, positions, window, soft_cap, scale, sinks, None)

    module, function = BACKENDS[choose(inputs, options, implementation, "attention_float8", BACKENDS)]
    run = getattr(importlib.import_module(module), function)
    result: Any = empty(inputs) if 0 in q.shape else _forward_only(unify_vma(inputs), options, run)
    return result if return_lse else result[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _forward_only(inputs: Inputs, options: Options, run):
    return run(inputs, options)


def _no_gradient(inputs, options, run):
    raise NotImplementedError(
        "attention_float8 has no gradient: probabilities made again from unrounded q and k would not belong to "
        "its logsumexp; use attention where gradients are needed"
    )


_forward_only.defvjp(_no_gradient, lambda *_: ())


def round_inputs(inputs: Inputs) -> tuple[Inputs, jax.Array, jax.Array, jax.Array]:
    """q, k, v in float8 and their scales [B, T, N], [B, K], [B, K]: each of these times its float8 is the number."""

    def rounded(x, axes):
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
        factor = jnp.where(largest > 0, LARGEST / jnp.where(largest > 0, largest, 1.0), 1.0)
        # The clip guards against the product's own rounding: past the largest number this format has nan.
        return jnp.clip(x * factor, -LARGEST, LARGEST).astype(DTYPE), jnp.squeeze(1 / factor, axes)

    q, q_scale = rounded(inputs.q, (3,))
    k, k_scale = rounded(inputs.k, (1, 3))
    v, v_scale = rounded(inputs.v, (1, 3))
    return inputs._replace(q=q, k=k, v=v), q_scale, k_scale, v_scale


def attention_float8_xla(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """The same rounding of q, k, v, then float32 attention."""
    from pallas_kernels.attention.xla import attention_xla

    dtype = inputs.q.dtype
    inputs, q_scale, k_scale, v_scale = round_inputs(inputs)
    # XLA takes a conversion there and back for none (xla_allow_excess_precision), and would not round.
    inputs = inputs._replace(**lax.optimization_barrier({x: getattr(inputs, x) for x in "qkv"}))
    q = inputs.q.astype(jnp.float32) * q_scale[..., None]
    k, v = (x.astype(jnp.float32) * s[:, None, :, None] for x, s in ((inputs.k, k_scale), (inputs.v, v_scale)))
    out, lse = attention_xla(inputs._replace(q=q, k=k, v=v), options)
    return out.astype(dtype), lse
