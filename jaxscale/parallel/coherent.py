"""Generation with one all_to_all a layer, not two: context-coherent expert parallelism (ExFlow, arXiv 2401.08383).

Every device of ep holds the context (keys and values) of all sequences. So a token need not come home from its experts:
the next layer's attention is computed where it stands, and its experts of that layer are often on the same device if
`jaxscale.plan.placement.place` put them there by affinity. What tokens add to their contexts is shared once a step, all
layers together. It is right where all experts of a token are on one device: one expert a token, or routing limited to
one group of experts that no two devices share.

Buffers have room for any routing, a place of each device for every token: for generation, where tokens are few.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxscale.config import MoEConfig
from jaxscale.parallel.expert import EP, places_in_boxes
from jaxscale.parallel.expert_local import Call, experts_local
from jaxscale.parallel.permute import sort_pairs


class Standing(NamedTuple):
    """Tokens that stand on a device, one of each sequence that has its own here. row: number of the sequence, that of
    no sequence where a place is empty."""

    x: Float[Array, "R D"]
    row: Int[Array, " R"]


def check_coherent(cfg: MoEConfig, ep: int) -> None:
    """Raises ValueError unless all experts of a token are on one of the `ep` devices, whatever the token."""
    if cfg.num_experts % ep:
        raise ValueError(f"num_experts={cfg.num_experts} is not divisible by ep={ep}")
    if cfg.top_k > 1 and (cfg.top_groups > 1 or cfg.num_groups % ep):
        raise ValueError(
            f"a token's top_k={cfg.top_k} experts in top_groups={cfg.top_groups} of num_groups={cfg.num_groups} groups "
            f"may be on several of ep={ep} devices, and it can only stand on one: use top_k=1, or top_groups=1 with "
            "num_groups a multiple of ep"
        )


def coherent_layers(
    x: Float[Array, "n D"],
    layers: Any,
    contexts: Any,
    attend: Callable[[Any, Array, Array, Any], tuple[Array, Any]],
    route: Callable[[Any, Array], tuple[Array, Array, Array]],
    cfg: MoEConfig,
    *,
    activation: str = "silu",
) -> tuple[Float[Array, "n D"], Any]:
    """One token of each sequence through all layers; a shard_map body over ep.

    Args:
      x: of the n sequences whose home is this device; R = n ep are there in all.
      layers: stacked [L, ...] parameters; layers["experts"] are those of this device.
      contexts: stacked [L, R, ...], of all sequences, the same on every device.
      attend: (layer, x [R, D], row [R], context of the layer) -> the residual stream after attention, and a pytree of
        [R, ...] with what each token adds to its context. Where row is R the result may be anything.
      route: (layer, x [R, D]) -> what the experts see [R, D], experts and weights [R, K].

    Returns:
      The residual stream after the last layer, at home; what each sequence adds to its context, [L, R, ...] as `attend`
      returns it, on every device.

    Raises:
      ValueError: the experts of a token may be on several devices.
    """
    ep = lax.axis_size(EP)
    check_coherent(cfg, ep)
    call = Call(cfg.num_experts, activation, "all_to_all", 1, 1)
    n, mine = x.shape[0], cfg.num_experts // ep
    home = lax.axis_index(EP) * n + jnp.arange(n, dtype=jnp.int32)
    standing = Standing(jnp.pad(x, ((0, n * ep - n), (0, 0))), jnp.pad(home, (0, n * ep - n), constant_values=n * ep))

    def one_layer(standing, layer_and_context):
        layer, context = layer_and_context
        x, added = attend(layer, standing.x, standing.row, context)
        added = jax.tree.map(lambda a: _placed(a, standing.row), added)
        _, experts, weights = route(layer, x)
        there, experts, weights = _to_experts(Standing(x, standing.row), experts, weights, mine)
        seen, _, _ = route(layer, there.x)
        y = experts_local(call, seen, experts, weights, layer["experts"], first=lax.axis_index(EP) * mine)
        return Standing(there.x + y, there.row), added

    standing, added = lax.scan(one_layer, standing, (layers, contexts))
    # Each row has one writer, the others add zeros: exact.
    whole, added = lax.psum((_placed(standing.x, standing.row), added), EP)
    return lax.dynamic_slice_in_dim(whole, lax.axis_index(EP) * n, n), added


def _to_experts(here: Standing, experts, weights, mine: int):
    """Every token with its choices to the device that has its experts: one all_to_all, of whole numbers, bit by bit."""
    ep, (R, D), K = lax.axis_size(EP), here.x.shape, experts.shape[1]
    to = jnp.where(here.row < R, experts[:, 0] // mine, ep)
    boxes = sort_pairs(to, ep)
    token = places_in_boxes(boxes, to, R, 0, 1)[0].token
    bits = functools.partial(_bits, dtype=here.x.dtype)
    packed = jnp.concatenate([*map(bits, (here.x, here.row[:, None], experts, weights.astype(jnp.float32)))], axis=1)
    nobody = bits(jnp.full((1, 1), R, jnp.int32))
    lanes = nobody.shape[1]
    packed = jnp.append(packed, jnp.zeros_like(packed[:1]).at[:, D : D + lanes].set(nobody), axis=0)
    got = lax.all_to_all(packed[jnp.minimum(token, R)], EP, 0, 0, tiled=True)
    row = _from_bits(got[:, D : D + lanes], jnp.int32)[:, 0]
    got = got[jnp.argsort(row >= R, stable=True)[:R]]  # no more than R tokens are there in all
    x = lax.bitcast_convert_type(got[:, :D], here.x.dtype)
    row, experts = (_from_bits(a, jnp.int32) for a in (got[:, D : D + lanes], got[:, D + lanes : D + lanes * (1 + K)]))
    weights = _from_bits(got[:, D + lanes * (1 + K) :], jnp.float32)
    return Standing(x, row[:, 0]), jnp.where(row < R, experts, -1), weights


def _placed(values, row):
    """[R, ...] by sequence, zeros for those that are not here."""
    return jnp.zeros_like(values).at[row].set(values, mode="drop", unique_indices=True)


def _bits(x, dtype):
    """[n, m] -> [n, lanes * m] whole numbers as wide as those of dtype."""
    whole = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    return lax.bitcast_convert_type(x, whole).reshape(x.shape[0], -1)


def _from_bits(x, dtype):
    lanes = jnp.dtype(dtype).itemsize // x.dtype.itemsize
    return lax.bitcast_convert_type(x.reshape(x.shape[0], -1, lanes) if lanes > 1 else x, dtype)
