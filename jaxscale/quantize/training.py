"""Training in fp8 and int8, and quantization-aware training: matmuls whose operands are rounded on the way in.

    precision = parse_precision("fp8")
    loss_fn = rounded(lambda params, batch: decoder.loss_fn(params, batch, cfg), specs, precision)
    step = make_train_step(loss_fn, optimizer)  # parameters and optimizer stay as they are
    state = make_train_state(params, optimizer, key, init_scales(specs, precision))

Each weight that the precision names is wrapped, inside of the loss, in a node with a matmul of its own. Rounding passes
gradients straight through (arXiv 1308.3432): the backward matmuls meet the rounded operands. What meets the vocabulary
and routed experts are left as they are.

`Precision` rounds both operands of all matmuls, so that they run on 8-bit tensor cores. Fp8 (arXiv 2209.05433) has one
scale for each tensor, a power of two: exact in any dtype, and XLA hands it to cuBLASLt. Int8 has one for each token,
and the weight's gradient, which sums over tokens, stays in the model's dtype (SwitchBack, arXiv 2304.13013). A `Recipe`
is quantization-aware training: the forward pass is that of `jaxscale.quantize(params, recipe)`.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxscale.params import path_name
from jaxscale.quantize.apply import contraction_of, is_expert, is_matrix
from jaxscale.quantize.recipe import Recipe, Rounding, parse_recipe
from jaxscale.sharding import ROUNDED, Weight, active_mesh, partitions
from pallas_kernels import _dispatch
from pallas_kernels.quantized_matmul.array import FORMATS, quantize_array, quantize_rows

HISTORY = 16  # steps whose largest number sets the next scale, in delayed scaling
# Delayed scaling before a number was seen: scales of 1 for activations; of gradients, far smaller, 2^-20.
START = (448.0, 57344.0 * 2.0**-20)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """What the operands of matmuls are rounded to.

    weights, activations, gradients: formats; of gradients those of the matmul's output.
    rows: activations and gradients have a scale for each token, and the weight's gradient is not rounded; else each
      tensor has one.
    delayed: scales of activations and gradients come from the last steps' largest numbers, which are part of the state:
      one pass over a tensor instead of two.
    stochastic: gradients are rounded up or down at random, right on the average; what is drawn depends on their bits.
    skip: a regular expression; a weight whose path holds it is left as it is. "": none.
    """

    weights: Literal["float8_e4m3fn", "int8"]
    activations: Literal["float8_e4m3fn", "int8"]
    gradients: Literal["float8_e5m2", "float8_e4m3fn", "int8"]
    rows: bool = False
    delayed: bool = False
    stochastic: bool = False
    skip: str = ""

    def __post_init__(self):
        if len({"int" in f for f in (self.weights, self.activations, self.gradients)}) > 1:
            raise ValueError(
                f"weights={self.weights}, activations={self.activations} and gradients={self.gradients} meet in "
                "matmuls; use int8 for all or float8 for all"
            )
        if self.delayed and self.rows:
            raise ValueError("delayed=True is for scales of whole tensors; with rows=True scales are the tokens' own")


PRECISIONS = {
    "fp8": Precision(weights="float8_e4m3fn", activations="float8_e4m3fn", gradients="float8_e5m2", delayed=True),
    "fp8-current": Precision(weights="float8_e4m3fn", activations="float8_e4m3fn", gradients="float8_e5m2"),
    "int8": Precision(weights="int8", activations="int8", gradients="int8", rows=True, stochastic=True),
}


def parse_precision(name: str, skip: str = "") -> Precision | Recipe:
    """`fp8` (delayed scaling), `fp8-current`, `int8`; or a recipe, such as w4a16-g64, to train for.

    Args:
      skip: a regular expression; weights whose path holds it are left as they are.
    """
    if name in PRECISIONS:
        return dataclasses.replace(PRECISIONS[name], skip=skip)
    try:
        recipe = parse_recipe(name)
    except ValueError as e:
        raise ValueError(f"no precision {name!r}: use {', '.join(PRECISIONS)}, or a recipe to train for; {e}") from None
    if recipe.method != "rtn":
        raise ValueError(f"precision {name!r}: training rounds to the nearest; leave -{recipe.method} out")
    if recipe.cache is not None:
        raise ValueError(f"precision {name!r}: training has no cache to round; leave kv out")
    return dataclasses.replace(recipe, rules=((skip, None), *recipe.rules)) if skip else recipe


def rounded(loss_fn: Callable[..., Any], specs: Any, precision: Precision | Recipe) -> Callable[..., Any]:
    """`loss_fn(params, ...)` with its matmuls in `precision`. Parameters are plain arrays; gradients are theirs.

    With delayed scaling it takes `scales=` too, from `init_scales`, whose gradient is what replaces them: the largest
    numbers of the last steps, this one among them. `make_train_step` does so.

    Args:
      specs: a tree of ParamSpec like params.

    Raises:
      ValueError: no weight is named.
    """
    chosen = _select(specs, precision)

    def wrap(params, scales):
        def one(path, spec, w):
            name = path_name(path)
            if name not in chosen:
                return w
            if isinstance(precision, Recipe):
                return FakeQuantized(w, chosen[name], contraction_of(spec))
            return RoundedWeight(w, None if scales is None else scales[name], precision)

        return jax.tree.map_with_path(one, specs, params)

    @functools.wraps(loss_fn)
    def current(params, *args, **kwargs):
        return loss_fn(wrap(params, None), *args, **kwargs)

    @functools.wraps(loss_fn)
    def delayed(params, *args, scales, **kwargs):
        return loss_fn(wrap(params, scales), *args, **kwargs)

    if not (isinstance(precision, Precision) and precision.delayed):
        return current
    signature = inspect.signature(loss_fn)  # the step looks whether it is to pass scales
    extra = inspect.Parameter("scales", inspect.Parameter.KEYWORD_ONLY)
    keep = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    delayed.__signature__ = signature.replace(parameters=[*keep, extra])  # pyright: ignore
    return delayed


def compiler_options(precision: Precision | Recipe, platform: str) -> dict[str, Any]:
    """For XLA: on a GPU float8 matmuls go to cuBLASLt; timing Triton's beside them takes minutes."""
    fp8 = isinstance(precision, Precision) and "float8" in precision.weights
    return {"xla_gpu_enable_triton_gemm": False} if fp8 and platform in ("gpu", "cuda") else {}


def init_scales(specs: Any, precision: Precision | Recipe) -> dict[str, jax.Array] | None:
    """The state of delayed scaling: weight -> the largest activation and gradient of the last steps, float32
    [..., 2, HISTORY], zero where none was seen; None for what has no state."""
    if not (isinstance(precision, Precision) and precision.delayed):
        return None
    lead = lambda spec: spec.shape[:1] if spec.axes[0] == "layers" else ()
    named = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs)}
    return {name: jnp.zeros((*lead(named[name]), 2, HISTORY)) for name in _select(specs, precision)}


def _select(specs: Any, precision: Precision | Recipe) -> dict[str, Any]:
    """Path -> how it is rounded, for each weight that is."""
    names = [path_name(path) for path, _ in jax.tree.leaves_with_path(specs)]
    matrices = [n for n in names if is_matrix(n) and not is_expert(n) and n not in ("embed", "head")]
    if isinstance(precision, Recipe):
        chosen = {n: found for n in matrices if (found := precision.rounding(n)) is not None}
    else:
        chosen = {n: precision for n in matrices if not (precision.skip and re.search(precision.skip, n))}
    if not chosen:
        raise ValueError(f"the precision leaves every weight as it is; those that can be rounded are {matrices}")
    return chosen


class Rounded(NamedTuple):
    """values * scale: values in 8 bits, scale float32, of all (no dims) or of each row [B, T, 1, ...]."""

    values: jax.Array
    scale: jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value", "history"), meta_fields=("precision",))
@dataclasses.dataclass(frozen=True)
class RoundedWeight(Weight):
    """A weight in training whose matmuls run in 8 bits. history: of delayed scaling, [2, HISTORY], or None."""

    value: jax.Array
    history: jax.Array | None
    precision: Precision

    def matmul(self, subscripts: str, x: jax.Array, out_sharding=None) -> jax.Array:
        names, output = subscripts.split("->")
        x_names, w_names = names.split(",")
        p = self.precision
        inner = tuple(x_names.index(n) for n in x_names if n not in output)
        outer = tuple(output.index(n) for n in output if n not in x_names)
        d_x, d_w = _cotangent_spec(x), _cotangent_spec(self.value)

        @jax.custom_vjp
        def multiply(x, w, history):
            return forward(x, w, history)[0]

        def forward(x, w, history):
            x, w = _whole(x), _whole(w)
            top = _largest(x, inner if p.rows else None)
            used = top if history is None else _delayed(history[0], 0)
            q_x, q_w = round_to(x, used, p.activations), round_to(w, _largest(w), p.weights)
            out = _product(subscripts, q_x, q_w, x.dtype, out_sharding)
            return checkpoint_name(out, ROUNDED), (x if p.rows else _bits(q_x), _bits(q_w), history, top)

        def backward(residuals, grad):
            kept, q_w, history, x_top = residuals
            q_w = _from_bits(q_w, p.weights)
            grad = _whole(grad)
            top = _largest(grad, outer if p.rows else None)
            q = round_to(grad, top if history is None else _delayed(history[1], 1), p.gradients, p.stochastic)
            dx = _product(f"{output},{w_names}->{x_names}", q, q_w, grad.dtype, d_x)
            if p.rows:
                dw = jnp.einsum(f"{x_names},{output}->{w_names}", kept, grad, out_sharding=d_w)
            else:
                q_x = _from_bits(kept, p.activations)
                dw = _product(f"{x_names},{output}->{w_names}", q_x, q, grad.dtype, d_w)
            new = None if history is None else jnp.concatenate([jnp.stack([x_top, top])[:, None], history[:, :-1]], 1)
            return dx, dw, new

        multiply.defvjp(forward, backward)
        return multiply(x, self.value, self.history)


def round_to(x: jax.Array, top: jax.Array, format: str, stochastic: bool = False) -> Rounded:
    """`x`, rounded to `format` with scales that make `top` its largest number; what is larger is cut off."""
    dtype, low, high = FORMATS[format]
    scale = top / high
    if "float" in format:  # up to the next power of two
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF)
        scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
    scale = jnp.maximum(scale, 2.0**-100)  # of zeros
    q = x.astype(jnp.float32) * (1.0 / scale)
    if stochastic:
        q = round_at_random(q, _uniform(q), format)
    elif "int" in format:
        q = jnp.round(q)
    return Rounded(jnp.clip(q, low, high).astype(dtype), scale)


def _bits(x: Rounded) -> Rounded:
    """What the backward pass keeps: XLA on CPUs writes nan where a loop stacks float8 numbers."""
    return Rounded(jax.lax.bitcast_convert_type(x.values, jnp.int8), x.scale)


def _from_bits(x: Rounded, format: str) -> Rounded:
    return Rounded(jax.lax.bitcast_convert_type(x.values, FORMATS[format][0]), x.scale)


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


def _largest(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """float32 largest |x|, over all devices that hold a part of it."""
    return jnp.abs(x).max(axis=axes, keepdims=axes is not None).astype(jnp.float32)


def _delayed(history: jax.Array, kind: int) -> jax.Array:
    top = jnp.where(jnp.isfinite(history), history, 0).max()  # a step that was not finite spoils no later one
    return jnp.where(top > 0, top, START[kind])


def _product(subscripts: str, a: Rounded, b: Rounded, dtype: Any, out_sharding: Any) -> jax.Array:
    """The einsum of two rounded operands, sums in 32 bits. Rows that have scales of their own come first in both a and
    the output."""
    integer = a.values.dtype == jnp.int8
    values = a.values, b.values
    if not integer and _dispatch.device_kind() == "cpu":  # whose float8 matmul is off by 2 %
        values = tuple(v.astype(dtype) for v in values)
    out = jnp.einsum(
        subscripts, *values, preferred_element_type=jnp.int32 if integer else dtype, out_sharding=out_sharding
    )
    scale = a.scale * b.scale
    if scale.ndim:
        rows = subscripts.split(",")[0]
        keep = [d for d, n in enumerate(rows) if n in subscripts.split("->")[1]]
        scale = scale.reshape(*(scale.shape[d] for d in keep), *[1] * (out.ndim - len(keep)))
    partial = out_sharding.unreduced if isinstance(out_sharding, P) else frozenset()
    if partial:  # sums that are still to be added: each part takes the whole scale
        scale = jax.reshard(scale, P(*partitions(scale), reduced=partial))
    if integer:
        return (out.astype(jnp.float32) * scale).astype(dtype)
    return out * scale.astype(dtype)


def _whole(x: jax.Array) -> jax.Array:
    """`x` without the types that say how its gradient is summed: `_cotangent_spec` remembers them."""
    return x if active_mesh() is None else jax.reshard(x, P(*partitions(x)))


def _cotangent_spec(x: jax.Array) -> P | None:
    return None if active_mesh() is None else P(*partitions(x), unreduced=jax.typeof(x).sharding.spec.reduced)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("rounding", "contraction"))
@dataclasses.dataclass(frozen=True)
class FakeQuantized(Weight):
    """A weight in quantization-aware training: it and what it meets are rounded and multiplied in their own dtype."""

    value: jax.Array
    rounding: Rounding
    contraction: tuple[int, ...]

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        r, w = self.rounding, self.value

        def fake_weight(w):
            q = quantize_array(w, r.format, contraction=self.contraction, group=r.group, symmetric=r.symmetric)
            return q.dequantize(w.dtype)

        def fake_rows(x):
            assert r.activations is not None
            rows = x.reshape(-1, _inner_size(w, self.contraction))
            groups = 1 if r.group is None else rows.shape[1] // r.group
            values, scales = quantize_rows(rows, groups, r.activations)
            wide = values.astype(jnp.float32).reshape(rows.shape[0], groups, -1) * scales[..., None]
            return wide.reshape(x.shape).astype(x.dtype)

        if r.activations is not None:
            x = straight_through(fake_rows, x)
        return jnp.einsum(subscripts, x, straight_through(fake_weight, w), **options)


def straight_through(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """fn(x), with the gradient of x; on a mesh left to the partitioner."""
    if active_mesh() is None:
        return x + jax.lax.stop_gradient(fn(jax.lax.stop_gradient(x)) - x)
    spec = jax.typeof(x).sharding.spec
    there = jax.sharding.auto_axes(fn, out_sharding=P(*spec.partitions))

    @jax.custom_vjp
    def through(x):
        return jax.reshard(there(_whole(x)), spec)

    through.defvjp(lambda x: (through(x), None), lambda _, grad: (grad,))
    return through(x)


def _inner_size(w: jax.Array, contraction: tuple[int, ...]) -> int:
    size = 1
    for d in contraction:
        size *= w.shape[d]
    return size
