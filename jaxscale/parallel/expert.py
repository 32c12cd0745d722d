"""Experts over the mesh axis ep (expert parallelism). Nothing is dropped, whatever the routing.

Each device holds E/ep experts and the tokens of its rows. Four ways bring them together:

- all_gather: every token visits every device of ep; what its experts there return is summed as it is scattered back.
  Where kernels reach the peers' memory (`pallas_kernels.spread_from_peers`), nothing is gathered: they read and write
  there what they spread and sum.
  Best for few devices, or where most tokens have an expert on most of them.
- all_to_all: each (token, expert) pair travels to the expert's device and back, in buffers of `_SLACK` times an even
  share.
- remote_copy, on TPUs: each pair's row is copied right into its expert's rows on the other device and back, nothing is
  padded on the way (`jaxscale.parallel.expert_remote`).
- two_level, where ep spans several hosts: a token travels once to each host that has an expert of its, to the device
  that stands there where its own stands here, and on to its experts inside the host by one of the other ways. What
  they return is added up inside the host first. So the slow links between hosts carry each token once for a host, not
  once for an expert, in few large messages (as in 2DH of Tutel, arXiv 2206.03382, and DeepSeek-V3, arXiv 2412.19437).

Routing that does not fit into the buffers is dealt with in several rounds, and memory stays that of an even load. Those
of all_gather send nothing, so each device has its own number (unless kernels reach the peers' memory); of the others
all devices see how many.
Without a mesh each function is its single-device twin.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.parallel import expert_remote
from jaxscale.parallel.expert_local import Call, among, apply_pairs, experts_local, round_first
from jaxscale.parallel.permute import Places, Sorted, collect, merge_sorted, sort_pairs, spread
from jaxscale.sharding import (
    ROUTED,
    active_mesh,
    axes_of,
    axis_sizes,
    compute_spec,
    constrain,
    enter,
    gather_weight,
    partial_sums,
    partitions,
    shard_map,
)
from pallas_kernels import QuantizedRows, peer_rows_implementation
from sharding_rules.hlo import SELDOM
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

EP, TP = "ep", "tp"
Dispatch = Literal["auto", "all_gather", "all_to_all", "remote_copy", "two_level"]
_SLACK = 1.25  # buffers, in even shares, at most: routing that a balance loss holds fits
_FAR = 9.0  # how much longer a byte takes between hosts than inside one: NVLink 450 GB/s, network 50 GB/s


class _Level(NamedTuple):
    """Devices of ep that exchange with each other: all, those of one host, or one of each host."""

    size: int
    stride: int = 1  # from one to the next
    groups: tuple[tuple[int, ...], ...] | None = None

    def index(self):
        return lax.axis_index(EP) // self.stride % self.size

    def all_gather(self, x):
        return lax.all_gather(x, EP, axis_index_groups=self.groups, tiled=True)

    def psum_scatter(self, x):
        return lax.psum_scatter(x, EP, axis_index_groups=self.groups, tiled=True)

    def all_to_all(self, x):
        """[size * n, ...], n for each device."""
        return lax.all_to_all(x, EP, 0, 0, axis_index_groups=self.groups, tiled=True)


def _levels(ep: int, hosts: int) -> tuple[_Level, _Level]:
    """(across hosts, inside one): devices of a host are neighbours on ep."""
    inside = ep // hosts
    across = tuple(tuple(range(i, ep, inside)) for i in range(inside))
    return _Level(hosts, inside, across), _Level(
        inside, 1, tuple(tuple(range(h, h + inside)) for h in range(0, ep, inside))
    )


def apply_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    p: dict[str, Array],
    *,
    activation: str = "silu",
    dispatch: Dispatch = "auto",
    chunks: int = 1,
    hosts: int = 1,
    row_pairs: int | None = None,
    rules: Rules = MEGATRON_FSDP,
) -> Float[Array, "B T D"]:
    """The weighted sum of what each token's experts make of it, laid out as the residual stream is.

    Args:
      experts: int32; numbers outside of 0..E-1 are nobody's and cost nothing.
      weights: float32.
      p: w_gate, w_up [E, D, F] and w_down [E, F, D], from `gather_experts`; maybe b_gate, b_up [E, F], b_down [E, D].
      activation: of `jaxscale.layers.act`, or "gpt_oss".
      dispatch: "auto" takes the one that moves fewer bytes, those between hosts counted `_FAR` times.
      chunks: parts of a device's tokens; the transfers of one run beside the experts of another.
      hosts: that ep spans, each with as many neighbouring devices; "two_level" needs two or more.
      row_pairs: how many pairs of token and expert a row has at most, where that is less than T K.

    Raises:
      ValueError: ep does not divide the experts, hosts do not divide ep; an unknown dispatch; arrays lie on a mesh that
        is not set.
      NotImplementedError: remote_copy where devices are no TPUs.
    """
    num_experts = p["w_up"].shape[0]
    call = Call(num_experts, activation, dispatch, chunks, hosts)
    if dispatch not in get_args(Dispatch):
        raise ValueError(f"dispatch={dispatch!r} is not one of {', '.join(get_args(Dispatch))}")
    mesh = active_mesh()
    if mesh is None:  # no ep: one device
        if jax.sharding.get_abstract_mesh().empty and AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types:
            raise ValueError("arrays lie on a mesh but none is set; call this under `with jax.set_mesh(mesh):`")
        rows = None if row_pairs is None else x.shape[0] * row_pairs
        fn = functools.partial(experts_local, call, rows=rows)
        return _flat(functools.partial(round_first, fn), x, experts, weights, p)
    ep = mesh.shape[EP]
    if num_experts % ep:
        divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise ValueError(f"num_experts={num_experts} is not divisible by ep={ep}; use ep in {divisors}")
    if dispatch == "two_level" and hosts == 1:
        raise ValueError("dispatch='two_level' needs hosts=2 or more; use dispatch='auto' within one host")
    if dispatch == "remote_copy" and hosts > 1:
        raise ValueError(
            f"dispatch='remote_copy' reaches the devices of one host or slice, but ep={ep} lies over hosts={hosts}; "
            "use dispatch='two_level', which copies inside of each"
        )
    if ep % hosts:
        raise ValueError(
            f"ep={ep} does not lie evenly over hosts={hosts}; use ep in {[hosts * i for i in (1, 2, 4, 8)]}"
        )
    rows = ("batch", "seq", None)
    (x,) = enter(x, ("batch", "seq", "embed"), (p["w_up"],), rules)
    experts, weights = (constrain(a, rows, rules) for a in (experts, weights))
    tp = axes_of(partitions(p["w_up"])[2:])
    axes = axes_of(partitions(x)) | axes_of(partitions(p["w_up"]))
    out_spec = compute_spec(x.shape, ("batch", "norm_seq" if tp else "seq", "embed"), rules) or P()
    scatter = TP in axes_of(out_spec[1:2])
    split = EP in axes_of(partitions(x)[:1])

    def apply_local(x, experts, weights, p):
        x, experts, weights, p = jax.tree.map(lambda a: _vary(a, axes), (x, experts, weights, p))
        if tp and "b_down" in p:  # once: what the devices of tp return is summed
            p = p | {"b_down": p["b_down"] * (lax.axis_index(TP) == 0).astype(p["b_down"].dtype)}
        alone = functools.partial(round_first, functools.partial(experts_local, call))
        fn = functools.partial(_dispatched, call, split=split) if ep > 1 else alone
        out = _flat(fn, x, experts, weights, p)
        if scatter:
            out = lax.psum_scatter(out, TP, scatter_dimension=1, tiled=True)
        elif tp:
            out = lax.psum(out, TP)
        return out if split or ep == 1 else lax.psum(out, EP)

    out = shard_map(apply_local, out_specs=out_spec)(x, experts, weights, p)
    return constrain(out, ("batch", "norm_seq", "embed"), rules)


def compiler_options(platform: str) -> dict[str, Any]:
    """For `jax.jit(step, compiler_options=...)`: what a step with experts over ep needs so that its GPUs run on.

    The host reads a loop's condition, which further rounds are: until they are done with what came before, it prepares
    nothing. In a CUDA graph the device decides. WHILE, beside what XLA records into graphs by itself.
    """
    recorded = "CONDITIONAL,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,FUSION,WHILE"
    return {"xla_gpu_enable_command_buffer": recorded} if platform in ("gpu", "cuda") else {}


def gather_experts(params: Any, specs: Any, dtype: Any, rows: tuple[int, ...], rules: Rules = MEGATRON_FSDP) -> Any:
    """`jaxscale.sharding.gather_params` for what has a dim of experts, which stays split over ep as its rows are."""
    mesh = active_mesh()
    shared = frozenset()
    if mesh is not None:
        shared = partial_sums(axes_of(resolve_spec(rows, ("batch", "seq"), rules.compute, axis_sizes(mesh)).spec))
    reduced = lambda axes, where: shared - axes_of(where)
    return jax.tree.map(functools.partial(gather_weight, dtype, rules, reduced), specs, params)


def _flat(fn, x, experts, weights, p):
    """fn on rows: x [n, D], experts and weights [n, K]."""
    K = experts.shape[-1]
    return fn(x.reshape(-1, x.shape[-1]), experts.reshape(-1, K), weights.reshape(-1, K), p).reshape(x.shape)


def _dispatched(call: Call, x, experts, weights, p, *, split: bool):
    ep = lax.axis_size(EP)
    reason = expert_remote.unless_remote(x)
    if call.dispatch == "remote_copy" and reason:
        raise NotImplementedError(f"dispatch='remote_copy' cannot run here: {reason}; use dispatch='auto'")
    if not split:  # every device of ep has these tokens (a batch that does not divide): each adds what is its own
        first = lax.axis_index(EP) * (call.num_experts // ep)
        return round_first(functools.partial(experts_local, call, first=first), x, experts, weights, p)
    n, K = experts.shape
    parts = min(call.chunks, n)
    size = -(-n // parts)
    remote = None if reason else remote_cost(size, call.num_experts, x.shape[1] * x.dtype.itemsize)
    way = call.dispatch if call.dispatch != "auto" else choose(ep, K, call.hosts, remote=remote)
    out, whole = [], (x, experts, weights)
    for start in range(0, n, size):  # written out: the scheduler may start a transfer before the part before is done
        x, experts, weights = (a[start : start + size] for a in whole)
        if way == "two_level":
            fn = functools.partial(_two_level, call, remote)
        else:
            fn = functools.partial(_one_level, call, _Level(ep), way, x.shape[0] * K)
        peers = way == "all_gather" and _reads_peers(x, experts, ep)
        if remote is None and not peers:  # both take arrays; over two H100s rows of 8 bits were slower on their way
            fn = functools.partial(round_first, fn)
        out.append(fn(x, experts, weights, p))
    return jnp.concatenate(out)


def remote_cost(tokens: int, num_experts: int, row_bytes: int) -> Callable[[int, float], float]:
    """What remote copies cost for so many tokens of a device, as `choose` takes it."""
    return functools.partial(expert_remote.rows_leaving, tokens=tokens, num_experts=num_experts, row_bytes=row_bytes)


def choose(
    ep: int,
    top_k: int,
    hosts: int = 1,
    far: float = _FAR,
    remote: Callable[[int, float], float] | None = None,
) -> str:
    """The dispatch whose rows take least time: ep - 1 for each token, its experts' share in padded buffers or by remote
    copies, or one for each of its hosts and then one of these inside.

    Args:
      far: how much longer a row takes between hosts than inside one.
      remote: (devices, pairs) -> rows for each token by remote copies, where these can run.
    """
    costs = _rows(ep, 1.0, top_k, remote if hosts == 1 else None)
    if hosts > 1:
        arriving = hosts * share_of_a_host(hosts, top_k)
        costs = {way: far * cost for way, cost in costs.items()}
        inside = _rows(ep // hosts, arriving, top_k, remote)
        costs["two_level"] = far * arriving * (1 - 1 / hosts) + min(inside.values())
    return min(costs, key=lambda way: costs[way])


def share_of_a_host(hosts: int, top_k: int) -> float:
    """The share of tokens that `two_level` has room for in its buffer to one host, a token's own host included."""
    return min(1.0, _SLACK * (1 - (1 - 1 / hosts) ** top_k))


def room_for(pairs: float, experts: int) -> int:
    """How many pairs a device of so many experts has room for where an even load gives it `pairs`: experts whose loads
    differ by a third, each by itself, stay within three standard deviations. In eights, as kernels like."""
    return math.ceil(min(_SLACK, 1 + experts**-0.5) * pairs / 8) * 8


def choose_inside(size: int, rows: float, pairs: float, remote: Callable[[int, float], float] | None = None) -> str:
    """The dispatch among the `size` devices of a host, where so many rows and pairs on each stem from one token."""
    costs = _rows(size, rows, pairs, remote)
    return min(costs, key=lambda way: costs[way])


def _rows(size: int, rows: float, pairs: float, remote: Callable[[int, float], float] | None) -> dict[str, float]:
    """How many leave a device, by dispatch: all gathered, as pairs in padded buffers, as pairs by remote copies."""
    costs = {"all_gather": rows * (size - 1), "all_to_all": _SLACK * pairs * (size - 1) / size}
    return costs if remote is None else costs | {"remote_copy": remote(size, pairs)}


def _one_level(call: Call, level: _Level, way: str, pairs: int, x, experts, weights, p):
    """pairs: of token and expert, that an even load gives each device."""
    n, K = experts.shape
    mine = call.num_experts // level.size
    if way == "all_gather":
        most = level.size * n * min(K, mine)
        room = min(most, room_for(pairs, mine))
        key = among(experts, call.num_experts).reshape(-1)
        weights = checkpoint_name(level.all_gather(weights), ROUTED)
        if level.groups is None and not isinstance(x, QuantizedRows) and _reads_peers(x, experts, level.size):
            # Their kernels wait for each other, so each device has as many rounds as the one with most pairs.
            here, most_pairs = _gathered_pairs(level, mine, key, None)
            rounds = None if room == most else -(-most_pairs // room)
            one_round = lambda turn, here, *values: apply_pairs(call, room, turn * room, here, *values, axis=EP)
            return _in_rounds(one_round, rounds, here, x, weights, p)
        x = jax.tree.map(level.all_gather, x)
        here, _ = _gathered_pairs(level, mine, key, x)
        # Its own number of rounds for each device: they send nothing.
        rounds = None if room == most else -(-here[1].starts[-1] // room)
        one_round = lambda turn, here, *values: apply_pairs(call, room, turn * room, here, *values)
        return level.psum_scatter(_in_rounds(one_round, rounds, here, x, weights, p))
    if way == "remote_copy":
        block = expert_remote.block_of(pairs, call.num_experts)
        most = level.size * (n * min(K, mine) + (block - 1) * min(n * K, mine)) // block
        filled = room_for(pairs + expert_remote.filling(pairs, call.num_experts), mine)
        room = min(most, filled // block)
        traffic = expert_remote.make_traffic(call, level, block, experts)
        rounds = None if room == most else _rounds(traffic.arriving(), room)
        route = expert_remote.Route(EP, level.groups)
        one_turn = functools.partial(expert_remote.one_turn, call, level, block, room, route)
        return _in_rounds(one_turn, rounds, traffic, x, weights, p)
    most = n * min(K, mine)
    room = min(most, math.ceil(_SLACK * pairs / level.size))
    to = among(experts, call.num_experts) // mine  # level.size: nobody
    boxes = sort_pairs(to.reshape(-1), level.size)
    rounds = None if room == most else _rounds(jnp.diff(boxes.starts), room)
    return _in_rounds(functools.partial(_exchanged, call, level, room), rounds, (experts, boxes), x, weights, p)


def _reads_peers(x, experts, devices: int) -> bool:
    n, K = experts.shape
    return reads_peers(x, jax.ShapeDtypeStruct((devices * n, K), jnp.int32), devices)


def reads_peers(x, place, devices: int) -> bool:
    """Whether tokens travel inside the kernels that spread and collect them."""
    return peer_rows_implementation(x, place, devices) == "mosaic_gpu"


def _gathered_pairs(level: _Level, mine: int, key, x):
    """`pairs_here` of all devices' pairs; how many the device with most of them has. Each sorts its own, while tokens
    (x, where they are gathered) travel.

    Numbers wait for x: the scheduler has one transfer at a time, and the long one may run beside the router and the
    sort (in the program compiled for two H200s it does).
    """
    ordered = sort_pairs(key, mine * level.size)
    numbers = jnp.concatenate([key, ordered.place, ordered.starts])
    if x is not None:
        numbers, _ = lax.optimization_barrier((numbers, lax.stop_gradient(x)))
    m, first = len(key), level.index() * mine
    key, place, starts = jnp.split(level.all_gather(numbers[None]), [m, 2 * m], axis=1)
    local = checkpoint_name(among(key - first, mine), ROUTED)
    here = merge_sorted(local, place, lax.dynamic_slice_in_dim(starts, first, mine + 1, axis=1))
    most = jnp.diff(starts.sum(axis=0)[::mine]).max()
    return (local.reshape(-1), here), checkpoint_name(most, ROUTED)


def _exchanged(call: Call, level: _Level, room: int, turn, indices, x, weights, p):
    """Of the pairs for each device those that have room in this turn."""
    experts, boxes = indices
    mine = call.num_experts // level.size
    key = among(experts, call.num_experts).reshape(-1)
    tokens, single = places_in_boxes(boxes, key // mine, room, turn * room, experts.shape[1])
    ids = jnp.where(single.token < len(key), key[jnp.minimum(single.token, len(key) - 1)] % mine, mine)
    sent = jax.tree.map(lambda a: spread(a, tokens), x), ids[:, None], spread(weights.reshape(-1, 1), single)
    got, ids, w = jax.tree.map(level.all_to_all, sent)
    y = experts_local(call, got, ids, w, p, rows=got.shape[0])
    return collect(level.all_to_all(y), tokens).astype(x.dtype)


def _two_level(call: Call, remote, x, experts, weights, p):
    across, inside = _levels(lax.axis_size(EP), call.hosts)
    n, K = experts.shape
    room = math.ceil(n * share_of_a_host(across.size, K))
    host = among(experts, call.num_experts) // (call.num_experts // across.size)
    seen = jnp.stack([(host[:, :k] == host[:, k : k + 1]).any(axis=1) for k in range(K)], axis=1)
    to = jnp.where(seen, across.size, host).reshape(-1)
    boxes = sort_pairs(to, across.size)
    rounds = None if room == n else _rounds(jnp.diff(boxes.starts), room)
    one_round = functools.partial(_by_hosts, call, remote, across, inside, room)
    return _in_rounds(one_round, rounds, (experts, to, boxes), x, weights, p)


def _by_hosts(call: Call, remote, across: _Level, inside: _Level, room: int, turn, indices, x, weights, p):
    """Of the tokens for each host those that have room in this turn."""
    experts, to, boxes = indices
    n, K = experts.shape
    held = call.num_experts // across.size  # by a host
    tokens, _ = places_in_boxes(boxes, to, room, turn * room, K)
    ids = jnp.where(tokens.token[:, None] < n, experts[jnp.minimum(tokens.token, n - 1)], -1)
    sent = jax.tree.map(lambda a: spread(a, tokens), x), ids, spread(weights, tokens)
    got, ids, w = jax.tree.map(across.all_to_all, sent)
    way = choose_inside(inside.size, got.shape[0] / n, K, remote)
    local = call._replace(num_experts=held)
    y = _one_level(local, inside, way, n * K, got, ids - across.index() * held, w, p)
    return collect(across.all_to_all(y), tokens).astype(x.dtype)


def places_in_boxes(boxes: Sorted, to, room: int, start, top_k: int) -> tuple[Places, Places]:
    """Places of tokens, and of their pairs, in one buffer for each device that something goes to: of what goes there
    `room` rows, from `start` on."""
    size, m = boxes.starts.shape[0] - 1, to.shape[0]
    row = jnp.arange(size * room, dtype=jnp.int32)
    box, at = row // room, row % room + start
    used = at < jnp.diff(boxes.starts)[box]
    pair = jnp.where(used, boxes.pair[jnp.where(used, boxes.starts[box] + at, 0)], m)
    at = boxes.place - jnp.append(boxes.starts[:size], 0)[to] - start
    place = jnp.where((to < size) & (at >= 0) & (at < room), to * room + at, size * room)
    return Places(pair // top_k, place.reshape(-1, top_k)), Places(pair, place[:, None])


def _rounds(counts, room: int):
    """In how many turns all of it has room: the same number on every device."""
    return -(-_max_everywhere(counts.max()) // room)


def _in_rounds(one_round, rounds, indices, x, weights, p):
    """The sum of one_round(turn, indices, x, weights, p) over the turns; None: one is always enough.

    The first is an ordinary part of the program. Those after it, which routing seldom needs, are loops, of which the
    backward pass keeps nothing.
    """
    if rounds is None:
        return one_round(0, indices, x, weights, p)
    return _all_rounds(one_round, rounds, indices, x, weights, p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_rounds(one_round, rounds, indices, *values):
    return _later_rounds(one_round, rounds, indices, one_round(0, indices, *values), *values)


def _later_rounds(one_round, rounds, indices, y, *values):
    """y and what further rounds add to it, in place."""

    def body(carry):
        turn, y = carry
        return turn + 1, y + one_round(turn, indices, *values)

    with jax.named_scope(SELDOM):
        return lax.while_loop(lambda carry: carry[0] < rounds, body, (jnp.int32(1), y))[1]


def _all_rounds_fwd(one_round, rounds, indices, *values):
    """Residuals: those of the first round, and the inputs."""
    y, first = jax.vjp(functools.partial(one_round, 0, indices), *values)
    return _later_rounds(one_round, rounds, indices, y, *values), (first, rounds, indices, values)


def _all_rounds_bwd(one_round, residuals, grad):
    first, rounds, indices, values = residuals

    def body(carry):
        turn, *sums = carry
        more = jax.vjp(functools.partial(one_round, turn, indices), *values)[1](grad)
        return turn + 1, *jax.tree.map(jnp.add, sums, list(more))

    grads = first(grad)
    with jax.named_scope(SELDOM):
        _, *sums = lax.while_loop(lambda carry: carry[0] < rounds, body, (jnp.int32(1), *grads))
    return None, None, *sums


_all_rounds.defvjp(_all_rounds_fwd, _all_rounds_bwd)


def _max_everywhere(x):
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pmax(x, axes) if axes else x


def _vary(x, axes):
    missing, reduced = frozenset(axes) - jax.typeof(x).mat.varying, jax.typeof(x).mat.reduced
    for part in (missing & reduced, missing - reduced):  # one cast takes axes of one kind
        x = lax.pcast(x, tuple(sorted(part)), to="varying") if part else x
    return x
