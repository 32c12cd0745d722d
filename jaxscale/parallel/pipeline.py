"""Pipelines: consecutive layers on the devices of pp, micro-batches of rows that go from stage to stage.

    carry, out = scan(layer, carry, stacked, rows)      # lax.scan(layer) where pp is 1, which is its twin

One program runs everywhere (shard_map, Manual over pp and dp: the other axes stay what they are inside of a stage, so
that fsdp, tp, cp and ep work as without a pipeline; replicas, dp, add their gradients once at its end), and its
gradient is the pipeline that runs backwards. Devices form a ring. With m micro-batches on p stages, each of which holds
v chunks of layers (chunk c lies on stage c mod p), p micro-batches at a time go around v times, the next p right behind
them (arXiv 2104.04473 calls this interleaved): after v m + p - 1 ticks of one chunk each all have passed, of which a
stage idles p - 1. Between rounds nothing waits, so that no buffer holds what went around.

Training takes turns instead (`jaxscale.parallel.pipeline_step`) but where a loss needs the whole batch; this is its
forward pass without a gradient. For the gradient of this is kept: with one chunk what each layer keeps (its remat) of
each tick; the forward pass gathers the weights of a stage over fsdp once. With several what each tick was given, and
the tick is computed again.

Outside, the rows of the batch are split over pp as over dp: stages embed and score a share each, and hold a share of
these tables. How rows come to the first stage and back from the last: each device's own go around the other way, one
step with each tick, and where a micro-batch enters, one that is done takes its place. A device so sends one micro-batch
each way, over links that work both ways.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.parallel.pipeline_parts import PP, choose, chunks, collect, deal, exchanges, index, shift, whole, zeros
from jaxscale.sharding import active_mesh, axes_of, partitions

DP = "dp"
Once = Literal["nothing", "weights", "gradients"]
Layer = Callable[[Any, Any, Any], tuple[Any, Any]]


class Pipeline(NamedTuple):
    """How a batch passes the stages."""

    micro_batches: int | None = None  # None: the most that divide, up to four for each stage
    interleave: int = 1  # chunks of layers on each stage
    once: Once = "nothing"  # what training does once a step, not in each tick: scattering gradients includes gathering


def scan(layer: Layer, carry: Any, stacked: Any, rows: Any, pipeline: Pipeline | None = None) -> tuple[Any, Any]:
    """`layer` over stacked layers, which pp splits into stages.

    Args:
      layer: (rows, carry, one of stacked) -> (carry, out); of the rows of a micro-batch.
      carry: a tree of arrays [B, ...] with the batch's rows split over pp, and over other axes inside of that.
      stacked: a tree of arrays [L, ...], split over pp at rest.
      rows: a tree of integer arrays [B, ...], laid out as the carry is.

    Returns:
      the carry after all layers; out of each layer [L, ...], added over micro-batches and dp: what a layer reports is a
      sum over rows.

    Raises:
      ValueError: layers or rows that do not divide.
    """
    mesh = active_mesh()
    if mesh is None or mesh.shape[PP] == 1:
        return lax.scan(functools.partial(layer, rows), carry, stacked)
    size, depth = mesh.shape[PP], jax.tree.leaves(stacked)[0].shape[0]
    plan = resolve(pipeline or Pipeline(), size, depth, held_rows(carry))
    split = lambda x: deal(x, count(plan) // size)
    with jax.named_scope("deal"):
        micro = jax.tree.map(split, carry)
        everywhere = jax.tree.map(lambda x: whole(split(x), 0), rows)
    run = functools.partial(_stage, layer, plan, size)
    stages = jax.reshard(jnp.arange(size, dtype=jnp.int32), P(PP))
    stacked = jax.tree.map(lambda x: jax.reshard(x, P(PP, *partitions(x)[1:])), stacked)
    # Unchecked: jax 0.11.2 lays what a shard_map inside keeps for its gradient over an axis that is Manual already.
    # Gradients of what an axis does not split (layers over dp) are then summed over it, once, where they come out.
    dp = DP if mesh.shape[DP] > 1 else None
    manual = jax.shard_map(run, out_specs=(P(PP, None, dp), P(dp, None, PP)), axis_names={PP, DP}, check_vma=False)
    with jax.named_scope("pipeline"):
        micro, out = manual(stages, micro, everywhere, stacked)
    carry = jax.tree.map(lambda x, like: collect(x, partitions(like)), micro, carry)
    return carry, jax.tree.map(lambda x: jax.reshard(x, P()).sum(axis=0).reshape(depth, *x.shape[3:]), out)


def held_rows(carry: Any) -> int:
    """How many rows of the batch a device holds, outside of the stages.

    Raises:
      ValueError: they are not split over pp.
    """
    mesh, first = active_mesh(), jax.tree.leaves(carry)[0]
    assert mesh is not None
    over = axes_of(partitions(first)[:1])
    if PP not in over:
        raise ValueError(
            f"{first.shape[0]} rows are not split over pp={mesh.shape[PP]}; use a multiple of {mesh.size} rows"
        )
    return first.shape[0] // math.prod(mesh.shape[a] for a in over)


def resolve(pipeline: Pipeline, size: int, depth: int, rows: int) -> Pipeline:
    """The pipeline with its number of micro-batches.

    Args:
      size: number of stages. depth: of layers. rows: that one device holds of the batch, split over pp too.

    Raises:
      ValueError: what does not divide, with what would.
    """
    chunks = size * pipeline.interleave
    if depth % chunks:
        fits = [n for n in range(1, depth // size + 1) if depth % (size * n) == 0]
        remedy = f"interleave in {fits}" if fits else f"pp in {[n for n in range(1, depth + 1) if depth % n == 0]}"
        raise ValueError(f"{depth} layers are not divisible by pp*interleave={chunks}; use {remedy}")
    micro = pipeline.micro_batches
    if micro is None:
        micro = size * max(n for n in range(1, min(rows, 4) + 1) if rows % n == 0)
    fits = [size * n for n in range(1, rows + 1) if rows % n == 0]
    if micro not in fits:
        raise ValueError(
            f"micro_batches={micro} do not share out {rows * size} rows of each replica over pp={size}; use one of "
            f"{fits}"
        )
    return pipeline._replace(micro_batches=micro)


def micro_rows(pipeline: Pipeline | None, depth: int, rows: int) -> int:
    """How many of the batch's `rows` a device holds of a micro-batch in a stage (of those along ep together)."""
    mesh = active_mesh()
    assert mesh is not None
    held = rows // math.prod(mesh.shape[a] for a in ("pp", "dp", "fsdp", "ep"))
    found = resolve(pipeline or Pipeline(), mesh.shape[PP], depth, held)
    return rows // (count(found) * mesh.shape[DP] * mesh.shape["fsdp"])


def plan(mesh: MeshConfig, model: ModelConfig, batch_size: int, accum_steps: int = 1) -> Pipeline:
    """The pipeline of a step of `batch_size` rows on a mesh of known sizes; raises what `resolve` does."""
    asked = Pipeline(mesh.pp_micro_batches, mesh.pp_interleave)
    if mesh.pp == 1:
        if asked != Pipeline():
            raise ValueError(
                f"mesh {mesh}: there is no pipeline with pp=1; leave pp_micro_batches and pp_interleave out"
            )
        return Pipeline(1)
    staged = model.num_layers - (model.moe.first_dense if model.moe else 0)
    return resolve(asked, mesh.pp, staged, batch_size // (mesh.pp * mesh.dp * mesh.fsdp * mesh.ep * accum_steps))


def ticks(pipeline: Pipeline, size: int) -> int:
    """How often a stage computes a chunk of its layers in a forward pass; size - 1 of them are idle."""
    return pipeline.interleave * count(pipeline) + size - 1


def bubble(pipeline: Pipeline, size: int) -> float:
    """Share of the pipeline's time in which a stage idles."""
    return (size - 1) / ticks(pipeline, size)


def chunks_moved(size: int, interleave: int) -> int:
    """How many chunks each stage sends to where they are computed with."""
    return sum(any(s != d for s, d in perm) for _, _, perm in exchanges(size, interleave))


def count(pipeline: Pipeline) -> int:
    """Of micro-batches, once it is resolved."""
    assert pipeline.micro_batches is not None, "resolve() says how many"
    return pipeline.micro_batches


def _stage(layer: Layer, plan: Pipeline, size: int, stage, micro, rows, stacked):
    """Manual over pp: this stage's part of all micro-batches.

    micro: [1, K, b, ...], this device's own rows: of the micro-batches i with i mod p = stage, as K = m / p groups.
    rows: [p, K, b, ...], those of all micro-batches. stacked: [L / p, ...].
    """
    v, K, (stage,) = plan.interleave, count(plan) // size, stage
    micro = jax.tree.map(lambda x: x[0], micro)
    held = jax.tree.map(lambda x: chunks(x, stage, size, v), stacked)
    around = shift(size, 1)
    back = shift(size, -1)

    def trade(t, arrived, own):
        """On the first stage, while a group enters: the next of it for one that is done."""
        enters = (stage == 0) & (t % (v * size) < size)
        return choose(enters, own, arrived), choose(enters, arrived, own)

    def compute(t, x):
        """What this stage has at tick t: micro-batch n in round r. While the pipeline fills and drains: nothing."""
        q = t - stage
        busy, r = (q >= 0) & (q < v * K * size), q % (v * size) // size
        group, place = jnp.clip(q // (v * size), 0, K - 1), q % size
        mine = jax.tree.map(lambda x: index(index(x, place), group), rows)
        chunk = jax.tree.map(lambda w: index(w, r) if v > 1 else w[0], held)
        x, out = lax.scan(functools.partial(layer, mine), x, chunk)
        return x, jax.tree.map(lambda o: jnp.where(busy, o, jnp.zeros_like(o)), out), r

    if v > 1:
        # Else each tick would keep the chunk of weights that it met: it keeps what came in, and is computed again.
        compute = jax.checkpoint(compute, prevent_cse=False)

    def tick(state, t):
        arrived, own, done, total = state
        group, turn = t // (v * size), t % (v * size)
        own = choose(turn == 0, jax.tree.map(lambda x: index(x, jnp.minimum(group, K - 1)), micro), own)
        x, own = trade(t, arrived, own)
        x, out, r = compute(t, x)
        total = jax.tree.map(lambda a, o: a.at[r].add(o), total, out)
        own = back(own)
        done = jax.tree.map(lambda a, x: lax.dynamic_update_index_in_dim(a, x, group, 0), done, own)
        return (around(x), own, done, total), None

    blank = jax.tree.map(lambda x: zeros(jax.typeof(x[0])), micro)
    done = jax.tree.map(lambda x: zeros(jax.typeof(x), K + 1), blank)
    out = jax.eval_shape(lambda x: compute(jnp.int32(0), x)[1], blank)
    state = blank, blank, done, jax.tree.map(lambda x: zeros(x, v), out)
    last = ticks(plan, size)
    (arrived, own, done, total), _ = lax.scan(tick, state, jnp.arange(last, dtype=jnp.int32))
    own = back(trade(last, arrived, own)[1])
    # A group is done when the next one has entered.
    home = jax.tree.map(lambda a, x: jnp.concatenate([a[1:K], x[None]])[None], done, own)
    return home, jax.tree.map(lambda x: x[None], total)
