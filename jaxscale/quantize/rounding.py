"""Arrays rounded to 8 bits in training: to the nearest or at random, with scales that are powers of two for floats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.quantized_matmul.array import FORMATS


class Rounded(NamedTuple):
    """values * scale: values in 8 bits, scale float32, of all (no dims) or of each row [B, T, 1, ...]."""

    values: jax.Array
    scale: jax.Array


def round_to(x: jax.Array, top: jax.Array, format: str, stochastic: bool = False) -> Rounded:
    """`x`, rounded to `format` with scales that make `top` its largest number; what is larger is cut off."""
    dtype, low, high = FORMATS[format]
    scale = scale_for(top, format)
    q = x.astype(jnp.float32) * (1.0 / scale)
    if stochastic:
        q = round_at_random(q, _uniform(q), format)
    elif "int" in format:
        q = jnp.round(q)
    return Rounded(jnp.clip(q, low, high).astype(dtype), scale)


def scale_for(top: jax.Array, format: str) -> jax.Array:
    """What makes `top` the largest number of the format; of floats the next power of two. Of nan it is nan."""
    scale = top / FORMATS[format][2]
    if "float" in format:
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF)
        power = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
        scale = jnp.where(jnp.isnan(top), top, power)
    return jnp.where(scale < 2.0**-100, 2.0**-100, scale)  # of zeros


def round_at_random(q: jax.Array, uniform: jax.Array, format: str) -> jax.Array:
    """q, up to the next value of the format or down to it, so that the mean over `uniform` in [0, 1) is q."""
    if "int" in format:
        return jnp.floor(q + uniform)
    # Steps of a float: a power of two below the number, less the bits of the mantissa.
    info = jnp.finfo(FORMATS[format][0])
    _, exponent = jnp.frexp(q)
    exponent = jnp.maximum(exponent - 1, info.minexp) - info.nmant
    step = jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)  # exp2 is not exact everywhere
    return jnp.floor(q / step + uniform) * step


def _uniform(x: jax.Array) -> jax.Array:
    """Numbers in [0, 1) from those of x: another step has others, a repeated one the same."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) * jnp.uint32(0x9E3779B1)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)  # the finalizer of MurmurHash3
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return ((bits ^ (bits >> 16)) >> 8).astype(jnp.float32) * 2.0**-24


def to_bits(x: Rounded) -> Rounded:
    """What the backward pass keeps: XLA on CPUs writes nan where a loop stacks float8 numbers."""
    return Rounded(jax.lax.bitcast_convert_type(x.values, jnp.int8), x.scale)


def from_bits(x: Rounded, format: str) -> Rounded:
    return Rounded(jax.lax.bitcast_convert_type(x.values, FORMATS[format][0]), x.scale)
