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
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxscale.params import path_name
from jaxscale.quantize.apply import contraction_of, is_expert, is_matrix
from jaxscale.quantize.recipe import Recipe, Rounding, parse_recipe
from jaxscale.sharding import ROUNDED, Weight, active_mesh, axes_of, partitions, shard_map
from pallas_kernels import _dispatch
from pallas_kernels.float8_grads.api import ACTIVATIONS, gated_grads, round_both
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
            history = None if scales is None else scales[name]
            return round_weight(w, contraction_of(spec), history, precision, stacked=spec.axes[0] == "layers")

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("value", "values", "flipped", "scale", "history"),
    meta_fields=("contraction", "precision"),
)
@dataclasses.dataclass(frozen=True)
class RoundedWeight(Weight):
    """A weight in training whose matmuls run in 8 bits.

    It is rounded once a step, not at each of its uses, and gathered as it is: half of the bytes. Matmuls want what they
    contract last, forward and backward contract different dims: it lies both ways.

    value: the weight, of which the gradient is; nothing is computed with it.
    values, flipped: the bits of `value / scale`, as int8; with the order of its dims, and with those contracted last.
    scale: float32 scalar.
    history: of delayed scaling, [2, HISTORY], or None.
    contraction: the dims that a matmul contracts, negative.
    """

    value: jax.Array
    values: jax.Array
    flipped: jax.Array
    scale: jax.Array
    history: jax.Array | None
    contraction: tuple[int, ...]
    precision: Precision

    @property
    def order(self) -> tuple[int, ...]:
        """The dims of `flipped`, as dims of `value`."""
        last = [d + self.value.ndim for d in self.contraction]
        return (*(d for d in range(self.value.ndim) if d not in last), *last)

    def parts(self, spec: P, sizes: Any, *, rest: bool = False) -> Any:
        del sizes, rest
        dims = (*spec.partitions, *[None] * (self.value.ndim - len(spec.partitions)))
        flipped = P(*(dims[d] for d in self.order))
        history = None if self.history is None else P()
        return dataclasses.replace(self, value=spec, values=P(*dims), flipped=flipped, scale=P(), history=history)  # pyright: ignore

    def matmul(self, subscripts: str, x: jax.Array, out_sharding=None) -> jax.Array:
        return self.together((subscripts,), x, (self,), out_sharding)[0]

    def together(self, subscripts, x, weights, out_sharding=None):
        p, d_x = self.precision, _cotangent_spec(x)
        products = [_Products(w, s) for w, s in zip(weights, subscripts, strict=True)]
        inner = tuple(range(products[0].rows, x.ndim))

        @jax.custom_vjp
        def multiply(x, values, stored, histories):
            return forward(x, values, stored, histories)[0]

        def forward(x, values, stored, histories):
            x = _whole(x)
            top = _largest(x, inner if p.rows else None)
            q_x = round_to(x, _used(histories, 0, top), p.activations)
            out = tuple(m.forward(q_x, w, x.dtype, out_sharding) for m, w in zip(products, stored))
            return out, (x if p.rows else _bits(q_x), stored, histories, top)

        def backward(residuals, grads):
            kept_x, stored, histories, x_top = residuals
            dx, dw, new = [], [], []
            for m, w, history, grad in zip(products, stored, histories, grads):
                grad = _whole(grad)
                q = m.round_gradient(grad, history)
                dx.append(m.input_gradient(q, w, grad.dtype, d_x))
                if p.rows:
                    dw.append(m.exact_weight_gradient(kept_x, grad))
                else:
                    dw.append(m.weight_gradient(_from_bits(kept_x, p.activations), q, grad.dtype))
                new.append(_next(history, x_top, q.top))
            return sum(dx[1:], dx[0]), tuple(dw), None, tuple(new)

        multiply.defvjp(forward, backward)
        return multiply(x, *_unzip(weights))

    def gated(self, y, p, activation):
        """With delayed scaling: the gradients of gate and up are rounded as they are made, in the pass that makes the
        hidden layer again."""
        all_three = (p.get(name) for name in ("w_gate", "w_up", "w_down"))
        weights = [w for w in all_three if isinstance(w, RoundedWeight) and w.history is not None]
        if len(weights) < 3 or self.precision.stochastic or "b_gate" in p or activation not in ACTIVATIONS:
            return None
        how, dtype, d_y = self.precision, y.dtype, _cotangent_spec(y)
        gate_m, up_m, down_m = map(_Products, weights, ("BTD,DF->BTF", "BTD,DF->BTF", "BTF,FD->BTD"))
        inside = outside = None
        if active_mesh() is not None:
            rows, (_, split) = partitions(y)[:2], partitions(weights[0])
            inside, outside = P(*rows, split), P(*rows, None, unreduced=axes_of([split]))

        @jax.custom_vjp
        def multiply(y, values, stored, histories):
            return forward(y, values, stored, histories)[0]

        def forward(y, values, stored, histories):
            y, top = _whole(y), _largest(y)
            q_y = round_to(y, _used(histories[:2], 0, top), how.activations)
            gate, up = (m.forward(q_y, w, dtype, inside) for m, w in zip((gate_m, up_m), stored))
            hidden = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
            q_hidden = round_to(hidden, _used(histories[2:], 0, None), how.activations)
            out = down_m.forward(q_hidden, stored[2], dtype, outside)
            return out, (_bits(q_y), gate, up, stored, histories, top)

        def backward(residuals, grad):
            q_y, gate, up, (w_gate, w_up, w_down), histories, y_top = residuals
            q_y = _from_bits(q_y, how.activations)
            q = down_m.round_gradient(_whole(grad), histories[2])
            d_hidden = down_m.input_gradient(q, w_down, dtype, inside)
            scales = [_scale(_delayed(h[1], 1), how.gradients) for h in histories[:2]]
            scales.append(_scale(_used(histories[2:], 0, None), how.activations))
            d_gate, d_up, hidden, h_top = _gated_grads(d_hidden, gate, up, scales, how, activation)
            dy = gate_m.input_gradient(d_gate, w_gate, dtype, d_y) + up_m.input_gradient(d_up, w_up, dtype, d_y)
            dw = (
                gate_m.weight_gradient(q_y, d_gate, dtype),
                up_m.weight_gradient(q_y, d_up, dtype),
                down_m.weight_gradient(hidden, q, dtype, flipped=True),
            )
            tops = (y_top, d_gate.top), (y_top, d_up.top), (h_top, q.top)
            return dy, dw, None, tuple(_next(h, *t) for h, t in zip(histories, tops))

        multiply.defvjp(forward, backward)
        return multiply(y, *_unzip(weights))


def round_weight(
    w: jax.Array,
    contraction: tuple[int, ...],
    history: jax.Array | None,
    precision: Precision,
    *,
    stacked: bool = False,
) -> RoundedWeight:
    """`w`, rounded for a step's matmuls; of layers that are stacked each has a scale of its own.

    Raises:
      ValueError: the dims that a matmul contracts are not the first ones of the weight, or of a layer's.
    """
    lead, format = int(stacked), precision.weights
    if contraction != tuple(range(lead - w.ndim, lead - w.ndim + len(contraction))):
        raise ValueError(f"a weight {w.shape} that is trained in 8 bits contracts its first dims. Got {contraction}")
    still = _whole(jax.lax.stop_gradient(w))
    top = _largest(still, tuple(range(lead, w.ndim)))
    if "float" in format:
        q, flipped, _ = _round_both(still, _scale(top, format).reshape(w.shape[:lead]), format, len(contraction), lead)
    else:
        q = round_to(still, top, format)
        order = (*range(lead), *range(lead + len(contraction), w.ndim), *range(lead, lead + len(contraction)))
        q = Rounded(q.values, q.scale.reshape(w.shape[:lead]))
        flipped = Rounded(q.values.transpose(order), q.scale)
    assert flipped is not None
    return RoundedWeight(w, _bits(q).values, _bits(flipped).values, q.scale, history, contraction, precision)


class _Gradient(NamedTuple):
    """A rounded gradient [rows, outputs]; flipped has the rows last, None where rows have scales of their own."""

    plain: Rounded
    flipped: Rounded | None
    top: jax.Array


class _Products:
    """The three matmuls of a weight, of operands that are rounded."""

    def __init__(self, w: RoundedWeight, subscripts: str):
        names, self.output = subscripts.split("->")
        self.x_names, self.w_names = names.split(",")
        self.stored_names = "".join(self.w_names[d] for d in w.order)
        rows = [n for n in self.output if n in self.x_names]
        last = lambda names: "".join([n for n in names if n not in rows] + rows)
        self.rows, self.flipped_x, self.flipped_output = len(rows), last(self.x_names), last(self.output)
        self.precision, self.d_w = w.precision, _cotangent_spec(w.value)

    def forward(self, x: Rounded, stored: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        _, flipped, scale = stored
        w = _from_bits(Rounded(flipped, scale), self.precision.weights)
        out = _product(f"{self.x_names},{self.stored_names}->{self.output}", x, w, dtype, out_sharding)
        return checkpoint_name(out, ROUNDED)

    def round_gradient(self, grad: jax.Array, history: jax.Array | None) -> _Gradient:
        p = self.precision
        if p.rows or p.stochastic:
            top = _largest(grad, tuple(range(self.rows, grad.ndim)) if p.rows else None)
            return _Gradient(round_to(grad, _used([history], 1, top), p.gradients, p.stochastic), None, top)
        top = _largest(grad) if history is None else _delayed(history[1], 1)
        return _round_both(grad, _scale(top, p.gradients), p.gradients, self.rows)

    def input_gradient(self, grad: _Gradient, stored: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        values, _, scale = stored
        w = _from_bits(Rounded(values, scale), self.precision.weights)
        return _product(f"{self.output},{self.w_names}->{self.x_names}", grad.plain, w, dtype, out_sharding)

    def weight_gradient(self, x: Rounded, grad: _Gradient, dtype: Any, *, flipped: bool = False) -> jax.Array:
        """flipped: x has its rows last."""
        x_names = self.flipped_x if flipped else self.x_names
        names, g = (self.output, grad.plain) if grad.flipped is None else (self.flipped_output, grad.flipped)
        return _product(f"{x_names},{names}->{self.w_names}", x, g, dtype, self.d_w)

    def exact_weight_gradient(self, x: jax.Array, grad: jax.Array) -> jax.Array:
        return jnp.einsum(f"{self.x_names},{self.output}->{self.w_names}", x, grad, out_sharding=self.d_w)


def _unzip(weights: Sequence[RoundedWeight]) -> tuple[Any, Any, Any]:
    """What gradients are of, what is multiplied, histories."""
    stored = tuple((w.values, w.flipped, w.scale) for w in weights)
    return tuple(w.value for w in weights), stored, tuple(w.history for w in weights)


def _used(histories: Sequence[jax.Array | None], kind: int, top: Any) -> jax.Array:
    """The number that a scale is made from: of weights that meet the same tensor the largest."""
    known = [_delayed(h[kind], kind) for h in histories if h is not None]
    return functools.reduce(jnp.maximum, known) if known else top


def _next(history: jax.Array | None, *tops: jax.Array) -> jax.Array | None:
    return None if history is None else jnp.concatenate([jnp.stack(tops)[:, None], history[:, :-1]], 1)


def _round_both(x: jax.Array, scale: jax.Array, format: str, first: int, stacked: int = 0) -> _Gradient:
    """x [layers if stacked, first, others], rounded and with its first dims last; the largest over all devices.

    Args:
      scale: [layers if stacked].
      first: how many dims that is.
    """

    def local(x, scale):
        both = round_both(_matrices(x, first, stacked), scale, FORMATS[format][0])
        return both.values.reshape(x.shape), _flipped(both.flipped, x, first, stacked), _over_devices(both.top)

    if active_mesh() is not None:
        local = shard_map(local, out_specs=(P(*partitions(x)), _flipped_spec(x, first, stacked), P()))
    values, flipped, top = local(x, scale)
    return _Gradient(Rounded(values, scale), Rounded(flipped, scale), top)


def _gated_grads(
    grad: jax.Array, gate: jax.Array, up: jax.Array, scales: Sequence[jax.Array], p: Precision, activation: str
) -> tuple[_Gradient, _Gradient, Rounded, jax.Array]:
    """Of h = act(gate) * up [B, T, F]: the gradients of gate and up, h with its rows last, the largest of h."""
    dtypes = FORMATS[p.gradients][0], FORMATS[p.activations][0]

    def local(grad, gate, up, *scales):
        made = gated_grads(_matrices(grad, 2), _matrices(gate, 2), _matrices(up, 2), scales, dtypes, activation)
        both = lambda b: (b.values.reshape(up.shape), _flipped(b.flipped, up, 2), _over_devices(b.top))
        return both(made.gate), both(made.up), _flipped(made.hidden, up, 2), _over_devices(made.hidden_top)

    if active_mesh() is not None:
        both, last = (P(*partitions(grad)), _flipped_spec(grad, 2), P()), _flipped_spec(grad, 2)
        local = shard_map(local, out_specs=(both, both, last, P()))
    d_gate, d_up, hidden, top = local(grad, gate, up, *scales)
    of = lambda made, scale: _Gradient(Rounded(made[0], scale), Rounded(made[1], scale), made[2])
    return of(d_gate, scales[0]), of(d_up, scales[1]), Rounded(hidden, scales[2]), top


def _matrices(x: jax.Array, first: int, stacked: int = 0) -> jax.Array:
    return x.reshape(*x.shape[:stacked], math.prod(x.shape[stacked : stacked + first]), -1)


def _turned(dims: Sequence[Any], first: int, stacked: int) -> tuple[Any, ...]:
    return (*dims[:stacked], *dims[stacked + first :], *dims[stacked : stacked + first])


def _flipped(flat: jax.Array, like: jax.Array, first: int, stacked: int = 0) -> jax.Array:
    return flat.reshape(_turned(like.shape, first, stacked))


def _flipped_spec(x: jax.Array, first: int, stacked: int = 0) -> P:
    return P(*_turned(partitions(x), first, stacked))


def _over_devices(top: jax.Array) -> jax.Array:
    """In a shard_map body: the largest of all devices' numbers."""
    axes = tuple(sorted(jax.typeof(top).mat.varying))
    return jax.lax.pmax(top, axes) if axes else top


def round_to(x: jax.Array, top: jax.Array, format: str, stochastic: bool = False) -> Rounded:
    """`x`, rounded to `format` with scales that make `top` its largest number; what is larger is cut off."""
    dtype, low, high = FORMATS[format]
    scale = _scale(top, format)
    q = x.astype(jnp.float32) * (1.0 / scale)
    if stochastic:
        q = round_at_random(q, _uniform(q), format)
    elif "int" in format:
        q = jnp.round(q)
    return Rounded(jnp.clip(q, low, high).astype(dtype), scale)


def _scale(top: jax.Array, format: str) -> jax.Array:
    """What makes `top` the largest number of the format; of floats the next power of two."""
    scale = top / FORMATS[format][2]
    if "float" in format:
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) + jnp.uint32(0x7FFFFF)
        scale = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
    return jnp.maximum(scale, 2.0**-100)  # of zeros


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
