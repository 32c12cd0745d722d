"""Pipelines in the estimate: what a device of a stage holds, and what passes between stages and over fsdp.

Of both schedules: jaxscale.parallel.pipeline_step, and pipeline.scan with its gradient. `ends` and `stage` are the
estimate's parts: what is computed outside of the ticks, and in one.
"""

import math
from typing import Any

from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.parallel.pipeline_step import slots_of
from jaxscale.plan.hardware import Pod

Sent = dict[tuple[str, tuple[str, ...]], tuple[float, float]]  # (kind, axes) -> (how many, payload in all)


def memory(ends: Any, stage: Any, pipeline: Pipeline, pod: Pod, accum_steps: int) -> dict[str, float]:
    """The fields of the estimate's Memory."""
    v, size = pipeline.interleave, stage.mesh.pp
    stacked = v * sum(leaf.held for leaf in stage.leaves)
    params = stacked + sum(leaf.held for leaf in ends.leaves)
    # This device's own rows: as they go in and as they (their gradients) come back.
    own = 2 * ends.tokens / ends.mesh.tp * ends.model.embed_dim * ends.item
    parts = _of_turns if stage.by_turns else _of_all_forward_first
    gradients, residuals, weights, working = parts(ends, stage, pipeline, pod, stacked, over_pp.ticks(pipeline, size))
    return {
        "params": params,
        "optimizer": 2 * params,
        "gradients": gradients + (params if accum_steps > 1 else 0.0),
        "residuals": residuals + ends.layers * ends.residuals(ends.remat) + own,
        "weights": weights,
        "working": working,
        "batch": 4 * 4 * accum_steps * ends.rows * ends.seq_len / ends.mesh.cp,
    }


def _of_turns(ends, stage, pipeline: Pipeline, pod: Pod, stacked: float, ticks: int):
    """1F1B: what is kept of the micro-batches on their way."""
    v, row = pipeline.interleave, stage.tokens / stage.mesh.tp * stage.model.embed_dim * stage.item
    cast = v * sum(leaf.held * stage.item / 4 for leaf in stage.leaves)
    whole = v * sum(leaf.used for leaf in stage.leaves)
    head = ends.vocab * ends.model.embed_dim
    gradients = whole * 4 / stage.item if pipeline.once == "gradients" else stacked
    slots = sum(slots_of(v, stage.mesh.pp))
    # Of a micro-batch: what came, what goes and comes home around the ring, what is computed.
    residuals = slots * stage.layers * stage.residuals(stage.remat) + 4 * row
    weights = cast if pipeline.once == "nothing" else whole
    # Scored are a stage's part of a micro-batch's tokens: logits in float32 and their gradient, the head's gradient.
    logits = min(ends.loss_rows, stage.tokens // stage.mesh.pp) * ends.vocab
    working = max(stage.working_of_turns(pod), (4 + ends.item) * logits + ends.item * head)
    return gradients + 4 * head, residuals, weights + ends.item * head, working


def _of_all_forward_first(ends, stage, pipeline: Pipeline, pod: Pod, stacked: float, ticks: int):
    """What each tick was given is kept by each of its layers, or, with chunks, once."""
    v = pipeline.interleave
    first = sum(leaf.held for leaf in ends.leaves if leaf.depth)
    each = stage.layers * stage.residuals(stage.remat) if v == 1 else stage.residuals("full")
    (backward, _), (outside, loss) = stage.working(pod), ends.working(pod)
    if v > 1:  # a tick computed again keeps what it would have kept
        backward += stage.layers * stage.residuals(stage.remat)
    # The forward pass gathers the weights of the stage before its first tick, where it has one chunk.
    gathered = sum(leaf.used for leaf in stage.leaves if leaf.gathered) if v == 1 else 0.0
    working = max(backward, loss, gathered, outside if ends.layers else 0.0)
    return stacked + first, ticks * each, v * stage.weights(pod) + ends.weights(pod), working


def transfers(ends: Any, stage: Any, pipeline: Pipeline, pod: Pod) -> Sent:
    """What is sent beside what ticks and ends send by themselves."""
    size, v, ticks = stage.mesh.pp, pipeline.interleave, over_pp.ticks(pipeline, stage.mesh.pp)
    row = stage.tokens / stage.mesh.tp * stage.model.embed_dim * stage.item
    held = v * sum(leaf.held for leaf in stage.leaves)
    moved = over_pp.chunks_moved(size, v)
    found: Sent = {}

    def add(kind, axes, count, bytes):
        axes = tuple(a for a in axes if stage.sizes[a] > 1)
        if axes and bytes:
            n, x = found.get((kind, axes), (0, 0.0))
            found[kind, axes] = n + count, x + bytes

    # A micro-batch each way with each tick, forward and backward; chunks to where they are computed, gradients back.
    last = 0 if stage.by_turns else 2
    add("collective-permute", ("pp",), 4 * ticks + last + 2 * moved, (4 * ticks + last) * row + 2 * moved * held / v)
    if stage.mesh.dp > 1:
        add("all-reduce", ("dp",), 1, held)
    if not stage.by_turns:
        for leaf in stage.leaves:
            # The forward pass gathers the weights of a stage once; with chunks each tick, computed again, a third time
            # (XLA on CPU finds the second in it where remat is full).
            again = leaf.matrix and (stage.remat != "full" or pod.platform != "cpu")
            more = 1 - ticks if v == 1 else ticks * again
            add("all-gather", leaf.gathered, more * leaf.depth, more * leaf.used)
        return found

    # Scoring: a micro-batch shared out over pp, its gradient gathered again.
    micro = over_pp.count(pipeline)
    add("reduce-scatter", ("pp",), micro, micro * row)
    add("all-gather", ("pp",), micro, micro * row)
    for leaf in ends.by_hand:
        manual = tuple(a for a in leaf.gathered if a in ("pp", "fsdp"))
        rest = tuple(a for a in leaf.gathered if a not in manual)
        parts = math.prod(stage.sizes[a] for a in manual)
        add("all-gather", rest, 1, leaf.used / parts)
        add("all-gather", manual, 1, leaf.used)
        add("reduce-scatter", manual, 1, leaf.used)
        add("all-reduce", ("dp",), 1, leaf.used / parts * 4 / ends.item)
        add("all-reduce", ("ep", "cp", *(() if leaf.matrix else ("tp",))), micro, micro * leaf.used)
    gathers = 2 * ticks if pipeline.once == "nothing" else v
    scatters = v if pipeline.once == "gradients" else ticks
    for leaf in stage.leaves:
        rest = tuple(a for a in leaf.gathered if a != "fsdp")  # inside of what fsdp splits, and first
        part = leaf.used / (stage.mesh.fsdp if "fsdp" in leaf.gathered else 1)
        times = gathers if "fsdp" in leaf.gathered else 2 * ticks
        add("all-gather", rest, times * leaf.depth, times * part)
        if "fsdp" in leaf.gathered:
            add("all-gather", ("fsdp",), gathers * leaf.depth, gathers * leaf.used)
            add("reduce-scatter", ("fsdp",), scatters * leaf.depth, scatters * leaf.used)
        else:
            add("all-reduce", ("fsdp",), 1, v * leaf.held)
        over = ("cp",) if leaf.experts else ("ep", "cp")
        if not leaf.matrix:
            add("all-reduce", (*over, "tp"), ticks * leaf.depth, ticks * leaf.used)
        else:
            add("all-reduce", over, ticks * leaf.depth, ticks * leaf.used)
    return found
