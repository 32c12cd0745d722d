"""Weights of a model -> QuantizedArrays, on any mesh."""

import dataclasses
import functools
import math
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxscale.params import ParamSpec, abstract_params, path_name
from jaxscale.quantize.recipe import Recipe, Rounding, to_nearest
from jaxscale.sharding import place, place_quantized
from pallas_kernels.quantized_matmul.array import QuantizedArray, quantize_array
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

# What `jaxscale.sharding.matmul` and `ragged_dot` multiply by.
MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down", "embed", "head")


def quantize(params: Any, recipe: Recipe | str, specs: Any, *, rules: Rules = MEGATRON_FSDP) -> Any:
    """The same tree with QuantizedArrays where the recipe says so, rounded to the nearest, where the weights lie.

        small = jaxscale.quantize(params, "w4a16-g64", decoder.param_specs(cfg))
        logits = decoder.forward(small, tokens, cfg)

    Args:
      params: arrays, on one device or sharded.
      recipe: or its name, as `parse_recipe` reads it. One whose method needs a calibration set is refused here:
        `jaxscale.quantize.calibrate` takes it.
      specs: a tree of ParamSpec like params; its axes say what a matmul contracts.

    Raises:
      ValueError: weights that are quantized already or not finite, a rule that no weight obeys, groups that do not
        divide, shards inside of groups.
    """
    recipe = to_nearest(recipe)
    chosen = select(recipe, specs)
    require_dense(params, chosen)

    def round_one(path, spec, w):
        name = path_name(path)
        if name not in chosen:
            return w
        out = on_its_mesh(functools.partial(round_weight, spec, chosen[name], name), name, spec, w, rules)
        return require_finite(name, out)

    return jax.tree.map_with_path(round_one, specs, params)


def select(recipe: Recipe, specs: Any) -> dict[str, Rounding]:
    """Path -> what the recipe says, for each weight that it rounds.

    Raises:
      ValueError: a recipe that no weight obeys, groups that do not divide.
    """
    named = {path_name(path): spec for path, spec in jax.tree.leaves_with_path(specs)}
    matrices = list(filter(is_matrix, named))
    chosen = {name: found for name in matrices if (found := recipe.rounding(name)) is not None}
    if not chosen:
        some = ", ".join(matrices) or "none"
        raise ValueError(f"no rule of the recipe chooses a weight; the weights that can be quantized are {some}")
    grouped = {name: rounding.group for name, rounding in chosen.items() if rounding.group is not None}
    contracted = {name: math.prod(named[name].shape[d] for d in contraction_of(named[name])) for name in grouped}
    for name, group in grouped.items():
        if group < 1 or contracted[name] % group:
            divisors = [g for g in (16, 32, 64, 128, 256) if math.gcd(*contracted.values()) % g == 0]
            raise ValueError(
                f"groups of {group} do not divide the {contracted[name]} numbers that a matmul by {name} contracts; "
                f"use {f'one of {divisors}, which divide those of every weight, or ' if divisors else ''}"
                "one scale per channel: no group"
            )
    return chosen


def require_quantizable(
    recipe: Recipe, specs: Any, mesh: Mesh | AbstractMesh | None = None, rules: Rules = MEGATRON_FSDP
) -> None:
    """Before a model is read, which takes long: ValueError where its shapes alone tell that it cannot be rounded."""
    if mesh is None:
        select(recipe, specs)
    else:
        abstract_quantized(dataclasses.replace(recipe, method="rtn"), specs, mesh, rules)


def require_dense(params: Any, names: Collection[str]) -> None:
    """ValueError where weights of these names are quantized."""
    leaves = jax.tree.leaves_with_path(params, is_leaf=_quantized)
    done = [name for path, w in leaves if _quantized(w) and (name := path_name(path)) in names]
    if done:
        raise ValueError(
            f"{len(done)} weights are quantized already, {done[0]} the first; take the parameters that they were made "
            f"from, or leave them out: a rule ({done[0]!r}, None)"
        )


def is_matrix(name: str) -> bool:
    return name.rpartition("/")[2] in MATRICES and "/router/" not in name


def is_expert(name: str) -> bool:
    """Whether a path is a routed expert's, [E, D, F] or [E, F, D]: rows reach it in groups."""
    return "/experts/" in name


def contraction_of(spec: ParamSpec) -> tuple[int, ...]:
    """The dims that a matmul contracts: embed, or of what writes into the residual stream all others but layers and
    experts."""
    axes = spec.axes
    if axes[-1] == "embed" and axes != ("vocab", "embed"):
        return tuple(d - len(axes) for d, axis in enumerate(axes) if axis not in ("embed", "layers", "experts"))
    return (axes.index("embed") - len(axes),)


def round_weight(spec: ParamSpec, rounding: Rounding, name: str, w: jax.Array) -> QuantizedArray:
    """One weight, rounded to the nearest."""
    try:
        return quantize_array(
            w,
            rounding.format,
            contraction=contraction_of(spec),
            group=rounding.group,
            symmetric=rounding.symmetric,
            activations=rounding.activations,
        )
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None


def require_finite(name: str, w: QuantizedArray) -> QuantizedArray:
    """`w`; ValueError where a scale is nan or infinite."""
    wrong = int((~jnp.isfinite(w.scales.astype(jnp.float32))).sum())
    if wrong:
        raise ValueError(
            f"{name}: {wrong} of {w.scales.size} scales are not finite: the weights that they were made from hold "
            "nan or infinities; restore an earlier checkpoint"
        )
    return w


def on_its_mesh(fn: Any, name: str, spec: ParamSpec, w: jax.Array, rules: Rules, *more: Any) -> Any:
    """`fn(w, *more)`, a QuantizedArray, compiled for the mesh that w lies on, whose parts rest there as w does."""
    mesh = w.sharding.mesh if isinstance(w.sharding, NamedSharding) else None
    if not isinstance(mesh, Mesh):
        return jax.jit(fn)(w, *more)
    where = _rests(jax.eval_shape(fn, jax.ShapeDtypeStruct(w.shape, w.dtype), *more), name, spec, mesh, rules)
    treedef = jax.tree.structure(where)
    flat = lambda *args: tuple(jax.tree.leaves(fn(*args)))
    with jax.set_mesh(mesh):  # left to the partitioner: groups are cut out of dims that are split
        specs = tuple(s.spec for s in jax.tree.leaves(where))
        return jax.tree.unflatten(treedef, jax.jit(jax.sharding.auto_axes(flat, out_sharding=specs))(w, *more))


def abstract_quantized(
    recipe: Recipe | str, specs: Any, mesh: Mesh | AbstractMesh, rules: Rules = MEGATRON_FSDP
) -> Any:
    """What `quantize` makes of parameters on a mesh, whose devices need not be here: ShapeDtypeStructs with shardings.

    Raises:
      ValueError: what `quantize` says against these shapes.
    """
    recipe = to_nearest(recipe)
    params = abstract_params(specs, mesh, rules)
    chosen = select(recipe, specs)

    def round_one(path, spec, w):
        name = path_name(path)
        if name not in chosen:
            return w
        fn = functools.partial(round_weight, spec, chosen[name], name)
        shape = jax.eval_shape(fn, jax.ShapeDtypeStruct(w.shape, w.dtype))
        placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        return jax.tree.map(placed, shape, _rests(shape, name, spec, mesh, rules))

    return jax.tree.map_with_path(round_one, specs, params)


def _rests(shape: Any, name: str, spec: ParamSpec, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """The shardings at rest of a QuantizedArray; ValueError, now and not at the first matmul, where it cannot be
    computed with on this mesh."""
    computed = resolve_spec(spec.shape, spec.axes, rules.compute, dict(mesh.shape)).spec
    try:
        place_quantized(shape, computed, dict(mesh.shape))
    except ValueError as e:
        raise ValueError(f"{name}: {e}") from None
    return place(shape, spec, mesh, rules)


def num_bytes(params: Any) -> int:
    """What the arrays of a tree take, two values of 4 bits to a byte."""
    return sum(math.prod(x.shape) * jax.dtypes.itemsize_bits(x.dtype) // 8 for x in jax.tree.leaves(params))


def summary(params: Any) -> str:
    """`quantized 8 of 12 arrays: 4.25 bits a number, 27 % of bfloat16's memory`"""
    leaves = jax.tree.leaves(params, is_leaf=_quantized)
    numbers = sum(math.prod(x.shape) for x in leaves)
    bits = 8 * num_bytes(params) / numbers
    count = sum(map(_quantized, leaves))
    return f"quantized {count} of {len(leaves)} arrays: {bits:.2f} bits a number, {bits / 16:.0%} of bfloat16's memory"


def _quantized(x: Any) -> bool:
    return isinstance(x, QuantizedArray)
