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

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxscale.params import path_name
from jaxscale.quantize.apply import contraction_of, is_expert, is_matrix
from jaxscale.quantize.apply import round_weight as round_to_nearest
from jaxscale.quantize.delayed import HISTORY
from jaxscale.quantize.fake import FakeQuantized
from jaxscale.quantize.precision import PRECISIONS, Precision, compiler_options, parse_precision
from jaxscale.quantize.recipe import Recipe
from jaxscale.quantize.rounded_weight import round_weight

__all__ = ["PRECISIONS", "Precision", "compiler_options", "init_scales", "parse_precision", "rounded"]


def rounded(loss_fn: Callable[..., Any], specs: Any, precision: Precision | Recipe) -> Callable[..., Any]:
    """`loss_fn(params, ...)` with its matmuls in `precision`. Parameters are plain arrays; gradients are theirs.

    With delayed scaling it takes `scales=` too, from `init_scales`, whose gradient is what replaces them: the largest
    numbers of the last steps, this one among them. `make_train_step` does so.

    Args:
      specs: a tree of ParamSpec like params.

    Raises:
      ValueError: no weight is named, or a recipe's groups do not divide one.
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
        for path, spec in jax.tree.leaves_with_path(specs):
            if (name := path_name(path)) in chosen:  # said now, and not when the first step is traced
                w = jax.ShapeDtypeStruct(spec.shape, spec.dtype)
                jax.eval_shape(functools.partial(round_to_nearest, spec, chosen[name], name), w)
    else:
        chosen = {n: precision for n in matrices if not (precision.skip and re.search(precision.skip, n))}
    if not chosen:
        raise ValueError(f"the precision leaves every weight as it is; those that can be rounded are {matrices}")
    return chosen
