"""Decode attention as its formula reads, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.inputs import Inputs, Options, placed, scales_of_tokens, visible


def decode_attention_reference(inputs: Inputs, options: Options) -> jax.Array:
    """[B, T, N, Hv] in q's dtype; every sequence's pages gathered in float32."""
    inputs = placed(inputs)
    group = inputs.q.shape[2] // inputs.k_pages.shape[2]
    k = _dense(inputs.k_pages, inputs.k_scales, inputs.page_table)
    v = _dense(inputs.v_pages, inputs.v_scales, inputs.page_table)
    see = visible(inputs, options, jnp.arange(k.shape[1], dtype=jnp.int32))
    # A value that nobody sees may be anything, also nan, which 0 * nan would pass on.
    v = jnp.where(jnp.any(see, axis=1)[:, :, None, None], v, 0.0)
    k, v = (jnp.repeat(x, group, axis=2) for x in (k, v))
    logits = options.scale * jnp.einsum("BTNH,BSNH->BNTS", inputs.q.astype(jnp.float32), k, precision="highest")
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    logits = jnp.where(see[:, None], logits, -jnp.inf)
    if inputs.sinks is not None:  # one more key, whose value is zero
        sink = jnp.broadcast_to(inputs.sinks.astype(jnp.float32)[None, :, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, sink], axis=3)
        v = jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    seen = jnp.any(logits > -jnp.inf, axis=3, keepdims=True)
    probabilities = jnp.where(seen, jax.nn.softmax(jnp.where(seen, logits, 0.0), axis=3), 0.0)
    return jnp.einsum("BNTS,BSNH->BTNH", probabilities, v, precision="highest").astype(inputs.q.dtype)


def _dense(pages: jax.Array, scales: jax.Array | None, page_table: jax.Array) -> jax.Array:
    """[B, S, K, H] float32."""
    x = pages.at[page_table].get(mode="clip").astype(jnp.float32)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x if scales is None else x * scales_of_tokens(scales, page_table, pages.shape[1])[..., None]
