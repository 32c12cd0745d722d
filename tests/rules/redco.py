"""What Redco's name rules give: an implementation of their behaviour, to stand in the table beside the derived plans.

A rule belongs to the last name before `kernel` (or to `embedding`), wherever in the tree it occurs. Embeddings split
their rows; within attention names that begin or end in q, k, v split columns and o rows; up, gate, wi, in and down, wo,
out likewise outside it; heads split columns. Every other name takes, in alphabetical order, the last dim that divides,
or the one before if the last was taken by the name before it. What has other leaf names, or ranks that differ between
its places, is replicated.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

Key = tuple[str, ...]


def specs(params: Any, shards: int, axis: str = "tp") -> Any:
    """PartitionSpecs by name. The models here that say w, weight or nothing get flax's leaf names first."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    keys = [_flax_names(path, leaf) for path, leaf in flat]
    dims: dict[Key, list[set[int]]] = {}
    ranks: dict[Key, set[int]] = {}
    attention: dict[Key, bool] = {}
    for key, (_, leaf) in zip(keys, flat, strict=True):
        rule = _rule(key)
        ranks.setdefault(rule, set()).add(len(leaf.shape))
        dims.setdefault(rule, []).append({i for i, n in enumerate(leaf.shape) if n % shards == 0})
        attention[rule] = attention.get(rule, True) and any(
            "attn" in k or "attention" in k for k in map(str.lower, key)
        )
    chosen: dict[Key, int] = {}
    last = None
    for rule in sorted(dims):
        valid = sorted(set.intersection(*dims[rule]), reverse=True)
        if rule[-1] not in ("kernel", "embedding") or len(ranks[rule]) > 1 or not valid:
            continue
        side = _side(rule, attention[rule])
        if side == "row":
            chosen[rule] = valid[-1]
        elif side == "column":
            chosen[rule] = valid[0]
        else:
            chosen[rule] = last = valid[1] if valid[0] == last and len(valid) > 1 else valid[0]
    found = []
    for key, (_, leaf) in zip(keys, flat, strict=True):
        entries: list[str | None] = [None] * len(leaf.shape)
        if _rule(key) in chosen:
            entries[chosen[_rule(key)]] = axis
        found.append(P(*entries))
    return jax.tree.unflatten(jax.tree.structure(params), found)


def _side(rule: Key, in_attention: bool) -> str:
    name = rule[0]
    if rule[-1] == "embedding":
        return "row"
    if in_attention and (name[0] in "qkv" or name[-1] in "qkv"):
        return "column"
    if in_attention and "o" in (name[0], name[-1]):
        return "row"
    if name.startswith(("up", "gate", "wi")) or "in" in name.split("_"):
        return "column"
    if name.startswith(("down", "wo")) or "out" in name.split("_"):
        return "row"
    return "column" if name.startswith("head") or name.endswith("head") else ""


def _rule(key: Key) -> Key:
    return key[-2:] if key[-1] == "kernel" else key[-1:]


def _flax_names(path, leaf) -> Key:
    key = tuple(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
    if key[-1] in ("w", "weight"):
        key = (*key[:-1], "kernel")
    if key[-1] not in ("kernel", "embedding", "b", "bias", "g", "scale") and len(leaf.shape) > 1:
        table = key[-1] in ("embed", "emb", "wte", "shared", "embed_in", "embedding")
        key = (*key, "embedding" if table else "kernel")
    return key
