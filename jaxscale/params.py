"""ParamSpec: one line per parameter says its shape, logical axes, initial values and dtype."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from sharding_rules.resolve import Resolution, resolve_spec
from sharding_rules.rules import Rules

Init = Callable[..., jax.Array]  # (key, shape, dtype, *, out_sharding) -> array


def normal(stddev: float) -> Init:
    """Normal values, cut at 4.3 standard deviations: a table of 65,536 quantiles indexed by 16 random bits.

    No floating-point operation is left to the compiler, so the bits are the same on every mesh and backend; the usual
    inverse error function differs in the last place with how it is fused.
    """

    def init(key, shape, dtype, *, out_sharding=None):
        bits = jax.random.bits(key, shape, jnp.uint16, out_sharding=out_sharding).astype(jnp.int32)
        table = jnp.asarray((stddev * _normal_quantiles()).astype(dtype))
        return table.at[bits].get(out_sharding=out_sharding, mode="promise_in_bounds")

    return init


@functools.cache
def _normal_quantiles() -> np.ndarray:
    from scipy.special import ndtri

    q = ndtri((np.arange(2**16) + 0.5) / 2**16)
    return q / q.std()


def constant(value: float) -> Init:
    def init(key, shape, dtype, *, out_sharding=None):
        return jnp.full(shape, value, dtype, out_sharding=out_sharding)

    return init


@dataclasses.dataclass(frozen=True)  # deliberately no pytree node: a ParamSpec is a leaf
class ParamSpec:
    """shape, logical axis of each dim (None: never split), initialiser, dtype at rest."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"ParamSpec shape {self.shape} and axes {self.axes} differ in length")


def path_name(path: tuple[Any, ...]) -> str:
    """`layers/attn/wq` for a pytree key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_params(key: jax.Array, specs: Any, mesh: jax.sharding.Mesh | None = None, rules: Rules | None = None) -> Any:
    """Random parameters, each created in its own shards; the same bits on every mesh.

    Args:
      key: a PRNG key. Each parameter draws from a key folded with its path, so that adding one changes no other.
      specs: a tree of ParamSpec.
      mesh, rules: where the parameters go; without a mesh they are made on the default device.
    """
    leaves, treedef = jax.tree.flatten_with_path(specs)

    def init(key):
        out = []
        for path, spec in leaves:
            leaf_key = jax.random.fold_in(key, zlib.crc32(path_name(path).encode()))
            where = None if mesh is None else resolve_param(spec, mesh, _need(rules)).spec
            out.append(spec.init(leaf_key, spec.shape, jnp.dtype(spec.dtype), out_sharding=where))
        return jax.tree.unflatten(treedef, out)

    if mesh is None:
        return jax.jit(init)(key)
    with jax.set_mesh(mesh):
        return jax.jit(init)(key)


def abstract_params(specs: Any, mesh: Any = None, rules: Rules | None = None) -> Any:
    """The same tree as ShapeDtypeStructs, with shardings when a (possibly abstract) mesh is given."""
    if mesh is None:
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype)), specs)
    shardings = param_shardings(specs, mesh, _need(rules))
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, jnp.dtype(s.dtype), sharding=sh), specs, shardings)


def param_shardings(specs: Any, mesh: Any, rules: Rules) -> Any:
    """specs + rules + mesh -> a tree of NamedSharding, the same structure."""
    return jax.tree.map(lambda s: NamedSharding(mesh, resolve_param(s, mesh, rules).spec), specs)


def resolve_param(spec: ParamSpec, mesh: Any, rules: Rules) -> Resolution:
    """Where one parameter rests, and why if not where the rules ask.

    Raises:
      ValueError: an array or a shape in the place of a ParamSpec.
    """
    if not isinstance(spec, ParamSpec):
        raise ValueError(
            f"a tree of ParamSpec is wanted but it holds a {type(spec).__name__}, which has no logical axes; "
            "jaxscale.fsdp_shardings(params, mesh) and sharding_rules.search shard the parameters of any function"
        )
    return resolve_spec(spec.shape, spec.axes, rules.params, dict(mesh.shape), rules.spill)


def fallback_notes(specs: Any, mesh: Any, rules: Rules) -> tuple[str, ...]:
    """What the mesh cannot split as the rules ask, a line each: "q_heads=9 is not divisible by tp=2: kept whole over tp
    (layers/attn/wq, layers/attn/wo)"."""
    where: dict[str, list[str]] = {}
    for path, spec in jax.tree.leaves_with_path(specs):
        for note in resolve_param(spec, mesh, rules).notes:
            where.setdefault(note, []).append(path_name(path))
    return tuple(f"{note} ({', '.join(names)})" for note, names in where.items())


def num_params(tree: Any) -> int:
    """How many numbers a tree of specs or arrays holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _need(rules: Rules | None) -> Rules:
    if rules is None:
        raise ValueError("a mesh needs rules: pass rules=sharding_rules.MEGATRON_FSDP or your own")
    return rules
