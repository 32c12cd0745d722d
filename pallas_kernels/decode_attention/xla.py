"""Decode attention in plain XLA: pages are gathered a few at a time, up to the longest sequence of the batch."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.decode_attention.inputs import Inputs, Options, bounded_lengths, placed, scales_of_tokens, visible

_CHUNK_KEYS = 1024  # gathered at a time for each sequence


def decode_attention_xla(inputs: Inputs, options: Options) -> jax.Array:
    """[B, T, N, Hv] in q's dtype."""
    inputs = placed(inputs)
    B, T, N, H = inputs.q.shape
    page, K, Hv = inputs.v_pages.shape[1:]
    G = N // K
    pages = max(1, min(_CHUNK_KEYS // page, inputs.page_table.shape[1]))
    chunk = pages * page
    q = inputs.q.reshape(B, T, K, G, H)
    table = jnp.pad(inputs.page_table, ((0, 0), (0, -inputs.page_table.shape[1] % pages)))
    lengths = bounded_lengths(inputs)
    # q of 16 bits meets pages of fewer in its own dtype, which holds them exactly.
    matmul = {"preferred_element_type": jnp.float32, "precision": "highest" if q.dtype == jnp.float32 else None}

    def gather(x, scales, index):
        x = x.at[index].get(mode="clip").astype(q.dtype).reshape(B, chunk, *x.shape[2:])
        if scales is None:
            return x, None
        return x, scales_of_tokens(scales, index, page).swapaxes(1, 2)[:, :, None, None, :]  # [B, K, 1, 1, S]

    def step(i, carry):
        acc, m, l = carry
        index = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        k, k_scale = gather(inputs.k_pages, inputs.k_scales, index)
        v, v_scale = gather(inputs.v_pages, inputs.v_scales, index)
        see = visible(inputs, options, i * chunk + jnp.arange(chunk, dtype=jnp.int32))
        unseen = ~jnp.any(see, axis=1)
        v = jnp.where(unseen[:, :, None, None], jnp.zeros((), v.dtype), v)  # may be nan
        logits = options.scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, **matmul)
        if k_scale is not None:
            logits *= k_scale
        if options.soft_cap is not None:
            logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
        logits = jnp.where(see[:, None, None], logits, -jnp.inf)
        m_new = jnp.maximum(m, jnp.max(logits, axis=-1))
        shift = jnp.where(m_new == -jnp.inf, 0.0, m_new)
        p = jnp.exp(logits - shift[..., None])
        alpha = jnp.exp(m - shift)
        l = l * alpha + jnp.sum(p, axis=-1)
        if v_scale is not None:
            p = jnp.where(unseen[:, None, None, None], 0.0, p * v_scale)
        acc = acc * alpha[..., None] + jnp.einsum("BKGTS,BSKH->BKGTH", p.astype(q.dtype), v, **matmul)
        return acc, m_new, l

    zeros = jnp.zeros((B, K, G, T, Hv), jnp.float32)
    top, total = jnp.full((B, K, G, T), -jnp.inf), jnp.zeros((B, K, G, T))
    if inputs.sinks is not None:
        top = jnp.broadcast_to(inputs.sinks.astype(jnp.float32).reshape(1, K, G, 1), top.shape)
        total = jnp.where(top > -jnp.inf, 1.0, 0.0)
    first = jnp.int32(0)
    if options.window is not None:
        first = jnp.maximum(jnp.min(lengths) - T + 1 - options.window, 0) // chunk
    last = (jnp.max(lengths) + chunk - 1) // chunk
    _, *start = unify_vma((inputs.q, zeros, top, total))
    acc, _, l = jax.lax.fori_loop(first, last, step, tuple(start))
    out = acc * jnp.where(l > 0, 1 / jnp.where(l > 0, l, 1.0), 0.0)[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(B, T, N, Hv).astype(inputs.q.dtype)


def rotate_and_write(parts, k_cache, v_cache, index, positions, cos, sin):
    """Queries [B, N, H] and both caches of `attend_new_token`, without its attention."""
    dtype, K = k_cache.dtype, k_cache.shape[3]
    total = parts.astype(jnp.float32).sum(axis=0).astype(dtype).astype(jnp.float32)
    q, k, v = jnp.split(total, (total.shape[1] - 2 * K, total.shape[1] - K), axis=1)

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        c, s = cos[:, None], sin[:, None]
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=-1)

    rows = jnp.arange(parts.shape[1], dtype=jnp.int32)
    slots = jnp.where(positions < 0, k_cache.shape[2], positions)  # -1 would be the last one
    write = lambda cache, x: cache.at[index, rows, slots].set(x.astype(dtype), mode="drop")
    return rotate(q).astype(dtype), write(k_cache, rotate(k)), write(v_cache, v)
