"""Weights rounded with the statistics of a calibration set: AWQ, GPTQ, SmoothQuant, FMPQ.

    statistics = gather_statistics(params, specs, lambda p, x: decoder.forward(p, x, cfg), batches)
    small = quantize_calibrated(params, "w4a16-g64-gptq", specs, statistics)

The statistics of what each weight is multiplied with come out of the model's own forward as gradients: every weight
is wrapped in an `Observed`, whose matmul passes the activations on and whose "cotangent" is the sum over tokens of
x x^T, |x| and the largest |x|. So they are taken inside of a scan over layers, under remat and on a mesh, without side
effects.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxscale.params import path_name
from jaxscale.quantize.apply import (
    contraction_of,
    is_expert,
    is_matrix,
    on_its_mesh,
    require_dense,
    require_finite,
    round_weight,
    select,
)
from jaxscale.quantize.channels import Statistics, outlier_groups, outliers_first, smooth_keys
from jaxscale.quantize.recipe import Recipe, Rounding, parse_recipe
from jaxscale.sharding import Weight, active_mesh
from pallas_kernels.quantized_matmul.array import FORMATS, QuantizedArray, group_scales, quantize_array, round_to
from sharding_rules.rules import MEGATRON_FSDP, Rules

ALPHAS = 21  # exponents that AWQ tries, 0 to 1
DAMPING = 0.01  # of the mean of GPTQ's diagonal, added to it


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value", "statistics"), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Observed(Weight):
    """A weight whose `statistics`, zeros, have as their gradient those of the activations that it meets."""

    value: jax.Array
    statistics: Statistics

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        inputs, output = subscripts.split("->")
        x_names, w_names = inputs.split(",")
        contracted = [n for n in w_names if n not in output]
        assert list(x_names[-len(contracted) :]) == contracted, subscripts
        return jnp.einsum(subscripts, _observe(len(contracted), x, self.statistics), self.value, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _observe(contracted: int, x: jax.Array, statistics: Statistics) -> jax.Array:
    return x


def _observe_fwd(contracted, x, statistics):
    return x, x


def _observe_bwd(contracted, x, grad):
    rows = x if active_mesh() is None else jax.reshard(x, P())
    rows = rows.reshape(-1, math.prod(x.shape[x.ndim - contracted :])).astype(jnp.float32)
    size = jnp.abs(rows)
    return grad, Statistics(jnp.dot(rows.T, rows, precision="highest"), size.sum(axis=0), size.max(axis=0))


_observe.defvjp(_observe_fwd, _observe_bwd)


def gather_statistics(
    params: Any,
    specs: Any,
    forward: Callable[[Any, jax.Array], jax.Array],
    batches: Iterable[jax.Array],
    *,
    only: str = "",
) -> dict[str, Statistics]:
    """Path -> what the weight there is multiplied with, over all batches; of every matrix inside of the layers but
    routed experts'.

    On a mesh, call with the mesh set (`jax.set_mesh`).

    Args:
      forward: (params, tokens) -> anything floating that depends on every weight, such as logits; traced once.
      batches: int32 [B, T] each, all of one shape. Hold few tokens at a time: their activations are kept for a batch.
      only: a regular expression that a path must hold.

    Raises:
      ValueError: no batch; weights that are quantized already; activations that are not finite; a weight that forward
        does not multiply by.
    """
    paths = [path_name(path) for path, _ in jax.tree.leaves_with_path(specs)]
    chosen = {
        name for name in paths if is_matrix(name) and "/" in name and not is_expert(name) and re.search(only, name)
    }

    require_dense(params, chosen)

    def observed(statistics, params):
        wrap = lambda path, _, w: Observed(w, statistics[path_name(path)]) if path_name(path) in chosen else w
        return jax.tree.map_with_path(wrap, specs, params)

    @jax.jit
    def step(sums, params, tokens):
        zeros = jax.tree.map(jnp.zeros_like, sums)
        new = jax.grad(lambda s: forward(observed(s, params), tokens).astype(jnp.float32).mean())(zeros)
        join = lambda a, b: Statistics(a.hessian + b.hessian, a.total + b.total, jnp.maximum(a.top, b.top))
        return {name: join(sums[name], new[name]) for name in sums}

    sums = {}
    for path, spec in jax.tree.leaves_with_path(specs):
        if path_name(path) in chosen:
            K = math.prod(spec.shape[d] for d in contraction_of(spec))
            lead = spec.shape[:1] if spec.axes[0] == "layers" else ()
            sums[path_name(path)] = Statistics(*(jnp.zeros((*lead, *s)) for s in ((K, K), (K,), (K,))))
    count = 0
    for tokens in batches:
        sums = jax.block_until_ready(step(sums, params, tokens))  # a bar over the batches then tells the truth
        count += tokens.size
    if count == 0:
        raise ValueError("the calibration set is empty; give at least one batch of tokens [B, T], some thousand in all")
    for name, s in sums.items():
        if not bool(jnp.isfinite(s.total).all()):  # not s.top: XLA's max on CPUs drops nan
            raise ValueError(f"{name} met activations that are not finite in the calibration set; look at its batches")
        if not bool((s.top > 0).any()):
            raise ValueError(f"{name} met nothing in the calibration set: forward does not multiply by it")
    return sums


def quantize_calibrated(
    params: Any,
    recipe: Recipe | str,
    specs: Any,
    statistics: Mapping[str, Statistics],
    *,
    rules: Rules = MEGATRON_FSDP,
) -> Any:
    """`jaxscale.quantize` with the recipe's method. The vocabulary's matrices and routed experts are
    rounded to the nearest.

    Where activations take 4 bits, the groups of channels that hold an outlier keep 8 (FMPQ, arXiv 2410.12168), whatever
    the method. Channels then come out in another order, those of all parameters; where the recipe's cache takes 4 bits,
    keys in other units (`jaxscale.quantize.channels`).

    Args:
      params, recipe, specs, rules: as in `jaxscale.quantize`.
      statistics: from `gather_statistics`.
    """
    recipe = parse_recipe(recipe) if isinstance(recipe, str) else recipe
    if recipe.method == "rtn":
        raise ValueError("rounding to the nearest needs no calibration set: jaxscale.quantize(params, recipe, specs)")
    method = {"awq": awq, "gptq": gptq, "smoothquant": smoothquant, "fmpq": nearest}[recipe.method]
    chosen = select(recipe, specs)
    require_dense(params, chosen)
    if missing := [name for name in chosen if "/" in name and not is_expert(name) and name not in statistics]:
        raise ValueError(
            f"no statistics of {', '.join(missing)}, which the recipe rounds; gather them, or leave them out"
        )

    if recipe.cache == "int4":
        params = smooth_keys(params, specs, statistics)
    if any(rounding.activations == "int4" for rounding in chosen.values()):
        params, statistics = outliers_first(params, specs, statistics)

    def round_one(path, spec, w):
        name = path_name(path)
        if name not in chosen:
            return w
        if name not in statistics:
            out = on_its_mesh(functools.partial(round_weight, spec, chosen[name], name), name, spec, w, rules)
        else:

            def layers(w, *s):
                run = lambda args: _rounded(method, args[0], Statistics(*args[1:]), contraction_of(spec), chosen[name])
                return jax.lax.map(run, (w, *s)) if spec.axes[0] == "layers" else run((w, *s))

            out = on_its_mesh(layers, name, spec, w, rules, *statistics[name])
        return require_finite(name, out)

    return jax.tree.map_with_path(round_one, specs, params)


def _rounded(method: Any, w: jax.Array, s: Statistics, contraction: tuple[int, ...], rounding: Rounding) -> Any:
    q = method(w, s, contraction, rounding)
    if rounding.activations != "int4":
        return q
    top = s.top if q.inputs is None else s.top * q.inputs
    return dataclasses.replace(q, outliers=outlier_groups(top, rounding.group))


def nearest(w: jax.Array, s: Statistics, contraction: tuple[int, ...], rounding: Rounding) -> QuantizedArray:
    """Without statistics: what FMPQ does is done to the activations."""
    options = _options(rounding)
    return quantize_array(w, rounding.format, contraction=contraction, activations=rounding.activations, **options)


def awq(w: jax.Array, s: Statistics, contraction: tuple[int, ...], rounding: Rounding) -> QuantizedArray:
    """Activation-aware scaling (arXiv 2306.00978): inputs that are large on average get finer steps.

    Each input is multiplied by mean(|x|)^a before rounding, and x divided by it in the matmul. Of `ALPHAS` exponents
    the one is taken that changes the outputs of the calibration set least, exactly: |E x|^2 summed is tr(E H E^T).
    """
    rows = _rows(w, contraction)
    mean = jnp.maximum(s.total / jnp.maximum(s.total.max(), 1e-30), 1e-4)

    def scaled(a):
        scale = mean**a
        return scale / jnp.sqrt(scale.max() * scale.min())

    def error(a):
        q = quantize_array(rows * scaled(a)[None], rounding.format, contraction=(-1,), **_options(rounding))
        difference = q.dequantize() / scaled(a)[None] - rows
        return (jnp.dot(difference, s.hessian, precision="highest") * difference).sum()

    alphas = jnp.linspace(0.0, 1.0, ALPHAS)
    best = alphas[jnp.argmin(jax.lax.map(error, alphas))]
    return _with_inputs(w, scaled(best), contraction, rounding)


def smoothquant(w: jax.Array, s: Statistics, contraction: tuple[int, ...], rounding: Rounding) -> QuantizedArray:
    """Outliers of the activations moved into the weight (arXiv 2211.10438): each input is divided by
    sqrt(largest |x| / largest |w|), and its weights multiplied."""
    largest = jnp.abs(_rows(w, contraction)).max(axis=0)
    scale = jnp.sqrt(jnp.maximum(s.top, 1e-5) / jnp.maximum(largest, 1e-5))
    return _with_inputs(w, scale, contraction, rounding)


def gptq(w: jax.Array, s: Statistics, contraction: tuple[int, ...], rounding: Rounding) -> QuantizedArray:
    """Second-order rounding (arXiv 2210.17323): inputs are rounded one after another, and what each rounding changes in
    the outputs is made up for by the inputs that are left."""
    rows = _rows(w, contraction)
    N, K = rows.shape
    damped = s.hessian + jnp.eye(K) * (DAMPING * jnp.diagonal(s.hessian).mean() + 1e-30)
    inverse = jnp.linalg.inv(jnp.linalg.cholesky(damped))
    upper = jnp.linalg.cholesky(jnp.dot(inverse.T, inverse, precision="highest"), upper=True)
    group = rounding.group or K
    block = rounding.group or math.gcd(K, 64)
    scale_of = functools.partial(group_scales, format=rounding.format, symmetric=rounding.symmetric)
    fixed = scale_of(rows[:, None]) if rounding.group is None else None

    def step(rows, i):
        own = jax.lax.dynamic_slice_in_dim(rows, i * block, block, axis=1)
        factor = jax.lax.dynamic_slice(upper, (i * block, 0), (block, K))
        inner = jax.lax.dynamic_slice(factor, (0, i * block), (block, block))
        scales, offsets = fixed or scale_of(own[:, None])

        def column(j, carry):
            own, q, errors = carry
            x = own[:, j]
            value = round_to(x[:, None, None], scales, offsets, rounding.format)[:, 0]
            back = QuantizedArray(value, scales, offsets, contraction=(-1,), unsigned=rounding.format == "uint4")
            error = (x - back.dequantize()[:, 0]) / inner[j, j]
            return own - error[:, None] * inner[j][None], q.at[:, j].set(value[:, 0]), errors.at[:, j].set(error)

        start = own, jnp.zeros(own.shape, _dtype(rounding)), jnp.zeros_like(own)
        _, q, errors = jax.lax.fori_loop(0, block, column, start)
        return rows - jnp.dot(errors, factor, precision="highest"), (
            q,
            scales[:, 0],
            None if offsets is None else offsets[:, 0],
        )

    _, (q, scales, offsets) = jax.lax.scan(step, rows, jnp.arange(K // block))
    values = jnp.moveaxis(q, 0, 1).reshape(N, K)
    stored = [d for d in range(w.ndim) if d - w.ndim not in contraction]
    outputs, inner = [w.shape[d] for d in stored], [w.shape[d] for d in contraction]
    pick = lambda x: (x.T if group != K else x[:1].T).reshape(*outputs, K // group)
    return QuantizedArray(
        values.reshape(*outputs, *inner),
        pick(scales),
        None if offsets is None else pick(offsets),
        contraction=contraction,
        unsigned=rounding.format == "uint4",
        activations=rounding.activations,
    )


def _with_inputs(w, scale, contraction, rounding: Rounding) -> QuantizedArray:
    """`w`, each input multiplied by its scale [K] and rounded, with the activations to be divided by it."""
    inner = [w.shape[d] for d in contraction]
    shape = [n if d - w.ndim in contraction else 1 for d, n in enumerate(w.shape)]
    assert math.prod(inner) == scale.size
    scaled = w.astype(jnp.float32) * scale.reshape(shape)
    q = quantize_array(scaled, rounding.format, contraction=contraction, **_options(rounding))
    return dataclasses.replace(q, inputs=1 / scale, activations=rounding.activations)


def _rows(w: jax.Array, contraction: tuple[int, ...]) -> jax.Array:
    """float32 [N, K]."""
    outputs = [d for d in range(w.ndim) if d - w.ndim not in contraction]
    K = math.prod(w.shape[d] for d in contraction)
    return w.astype(jnp.float32).transpose(*outputs, *(d + w.ndim for d in contraction)).reshape(-1, K)


def _options(rounding: Rounding) -> dict[str, Any]:
    return {"group": rounding.group, "symmetric": rounding.symmetric}


def _dtype(rounding: Rounding) -> Any:
    return FORMATS[rounding.format][0]
