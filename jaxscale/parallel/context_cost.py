"""Which way to split a sequence is fastest: arithmetic on shapes, masks, the rates of links and of attention."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxscale.config import CPLayout, CPStrategy, MeshConfig, ModelConfig

PARTS = 64  # of a device's tokens: one of them travels where it holds all that several devices have of documents
FORWARD, BACKWARD = 4.0, 10.0  # FLOPs of attention for a query, a key that it sees, and one number of head_dim
DKV, TILE = 4 / 7, 128  # of the backward pass: the matmuls for dK and dV; keys of one of their tiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One layer's attention on one place of the other mesh axes."""

    batch: int
    seq_len: int  # over all of cp
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int = 2
    causal: bool = True
    window: int | None = None  # tokens before itself that a query sees
    packed: bool = False
    document: int | None = None  # tokens of a mean document of packed rows; None: an eighth of the row

    @property
    def span(self) -> float:
        """How far back a token's document goes: the sequence, unless rows are packed."""
        return min(self.seq_len, self.document or self.seq_len / 8) if self.packed else self.seq_len

    @property
    def pairs(self) -> float:
        """Queries and keys that see each other, for a head."""
        keys = self.span / 2 if self.causal else self.span
        if self.window is not None:
            keys = min(keys, self.window + 1 if self.causal else 2 * self.window + 1)
        return self.batch * self.seq_len * keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does in a second. `flops`: attention forward and backward in bfloat16 as measured, not the peak."""

    flops: float
    link: float  # bytes sent to the next device of the axis
    both_ways: bool  # a ring of links: the two neighbours are reached by different ones (TPU); not behind a switch
    memory: float
    latency: float = 15e-6  # of one collective
    call: float = 0.0  # of one kernel of attention beside its work: launches, its own and those of its table of blocks
    cores: int = 1  # that share the tiles of a kernel
    hidden: float = 0.9  # share of a transfer beside which attention runs at full speed


# Two of them measured: H200 (329 GB/s for ppermute, attention fwd+bwd 461 to 553 TFLOP/s) and H100 (250 GB/s, 494
# TFLOP/s); `call` by what was timed: 30 to 40 us choose well on all of it (tests/parallel/test_context_layout.py). The
# others are derived from vendors' peaks: 60 % of the matmul peak for attention, 90 % of a link's.
DEVICES = {
    r"H200|GH200": Rates(flops=480e12, link=329e9, both_ways=False, memory=4.3e12, call=35e-6, cores=132),
    r"H100|H800": Rates(flops=500e12, link=250e9, both_ways=False, memory=3.0e12, call=35e-6, cores=132),
    r"A100": Rates(flops=190e12, link=250e9, both_ways=False, memory=1.8e12, call=35e-6, cores=108),
    r"TPU (v5p|v5$)": Rates(flops=275e12, link=90e9, both_ways=True, memory=2.5e12),
    r"TPU v5 ?(lite|e)": Rates(flops=118e12, link=45e9, both_ways=True, memory=0.75e12),
    r"TPU v6": Rates(flops=550e12, link=90e9, both_ways=True, memory=1.5e12),
    r"TPU v?7": Rates(flops=1380e12, link=90e9, both_ways=True, memory=6.6e12),
}
UNKNOWN = Rates(flops=100e12, link=50e9, both_ways=False, memory=1.0e12)


def device_rates(kind: str | None = None) -> Rates:
    """The rates of a device kind; by default of the mesh in context, or of the devices that are here. An unknown one
    gets middling ratios."""
    if kind is None:
        kind = (jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]).device_kind
    return next((rates for pattern, rates in DEVICES.items() if re.search(pattern, str(kind))), UNKNOWN)


class Choice(NamedTuple):
    """`seconds`: one layer's attention, forward and backward, as estimated; `why` says what it was weighed against."""

    strategy: CPStrategy
    layout: CPLayout
    seconds: float
    why: str


def choose(
    shape: Shape,
    cp: int,
    *,
    strategies: Sequence[CPStrategy] = get_args(CPStrategy),
    layouts: Sequence[CPLayout] = ("zigzag", "contiguous"),
    rates: Rates | None = None,
) -> Choice:
    """The strategy, and the layout out of those allowed, that take least time by this estimate.

    Args:
      cp: devices that the sequence is split over.

    Raises:
      ValueError: nothing that is allowed can run.
    """
    rates = rates or device_rates()
    costs = {}
    for layout in layouts:
        for strategy in strategies:
            cost = estimate(shape, cp, strategy, layout, rates)
            if cost is not None:
                costs[strategy, layout] = cost
    if not costs:
        raise ValueError(
            f"none of {', '.join(strategies)} runs on {', '.join(layouts)} rows of {shape.seq_len} tokens with "
            f"cp={cp}, {shape.num_heads} heads, {shape.num_kv_heads} kv heads, window={shape.window}; use ring"
        )
    # The estimate is no better than 2 %: what it holds for alike goes to the simplest layout.
    least = min(cost.seconds for cost in costs.values())
    alike = {x: cost for x, cost in costs.items() if cost.seconds <= 1.02 * least}
    (strategy, layout), best = min(alike.items(), key=lambda x: (x[0][1] != "contiguous", x[1].seconds))
    others = sorted(
        ((s, a, c) for (s, a), c in costs.items() if s != strategy and a == layout), key=lambda x: x[2].seconds
    )
    text = "; ".join(f"{s} {c.seconds * 1e3:.3g} ms" for s, _, c in others)
    why = (
        f"cp={cp}: {strategy} on {layout} rows, about {best.seconds * 1e3:.3g} ms a layer forward and backward "
        f"(attention {best.attention * 1e3:.3g}, of it unbalanced {best.unbalanced * 1e3:.3g}, "
        f"transfers not hidden {best.exposed * 1e3:.3g}, merging and launches {best.overhead * 1e3:.3g})"
        + (f" against {text}" if text else "")
    )
    return Choice(strategy, layout, best.seconds, why)


class Cost(NamedTuple):
    """Seconds of a layer, forward and backward."""

    attention: float
    unbalanced: float  # of attention: what the busiest device does beyond the mean
    exposed: float  # transfers that attention does not hide
    overhead: float  # merging parts, starting collectives

    @property
    def seconds(self) -> float:
        return self.attention + self.exposed + self.overhead


def estimate(shape: Shape, cp: int, strategy: CPStrategy, layout: CPLayout, rates: Rates) -> Cost | None:
    """The cost of one strategy; None where it cannot run."""
    N, K, H = shape.num_heads, shape.num_kv_heads, shape.head_dim
    tokens = shape.batch * shape.seq_len / cp
    if layout == "zigzag" and shape.seq_len % (2 * cp):
        return None
    queries, keys = tokens * N * H * shape.itemsize, 2 * tokens * K * H * shape.itemsize  # bytes of a device
    sums = 2 * tokens * K * H * 4  # dk and dv in float32
    wide = rates.link * (2 if rates.both_ways else 1)
    group = {"ulysses": cp, "usp": math.gcd(K, cp)}.get(strategy, 1)
    if group > N or (strategy == "usp" and group in (1, cp)):
        return None
    places = cp // group
    padded = min(K * -(-N // K * math.gcd(K, group) // group) * group // math.gcd(K, group), -(-N // group) * group * 2)
    mean = shape.pairs * H * max(N, padded if N % group else N) / cp / rates.flops
    split = 1 if strategy == "ulysses" else places
    uneven = 0.0
    if shape.packed and layout in ("contiguous", "zigzag"):
        uneven = 0.5 * (1 - 1 / split)  # documents of any length: one that dominates a device is common
    elif shape.causal and layout == "contiguous":  # under a short window the first tokens alone see less
        part = 1.0 if shape.window is None else min(1.0, max(0.0, 2 * shape.window / shape.seq_len - 1))
        uneven = (1 - 1 / split) * part
    forward, backward = (mean * f * (1 + uneven) for f in (FORWARD, BACKWARD))

    exposed, starts, merges, hops = 0.0, 0, 0.0, 0
    queries_of = shape.seq_len / places  # a place's
    blocks = [queries_of]  # of a backward pass
    if strategy == "all_gather":
        exposed = (cp - 1) * (2 * keys + sums) / wide
        if layout in ("zigzag", "striped"):
            exposed += 2 * cp * keys / rates.memory  # what was gathered, put in order in each pass
        starts = 6
    else:
        copies = math.lcm(K, group) // K
        exposed = (group - 1) / group * (5 * queries + 3 * copies * keys) * (1 / wide + 2 / rates.memory)  # and packed
        starts = 13 if group > 1 else 0
        keys, sums = keys * copies, sums * copies
        hops = places - 1
        if shape.window is not None and layout == "contiguous":
            hops = min(hops, -(-shape.window // (shape.seq_len // cp)) * (1 if shape.causal else 2))
        sums = keys if hops == 1 else sums  # the only part goes home as the kernel returned it
        moved = [hops * keys, hops * (keys + sums)]
        few = layout == "packed" and group == 1 and shape.span <= shape.seq_len / cp / 24
        if few:  # documents so short that few are cut: a part of the tokens travels
            moved = [x / PARTS for x in moved]
        rate, travel = rates.link, strategy == "bidirectional" and queries * 2 <= keys
        if strategy == "halo":
            if shape.window is None or layout != "contiguous":
                return None
            far = min(1.0, shape.window / (shape.seq_len / cp)) if hops == 1 else 1.0
            moved = [x * far for x in moved]
        if strategy == "bidirectional":
            if travel:  # heads for heads, parts come back, the last one when all is done
                moved, rate = [hops * queries, hops * 2 * queries], wide / 2
                exposed += (queries + queries / shape.itemsize * 4) / rate
            else:
                rate = wide
            hops = (places - 1) if travel else places // 2
        for bytes_, work in zip(moved, (forward, backward)):
            exposed += max(bytes_ / rate - rates.hidden * work, 0.0) + (1 - rates.hidden) * min(bytes_ / rate, work)
        starts += 2 * hops * 2
        merges = hops / PARTS if few else hops
        if hops:  # the own block comes in two halves, but where queries or little of the keys travel
            blocks = ([queries_of] if few or travel else [queries_of / 2] * 2) + [queries_of] * hops
    # Bytes of a block beyond the own one, its queries and parts read and written: 1.6 times merging's, as measured.
    merging = merges * tokens * N * H * 45 / rates.memory
    attention = forward + backward + _waiting(shape, blocks, mean, rates)
    overhead = merging + starts * rates.latency + (1 + hops + 2 * len(blocks)) * rates.call
    return Cost(attention, attention - mean * (FORWARD + BACKWARD), exposed, overhead)


def _waiting(shape: Shape, blocks: list[float], mean: float, rates: Rates) -> float:
    """Seconds that cores wait for the last one in the kernels of dK and dV, beyond the work that all share.

    A tile sums over the queries that see its keys, of all heads that share them: with few kv heads there are fewer
    tiles than cores. blocks: queries of each kernel.
    """
    reach = TILE + (shape.span if shape.window is None else min(shape.span, shape.window))
    pairs = TILE * sum(min(queries, reach) for queries in blocks) * shape.num_heads / shape.num_kv_heads
    work = DKV * BACKWARD * shape.head_dim / rates.flops
    return max(0.0, pairs * work * rates.cores - DKV * BACKWARD * mean)


class Context(NamedTuple):
    """How a model splits its sequences over cp: `strategy` and `layout` of `context.attention`."""

    strategy: CPStrategy | Literal["auto"] = "all_gather"
    layout: CPLayout = "contiguous"


def plan(
    mesh: MeshConfig, model: ModelConfig, batch_size: int, seq_len: int, *, rates: Rates | None = None
) -> tuple[Context, str]:
    """What a mesh's cp_strategy and cp_layout come to for packed rows of a model, and why.

    The layout is one for all layers; an "auto" strategy stays so, for each kind of layer chooses its own.

    Args:
      mesh: no size is -1.
    """
    shape = Shape(
        batch=max(1, batch_size // (mesh.dp * mesh.fsdp * mesh.ep)),
        seq_len=seq_len,
        num_heads=max(1, model.num_heads // mesh.tp),
        num_kv_heads=max(1, model.num_kv_heads // mesh.tp),
        head_dim=model.head_dim,
        itemsize=jnp.dtype(model.dtype).itemsize,
        window=model.window - 1 if model.window and all(model.local_layers) else None,
        packed=True,
    )
    choice = choose(
        shape,
        mesh.cp,
        strategies=get_args(CPStrategy) if mesh.cp_strategy == "auto" else (mesh.cp_strategy,),
        layouts=("packed", "contiguous") if mesh.cp_layout == "auto" else (mesh.cp_layout,),
        rates=rates,
    )
    return Context(mesh.cp_strategy, choice.layout), choice.why
