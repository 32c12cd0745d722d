"""Training in fp8 and int8, and quantization-aware training: matmuls whose operands are rounded on the way in.

    loss_fn = rounded(lambda params, batch: decoder.loss_fn(params, batch, cfg), specs, FP8)
    step = make_train_step(loss_fn, optimizer)  # parameters and optimizer stay as they are

Each weight that the precision names is wrapped, inside of the loss, in a node that rounds activations and weight before
the matmul and the gradient that comes back to it after. Rounding passes gradients straight through, so the backward
matmuls meet the rounded operands too. Scales are those of the tensors at hand (current scaling). The matmul itself is
written as one of dequantized operands, in the model's dtype: the numbers are those of 8 bits, the speed is not where
XLA does not see the pattern.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.params import path_name
from jaxscale.quantize.apply import contraction_of, is_matrix
from jaxscale.sharding import Weight
from pallas_kernels.quantized_matmul.array import FORMATS, Format, quantize_array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What a matmul's operands are rounded to, a scale for each tensor; None: not at all.

    weights, activations, gradients: formats; of gradients those of the matmul's output.
    group: of the weights, along what is contracted: quantization-aware training for groups; None: one scale a tensor.
    only: a regular expression that a weight's path must hold; keep: one that it must not (per-layer opt-out).
    stochastic: gradients are rounded up or down at random, right on the average; what is drawn depends on their bits.
    """

    weights: Format | None
    activations: Format | None = None
    gradients: Format | None = None
    group: int | None = None
    only: str = ""
    keep: str = "embed$|head$"
    stochastic: bool = False

    def __post_init__(self):
        for name in ("weights", "activations", "gradients"):
            format = getattr(self, name)
            if format not in (None, *FORMATS) or (format == "uint4" and name != "weights"):
                raise ValueError(f"{name}={format!r} is unknown; use one of {', '.join(FORMATS)}, or None")


FP8 = Precision(weights="float8_e4m3fn", activations="float8_e4m3fn", gradients="float8_e5m2")
INT8 = Precision(weights="int8", activations="int8", gradients="int8", stochastic=True)


def rounded(loss_fn: Callable[..., Any], specs: Any, precision: Precision) -> Callable[..., Any]:
    """`loss_fn(params, batch)` with its matmuls in `precision`. Parameters are plain arrays; gradients are theirs.

    Args:
      specs: a tree of ParamSpec like params.

    Raises:
      ValueError: no weight has a path that precision names.
    """
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(specs)]
    chosen = {
        name
        for name in names
        if is_matrix(name) and re.search(precision.only, name) and not re.search(precision.keep, name)
    }
    if not chosen:
        raise ValueError(
            f"no weight has a path with {precision.only!r} and without {precision.keep!r}; they are {', '.join(names)}"
        )

    @functools.wraps(loss_fn)
    def with_rounding(params, *args, **kwargs):
        def wrap(path, spec, w):
            if path_name(path) not in chosen:
                return w
            return RoundedWeight(w, precision, contraction_of(spec))

        return loss_fn(jax.tree.map_with_path(wrap, specs, params), *args, **kwargs)

    return with_rounding


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("precision", "contraction"))
@dataclasses.dataclass(frozen=True)
class RoundedWeight(Weight):
    """A weight in training whose matmuls are rounded."""

    value: jax.Array
    precision: Precision
    contraction: tuple[int, ...]

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        p, w = self.precision, self.value
        if p.activations is not None:
            x = straight_through(x, functools.partial(round_tensor, format=p.activations))
        if p.weights is not None and p.group is not None:
            fake = lambda w: quantize_array(w, p.weights, contraction=self.contraction, group=p.group).dequantize(
                w.dtype
            )
            w = straight_through(w, fake)
        elif p.weights is not None:
            w = straight_through(w, functools.partial(round_tensor, format=p.weights))
        out = jnp.einsum(subscripts, x, w, **options)
        return out if p.gradients is None else round_gradient(out, p.gradients, p.stochastic)


def round_tensor(x: jax.Array, format: Format, random: jax.Array | None = None) -> jax.Array:
    """`x` in its own dtype, rounded to `format` with one scale, so that its largest number is the format's.

    Args:
      random: uniform numbers in [0, 1) like x: rounds up with the probability that makes the mean right.
    """
    dtype, _, high = FORMATS[format]
    wide = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max() / high, 1e-30)
    q = wide / scale
    if random is not None:
        q = _stochastic(q, random, format)
    elif "int" in format:
        q = jnp.round(q)
    return (q.astype(dtype).astype(jnp.float32) * scale).astype(x.dtype)


def straight_through(x: jax.Array, fn: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """fn(x), with the gradient of x (Bengio et al., arXiv 1308.3432)."""
    still = jax.lax.stop_gradient(x)
    return x + (fn(still) - still)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def round_gradient(x: jax.Array, format: Format, stochastic: bool) -> jax.Array:
    """`x`; the gradient that comes back is rounded."""
    return x


def _round_gradient_bwd(format, stochastic, _, grad):
    random = None
    if stochastic:  # from the gradient's own bits: another step has others, a repeated one the same
        bits = jax.lax.bitcast_convert_type(grad.astype(jnp.float32), jnp.uint32)
        random = _hash(bits).astype(jnp.float32) / 2.0**32
    return (round_tensor(grad, format, random),)


round_gradient.defvjp(lambda x, format, stochastic: (x, None), _round_gradient_bwd)


def _stochastic(q: jax.Array, random: jax.Array, format: Format) -> jax.Array:
    """q, up to the next value of the format or down to it."""
    if "int" in format:
        return jnp.floor(q + random)
    # Steps of a float: a power of two below the number, less the bits of the mantissa.
    info = jnp.finfo(FORMATS[format][0])
    step = 2.0 ** (jnp.maximum(jnp.floor(jnp.log2(jnp.maximum(jnp.abs(q), 1e-30))), info.minexp) - info.nmant)
    return jnp.clip(jnp.floor(q / step + random) * step, -FORMATS[format][2], FORMATS[format][2])


def _hash(x: jax.Array) -> jax.Array:
    """Well mixed uint32 (the finalizer of MurmurHash3)."""
    x = x * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
