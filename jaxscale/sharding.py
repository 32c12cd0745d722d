"""Shardings of activations, said by logical axes. Without a mesh in context every function here is the identity."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.params import path_name, resolve_param
from jaxscale.table import Table, human_bytes
from pallas_kernels.attention.inputs import ATTENTION
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.array import QuantizedArray
from pallas_kernels.ragged_dot.api import RAGGED_DOT
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, Rules

ROUTED = "routed"  # the name of a token's experts and places: small, and slow to find again
ROUNDED = "rounded_matmul"  # checkpoint name of what a matmul of operands in 8 bits returns
# Changes of a type alone: to keep what they return would keep their operand.
CASTS = ("pvary", "reduced_vary_cast_p", "vary_unreduced_cast_p")
WIDTHS = frozenset({"embed", "latent"})  # what a matrix is multiplied along or gives, beside heads and hidden layers
RESTING = MEGATRON_FSDP.spill  # mesh axes that say where a parameter rests, not how it is computed with
# Inside a pipeline's stage these may be Manual, the others are as outside (jaxscale.parallel.pipeline, pipeline_step).
STAGES = frozenset({"pp", "dp", "fsdp"})


def active_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in context when arrays may be sharded on it: None outside of a mesh and inside a shard_map body, that of
    a pipeline's stage apart."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not STAGES.issuperset(mesh.manual_axes):
        return None
    return mesh


def axis_sizes(mesh: AbstractMesh) -> dict[str, int]:
    """Of the axes that arrays may be split over here: inside a stage pp and dp split nothing."""
    return {axis: 1 if axis in mesh.manual_axes else size for axis, size in mesh.shape.items()}


def partial_sums(axes: Any) -> frozenset[str]:
    """Those of `axes` over which an array may be typed `reduced` or `unreduced`: none inside a stage, where jax 0.11.2
    lowers neither (XLA fails on an unreduced sum beside a Manual axis). Sums are then whole where they are made."""
    return frozenset() if jax.sharding.get_abstract_mesh().manual_axes else frozenset(axes)


def shard_map(fn: Callable[..., Any], *, out_specs: Any, **options: Any) -> Callable[..., Any]:
    """jax.shard_map over all axes that are not Manual yet, inputs as they lie."""
    mesh = jax.sharding.get_abstract_mesh()
    names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    return jax.shard_map(fn, out_specs=out_specs, axis_names=names, **options)


def compute_spec(shape: Sequence[int], axes: Sequence[str | None], rules: Rules = MEGATRON_FSDP) -> P | None:
    """The PartitionSpec of an array in computation, or None when there is no mesh."""
    mesh = active_mesh()
    return None if mesh is None else resolve_spec(shape, axes, rules.compute, axis_sizes(mesh)).spec


def constrain(x: jax.Array, axes: Sequence[str | None], rules: Rules = MEGATRON_FSDP) -> jax.Array:
    """`x`, laid out by its logical axes; communicates when it was laid out otherwise.

    Args:
      x: any array.
      axes: a logical axis (or None) for each dim of x, as in ("batch", "seq", "embed").
    """
    mesh = active_mesh()
    if mesh is None:
        return x
    spec = resolve_spec(x.shape, axes, rules.compute, axis_sizes(mesh)).spec
    if any(t == AxisType.Explicit for t in mesh.axis_types):
        return jax.reshard(x, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def enter(
    x: jax.Array, axes: Sequence[str | None], weights: Sequence[jax.Array], rules: Rules = MEGATRON_FSDP
) -> list[jax.Array]:
    """`x` laid out by `axes`, once for each of the weights [D, ...] that it is about to be multiplied by.

    Where a weight's outputs are split (over tp), the gradients that come back to x are partial sums. x is then typed
    `reduced`, which keeps them so until all its uses are added: one reduce-scatter instead of an all-reduce for each.
    """
    mesh = active_mesh()
    if mesh is None:
        return [x] * len(weights)
    spec = resolve_spec(x.shape, axes, rules.compute, axis_sizes(mesh)).spec
    split = [partial_sums(axes_of(partitions(w)[1:])) if isinstance(w, jax.Array) else frozenset() for w in weights]
    # Not a set: its order, and the program's with it, would be another in each process of a job.
    made = {s: jax.reshard(x, P(*spec, reduced=s)) for s in dict.fromkeys(split)}
    return [made[s] for s in split]


def einsum(
    subscripts: str, x: jax.Array, w: jax.Array, *, axes: Sequence[str | None], rules: Rules = MEGATRON_FSDP
) -> jax.Array:
    """jnp.einsum of activations with a gathered weight, the result laid out by `axes`.

    Where a split dim is contracted (heads or mlp over tp) the parts are summed as they are scattered to that layout.
    """
    mesh = active_mesh()
    if mesh is None:
        return matmul(subscripts, x, w)
    inputs, output = subscripts.split("->")
    names, weight_names = inputs.split(",")
    sizes = dict(zip(names, x.shape)) | dict(zip(weight_names, w.shape))
    layout = dict(zip(names, partitions(x)))
    partial = axes_of(layout[n] for n in names if n not in output)
    spec = resolve_spec([sizes[n] for n in output], axes, rules.compute, axis_sizes(mesh)).spec
    kept = P(*(layout.get(n) for n in output), unreduced=partial) if partial_sums(partial) == partial else spec
    return jax.reshard(matmul(subscripts, x, w, out_sharding=kept), spec)


def matmul(subscripts: str, x: jax.Array, w: Any, **options: Any) -> jax.Array:
    """jnp.einsum of activations with a weight: the one place where models multiply by what they have learned.

    Args:
      w: an array, a QuantizedArray that contracts the dims which the subscripts contract, or a `Weight`.
    """
    own = as_weight(w)
    return jnp.einsum(subscripts, x, w, **options) if own is None else own.matmul(subscripts, x, **options)


def matmuls(subscripts: Sequence[str], xs: Sequence[jax.Array], ws: Sequence[Any]) -> Sequence[jax.Array]:
    """A `matmul` for each weight; those of a kind that meet the same x may share what they do to it."""
    first = as_weight(ws[0])
    if first is None or any(x is not xs[0] for x in xs) or any(type(w) is not type(first) for w in ws):
        return [matmul(s, x, w) for s, x, w in zip(subscripts, xs, ws, strict=True)]
    return first.together(subscripts, xs[0], ws)


class Weight:
    """A node in the place of a weight (a registered dataclass whose first field is `value`) that multiplies in its own
    way: it counts what passes, or rounds it first. What else it holds is small, and whole on every device."""

    value: Any
    largest: ClassVar[
        tuple[str, ...]
    ] = ()  # fields whose gradient is the largest of those of micro-batches, not their sum

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        raise NotImplementedError

    def together(self, subscripts: Sequence[str], x: jax.Array, weights: Sequence[Any]) -> Sequence[jax.Array]:
        """x times each of the weights, all of this class, itself the first."""
        return [w.matmul(s, x) for s, w in zip(subscripts, weights, strict=True)]

    def gated(self, y: jax.Array, p: dict[str, Any], activation: str) -> jax.Array | None:
        """A gated MLP `p` as a whole, itself its w_down, sums over a split hidden layer still to be made; None: it is
        made of its parts."""

    def cast(self, dtype: Any) -> Any:
        """The node as it is computed with in `dtype`."""
        return dataclasses.replace(self, value=self.value.astype(dtype))  # pyright: ignore[reportArgumentType]

    def parts(self, spec: P, sizes: Any, *, rest: bool = False) -> Any:
        """A tree of PartitionSpecs like the node, where the dense array has `spec`.

        Args:
          sizes: of the mesh axes.
          rest: it is not computed with so.
        """
        _, *others = jax.tree.leaves(self)
        return jax.tree.unflatten(jax.tree.structure(self), [spec, *[P()] * len(others)])

    def partitions(self) -> tuple[Any, ...]:
        """How each dim of the dense array is split."""
        return partitions(self.value)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim


@dataclasses.dataclass(frozen=True)
class _Quantized(Weight):
    """What a QuantizedArray, which knows no mesh, is as a Weight."""

    value: QuantizedArray

    def matmul(self, subscripts: str, x: jax.Array, **options: Any) -> jax.Array:
        return _quantized(subscripts, x, self.value, **options)

    def cast(self, dtype: Any) -> QuantizedArray:
        return self.value  # gathered as it is: a quarter of the bytes

    def parts(self, spec: P, sizes: Any, *, rest: bool = False) -> QuantizedArray:
        return place_quantized(self.value, spec, sizes, rest=rest)

    def partitions(self) -> tuple[Any, ...]:
        stored = dict(zip(self.value.order, partitions(self.value.values)))
        return tuple(stored[d] for d in range(self.value.ndim))


def as_weight(w: Any) -> Weight | None:
    """What multiplies in its own way, as a Weight; None for an array."""
    return _Quantized(w) if isinstance(w, QuantizedArray) else w if isinstance(w, Weight) else None


def _quantized(subscripts: str, x: jax.Array, w: QuantizedArray, preferred_element_type=None, out_sharding=None):
    inputs, output = subscripts.split("->")
    x_names, w_names = inputs.split(",")
    contracted = [n for n in w_names if n not in output]
    if [w_names[d] for d in w.contraction] != contracted or any(n in x_names for n in w_names if n in output):
        raise ValueError(
            f"a weight quantized along dims {w.contraction} meets {subscripts!r}, which contracts "
            f"{tuple(w_names.index(n) - len(w_names) for n in contracted)}; quantize it along these"
        )
    rows = [n for n in x_names if n in output]
    x = x.transpose([x_names.index(n) for n in (*rows, *contracted)])
    if active_mesh() is None:
        out = quantized_matmul(x, w, preferred_element_type=preferred_element_type)
    else:
        # Each device multiplies by what it holds of the weight: sums over split dims stay partial.
        layout = dict(zip(w_names, partitions(w)))
        split = axes_of(layout[n] for n in contracted)
        x_rows = partitions(x)[: len(rows)]
        x = jax.reshard(x, P(*x_rows, *(layout[n] for n in contracted)))
        outputs = (layout[n] for n in w_names if n in output)
        spec = P(*x_rows, *outputs, unreduced=split)

        def local(x, w):
            out = quantized_matmul(x, w, preferred_element_type=preferred_element_type)
            return jax.lax.pcast(out, tuple(sorted(split)), to="unreduced") if split else out

        out = shard_map(local, out_specs=spec)(x, w)
    made = [*rows, *(n for n in w_names if n in output)]
    if "".join(made) != output:
        out = out.transpose([made.index(n) for n in output])
    return out if out_sharding is None else jax.reshard(out, out_sharding)


def place_quantized(w: QuantizedArray, spec: P, sizes: Any, *, rest: bool = False) -> QuantizedArray:
    """The PartitionSpecs of a QuantizedArray's parts, where the dense array that it stands for has `spec`.

    Scales go with their values: a shard of values finds the scales of its own groups and tiles beside it. A scale of
    whole dims is held by each device.

    Args:
      sizes: of the mesh axes.
      rest: it is not computed with so: where shards begin inside of a group or tile, every device holds all scales.

    Raises:
      ValueError: shards that begin inside of a group or tile.
    """
    entries = (*spec.partitions, *[None] * (w.ndim - len(spec.partitions)))
    stored = [entries[d] for d in w.order]
    count = w.ndim - len(w.contraction)
    outputs, first, others = stored[:count], stored[count], stored[count + 1 :]
    size = lambda entry: math.prod(sizes[a] for a in axes_of([entry]))
    parts, G = size(first), w.scales.shape[-1]
    K = math.prod(w.values.shape[count:])
    aligned = all(size(e) == 1 for e in others) and (G == 1 or G % parts == 0)
    if not aligned and not rest:
        fits = [g for g in (16, 32, 64, 128) if K % (parts * g) == 0]
        raise ValueError(
            f"shape {w.shape} is contracted over K={K}, split {parts} ways into {K // parts}, inside of groups of "
            f"{w.group}; quantize in groups of {fits or 'fewer'}, one scale per channel, or use fewer devices along it"
        )
    tiles = [(e, n, m) for e, n, m in zip(outputs, w.values.shape, w.scales.shape)]
    for e, n, m in tiles:
        if m > 1 and m % size(e) and not rest:
            raise ValueError(
                f"shape {w.shape} has outputs of {n}, split {size(e)} ways into {n // size(e)}, inside of tiles of "
                f"{n // m}; give each output a scale of its own, or use fewer devices along it"
            )
    along = first if aligned and G > 1 else None
    scales = P(*(e if m > 1 and m % size(e) == 0 else None for e, _, m in tiles), along)
    lead = 0 if w.inputs is None else w.inputs.ndim - 1
    return dataclasses.replace(
        w,
        values=P(*stored),
        scales=scales,
        offsets=None if w.offsets is None else scales,
        inputs=None if w.inputs is None else P(*outputs[:lead], first if aligned else None),
        outliers=None if w.outliers is None else P(*outputs[: w.outliers.ndim - 1], along),
    )


def place(params: Any, specs: Any, mesh: Mesh | AbstractMesh, rules: Rules = MEGATRON_FSDP) -> Any:
    """The shardings of parameters at rest, quantized ones too: a tree of NamedSharding like params.

    Args:
      specs: a tree of ParamSpec.
    """
    sizes = dict(mesh.shape)

    def shardings(spec, w):
        where = resolve_param(spec, mesh, rules).spec
        own = as_weight(w)
        parts = where if own is None else own.parts(where, sizes, rest=True)
        return jax.tree.map(lambda p: NamedSharding(mesh, p), parts, is_leaf=lambda p: isinstance(p, P))

    return jax.tree.map(shardings, specs, params)


def gather_params(
    params: Any,
    specs: Any,
    dtype: Any,
    rows: Sequence[int] | None = None,
    rules: Rules = MEGATRON_FSDP,
    row_axes: Sequence[str] = ("batch", "seq"),
) -> Any:
    """Parameters as the computation wants them: cast to `dtype`, gathered over fsdp, still split over tp.

    Casting first halves the bytes that are gathered. The gradient comes back through the transpose: scattered over the
    axes that were gathered, in the dtype at rest.

    Args:
      rows: (B, T) of the activations that the parameters will meet. Matrices are typed `reduced` over the mesh axes
        that split these rows: their gradients stay partial sums until all uses are added, then reduce-scatter once.
        (Vectors, which are broadcast over rows and not contracted with them, cannot be.)
      row_axes: logical axes of these rows.
    """
    mesh = active_mesh()
    shared = frozenset()
    if mesh is not None and rows:
        shared = partial_sums(axes_of(resolve_spec(rows, row_axes, rules.compute, axis_sizes(mesh)).spec))

    def reduced(axes, where):
        return shared if len(axes) > 1 and not WIDTHS.isdisjoint(axes) else frozenset()

    return jax.tree.map(functools.partial(gather_weight, dtype, rules, reduced), specs, params)


def gather_weight(dtype: Any, rules: Rules, reduced: Callable[[Any, P], frozenset[str]], spec: Any, w: Any) -> Any:
    """One parameter as the computation wants it: cast, gathered, typed `reduced(axes, where)`."""
    own, mesh = as_weight(w), active_mesh()
    whole = w.astype(dtype) if own is None else own.cast(dtype)
    if mesh is None:
        return whole
    axes, sizes = spec.axes[len(spec.axes) - w.ndim :], axis_sizes(mesh)
    where = resolve_spec(w.shape, axes, rules.compute, sizes).spec
    where = P(*where, reduced=reduced(axes, where))
    return jax.tree.map(jax.reshard, whole, where if own is None else own.parts(where, sizes))


def saveable(remat: str, prim: Any, *args: Any, **params: Any) -> bool:
    """A jax.checkpoint policy for layers that gather: whether the backward pass keeps what `prim` returns.

    "none" keeps everything that was computed, "dots" the matmuls with weights, those of experts too, what attention
    returns (over cp, a second forward pass would send all keys around again) and where tokens went, "full" nothing.
    What was gathered is gathered again in every case: kept, each layer's whole weights would undo FSDP and the
    sequence-parallel norms. What was summed and scattered is kept instead of its partial sums, which are tp times as
    large.
    """
    if remat == "full":
        return False
    if prim.name == "reshard":
        return bool(args[0].sharding.spec.unreduced)
    if prim.name in CASTS:  # of gathered weights, on their way into a shard_map body
        return False
    if remat == "none":
        return True
    if prim.name == "name":
        return params["name"] in (ATTENTION, RAGGED_DOT, ROUTED, ROUNDED)
    if prim.name == "dot_general" and jnp.dtype(args[0].dtype).itemsize == 1:  # scaled afterwards, and named then
        return False
    out = params.get("out_sharding")
    partial = out is not None and bool(out.spec.unreduced)
    return not partial and bool(jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *args, **params))


def auto(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn(params, ...)`, a pure function that says nothing about shardings, for the mesh in context.

    What is computed how is left to the partitioner (`jax.sharding.auto_axes`); only the parameters are gathered first
    over the axes that they merely rest on (fsdp, cp), where the partitioner alone would rather gather activations. The
    mesh stays Explicit outside: gradients and optimizer state are sharded as the parameters are.

        params = jax.jit(init, out_shardings=fsdp_shardings(jax.eval_shape(init, key), mesh))(key)
        step = make_train_step(auto(loss_fn), optimizer)

    Args:
      fn: its arguments are trees of arrays, parameters first; what it returns should be small (losses, metrics), for it
        comes back whole on every device.
    """

    @functools.wraps(fn)
    def sharded(params, *args, **kwargs):
        mesh = active_mesh()
        if mesh is None or not any(t == AxisType.Explicit for t in mesh.axis_types):
            return fn(params, *args, **kwargs)
        params = jax.tree.map(lambda x: jax.reshard(x, _without(jax.typeof(x).sharding.spec, RESTING)), params)
        leaves, treedef = jax.tree.flatten((params, args, kwargs))  # auto_axes takes arrays by position only

        def flat(*leaves):
            params, args, kwargs = jax.tree.unflatten(treedef, leaves)
            return fn(params, *args, **kwargs)

        return jax.sharding.auto_axes(flat, out_sharding=P())(*leaves)

    return sharded


def fsdp_shardings(params: Any, mesh: Mesh | AbstractMesh, specs: Any = None) -> Any:
    """Fully sharded data parallelism for any tree of parameters: each rests split along its largest dim that divides.

    Args:
      params: arrays or ShapeDtypeStructs.
      specs: a tree of PartitionSpec like params: what is split already, over tp say.

    Returns:
      A tree of NamedSharding like params, without axes of size 1. What has no dim that divides stays as it was.
    """
    axes = tuple(a for a in RESTING if mesh.shape[a] > 1)
    size = math.prod(mesh.shape[a] for a in axes)

    def place(x, spec):
        entries = (*spec, *[None] * (len(x.shape) - len(spec)))
        named = [(e,) if isinstance(e, str) else e or () for e in entries]
        held: list[tuple[str, ...]] = [tuple(a for a in e if mesh.shape[a] > 1) for e in named]
        left = [n // math.prod(mesh.shape[a] for a in h) for n, h in zip(x.shape, held, strict=True)]
        fits = [d for d, n in enumerate(left) if n and n % size == 0]
        if axes and fits and not axes_of(spec) & set(axes):
            dim = max(fits, key=lambda d: left[d])
            held[dim] += axes
        return NamedSharding(mesh, P(*(h[0] if len(h) == 1 else h or None for h in held)))

    return jax.tree.map(place, params, jax.tree.map(lambda _: P(), params) if specs is None else specs)


def explain(specs: Any, mesh: Mesh | AbstractMesh, rules: Rules = MEGATRON_FSDP) -> Table:
    """How each parameter is split over the mesh, what a device holds of it, and why where it is not as the rules ask.

    Args:
      specs: a tree of ParamSpec.
    """
    rows, held, numbers = [], 0, 0
    for path, spec in jax.tree.leaves_with_path(specs):
        where, notes = resolve_param(spec, mesh, rules)
        share = math.prod(NamedSharding(mesh, where).shard_shape(spec.shape)) * jnp.dtype(spec.dtype).itemsize
        held, numbers = held + share, numbers + math.prod(spec.shape)
        shape, axes = "x".join(map(str, spec.shape)), " ".join(a or "-" for a in spec.axes)
        rows.append((path_name(path), shape, axes, _spec_text(where), human_bytes(share), "; ".join(notes)))
    rows.append(("all", f"{numbers:,} numbers", "", "", human_bytes(held), ""))
    title = "Parameters on " + (",".join(f"{a}={n}" for a, n in mesh.shape.items() if n > 1) or "one device")
    return Table(title, ("parameter", "shape", "axes", "spec", "bytes per device", "note"), rows)


def _spec_text(spec: P) -> str:
    return "P(" + ", ".join("·" if e is None else e if isinstance(e, str) else "+".join(e) for e in spec) + ")"


def _without(spec: P, axes: Sequence[str]) -> P:
    entries = [[a for a in ((e,) if isinstance(e, str) else e or ()) if a not in axes] for e in spec]
    return P(*(e[0] if len(e) == 1 else tuple(e) or None for e in entries))


def partitions(x: Any) -> tuple[Any, ...]:
    """How each dim of a traced array is split: a mesh axis, several, or None; of a weight, each of its dense dims."""
    own = as_weight(x)
    return jax.typeof(x).sharding.spec.partitions if own is None else own.partitions()


def axes_of(entries: Any) -> frozenset[str]:
    """The mesh axes in the entries of a PartitionSpec."""
    return frozenset(a for e in entries if e is not None for a in ((e,) if isinstance(e, str) else e))
