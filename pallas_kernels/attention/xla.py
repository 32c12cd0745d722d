"""Attention in plain XLA: one block where all logits fit, otherwise chunks with O(T) memory, forward and backward.

Everything is in the order [B, K, G, T, H] with G = N // K, so that one batched matmul serves a kv head and no key is
repeated. The chunked path keeps o and the logsumexp; its backward computes the probabilities again. A pair of chunks in
which no query sees a key is skipped, whatever the reason (causal, window, segments), except under vmap, which turns the
cond into a select.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.attention.inputs import Inputs, Options, nameable, visible

# Logits of one block, in elements: 64 MiB in float32. At most this many, and at most 1024 x 1024 a head: one block.
_BLOCK_LOGITS = 2**24
_ONE_BLOCK = 2**20


def attention_xla(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32."""
    B, T, N, _ = inputs.q.shape
    S = inputs.k.shape[1]
    if T * S <= _ONE_BLOCK and B * N * T * S <= _BLOCK_LOGITS:
        return _one_block(inputs, options)
    return _chunked(inputs, options)


# One block: the plain formula, with a backward that reuses the probabilities.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _one_block(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    return _one_block_fwd(inputs, options)[0]


def _one_block_fwd(inputs: Inputs, options: Options):
    """Residuals: the inputs, exp(logits - max) in v's dtype, 1 / its sum, o, the logsumexp."""
    x = _grouped(inputs)
    logits, _ = _logits(x.q, x.k, x.bias, visible(inputs, options), options)
    top = jnp.max(logits, axis=-1)
    if x.sinks is not None:
        top = jnp.maximum(top, x.sinks)
    top = _finite(top)
    p = jnp.exp(logits - top[..., None])
    total = jnp.sum(p, axis=-1)
    if x.sinks is not None:
        total += jnp.exp(x.sinks - top)
    inverse = jnp.where(total > 0, 1 / total, 0.0)
    p = p.astype(x.v.dtype)
    o = _matmul(p, x.v) * inverse[..., None]
    lse = top + jnp.log(total)
    out = _ungroup(o).astype(inputs.q.dtype), _ungroup(lse)
    return out, (inputs, p, inverse, o.astype(inputs.q.dtype), lse)


def _one_block_bwd(options: Options, residuals, cotangents):
    inputs, p, inverse, o, lse = residuals
    x = _grouped(inputs)
    do, delta = _cotangents(cotangents, o, lse, inputs)
    # The normalisation goes into the [T] sized operands, so the [T, S] ones are touched once.
    do_scaled = (do.astype(jnp.float32) * inverse[..., None]).astype(do.dtype)
    dv = _matmul_t(p, do_scaled)
    dlogits = p.astype(jnp.float32) * (_matmul_nt(do_scaled, x.v) - (delta * inverse)[..., None])
    dbias = _sum_to(dlogits, x.bias)
    if options.soft_cap is not None:
        _, slope = _logits(x.q, x.k, None, None, options)
        dlogits = dlogits * slope
    dlogits = dlogits.astype(x.k.dtype)
    dq = options.scale * _matmul(dlogits, x.k)
    dk = options.scale * _matmul_t(dlogits, x.q)
    return (_input_cotangents(inputs, dq, dk, dv, dbias, _dsinks(x.sinks, delta, lse)),)


_one_block.defvjp(_one_block_fwd, _one_block_bwd)


# Chunks: queries outside, keys inside.


class _QueryChunk(NamedTuple):
    q: jax.Array  # [B, K, G, t, H]
    positions: jax.Array  # [B or 1, t]
    segment_ids: jax.Array | None
    bias: jax.Array | None  # [B or 1, K or 1, G or 1, t or 1, S]


class _KeyChunk(NamedTuple):
    k: jax.Array  # [B, K, s, H]
    v: jax.Array
    positions: jax.Array  # [B or 1, s]
    segment_ids: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _chunked(inputs: Inputs, options: Options) -> tuple[jax.Array, jax.Array]:
    return _chunked_fwd(inputs, options)[0]


def _chunked_fwd(inputs: Inputs, options: Options):
    """Residuals: the inputs, o, the logsumexp."""
    T = inputs.q.shape[1]
    queries, keys = _split(inputs)
    sinks = _grouped(inputs).sinks

    def query_chunk(_, qc: _QueryChunk):
        def key_chunk(carry, xs):
            kc, bias = xs
            mask = _chunk_mask(inputs, options, qc, kc)

            def add(carry):
                o, top, total = carry
                logits, _ = _logits(qc.q, kc.k, bias, mask, options)
                new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
                shift = _finite(new_top)
                decay = jnp.exp(top - shift)
                p = jnp.exp(logits - shift[..., None])
                o = o * decay[..., None] + _matmul(p.astype(kc.v.dtype), kc.v)
                return o, new_top, total * decay + jnp.sum(p, axis=-1)

            return _if_any(mask, add, lambda carry: carry, carry), None

        total = _zeros(qc.q[..., 0])
        o = jnp.broadcast_to(total[..., None], (*total.shape, inputs.v.shape[-1]))
        top = total - jnp.inf
        if sinks is not None:
            top, total = total + sinks, total + 1
        carry = o, top, total
        (o, top, total), _ = jax.lax.scan(key_chunk, carry, (keys, _bias_chunks(qc.bias, keys)))
        o = o * jnp.where(total > 0, 1 / total, 0.0)[..., None]
        return None, (o.astype(inputs.q.dtype), _finite(top) + jnp.log(total))

    _, (o, lse) = jax.lax.scan(query_chunk, None, queries)
    o, lse = nameable(_join(o, 3, T), _join(lse, 3, T))
    return (_ungroup(o), _ungroup(lse)), (inputs, o, lse)


def _chunked_bwd(options: Options, residuals, cotangents):
    inputs, o, lse = residuals
    do, delta = _cotangents(cotangents, o, lse, inputs)
    dq, dk, dv, dbias = _chunked_grads(inputs, options, do, delta, lse)
    dsinks = _dsinks(_grouped(inputs).sinks, delta, lse)
    return (_input_cotangents(inputs, dq, dk, dv, dbias, dsinks),)


def _chunked_grads(inputs: Inputs, options: Options, do: jax.Array, delta: jax.Array, lse: jax.Array):
    """dq, dk, dv, dbias in float32, from rows in the order [B, K, G, T, ...]."""
    T, S = inputs.q.shape[1], inputs.k.shape[1]
    queries, keys = _split(inputs)
    rows = [_cut(x, 3, queries.q.shape[4]) for x in (do, delta, _finite(lse))]

    def query_chunk(carry, xs):
        qc, (do, delta, lse) = xs

        def key_chunk(dq, xs):
            kc, bias = xs
            mask = _chunk_mask(inputs, options, qc, kc)

            def add(dq):
                logits, slope = _logits(qc.q, kc.k, bias, mask, options)
                p = jnp.exp(logits - lse[..., None])
                dv = _matmul_t(p.astype(do.dtype), do)
                dlogits = p * (_matmul_nt(do, kc.v) - delta[..., None])
                dbias = _sum_to(dlogits, bias)
                if slope is not None:
                    dlogits = dlogits * slope
                dlogits = dlogits.astype(kc.k.dtype)
                dk = options.scale * _matmul_t(dlogits, qc.q)
                return dq + options.scale * _matmul(dlogits, kc.k), (dk, dv, dbias)

            def skip(dq):
                return dq, (_zeros(kc.k), _zeros(kc.v), None if bias is None else _zeros(bias))

            return _if_any(mask, add, skip, dq)

        dq, (dk, dv, dbias) = jax.lax.scan(key_chunk, _zeros(qc.q), (keys, _bias_chunks(qc.bias, keys)))
        return (carry[0] + dk, carry[1] + dv), (dq, None if dbias is None else _join(dbias, 4, S))

    (dk, dv), (dq, dbias) = jax.lax.scan(query_chunk, (_zeros(keys.k), _zeros(keys.v)), (queries, rows))
    if dbias is not None:
        assert inputs.bias is not None
        dbias = _join(dbias, 3, T) if inputs.bias.shape[2] > 1 else jnp.sum(dbias, axis=0)
    return _join(dq, 3, T), _join(dk, 2, S), _join(dv, 2, S), dbias


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


def backward(inputs: Inputs, options: Options, do: jax.Array, lse: jax.Array, delta: jax.Array):
    """dq, dk, dv of a block of keys; do [B, T, N, Hv], lse and delta [B, T, N] are those of whole rows."""
    K = inputs.k.shape[2]
    grads = _chunked_grads(inputs, options, _group(do, K), _group(delta, K), _group(lse, K))[:3]
    return tuple(_input_cotangents(inputs, *grads, None, None)[:3])


def bias_gradient(inputs: Inputs, options: Options, do: jax.Array, lse: jax.Array, delta: jax.Array) -> jax.Array:
    """The bias' gradient, in its shape and dtype; do, lse and delta as for `backward`."""
    assert inputs.bias is not None
    K = inputs.k.shape[2]
    dbias = _chunked_grads(inputs, options, _group(do, K), _group(delta, K), _group(lse, K))[3]
    assert dbias is not None
    return dbias.reshape(inputs.bias.shape).astype(inputs.bias.dtype)


def _split(inputs: Inputs) -> tuple[_QueryChunk, _KeyChunk]:
    """Chunks of queries and keys on a leading dim, the last ones padded."""
    B, T, N, _ = inputs.q.shape
    S = inputs.k.shape[1]
    side = min(1024, max(128, 1 << (math.isqrt(_BLOCK_LOGITS // (B * N) + 1).bit_length() - 1)))
    t, s = min(T, side), min(S, side)
    x = _grouped(inputs)
    q_pos, kv_pos = inputs.q_positions, inputs.kv_positions
    if q_pos is None or kv_pos is None:
        q_pos, kv_pos = jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(S, dtype=jnp.int32)[None]
    q_ids, kv_ids = inputs.q_segment_ids, inputs.kv_segment_ids
    if q_ids is None and (T % t or S % s):  # ids hide the padding: _cut pads them with 0
        q_ids, kv_ids = jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32)
    bias = x.bias
    if bias is not None:
        cuts = -(-T // t)
        bias = _cut(bias, 3, t) if bias.shape[3] > 1 else jnp.broadcast_to(bias[None], (cuts, *bias.shape))
    queries = _QueryChunk(_cut(x.q, 3, t), _cut(q_pos, 1, t), None if q_ids is None else _cut(q_ids, 1, t), bias)
    ids = None if kv_ids is None else _cut(kv_ids, 1, s)
    keys = _KeyChunk(_cut(x.k, 2, s), _cut(x.v, 2, s), _cut(kv_pos, 1, s), ids)
    # Masks depend on no layer: of layers in a scan JAX would compute those of all chunks ahead and keep them, O(T^2).
    return jax.lax.optimization_barrier((queries, keys))


def _cut(x: jax.Array, axis: int, size: int) -> jax.Array:
    """[..., n, ...] -> [ceil(n / size), ..., size, ...], padded with zeros."""
    n = x.shape[axis]
    chunks = -(-n // size)
    x = jnp.pad(x, [(0, chunks * size - n if i == axis else 0) for i in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: jax.Array, axis: int, n: int) -> jax.Array:
    """The inverse of _cut."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, n, axis=axis)


def _bias_chunks(bias: jax.Array | None, keys: _KeyChunk) -> jax.Array | None:
    return None if bias is None else _cut(bias, 4, keys.k.shape[3])


def _chunk_mask(inputs: Inputs, options: Options, qc: _QueryChunk, kc: _KeyChunk) -> jax.Array | None:
    chunk = inputs._replace(
        q_positions=qc.positions,
        kv_positions=kc.positions,
        q_segment_ids=qc.segment_ids,
        kv_segment_ids=kc.segment_ids,
    )
    return visible(chunk, options)


def _if_any(mask: jax.Array | None, add, skip, carry):
    return add(carry) if mask is None else jax.lax.cond(jnp.any(mask), add, skip, carry)


# The pieces that both share.


class _Grouped(NamedTuple):
    q: jax.Array  # [B, K, G, T, H]
    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, Hv]
    bias: jax.Array | None  # [B or 1, K or 1, G or 1, T or 1, S]
    sinks: jax.Array | None  # [1, K, G, 1] float32


def _grouped(inputs: Inputs) -> _Grouped:
    N, K = inputs.q.shape[2], inputs.k.shape[2]
    bias, sinks = inputs.bias, inputs.sinks
    if bias is not None:
        b, n, t, S = bias.shape
        bias = bias.reshape(b, 1, 1, t, S) if n == 1 else bias.reshape(b, K, N // K, t, S)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, K, N // K, 1)
    k, v = inputs.k.swapaxes(1, 2), inputs.v.swapaxes(1, 2)
    return _Grouped(_group(inputs.q, K), k, v, bias, sinks)


def _group(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, ...] -> [B, K, G, T, ...]."""
    B, T, N, *rest = x.shape
    return jnp.moveaxis(x.reshape(B, T, K, N // K, *rest), 1, 3)


def _ungroup(x: jax.Array) -> jax.Array:
    """[B, K, G, T, ...] -> [B, T, N, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _logits(q, k, bias, mask, options: Options) -> tuple[jax.Array, jax.Array | None]:
    """Float32 logits, -inf where not visible, and the derivative of the soft cap."""
    logits = options.scale * _matmul_nt(q, k)
    slope = None
    if options.soft_cap is not None:
        tanh = jnp.tanh(logits / options.soft_cap)
        logits, slope = options.soft_cap * tanh, 1 - tanh * tanh
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
    return logits, slope


def _cotangents(cotangents, o, lse, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """do [B, K, G, T, Hv], and delta [B, K, G, T]: sum(do * o) - dlse, with which dlogits = p * (do @ v - delta)."""
    do, dlse = (_group(x, inputs.k.shape[2]) for x in cotangents)
    dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)  # a merge of blocks may send nan to a row that saw nothing
    return do, jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse


def _dsinks(sinks: jax.Array | None, delta: jax.Array, lse: jax.Array) -> jax.Array | None:
    return None if sinks is None else -jnp.sum(jnp.exp(sinks - lse) * delta, axis=(0, 3))


def _input_cotangents(inputs: Inputs, dq, dk, dv, dbias, dsinks) -> Inputs:
    def like(grad, x):
        return None if grad is None else grad.reshape(x.shape).astype(x.dtype)

    q, k, v, bias, sinks = inputs[:5]
    dq, dk, dv = like(_ungroup(dq), q), like(dk.swapaxes(1, 2), k), like(dv.swapaxes(1, 2), v)
    return inputs._replace(
        q=dq,
        k=dk,
        v=dv,
        bias=like(dbias, bias),
        sinks=like(dsinks, sinks),
        **dict.fromkeys(Inputs._fields[5:]),
    )


def _sum_to(x: jax.Array, bias: jax.Array | None) -> jax.Array | None:
    if bias is None:
        return None
    return jnp.sum(x, axis=tuple(i for i, d in enumerate(bias.shape) if d == 1 < x.shape[i]), keepdims=True)


def _zeros(x: jax.Array) -> jax.Array:
    """A float32 zero sharded and varying as x is: what a scan's first carry and a cond's branches need."""
    return jnp.zeros_like(x, dtype=jnp.float32)


def _finite(x: jax.Array) -> jax.Array:
    return jnp.where(x == -jnp.inf, 0.0, x)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return _einsum("BKGTS,BKSH->BKGTH", x, y)


def _matmul_nt(x: jax.Array, y: jax.Array) -> jax.Array:
    return _einsum("BKGTH,BKSH->BKGTS", x, y)


def _matmul_t(x: jax.Array, y: jax.Array) -> jax.Array:
    return _einsum("BKGTS,BKGTH->BKSH", x, y)


def _einsum(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Accumulates in float32; float32 operands are not rounded to tf32 or bf16 on the way in."""
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(dims, x, y, precision=precision, preferred_element_type=jnp.float32)
