"""Tokens that stay where their experts are: one all_to_all a layer, not two (ExFlow, arXiv 2401.08383).

Every device of ep holds the contexts (keys and values) of all sequences. So a token need not come home from its
experts: the next layer's attention is computed where it stands, and its experts of that layer are often on the same
device if `jaxscale.plan.placement.place` put them there by affinity. It is right where all experts of a token are on
one device: one expert a token, or routing limited to one group of experts that no two devices share.

Arrays hold a row for every sequence on every device; `here` says which of them stand on this one. So buffers have room
for any routing, and contexts are read where they lie: for generation, where tokens are few.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from jaxscale.config import MoEConfig
from jaxscale.parallel.expert import EP


def check_coherent(cfg: MoEConfig, ep: int) -> None:
    """Raises ValueError unless all experts of a token are on one of the `ep` devices, whatever the token."""
    if cfg.num_places % ep:
        raise ValueError(
            f"num_experts={cfg.num_experts} and num_replicas={cfg.num_replicas} copies are not divisible by ep={ep}"
        )
    if cfg.top_k > 1 and (cfg.top_groups > 1 or cfg.num_groups % ep or cfg.num_replicas):
        raise ValueError(
            f"a token's top_k={cfg.top_k} experts in top_groups={cfg.top_groups} of num_groups={cfg.num_groups} groups "
            f"with num_replicas={cfg.num_replicas} copies may be on several of ep={ep} devices, and it can only stand "
            "on one: use top_k=1, or top_groups=1 with num_groups a multiple of ep and no copies"
        )


def home(rows: int) -> Bool[Array, " R"]:
    """Which of all rows begin on this device: ep equal parts, one after another."""
    return jnp.arange(rows, dtype=jnp.int32) // (rows // lax.axis_size(EP)) == lax.axis_index(EP)


def device_of(places: Int[Array, "R K"], num_places: int) -> Int[Array, " R"]:
    """The device of ep that holds a token's experts; where it has none with weights, this one."""
    mine = num_places // lax.axis_size(EP)
    there = jnp.where((places >= 0) & (places < num_places), places // mine, -1).max(axis=1)
    return jnp.where(there < 0, lax.axis_index(EP), there)


def move(tokens: Any, here: Bool[Array, " R"], to: Int[Array, " R"]) -> tuple[Any, Bool[Array, " R"]]:
    """Sends each row that is here to the device `to`: one all_to_all, bit by bit.

    Args:
      tokens: a pytree of [R, ...] with numbers of 16 or 32 bits.

    Returns:
      The rows that came, zeros for those that are elsewhere; which came.
    """
    leaves, tree = jax.tree.flatten(tokens)
    width = min(x.dtype.itemsize for x in leaves)
    whole = jnp.dtype(f"uint{8 * width}")
    packed = [here.astype(whole)[:, None], *(_bits(x, whole) for x in leaves)]
    ends = list(itertools.accumulate(x.shape[1] for x in packed))[:-1]
    packed = jnp.concatenate(packed, axis=1)
    device = jnp.arange(lax.axis_size(EP), dtype=to.dtype)
    goes = here[None] & (to[None] == device[:, None])
    sent = jnp.where(goes[..., None], packed[None], jnp.zeros((), whole))
    # From one device at most does a row come, the others send zeros: the sum has its bits.
    got = lax.all_to_all(sent, EP, 0, 0, tiled=True).sum(axis=0, dtype=whole)
    came, *parts = jnp.split(got, ends, axis=1)
    return tree.unflatten([_from_bits(x, like) for x, like in zip(parts, leaves, strict=True)]), came[:, 0] > 0


def share(values: Any, here: Bool[Array, " R"]) -> Any:
    """All rows, on every device, of a pytree of [R, ...]; `here` broadcasts from the left. Each row has one writer, the
    others add zeros: exact."""
    own = lambda x: jnp.where(here.reshape(here.shape + (1,) * (x.ndim - here.ndim)), x, jnp.zeros((), x.dtype))
    # bfloat16 holds every number of 8 bits and fewer.
    wide = lambda x: x.astype(jnp.bfloat16) if jax.dtypes.itemsize_bits(x.dtype) < 16 else x
    total = lax.psum(jax.tree.map(lambda x: wide(own(x)), values), EP)
    return jax.tree.map(lambda a, b: a.astype(b.dtype), total, values)


def _bits(x, whole):
    """[R, ...] -> [R, n] whole numbers."""
    return lax.bitcast_convert_type(x, whole).reshape(x.shape[0], -1)


def _from_bits(x, like):
    lanes = like.dtype.itemsize // x.dtype.itemsize
    x = x.reshape(*like.shape, lanes) if lanes > 1 else x.reshape(like.shape)
    return lax.bitcast_convert_type(x, like.dtype)
