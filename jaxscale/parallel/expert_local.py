"""What the experts of one device make of its rows: the part of `jaxscale.parallel.expert` that knows of no other."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxscale.layers import act
from jaxscale.parallel.permute import Sorted, collect, collect_over, sort_pairs, spread, spread_over
from pallas_kernels import QuantizedArray, quantize_rows, ragged_dot, ragged_dots
from pallas_kernels.ragged_dot import gated


class Call(NamedTuple):
    num_experts: int  # over the devices that exchange
    activation: str
    dispatch: str
    chunks: int
    hosts: int


def among(experts, num_experts: int):
    """num_experts for what is nobody's."""
    return jnp.where((experts >= 0) & (experts < num_experts), experts, num_experts)


def round_first(fn: Callable[..., Any], x, experts, weights, p) -> jax.Array:
    """fn(x, experts, weights, p), the tokens rounded before they go anywhere, where gate and up would round their rows
    alike: once for both, and not for each of a token's places. A row that travels has 8 bits then.

    The same bits either way. Where a gradient is asked for it takes the other way, on which it is straight-through.
    """
    asked = _rounding(p)
    return fn(x, experts, weights, p) if asked is None else jnp.asarray(_round_first(fn, asked, x, experts, weights, p))


def _rounding(p):
    """(parts of a row with scales of their own, format) that gate and up both ask for, if they do."""
    matrices = p["w_gate"], p["w_up"]
    if not all(isinstance(w, QuantizedArray) and w.activations and w.inputs is None for w in matrices):
        return None
    asked = {(w.scales.shape[-1], w.activations) for w in matrices}
    return asked.pop() if len(asked) == 1 else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _round_first(fn, asked, x, experts, weights, p):
    return fn(quantize_rows(x, *asked), experts, weights, p)


def _round_first_bwd(fn, asked, vjp, grad):
    d_x, _, d_weights, d_p = vjp(grad)
    return d_x, None, d_weights, d_p


_round_first.defvjp(lambda fn, asked, *args: jax.vjp(fn, *args), _round_first_bwd)


def experts_local(call: Call, x, experts, weights, p, *, first: Any = 0, rows: int | None = None):
    """The weighted sum over those experts that are here: numbers first..first + len(w_up) - 1.

    rows: that the pairs of tokens with experts here take at most (default: each token with each choice that can be).
    """
    n, K = experts.shape
    rows = n * min(K, p["w_up"].shape[0]) if rows is None else rows
    return apply_pairs(call, rows, 0, pairs_here(experts, p, first), x, weights, p)


def pairs_here(experts, p, first: Any) -> tuple[Any, Sorted]:
    """(the expert's place here of each pair of a token and a choice of its, the pairs in the order of these places)."""
    here = p["w_up"].shape[0]
    local = among(experts - first, here).reshape(-1)
    return local, sort_pairs(local, here)


def apply_pairs(call: Call, rows: int, start: Any, here: tuple[Any, Sorted], x, weights, p, *, axis: str | None = None):
    """`experts_local` of those pairs that are number start..start + rows - 1 in the order of `pairs_here`.

    Each expert's rows lie together in that order, for a grouped matmul.

    x: tokens, an array or, without gradients, rounded.
    axis: over whose devices tokens travel. The pairs and weights are then those of all its tokens, x this device's.
    """
    move, back = spread, collect
    if axis is not None:
        move, back = functools.partial(spread_over, axis), functools.partial(collect_over, axis)
    local, pairs = here
    K = weights.shape[1]
    tokens, single = pairs.expand(rows, K, start)
    group = local[jnp.minimum(single.token, len(local) - 1)]
    h, w = jax.tree.map(lambda a: move(a, tokens), x), spread(weights.reshape(-1, 1), single)
    sizes = jnp.diff(jnp.clip(pairs.starts - start, 0, rows))
    y = expert_mlp(call, h, w, sizes, jnp.minimum(group, p["w_up"].shape[0] - 1), p)
    return back(y, tokens).astype(x.dtype)


def expert_mlp(call: Call, h, w, sizes, group, p):
    """The weights come in before the last matmul: its output is then needed by no gradient."""
    used = jnp.arange(h.shape[0])[:, None] < sizes.sum()  # the others may hold anything, and their gradients
    w = jnp.where(used, w, 0.0)
    y = ragged_dot(_into_hidden(call.activation, h, w, sizes, group, p), p["w_down"], sizes)
    if "b_down" in p:
        y = y + jnp.where(used, w * p["b_down"][group].astype(jnp.float32), 0.0).astype(y.dtype)
    return y


def _into_hidden(activation: str, h, w, sizes, group, p):
    matrices = p["w_gate"], p["w_up"]
    if activation == "silu" and "b_gate" not in p and gated.supported(h, *matrices) is None:
        return _into_silu(h, *matrices, w, sizes)
    gate, up = ragged_dots(h, matrices, sizes)
    if "b_gate" in p:
        gate, up = gate + p["b_gate"][group], up + p["b_up"][group]
    return _hidden(activation, gate, up, w)


@jax.custom_vjp
def _into_silu(h, gate, up, w, sizes):
    """One kernel where no gradient is asked for. Where one is, gate and up are kept, and two matmuls are as fast."""
    return gated.ragged_dot_gated(h, gate, up, w, sizes)


def _into_silu_fwd(h, gate, up, w, sizes):
    separate = lambda h, gate, up, w: _hidden("silu", *ragged_dots(h, (gate, up), sizes), w)
    return jax.vjp(separate, h, gate, up, w)


def _into_silu_bwd(vjp, grad):
    return *vjp(grad), None


_into_silu.defvjp(_into_silu_fwd, _into_silu_bwd)


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
