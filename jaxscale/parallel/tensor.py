"""Tensor-parallel ops whose communication must not be left to the partitioner: attention over heads, the vocabulary-
parallel embedding and loss (Megatron-LM, arXiv 1909.08053). Without a mesh each is its single-device twin."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.layers import soft_cap
from jaxscale.parallel.context import attention as context_attention
from jaxscale.parallel.context import decode as context_decode
from jaxscale.parallel.context_cost import Context
from jaxscale.sharding import (
    Weight,
    active_mesh,
    axes_of,
    compute_spec,
    constrain,
    enter,
    matmul,
    partial_sums,
    partitions,
    shard_map,
)
from pallas_kernels.quantized_matmul.array import QuantizedArray
from sharding_rules.rules import MEGATRON_FSDP, Rules

TP = "tp"
CP = "cp"
_FLOAT32: Any = {"preferred_element_type": jnp.float32}


def attention(
    attend: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    rules: Rules = MEGATRON_FSDP,
    context: Context | None = None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` on each shard's own heads; keys and values are gathered where the sequence is split (cp).

    Args:
      attend: (q, k, v, positions=(q, kv), segment_ids=(q, kv) or None) -> like q: the attention of one device. A
        partial of `pallas_kernels.attention` where `context` is given, or where the keys are a cache split over cp.
      context: with it keys stay split over cp, which `jaxscale.parallel.context.attention` then deals with.
      sinks: a logit for each query head, passed on to `attend` where there are any.
    """
    mesh = active_mesh()
    if mesh is None:
        return attend(q, k, v, positions=positions, segment_ids=segment_ids, **_given(sinks))
    if sinks is not None:
        sinks = constrain(sinks, ("q_heads",), rules)
    if context is not None and mesh.shape[CP] > 1:
        return _context_attention(attend, q, k, v, positions[0], segment_ids and segment_ids[0], rules, context, sinks)
    if CP in axes_of(partitions(k)[1:2]) and CP not in axes_of(partitions(q)[1:2]):
        return _cached_attention(attend, q, k, v, positions, segment_ids, rules, sinks)
    # `reduced`: the gradients of gathered keys are partial sums, scattered over the sequence again.
    kv_spec = compute_spec(k.shape, ("batch", None, "kv_heads", None), rules) or P()
    gathered = axes_of(partitions(q)[1:2])
    k, v = (jax.reshard(x, P(*kv_spec, reduced=partial_sums(gathered))) for x in (k, v))
    kv_rows = ("batch", None)
    positions = (positions[0], constrain(positions[1], kv_rows, rules))
    if segment_ids is not None:
        segment_ids = (segment_ids[0], constrain(segment_ids[1], kv_rows, rules))
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    # Query heads split, kv heads whole: they did not divide. Each shard then takes the kv heads of its own queries.
    pick = partitions(q)[2] is not None and partitions(k)[2] is None

    def attention_local(q, k, v, positions, segment_ids, sinks):
        k, v = _vary(k, gathered), _vary(v, gathered)
        if pick:
            k, v = (_own_kv_heads(x, q.shape[2], num_heads // num_kv_heads) for x in (k, v))
        return attend(q, k, v, positions=positions, segment_ids=segment_ids, **_given(sinks))

    return shard_map(attention_local, out_specs=P(*partitions(q)))(q, k, v, positions, segment_ids, sinks)


def _given(sinks):
    return {} if sinks is None else {"sinks": sinks}


def _context_attention(attend, q, k, v, positions, segment_ids, rules, context: Context, sinks):
    k, v = (constrain(x, ("batch", "seq", "kv_heads", None), rules) for x in (k, v))
    if CP not in axes_of(partitions(q)[1:2]):
        raise ValueError(
            f"a sequence of {q.shape[1]} tokens is not divisible by cp={jax.typeof(q).sharding.mesh.shape[CP]}; "
            f"make it a multiple of cp (of 2 cp in a zigzag layout)"
        )
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    pick = partitions(q)[2] is not None and partitions(k)[2] is None
    split = functools.partial(context_attention, strategy=context.strategy, layout=context.layout, **attend.keywords)

    def attention_local(q, k, v, positions, segment_ids, sinks):
        if pick:
            k, v = (_own_kv_heads(x, q.shape[2], num_heads // num_kv_heads) for x in (k, v))
        if sinks is None:
            return split(q, k, v, positions=positions, segment_ids=segment_ids)
        out, lse = split(q, k, v, positions=positions, segment_ids=segment_ids, return_lse=True)
        return _with_sinks(out, lse, sinks)

    return shard_map(attention_local, out_specs=P(*partitions(q)))(q, k, v, positions, segment_ids, sinks)


def _cached_attention(attend, q, k, v, positions, segment_ids, rules, sinks):
    """A few queries, whole on each device of cp, over a cache whose slots are split; what moves is as large as they."""
    rows = ("batch", "seq")
    positions = positions[0], constrain(positions[1], rows, rules)
    if segment_ids is not None:
        segment_ids = segment_ids[0], constrain(segment_ids[1], rows, rules)
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    pick = partitions(q)[2] is not None and partitions(k)[2] is None

    def attention_local(q, k, v, positions, segment_ids, sinks):
        if pick:
            k, v = (_own_kv_heads(x, q.shape[2], num_heads // num_kv_heads) for x in (k, v))
        out, lse = context_decode(q, k, v, positions=positions, segment_ids=segment_ids, **attend.keywords)
        return out if sinks is None else _with_sinks(out, lse, sinks)

    return shard_map(attention_local, out_specs=P(*partitions(q)))(q, k, v, positions, segment_ids, sinks)


def _with_sinks(out, lse, sinks):
    """One more key of each row, whose value is zero: it takes its share once all blocks are merged."""
    share = jax.nn.sigmoid(lse - sinks.astype(jnp.float32)[None, None])
    return (out * share[..., None]).astype(out.dtype)


def embed(table: Any, tokens: Int[Array, "B T"], dtype: Any, rules: Rules = MEGATRON_FSDP) -> Float[Array, "B T D"]:
    """Rows of the table [V, D] in `dtype`; of a quantized one they are dequantized.

    Split over the vocabulary, each shard looks up what it holds and the parts are summed: the gradient then moves
    V/tp x D numbers, where a plain gather makes the partitioner replicate the table.
    """
    out_axes = ("batch", "norm_seq", "embed")
    vocab_split = active_mesh() is not None and partitions(table)[0] is not None
    if not vocab_split:
        return constrain(_rows(table, tokens, dtype, rules), out_axes, rules)
    tokens = constrain(tokens, ("batch", "seq"), rules)
    out_spec = compute_spec(tokens.shape + table.shape[1:], out_axes, rules) or P()
    scatter = TP in axes_of(out_spec[1:2])

    def embed_local(table, tokens):
        local = tokens - jax.lax.axis_index(TP) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(mine[..., None], _rows(table, jnp.where(mine, local, 0), dtype, rules), jnp.zeros((), dtype))
        return jax.lax.psum_scatter(rows, TP, scatter_dimension=1, tiled=True) if scatter else jax.lax.psum(rows, TP)

    return shard_map(embed_local, out_specs=out_spec)(table, tokens)


def _rows(table, tokens, dtype, rules) -> Array:
    def take(x):
        spec = compute_spec(tokens.shape + x.shape[1:], ("batch", "seq", None), rules)
        return x[tokens] if spec is None else x.at[tokens].get(out_sharding=spec)

    if isinstance(table, Weight):
        table = table.value
    if not isinstance(table, QuantizedArray):
        return take(table).astype(dtype)
    if table.contraction != (-1,):
        raise ValueError(f"a table [V, D] is quantized along its rows, contraction (-1,). Got {table.contraction}")
    rows = jax.tree.map(take, dataclasses.replace(table, inputs=None))
    return dataclasses.replace(rows, inputs=table.inputs).dequantize(dtype)


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    labels: Int[Array, "B T"],
    *,
    chunk: int,
    logit_soft_cap: float | None = None,
    rules: Rules = MEGATRON_FSDP,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Negative log-likelihood and logsumexp of each token, float32, never holding more than `chunk` rows of logits.

    The rows are taken `chunk` at a time and their logits are computed again in the backward pass.
    """
    if active_mesh() is None:
        return _token_losses_local(x, head, labels, chunk, logit_soft_cap, None)
    vocab_axis = TP if TP in axes_of(partitions(head)[1:]) else None
    # A head that tp does not split meets other rows on each shard of tp, as in the norms.
    seq = "seq" if vocab_axis else "norm_seq"
    (x,) = enter(x, ("batch", seq, "embed"), (head,), rules)
    labels = constrain(labels, ("batch", seq), rules)
    rows = P(*partitions(labels))

    def losses_local(x, head, labels):
        # What is alike on several shards but used differently by each: its gradient is summed once, not per chunk.
        head = _vary(head, axes_of(rows) - {TP})
        head, x = (head, _vary(x, {TP})) if vocab_axis else (_vary(head, axes_of(rows) & {TP}), x)
        return _token_losses_local(x, head, labels, chunk, logit_soft_cap, vocab_axis)

    nll, lse = shard_map(losses_local, out_specs=(rows, rows))(x, head, labels)
    return constrain(nll, ("batch", "seq"), rules), constrain(lse, ("batch", "seq"), rules)


def _vary(x, axes):
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(sorted(axes)), to="varying"), x) if axes else x


def _token_losses_local(x, head, labels, chunk, logit_soft_cap, axis_name):
    shape, rows = labels.shape, labels.size
    x, labels = x.reshape(rows, x.shape[-1]), labels.reshape(rows)
    if rows <= chunk:
        nll, lse = _chunk_losses(x, head, labels, logit_soft_cap, axis_name, True)  # pyright: ignore
        return nll.reshape(shape), lse.reshape(shape)
    padding = -rows % chunk
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[-1])
    labels = jnp.pad(labels, (0, padding)).reshape(-1, chunk)
    losses = lambda args: _chunk_losses(args[0], head, args[1], logit_soft_cap, axis_name, False)
    nll, lse = jax.lax.map(losses, (x, labels))
    return nll.reshape(-1)[:rows].reshape(shape), lse.reshape(-1)[:rows].reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _chunk_losses(
    x: Array, head: Any, labels: Array, cap: float | None, axis_name: str | None, keep: bool
) -> tuple[Array, Array]:
    """Losses and logsumexps [r] of x [r, D], head [D, V] (quantized, perhaps) and labels [r].

    A gradient of its own: logits (made again unless `keep`) meet their logsumexp, which is kept, in one pass. Derived
    by jax it takes six passes more over [r, V] in float32 (docs/LOG.md).
    """
    return _losses_of(_head_logits(x, head), labels, cap, axis_name)


def _chunk_losses_fwd(x, head, labels, cap, axis_name, keep):
    logits = _head_logits(x, head)
    nll, lse = _losses_of(logits, labels, cap, axis_name)
    return (nll, lse), (x, head, labels, lse, logits if keep else None)


def _chunk_losses_bwd(cap, axis_name, keep, residuals, cotangents):
    x, head, labels, lse, logits = residuals
    d_nll, d_lse = cotangents
    again, pull = jax.vjp(_head_logits, x, head)  # unused where logits are kept: not computed
    capped = soft_cap(logits if keep else again, cap)
    local, _ = _own_labels(labels, capped.shape[-1], axis_name)
    is_label = jnp.arange(capped.shape[-1])[None] == local[:, None]
    d_logits = jnp.exp(capped - lse[:, None]) * (d_nll + d_lse)[:, None] - jnp.where(is_label, d_nll[:, None], 0.0)
    if cap is not None:
        d_logits *= 1 - jnp.square(capped / cap)
    gradients: Any = pull(d_logits)
    return (*gradients, None)


_chunk_losses.defvjp(_chunk_losses_fwd, _chunk_losses_bwd)


def _losses_of(logits, labels, cap, axis_name):
    logits = soft_cap(logits, cap)
    top = logits.max(axis=-1)
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
    local, mine = _own_labels(labels, logits.shape[-1], axis_name)
    picked = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], axis=-1)[:, 0]
    sums = jnp.exp(logits - top[:, None]).sum(axis=-1), jnp.where(mine, picked, 0.0)
    total, picked = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    lse = top + jnp.log(total)
    return lse - picked, lse


def _own_labels(labels, size, axis_name):
    """Labels as columns of this shard's part of the vocabulary, and which of them lie in it."""
    local = labels if axis_name is None else labels - jax.lax.axis_index(axis_name) * size
    return local, (local >= 0) & (local < size)


def _head_logits(x: Array, head: Any) -> Array:
    """Float32 [r, V] of x [r, D] and head [D, V], which may be quantized."""
    return _array_logits(x, head) if isinstance(head, jax.Array) else matmul("rD,DV->rV", x, head, **_FLOAT32)


@jax.custom_vjp
def _array_logits(x: Array, head: Array) -> Array:
    """Float32 [r, V]. In the backward pass the logits' cotangent meets both in their own
    dtype: left in float32 it would make two of the three matmuls of the vocabulary float32 ones."""
    return matmul("rD,DV->rV", x, head, **_FLOAT32)


def _head_logits_fwd(x, head):
    return _array_logits(x, head), (x, head)


def _head_logits_bwd(residuals, dlogits):
    x, head = residuals
    dlogits = dlogits.astype(x.dtype)
    return jnp.einsum("rV,DV->rD", dlogits, head), jnp.einsum("rD,rV->DV", x, dlogits)


_array_logits.defvjp(_head_logits_fwd, _head_logits_bwd)


def _own_kv_heads(x: Array, num_local: int, group: int) -> Array:
    """The kv heads [B, S, *, H] that this shard's `num_local` query heads attend to."""
    first = jax.lax.axis_index(TP) * num_local
    if group % num_local == 0 or num_local % group == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // group, max(1, num_local // group), axis=2)
    return jnp.take(x, (first + jnp.arange(num_local)) // group, axis=2)
