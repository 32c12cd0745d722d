"""Walks a jaxpr and finds which dims are the same, by the rules of primitives.py.

Operations that can cost communication are recorded as an `Op`: an iteration space, of which each dim is parallel,
reduced or blocked (it must be whole on every device to be computed).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sharding_rules.dims import Dim, size_of
from sharding_rules.primitives import CONTROL_FLOW, LAYOUT_ONLY, OPAQUE, RULES, Dims, fresh_dims, unknown


@dataclasses.dataclass(eq=False, slots=True)
class Operand:
    """An array that an op reads or writes; `keys` name the iteration dim of each of its dims."""

    dims: Dims
    keys: tuple[Any, ...]
    itemsize: int
    origin: int | None = None  # the leaf of the parameters that it is, up to casts, transposes and slices
    scope: int = 0  # the body (of a loop, of a recomputed block) that it is read in


@dataclasses.dataclass(eq=False, slots=True)
class Op:
    primitive: str
    ins: list[Operand]
    outs: list[Operand]
    reduced: frozenset[Any]
    blocked: frozenset[Any]
    count: int
    order: int

    @property
    def is_matmul(self) -> bool:
        return self.primitive in ("dot_general", "ragged_dot_general", "conv_general_dilated")

    @property
    def volume(self) -> int:
        """Points of the iteration space, of all executions."""
        sizes = {k: size_of(d) for o in (*self.ins, *self.outs) for k, d in zip(o.keys, o.dims, strict=True)}
        return math.prod(sizes.values()) * self.count


class Walker:
    """Dims of every variable of a jaxpr and the ops that can cost communication."""

    def __init__(self):
        self.ops: list[Op] = []
        self.unknown: dict[str, int] = {}  # primitive -> how often it occurs
        self.softmaxed: list[Dim] = []  # dims reduced by a max or by an exponential's sum
        self.looked_up: list[Dim] = []  # parameter dims that integers index
        self.carried: list[Dim] = []  # dims that a loop over layers carries
        self.picked: list[Dim] = []  # parameter dims of which a loop takes one element, by an index that it computes
        self.trips = 1  # of the loop whose body is being walked
        self.origins: dict[Any, int | None] = {}
        self.reads: dict[tuple[int, int], int] = {}  # (parameter leaf, body) -> executions of the body
        self.out_origins: list[int | None] = []  # of the outputs of the body walked last
        self.count = 1  # executions of the body that is being walked
        self.scope = 0
        self.recomputed: set[int] = set()  # bodies that the backward pass runs again
        self.sums: dict[int, list[int]] = {}  # op -> the ops whose products are added to its own, itself included
        self._scopes = 0

    def walk(self, jaxpr, consts: Sequence[Dims], args: Sequence[Dims], origins: Sequence[int | None]) -> list[Dims]:
        env: dict[Any, Dims] = {}
        local: dict[Any, int | None] = {}
        for var, dims in zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True):
            env[var] = dims
        local.update(zip(jaxpr.invars, origins, strict=True))
        products = Products(self, jaxpr)

        def read(atom) -> Dims:
            return env[atom] if not hasattr(atom, "val") else fresh_dims(atom.aval.shape)

        for eqn in jaxpr.eqns:
            ins, before = [read(a) for a in eqn.invars], len(self.ops)
            self.origins = local
            rule = RULES.get(eqn.primitive.name)
            if rule is None and (inner := _inner(eqn)) is not None:
                outs = self.inline(inner, ins, [local.get(v) if not hasattr(v, "val") else None for v in eqn.invars])
                self.origins = local
                local.update(zip(eqn.outvars, self.out_origins))
            else:
                outs = (rule or unknown)(self, eqn, ins)
                handed = _handed_on(eqn, local)
                if handed is not None:
                    local.update(dict.fromkeys(eqn.outvars, handed))
                elif eqn.primitive.name not in CONTROL_FLOW:
                    for v in eqn.invars:
                        leaf = None if hasattr(v, "val") else local.get(v)
                        if leaf is not None:
                            self.reads[leaf, self.scope] = self.count
            products.follow(eqn, before)
            for var, dims in zip(eqn.outvars, outs, strict=True):
                assert tuple(map(size_of, dims)) == tuple(var.aval.shape), (eqn.primitive, dims, var.aval)
                env[var] = dims
        self.out_origins = [local.get(v) if not hasattr(v, "val") else None for v in jaxpr.outvars]
        return [read(v) for v in jaxpr.outvars]

    def inline(self, closed, ins: Sequence[Dims], origins: Sequence[int | None]) -> list[Dims]:
        jaxpr = getattr(closed, "jaxpr", closed)
        return self.walk(jaxpr, [fresh_dims(v.aval.shape) for v in jaxpr.constvars], ins, origins)

    def origin(self, atom) -> int | None:
        return self.origins.get(atom) if not hasattr(atom, "val") else None

    def body(self, closed, ins, origins, count: int, new_scope: bool = True) -> list[Dims]:
        """Walks a body that runs `count` times for each run of the enclosing one."""
        saved = self.count, self.scope, self.origins
        if new_scope:
            self._scopes += 1
            self.scope = self._scopes
        self.count *= count
        outs = self.inline(closed, ins, origins)
        self.count, self.scope, self.origins = saved
        return outs

    def record(self, eqn, ins: list[tuple], outs: list[tuple], reduced: Iterable = (), blocked: Iterable = ()) -> None:
        """Records an op; ins and outs are (variable, dims, keys)."""

        def operand(var, dims, keys) -> Operand:
            return Operand(tuple(dims), tuple(keys), itemsize(var.aval.dtype), self.origin(var), self.scope)

        self.ops.append(
            Op(
                eqn.primitive.name if ins else "elementwise",
                [operand(*i) for i in ins],
                [operand(*o) for o in outs],
                frozenset(reduced),
                frozenset(blocked),
                self.count,
                len(self.ops),
            )
        )


class Products:
    """Which products of a body are only added to each other: their partial sums can be reduced as one."""

    def __init__(self, walker: Walker, jaxpr):
        self.sums, self.ops = walker.sums, walker.ops
        self.terms: dict[Any, list[int]] = {}  # variable -> the ops that it is the sum of
        self.uses = Counter(v for e in jaxpr.eqns for v in e.invars if not hasattr(v, "val")) + Counter(
            v for v in jaxpr.outvars if not hasattr(v, "val")
        )

    def follow(self, eqn, before: int) -> None:
        """`before`: the number of ops when the equation was met."""
        name = eqn.primitive.name
        terms = [self.terms.get(v) if not hasattr(v, "val") and self.uses[v] == 1 else None for v in eqn.invars]
        if name == "dot_general" and self.ops[before].reduced:
            self.terms[eqn.outvars[0]] = [before]
        elif name in ("add", "add_any") and all(terms):
            joined = [op for one in terms for op in one or ()]
            self.terms[eqn.outvars[0]] = joined
            self.sums.update(dict.fromkeys(joined, joined))
        elif name in LAYOUT_ONLY and terms[0]:
            self.terms[eqn.outvars[0]] = terms[0]


def _handed_on(eqn, origins) -> int | None:
    """The parameter that an equation only lays out otherwise; a concatenation may put its parts together again."""
    name = eqn.primitive.name
    of = eqn.invars if name == "concatenate" else eqn.invars[:1] if name in LAYOUT_ONLY else []
    found = {None if hasattr(v, "val") else origins.get(v) for v in of}
    return found.pop() if len(found) == 1 else None


def itemsize(dtype) -> int:
    return getattr(dtype, "itemsize", 4)


def _inner(eqn):
    """The program that a call-like equation runs, if it has exactly one and takes the equation's inputs as they are."""
    bodies = [v for v in eqn.params.values() if hasattr(v, "jaxpr") or (hasattr(v, "eqns") and hasattr(v, "invars"))]
    if len(bodies) != 1 or eqn.primitive.name in OPAQUE:
        return None
    jaxpr = getattr(bodies[0], "jaxpr", bodies[0])
    matches = len(jaxpr.invars) == len(eqn.invars) and len(jaxpr.outvars) == len(eqn.outvars)
    same = matches and all(
        a.aval.shape == b.aval.shape
        for a, b in zip((*jaxpr.invars, *jaxpr.outvars), (*eqn.invars, *eqn.outvars), strict=True)
    )
    return bodies[0] if same else None
