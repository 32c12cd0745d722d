"""One forward and one backward in turn (1F1B): loss and gradients of stacked layers over the stages of pp.

    loss, metrics, out = scored(Task(layer, finish), carry, stacked, rows, ends, targets, unit, Pipeline(m, v))

It is `finish` of what `jaxscale.parallel.pipeline.scan` returns, and is computed so where no gradient is asked for. The
gradient is made beside the loss, in one pass: as soon as a micro-batch has left the last stage it is scored, and goes
back while the next ones come. A stage so keeps what 2 p - 1 micro-batches need for their way back, however many a batch
has (arXiv 1806.03377; with chunks of layers 2104.04473).

All devices run one program in step. With m micro-batches, p stages and v chunks on each, chunk r p + s the r-th of
stage s, micro-batch g p + k passes it

    forward   in tick  g v p + r p + k + s,                             of ticks 0 .. v m + p - 2
    backward  in tick  g v p + (v-1-r) p + k + (p-1-s) + v p - 1,       of ticks v p - 1 .. v m + v p + p - 3

so that v p - 1 ticks go forward alone, v m + p - v p both ways, v p - 1 back alone: as much as without taking turns.

What leaves the last chunk is scored in the same tick, each stage a part of its tokens: a head weighs as much as several
layers. Weights that rest over fsdp are gathered, and their gradients scattered, in each tick or, as `Pipeline.once`
says, before the first and after the last.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel.pipeline import Layer, Pipeline
from jaxscale.parallel.pipeline_parts import PP, choose, chunks, collect, deal, index, shift, whole, zeros
from jaxscale.sharding import STAGES, Weight, active_mesh, axes_of, partitions, shard_map


class Task(NamedTuple):
    """What passes the stages.

    layer: (rows, carry, one of stacked) -> (carry, out).
    finish: (ends, taken, targets) -> (a sum over tokens that is the loss, a tree of other such sums).
    take: carry -> what `finish` reads of it, [B, T, ...].
    weigh: out of a layer -> what it adds to the loss, in units of `unit`; linear. None: what is made of it only the
      whole batch can tell. It then has a gradient, which is `scan`'s.
    cast: stacked, or ends -> the same in the dtypes that they are computed with.
    """

    layer: Layer
    finish: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]
    take: Callable[[Any], jax.Array] = lambda carry: carry
    weigh: Callable[[Any], jax.Array] | None = lambda out: jnp.zeros((), jnp.float32)
    cast: Callable[[Any], Any] = lambda weights: weights


def scored(
    task: Task,
    carry: Any,
    stacked: Any,
    rows: Any,
    ends: Any,
    targets: Any,
    unit: Any,
    pipeline: Pipeline | None = None,
) -> tuple[jax.Array, Any, Any]:
    """(loss, metrics, out of each layer) of what comes out of stacked layers. Only the loss has a gradient, as a rule.

    Args:
      carry, stacked, rows, pipeline: as of `jaxscale.parallel.pipeline.scan`.
      ends: a tree of parameters of `finish`, as they rest.
      targets: a tree of arrays [B, T], without a gradient. `finish` may see tokens more, whose targets are all 0.
      unit: float32 scalar, of what `weigh` returns.

    Raises:
      ValueError: layers or rows that do not divide.
    """

    def all_at_once(carry, stacked, ends, rows, targets, unit):
        carry, out = over_pp.scan(task.layer, carry, stacked, rows, pipeline)
        loss, metrics = task.finish(task.cast(ends), task.take(carry), targets)
        return (
            loss if task.weigh is None else loss + unit * task.weigh(jax.tree.map(lambda x: x.sum(axis=0), out)),
            metrics,
            out,
        )

    args = carry, stacked, ends, rows, targets, unit
    mesh = active_mesh()
    if mesh is None or mesh.shape[PP] == 1 or task.weigh is None:
        return all_at_once(*args)
    fn = jax.custom_vjp(all_at_once)
    fn.defvjp(functools.partial(_forward, task, pipeline or Pipeline()), _backward)
    return fn(*args)


def _forward(task: Task, pipeline: Pipeline, carry, stacked, ends, rows, targets, unit):
    """What `scored` returns; the gradients of carry, stacked and ends, None where there is none."""
    mesh = active_mesh()
    assert mesh is not None
    size, depth = mesh.shape[PP], jax.tree.leaves(stacked)[0].shape[0]
    plan = over_pp.resolve(pipeline, size, depth, over_pp.held_rows(carry))
    dealt = lambda tree: jax.tree.map(lambda x: deal(x, over_pp.count(plan) // size), tree)
    everywhere = jax.tree.map(lambda x: whole(x, 0), dealt((rows, targets)))
    given, stacked = stacked, jax.tree.map(lambda x: jax.reshard(x, P(PP, *partitions(x)[1:])), stacked)
    laid = [[(None, *partitions(x)[1:]) for x in jax.tree.leaves(stacked)], [*map(partitions, jax.tree.leaves(ends))]]
    manual = lambda x: P(*map(_manual, partitions(x))) if _learns(x) else None
    over_rows = tuple(a for a in ("dp", "fsdp") if mesh.shape[a] > 1) or None
    grads = P(PP, None, over_rows), jax.tree.map(manual, stacked), jax.tree.map(manual, ends)
    run = functools.partial(_stage, task, plan, size, dict(mesh.shape), laid)
    stages = jax.reshard(jnp.arange(size, dtype=jnp.int32), P(PP))
    run = jax.shard_map(run, out_specs=(P(), P(), P(None, PP), grads), axis_names=STAGES, check_vma=False)
    with jax.named_scope("pipeline"):
        made = run(stages, dealt(carry), everywhere, unit, stacked, ends)
    loss, metrics, out, (d_carry, *d_weights) = made
    out = jax.tree.map(lambda x: jax.reshard(x, P()).reshape(depth, *x.shape[2:]), out)
    d_carry = jax.tree.map(lambda x, like: collect(x, partitions(like)), d_carry, carry)
    lay = lambda x, g: None if g is None else jax.reshard(g, P(*partitions(x)))
    d_weights = jax.tree.map(lay, (given, ends), tuple(d_weights))
    return (loss, metrics, out), (d_carry, *d_weights)


def _backward(grads, cotangents):
    """The gradients times that of the loss, which as a rule is 1."""
    return *jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), grads), None, None, None


def _stage(
    task: Task, plan: Pipeline, size: int, sizes: dict[str, int], laid, stage, micro, given, unit, stacked, ends
):
    """Manual over pp, dp and fsdp: this stage's part of all micro-batches.

    micro: [1, K, b, ...], this device's own rows: of the micro-batches i with i mod p = stage, as K = m / p groups.
    given: (rows, targets) [p, K, b, ...] of all micro-batches. stacked: [L / p, ...] as they rest, as ends are.
    laid: how each leaf of stacked and of ends rests, over other axes too.
    """
    (stage,), v, K = stage, plan.interleave, over_pp.count(plan) // size
    micro = jax.tree.map(lambda x: x[0], micro)
    rows, targets = given
    m, span = K * size, v * size
    last = stage == size - 1
    around, back = shift(size, 1), shift(size, -1)
    weights = _Stacked(task, stacked, laid[0], sizes, plan, stage, size)
    head = _Gathered(task.cast(ends), laid[1], sizes)
    slots = slots_of(v, size)
    first_slot, slots = (jnp.asarray(x, jnp.int32) for x in (np.cumsum([0, *slots[:-1]]), slots))

    way_back = {}  # as jax.vjp traced it: a program, whose inputs are what is kept

    def forward(n, r, x, kept):
        """A chunk of layers; what their way back needs goes where round r keeps that of micro-batch n."""
        mine, at = _micro(rows, n, size, K), (index(first_slot, r) + n % index(slots, r)) * weights.depth

        def layer(state, l):
            x, kept = state
            (x, _), pull, out = _vjp(task, x, weights[r, l], mine, unit)
            saved, way_back["structure"] = jax.tree.flatten(pull)
            return (x, [lax.dynamic_update_index_in_dim(a, y, at + l, 0) for a, y in zip(kept, saved)]), out

        (x, kept), out = lax.scan(layer, (x, kept), jnp.arange(weights.depth, dtype=jnp.int32))
        return x, kept, out

    def backward(busy, n, r, dx, kept, sums):
        mine, at = _micro(rows, n, size, K), (index(first_slot, r) + n % index(slots, r)) * weights.depth

        def layer(state, l):
            dx, sums = state
            pull = jax.tree.unflatten(way_back["structure"], [index(a, at + l) for a in kept])
            pull.args_res = [pull.args_res[0], weights[r, l], mine, unit]
            dx, dw, *_ = pull((dx, busy.astype(jnp.float32)))
            return (dx, weights.add(busy, r, l, sums, dw)), None

        state, _ = lax.scan(layer, (dx, sums), jnp.arange(weights.depth, dtype=jnp.int32), reverse=True)
        return state

    def score(n, x):
        """Of micro-batch n, which the last stage has: the loss, other sums, the gradients of x and of the head."""
        part = _share(jnp.where(last, x, jnp.zeros_like(x)), size)
        own = jax.tree.map(lambda t: _own_share(t, partitions(x)[1], stage, size), _micro(targets, n, size, K))
        (loss, metrics), pull = jax.vjp(lambda ends, x: task.finish(ends, x, own), head.tree, part)
        d_head, dx = pull((jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, metrics)))
        return (loss, metrics), d_head, _unshare(dx, x.shape[1])

    def tick(both, state, t):
        goes, returns = both
        s = dict(state)
        if goes:
            q = t - stage
            r, n, busy = q % span // size, q // span * size + q % size, (q >= 0) & (q < v * m)
            fresh = jax.tree.map(lambda x: index(x, jnp.minimum(t // span, K - 1)), micro)
            own = choose(t % span == 0, fresh, s["own"])
            x = choose((stage == 0) & (t % span < size), own, s["x"])
            x, s["kept"], out = forward(n, r, x, s["kept"])
            s["out"] = jax.tree.map(lambda a, o: a.at[r].add(jnp.where(busy, o, jnp.zeros_like(o))), s["out"], out)
            s["x"], s["own"] = around(x), back(own)
        if returns:
            q = t - (span - 1) - (size - 1 - stage)
            r, n, busy = v - 1 - q % span // size, q // span * size + q % size, (q >= 0) & (q < v * m)
            dx = s["dx"]
            if goes:
                at_last = t - (size - 1)
                now = at_last % span >= span - size
                n_last = at_last // span * size + at_last % size
                taken, put = jax.vjp(task.take, x)
                scores = functools.partial(score, n_last)
                found = scores(taken) if v == 1 else _if(now, scores, taken)
                s["sums"], s["head"] = _add(s["sums"], found[0]), head.add(s["head"], found[1])
                dx = choose(last & now, put(found[2])[0], dx)
            dx, s["stacked"] = backward(busy, n, r, dx, s["kept"], s["stacked"])
            s["home"] = _store(s["home"], s["ring"], t, span, size)
            s["ring"] = back(choose((stage == 0) & (r == 0), dx, s["ring"]))
            s["dx"] = back(dx)
        return s, None

    blank = jax.tree.map(lambda x: zeros(jax.typeof(x[0])), micro)
    at_first = lambda tree: jax.tree.map(lambda x: x[0, 0], tree)

    def shapes(x, w, mine):
        _, pull, out = _vjp(task, x, w, mine, unit)
        return jax.tree.leaves(pull), out

    kept, out = jax.eval_shape(shapes, blank, weights[jnp.int32(0), jnp.int32(0)], at_first(rows))
    sums = jax.eval_shape(lambda x: score(jnp.int32(0), task.take(x))[0], blank)
    state = {
        "x": blank,  # that came from the stage before, or around from the last
        "own": blank,  # this device's, on its way to the first stage
        "kept": [zeros(a, sum(slots_of(v, size)) * weights.depth) for a in kept],
        "out": jax.tree.map(lambda a: zeros(a, v, weights.depth), out),
        "dx": blank,  # its gradient, from the stage after
        "ring": blank,  # gradients on their way home from the first stage
        "home": jax.tree.map(lambda x: zeros(jax.typeof(x)), micro),
        "stacked": weights.zeros(),
        "head": head.zeros(),
        "sums": jax.tree.map(zeros, sums),
    }
    begin, turn, end = span - 1, v * m + size - 1, v * m + span + size - 2
    for both, ticks in (((True, False), (0, begin)), ((True, True), (begin, turn)), ((False, True), (turn, end))):
        state, _ = lax.scan(functools.partial(tick, both), state, jnp.arange(*ticks, dtype=jnp.int32))
    home = _store(state["home"], state["ring"], jnp.int32(end), span, size)
    total = functools.partial(lax.psum, axis_name=tuple(sorted(STAGES)))
    added = functools.partial(lax.psum, axis_name=tuple(sorted(STAGES - {PP})))
    out = jax.tree.map(added, state["out"])
    (loss, metrics), extra = state["sums"], _weigh(task)(jax.tree.map(lambda x: x.sum(axis=(0, 1)), out))
    return (
        total(loss) + unit * lax.psum(extra, PP),
        jax.tree.map(total, metrics),
        out,
        (
            jax.tree.map(lambda x: x[None], home),
            weights.gradients(state["stacked"]),
            head.gradients(state["head"], ends),
        ),
    )


def _weigh(task: Task) -> Callable[[Any], jax.Array]:
    assert task.weigh is not None
    return task.weigh


def _vjp(task: Task, x, w, rows, unit):
    """A layer, and the way back; the weights and rows that it needs are given to it again."""

    def layer(x, w, rows, unit):
        x, out = task.layer(rows, x, w)
        return (x, unit * _weigh(task)(out)), out

    return jax.vjp(layer, x, w, rows, unit, has_aux=True, saveable_args=(True, False, False, False))


def slots_of(v: int, size: int) -> list[int]:
    """How many micro-batches each of v rounds keeps at once on the first stage, which keeps the most."""
    return [size + max(0, min(size, (v - 2 * r) * size - 1)) for r in range(v)]


class _Gathered:
    """Parameters that are gathered once; their gradients."""

    def __init__(self, tree: Any, laid, sizes: dict[str, int]):
        leaves, self.structure = jax.tree.flatten(tree)
        self.laid, self.sizes = [_on_axes(parts, sizes) for parts in laid], sizes
        self.leaves = list(map(_gather, leaves, self.laid))

    @property
    def tree(self) -> Any:
        return jax.tree.unflatten(self.structure, self.leaves)

    def zeros(self) -> Any:
        """Sums over micro-batches, in float32."""
        return [zeros(jax.typeof(x).update(dtype=jnp.float32)) for x in self.leaves]

    def add(self, sums, grads):
        return [a + g.astype(a.dtype) for a, g in zip(sums, jax.tree.leaves(grads), strict=True)]

    def gradients(self, sums, like: Any) -> Any:
        """As the parameters `like` rest."""
        found = (
            _summed(_scatter(a.astype(x.dtype), parts).astype(y.dtype), STAGES - axes_of(parts), self.sizes)
            for a, x, parts, y in zip(sums, self.leaves, self.laid, jax.tree.leaves(like), strict=True)
        )
        return jax.tree.unflatten(self.structure, list(found))


class _Stacked:
    """The layers of a stage, chunk by chunk; their gradients."""

    def __init__(self, task: Task, stacked: Any, laid, sizes: dict[str, int], plan: Pipeline, stage, size: int):
        v = plan.interleave
        self.place = lambda x: chunks(x, stage, size, v)
        self.like, self.structure = jax.tree.flatten(stacked)
        self.depth = self.like[0].shape[0] // v
        self.largest = [flag for node in jax.tree.leaves(stacked, is_leaf=_is_weight) for flag in _largest(node)]
        self.laid, self.sizes = [_on_axes(parts, sizes) for parts in laid], sizes
        self.gathered, self.whole_sums = plan.once != "nothing", plan.once == "gradients"
        flat = lambda x: self.place(x).reshape(x.shape)
        self.leaves = jax.tree.leaves(task.cast(jax.tree.map(flat, stacked)))
        self.types = [jax.typeof(x) for x in self.leaves]  # of the sums of gradients, but for their dtype
        if self.gathered:
            self.leaves = list(map(_gather, self.leaves, self.laid))
        if self.whole_sums:
            self.types = [jax.typeof(x) for x in self.leaves]

    def __getitem__(self, at) -> Any:
        r, l = at
        leaves = [index(x, r * self.depth + l) for x in self.leaves]
        if not self.gathered:
            leaves = [_gather(x, parts[1:]) for x, parts in zip(leaves, self.laid, strict=True)]
        return jax.tree.unflatten(self.structure, leaves)

    def zeros(self) -> list[Any]:
        return [
            zeros(kind.update(dtype=y.dtype)) if _learns(y) else None
            for kind, y in zip(self.types, self.like, strict=True)
        ]

    def add(self, busy, r, l, sums, grads) -> list[Any]:
        """A layer's gradients, to the sums over micro-batches."""
        at, added = r * self.depth + l, []
        for a, g, parts, largest in zip(sums, jax.tree.leaves(grads), self.laid, self.largest, strict=True):
            if a is not None:
                g = g if self.whole_sums else jax.reshard(_scatter(g, parts[1:]), P(*partitions(a)[1:]))
                g, old = jnp.where(busy, g.astype(a.dtype), jnp.zeros((), a.dtype)), index(a, at)
                a = lax.dynamic_update_index_in_dim(a, jnp.maximum(old, g) if largest else old + g, at, 0)
            added.append(a)
        return added

    def gradients(self, sums) -> Any:
        """As the layers rest; None of what has none."""
        found = []
        for a, x, y, parts, largest in zip(sums, self.leaves, self.like, self.laid, self.largest, strict=True):
            if a is not None:
                if self.whole_sums:
                    a = _scatter(a.astype(x.dtype), parts).astype(y.dtype)
                a = _summed(a, STAGES - {PP} - axes_of(parts), self.sizes, largest)
                a = jax.reshard(a, P(*partitions(y))).reshape(-1, self.depth, *a.shape[1:])
                (a,) = jax.linear_transpose(self.place, y)(a)
            found.append(a)
        return jax.tree.unflatten(self.structure, found)


def _learns(x) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _is_weight(x) -> bool:
    return isinstance(x, Weight)


def _largest(node) -> list[bool]:
    """For each leaf: whether its gradient is the largest of those of micro-batches, not their sum."""
    if not isinstance(node, Weight):
        return [False]
    return [path[0].name in node.largest for path, _ in jax.tree.leaves_with_path(node)]


def _manual(entry) -> Any:
    """Of a dim's mesh axes those that are Manual in a stage."""
    return tuple(a for a in ((entry,) if isinstance(entry, str) else entry or ()) if a in STAGES) or None


def _on_axes(parts, sizes: dict[str, int]) -> tuple[Any, ...]:
    """Of each dim the Manual axes that split it."""
    return tuple(tuple(a for a in _manual(e) or () if sizes[a] > 1) or None for e in parts)


def _gather(x, parts):
    for d, axes in enumerate(parts):
        if axes:  # over other axes first: what they split lies inside
            x = jax.reshard(x, P(*(None if i == d else e for i, e in enumerate(partitions(x)))))
            x = _local(functools.partial(lax.all_gather, axis_name=axes, axis=d, tiled=True), x)
    return x


def _scatter(g, parts):
    for d, axes in enumerate(parts):
        if axes:
            g = _local(functools.partial(lax.psum_scatter, axis_name=axes, scatter_dimension=d, tiled=True), g)
    return g


def _summed(x, axes, sizes: dict[str, int], largest: bool = False):
    over = tuple(a for a in ("pp", "dp", "fsdp") if a in axes and sizes[a] > 1)
    return (lax.pmax if largest else lax.psum)(x, over) if over else x


def _share(x, size: int):
    """[b, T, ...] of the last stage, zeros on the others -> this stage's part of the tokens, padded to equal parts."""
    return _local(lambda x: lax.psum_scatter(_padded(x, size), PP, scatter_dimension=1, tiled=True), x)


def _own_share(x, entry, stage, size: int):
    """The same part of what every stage has, laid out over `entry`."""
    x = jax.reshard(x, P(partitions(x)[0], entry, *partitions(x)[2:]))

    def local(x, stage):
        x = _padded(x, size)
        n = x.shape[1] // size
        return lax.dynamic_slice_in_dim(x, stage * n, n, 1)

    return _local(local, x, stage)


def _unshare(x, tokens: int):
    """The parts of all stages [b, tokens, ...]."""
    mesh = jax.sharding.get_abstract_mesh()
    held = tokens // math.prod(mesh.shape[a] for a in axes_of(partitions(x)[1:2]))
    return _local(lambda x: lax.all_gather(x, PP, axis=1, tiled=True)[:, :held], x)


def _local(fn, x, *args):
    """fn(x, ...) on each device's own part: of what has axes in its type jax 0.11.2 lowers no scatter, and XLA gathers
    it over these axes too."""
    return shard_map(fn, out_specs=P(*partitions(x)), check_vma=False)(x, *args)


def _padded(x, size: int):
    return jnp.pad(x, [(0, -x.shape[d] % size if d == 1 else 0) for d in range(x.ndim)])


def _micro(tree, n, size: int, K: int):
    """Of [p, K, b, ...] micro-batch n; any where there is none."""
    return jax.tree.map(lambda x: index(index(x, n % size), jnp.clip(n // size, 0, K - 1)), tree)


def _store(home, ring, t, span: int, size: int):
    """What has come home; of group g it has in tick t = g v p + p + 2 v p - 2, and what is stored before is not it."""
    last = jax.tree.leaves(home)[0].shape[0] - 1
    at = jnp.clip(-((2 * span - 2 + size - t) // span), 0, last)
    return jax.tree.map(lambda a, x: lax.dynamic_update_index_in_dim(a, x, at, 0), home, ring)


def _if(now, fn, x):
    """fn(x), or zeros."""
    return lax.cond(now, fn, lambda x: jax.tree.map(zeros, jax.eval_shape(fn, x)), x)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)
