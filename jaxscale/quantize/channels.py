"""Parameters that compute the same and are easier to round: channels in another order, keys in other units.

A few channels of the activations are many times as large as the others, in the residual stream the same ones in every
layer. Side by side they spoil few groups: those keep 8 bits, and all others take 4 (FMPQ of COMET, arXiv 2410.12168).
The order is that of the parameters themselves, so nothing is permuted as the model runs.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.params import ParamSpec, path_name
from jaxscale.quantize.apply import contraction_of

OUTLIER = 4.0  # times the median of the channels' largest numbers


class Statistics(NamedTuple):
    """Of the rows x [K] that met a weight, float32: the sum of x x^T [..., K, K] and of |x| [..., K], the largest |x|
    [..., K]; leading dims are the weight's layers."""

    hessian: jax.Array
    total: jax.Array
    top: jax.Array


def outliers_first(params: Any, specs: Any, statistics: Mapping[str, Statistics]) -> tuple[Any, dict[str, Statistics]]:
    """Parameters that compute the same, with the channels of the residual stream and of hidden layers sorted, the
    largest first; and the statistics of these.

    The residual stream has one order in all layers: by the largest number that a channel has anywhere, in units of the
    median channel of its layer. A hidden layer has its own. Heads stay where they are.
    """
    orders = _orders(specs, statistics)

    def sort(path, spec, w):
        for dim, order in _dims(path_name(path), spec, orders):
            w = _where_it_lies(lambda w, order, dim=dim: _take(w, order, dim), w, order)
        return w

    sorted_statistics = dict(statistics)
    for path, spec in jax.tree.leaves_with_path(specs):
        name = path_name(path)
        if name in statistics and (found := _dims(name, spec, orders, contraction_of(spec))):
            [(_, order)] = found
            s = statistics[name]
            hessian = _take(_take(s.hessian, order, -1), order, -2)
            sorted_statistics[name] = Statistics(hessian, _take(s.total, order, -1), _take(s.top, order, -1))
    return jax.tree.map_with_path(sort, specs, params), sorted_statistics


def smooth_keys(params: Any, specs: Any, statistics: Mapping[str, Statistics]) -> Any:
    """Parameters that compute the same, with keys whose channels are more alike, for a cache in 4 bits.

    Keys are divided by the square root of their channels' size, and queries multiplied (arXiv 2405.04532). The two
    channels that are rotated together have one factor. Keys with a norm or a bias of their own stay as they are.
    """
    named = {path_name(path): w for path, w in jax.tree.leaves_with_path(params)}
    factors = {}
    for name, wk in named.items():
        layer, _, last = name.rpartition("/")
        if last != "wk" or name not in statistics or {f"{layer}/bk", f"{layer}/k_norm"} & set(named):
            continue
        size = _where_it_lies(_key_sizes, wk, statistics[name].hessian, spec=P())
        factor = jnp.sqrt(size / jnp.maximum(jnp.median(size, axis=-1, keepdims=True), 1e-30))
        factor = jnp.maximum(factor, 1e-2)  # of channels that are always zero
        factors[name] = 1 / factor
        factors[f"{layer}/wq"] = jnp.repeat(factor, named[f"{layer}/wq"].shape[-2] // wk.shape[-2], axis=-2)

    def scale(path, _, w):
        if (factor := factors.get(path_name(path))) is None:
            return w
        times = lambda w, factor: (w.astype(jnp.float32) * jnp.expand_dims(factor, -3)).astype(w.dtype)
        return _where_it_lies(times, w, factor)

    return jax.tree.map_with_path(scale, specs, params)


def _key_sizes(wk: jax.Array, hessian: jax.Array) -> jax.Array:
    """[..., K, H]: root of the summed squares of keys x wk, of a channel and the one that it is rotated with."""
    wk = wk.astype(jnp.float32)
    squares = (wk * jnp.einsum("...de,...ekh->...dkh", hessian, wk, precision="highest")).sum(axis=-3)
    one, other = jnp.split(jnp.maximum(squares, 0.0), 2, axis=-1)
    return jnp.tile(jnp.sqrt(one + other), 2)


def outlier_groups(top: jax.Array, group: int | None) -> jax.Array:
    """bool [K / group]: the groups that hold an outlier, of the largest numbers [K] of all channels."""
    return top.reshape(-1, group or top.size).max(axis=1) > OUTLIER * jnp.median(top)


def _orders(specs: Any, statistics: Mapping[str, Statistics]) -> dict[str, jax.Array]:
    """`embed`: the order [D] of the residual stream; path of a hidden layer's weights: that of it, [F] or [L, F]."""
    orders, stream = {}, []
    for path, spec in jax.tree.leaves_with_path(specs):
        name = path_name(path)
        if name not in statistics:
            continue
        top = statistics[name].top
        match [spec.axes[d] for d in contraction_of(spec)]:
            case ["embed"]:
                relative = top / jnp.maximum(jnp.median(top, axis=-1, keepdims=True), 1e-30)
                stream.append(relative.reshape(-1, top.shape[-1]).max(axis=0))
            case ["mlp"]:
                orders[name.rpartition("/")[0]] = jnp.argsort(-top, axis=-1)
    if stream:
        orders["embed"] = jnp.argsort(-jnp.stack(stream).max(axis=0))
    return orders


def _dims(name: str, spec: ParamSpec, orders: dict[str, jax.Array], among: Any = None) -> list[tuple[int, jax.Array]]:
    """The dims of a parameter, negative, whose channels are sorted, each with its order."""
    keys = {"embed": "embed", "mlp": name.rpartition("/")[0]}
    dims = range(-len(spec.axes), 0) if among is None else among
    return [(d, orders[key]) for d in dims if (key := keys.get(spec.axes[d] or "")) in orders]


def _take(w: jax.Array, order: jax.Array, dim: int) -> jax.Array:
    """`w` with a dim in the order [F], or [L, F] where the first dim is the layers'."""
    shape = [1] * w.ndim
    shape[dim] = order.shape[-1]
    shape[0] = order.shape[0] if order.ndim == 2 else shape[0]
    return jnp.take_along_axis(w, order.reshape(shape), axis=dim)


def _where_it_lies(fn: Any, w: jax.Array, *more: jax.Array, spec: P | None = None) -> jax.Array:
    """`fn(w, *more)`, on the mesh that w lies on, split as w is or as `spec` says."""
    if not (isinstance(w.sharding, NamedSharding) and isinstance(w.sharding.mesh, Mesh)):
        return jax.jit(fn)(w, *more)
    with jax.set_mesh(w.sharding.mesh):
        return jax.jit(jax.sharding.auto_axes(fn, out_sharding=w.sharding.spec if spec is None else spec))(w, *more)
