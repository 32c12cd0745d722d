"""Names for logical axes, by the part that they play in the program; an axis without a known part is axis_3."""

import itertools
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

from sharding_rules.dims import Atom, expand
from sharding_rules.propagate import Op, Walker

if TYPE_CHECKING:
    from sharding_rules.infer import Inferred


def name_axes(model: "Inferred", walker: Walker) -> None:
    """Sets `name` of every axis of `model`. Only the graph decides: names in the user's tree play no part."""
    axes = model.logical
    names: dict[int, str] = {}
    taken: Counter[str] = Counter()

    def name(i: int, role: str) -> None:
        if i not in names:
            taken[role] += 1
            names[i] = role if taken[role] == 1 else f"{role}_{taken[role]}"

    def alike(i: int, role: str) -> None:
        """Axes of one size share the name: they are never split, so nothing is decided for them."""
        same = [j for j, n in names.items() if n.split("_")[0] == role.split("_")[0] and axes[j].size == axes[i].size]
        if same and i not in names:
            names[i] = names[same[0]]
        elif i not in names:
            name(i, role)

    def ids(dims) -> list[int]:
        return [model._ids[a] for d in dims for a in expand(d)]

    for axis in sorted(axes, key=lambda a: (bool(a.segments), not a.in_params)):  # true loops first
        if axis.loop:
            alike(axis.id, "layers")
    leading = Counter(dims[0][0] for dims in (_unlooped(model, d) for d in model.args) if dims and dims[0])
    batch = min((i for i, n in leading.items() if n == max(leading.values())), default=None)
    if batch is not None and not axes[batch].in_params:
        name(batch, "batch")

    in_leaves = Counter(i for dims in model.params for i in {i for d in dims for i in d})
    scores = [found for op in walker.ops if (found := _scores(op, ids, batch, axes))]
    heads: Counter[int] = Counter(i for found in scores for i in found[0])
    for found in scores:
        inner = [i for i in found[0] if axes[i].in_params]
        most = max((in_leaves[i] for i in inner), default=0)
        grouped = len({in_leaves[i] for i in inner}) > 1
        for i in inner:
            name(i, "q_groups" if grouped and in_leaves[i] < most else "kv_heads" if grouped else "q_heads")
    for found in scores:
        for i in found[1]:
            name(i, "seq")
    head_dims = {i for found in scores for i in found[2]}
    for dims in model.params:
        flat = [i for d in dims for i in d]
        for i, j in itertools.pairwise(flat):
            if i in heads and j not in heads and _fused(dims, i, j):
                head_dims.add(j)
    for i in sorted(head_dims - names.keys()):
        alike(i, "head_dim")
        axes[i].why_whole = axes[i].why_whole or "heads stay whole"

    for op in walker.ops:
        if op.primitive == "dot_general" and any(o.origin is not None for o in op.ins):
            for operand in op.ins:
                for key, dim in zip(operand.keys, operand.dims, strict=True):
                    if key[0] == "b":
                        for i in ids([dim]):
                            if axes[i].in_params and i != batch:
                                name(i, "experts")
        if op.primitive == "ragged_dot_general":
            for key, dim in zip(op.ins[1].keys, op.ins[1].dims, strict=True):
                if key in op.blocked:
                    for i in ids([dim]):
                        name(i, "experts")
    for i in ids(walker.picked):
        if axes[i].in_params and not axes[i].loop:
            alike(i, "experts")
            axes[i].why_whole = axes[i].why_whole or "a loop takes one at a time, by an index that it computes"
    looked_up = ids(walker.looked_up)
    if looked_up:
        name(max(looked_up, key=lambda i: axes[i].size), "vocab")
    for i in ids(walker.softmaxed):
        if axes[i].in_params and i not in heads and i not in names and axes[i].leads:
            name(i, "vocab_out" if "vocab" in names.values() else "vocab")

    weight_dims = [[i for d in dims for i in d if not axes[i].loop] for dims in model.params]
    made, spent = _uses(walker)
    made_ids, spent_ids = ({model._ids[a] for a, leaves in uses.items() if leaves} for uses in (made, spent))
    touched = Counter(i for dims in weight_dims for i in set(dims))
    carried = {i for i in ids(walker.carried) if axes[i].in_params}
    streams = carried or {model._ids[a] for a in made if len(made[a]) > 1 and len(spent[a]) > 1}
    for i in sorted(streams - names.keys(), key=lambda i: (-touched[i], i)):
        name(i, "embed")
        axes[i].why_whole = axes[i].why_whole or "the residual stream stays whole, or every norm would communicate"
    for axis in axes:
        if axis.id not in names and axis.leads and not axis.segments and axis.id in made_ids & spent_ids:
            name(axis.id, "mlp")
    for dims in model.args:
        for dim in dims[1:]:
            for i in dim:
                if not axes[i].in_params and not axes[i].loop and "seq" not in names.values():
                    name(i, "seq")
    numbers = itertools.count()
    for axis in axes:
        axis.name = names.get(axis.id) or f"axis_{next(numbers)}"
    for axis in axes:
        if axis.segments:
            inner = (".".join(axes[i].name for i in s) or "1" for s in axis.segments)
            if axis.in_params and axis.id not in names:
                axis.name = f"[{'|'.join(inner)}]".replace("kv_heads.q_groups", "q_heads")


def _unlooped(model: "Inferred", dims):
    return [d for d in dims if not any(model.logical[i].loop for i in d)]


def _fused(dims, i: int, j: int) -> bool:
    """j follows i in one fused dim, or leads the dim after it."""
    for a, b in itertools.pairwise(dims):
        if a and b and a[-1] == i and b[0] == j:
            return True
    return any((i, j) in itertools.pairwise(d) for d in dims)


def _scores(op: Op, ids, batch: int | None, axes) -> tuple[list[int], list[int], list[int]] | None:
    """(head axes, position axes, contracted axes) of a product of two activations per batch row, as in attention."""
    if op.primitive != "dot_general" or any(o.origin is not None for o in op.ins) or batch is None:
        return None
    batched = [i for k, d in zip(op.ins[0].keys, op.ins[0].dims) if k[0] == "b" for i in ids([d])]
    contracted = [i for k, d in zip(op.ins[0].keys, op.ins[0].dims) if k[0] == "k" for i in ids([d])]
    free = [i for o in op.ins for k, d in zip(o.keys, o.dims) if k[0] in "lr" for i in ids([d])]
    left, right = ([i for k, d in zip(o.keys, o.dims) if k[0] in "lr" for i in ids([d])] for o in op.ins)
    both = set(left) & set(right)  # learned positions make a parameter's dim of the sequence
    if batch not in batched or not left or not right or batch in contracted:
        return None
    positions = tuple([i for i in one if not axes[i].in_params or i in both] for one in (left, right))
    if not positions[0] or not positions[1] or any(not axes[i].in_params for i in contracted):
        return None
    heads = [i for i in (*batched, *free) if i != batch and i not in both and axes[i].in_params]
    return heads, [*positions[0], *positions[1]], contracted


def _uses(walker: Walker) -> tuple[dict[Atom, set[int]], dict[Atom, set[int]]]:
    """For each atom the parameters whose product with an activation makes it, and those that are summed over it."""
    made: defaultdict[Atom, set[int]] = defaultdict(set)
    spent: defaultdict[Atom, set[int]] = defaultdict(set)
    seen: set[int] = set()
    for op in walker.ops:
        for operand in op.ins if op.is_matmul else ():
            if operand.origin is not None and operand.origin not in seen:
                seen.add(operand.origin)  # the first use is that of the forward pass
                for key, dim in zip(operand.keys, operand.dims, strict=True):
                    for atom in expand(dim):
                        (spent if key in op.reduced else made)[atom].add(operand.origin)
    return made, spent
