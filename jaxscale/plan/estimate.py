"""What a training step of the decoder needs, by arithmetic on shapes: memory, FLOPs, traffic by mesh axis, seconds.

Nothing is traced and no compiler is asked, so that thousands of meshes can be compared; `jaxscale.plan.aot` asks the
compiler about one. The terms are those that compiled programs were seen to hold (docs/planner.md has the comparison).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.config import MeshConfig, ModelConfig
from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder
from jaxscale.params import resolve_param
from jaxscale.plan.hardware import Pod, find_pod
from jaxscale.sharding import axes_of
from jaxscale.table import Table, human_bytes
from sharding_rules.hlo import wire_bytes
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules

ATTENTION_RATE = 0.65  # of the matmul rate: 461 of 706 TFLOP/s, cuDNN forward and backward on one H200 (docs/LOG.md)

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
    """Estimates one step of AdamW on the library's decoder.

    Args:
      batch_size: rows of a step over the whole mesh, each of seq_len tokens.
      loss_chunk: TrainConfig.loss_chunk.

    Raises:
      ValueError: the mesh, the batch or the sequence does not divide, with what would.
      NotImplementedError: the decoder does not use the axis (ep, pp) or the cp strategy is not estimated.
    """
    pod = find_pod(pod) if isinstance(pod, str) else pod
    mesh = mesh.fill(pod.num_devices)
    check(model, mesh, batch_size=batch_size, seq_len=seq_len, accum_steps=accum_steps)
    part = _Step(model, mesh, batch_size // accum_steps, seq_len, remat, loss_chunk, rules)
    memory = part.memory(pod, accum_steps)
    shape = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    transfers = tuple(
        Transfer(
            kind,
            "+".join(axes),
            count * accum_steps,
            size * accum_steps,
            _seconds(pod, shape, kind, axes, count, size) * accum_steps,
        )
        for (kind, axes), (count, size) in part.transfers(pod).items()
    )
    matmul, attention = part.flops()
    hw = pod.hardware
    compute = accum_steps * (matmul + attention / ATTENTION_RATE) / hw.flops
    # Every activation of a layer is written once and read twice; AdamW reads four arrays and writes three.
    state = memory.params + memory.optimizer
    moved = accum_steps * 3 * model.num_layers * part.residuals("none") + 2 * state + memory.gradients
    # Nothing is hidden on two H200s (measured), nor on v5e and v5p (compiled steps hold synchronous collectives alone).
    # Steps compiled for tpu7x start them early: those of parameters are taken to be hidden, the best case.
    resting = [t for t in transfers if "tp" not in t.axes.split("+")]
    others = sum(t.seconds for t in transfers) - sum(t.seconds for t in resting)
    hidden = compute if pod.kind == "tpu7x" else 0.0
    return Estimate(
        mesh=mesh,
        pod=pod,
        remat=remat,
        accum_steps=accum_steps,
        memory=memory,
        transfers=transfers,
        flops=accum_steps * (matmul + attention),
        compute_seconds=compute,
        memory_seconds=moved / hw.memory_bandwidth,
        exposed_seconds=others + max(0.0, sum(t.seconds for t in resting) - hidden),
        model_flops=model.flops_per_token(seq_len) * batch_size * seq_len / pod.num_devices,
        tokens=batch_size * seq_len,
    )


def cache_bytes(model: ModelConfig, mesh: MeshConfig, *, batch_size: int, max_len: int) -> float:
    """Bytes per device of the key-value cache for `batch_size` rows of `max_len` slots (decoder.init_cache)."""
    shape = (model.num_layers, batch_size, max_len, model.num_kv_heads, model.head_dim)
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    spec = resolve_spec(shape, decoder.CACHE, MEGATRON_FSDP.compute, sizes).spec
    return 2 * math.prod(shape) * jnp.dtype(model.dtype).itemsize / math.prod(sizes[a] for a in axes_of(spec))


def check(model: ModelConfig, mesh: MeshConfig, *, batch_size: int, seq_len: int, accum_steps: int = 1) -> None:
    """Refuses, in one line, what would not divide or what the decoder does not use."""
    if mesh.ep > 1 or mesh.pp > 1:
        raise NotImplementedError(f"mesh {mesh}: the dense decoder uses dp, fsdp, cp and tp; set ep=1 and pp=1")
    if mesh.cp > 1 and mesh.cp_strategy not in ("all_gather", "auto"):
        raise NotImplementedError(f"cp_strategy={mesh.cp_strategy} is not estimated; use all_gather")
    mesh.check_model(model)
    if mesh.tp > 1 and model.num_heads % mesh.tp:
        raise ValueError(f"num_heads={model.num_heads} is not divisible by tp={mesh.tp}: attention would not be split")
    rows = mesh.dp * mesh.fsdp * accum_steps
    if batch_size % rows:
        below, above = batch_size // rows * rows, -(-batch_size // rows) * rows
        raise ValueError(
            f"batch_size={batch_size} rows are not divisible by dp*fsdp*accum_steps={rows}; "
            f"use {' or '.join(str(n) for n in (below, above) if n)} rows, or a larger tp or cp"
        )
    if seq_len % (mesh.cp * mesh.tp):
        raise ValueError(f"seq_len={seq_len} is not divisible by cp*tp={mesh.cp * mesh.tp}; pad the rows")


def _seconds(pod: Pod, shape: dict[str, int], kind: str, axes: tuple[str, ...], count: int, size: float) -> float:
    """alpha-beta: `count` collectives that carry `size` bytes in all."""
    wire = wire_bytes(kind, size / count, math.prod(shape[a] for a in axes))
    return count * pod.hardware.seconds(kind, wire, axes, shape)


class _Leaf(NamedTuple):
    """One parameter: is it of the layers, is it a matrix, bytes at rest and in computation, axes gathered over."""

    layers: bool
    matrix: bool
    held: float
    used: float
    gathered: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _leaves(model: ModelConfig, mesh: MeshConfig, rules: Rules) -> tuple[_Leaf, ...]:
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    abstract = make_abstract_mesh(mesh)
    leaves = []
    for spec in jax.tree.leaves(decoder.param_specs(model)):
        rest = axes_of(resolve_param(spec, abstract, rules).spec)
        used = axes_of(resolve_spec(spec.shape, spec.axes, rules.compute, sizes).spec)
        numbers = math.prod(spec.shape)
        leaves.append(
            _Leaf(
                layers=spec.axes[0] == "layers",
                matrix="embed" in spec.axes and len(set(spec.axes) - {"layers"}) > 1,
                held=numbers / math.prod(sizes[a] for a in rest) * jnp.dtype(spec.dtype).itemsize,
                used=numbers / math.prod(sizes[a] for a in used) * jnp.dtype(model.dtype).itemsize,
                gathered=tuple(a for a in MESH_AXES if a in rest - used),
            )
        )
    return tuple(leaves)


class _Step:
    """One micro-batch on one device. Sizes are bytes."""

    def __init__(self, model, mesh, batch_size, seq_len, remat, loss_chunk, rules):
        self.model, self.mesh, self.remat, self.rules = model, mesh, remat, rules
        self.sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
        self.item = jnp.dtype(model.dtype).itemsize
        self.rows = batch_size // (mesh.dp * mesh.fsdp)
        self.tokens = self.rows * seq_len // mesh.cp  # between the tp collectives
        self.keys = self.rows * seq_len  # that a device attends to: gathered over cp
        self.seq_len, self.loss_rows = seq_len, min(loss_chunk, self.tokens)
        self.looped_loss = self.tokens > loss_chunk
        whole = lambda n: n // mesh.tp if n % mesh.tp == 0 else n
        self.heads, self.kv_heads = whole(model.num_heads), whole(model.num_kv_heads)
        self.mlp, self.vocab = whole(model.mlp_dim), whole(model.vocab_size)
        self.leaves = _leaves(model, mesh, rules)

    def residuals(self, remat: str) -> float:
        """What one layer keeps for its backward pass."""
        D, H, t = self.model.embed_dim, self.model.head_dim, self.tokens
        carry = t / self.mesh.tp * D * self.item
        if remat == "full":
            return carry
        q, kv = t * self.heads * H * self.item, self.keys * self.kv_heads * H * self.item
        if remat == "dots":  # q, k, v, gate, up as the matmuls gave them; both sums scattered; the carry
            own_kv = t * self.kv_heads * H * self.item
            return 2 * carry + q + 2 * own_kv + 2 * t * self.mlp * self.item
        # Both norms keep two float32 arrays; the gated MLP six; attention q, k, v, its output and its logsumexp.
        norms = (8 if self.model.post_norms else 4) * t / self.mesh.tp * D * 4
        if self.model.qk_norm:
            norms += 2 * t * (self.heads + self.kv_heads) * H * 4
        return norms + 2 * carry + 6 * t * self.mlp * self.item + 2 * q + 2 * kv + 4 * t * self.heads

    def memory(self, pod: Pod, accum_steps: int) -> Memory:
        D, L = self.model.embed_dim, self.model.num_layers
        params = sum(held for _, _, held, _, _ in self.leaves)
        stacked = sum(held for layers, _, held, _, _ in self.leaves if layers)
        layer = sum(used for layers, matrix, _, used, _ in self.leaves if layers and matrix) / L
        halves = stacked * self.item / jnp.dtype(self.model.param_dtype).itemsize
        # XLA on TPU casts all layers before the loop; with remat none the casts are kept as residuals besides.
        weights = halves * ((pod.platform == "tpu") + (self.remat == "none"))
        rows = self.tokens * D * self.item
        # The head's gradient is whole until the backward pass ends; the zeros that the embedding's gradient will be
        # added to are whole from the loss on (one table does for both where they are tied).
        head = self.vocab * D * self.item
        tables = head if self.model.tie_embeddings else 2 * head
        # Backward: what a layer keeps (computed again, or taken out of the stack), gathered rows and their gradients,
        # gathered weights and their gradients.
        backward = self.residuals("none") + 4 * rows + 2 * layer + tables
        # Loss: head, logits and their gradient in float32, the rows and their gradient.
        loss = head + tables + 2 * self.loss_rows * self.vocab * 4 + 3 * rows
        if pod.platform == "tpu":
            # As buffers of compiled programs show (jaxscale.plan.buffers): the norms' float32 arrays are fused away,
            # four arrays of the MLP live at once, weights are gathered one matrix at a time, the zeros for the
            # embedding's gradient come after the layers, the gradient of the logits is bfloat16.
            q, kv = (n * self.model.head_dim * self.item for n in (self.tokens * self.heads, self.keys * self.kv_heads))
            kept = 2 * rows / self.mesh.tp + 4 * self.tokens * self.mlp * self.item + 2 * q + 2 * kv
            backward = kept + 4 * rows + layer + head
            loss = 2 * head + self.loss_rows * self.vocab * (4 + self.item) + 3 * rows
        return Memory(
            params=params,
            optimizer=2 * params,
            gradients=stacked + (params if accum_steps > 1 else 0.0),  # the stack is filled with zeros before the loss
            residuals=L * self.residuals(self.remat),
            weights=weights,
            working=max(backward, loss),
            batch=4 * 4 * accum_steps * self.rows * self.seq_len / self.mesh.cp,
        )

    def transfers(self, pod: Pod) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
        """(kind, axes) -> (how many, payload in all), of one micro-batch."""
        L, mesh = self.model.num_layers, self.mesh
        found: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
        scatter = "reduce-scatter" if pod.hardware.scatters else "all-reduce"
        rows_over = tuple(a for a in ("dp", "fsdp", "cp") if self.sizes[a] > 1)

        def add(kind, axes, count, size):
            if math.prod(self.sizes[a] for a in axes) > 1 and count:
                old = found.get((kind, axes), (0, 0.0))
                found[kind, axes] = old[0] + count, old[1] + size

        for layers, matrix, _, used, gathered in self.leaves:
            # A layer's weights are gathered again in the backward pass; norm scales are kept where all is kept.
            times = (2 if matrix or self.remat != "none" else 1) if layers else 1
            count = L if layers else 1
            add("all-gather", gathered, times * count, times * used)
            rest = tuple(a for a in rows_over if a not in gathered)
            if matrix and layers and rest:
                # With replicas the partitioner does not scatter a layer's gradient: it is summed whole on all devices.
                add("all-reduce", rows_over, count, used)
            elif matrix:
                add(scatter, gathered, count, used)
                add("all-reduce", rest, count, used / math.prod(self.sizes[a] for a in gathered))
            else:
                add("all-reduce", (*rows_over, *(("tp",) if mesh.tp > 1 else ())), count, used)
        rows = self.tokens * self.model.embed_dim * self.item
        add("all-gather", ("tp",), 6 * L + 2, (6 * L + 2) * rows)
        sums = 5 if self.remat == "full" else 4  # a layer computed again scatters what attention put out once more
        add("reduce-scatter", ("tp",), 1, rows)  # the embedding's, explicit in its shard_map
        add(scatter, ("tp",), sums * L + 1, (sums * L + 1) * rows)
        keys = self.keys * self.kv_heads * self.model.head_dim * self.item
        again = 1 if self.remat == "none" else 2
        add("all-gather", ("cp",), 2 * L * again, 2 * L * again * keys)
        add(scatter, ("cp",), 2 * L, 2 * L * keys)
        return found

    def flops(self) -> tuple[float, float]:
        """Of matmuls with weights, and of attention; what is computed again included."""
        model, t = self.model, self.tokens
        layer = sum(used for layers, matrix, _, used, _ in self.leaves if layers and matrix) / self.item
        again = self.remat == "full"
        matmul = 2 * t * layer * (4 if again else 3)
        matmul += 2 * t * self.vocab * model.embed_dim * (4 if self.looped_loss else 3)
        half = self.seq_len / 2
        keys = sum(min(half, model.window or half) if local else half for local in model.local_layers)
        # Forward 4 FLOPs for a query, a key it sees and a number of head_dim, backward 10.
        return matmul, t * keys * self.heads * model.head_dim * (14 + 4 * (self.remat != "none"))
