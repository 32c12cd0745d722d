"""Which expert lives on which device of ep, from a trace of a trained router (`decoder.router_trace`).

    placement = place(trace, num_experts=64, num_devices=8)
    params = apply_placement(params, cfg, placement)     # the same outputs, experts in another order

Each layer's experts are shared out so that every device holds the same number and the busiest device is as idle as
can be: an integer program (MoETuner, arXiv 2502.06643) solved by HiGHS. With `affinity` a layer's experts then stand
where the tokens of the layer before are already (ExFlow, arXiv 2401.08383): an assignment of whole devices, exact too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import lil_matrix

from jaxscale.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """order: int [L, E], the expert at each place; device d of D holds places d E/D to (d+1) E/D.

    gap: for each layer how far its busiest device may be from the best possible, as a share; nan where greedy.
    """

    order: np.ndarray
    num_devices: int
    gap: tuple[float, ...]


def place(
    trace: np.ndarray, *, num_experts: int, num_devices: int, affinity: bool = True, seconds: float = 10.0
) -> Placement:
    """The placement for a trace.

    Args:
      trace: int [L, B, T, K], experts of each token; numbers outside of 0..num_experts-1 are nobody's.
      affinity: keep tokens on the device that they are on, from layer to layer.
      seconds: for each layer; a program without a solution by then falls back to greedy (largest load first).

    Raises:
      ValueError: a trace of another model; devices that do not divide the experts.
    """
    trace = np.asarray(trace)
    if num_experts % num_devices:
        fits = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise ValueError(f"num_experts={num_experts} is not divisible by num_devices={num_devices}; use one of {fits}")
    if trace.ndim != 4 or trace.max(initial=-1) < 0:
        raise ValueError(f"a trace is [L, B, T, K] of experts. Got shape {trace.shape}; make it with router_trace")
    order, gaps = [], []
    for layer in trace:
        load = _load(layer, num_experts)
        groups, gap = balance(load, num_devices, seconds=seconds)
        if affinity and order:
            before = np.empty(num_experts, int)
            before[order[-1]] = np.arange(num_experts) // (num_experts // num_devices)
            groups = _follow(trace[len(order) - 1], layer, before, groups)
        order.append(np.concatenate(groups))
        gaps.append(gap)
    return Placement(order=np.stack(order), num_devices=num_devices, gap=tuple(gaps))


def balance(load: np.ndarray, num_devices: int, *, seconds: float = 10.0) -> tuple[list[np.ndarray], float]:
    """(the experts of each device, gap): equally many each, the largest sum of loads as small as can be.

    Args:
      load: [E] tokens of each expert.
    """
    E, D = len(load), num_devices
    if D == 1:
        return [np.arange(E)], 0.0
    # x[e, d] in {0, 1}; the last variable is the load of the busiest device, in even shares.
    share = np.asarray(load, float) / max(np.sum(load) / D, 1e-9)
    a = lil_matrix((E + 2 * D, E * D + 1))
    for e in range(E):
        a[e, e * D : (e + 1) * D] = 1.0
    for d in range(D):
        a[E + d, d : E * D : D] = 1.0
        a[E + D + d, d : E * D : D] = share[:, None].T
        a[E + D + d, E * D] = -1.0
    low = np.r_[np.ones(E), np.full(D, E / D), np.full(D, -np.inf)]
    high = np.r_[np.ones(E), np.full(D, E / D), np.zeros(D)]
    upper = np.r_[np.ones(E * D), np.inf]
    upper[1:D] = 0.0  # devices are alike: expert 0 is on the first
    solved = milp(
        np.r_[np.zeros(E * D), 1.0],
        constraints=LinearConstraint(a.tocsr(), low, high),
        integrality=np.r_[np.ones(E * D), 0],
        bounds=Bounds(0.0, upper),
        options={"time_limit": seconds},
    )
    greedy = _greedy(load, D)
    if solved.x is None:
        return greedy, float("nan")
    where = solved.x[:-1].reshape(E, D).argmax(axis=1)
    groups = [np.flatnonzero(where == d) for d in range(D)]
    busiest = lambda groups: max(share[g].sum() for g in groups)
    best = min(groups, greedy, key=busiest)
    bound = max(float(solved.mip_dual_bound), 1.0)
    return best, max(busiest(best) / bound - 1.0, 0.0)


def apply_placement(params: Any, cfg: ModelConfig, placement: Placement) -> Any:
    """The parameters with experts, and the router's outputs, in the placement's order: the same function.

    Raises ValueError for a placement of another model.
    """
    m = cfg.moe
    layers = cfg.num_layers - (m.first_dense if m else 0)
    if m is None or placement.order.shape != (layers, m.num_experts):
        have = "no experts" if m is None else f"{layers} layers of {m.num_experts} experts"
        raise ValueError(
            f"the placement is for {placement.order.shape[0]} layers of {placement.order.shape[1]} experts but "
            f"{cfg.name} has {have}; trace this model"
        )
    if m.num_groups > 1 or m.gating_residual:
        raise ValueError("a router with groups or gating residuals knows its experts by number; it cannot be placed")
    extra = np.arange(m.num_experts, m.num_routed)
    routed = jnp.asarray(np.concatenate([placement.order, np.tile(extra, (layers, 1))], axis=1))
    order = jnp.asarray(placement.order)
    take = jax.vmap(lambda x, order, axis: jnp.take(x, order, axis=axis), in_axes=(0, 0, None))
    moe = params["layers"]["moe"]
    experts = jax.tree.map(lambda x: take(x, order, 0), moe["experts"])
    router = {k: take(x, routed, -1) if k in ("w", "b", "balance_bias") else x for k, x in moe["router"].items()}
    moved = moe | {"experts": experts, "router": router}
    return params | {"layers": params["layers"] | {"moe": moved}}


def crossings(trace: np.ndarray, placement: Placement) -> float:
    """The share of a token's steps from an expert to one of the next layer that change the device."""
    L, E = placement.order.shape
    where = np.empty((L, E), int)
    np.put_along_axis(where, placement.order, np.arange(E)[None] // (E // placement.num_devices), axis=1)
    crossed = steps = 0
    for i in range(L - 1):
        a, b, good = _pairs(trace[i], trace[i + 1], E)
        crossed += int((where[i][a] != where[i + 1][b])[good].sum())
        steps += int(good.sum())
    return crossed / max(steps, 1)


def round_robin(num_layers: int, num_experts: int, num_devices: int) -> Placement:
    """Experts in the order of their numbers dealt out one by one: what to compare with."""
    order = np.arange(num_experts).reshape(-1, num_devices).T.ravel()
    return Placement(order=np.tile(order, (num_layers, 1)), num_devices=num_devices, gap=(float("nan"),) * num_layers)


def _load(layer: np.ndarray, num_experts: int) -> np.ndarray:
    flat = layer[(layer >= 0) & (layer < num_experts)]
    return np.bincount(flat, minlength=num_experts)


def _greedy(load: np.ndarray, num_devices: int) -> list[np.ndarray]:
    """The busiest expert left goes to the idlest device that has room."""
    groups: list[list[int]] = [[] for _ in range(num_devices)]
    sums = np.zeros(num_devices)
    for e in np.argsort(-np.asarray(load), kind="stable"):
        open_ = [d for d in range(num_devices) if len(groups[d]) < len(load) // num_devices]
        d = min(open_, key=lambda d: sums[d])
        groups[d].append(int(e))
        sums[d] += load[e]
    return [np.sort(np.array(g, int)) for g in groups]


def _follow(before_layer, layer, before: np.ndarray, groups: list[np.ndarray]) -> list[np.ndarray]:
    """The groups given to devices so that most tokens stay: an assignment, solved exactly."""
    E, D = len(before), len(groups)
    group = np.empty(E, int)
    for g, experts in enumerate(groups):
        group[experts] = g
    a, b, good = _pairs(before_layer, layer, E)
    stay = np.zeros((D, D))
    np.add.at(stay, (before[a][good], group[b][good]), 1)
    _, chosen = linear_sum_assignment(-stay)
    return [groups[g] for g in chosen]


def _pairs(first: np.ndarray, second: np.ndarray, num_experts: int):
    """Each expert of a token with each of the next layer, and which of these pairs are both somebody's."""
    a, b = np.broadcast_arrays(first[..., :, None], second[..., None, :])
    good = (a >= 0) & (a < num_experts) & (b >= 0) & (b < num_experts)
    return np.where(good, a, 0), np.where(good, b, 0), good
