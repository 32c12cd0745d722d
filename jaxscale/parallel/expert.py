"""Experts over the mesh axis ep (expert parallelism). Nothing is dropped, whatever the routing.

Each device holds E/ep experts and the tokens of its rows. Two ways bring them together:

- all_gather: every token visits every device of ep; what its experts there return is summed as it is scattered back.
  Best for few devices, or where most tokens have an expert on most of them.
- all_to_all: each (token, expert) pair travels to the expert's device and back, in buffers of `_SLACK` times an even
  share. A step whose routing does not fit takes the other way: all devices see so and agree.

The worst case (all tokens to one device) is computed a part at a time, so that memory stays that of an even load.
Without a mesh each function is its single-device twin.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.layers import act
from jaxscale.parallel.permute import Places, collect, sort_pairs, spread
from jaxscale.sharding import active_mesh, axes_of, compute_spec, constrain, enter, partitions
from pallas_kernels import ragged_dot, ragged_dots
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

EP, TP = "ep", "tp"
Dispatch = Literal["auto", "all_gather", "all_to_all"]
_SLACK = 1.5  # buffers, in even shares: routing that a balance loss holds fits


class _Call(NamedTuple):
    num_experts: int
    activation: str
    dispatch: str
    chunks: int


def apply_experts(
    x: Float[Array, "B T D"],
    experts: Int[Array, "B T K"],
    weights: Float[Array, "B T K"],
    p: dict[str, Array],
    *,
    activation: str = "silu",
    dispatch: Dispatch = "auto",
    chunks: int = 1,
    row_pairs: int | None = None,
    rules: Rules = MEGATRON_FSDP,
) -> Float[Array, "B T D"]:
    """The weighted sum of what each token's experts make of it, laid out as the residual stream is.

    Args:
      experts: int32; numbers outside of 0..E-1 are nobody's and cost nothing.
      weights: float32.
      p: w_gate, w_up [E, D, F] and w_down [E, F, D], from `gather_experts`; maybe b_gate, b_up [E, F], b_down [E, D].
      activation: of `jaxscale.layers.act`, or "gpt_oss".
      dispatch: "auto" takes the one that moves fewer bytes.
      chunks: parts of a device's tokens; the transfers of one run beside the experts of another.
      row_pairs: how many pairs of token and expert a row has at most, where that is less than T K.

    Raises:
      ValueError: ep does not divide the experts; an unknown dispatch.
    """
    num_experts = p["w_up"].shape[0]
    call = _Call(num_experts, activation, dispatch, chunks)
    if dispatch not in ("auto", "all_gather", "all_to_all"):
        raise ValueError(f"dispatch={dispatch!r} is not one of auto, all_gather, all_to_all")
    mesh = active_mesh()
    if mesh is None:
        rows = None if row_pairs is None else x.shape[0] * row_pairs
        return _flat(functools.partial(_experts_local, call, rows=rows), x, experts, weights, p)
    ep = mesh.shape[EP]
    if num_experts % ep:
        divisors = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise ValueError(f"num_experts={num_experts} is not divisible by ep={ep}; use ep in {divisors}")
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
        fn = functools.partial(_dispatched, call, split=split) if ep > 1 else functools.partial(_experts_local, call)
        out = _flat(fn, x, experts, weights, p)
        if scatter:
            out = lax.psum_scatter(out, TP, scatter_dimension=1, tiled=True)
        elif tp:
            out = lax.psum(out, TP)
        return out if split or ep == 1 else lax.psum(out, EP)

    out = jax.shard_map(apply_local, out_specs=out_spec)(x, experts, weights, p)
    return constrain(out, ("batch", "norm_seq", "embed"), rules)


def gather_experts(params: Any, specs: Any, dtype: Any, rows: tuple[int, ...], rules: Rules = MEGATRON_FSDP) -> Any:
    """`jaxscale.sharding.gather_params` for what has a dim of experts, which stays split over ep as its rows are."""
    mesh = active_mesh()
    if mesh is None:
        return jax.tree.map(lambda x: x.astype(dtype), params)
    shared = axes_of(resolve_spec(rows, ("batch", "seq"), rules.compute, dict(mesh.shape)).spec)

    def gather(x, spec):
        axes = spec.axes[len(spec.axes) - x.ndim :]
        where = resolve_spec(x.shape, axes, rules.compute, dict(mesh.shape)).spec
        return jax.reshard(x.astype(dtype), P(*where, reduced=shared - axes_of(where)))

    return jax.tree.map(gather, params, specs)


def _flat(fn, x, experts, weights, p):
    """fn on rows: x [n, D], experts and weights [n, K]."""
    K = experts.shape[-1]
    return fn(x.reshape(-1, x.shape[-1]), experts.reshape(-1, K), weights.reshape(-1, K), p).reshape(x.shape)


def _dispatched(call: _Call, x, experts, weights, p, *, split: bool):
    ep, mine = lax.axis_size(EP), call.num_experts // lax.axis_size(EP)
    first = lax.axis_index(EP) * mine
    if not split:  # every device of ep has these tokens (a batch that does not divide): each adds what is its own
        return _experts_local(call, x, experts, weights, p, first=first)
    n, K = experts.shape
    way = call.dispatch if call.dispatch != "auto" else choose(ep, K)
    parts = min(call.chunks, n)
    size = -(-n // parts)
    out, whole = [], (x, experts, weights)
    for start in range(0, n, size):  # written out: the scheduler may start a transfer before the part before is done
        x, experts, weights = (a[start : start + size] for a in whole)
        out.append((_all_to_all if way == "all_to_all" else _all_gather)(call, x, experts, weights, p))
    return jnp.concatenate(out)


def choose(ep: int, top_k: int) -> str:
    """The dispatch that moves fewer rows: ep - 1 for each token, or its experts' share in padded buffers."""
    return "all_gather" if ep - 1 <= _SLACK * top_k * (ep - 1) / ep else "all_to_all"


def _all_gather(call: _Call, x, experts, weights, p):
    ep, mine = lax.axis_size(EP), call.num_experts // lax.axis_size(EP)
    first = lax.axis_index(EP) * mine
    n, K = experts.shape
    all_experts, all_weights = (lax.all_gather(a, EP, tiled=True) for a in (experts, weights))
    most = ep * n * min(K, mine)
    tight = min(most, math.ceil(_SLACK * n * K))

    def at_once(x, rows):
        x = lax.all_gather(x, EP, tiled=True)
        y = _experts_local(call, x, all_experts, all_weights, p, first=first, rows=rows)
        return lax.psum_scatter(y, EP, tiled=True)

    if tight >= most:
        return at_once(x, most)
    held = ((all_experts >= first) & (all_experts < first + mine)).sum()
    fits = _max_everywhere(held) <= tight
    return lax.cond(fits, lambda x: at_once(x, tight), lambda x: _in_parts(call, x, experts, weights, p), x)


def _all_to_all(call: _Call, x, experts, weights, p):
    ep, mine = lax.axis_size(EP), call.num_experts // lax.axis_size(EP)
    n, K = experts.shape
    slots = min(n * min(K, mine), math.ceil(_SLACK * n * K / ep))
    key = jnp.where((experts >= 0) & (experts < call.num_experts), experts, call.num_experts).reshape(-1)
    to = key // mine  # ep: nobody
    pairs = sort_pairs(to, ep)
    counts = jnp.diff(pairs.starts)

    def exchange(x):
        slot = jnp.arange(ep * slots, dtype=jnp.int32)
        used = slot % slots < counts[slot // slots]
        pair = jnp.where(used, pairs.pair[jnp.where(used, pairs.starts[slot // slots] + slot % slots, 0)], n * K)
        to_first = jnp.append(pairs.starts[:ep], 0)[to]
        place = jnp.where(to < ep, to * slots + pairs.place - to_first, ep * slots)
        tokens, single = Places(pair // K, place.reshape(n, K)), Places(pair, place[:, None])
        ids = jnp.where(used, key[jnp.where(used, pair, 0)] % mine, mine)
        sent = spread(x, tokens), ids, spread(weights.reshape(-1, 1), single)
        got, ids, w = (lax.all_to_all(a.reshape(ep, slots, -1), EP, 0, 0, tiled=True) for a in sent)
        rows = ep * slots
        y = _experts_local(call, got.reshape(rows, -1), ids.reshape(rows, 1), w.reshape(rows, 1), p, rows=rows)
        back = lax.all_to_all(y.reshape(got.shape), EP, 0, 0, tiled=True)
        return collect(back.reshape(rows, -1), tokens).astype(x.dtype)

    if slots >= n * min(K, mine):
        return exchange(x)
    fits = _max_everywhere(counts.max()) <= slots
    return lax.cond(fits, exchange, lambda x: _in_parts(call, x, experts, weights, p), x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_parts(call: _Call, x, experts, weights, p):
    """The all-gather way for any routing, 1/ep of the tokens at a time. The backward pass computes it again: a
    custom_vjp and no jax.checkpoint, because a policy outside of it that keeps everything would keep this too."""
    return _part_by_part(call, x, experts, weights, p)


def _in_parts_fwd(call: _Call, *args):
    """Residuals: the inputs."""
    return _part_by_part(call, *args), args


def _in_parts_bwd(call: _Call, args, grad):
    return jax.vjp(functools.partial(_part_by_part, call), *args)[1](grad)


_in_parts.defvjp(_in_parts_fwd, _in_parts_bwd)


def _part_by_part(call: _Call, x, experts, weights, p):
    ep, mine = lax.axis_size(EP), call.num_experts // lax.axis_size(EP)
    first = lax.axis_index(EP) * mine
    n = x.shape[0]
    pad = -n % ep
    rows = [jnp.pad(a, ((0, pad), (0, 0)), constant_values=c) for a, c in ((x, 0), (experts, -1), (weights, 0))]

    @jax.checkpoint
    def part(args):
        x, experts, weights = (lax.all_gather(a, EP, tiled=True) for a in args)
        return lax.psum_scatter(_experts_local(call, x, experts, weights, p, first=first), EP, tiled=True)

    out = lax.map(part, tuple(a.reshape(ep, -1, a.shape[1]) for a in rows))
    return out.reshape(-1, x.shape[1])[:n]


def _experts_local(call: _Call, x, experts, weights, p, *, first: Any = 0, rows: int | None = None):
    """The weighted sum over those experts that are here: numbers first..first + len(w_up) - 1.

    Pairs are sorted by expert, so that each expert's rows lie together for a grouped matmul; rows: how many pairs there
    are at most (default: each token with each of its choices that can be here).
    """
    n, K = experts.shape
    here = p["w_up"].shape[0]
    most = n * min(K, here) if rows is None else rows
    local = (experts - first).reshape(-1)
    local = jnp.where((local >= 0) & (local < here), local, here)
    pairs = sort_pairs(local, here)
    tokens, single = pairs.expand(most, K)
    group = local[pairs.pair[:most]]
    h, w = spread(x, tokens), spread(weights.reshape(-1, 1), single)
    y = _expert_mlp(call, h, w, jnp.diff(pairs.starts), jnp.minimum(group, here - 1), p)
    return collect(y, tokens).astype(x.dtype)


def _expert_mlp(call: _Call, h, w, sizes, group, p):
    """The weights come in before the last matmul: its output is then needed by no gradient."""
    gate, up = ragged_dots(h, (p["w_gate"], p["w_up"]), sizes)
    if "b_gate" in p:
        gate, up = gate + p["b_gate"][group], up + p["b_up"][group]
    y = ragged_dot(_hidden(call.activation, gate, up, w), p["w_down"], sizes)
    if "b_down" in p:
        y = y + (w * p["b_down"][group].astype(jnp.float32)).astype(y.dtype)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hidden(activation: str, gate, up, w):
    """The hidden layer times the weights, in float32 inside. The backward pass computes it again from its inputs."""
    return _weighed(activation, gate, up, w)


def _hidden_fwd(activation: str, *args):
    """Residuals: the inputs."""
    return _weighed(activation, *args), args


def _hidden_bwd(activation: str, args, grad):
    return jax.vjp(functools.partial(_weighed, activation), *args)[1](grad)


_hidden.defvjp(_hidden_fwd, _hidden_bwd)


def _weighed(activation: str, gate, up, w):
    dtype = gate.dtype
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    if activation == "gpt_oss":
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        hidden = gate * jax.nn.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        hidden = act(gate, activation) * up
    return (hidden * w).astype(dtype)


def _max_everywhere(x):
    axes = tuple(sorted(jax.typeof(x).mat.varying))
    return lax.pmax(x, axes) if axes else x


def _vary(x, axes):
    missing, reduced = frozenset(axes) - jax.typeof(x).mat.varying, jax.typeof(x).mat.reduced
    for part in (missing & reduced, missing - reduced):  # one cast takes axes of one kind
        x = lax.pcast(x, tuple(sorted(part)), to="varying") if part else x
    return x
