"""A weight in training whose matmuls run in 8 bits, forward and backward."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from jaxscale.quantize.delayed import delayed_top, next_history, used_top
from jaxscale.quantize.layouts import Gradient, cotangent_spec, gated_gradients, round_both_ways, whole
from jaxscale.quantize.precision import Precision
from jaxscale.quantize.rounding import Rounded, from_bits, round_to, scale_for, to_bits
from jaxscale.sharding import ROUNDED, Weight, active_mesh, axes_of, partial_sums, partitions
from pallas_kernels import _dispatch
from pallas_kernels.float8_grads.api import ACTIVATIONS
from pallas_kernels.quantized_matmul.array import largest


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
    largest: ClassVar[tuple[str, ...]] = ("history",)

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
        p, d_x = self.precision, cotangent_spec(x)
        products = [_Products(w, s) for w, s in zip(weights, subscripts, strict=True)]
        inner = tuple(range(products[0].rows, x.ndim))

        @jax.custom_vjp
        def multiply(x, values, stored, histories):
            return forward(x, values, stored, histories)[0]

        def forward(x, values, stored, histories):
            x = whole(x)
            top = largest(x, inner if p.rows else None)
            q_x = round_to(x, used_top(histories, 0, top), p.activations)
            out = tuple(m.forward(q_x, w, x.dtype, out_sharding) for m, w in zip(products, stored))
            return out, (x if p.rows else to_bits(q_x), stored, histories, top)

        def backward(residuals, grads):
            kept_x, stored, histories, x_top = residuals
            dx, dw, new = [], [], []
            for m, w, history, grad in zip(products, stored, histories, grads):
                grad = whole(grad)
                q = m.round_gradient(grad, history)
                dx.append(m.input_gradient(q, w, grad.dtype, d_x))
                if p.rows:
                    dw.append(m.exact_weight_gradient(kept_x, grad))
                else:
                    dw.append(m.weight_gradient(from_bits(kept_x, p.activations), q, grad.dtype))
                new.append(next_history(history, x_top, q.top))
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
        how, dtype, d_y = self.precision, y.dtype, cotangent_spec(y)
        gate_m, up_m, down_m = map(_Products, weights, ("BTD,DF->BTF", "BTD,DF->BTF", "BTF,FD->BTD"))
        inside = outside = None
        if active_mesh() is not None:
            rows, (_, split) = partitions(y)[:2], partitions(weights[0])
            inside, outside = P(*rows, split), P(*rows, None, unreduced=partial_sums(axes_of([split])))

        @jax.custom_vjp
        def multiply(y, values, stored, histories):
            return forward(y, values, stored, histories)[0]

        def forward(y, values, stored, histories):
            y, top = whole(y), largest(y)
            q_y = round_to(y, used_top(histories[:2], 0, top), how.activations)
            gate, up = (m.forward(q_y, w, dtype, inside) for m, w in zip((gate_m, up_m), stored))
            hidden = ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
            q_hidden = round_to(hidden, used_top(histories[2:], 0, None), how.activations)
            out = down_m.forward(q_hidden, stored[2], dtype, outside)
            return out, (to_bits(q_y), gate, up, stored, histories, top)

        def backward(residuals, grad):
            q_y, gate, up, (w_gate, w_up, w_down), histories, y_top = residuals
            q_y = from_bits(q_y, how.activations)
            q = down_m.round_gradient(whole(grad), histories[2])
            d_hidden = down_m.input_gradient(q, w_down, dtype, inside)
            scales = [scale_for(delayed_top(h[1], 1), how.gradients) for h in histories[:2]]
            scales.append(scale_for(used_top(histories[2:], 0, None), how.activations))
            d_gate, d_up, hidden, h_top = gated_gradients(d_hidden, gate, up, scales, how, activation)
            dy = gate_m.input_gradient(d_gate, w_gate, dtype, d_y) + up_m.input_gradient(d_up, w_up, dtype, d_y)
            dw = (
                gate_m.weight_gradient(q_y, d_gate, dtype),
                up_m.weight_gradient(q_y, d_up, dtype),
                down_m.weight_gradient(hidden, q, dtype, flipped=True),
            )
            tops = (y_top, d_gate.top), (y_top, d_up.top), (h_top, q.top)
            return dy, dw, None, tuple(next_history(h, *t) for h, t in zip(histories, tops))

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
    still = whole(jax.lax.stop_gradient(w))
    top = largest(still, tuple(range(lead, w.ndim)))
    if "float" in format:
        q, flipped, _ = round_both_ways(
            still, scale_for(top, format).reshape(w.shape[:lead]), format, len(contraction), lead
        )
    else:
        q = round_to(still, top, format)
        order = (*range(lead), *range(lead + len(contraction), w.ndim), *range(lead, lead + len(contraction)))
        q = Rounded(q.values, q.scale.reshape(w.shape[:lead]))
        flipped = Rounded(q.values.transpose(order), q.scale)
    assert flipped is not None
    return RoundedWeight(w, to_bits(q).values, to_bits(flipped).values, q.scale, history, contraction, precision)


class _Products:
    """The three matmuls of a weight, of operands that are rounded."""

    def __init__(self, w: RoundedWeight, subscripts: str):
        names, self.output = subscripts.split("->")
        self.x_names, self.w_names = names.split(",")
        self.stored_names = "".join(self.w_names[d] for d in w.order)
        rows = [n for n in self.output if n in self.x_names]
        last = lambda names: "".join([n for n in names if n not in rows] + rows)
        self.rows, self.flipped_x, self.flipped_output = len(rows), last(self.x_names), last(self.output)
        self.precision, self.d_w = w.precision, cotangent_spec(w.value)

    def forward(self, x: Rounded, stored: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        _, flipped, scale = stored
        w = from_bits(Rounded(flipped, scale), self.precision.weights)
        out = _product(f"{self.x_names},{self.stored_names}->{self.output}", x, w, dtype, out_sharding)
        return checkpoint_name(out, ROUNDED)

    def round_gradient(self, grad: jax.Array, history: jax.Array | None) -> Gradient:
        p = self.precision
        if p.rows or p.stochastic:
            top = largest(grad, tuple(range(self.rows, grad.ndim)) if p.rows else None)
            return Gradient(round_to(grad, used_top([history], 1, top), p.gradients, p.stochastic), None, top)
        top = largest(grad) if history is None else delayed_top(history[1], 1)
        return round_both_ways(grad, scale_for(top, p.gradients), p.gradients, self.rows)

    def input_gradient(self, grad: Gradient, stored: Any, dtype: Any, out_sharding: Any) -> jax.Array:
        values, _, scale = stored
        w = from_bits(Rounded(values, scale), self.precision.weights)
        return _product(f"{self.output},{self.w_names}->{self.x_names}", grad.plain, w, dtype, out_sharding)

    def weight_gradient(self, x: Rounded, grad: Gradient, dtype: Any, *, flipped: bool = False) -> jax.Array:
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
