"""Attention as its formula reads, in float32: the oracle of the other backends."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.inputs import Inputs, Options, visible


def attention_reference(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32; O(T S) memory."""
    q, k, v = (x.astype(jnp.float32) for x in inputs[:3])
    group = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    logits = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k, precision="highest")
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    if inputs.bias is not None:
        logits += inputs.bias.astype(jnp.float32)
    mask = visible(inputs, options)
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
    if inputs.sinks is not None:  # one more key, whose value is zero
        sink = jnp.broadcast_to(inputs.sinks.astype(jnp.float32)[None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], axis=3)
        v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))

    # A row that sees nothing: the softmax of zeros, then zeros; so no derivative meets inf - inf.
    seen = jnp.any(logits > -jnp.inf, axis=3, keepdims=True)
    safe = jnp.where(seen, logits, 0.0)
    probabilities = jnp.where(seen, jax.nn.softmax(safe, axis=3), 0.0)
    lse = jnp.where(seen[..., 0], jax.nn.logsumexp(safe, axis=3), -jnp.inf)
    out = jnp.einsum("BNTS,BSNH->BTNH", probabilities, v, precision="highest")
    return out.astype(inputs.q.dtype), lse.swapaxes(1, 2)
