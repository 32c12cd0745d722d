"""A function with its plan said inside, where specs of the parameters alone leave the partitioner a choice.

Parameters that rest split over storage axes (fsdp, cp) are gathered where they are read: left to itself the
partitioner often moves activations instead. A fused projection, of segments laid one after another, is computed by
segments (segments.py), so that each device computes its part of every one; what is fused otherwise is whole where it is
cut apart or put together: left to itself the partitioner splits it across its boundaries and exchanges the pieces.
`applied(plan, fn, mesh)` traces the function and evaluates it again so, inside loops and recomputed blocks too.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding_rules import segments
from sharding_rules.segments import Regrouped

if TYPE_CHECKING:
    from sharding_rules.plan import Leaf, Plan

# An equation that only hands a parameter on: it is gathered later, where something is computed with it.
HANDS_ON = frozenset(["convert_element_type", "stop_gradient", "squeeze", "slice", "dynamic_slice", "copy"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A fused dim that is computed by segments; see segments.py."""

    dim: int  # from the end
    sizes: tuple[int, ...]  # of its segments
    groups: int  # into which each segment is cut
    axes: tuple[str, ...] = ()  # mesh axes that split the groups


@dataclasses.dataclass(frozen=True)
class Read:
    """How a parameter is read: gathered, if it is a leaf of a plan on a mesh, and regrouped, if it has a cut."""

    cut: Cut | None = None
    leaf: "Leaf | None" = None
    mesh: Mesh | None = None

    def __call__(self, x: Any) -> Any:
        spec = self._spec(x)
        if spec is not None:
            x = self._said(x, spec, self._spec(x, at_rest=True) or spec)
        if self.cut is None or x.shape[self.cut.dim] != sum(self.cut.sizes):
            return x
        dim = x.ndim + self.cut.dim
        y = segments.regroup(x, dim, self.cut.sizes, self.cut.groups)
        if spec is None:
            return y
        whole = P(*spec[:dim], None, None, *spec[dim + 1 :])
        split = P(*spec[:dim], self.cut.axes, None, *spec[dim + 1 :])
        # Whole first: the partitioner would split x in its own order. The gradient comes back the same way, and is
        # summed over the batch where it is split, then gathered: one compiler would otherwise sum the whole.
        return dataclasses.replace(y, x=self._said(self._said(y.x, whole, whole), split, whole, first=split))

    def _spec(self, x: Any, at_rest: bool = False) -> P | None:
        """The leaf's spec for x, which has all of its dims or those that no loop walks; None: there is none."""
        if self.leaf is None:
            return None
        spec = self.leaf.spec if at_rest else self.leaf.computed
        entries = [*spec, *[None] * (len(self.leaf.shape) - len(spec))]
        inner = [
            e for e, part in zip(entries, self.leaf.parts) if not (len(part) == 1 and part[0].startswith("layers"))
        ]
        entries = inner if x.ndim == len(inner) else entries
        return P(*entries) if x.ndim == len(entries) else None

    def _said(self, x: Any, spec: P, gradient: P, first: P | None = None) -> Any:
        """x laid out by `spec`, its gradient by `gradient`; by `first` before."""
        assert self.mesh is not None
        sharding = partial(NamedSharding, self.mesh)
        constrain = lambda x, spec: jax.lax.with_sharding_constraint(x, sharding(spec))

        @jax.custom_vjp
        def said(x):
            return constrain(x, spec)

        def bwd(_, g):
            return (constrain(g if first is None else jax.lax.optimization_barrier(constrain(g, first)), gradient),)

        said.defvjp(lambda x: (said(x), None), bwd)
        return said(x)


def applied(plan: "Plan", fn: Callable, mesh: Mesh) -> Callable:
    """`fn(params, *args)` with every stored parameter gathered where it is read and fused segments kept apart.

    Args:
      plan: what is stored how.
      mesh: of Auto axes.

    Raises:
      ValueError: the mesh has Explicit axes.
    """
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            "a plan is applied on a mesh of Auto axes and this one's are Explicit; "
            "use jax.sharding.Mesh(mesh.devices, mesh.axis_names)"
        )
    reads = [Read(leaf.cut, leaf, mesh) if leaf.spec != leaf.computed or leaf.cut else None for leaf in plan.leaves]
    return _rewritten(fn, reads, mesh)


def by_segments(fn: Callable, cuts: Sequence[Cut | None]) -> Callable:
    """`fn(params, *args)` with the fused projections of the parameters' leaves computed by segments."""
    return _rewritten(fn, [Read(cut) if cut else None for cut in cuts], None)


def _rewritten(fn: Callable, reads: Sequence[Read | None], mesh: Mesh | None) -> Callable:
    def wrapped(params: Any, *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
        flat = jax.tree.leaves((params, *args))
        outs = _evaluate(closed, flat, [*reads, *[None] * (len(flat) - len(reads))], mesh)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return wrapped


def _evaluate(closed, args: Sequence[Any], reads: Sequence[Read | None], mesh: Mesh | None) -> list[Any]:
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    origin: dict[Any, Read | None] = dict(zip(jaxpr.invars, reads, strict=True))
    was_read: dict[Any, Any] = {}  # a parameter gathered once serves every read in this body

    def raw(v):
        return v.val if isinstance(v, Literal) else env[v]

    def read(v):
        how = None if isinstance(v, Literal) else origin.get(v)
        if how is None:
            return raw(v)
        if v not in was_read:
            was_read[v] = how(env[v])
        return was_read[v]

    def whole(x):
        return _whole_last(segments.join(x), mesh) if isinstance(x, Regrouped) else x

    for eqn in jaxpr.eqns:
        sources = [None if isinstance(v, Literal) else origin.get(v) for v in eqn.invars]
        params = dict(eqn.params)
        rebuilt = {k: _rebuild(v, sources, eqn, mesh) for k, v in params.items()}
        changed = {k: v for k, v in rebuilt.items() if v is not None}
        hands_on = eqn.primitive.name in HANDS_ON and sources[0] is not None
        values = [raw(v) if changed or hands_on else read(v) for v in eqn.invars]
        outs = segments.apply(eqn, values) if any(isinstance(x, Regrouped) for x in values) else None
        if outs is None:
            values = [whole(x) for x in values]
            cut = _cut_last(eqn) if sources[:1] == [None] else False
            if cut:  # in and out: the partitioner would cut a whole array at the layout of what is cut from it
                values = [_whole_last(x, mesh) for x in values]
            scopes = source_info_util.current_name_stack() + eqn.source_info.name_stack
            # The compiled program names the lines and scopes of the user's function, not this one.
            with source_info_util.user_context(eqn.source_info.traceback, name_stack=scopes), eqn.ctx.manager:
                outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params({**params, **changed}))
            outs = outs if eqn.primitive.multiple_results else [outs]
            if cut:
                outs = [_whole_last(x, mesh) for x in outs]
        for v, out in zip(eqn.outvars, outs, strict=True):
            env[v] = out
            if hands_on:
                origin[v] = sources[0]
    return [whole(raw(v)) for v in jaxpr.outvars]


def _rebuild(value: Any, reads: Sequence[Read | None], eqn, mesh: Mesh | None) -> Any:
    """The inner program of a jit, scan or recomputed block with its parameters read inside; None: not one."""
    if eqn.primitive.name not in ("jit", "pjit", "scan", "remat2", "checkpoint", "closed_call"):
        return None
    if not isinstance(value, ClosedJaxpr | Jaxpr):
        return None
    closed = value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())
    new = jax.make_jaxpr(lambda *args: _evaluate(closed, args, reads, mesh))(*closed.in_avals)
    return new if isinstance(value, ClosedJaxpr) else new.jaxpr


def _cut_last(eqn) -> bool:
    """The equation cuts the last dim of an activation into segments, or makes it of segments."""
    name, ndim = eqn.primitive.name, len(eqn.outvars[0].aval.shape)
    if ndim < 2:
        return False
    if name == "slice":
        return eqn.invars[0].aval.shape[-1] != eqn.outvars[0].aval.shape[-1]
    return (name == "split" and eqn.params["axis"] == ndim - 1) or (
        name == "concatenate" and eqn.params["dimension"] == ndim - 1
    )


def _whole_last(x: Any, mesh: Mesh | None) -> Any:
    if mesh is None or x.ndim < 2:
        return x
    spec = P(*[P.UNCONSTRAINED] * (x.ndim - 1), None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
