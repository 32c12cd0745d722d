"""The logical axes of any model: `infer(loss_fn, params, batch)`, from its own jaxpr, without names or devices."""

import dataclasses
import hashlib
import math
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding_rules.applied import Cut, by_segments
from sharding_rules.dims import Atom, Dim, expand, nearly_whole, size_of, unify
from sharding_rules.primitives import Dims, fresh_dims
from sharding_rules.propagate import Op, Walker, itemsize


def infer(fn: Callable, params: Any, *args: Any) -> "Inferred":
    """Finds which dims of the parameters and of everything computed from them must be split together.

    A function that returns a float scalar (or a tuple that begins with one: the loss and auxiliaries) is taken as a
    loss and its gradient is traced too; any other function is traced as it is.

    Args:
      fn: `fn(params, *args)`, a pure function.
      params: any pytree of arrays or ShapeDtypeStructs. No array is held.
      args: pytrees of arrays or ShapeDtypeStructs; their leading dim is the batch.

    Raises:
      Whatever `fn` raises when it is traced, with a note that says so.
    """
    shapes, arg_shapes = _shapes(params), _shapes(args)
    found = _trace(fn, shapes, arg_shapes)
    cuts = [found.cut(i) for i in range(len(found.leaves))]
    if any(cuts):  # what `apply` runs: one product for each segment
        found = _trace(by_segments(fn, cuts), shapes, arg_shapes)
    return found


def on_one_device() -> Any:
    """A context in which functions are traced as on one device, whatever mesh is set: rules come from what a program
    computes, not from how it is sharded already."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def _trace(fn: Callable, shapes: Any, arg_shapes: Sequence[Any]) -> "Inferred":
    try:
        with on_one_device():
            out = jax.eval_shape(fn, shapes, *arg_shapes)
            has_aux = isinstance(out, tuple) and len(out) > 1 and _is_loss(out[0])
            train = _is_loss(out) or has_aux
            traced = jax.value_and_grad(fn, has_aux=has_aux, allow_int=True) if train else fn
            closed = jax.make_jaxpr(traced)(shapes, *arg_shapes)
    except Exception as error:
        error.add_note(f"while tracing {getattr(fn, '__qualname__', fn)} to infer its sharding rules{_place(error)}")
        raise
    leaves = jax.tree.leaves(shapes)
    walker = Walker()
    ins = [fresh_dims(v.aval.shape) for v in closed.jaxpr.invars]  # pyright: ignore[reportAttributeAccessIssue]
    consts = [fresh_dims(jnp.shape(c)) for c in closed.consts]
    origins = [*range(len(leaves)), *[None] * (len(ins) - len(leaves))]
    outs = walker.walk(closed.jaxpr, consts, ins, origins)
    if train:
        gradients = outs[len(outs) - len(leaves) :]
        for leaf, gradient, dims in zip(leaves, gradients, ins):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                for a, b in zip(gradient, dims, strict=True):
                    unify(a, b)
    paths = [(path_name(p), leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    return Inferred(walker, paths, jax.tree.structure(shapes), ins[: len(leaves)], ins[len(leaves) :], train)


def _place(error: Exception) -> str:
    """The last line of the user's own code that the error came through."""
    ours = (str(Path(jax.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


@dataclasses.dataclass(frozen=True, slots=True)
class Array:
    """Dims of an array as indices into its op's iteration space, major to minor within a fused dim."""

    dims: tuple[tuple[int, ...], ...]
    itemsize: int
    is_param: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An op of the program over logical axes. Equal ops are one step; `count` is how often they run.

    A step with `terms` is the sum of several products, of which the partial sums may be reduced as one.
    """

    primitive: str
    space: tuple[tuple[int, int], ...]  # (axis, size) of each iteration dim
    kinds: str  # p, r or b for each: parallel, reduced, blocked
    ins: tuple[Array, ...]
    outs: tuple[Array, ...]
    gradient: bool = False  # makes the gradient of a parameter
    terms: tuple["Step", ...] = ()

    @property
    def is_reduction(self) -> bool:
        return "r" in self.kinds and len(self.outs) == 1

    @property
    def flops(self) -> float:
        if self.primitive not in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            return 0.0
        size = 2.0
        seen = set()
        for array in (*self.ins, *self.outs):
            for i in (i for dim in array.dims for i in dim):
                if i not in seen and (self.kinds[i] != "b" or array in self.ins[1:]):
                    seen.add(i)
                    size *= self.space[i][1]
        return size


@dataclasses.dataclass
class Axis:
    """A logical axis."""

    id: int
    size: int
    name: str = ""
    why_whole: str = ""  # why nothing may split it; empty: it may be split
    in_params: bool = False
    leads: bool = False  # it is the leading atom of some parameter dim: splitting it is a PartitionSpec
    loop: bool = False
    segments: tuple[tuple[int, ...], ...] = ()  # per segment, the axes that it is made of, major to minor


class Inferred:
    """What `infer` found.

    Attributes:
      axes: the tree of the parameters, a tuple of names for each leaf, one for each dim: "embed", "q_heads*head_dim"
        for a fused dim, None for size 1.
      logical: the logical axes, by id.
      steps: the program over logical axes, each distinct op with its count.
      unknown: primitives without a rule and how often they occur; their dims are never split.
    """

    def __init__(self, walker: Walker, paths, treedef, params: Sequence[Dims], args: Sequence[Dims], train: bool):
        self.treedef, self.train = treedef, train
        self.paths = [p for p, _ in paths]
        self.leaves = [leaf for _, leaf in paths]
        self.unknown = dict(walker.unknown)
        self._classify(walker, params, args)
        self._steps(walker)
        self.reads: dict[int, int] = {}  # leaf -> how often a step gathers it, were it stored in parts
        for (leaf, scope), count in walker.reads.items():
            # What the forward pass gathers is kept for the backward pass, unless its block is recomputed.
            if leaf not in self.reads or scope in walker.recomputed:
                self.reads[leaf] = self.reads.get(leaf, 0) + count
        from sharding_rules.roles import name_axes

        name_axes(self, walker)

    def cut(self, leaf: int) -> Cut | None:
        """How a fused projection is computed by segments, if each of them can be split.

        Another dim that may be split makes it a row-parallel product: one sum for all segments is better.
        """
        dims = self.params[leaf]
        leads = [self.logical[dim[0]] if dim else None for dim in dims]
        at = [d for d, axis in enumerate(leads) if axis and axis.segments and (not axis.loop or len(dims[d]) > 1)]
        if len(at) != 1 or not all(axis.why_whole for axis in leads if axis):
            return None
        lead, *rest = dims[at[0]]
        segments = [(*s, *rest) for s in self.logical[lead].segments]
        firsts = [self.logical[s[0]] for s in segments if s]
        if len(firsts) < len(segments) or not all(a.in_params and not a.why_whole for a in firsts):
            return None
        sizes = tuple(math.prod(self.logical[i].size for i in s) for s in segments)
        return Cut(dim=at[0] - len(dims), sizes=sizes, groups=math.gcd(*(a.size for a in firsts)))

    @property
    def segments(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The fused axes that are computed by segments: the names of the parts of each segment."""
        found = [self.logical[dims[cut.dim][0]] for i, dims in enumerate(self.params) if (cut := self.cut(i))]
        return {axis.name: tuple(self._dim_parts(s) for s in axis.segments) for axis in found}

    @property
    def axes(self) -> Any:
        return jax.tree.unflatten(self.treedef, [self.leaf_axes(i) for i in range(len(self.leaves))])

    def leaf_axes(self, leaf: int) -> tuple[str | None, ...]:
        return tuple("*".join(parts) or None for parts in self.parts(leaf))

    def parts(self, leaf: int) -> tuple[tuple[str, ...], ...]:
        """Names of the parts of each dim, major to minor; kv heads times the group of each are the query heads."""
        return tuple(self._dim_parts(dim) for dim in self.params[leaf])

    def _dim_parts(self, dim: Sequence[int]) -> tuple[str, ...]:
        text = "*".join(self.logical[i].name for i in dim).replace("kv_heads*q_groups", "q_heads")
        return tuple(text.split("*")) if text else ()

    @property
    def sizes(self) -> dict[str, int]:
        """Logical axis name -> size, of those that occur in parameters, and the batch and positions."""
        found = {a.name: a.size for a in self.logical if a.in_params or a.name in ("batch", "seq")}
        if "kv_heads" in found and "q_groups" in found:
            found["q_heads"] = found["kv_heads"] * found["q_groups"]
        return found

    def _classify(self, walker: Walker, params: Sequence[Dims], args: Sequence[Dims]) -> None:
        """Atoms -> axes: atoms of the same part in different layers are one axis."""
        atoms: dict[Atom, int] = {}

        def add(dim: Dim):
            for atom in expand(dim):
                if atom not in atoms:
                    atoms[atom] = len(atoms)
                    for segment in atom.segments or ():
                        add(segment)

        for op in walker.ops:
            for operand in (*op.ins, *op.outs):
                for dim in operand.dims:
                    add(dim)
        for dims in (*params, *args):
            for dim in dims:
                add(dim)
        for atom in atoms:
            sizes = [size_of(s) for s in atom.segments or ()]
            if any(nearly_whole(n, atom.size) for n in sizes) or (len(sizes) == 2 and min(sizes) == 1 < max(sizes)):
                atom.segments = None  # one element was taken: nothing is fused
        colors = self._colors(walker, atoms, params)
        together = _meetings(walker, atoms, params)
        ids: dict[Atom, int] = {}
        members: dict[bytes, list[tuple[int, set[Atom]]]] = {}
        axes: list[Axis] = []
        for atom in sorted(atoms, key=lambda a: atoms[a]):
            for axis_id, group in members.setdefault(colors[atom], []):
                if not together[atom] & group:
                    ids[atom] = axis_id
                    group.add(atom)
                    break
            else:
                ids[atom] = len(axes)
                members[colors[atom]].append((len(axes), {atom}))
                axes.append(Axis(len(axes), atom.size))
        for atom, i in ids.items():
            axes[i].loop |= atom.loop
            axes[i].why_whole = axes[i].why_whole or atom.blocked
            if atom.segments and not axes[i].segments:
                axes[i].segments = tuple(tuple(ids[a] for a in expand(s)) for s in atom.segments)
        for axis in axes:
            if axis.loop:
                axis.why_whole = "a loop walks it"
            elif axis.segments and not any(axis.segments):
                axis.loop, axis.why_whole = True, "the program takes its elements one by one"
            elif axis.segments:
                axis.why_whole = axis.why_whole or "it is cut into segments"
        self.logical = axes
        self._ids = ids
        self.params = [tuple(tuple(ids[a] for a in expand(d)) for d in dims) for dims in params]
        self.args = [tuple(tuple(ids[a] for a in expand(d)) for d in dims) for dims in args]
        for dims in self.params:
            for dim in dims:
                for n, i in enumerate(dim):
                    axes[i].in_params = True
                    axes[i].leads |= n == 0
                    for j in (j for segment in axes[i].segments for j in segment):
                        axes[j].in_params = True

    def _colors(self, walker: Walker, atoms: dict[Atom, int], params: Sequence[Dims]) -> dict[Atom, bytes]:
        """Colour refinement: atoms that no finite chain of ops tells apart have one colour, whatever the depth."""
        shown: list[tuple[str, list[list[Atom]]]] = []
        for op in walker.ops:
            if op.is_matmul or op.primitive in ("gather", "scatter-add") or op.primitive.startswith("reduce"):
                layout = [[a for d in o.dims for a in expand(d)] for o in (*op.ins, *op.outs)]
                kinds = "".join(
                    "r" if k in op.reduced else "b" if k in op.blocked else "p" for o in op.ins for k in o.keys
                )
                shown.append((f"{op.primitive}/{kinds}/{op.count}", layout))
        for dims in params:
            shown.append(("param", [[a for d in dims for a in expand(d)]]))
        colors = {a: f"{a.size}/{a.loop}/{bool(a.segments)}/{a.blocked}".encode() for a in atoms}
        for _ in range(3):
            seen: dict[Atom, set[bytes]] = {a: set() for a in atoms}
            for name, layout in shown:
                text = b"|".join(b",".join(colors[a] for a in array) for array in layout)
                digest = hashlib.blake2b(name.encode() + text, digest_size=8).digest()
                for i, array in enumerate(layout):
                    for j, atom in enumerate(array):
                        seen[atom].add(digest + bytes((i, j)))
            colors = {
                a: hashlib.blake2b(colors[a] + b"".join(sorted(seen[a])), digest_size=8).digest().hex().encode()
                for a in atoms
            }
        return colors

    def _steps(self, walker: Walker) -> None:
        weights = {tuple(sorted(i for dim in dims for i in dim if not self.logical[i].loop)) for dims in self.params}
        steps: dict[Step, int] = {}
        uses: dict[int, tuple[int, str, tuple[tuple[int, str], ...]]] = {}
        terms: dict[int, list[Step]] = {}  # of the sums that have begun
        for op in walker.ops:
            step = _step(op, self._ids)
            if step is None:
                continue
            out = tuple(sorted(step.space[i][0] for dim in step.outs[0].dims for i in dim))
            if self.train and step.is_reduction and out in weights and step.primitive != "reduce_max":
                made = tuple(dataclasses.replace(a, is_param=True) for a in step.outs)
                step = dataclasses.replace(step, gradient=True, outs=made)
            # The first read of a parameter by an op is its use in the forward pass.
            for operand, array in zip(op.ins, step.ins, strict=True):
                computes = op.is_matmul or op.primitive == "gather"
                if computes and operand.origin is not None and operand.origin not in uses:
                    kinds = ((step.space[i][0], step.kinds[i]) for dim in array.dims for i in dim)
                    uses[operand.origin] = (operand.origin, op.primitive, tuple(kinds))
            added = walker.sums.get(op.order, [op.order])
            terms.setdefault(id(added), []).append(step)
            if op.order == max(added):
                found = terms.pop(id(added))
                step = found[0] if len(found) == 1 else _sum(found)
                steps[step] = steps.get(step, 0) + op.count
        self.steps = steps
        self.uses = list(uses.values())


def _step(op: Op, ids: dict[Atom, int]) -> Step | None:
    """The op over axes; None where it can cost nothing."""
    space: list[tuple[int, int]] = []
    kinds: list[str] = []
    place: dict[Any, list[int]] = {}

    def index(key, dim: Dim) -> tuple[int, ...]:
        atoms = expand(dim)
        if key not in place or len(place[key]) != len(atoms):
            place[key] = list(range(len(space), len(space) + len(atoms)))
            kind = "r" if key in op.reduced else "b" if key in op.blocked else "p"
            space.extend((ids[a], a.size) for a in atoms)
            kinds.extend(kind * len(atoms))
        return tuple(place[key])

    if op.primitive == "reshape":
        flat_in = [a for d in op.ins[0].dims for a in expand(d)]
        space = [(ids[a], a.size) for a in flat_in]
        if [ids[a] for d in op.outs[0].dims for a in expand(d)] != [s[0] for s in space]:
            return None
        arrays = []
        for operand in (op.ins[0], op.outs[0]):
            at, dims = 0, []
            for dim in operand.dims:
                n = len(expand(dim))
                dims.append(tuple(range(at, at + n)))
                at += n
            arrays.append(Array(tuple(d for d in dims if d), operand.itemsize, operand.origin is not None))
        if arrays[0].dims == arrays[1].dims:
            return None
        return Step("reshape", tuple(space), "p" * len(space), (arrays[0],), (arrays[1],))
    ins = tuple(
        Array(tuple(index(k, d) for k, d in zip(o.keys, o.dims, strict=True)), o.itemsize, o.origin is not None)
        for o in op.ins
    )
    outs = tuple(Array(tuple(index(k, d) for k, d in zip(o.keys, o.dims, strict=True)), o.itemsize) for o in op.outs)
    if "r" not in kinds and "b" not in kinds and not op.is_matmul and op.primitive != "elementwise":
        return None
    return Step(op.primitive, tuple(space), "".join(kinds), ins, outs)


def _sum(terms: Sequence[Step]) -> Step:
    space = tuple(s for term in terms for s in term.space)
    return Step("sum", space, "".join(term.kinds for term in terms), (), (), terms=tuple(terms))


def _meetings(walker: Walker, atoms: dict[Atom, int], params: Sequence[Dims]) -> dict[Atom, set[Atom]]:
    """For each atom those that occur beside it in some op or parameter: they are not one axis."""
    together: dict[Atom, set[Atom]] = {a: set() for a in atoms}
    groups = [{a for o in (*op.ins, *op.outs) for d in o.dims for a in expand(d)} for op in walker.ops]
    groups += [{a for d in dims for a in expand(d)} for dims in params]
    for group in groups:
        for atom in group:
            together[atom] |= group - {atom}
    return together


def _is_loss(out: Any) -> bool:
    return getattr(out, "shape", None) == () and jnp.issubdtype(out.dtype, jnp.floating)


def _shapes(tree: Any) -> Any:
    def shape(x):
        if not hasattr(x, "shape"):
            x = np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape, tree)


def path_name(path) -> str:
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


__all__ = ["Array", "Axis", "Inferred", "Step", "infer", "itemsize"]
