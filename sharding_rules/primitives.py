"""One rule per primitive: which dims of its inputs and outputs are the same.

A rule takes the walker, the equation and the dims of its inputs, returns the dims of its outputs, and unites the dims
that must be split together. Rules of primitives that can cost communication also record an op (see propagate.py).
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sharding_rules.dims import Dim, block, concatenate, cut, expand, fresh, size_of, take, unify

if TYPE_CHECKING:
    from sharding_rules.propagate import Op, Walker

Dims = tuple[Dim, ...]
Rule = Callable[["Walker", Any, list[Dims]], Sequence[Dims]]


def fresh_dims(shape: Sequence[int]) -> Dims:
    return tuple(fresh(n) for n in shape)


def elementwise(w: "Walker", eqn, ins):
    shape = eqn.outvars[0].aval.shape
    full = [dims for dims in ins if len(dims) == len(shape)]
    out = []
    for i, size in enumerate(shape):
        same = [dims[i] for dims in full if size_of(dims[i]) == size]  # dims of size 1 are broadcast
        for other in same[1:]:
            if other is not same[0]:
                unify(same[0], other)
        out.append(same[0] if same else fresh(size))
    if len(shape) > 1:
        w.record(eqn, [], [(eqn.outvars[0], out, range(len(out)))])
    return [tuple(out)] * len(eqn.outvars)


def unknown(w: "Walker", eqn, ins):
    """Nothing is assumed: what goes in and what comes out must be whole."""
    name = eqn.primitive.name
    w.unknown[name] = w.unknown.get(name, 0) + 1
    outs = [fresh_dims(v.aval.shape) for v in eqn.outvars]
    _opaque(w, eqn, ins, outs)
    for dim in (d for dims in (*ins, *outs) for d in dims):
        block(dim, f"the primitive {name} is not known")
    return outs


def _opaque(w: "Walker", eqn, ins, outs):
    """Records an op with every dim blocked."""
    ops_in = [(v, d, [("i", i, j) for j in range(len(d))]) for i, (v, d) in enumerate(zip(eqn.invars, ins))]
    ops_out = [(v, d, [("o", i, j) for j in range(len(d))]) for i, (v, d) in enumerate(zip(eqn.outvars, outs))]
    keys = [k for _, _, ks in ops_in + ops_out for k in ks]
    w.record(eqn, ops_in, ops_out, blocked=keys)


def generate(w: "Walker", eqn, ins):
    """Each device makes its own part: iota, random bits."""
    return [fresh_dims(v.aval.shape) for v in eqn.outvars]


def dot_general(w: "Walker", eqn, ins):
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    lhs, rhs = ins
    for i, j in zip((*contract_l, *batch_l), (*contract_r, *batch_r), strict=True):
        unify(lhs[i], rhs[j])
    keys_l: list[Any] = [("l", i) for i in range(len(lhs))]
    keys_r: list[Any] = [("r", i) for i in range(len(rhs))]
    for n, (i, j) in enumerate(zip(contract_l, contract_r, strict=True)):
        keys_l[i] = keys_r[j] = ("k", n)
    for n, (i, j) in enumerate(zip(batch_l, batch_r, strict=True)):
        keys_l[i] = keys_r[j] = ("b", n)
    free_l = [i for i in range(len(lhs)) if i not in (*contract_l, *batch_l)]
    free_r = [i for i in range(len(rhs)) if i not in (*contract_r, *batch_r)]
    dims = (*(lhs[i] for i in batch_l), *(lhs[i] for i in free_l), *(rhs[j] for j in free_r))
    keys = [("b", n) for n in range(len(batch_l))] + [keys_l[i] for i in free_l] + [keys_r[j] for j in free_r]
    w.record(
        eqn,
        [(eqn.invars[0], lhs, keys_l), (eqn.invars[1], rhs, keys_r)],
        [(eqn.outvars[0], dims, keys)],
        reduced=[("k", n) for n in range(len(contract_l))],
    )
    return [dims]


def ragged_dot_general(w: "Walker", eqn, ins):
    """Rows grouped by a count per group: rows stay where they are, groups are blocked, the rest is a matmul."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract_l, contract_r), (batch_l, batch_r) = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    ragged = tuple(numbers.lhs_ragged_dimensions)
    lhs, rhs = ins[0], ins[1]
    keys_l: list[Any] = [("l", i) for i in range(len(lhs))]
    keys_r: list[Any] = [("r", i) for i in range(len(rhs))]
    for n, (i, j) in enumerate(zip((*contract_l, *batch_l), (*contract_r, *batch_r), strict=True)):
        unify(lhs[i], rhs[j])
        keys_l[i] = keys_r[j] = ("k" if n < len(contract_l) else "b", n)
    reduced = [keys_l[i] for i in contract_l]
    free_r = [j for j in range(len(rhs)) if j not in (*contract_r, *batch_r, *groups)]
    free_l = [i for i in range(len(lhs)) if i not in (*contract_l, *batch_l)]
    out: list[tuple[Dim, Any]] = [(lhs[i], keys_l[i]) for i in batch_l]
    if any(i in contract_l for i in ragged):  # the weight gradient: one product per group
        out = [(fresh(eqn.outvars[0].aval.shape[0]), ("g", 0)), *out]
    out += [(lhs[i], keys_l[i]) for i in free_l] + [(rhs[j], keys_r[j]) for j in free_r]
    dims, keys = tuple(d for d, _ in out), [k for _, k in out]
    blocked = [keys_r[j] for j in groups] + [("g", 0)]
    w.record(
        eqn,
        [(eqn.invars[0], lhs, keys_l), (eqn.invars[1], rhs, keys_r)],
        [(eqn.outvars[0], dims, keys)],
        reduced=reduced,
        blocked=blocked,
    )
    return [dims]


def convolution(w: "Walker", eqn, ins):
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs = ins
    groups, batch_groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
    keys_l: list[Any] = [("l", i) for i in range(len(lhs))]
    keys_r: list[Any] = [("r", i) for i in range(len(rhs))]
    out = list(fresh_dims(eqn.outvars[0].aval.shape))
    keys_o: list[Any] = [("o", i) for i in range(len(out))]
    (lb, lf, *_), (ro, ri, *_), (ob, of, *_) = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    blocked = [k for s, ks in ((numbers.lhs_spec, keys_l), (numbers.rhs_spec, keys_r), (numbers.out_spec, keys_o))
               for k in (ks[i] for i in s[2:])]  # fmt: skip
    reduced = []
    if batch_groups == 1:
        out[ob], keys_o[ob] = lhs[lb], keys_l[lb]
    if groups == 1 and batch_groups == 1:
        unify(lhs[lf], rhs[ri])
        keys_r[ri] = keys_l[lf]
        reduced = [keys_l[lf]]
        out[of], keys_o[of] = rhs[ro], keys_r[ro]
    elif batch_groups == 1 and size_of(rhs[ri]) == 1 and size_of(lhs[lf]) == size_of(rhs[ro]):  # depthwise
        unify(lhs[lf], rhs[ro])
        keys_r[ro] = keys_o[of] = keys_l[lf]
        out[of] = lhs[lf]
    elif batch_groups > 1 and size_of(lhs[lb]) == batch_groups == size_of(rhs[ro]):  # a depthwise kernel's gradient
        unify(lhs[lb], rhs[ro])
        keys_r[ro] = keys_o[of] = keys_l[lb]
        out[of] = lhs[lb]
        unify(lhs[lf], rhs[ri])
        keys_r[ri] = keys_l[lf]
        reduced = [keys_l[lf]]
    else:
        out[of], keys_o[of] = rhs[ro], keys_r[ro]
        blocked += [keys_l[lf], keys_r[ri], keys_r[ro], keys_l[lb]]
    w.record(
        eqn,
        [(eqn.invars[0], lhs, keys_l), (eqn.invars[1], rhs, keys_r)],
        [(eqn.outvars[0], tuple(out), keys_o)],
        reduced=reduced,
        blocked=blocked,
    )
    return [tuple(out)]


def reduction(w: "Walker", eqn, ins):
    axes = eqn.params["axes"]
    outs = []
    for var, dims in zip(eqn.outvars, ins):
        kept = [i for i in range(len(dims)) if i not in axes]
        out = tuple(dims[i] for i in kept)
        w.record(eqn, [(eqn.invars[0], dims, range(len(dims)))], [(var, out, kept)], reduced=axes)
        outs.append(out)
    if eqn.primitive.name == "reduce_max" and len(axes) == 1:
        w.softmaxed.append(ins[0][axes[0]])
    return outs


def along_one_dim(w: "Walker", eqn, ins):
    """cumsum, sort and their kin: the dim that they run along must be whole."""
    axis = eqn.params.get("axis", eqn.params.get("dimension", 0))
    for other in ins[1:]:
        for a, b in zip(ins[0], other, strict=True):
            unify(a, b)
    for i, o, dims in zip(eqn.invars, eqn.outvars, ins):
        w.record(eqn, [(i, dims, range(len(dims)))], [(o, dims, range(len(dims)))], blocked=[axis])
    return list(ins)


def top_k(w: "Walker", eqn, ins):
    (dims,) = ins
    axis = eqn.params.get("axis", len(dims) - 1) % len(dims)
    out = (*dims[:axis], fresh(eqn.outvars[0].aval.shape[axis]), *dims[axis + 1 :])
    keys = [i if i != axis else "top" for i in range(len(dims))]
    for var in eqn.outvars:
        w.record(eqn, [(eqn.invars[0], dims, range(len(dims)))], [(var, out, keys)], blocked=[axis, "top"])
    return [out, out]


def broadcast_in_dim(w: "Walker", eqn, ins):
    shape, mapping = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    out = list(fresh_dims(shape))
    for i, j in enumerate(mapping):
        if size_of(ins[0][i]) == shape[j]:
            out[j] = ins[0][i]
    return [tuple(out)]


def reshape(w: "Walker", eqn, ins):
    shape = eqn.outvars[0].aval.shape
    if math.prod(shape) == 0:
        return [fresh_dims(shape)]
    atoms = [a for dim in ins[0] for a in expand(dim)]
    out: list[Dim] = []
    for size in reversed(shape):
        dim = take(atoms, size)
        if dim is None:  # sizes without a common factoring, as in (6, 4) -> (8, 3)
            fresh_out = fresh_dims(shape)
            _opaque(w, eqn, ins[:1], [fresh_out])
            return [fresh_out]
        out.insert(0, dim)
    w.record(eqn, [(eqn.invars[0], ins[0], ["flat"] * len(ins[0]))], [(eqn.outvars[0], out, ["flat"] * len(out))])
    return [tuple(out)]


def transpose(w: "Walker", eqn, ins):
    return [tuple(ins[0][i] for i in eqn.params["permutation"])]


def squeeze(w: "Walker", eqn, ins):
    return [tuple(d for i, d in enumerate(ins[0]) if i not in eqn.params["dimensions"])]


def expand_dims(w: "Walker", eqn, ins):
    out = list(ins[0])
    for i in sorted(eqn.params["dimensions"]):
        out.insert(i, ())
    return [tuple(out)]


def reverse(w: "Walker", eqn, ins):
    (dims,) = ins
    out = tuple(d if i not in eqn.params["dimensions"] else fresh(size_of(d)) for i, d in enumerate(dims))
    _move(w, eqn, dims, out)
    return [out]


def slice_(w: "Walker", eqn, ins):
    starts, stops, strides = eqn.params["start_indices"], eqn.params["limit_indices"], eqn.params["strides"]
    out = []
    for i, dim in enumerate(ins[0]):
        stride = strides[i] if strides else 1
        part = cut(dim, starts[i], stops[i]) if stride == 1 else None
        size = eqn.outvars[0].aval.shape[i]
        out.append(dim if size == size_of(dim) and stride == 1 else part if part is not None else fresh(size))
    _move(w, eqn, ins[0], out)
    return [tuple(out)]


def split_(w: "Walker", eqn, ins):
    axis, outs, at = eqn.params["axis"], [], 0
    for var, size in zip(eqn.outvars, eqn.params["sizes"], strict=True):
        part = cut(ins[0][axis], at, at + size)
        out = (*ins[0][:axis], part if part is not None else fresh(size), *ins[0][axis + 1 :])
        _move(w, eqn, ins[0], out, var)
        outs.append(out)
        at += size
    return outs


def concatenate_(w: "Walker", eqn, ins):
    axis = eqn.params["dimension"]
    for other in ins[1:]:
        for i, (a, b) in enumerate(zip(ins[0], other, strict=True)):
            if i != axis:
                unify(a, b)
    joined = concatenate([dims[axis] for dims in ins])
    out = (*ins[0][:axis], joined, *ins[0][axis + 1 :])
    for var, dims in zip(eqn.invars, ins, strict=True):
        _move(w, eqn, dims, out, eqn.outvars[0], var)
    return [out]


def unstack(w: "Walker", eqn, ins):
    axis = eqn.params["axis"]
    _cut_apart(ins[0][axis])
    out = (*ins[0][:axis], *ins[0][axis + 1 :])
    keys = [i for i in range(len(ins[0])) if i != axis]
    for var in eqn.outvars:
        w.record(eqn, [(eqn.invars[0], ins[0], range(len(ins[0])))], [(var, out, keys)], blocked=[axis])
    return [out] * len(eqn.outvars)


def stack(w: "Walker", eqn, ins):
    axis = eqn.params["axis"]
    for other in ins[1:]:
        for a, b in zip(ins[0], other, strict=True):
            unify(a, b)
    new = fresh(len(ins))
    _cut_apart(new)
    out = (*ins[0][:axis], new, *ins[0][axis:])
    keys = [i if i < axis else i + 1 for i in range(len(ins[0]))]
    for var in eqn.invars:
        w.record(eqn, [(var, ins[0], keys)], [(eqn.outvars[0], out, range(len(out)))], blocked=[axis])
    return [out]


def _cut_apart(dim: Dim) -> None:
    """Elements that are used one by one are segments of size 1."""
    for i in range(size_of(dim)):
        cut(dim, i, i + 1)


def pad(w: "Walker", eqn, ins):
    dims, out = ins[0], []
    for dim, (low, high, interior) in zip(dims, eqn.params["padding_config"], strict=True):
        size = size_of(dim)
        if interior or low < 0 or high < 0:
            kept = cut(dim, -min(low, 0), size + min(high, 0)) if not interior and low <= 0 and high <= 0 else None
            new = size + low + high + max(size - 1, 0) * interior
            out.append(kept if kept is not None else fresh(new))
        elif low or high:
            out.append(concatenate([fresh(low), dim, fresh(high)]))
        else:
            out.append(dim)
    _move(w, eqn, dims, out)
    return [tuple(out)]


def _move(w: "Walker", eqn, dims: Dims, out: Sequence[Dim], out_var=None, in_var=None):
    """Records a slice, pad or concatenation: dims that change are whole in the larger array."""
    keys = list(range(len(dims)))
    changed = {i for i in keys if out[i] is not dims[i] and (expand(out[i]) != expand(dims[i]))}
    keys_o = [i if i not in changed else ("out", i) for i in keys]
    blocked = [*changed] + [("out", i) for i in changed]
    if changed:
        w.record(eqn, [(in_var or eqn.invars[0], dims, keys)], [(out_var or eqn.outvars[0], out, keys_o)],
                 blocked=blocked)  # fmt: skip


def dynamic_slice(w: "Walker", eqn, ins):
    dims, shape = ins[0], eqn.outvars[0].aval.shape
    out = tuple(d if size_of(d) == n else fresh(n) for d, n in zip(dims, shape, strict=True))
    _move(w, eqn, dims, out)
    if w.trips > 1 and w.origin(eqn.invars[0]) is not None:
        for dim, n in zip(dims, shape, strict=True):
            if n == 1 and size_of(dim) == w.trips:  # layers, taken in turn
                for atom in expand(dim):
                    atom.loop = True
            elif n == 1 and size_of(dim) > 1:
                w.picked.append(dim)
    return [out]


def dynamic_update_slice(w: "Walker", eqn, ins):
    dims, update = ins[0], ins[1]
    for a, b in zip(dims, update, strict=True):
        if size_of(a) == size_of(b):
            unify(a, b)
    return [dims]


def gather(w: "Walker", eqn, ins):
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = ins[0], ins[1]
    out = list(fresh_dims(eqn.outvars[0].aval.shape))
    keys_x: list[Any] = [("x", i) for i in range(len(operand))]
    keys_i: list[Any] = [("i", i) for i in range(len(indices))]
    keys_o: list[Any] = [("o", i) for i in range(len(out))]
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    window = [i for i in range(len(operand)) if i not in dropped]
    blocked = [keys_i[-1]]
    for i, o in zip(window, numbers.offset_dims, strict=True):
        if size_of(operand[i]) == sizes[i]:
            out[o], keys_o[o] = operand[i], keys_x[i]
        else:
            blocked += [keys_x[i], keys_o[o]]
    batch = [o for o in range(len(out)) if o not in numbers.offset_dims]
    for i, o in zip(range(len(indices) - 1), batch, strict=True):
        out[o], keys_o[o] = indices[i], keys_i[i]
    for x, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        unify(operand[x], indices[i])
        keys_x[x] = keys_i[i]
    for i in numbers.collapsed_slice_dims:
        if w.origin(eqn.invars[0]) is not None:
            w.looked_up.append(operand[i])
        else:
            w.softmaxed.append(operand[i])
    w.record(
        eqn,
        [(eqn.invars[0], operand, keys_x), (eqn.invars[1], indices, keys_i)],
        [(eqn.outvars[0], tuple(out), keys_o)],
        # A split table is looked up where the row is, zero elsewhere, and summed.
        reduced=[keys_x[i] for i in numbers.collapsed_slice_dims],
        blocked=blocked,
    )
    return [tuple(out)]


def scatter(w: "Walker", eqn, ins):
    numbers = eqn.params["dimension_numbers"]
    operand, indices, updates = ins[0], ins[1], ins[2]
    keys_x: list[Any] = [("x", i) for i in range(len(operand))]
    keys_i: list[Any] = [("i", i) for i in range(len(indices))]
    keys_u: list[Any] = [("u", i) for i in range(len(updates))]
    dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    window = [i for i in range(len(operand)) if i not in dropped]
    blocked = [keys_i[-1]]
    for i, u in zip(window, numbers.update_window_dims, strict=True):
        if size_of(operand[i]) == size_of(updates[u]):
            unify(operand[i], updates[u])
            keys_u[u] = keys_x[i]
        else:
            blocked += [keys_x[i], keys_u[u]]
    scattered = [u for u in range(len(updates)) if u not in numbers.update_window_dims]
    for i, u in zip(range(len(indices) - 1), scattered, strict=True):
        unify(indices[i], updates[u])
        keys_u[u] = keys_i[i]
    for x, i in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True):
        unify(operand[x], indices[i])
        keys_x[x] = keys_i[i]
        keys_u = [keys_x[x] if k == ("i", i) else k for k in keys_u]
    reduced = [k for k in keys_u if k not in keys_x]
    w.record(
        eqn,
        [(eqn.invars[1], indices, keys_i), (eqn.invars[2], updates, keys_u)],
        [(eqn.outvars[0], operand, keys_x)],
        reduced=reduced,
        blocked=blocked,
    )
    return [operand]


def window(w: "Walker", eqn, ins):
    """Pooling and its gradients: dims of window 1 are parallel, the others blocked."""
    sizes = eqn.params["window_dimensions"]
    shape = eqn.outvars[0].aval.shape
    for other in ins[1:]:
        for i, n in enumerate(sizes):
            if n == 1 and len(other) == len(sizes):
                unify(ins[0][i], other[i])
    out = tuple(ins[0][i] if n == 1 else fresh(shape[i]) for i, n in enumerate(sizes))
    if len(ins[0]) == len(sizes):
        _move(w, eqn, ins[0], out)
    return [out]


def scan(w: "Walker", eqn, ins):
    p = eqn.params
    n, m, _ = (len(part) for part in p["ft_in"].unpack())
    length = p["length"]
    consts, carry, xs = ins[:n], ins[n : n + m], ins[n + m :]
    layer = fresh(length)
    for dims in xs:
        unify(dims[0], layer)
    for atom in expand(layer):
        atom.loop = True
    origins = [w.origin(v) for v in eqn.invars]
    if any(o is not None for o in origins[n + m :]):
        w.carried += [d for dims in carry for d in dims]
    before, w.trips = w.trips, length
    outs = w.body(p["jaxpr"], [*consts, *carry, *(x[1:] for x in xs)], origins, length)
    w.trips = before
    for a, b in zip(carry, outs[:m], strict=True):
        for x, y in zip(a, b, strict=True):
            unify(x, y)
    return [*carry, *((layer, *dims) for dims in outs[m:])]


def while_(w: "Walker", eqn, ins):
    """The trip count is not known: one trip is counted."""
    c, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = ins[c + b :]
    origins = [w.origin(v) for v in eqn.invars]
    w.body(eqn.params["cond_jaxpr"], [*ins[:c], *carry], [*origins[:c], *origins[c + b :]], 1)
    outs = w.body(eqn.params["body_jaxpr"], [*ins[c : c + b], *carry], origins[c:], 1)
    for a, o in zip(carry, outs, strict=True):
        for x, y in zip(a, o, strict=True):
            unify(x, y)
    return list(carry)


def cond(w: "Walker", eqn, ins):
    """All branches are united; the one that computes most is counted."""
    origins = [w.origin(v) for v in eqn.invars[1:]]
    reads = dict(w.reads)
    outs: list[Dims] = []
    walked: list[tuple[int, list[Op], dict]] = []
    for branch in eqn.params["branches"]:
        w.reads, start = dict(reads), len(w.ops)
        found = w.body(branch, ins[1:], origins, 1, new_scope=False)
        for a, b in zip(outs, found):
            for x, y in zip(a, b, strict=True):
                unify(x, y)
        outs = outs or found
        walked.append((sum(op.volume for op in w.ops[start:]), w.ops[start:], w.reads))
    heaviest = max(walked, key=lambda branch: branch[0])
    for branch in walked:
        for op in branch[1] if branch is not heaviest else ():
            op.count = 0
    w.reads = heaviest[2]
    return outs


def remat(w: "Walker", eqn, ins):
    """A recomputed block reads its parameters once more: a scope of its own."""
    origins = [w.origin(v) for v in eqn.invars]
    if eqn.params.get("differentiated"):
        w.recomputed.add(w._scopes + 1)
    return w.body(eqn.params["jaxpr"], ins, origins, 1, new_scope=bool(eqn.params.get("differentiated")))


ELEMENTWISE = frozenset([
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e",
    "bessel_i1e", "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type",
    "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1",
    "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac", "mulhi", "polygamma", "regularized_incomplete_beta",
    "zeta", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "one_minus_square", "or", "population_count", "pow", "real",
    "reduce_precision", "rem", "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
    "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
    "tan", "tanh", "xor", "device_put", "name", "le_to", "lt_to", "pvary", "reshard", "layout_constraint",
])  # fmt: skip
GENERATORS = frozenset([
    "iota", "random_bits", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split",
    "random_gamma", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_clone", "create_token", "empty",
    "empty2", "full",
])  # fmt: skip
REDUCTIONS = frozenset([
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax",
    "argmin",
])  # fmt: skip
# What a parameter may pass through and still be that parameter.
LAYOUT_ONLY = frozenset([
    "convert_element_type", "stop_gradient", "transpose", "squeeze", "reshape", "slice", "dynamic_slice", "copy",
    "sharding_constraint", "broadcast_in_dim", "split", "name",
])  # fmt: skip
CONTROL_FLOW = frozenset(["scan", "while", "cond", "checkpoint", "remat", "remat2"])
OPAQUE = frozenset(["pallas_call", "shard_map", "custom_partitioning", "custom_call", "ffi_call", "pure_callback"])


def barrier(w: "Walker", eqn, ins):
    return list(ins)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(GENERATORS, generate),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort"], along_one_dim),
    **dict.fromkeys(
        ["scatter", "scatter-add", "scatter_add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"], scatter
    ),
    **dict.fromkeys(["reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"], window),
    **dict.fromkeys(["select_and_scatter_add", "select_and_gather_add"], window),
    **dict.fromkeys(["checkpoint", "remat", "remat2"], remat),
    "optimization_barrier": barrier,
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": concatenate_,
    "cond": cond,
    "conv_general_dilated": convolution,
    "dot_general": dot_general,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "expand_dims": expand_dims,
    "gather": gather,
    "pad": pad,
    "ragged_dot_general": ragged_dot_general,
    "reshape": reshape,
    "rev": reverse,
    "scan": scan,
    "slice": slice_,
    "split": split_,
    "stack": stack,
    "unstack": unstack,
    "squeeze": squeeze,
    "top_k": top_k,
    "transpose": transpose,
    "while": while_,
}
