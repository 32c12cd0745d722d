"""What a training step of the decoder needs, by arithmetic on shapes: memory, FLOPs, traffic by mesh axis, seconds.

Nothing is traced and no compiler is asked, so that thousands of meshes can be compared; `jaxscale.plan.aot` asks the
compiler about one. The terms are those that compiled programs were seen to hold (docs/planner.md has the comparison).
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.config import CPStrategy, MeshConfig, ModelConfig
from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder, moe
from jaxscale.models.cache import CACHE, cache_shapes
from jaxscale.parallel import context_cost
from jaxscale.parallel import pipeline as over_pp
from jaxscale.parallel.context_cost import Context
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.params import path_name, resolve_param
from jaxscale.plan import stages
from jaxscale.plan.experts import place_experts
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.sharding import WIDTHS, axes_of
from jaxscale.table import Table, human_bytes
from sharding_rules.hlo import wire_bytes
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules

# What strategies other than the partitioner's gather send beside attention (jaxscale.parallel.context).
BESIDE_ATTENTION = ("collective-permute", "all-to-all")

# Attention's rate as a share of matmuls', by head_dim: kernels of training steps on one H100 (docs/LOG.md, 2026-11-27).
ATTENTION_RATES = {64: 0.46, 128: 0.67, 256: 0.5}
LOGIT_PASSES = 5  # over the logits in float32 beside their matmuls: three of the loss, two of its gradient
HEAD_NORM_PASSES = 16  # over queries and keys in float32 where each head is normed: XLA fuses neither norm nor rotation

# Share of a device's memory that may be planned for: the runtime's own part, and the error of the estimate. On GPU XLA
# plans for 0.76 of what the driver reports (0.81 of 141 GB): beyond that it computes again and gathers again by itself.
HEADROOM = {"tpu": 0.92, "cuda": 0.8, "cpu": 0.92}


class Memory(NamedTuple):
    """Bytes of one device at the fullest moment of a step."""

    params: float
    optimizer: float
    gradients: float  # of the parameters it holds, and their sum over micro-batches
    residuals: float  # what the forward pass of one micro-batch keeps for the backward pass
    weights: float  # parameters cast to the computation's dtype
    working: float  # the fullest of one layer's backward pass and the loss
    batch: float

    @property
    def total(self) -> float:
        return sum(self)


class Transfer(NamedTuple):
    """The collectives of one kind over one set of mesh axes, in a whole step."""

    kind: str
    axes: str  # "fsdp", "fsdp+cp"
    count: int
    bytes: float  # payload of one device, as jaxscale.plan.hlo.CensusRow.bytes
    seconds: float


class Estimate(NamedTuple):
    """A training step on a pod."""

    mesh: MeshConfig
    pod: Pod
    remat: decoder.Remat
    accum_steps: int
    pipeline: Pipeline | None
    memory: Memory
    transfers: tuple[Transfer, ...]
    flops: float  # of one device and step, what is computed again included
    compute_seconds: float
    memory_seconds: float  # norms, activations, the optimizer: bounded by memory
    exposed_seconds: float  # transfers that no computation hides
    model_flops: float  # of one device and step, without what is computed again
    tokens: int  # of a step, over all devices

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.memory_seconds + self.exposed_seconds

    @property
    def fits(self) -> bool:
        return self.memory.total <= HEADROOM[self.pod.platform] * self.pod.hardware.memory

    @property
    def share_of_peak(self) -> float:
        """Model FLOPs over the rate that large matmuls reach on this hardware."""
        return self.model_flops / self.seconds / self.pod.hardware.flops

    def table(self) -> Table:
        m, hw = self.memory, self.pod.hardware
        rows = [(name, human_bytes(value), f"{value / hw.memory:.1%}") for name, value in m._asdict().items()]
        rows.append(("all", human_bytes(m.total), f"{m.total / hw.memory:.1%}"))
        return Table(f"Memory of one {self.pod.kind} ({human_bytes(hw.memory)})", ("what", "bytes", "share"), rows)

    def traffic_table(self) -> Table:
        rows = [(t.kind, t.axes, str(t.count), human_bytes(t.bytes), f"{t.seconds * 1e3:.1f}") for t in self.transfers]
        return Table("Collectives of a step, per device", ("kind", "axes", "count", "payload", "ms"), rows)


def estimate(
    model: ModelConfig,
    mesh: MeshConfig,
    pod: Pod | str,
    *,
    batch_size: int,
    seq_len: int,
    remat: decoder.Remat = "full",
    accum_steps: int = 1,
    loss_chunk: int = 2048,
    rules: Rules = MEGATRON_FSDP,
) -> Estimate:
    """Estimates one step of AdamW on the library's decoder. A pipeline does once a step what there is memory for.

    Args:
      batch_size: rows of a step over the whole mesh, each of seq_len tokens.
      loss_chunk: TrainConfig.loss_chunk.

    Raises:
      ValueError: the mesh, the batch or the sequence does not divide, with what would.
    """
    pod = find_pod(pod) if isinstance(pod, str) else pod
    mesh = mesh.fill(pod.num_devices)
    check(model, mesh, batch_size=batch_size, seq_len=seq_len, accum_steps=accum_steps)
    options = {"batch_size": batch_size, "seq_len": seq_len, "remat": remat, "accum_steps": accum_steps}
    options |= {"loss_chunk": loss_chunk, "rules": rules}
    for once in ("gradients", "weights", "nothing") if mesh.pp > 1 and mesh.fsdp > 1 else ("nothing",):
        found = _estimate(model, mesh, pod, once=once, **options)
        if found.fits:
            break
    return found


def _estimate(
    model: ModelConfig,
    mesh: MeshConfig,
    pod: Pod,
    *,
    batch_size: int,
    seq_len: int,
    remat: decoder.Remat,
    accum_steps: int,
    loss_chunk: int,
    rules: Rules,
    once: over_pp.Once,
) -> Estimate:
    context = context_of(model, mesh, pod, batch_size=batch_size // accum_steps, seq_len=seq_len)
    make = functools.partial(_Step, model, mesh, seq_len=seq_len, remat=remat, loss_chunk=loss_chunk, rules=rules)
    make = functools.partial(make, context=context, hw=pod.hardware, tpu=pod.platform == "tpu")
    rows, pipeline = batch_size // accum_steps, None
    parts = [(accum_steps, make(batch_size=rows))]  # what runs how often in a step
    if mesh.pp > 1:
        pipeline = over_pp.plan(mesh, model, batch_size, accum_steps)._replace(once=once)
        micro = rows // over_pp.count(pipeline)
        turns = model.moe is None or moe.adds_up(model, micro // (mesh.dp * mesh.fsdp))  # 1F1B, else all forward first
        stage = make(batch_size=micro, part="turns" if turns else "stage")
        ticks = accum_steps * over_pp.ticks(pipeline, mesh.pp)
        parts = [(accum_steps, make(batch_size=rows, part="around" if turns else "ends")), (ticks, stage)]
    ends, part = parts[0][1], parts[-1][1]
    sent: dict[Any, tuple[float, float]] = {}

    def add(found, times):
        for key, (count, size) in found.items():
            old = sent.get(key, (0.0, 0.0))
            sent[key] = old[0] + times * count, old[1] + times * size

    for times, one in parts:
        add(one.transfers(pod), times)
    memory = ends.memory(pod, accum_steps)
    if pipeline is not None:
        memory = Memory(**stages.memory(ends, part, pipeline, pod, accum_steps))
        add(stages.transfers(ends, part, pipeline, pod), accum_steps)
    transfers = tuple(
        Transfer(kind, "+".join(axes), round(count), size, _seconds(pod, part.shape_of(axes), kind, axes, count, size))
        for (kind, axes), (count, size) in sent.items()
        if count > 0
    )
    hw = pod.hardware
    over_cp = part.over_cp(pod)
    compute = flops = moved = 0.0
    for turns, one in parts:
        matmul, attention = one.flops()
        flops += turns * (matmul + attention)
        compute += turns * (matmul + attention * over_cp.uneven / attention_rate(model)) / hw.flops
        moved += turns * one.activation_traffic()
    moved += ends.state_traffic(memory, accum_steps)
    # Nothing is hidden on two H200s (measured), nor on v5e and v5p (compiled steps hold synchronous collectives alone).
    # Steps compiled for tpu7x start them early: those of parameters are taken to be hidden, the best case.
    beside = [] if over_cp.exposed is None else [t for t in transfers if t.axes == "cp" and t.kind in BESIDE_ATTENTION]
    resting = [t for t in transfers if "tp" not in t.axes.split("+") and t not in beside]
    others = sum(t.seconds for t in transfers if t not in resting and t not in beside)
    others += parts[-1][0] * (over_cp.exposed or 0.0)
    hidden = compute if pod.kind == "tpu7x" else 0.0
    return Estimate(
        mesh=mesh,
        pod=pod,
        remat=remat,
        accum_steps=accum_steps,
        pipeline=pipeline,
        memory=memory,
        transfers=transfers,
        flops=flops,
        compute_seconds=compute,
        memory_seconds=moved / hw.memory_bandwidth,
        exposed_seconds=others + max(0.0, sum(t.seconds for t in resting) - hidden),
        model_flops=model.flops_per_token(seq_len) * batch_size * seq_len / pod.num_devices,
        tokens=batch_size * seq_len,
    )


def pipeline_of(model: ModelConfig, mesh: MeshConfig, pod: Pod | None, **sizes: Any) -> Pipeline:
    """How a step's batch passes the stages: with `once` what there is memory for on `pod`.

    Args:
      sizes: batch_size, seq_len, remat, accum_steps, loss_chunk, rules, as of `estimate`.
    """
    pipeline = over_pp.plan(mesh, model, sizes["batch_size"], sizes["accum_steps"])
    if pod is None or mesh.pp == 1 or mesh.fsdp == 1:
        return pipeline
    try:
        found = estimate(model, mesh, pod, **sizes).pipeline
    except ValueError:  # such as heads that tp does not split, which are computed whole: what needs no memory
        return pipeline
    return found or pipeline


def attention_rate(model: ModelConfig) -> float:
    """Attention's FLOP/s as a share of large matmuls', of the nearest head_dim that was measured."""
    return ATTENTION_RATES[min(ATTENTION_RATES, key=lambda dim: abs(dim - model.head_dim))]


def cache_bytes(model: ModelConfig, mesh: MeshConfig, *, batch_size: int, max_len: int) -> float:
    """Bytes per device of the key-value cache for `batch_size` rows of `max_len` slots (decoder.init_cache)."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    split = lambda shape: math.prod(
        sizes[a] for a in axes_of(resolve_spec(shape, CACHE, MEGATRON_FSDP.compute, sizes).spec)
    )
    numbers = sum(math.prod(shape) / split(shape) for shape in cache_shapes(model, batch_size, max_len).values())
    return numbers * jnp.dtype(model.dtype).itemsize


def check(model: ModelConfig, mesh: MeshConfig, *, batch_size: int, seq_len: int, accum_steps: int = 1) -> None:
    """Refuses, in one line, what would not divide or what the decoder does not use."""
    mesh.check_model(model)
    if mesh.tp > 1 and model.num_heads % mesh.tp:
        raise ValueError(f"num_heads={model.num_heads} is not divisible by tp={mesh.tp}: attention would not be split")
    mesh.check_rows(batch_size, accum_steps)
    over_pp.plan(mesh, model, batch_size, accum_steps)
    if seq_len % (mesh.cp * mesh.tp):
        raise ValueError(f"seq_len={seq_len} is not divisible by cp*tp={mesh.cp * mesh.tp}; pad the rows")


def context_of(model: ModelConfig, mesh: MeshConfig, pod: Pod, *, batch_size: int, seq_len: int) -> Context | None:
    """How attention runs over a split sequence (decoder.loss_fn's context); None: the partitioner gathers keys.

    Raises:
      ValueError: the mesh's cp_strategy cannot run on these rows.
    """
    if mesh.cp == 1 or (mesh.cp_strategy, mesh.cp_layout) == Context():
        return None
    return context_cost.plan(mesh, model, batch_size, seq_len, rates=_context_rates(model, pod, mesh))[0]


def _context_rates(model: ModelConfig, pod: Pod, mesh: MeshConfig) -> context_cost.Rates:
    """The rates that strategies are weighed by, on this pod. A TPU's link counts both directions of an axis."""
    hw, tpu = pod.hardware, pod.platform == "tpu"
    link = hw.link("cp", {axis: getattr(mesh, axis) for axis in MESH_AXES}) / (2 if tpu else 1)
    return context_cost.Rates(
        flops=attention_rate(model) * hw.flops, link=link, both_ways=tpu, memory=hw.memory_bandwidth
    )


def _seconds(pod: Pod, shape: dict[str, int], kind: str, axes: tuple[str, ...], count: float, size: float) -> float:
    """alpha-beta: `count` collectives that carry `size` bytes in all."""
    wire = wire_bytes(kind, size / count, math.prod(shape[a] for a in axes))
    return count * pod.hardware.seconds(kind, wire, axes, shape)


class _Leaf(NamedTuple):
    """One parameter: in how many layers it is, what it is, bytes at rest and in computation, axes gathered over."""

    depth: int  # 0: not of the layers
    matrix: bool
    experts: bool
    held: float
    used: float
    gathered: tuple[str, ...]

    def of_chunk(self, pp: int, interleave: int) -> "_Leaf":
        """A stack's part in one of a stage's chunks of layers."""
        depth, used = self.depth // (pp * interleave), self.used / (pp * interleave)
        gathered = tuple(a for a in self.gathered if a != "pp")
        return self._replace(depth=depth, held=self.held / interleave, used=used, gathered=gathered)


@functools.lru_cache(maxsize=4096)
def _leaves(model: ModelConfig, mesh: MeshConfig, rules: Rules) -> tuple[_Leaf, ...]:
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    abstract = make_abstract_mesh(mesh)
    leaves = []
    for path, spec in jax.tree.leaves_with_path(decoder.param_specs(model)):
        rest = axes_of(resolve_param(spec, abstract, rules).spec)
        used = axes_of(resolve_spec(spec.shape, spec.axes, rules.compute, sizes).spec)
        numbers = math.prod(spec.shape)
        dtype = "float32" if "router" in path_name(path) else model.dtype
        leaves.append(
            _Leaf(
                depth=spec.shape[0] if spec.axes[0] == "layers" else 0,
                matrix=not WIDTHS.isdisjoint(spec.axes) and len(set(spec.axes) - {"layers"}) > 1,
                experts="experts" in spec.axes,
                held=numbers / math.prod(sizes[a] for a in rest) * jnp.dtype(spec.dtype).itemsize,
                used=numbers / math.prod(sizes[a] for a in used) * jnp.dtype(dtype).itemsize,
                gathered=tuple(a for a in MESH_AXES if a in rest - used),
            )
        )
    return tuple(leaves)


class _OverCp(NamedTuple):
    """uneven: the busiest device's attention over the mean; exposed: seconds of transfers, None: the partitioner's."""

    uneven: float
    exposed: float | None


class _Step:
    """One micro-batch on one device. Sizes are bytes.

    part: all of it; or what a device computes of it in one tick of a pipeline ("stage") and outside ("ends"). Of 1F1B
      "turns" and "around": what is gathered and scattered by hand, `jaxscale.plan.stages` deals with.
    """

    def __init__(
        self,
        model: ModelConfig,
        mesh: MeshConfig,
        batch_size: int,
        seq_len: int,
        remat: str,
        loss_chunk: int,
        rules: Rules,
        context: Context | None = None,
        hw: Any = None,
        tpu: bool = False,
        part: Literal["all", "ends", "stage", "around", "turns"] = "all",
    ):
        self.model: Any = model
        self.mesh, self.remat, self.rules, self.context = mesh, remat, rules, context
        self.sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
        self.item = jnp.dtype(model.dtype).itemsize
        self.by_turns = part == "turns"
        self.batch_axes = ("dp", "fsdp", "ep") if part in ("stage", "turns") else ("pp", "dp", "fsdp", "ep")
        self.rows = batch_size // math.prod(self.sizes[a] for a in self.batch_axes)
        self.tokens = self.rows * seq_len // mesh.cp  # between the tp collectives
        gathered = context is None or context.strategy == "all_gather"
        self.keys = self.rows * seq_len if gathered else self.tokens  # that a device holds at once
        self.seq_len, self.loss_rows = seq_len, min(loss_chunk, self.tokens)
        self.looped_loss = self.tokens > loss_chunk
        whole = lambda n: n // mesh.tp if n % mesh.tp == 0 else n
        self.heads, self.kv_heads = whole(model.num_heads), whole(model.num_kv_heads)
        self.mlp, self.vocab = whole(model.mlp_dim), whole(model.vocab_size)
        self.kv_dim = model.head_dim + (model.mla.value_dim if model.mla else model.head_dim)  # of a key and its value
        self.leaves = _leaves(model, mesh, rules)
        self.depth = max(leaf.depth for leaf in self.leaves)  # layers that are alike: all, or those with experts
        self.layers, self.ends = model.num_layers, part in ("all", "ends", "around")
        if part in ("ends", "around"):
            self.layers -= self.depth
            self.leaves = tuple(leaf for leaf in self.leaves if leaf.depth != self.depth)
        elif not self.ends:
            staged = (leaf for leaf in self.leaves if leaf.depth == self.depth)
            self.leaves = tuple(leaf.of_chunk(mesh.pp, mesh.pp_interleave) for leaf in staged)
            self.layers = self.depth = self.depth // (mesh.pp * mesh.pp_interleave)
        # The embedding, the last norm and the head, in this order.
        tables = [leaf for leaf in self.leaves if not leaf.depth]
        self.by_hand: list[_Leaf] = []
        self.gathered = () if part == "turns" else self.leaves
        if part == "around":
            self.by_hand = tables[0 if model.tie_embeddings else 1 :]
            self.gathered = (tables[0], *(leaf for leaf in self.leaves if leaf.depth))
        self.experts = None
        if model.moe is not None:
            hosts = model.moe.ep_hosts or (math.ceil(mesh.ep * mesh.cp * mesh.tp / hw.node) if hw else 1)
            hosts = hosts if mesh.ep % hosts == 0 else 1
            far = hw.bandwidth / hw.outer_bandwidth if hw else 1.0
            row = model.embed_dim * self.item if tpu else None
            self.experts = place_experts(model.moe, mesh, self.tokens, hosts, far, row)
            self.sizes |= {"ep hosts": self.experts.hosts, "ep inside": mesh.ep // self.experts.hosts}

    def residuals(self, remat: str) -> float:
        """What one layer keeps for its backward pass."""
        D, t = self.model.embed_dim, self.tokens
        carry = t / self.mesh.tp * D * self.item
        if remat == "full":
            return carry
        if remat == "dots":  # q, k, v, gate, up as the matmuls gave them, attention's output and logsumexp; both
            # sums scattered; the carry
            kept = 2 * carry + self.attention_kept(remat) + 4 * t * self.heads
            if self.experts is None:
                return kept + 2 * t * self.mlp * self.item
            # The router's logits; gate and up, of shared experts too. What experts return is needed by no gradient.
            pairs = self.experts.rows * 2 * self.experts.width * self.item
            return kept + 4 * t * self.model.moe.num_routed + pairs + 2 * t * self.experts.shared * self.item
        # Both norms keep two float32 arrays; the gated MLP six; attention q, k, v, its output and its logsumexp.
        norms = self.norms_kept()
        if self.model.qk_norm:
            norms += 2 * t * (self.heads + self.kv_heads) * self.model.head_dim * 4
        kept = norms + carry + self.attention_kept(remat) + 4 * t * self.heads
        if self.experts is None:
            return kept + carry + 6 * t * self.mlp * self.item
        # The router's input and five arrays of its logits' size in float32; of each pair of token and expert the input,
        # gate, up and their product.
        routed = 4 * t * (D + 5 * self.model.moe.num_routed)
        pairs = self.experts.rows * (D + 3 * self.experts.width) * self.item
        weights = self.expert_weights()
        rounds = self.experts.kept_for_rounds(D * self.item)
        return kept + weights + routed + pairs + rounds + 6 * t * self.experts.shared * self.item

    def expert_weights(self) -> float:
        """The matrices of one layer's experts that a device holds while it computes."""
        return sum(leaf.used / leaf.depth for leaf in self.leaves if leaf.experts and leaf.matrix)

    def norms_kept(self) -> float:
        """The float32 arrays of one layer's norms of the residual stream."""
        return (8 if self.model.post_norms else 4) * self.tokens / self.mesh.tp * self.model.embed_dim * 4

    def attention_kept(self, remat: str) -> float:
        """Queries, keys, values and what attention returns, of one layer; of latent attention the latents too."""
        t, N, H, m = self.tokens, self.heads, self.model.head_dim, self.model.mla
        if m is None:
            return 2 * t * (N + self.kv_heads) * H * self.item
        ranks = (m.q_rank or 0) + m.kv_rank
        if remat == "dots":  # as the matmuls gave them: keys before the shared part, latents where the norms are
            return self.item * (t * N * (H + m.nope_dim + 2 * m.value_dim) + t / self.mesh.tp * (ranks + m.rope_dim))
        # The norms of latents keep two float32 arrays.
        return self.item * t * (2 * N * (H + m.value_dim) + ranks) + 8 * t / self.mesh.tp * ranks

    def memory(self, pod: Pod, accum_steps: int) -> Memory:
        params = sum(leaf.held for leaf in self.leaves)
        stacked = sum(leaf.held for leaf in self.leaves if leaf.depth)
        return Memory(
            params=params,
            optimizer=2 * params,
            gradients=stacked + (params if accum_steps > 1 else 0.0),  # the stack is filled with zeros before the loss
            residuals=self.layers * self.residuals(self.remat),
            weights=self.weights(pod),
            working=max(self.working(pod)),
            batch=4 * 4 * accum_steps * self.rows * self.seq_len / self.mesh.cp,
        )

    def weights(self, pod: Pod) -> float:
        """Parameters of layers in the computation's dtype, beside those that are computed with."""
        stacked = sum(leaf.held for leaf in self.leaves if leaf.depth)
        halves = stacked * self.item / jnp.dtype(self.model.param_dtype).itemsize
        # XLA on TPU casts all layers before the loop; with remat none the casts are kept as residuals besides.
        weights = halves * ((pod.platform == "tpu") + (self.remat == "none"))
        if pod.platform == "cuda":  # XLA lays the stacks of experts out anew where a dim behind theirs is gathered
            weights += sum(leaf.held for leaf in self.leaves if leaf.experts and leaf.matrix and leaf.gathered)
        return weights

    def working(self, pod: Pod) -> tuple[float, float]:
        """Held at once: by one layer's backward pass, and by the loss."""
        D = self.model.embed_dim
        layer = sum(leaf.used / leaf.depth for leaf in self.leaves if leaf.depth == self.depth and leaf.matrix)
        rows = self.tokens * D * self.item
        # The head's gradient is whole until the backward pass ends; the zeros that the embedding's gradient will be
        # added to are whole from the loss on (one table does for both where they are tied).
        head = self.vocab * D * self.item
        tables = head if self.model.tie_embeddings else 2 * head
        # Backward: what a layer keeps (computed again, or taken out of the stack), keys gathered over cp, gathered rows
        # and their gradients, gathered weights and their gradients.
        keys = (self.keys - self.tokens) * self.kv_heads * self.kv_dim * self.item
        backward = self.residuals("none") + keys + 4 * rows + 2 * layer + tables
        # Computed again they go through fusions: compiled steps hold none at the fullest moment.
        if self.remat != "none":
            backward -= self.norms_kept()
        # Loss: head, logits in float32 and their gradient in the model's dtype, the rows and their gradient.
        loss = head + tables + self.loss_rows * self.vocab * (4 + self.item) + 3 * rows
        if pod.platform == "tpu":
            # As buffers of compiled programs show (jaxscale.plan.buffers): the norms' float32 arrays are fused away,
            # four arrays of the MLP live at once, weights are gathered one matrix at a time, the zeros for the
            # embedding's gradient come after the layers, the logits' gradient comes out of their matmul in bfloat16.
            kept = 2 * rows / self.mesh.tp
            kept += (self.tokens * self.heads + self.keys * self.kv_heads) * self.kv_dim * self.item
            if self.experts is None:
                kept += 4 * self.tokens * self.mlp * self.item
            else:
                # Three arrays of the pairs' rows; four of their hidden layers, and what a further round adds up with
                # the rounds before, the gradients of the weights. Or, where the gradient of tokens is collected, three
                # of their hidden layers and what is gathered to be added, with the head's gradient not yet reduced.
                pairs, width = self.experts.rows * self.item, self.experts.width
                rounds = 2 * self.expert_weights() * len(self.experts.overflows)
                hidden = kept + 4 * pairs * width + rounds + 4 * self.tokens * self.experts.shared * self.item
                collecting = 3 * pairs * width + self.experts.collected * D * self.item + head
                kept = 3 * pairs * D + max(hidden, collecting)
            backward = kept + 4 * rows + layer + head
            logits = self.loss_rows * self.vocab
            loss = max(head + 4 * logits, 2 * head + self.item * logits) + 3 * rows
        return backward, loss

    def working_of_turns(self, pod: Pod) -> float:
        """Held at once by one layer's backward pass in a tick of 1F1B, whose sums are counted elsewhere."""
        head = self.vocab * self.model.embed_dim * self.item
        tables = head if self.model.tie_embeddings or pod.platform == "tpu" else 2 * head
        return self.working(pod)[0] - tables

    def activation_traffic(self) -> float:
        """Bytes that a micro-batch moves beside its matmuls and attention: elementwise work of the layers, which passes
        once over what a layer could keep; what is kept, written and read; logits; weights cast forward and backward."""
        layer = self.residuals("none") + 2 * self.residuals(self.remat)
        if self.model.qk_norm:
            layer += HEAD_NORM_PASSES * self.tokens * (self.heads + self.kv_heads) * self.model.head_dim * 4
        logits = LOGIT_PASSES * self.tokens * self.vocab * 4
        cast = sum(leaf.used * (4 + self.item) / self.item for leaf in self.leaves if leaf.depth and leaf.matrix)
        return self.layers * layer + logits * self.ends + 2 * cast

    def state_traffic(self, memory: Memory, accum_steps: int) -> float:
        """Bytes that the update moves: the state read and written; gradients written, normed and read, and summed over
        micro-batches."""
        gradients = memory.params * (3 + (3 * accum_steps if accum_steps > 1 else 0))
        return 2 * (memory.params + memory.optimizer) + gradients

    def transfers(self, pod: Pod) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
        """(kind, axes) -> (how many, payload in all), of one micro-batch."""
        L, mesh, ends = self.layers, self.mesh, int(self.ends)
        found: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
        scatter = "reduce-scatter" if pod.hardware.scatters else "all-reduce"
        summed = (*self.batch_axes, "cp") if self.ends else ("fsdp", "ep", "cp")  # in a stage, over dp at the end
        rows_over = tuple(a for a in summed if self.sizes[a] > 1)

        def add(kind, axes, count, size):
            if math.prod(self.sizes[a] for a in axes) > 1 and count:
                old = found.get((kind, axes), (0, 0.0))
                found[kind, axes] = old[0] + count, old[1] + size

        for depth, matrix, experts, _, used, gathered in self.gathered:
            # A layer's weights are gathered again in the backward pass; norm scales are kept where all is kept.
            # Where all is kept, so are the experts' gathered weights: they pass a cast of types on the way.
            times = (2 if (matrix and not experts) or self.remat != "none" else 1) if depth else 1
            count = depth or 1
            add("all-gather", gathered, times * count, times * used)
            over = tuple(
                a for a in rows_over if not (experts and a == "ep")
            )  # each device of ep has experts of its own
            rest = tuple(a for a in over if a not in gathered)
            if matrix and depth and rest and rest != ("ep",):
                # With replicas the partitioner does not scatter a layer's gradient: it is summed whole on all devices.
                add("all-reduce", over, count, used)
            elif matrix and rest and not pod.hardware.scatters:
                add("all-reduce", over, count, used)  # both sums in one
            elif matrix:
                add(scatter, gathered, count, used)
                add("all-reduce", rest, count, used / math.prod(self.sizes[a] for a in gathered))
            else:
                add("all-reduce", (*over, *(("tp",) if mesh.tp > 1 else ())), count, used)
        rows = self.tokens * self.model.embed_dim * self.item
        into = rows  # what attention gathers over tp; of latent attention latents and the shared part of the keys
        if (m := self.model.mla) is not None:
            into = self.tokens * (m.kv_rank + m.rope_dim + (m.q_rank or self.model.embed_dim)) * self.item
        add("all-gather", ("tp",), 6 * L + 2 * ends, (4 * L + 2 * ends) * rows + 2 * L * into)
        # A layer computed again scatters what attention put out once more; the MLP's sum only where a norm follows it.
        sums = 4 if self.remat != "full" else 6 if self.model.post_norms else 5
        if not self.ends:  # sums that a stage cannot leave partial (jaxscale.sharding.partial_sums), as they compile
            more, kind = {"cpu": (3, scatter), "cuda": (2, "all-gather")}.get(pod.platform, (0, scatter))
            if self.by_turns and pod.platform == "cuda" and self.rows > 1:
                more = 0
            add(kind, ("tp",), more * L, more * L * rows)
        add("reduce-scatter", ("tp",), ends, ends * rows)  # the embedding's, explicit in its shard_map
        add(scatter, ("tp",), sums * L + ends, ((sums - 1) * L + ends) * rows + L * into)
        if self.experts is not None:
            for kind, axis, count, size in self.experts.transfers(self.model.embed_dim * self.item, self.remat):
                add(kind, (axis,), self.depth * count, self.depth * size)
        keys = self.keys * self.kv_heads * self.kv_dim * self.item
        if self.context is None:
            add("all-gather", ("cp",), 4 * L, 2 * L * keys)  # gathered again in the backward pass
            add(scatter, ("cp",), 2 * L, L * keys)
            return found
        for strategy, window, count in self.strategies(pod):
            for kind, times, size in self.context_transfers(strategy, window):
                add(kind, ("cp",), count * times, count * size)
        return found

    def shape_of(self, axes: tuple[str, ...]) -> dict[str, int]:
        """The mesh, outermost first, with ep as two axes for transfers on one of its levels."""
        levels = ("ep hosts", "ep inside") if set(axes) & {"ep hosts", "ep inside"} else ("ep",)
        names = [n for axis in MESH_AXES for n in (levels if axis == "ep" else (axis,))]
        return {name: self.sizes[name] for name in names}

    def shape(self, window: int | None) -> context_cost.Shape:
        """One layer's attention on this device's place of the other axes."""
        return context_cost.Shape(
            batch=self.rows,
            seq_len=self.seq_len,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.model.head_dim,
            itemsize=self.item,
            window=None if window is None else window - 1,
            packed=True,
        )

    def strategies(self, pod: Pod) -> list[tuple[CPStrategy, int | None, float]]:
        """(strategy, window, how many layers) of each kind of layer."""
        local = sum(self.model.local_layers) * self.layers / self.model.num_layers  # of a stage the mean
        kinds = [(self.model.window, local), (None, self.layers - local)]
        strategy, layout = self.context or Context()
        found = []
        for window, count in kinds:
            if count:
                chosen = strategy
                if strategy == "auto":
                    rates = _context_rates(self.model, pod, self.mesh)
                    chosen = context_cost.choose(self.shape(window), self.mesh.cp, layouts=(layout,), rates=rates)[0]
                found.append((chosen, window, count))
        return found

    def over_cp(self, pod: Pod) -> "_OverCp":
        """What splitting the sequence costs by context_cost's arithmetic."""
        if self.mesh.cp == 1:
            return _OverCp(1.0, None)
        rates, layout = _context_rates(self.model, pod, self.mesh), (self.context or Context()).layout
        attention = even = exposed = 0.0
        for strategy, window, count in self.strategies(pod):
            cost = context_cost.estimate(self.shape(window), self.mesh.cp, strategy, layout, rates)
            if cost is None:
                raise ValueError(f"cp_strategy={strategy} cannot run layers with window={window} on {layout} rows")
            attention += count * cost.attention
            even += count * (cost.attention - cost.unbalanced)
            exposed += count * (cost.overhead + (cost.exposed if strategy != "all_gather" else 0.0))
        # With remat full the forward pass, a third of the transfers at most, runs twice.
        return _OverCp(attention / even, exposed * (4 / 3 if self.remat == "full" else 1) if self.context else None)

    def context_transfers(self, strategy: CPStrategy, window: int | None) -> list[tuple[str, int, float]]:
        """(kind, count, payload) of one layer's attention, forward and backward: jaxscale.parallel.context."""
        cp, H, layout = self.mesh.cp, self.model.head_dim, (self.context or Context()).layout
        queries = self.tokens * self.heads * H * self.item
        keys, sums = (self.tokens * self.kv_heads * self.kv_dim * size for size in (self.item, 4))
        forward = 2 if self.remat == "full" else 1  # what attention returned is kept by remat dots
        if strategy == "all_gather":
            return [("all-gather", 2 * (forward + 1), (forward + 1) * cp * keys), ("reduce-scatter", 2, cp * sums)]
        group = {"ulysses": cp, "usp": math.gcd(self.kv_heads, cp)}.get(strategy, 1)
        copies = math.lcm(self.kv_heads, group) // self.kv_heads
        found = []
        if group > 1:
            size = forward * (2 * queries + copies * keys) + 3 * queries + 2 * copies * keys
            found.append(("all-to-all", 4 * forward + 9, size))
        hops = cp // group - 1
        reach = None if window is None else (window - 1) * cp / self.seq_len  # in devices
        if reach is not None and layout == "contiguous":
            hops = min(hops, math.ceil(reach))
        if strategy == "bidirectional" and 2 * queries <= keys:  # queries go around instead
            found.append(("collective-permute", 4 * hops, hops * (forward + 2) * queries))
        elif hops:
            part = min(1.0, reach) if strategy == "halo" and hops == 1 and reach is not None else 1.0
            sums = keys if hops == 1 else sums  # the only part goes home as the kernel returned it
            size = part * copies * hops * ((forward + 1) * keys + sums)
            found.append(("collective-permute", hops * (2 * forward + 4), size))
        return found

    def flops(self) -> tuple[float, float]:
        """Of matmuls with weights, and of attention; what is computed again included."""
        model, t = self.model, self.tokens
        # Of the experts, those that a token meets: their share of all, which the devices of ep have in parts.
        met = 1.0 if model.moe is None else model.moe.top_k / model.moe.num_routed * self.mesh.ep
        weights = [leaf for leaf in self.leaves if leaf.depth and leaf.matrix]
        layer = sum(leaf.used * (met if leaf.experts else 1.0) for leaf in weights) / self.item
        # Ticks of chunks are computed again where they do not take turns.
        once_more = 0 if self.ends or self.by_turns or self.mesh.pp_interleave == 1 else 1
        again = (self.remat == "full") + once_more
        matmul = 2 * t * layer * (3 + again)
        matmul += self.ends * 2 * t * self.vocab * model.embed_dim * (4 if self.looped_loss else 3)
        half = self.seq_len / 2
        keys = sum(min(half, model.window or half) if local else half for local in model.local_layers)
        keys *= self.layers / model.num_layers
        # For a query, a key it sees and a number of head_dim 2 FLOPs forward and 6 backward; of a value's dims 2 and 4.
        value = model.mla.value_dim if model.mla else model.head_dim
        again = (self.remat != "none") + once_more
        each = model.head_dim * (8 + 2 * again) + value * (6 + 2 * again)
        return matmul, t * keys * self.heads * each
