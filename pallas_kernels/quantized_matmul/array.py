"""QuantizedArray: a weight as values of 4 or 8 bits with scales, and what turns arrays into it and back. QuantizedRows:
what it is multiplied with, where that is rounded too."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Format = Literal["int4", "uint4", "int8", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"]
Activations = Literal["int8", "int4", "float8_e4m3fn"]

# Of each format: the dtype of the values in memory, the least and the largest number that they stand for.
FORMATS = {
    "int4": (jnp.int4, -8.0, 7.0),
    "uint4": (jnp.int4, 0.0, 15.0),  # kept less 8: Orbax cannot hold uint4, and kernels widen one kind of nibble only
    "int8": (jnp.int8, -128.0, 127.0),
    "float8_e4m3fn": (jnp.float8_e4m3fn, -448.0, 448.0),
    "float8_e5m2": (jnp.float8_e5m2, -57344.0, 57344.0),
    "float4_e2m1fn": (jnp.float4_e2m1fn, -6.0, 6.0),
}
ZERO = 8  # what is taken off the values of an unsigned format


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "offsets", "inputs", "outliers"),
    meta_fields=("contraction", "unsigned", "activations", "interleaved"),
)
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight w[..., k] = inputs[k] * (scales * q + offsets), one scale (and offset) for a group along the dims that a
    matmul contracts.

    One node of a pytree, its arrays the leaves: it is scanned, sharded, donated and saved as any weight is. The dense
    array that it stands for has the dims of `shape`. Its values lie with the contracted dims last, as GGUF files and
    the kernels have them; K is the product of these dims, C-contiguous, and G divides K.

    Attributes:
      values: [*outputs, *contracted], int4, int8, float8_e4m3fn, float8_e5m2 or float4_e2m1fn: q, or q - 8 where
        `unsigned`. XLA packs two values of 4 bits to a byte.
      scales: [*outputs', G] floating, where each outputs' divides its outputs: G = 1 is one scale per channel, 1s all
        over one per tensor, outputs / 128 tiles of 128 x 128.
      offsets: None, or floating in the shape of scales.
      inputs: None, or floating [*leading, K]: what the activations are multiplied with before the matmul (AWQ,
        SmoothQuant).
      contraction: the contracted dims of the dense array, negative, ascending: (-2,) for [D, F], (-3, -2) for
        [N, H, D]. Leading dims may so be added (stacked layers) and taken off (scan).
      unsigned: q is 0 to 15, kept as int4 q - 8.
      activations: None, or the dtype to which a matmul quantizes the other operand, one scale per row and group.
      outliers: None, or bool [*leading, G]: the groups that keep 8 bits where activations are int4 (FMPQ).
      interleaved: the values' K lies as `interleave` left it: for one kernel's sake, in memory alone, never in a file.
    """

    values: jax.Array
    scales: jax.Array
    offsets: jax.Array | None = None
    inputs: jax.Array | None = None
    contraction: tuple[int, ...] = (-2,)
    unsigned: bool = False
    activations: Activations | None = None
    outliers: jax.Array | None = None
    interleaved: bool = False

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense array."""
        stored = dict(zip(self.order, self.values.shape))
        return tuple(stored[d] for d in range(self.ndim))

    @property
    def order(self) -> tuple[int, ...]:
        """The dense array's dims in the order in which the values have them."""
        contracted = [d + self.ndim for d in self.contraction]
        return (*(d for d in range(self.ndim) if d not in contracted), *contracted)

    @property
    def format(self) -> str:
        return "uint4" if self.unsigned else jnp.dtype(self.values.dtype).name

    @property
    def group(self) -> int:
        """How many numbers along K share a scale."""
        return math.prod(self.values.shape[self.ndim - len(self.contraction) :]) // self.scales.shape[-1]

    @property
    def T(self) -> "QuantizedArray":
        """The transpose of a matrix; nothing moves."""
        if self.ndim != 2:
            raise ValueError(f"only a matrix has a transpose here. Got shape {self.shape}")
        return dataclasses.replace(self, contraction=(-3 - self.contraction[0],))

    def flat(self) -> "QuantizedArray":
        """The same numbers as a matrix [K, N]: values [N, K], scales [N', G], offsets with the zero of unsigned values.

        What backends receive. Its offsets, where there are any, are float32: w = scales * values + offsets.
        """
        outputs = self.ndim - len(self.contraction)
        scales = self.scales
        if outputs != 1:
            scales = repeat_to(scales, (*self.values.shape[:outputs], scales.shape[-1]))
        offsets = self.effective_offsets()
        if offsets is not None and outputs != 1:
            offsets = repeat_to(offsets, scales.shape)
        N = math.prod(self.values.shape[:outputs])
        K = math.prod(self.values.shape[outputs:])
        two = lambda x: None if x is None else x.reshape(-1, x.shape[-1])
        return dataclasses.replace(
            self,
            values=self.values.reshape(N, K),
            scales=two(scales),
            offsets=two(offsets),
            contraction=(-2,),
            unsigned=False,
        )

    def interleave(self) -> "QuantizedArray":
        """The same weight with K in the order in which Hopper's kernel for few rows need not permute the activations.

        K is a multiple of 32 (values of 4 bits) or 16, and so are groups; other kernels take it back.
        """
        if self.interleaved:
            return self
        values = undo_order(self.values.reshape(-1, self.scales.shape[-1] * self.group)).reshape(self.values.shape)
        offsets = self.effective_offsets()  # once, where each call would have to
        return dataclasses.replace(self, values=values, offsets=offsets, unsigned=False, interleaved=True)

    def natural(self) -> "QuantizedArray":
        """The same weight with K in its own order."""
        if not self.interleaved:
            return self
        values = order(self.values.reshape(-1, self.scales.shape[-1] * self.group), self.values.dtype)
        return dataclasses.replace(self, values=values.reshape(self.values.shape), interleaved=False)

    def effective_offsets(self) -> jax.Array | None:
        """float32: what to add to scales * values as they lie in memory."""
        if not self.unsigned:
            return None if self.offsets is None else self.offsets.astype(jnp.float32)
        zero = ZERO * self.scales.astype(jnp.float32)
        return zero if self.offsets is None else self.offsets.astype(jnp.float32) + zero

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """The dense array of `shape`; computed in float32."""
        outputs = self.ndim - len(self.contraction)
        lead, G = self.values.shape[:outputs], self.scales.shape[-1]
        full = (*lead, G, 1)
        w = self.natural().values.astype(jnp.float32).reshape(*lead, G, -1)
        if self.unsigned:
            w = w + ZERO
        w = w * repeat_to(self.scales.astype(jnp.float32), full[:-1]).reshape(full)
        if self.offsets is not None:
            w = w + repeat_to(self.offsets.astype(jnp.float32), full[:-1]).reshape(full)
        w = w.reshape(*lead, -1)
        if self.inputs is not None:
            own = self.inputs.shape[:-1]
            w = w * self.inputs.astype(jnp.float32).reshape(*own, *[1] * (outputs - len(own)), -1)
        inverse = sorted(range(self.ndim), key=lambda i: self.order[i])
        return w.reshape(self.values.shape).transpose(inverse).astype(dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("values", "scales"), meta_fields=("format", "dtype"))
@dataclasses.dataclass(frozen=True)
class QuantizedRows:
    """Activations rounded by `quantize_rows`: what a matmul by a QuantizedArray takes in place of the array [M, K].

    Each row is rounded by itself. So rows may be cut, gathered and sent to other devices first, leaf by leaf, and give
    bit for bit what rounding them afterwards gives: `jax.tree.map(lambda a: a[token], rows)`.

    Attributes:
      values: [M, K], int8 or float8_e4m3fn.
      scales: float32 [M, S], one for each of S equal parts of a row.
      format: what they are rounded to; values of "int4" lie in int8.
      dtype: of the array, and by default of a matmul's output.
    """

    values: jax.Array
    scales: jax.Array
    format: Activations
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def dequantize(self) -> jax.Array:
        """float32 [M, K]."""
        parts = self.values.astype(jnp.float32).reshape(*self.scales.shape, -1)
        return (parts * self.scales[..., None]).reshape(self.shape)


def order(x: jax.Array, dtype) -> jax.Array:
    """[M, K] with K in the order in which registers that hold values of `dtype` as they lie are widened to 16 bits."""
    if jax.dtypes.itemsize_bits(dtype) == 4:  # 32 columns: thread, half, nibble of it
        return x.reshape(x.shape[0], -1, 4, 2, 4).transpose(0, 1, 4, 2, 3).reshape(x.shape)
    return x.reshape(x.shape[0], -1, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(x.shape)  # 16: thread, pair, one of it


def undo_order(values: jax.Array) -> jax.Array:
    """[N, K] of which `order` makes `values`."""
    N, K = values.shape
    if jax.dtypes.itemsize_bits(values.dtype) == 4:
        return values.reshape(N, -1, 4, 4, 2).transpose(0, 1, 3, 4, 2).reshape(N, K)
    return values.reshape(N, -1, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(N, K)


def quantize_array(
    w: jax.Array,
    format: Format,
    *,
    contraction: Sequence[int] = (-2,),
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype=jnp.bfloat16,
    activations: Activations | None = None,
) -> QuantizedArray:
    """`w` rounded to the nearest values; a group of zeros has a scale of zero.

    Args:
      w: floating, at least the contracted dims and one more.
      contraction: its contracted dims; what is kept are negative ones.
      group: how many numbers along them share a scale; None: all, one scale per channel.
      symmetric: without offsets; "uint4" is always with.
      scale_dtype: of scales and offsets. Values are rounded with what is left of them in it.
      activations: as in QuantizedArray.

    Raises:
      ValueError: a group that does not divide, an unknown format, an asymmetric float format, dims that w does not
        have, or no number along them, activations that do not meet the format.
    """
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"quantize_array takes a floating array. Got {w.dtype}{list(w.shape)}")
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown; use one of {', '.join(FORMATS)}")
    if not symmetric and format not in ("uint4", "int4", "int8"):
        raise ValueError(f"{format} is symmetric about zero; offsets are for int4, uint4 and int8")
    check_activations(format, activations)
    contraction = tuple(sorted(d if d < 0 else d - w.ndim for d in contraction))
    contracted = [d + w.ndim for d in contraction]
    if not 0 < len(set(contracted) & set(range(w.ndim))) == len(contracted) < w.ndim:
        raise ValueError(f"contraction {contraction} must name some dims of {tuple(w.shape)}, and leave at least one")
    outputs = [d for d in range(w.ndim) if d not in contracted]
    K = math.prod(w.shape[d] for d in contracted)
    if K == 0:
        raise ValueError(f"an array {tuple(w.shape)} has no number along dims {contraction} to take a scale of")
    group = K if group is None else group
    if group < 1 or K % group:
        divisors = [g for g in (16, 32, 64, 128, 256) if K % g == 0]
        raise ValueError(
            f"groups of {group} do not divide the {K} numbers that the matmul contracts (dims {contraction} of "
            f"{tuple(w.shape)}); use {f'one of {divisors}, or ' if divisors else ''}None for one scale per channel"
        )
    stored = w.astype(jnp.float32).transpose(*outputs, *contracted)
    lead = stored.shape[: len(outputs)]
    groups = stored.reshape(*lead, K // group, group)
    scales, offsets = group_scales(groups, format, symmetric, scale_dtype)
    values = round_to(groups, scales, offsets, format)
    unsigned = format == "uint4"
    return QuantizedArray(
        values.reshape(stored.shape), scales, offsets, None, contraction, unsigned=unsigned, activations=activations
    )


def check_activations(format: str, activations: str | None) -> None:
    """ValueError where weights in `format` are not multiplied by such activations."""
    known = (None, *get_args(Activations))
    if activations not in known:
        raise ValueError(f"activations={activations!r} is unknown; use one of {known}")
    if activations in ("int8", "int4") and "float" in format:
        raise ValueError(f"weights in {format} take activations in float8_e4m3fn, or None. Got {activations}")


def largest(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """float32 largest |x| over axes, which are kept, or over all, over all devices that hold a part of it; nan where
    there is one, 0 of no numbers.

    Their bits are compared: those of numbers without a sign are in order, and nan is past infinity. XLA's maximum of
    floats drops nan on CPUs (xla_cpu_enable_fast_min_max).
    """
    bits = jax.lax.bitcast_convert_type(jnp.abs(x).astype(jnp.float32), jnp.int32)
    axes, keepdims = (None, False) if axes is None else (tuple(axes), True)
    top = bits.max(axis=axes, keepdims=keepdims, initial=None if x.size else 0)
    return jax.lax.bitcast_convert_type(top, jnp.float32)


def group_scales(
    groups: jax.Array, format: Format, symmetric: bool = True, scale_dtype=jnp.bfloat16
) -> tuple[jax.Array, jax.Array | None]:
    """Scales, and offsets of what is not symmetric, [...] for groups [..., group]: they span the group's numbers.

    Of a group with nan they are nan, of one with infinity not finite.
    """
    _, low, high = FORMATS[format]
    top, bottom = groups.max(axis=-1), groups.min(axis=-1)
    lost = jnp.where(jnp.isnan(groups).any(axis=-1), jnp.nan, 0.0)  # by XLA's max on CPUs: see `largest`
    if symmetric and format != "uint4":
        return (jnp.maximum(top / high, bottom / low) + lost).astype(scale_dtype), None
    scales = (top - bottom) / (high - low) + lost
    return scales.astype(scale_dtype), (bottom - low * scales).astype(scale_dtype)


def round_to(w: jax.Array, scales: jax.Array, offsets: jax.Array | None, format: Format) -> jax.Array:
    """The nearest values of `w` [..., group] for scales and offsets [...], as QuantizedArray keeps them."""
    dtype, low, high = FORMATS[format]
    s = scales.astype(jnp.float32)[..., None]
    q = w if offsets is None else w - offsets.astype(jnp.float32)[..., None]
    q = jnp.where(s == 0, 0.0, q / jnp.where(s == 0, 1.0, s))
    q = jnp.clip(jnp.round(q) if "int" in format else q, low, high)
    return (q - ZERO if format == "uint4" else q).astype(dtype)


def repeat_to(x: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`x`, each dim of which divides that of `shape`, with every entry repeated as often as it takes."""
    for dim, size in enumerate(shape):
        if x.shape[dim] != size:
            x = jnp.repeat(x, size // x.shape[dim], axis=dim, total_repeat_length=size)
    return x
