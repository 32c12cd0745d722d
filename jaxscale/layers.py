"""The layers of a decoder: pure functions of arrays, each readable on its own. Shapes in the house's letters."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.experimental.pallas.fuser  # part of jit's key: first imported in a trace, it makes the next call trace again
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxscale.config import RopeScaling
from jaxscale.sharding import active_mesh, matmul, matmuls, partitions, shard_map
from pallas_kernels import norm_rope


def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], *, eps: float, offset: float = 0.0) -> Array:
    """Root-mean-square norm over the last dim (Zhang & Sennrich 2019), computed in float32, returned in x's dtype."""
    h = x.astype(jnp.float32)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + eps)
    scale = scale.astype(jnp.float32) + offset
    return (h * scale.reshape((1,) * (x.ndim - 1) + scale.shape)).astype(x.dtype)


def rope_angles(
    positions: Int[Array, "B T"], inv_freq: Any, scale: Any = 1.0
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """cos and sin of each token's angles (Su et al. 2021), float32.

    Args:
      positions: of each token in its document; int32, since bfloat16 would round 257 to 256.
      inv_freq: [H/2] radians per position, from `rope_frequencies`.
      scale: multiplies cos and sin (YaRN's attention factor).
    """
    angle = positions.astype(jnp.float32)[:, :, None] * jnp.asarray(inv_freq, jnp.float32)[None, None, :]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rope(
    x: Float[Array, "B T N H"],
    angles: tuple[Array, Array],
    norm: Float[Array, " H"] | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> Float[Array, "B T N H"]:
    """Rotate the halves of the last dim by position, after an RMS norm of each head where its scale is given.

    Args:
      x: queries or keys, split over a mesh in any way but along H.
      angles: from `rope_angles`.
      norm: `rms_norm`'s scale; eps and offset too are those of `rms_norm`.
    """
    local = functools.partial(norm_rope, eps=eps, offset=offset)
    if norm is None or active_mesh() is None:
        return local(x, norm, *angles)
    return shard_map(local, out_specs=P(*partitions(x)))(x, norm, *angles)


def gated_mlp(y: Float[Array, "B T D"], p: Mapping[str, Any], activation: str) -> Float[Array, "B T F"]:
    """The hidden layer of a gated MLP (Shazeer 2020): act(y W_gate) * (y W_up), with biases where there are any."""
    if "w_gate_up" in p:  # side by side
        gate, up = jnp.split(matmul("BTD,DF->BTF", y, p["w_gate_up"]), 2, axis=-1)
    else:
        gate, up = matmuls(["BTD,DF->BTF"] * 2, (y, y), (p["w_gate"], p["w_up"]))
    if "b_gate" in p:
        gate, up = gate + p["b_gate"][None, None], up + p["b_up"][None, None]
    return act(gate, activation) * up


def act(x: Array, kind: str) -> Array:
    if kind == "silu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=kind == "gelu_tanh")


def soft_cap(x: Array, cap: float | None) -> Array:
    """Squash to (-cap, cap); the identity for None (Gemma 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Inverse frequencies [H/2] in float64 numpy (they are constants of the program) and the factor on cos and sin."""
    inv_freq = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inv_freq, 1.0
    if scaling.kind == "linear":
        return inv_freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        # Wavelengths beyond the old context are stretched, short ones stay, those between blend.
        turns = scaling.original_max_seq_len * inv_freq / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * inv_freq / scaling.factor + blend * inv_freq, 1.0

    # YaRN: a ramp over the dims between those that turn beta_fast and beta_slow times in the old context.
    def dim_of(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None and scaling.mscale and scaling.mscale_all_dim:
        factor = yarn_magnitude(scaling, scaling.mscale) / yarn_magnitude(scaling, scaling.mscale_all_dim)
    elif factor is None:
        factor = yarn_magnitude(scaling, 1.0)
    return inv_freq / scaling.factor * ramp + inv_freq * (1 - ramp), factor


def yarn_magnitude(scaling: RopeScaling, mscale: float) -> float:
    """What queries and keys are each multiplied by over a context stretched by `scaling` (arXiv 2309.00071)."""
    return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
