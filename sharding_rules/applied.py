"""A function with its plan said inside, where specs of the parameters alone leave the partitioner a choice.

Parameters that rest split over storage axes (fsdp, cp) are gathered where they are read: left to itself the
partitioner often moves activations instead. Fused segments are whole where they are cut apart or put together: left to
itself the partitioner splits them across their boundaries and exchanges the pieces. `applied(plan, fn, mesh)` traces
the function and evaluates it again with these constraints, inside loops and recomputed blocks too.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

if TYPE_CHECKING:
    from sharding_rules.plan import Leaf, Plan

# An equation that only hands a parameter on: it is gathered later, where something is computed with it.
HANDS_ON = frozenset(["convert_element_type", "squeeze", "slice", "dynamic_slice", "copy", "reshape"])


def applied(plan: "Plan", fn: Callable, mesh: Mesh) -> Callable:
    """`fn(params, *args)` with every stored parameter gathered where it is read and fused segments kept whole.

    Args:
      plan: what is stored how.
      mesh: of Auto axes.
    """

    def wrapped(params: Any, *args: Any) -> Any:
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(params, *args)
        leaves = [leaf if leaf.spec != leaf.computed else None for leaf in plan.leaves]
        flat = jax.tree.leaves((params, *args))
        outs = _evaluate(closed, flat, [*leaves, *[None] * (len(flat) - len(leaves))], mesh)
        return jax.tree.unflatten(jax.tree.structure(shape), outs)

    return wrapped


def _evaluate(closed, args: Sequence[Any], leaves: Sequence["Leaf | None"], mesh: Mesh) -> list[Any]:
    jaxpr = closed.jaxpr
    env: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))
    origin: dict[Any, Leaf | None] = dict(zip(jaxpr.invars, leaves, strict=True))
    whole: dict[Any, Any] = {}  # a parameter gathered once serves every read in this body

    def raw(v):
        return v.val if isinstance(v, Literal) else env[v]

    def read(v):
        leaf = None if isinstance(v, Literal) else origin.get(v)
        if leaf is None:
            return raw(v)
        if v not in whole:
            whole[v] = _gather(env[v], leaf, mesh)
        return whole[v]

    for eqn in jaxpr.eqns:
        from_leaves = [None if isinstance(v, Literal) else origin.get(v) for v in eqn.invars]
        params = dict(eqn.params)
        rebuilt = {k: _rebuild(v, from_leaves, eqn, mesh) for k, v in params.items()}
        changed = {k: v for k, v in rebuilt.items() if v is not None}
        hands_on = eqn.primitive.name in HANDS_ON and from_leaves[0] is not None
        values = [raw(v) if changed or hands_on else read(v) for v in eqn.invars]
        cut = _cut_last(eqn) if from_leaves[:1] == [None] else False
        if cut:  # inputs and outputs: the partitioner would cut a whole array at the layout of what is cut from it
            values = [_whole_last(x, mesh) for x in values]
        with eqn.ctx.manager:
            outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params({**params, **changed}))
        outs = outs if eqn.primitive.multiple_results else [outs]
        if cut:
            outs = [_whole_last(x, mesh) for x in outs]
        for v, out in zip(eqn.outvars, outs, strict=True):
            env[v] = out
            if hands_on:
                origin[v] = from_leaves[0]
    return [raw(v) for v in jaxpr.outvars]


def _rebuild(value: Any, leaves: Sequence["Leaf | None"], eqn, mesh: Mesh) -> Any:
    """The inner program of a jit, scan or recomputed block with its parameters gathered inside; None: not one."""
    if eqn.primitive.name not in ("jit", "pjit", "scan", "remat2", "checkpoint", "closed_call"):
        return None
    if not isinstance(value, ClosedJaxpr | Jaxpr):
        return None
    closed = value if isinstance(value, ClosedJaxpr) else ClosedJaxpr(value, ())
    new = jax.make_jaxpr(lambda *args: _evaluate(closed, args, leaves, mesh))(*closed.in_avals)
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


def _whole_last(x: Any, mesh: Mesh) -> Any:
    spec = P(*[P.UNCONSTRAINED] * (x.ndim - 1), None)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _gather(x: Any, leaf: "Leaf", mesh: Mesh) -> Any:
    """x in its layout in computation; its gradient in the layout at rest."""
    axes = [i for i, part in enumerate(leaf.parts) if not (part and part[0].startswith("layers"))]
    axes = axes if x.ndim == len(axes) else range(len(leaf.shape))
    if x.ndim != len(axes):
        return x

    def constrain(x, spec):
        entries = [*spec, *[None] * len(leaf.shape)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*(entries[i] for i in axes))))

    @jax.custom_vjp
    def gather(x):
        return constrain(x, leaf.computed)

    gather.defvjp(lambda x: (constrain(x, leaf.computed), None), lambda _, g: (constrain(g, leaf.spec),))
    return gather(x)
