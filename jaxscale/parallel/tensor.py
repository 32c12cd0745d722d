"""Tensor-parallel ops whose communication must not be left to the partitioner: attention over heads, the vocabulary-
parallel embedding and loss (Megatron-LM, arXiv 1909.08053). Each is its single-device twin when no mesh is in context."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.layers import soft_cap
from jaxscale.sharding import active_mesh, compute_spec, constrain
from sharding_rules.rules import MEGATRON_FSDP, Rules

TP = "tp"


def attention(
    attend: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None,
    rules: Rules = MEGATRON_FSDP,
) -> Float[Array, "B T N H"]:
    """`attend` on each shard's own heads; keys and values are gathered where the sequence is split (cp).

    Args:
      attend: (q, k, v, positions=(q, kv), segment_ids=(q, kv) or None) -> like q: the attention of one device.
    """
    if active_mesh() is None:
        return attend(q, k, v, positions=positions, segment_ids=segment_ids)
    k, v = (constrain(x, ("batch", None, "kv_heads", None), rules) for x in (k, v))
    kv_rows = ("batch", None)
    positions = (positions[0], constrain(positions[1], kv_rows, rules))
    if segment_ids is not None:
        segment_ids = (segment_ids[0], constrain(segment_ids[1], kv_rows, rules))
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    q_spec, kv_spec = (jax.typeof(x).sharding.spec for x in (q, k))
    # Query heads split, kv heads whole: they did not divide. Each shard then takes the kv heads of its own queries.
    pick = q_spec[2] is not None and kv_spec[2] is None

    def attention_local(q, k, v, positions, segment_ids):
        if pick:
            k, v = (_own_kv_heads(x, q.shape[2], num_heads // num_kv_heads) for x in (k, v))
        return attend(q, k, v, positions=positions, segment_ids=segment_ids)

    return jax.shard_map(attention_local, out_specs=q_spec)(q, k, v, positions, segment_ids)


def embed(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], rules: Rules = MEGATRON_FSDP
) -> Float[Array, "B T D"]:
    """Rows of the table. Split over the vocabulary, each shard looks up what it holds and the parts are summed: the
    gradient then moves V/tp x D numbers, where a plain gather makes the partitioner replicate the table."""
    out_axes = ("batch", "norm_seq", "embed")
    vocab_split = active_mesh() is not None and jax.typeof(table).sharding.spec[0] is not None
    if not vocab_split:
        spec = compute_spec(tokens.shape + table.shape[1:], ("batch", "seq", "embed"), rules)
        return constrain(table.at[tokens].get(out_sharding=spec) if spec is not None else table[tokens], out_axes, rules)
    tokens = constrain(tokens, ("batch", "seq"), rules)
    out_spec = compute_spec(tokens.shape + table.shape[1:], out_axes, rules) or P()
    scatter = _mentions(out_spec[1], TP)

    def embed_local(table, tokens):
        local = tokens - jax.lax.axis_index(TP) * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = jnp.where(mine[..., None], table[jnp.where(mine, local, 0)], jnp.zeros((), table.dtype))
        return jax.lax.psum_scatter(rows, TP, scatter_dimension=1, tiled=True) if scatter else jax.lax.psum(rows, TP)

    return jax.shard_map(embed_local, out_specs=out_spec)(table, tokens)


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
    mesh = active_mesh()
    if mesh is None:
        return _token_losses_local(x, head, labels, chunk, logit_soft_cap, None)
    x = constrain(x, ("batch", "seq", "embed"), rules)
    labels = constrain(labels, ("batch", "seq"), rules)
    rows = jax.typeof(labels).sharding.spec
    vocab_axis = TP if _mentions(jax.typeof(head).sharding.spec[1], TP) else None

    def losses_local(x, head, labels):
        # Say that the head will be used by different rows on each shard: its gradient is then summed once, not per chunk.
        split = tuple(a for entry in rows if entry for a in ((entry,) if isinstance(entry, str) else entry))
        head = jax.lax.pcast(head, split, to="varying") if split else head
        return _token_losses_local(x, head, labels, chunk, logit_soft_cap, vocab_axis)

    return jax.shard_map(losses_local, out_specs=(rows, rows))(x, head, labels)


def _token_losses_local(x, head, labels, chunk, logit_soft_cap, axis_name):
    shape, rows = labels.shape, labels.size
    x, labels = x.reshape(rows, x.shape[-1]), labels.reshape(rows)

    def losses(x, labels):
        logits = soft_cap(jnp.einsum("rD,DV->rV", x, head, preferred_element_type=jnp.float32), logit_soft_cap)
        top = jax.lax.stop_gradient(logits).max(axis=-1)
        local = labels
        if axis_name is not None:
            top = jax.lax.pmax(top, axis_name)
            local = labels - jax.lax.axis_index(axis_name) * logits.shape[-1]
        mine = (local >= 0) & (local < logits.shape[-1])
        picked = jnp.take_along_axis(logits, jnp.where(mine, local, 0)[:, None], axis=-1)[:, 0]
        sums = jnp.exp(logits - top[:, None]).sum(axis=-1), jnp.where(mine, picked, 0.0)
        total, picked = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        lse = top + jnp.log(total)
        return lse - picked, lse

    if rows <= chunk:
        nll, lse = losses(x, labels)
        return nll.reshape(shape), lse.reshape(shape)
    padding = -rows % chunk
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[-1])
    labels = jnp.pad(labels, (0, padding)).reshape(-1, chunk)
    nll, lse = jax.lax.map(lambda args: jax.checkpoint(losses)(*args), (x, labels))
    return nll.reshape(-1)[:rows].reshape(shape), lse.reshape(-1)[:rows].reshape(shape)


def _own_kv_heads(x: Array, num_local: int, group: int) -> Array:
    """The kv heads [B, S, *, H] that this shard's `num_local` query heads attend to."""
    first = jax.lax.axis_index(TP) * num_local
    if group % num_local == 0 or num_local % group == 0:
        return jax.lax.dynamic_slice_in_dim(x, first // group, max(1, num_local // group), axis=2)
    return jnp.take(x, (first + jnp.arange(num_local)) // group, axis=2)


def _mentions(entry: Any, axis: str) -> bool:
    return entry == axis or (isinstance(entry, tuple) and axis in entry)
