"""Which expert lives on which device of ep, from a trace of a trained router (`decoder.router_trace`).

    placement = place(trace, num_experts=64, num_devices=8)
    params = apply_placement(params, cfg, placement)     # the same outputs, experts in another order

    busy = replicate(trace, num_experts=64, num_devices=8, num_replicas=8)
    params, cfg = apply_replicas(params, cfg, busy)      # the same outputs, for inference

Each layer's experts are shared out so that every device holds the same number and the busiest device is as idle as
can be: an integer program (MoETuner, arXiv 2502.06643) solved by HiGHS, or, where it is too large, the largest load
first. Copies of busy experts (as in DeepSeek's EPLB) even out what no order can. With `affinity` a layer's experts then
stand where the tokens of the layer before are already (ExFlow, arXiv 2401.08383), as far as that leaves the load even:
a second program for each layer, given the layer before.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import block_array, coo_array, eye, kron

from jaxscale.config import ModelConfig

_LARGEST = 8192  # experts times devices of a program that HiGHS is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """order: int [L, P], the expert at each place; device d of D holds places d P/D to (d+1) P/D. P is the number of
    experts, or more where some have copies.

    gap: for each layer how far its busiest device may be from the best possible, as a share.
    """

    order: np.ndarray
    num_devices: int
    gap: tuple[float, ...]


def place(
    trace: np.ndarray,
    *,
    num_experts: int,
    num_devices: int,
    affinity: bool = True,
    slack: float = 0.1,
    seconds: float = 10.0,
) -> Placement:
    """The placement for a trace.

    Args:
      trace: int [L, B, T, K], experts of each token; numbers outside of 0..num_experts-1 are nobody's.
      affinity: keep tokens on the device that they are on, from layer to layer.
      slack: how much more than in the best balance the busiest device may have to do for that, as a share.
      seconds: for each layer; a program without a solution by then falls back to greedy (largest load first).

    Raises:
      ValueError: a trace of another model; devices that do not divide the experts.
    """
    trace = _checked(trace)
    if num_experts % num_devices:
        fits = [d for d in range(1, num_experts + 1) if num_experts % d == 0]
        raise ValueError(f"num_experts={num_experts} is not divisible by num_devices={num_devices}; use one of {fits}")
    order, gaps = [], []
    for layer in trace:
        load = _load(layer, num_experts)
        groups, gap = balance(load, num_devices, seconds=seconds)
        if affinity and order:
            before = np.empty(num_experts, int)
            before[order[-1]] = np.arange(num_experts) // (num_experts // num_devices)
            best = max(load[g].sum() for g in groups)
            groups = _follow(trace[len(order) - 1], layer, before, groups, load, (1 + slack) * best, seconds)
            gap = (1 + gap) * max(load[g].sum() for g in groups) / max(best, 1) - 1
        order.append(np.concatenate(groups))
        gaps.append(gap)
    return Placement(order=np.stack(order), num_devices=num_devices, gap=tuple(gaps))


def replicate(
    trace: np.ndarray, *, num_experts: int, num_devices: int, num_replicas: int, seconds: float = 10.0
) -> Placement:
    """A placement with `num_replicas` more places, each a copy of the expert whose copies have most to do (EPLB).

    Args: as of `place`. Copies of an expert share its tokens; where they stand is balanced as experts are.

    Raises:
      ValueError: a trace of another model; devices that do not divide the places.
    """
    places = num_experts + num_replicas
    if num_replicas < 0 or places % num_devices:
        fits = [n for n in range(num_experts) if (num_experts + n) % num_devices == 0]
        raise ValueError(
            f"num_experts={num_experts} + num_replicas={num_replicas} is not divisible by num_devices={num_devices}; "
            f"use num_replicas in {fits[:8]}"
        )
    order, gaps = [], []
    for layer in _checked(trace):
        load = _load(layer, num_experts).astype(float)
        copies = np.ones(num_experts, int)
        for _ in range(num_replicas):
            copies[(load / copies).argmax()] += 1
        expert = np.repeat(np.arange(num_experts), copies)
        groups, gap = balance((load / copies)[expert], num_devices, seconds=seconds)
        order.append(expert[np.concatenate(groups)])
        gaps.append(gap)
    return Placement(order=np.stack(order), num_devices=num_devices, gap=tuple(gaps))


def balance(load: np.ndarray, num_devices: int, *, seconds: float = 10.0) -> tuple[list[np.ndarray], float]:
    """(the experts of each device, gap): equally many each, the largest sum of loads as small as can be.

    Args:
      load: [E] tokens of each expert.
      seconds: a program that has no solution by then, or that is too large, falls back to greedy.
    """
    E, D = len(load), num_devices
    if D == 1:
        return [np.arange(E)], 0.0
    share = np.asarray(load, float) / max(np.sum(load) / D, 1e-9)
    greedy = _greedy(load, D)
    busiest = lambda groups: max(share[g].sum() for g in groups)
    least = max(1.0, share.max())  # no device has less than an even share, nor less than its one busy expert
    if E * D > _LARGEST or busiest(greedy) <= least:
        return greedy, busiest(greedy) / least - 1.0
    # x[e, d] in {0, 1}; the last variable is the load of the busiest device, in even shares.
    once, room, busy = kron(eye(E), np.ones((1, D))), _sums(np.ones(E), D), _sums(share, D)
    a = block_array([[once, None], [room, None], [busy, coo_array(-np.ones((D, 1)))]])
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
    if solved.x is None:
        return greedy, busiest(greedy) / least - 1.0
    where = solved.x[:-1].reshape(E, D).argmax(axis=1)
    groups = [np.flatnonzero(where == d) for d in range(D)]
    best = min(groups, greedy, key=busiest)
    bound = max(float(solved.mip_dual_bound), least)
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


def apply_replicas(params: Any, cfg: ModelConfig, placement: Placement) -> tuple[Any, ModelConfig]:
    """Parameters and configuration with the copies of `replicate`: the same function, for inference. The router stays
    as it is; tokens take the copies of an expert in turn.

    Raises ValueError for a placement of another model.
    """
    m = cfg.moe
    layers = cfg.num_layers - (m.first_dense if m else 0)
    known = m is not None and not m.num_replicas and len(placement.order) == layers
    if m is None or not known or any(set(row) != set(range(m.num_experts)) for row in placement.order.tolist()):
        have = "no experts" if m is None else f"{layers} layers of {m.num_experts} experts, {m.num_replicas} copies"
        raise ValueError(
            f"the placement is for {placement.order.shape[0]} layers of {placement.order.max() + 1} experts but "
            f"{cfg.name} has {have}; trace this model, without copies"
        )
    replicas = placement.order.shape[1] - m.num_experts
    if not replicas:
        raise ValueError("the placement has no copies; use apply_placement, or replicate with num_replicas above 0")
    rows = [[np.flatnonzero(order == e) for e in range(m.num_experts)] for order in placement.order]
    places = jnp.asarray([[np.resize(at, 1 + replicas) for at in row] for row in rows], jnp.int32)
    moe, order = params["layers"]["moe"], jnp.asarray(placement.order)
    experts = jax.tree.map(lambda x: jax.vmap(lambda x, order: jnp.take(x, order, axis=0))(x, order), moe["experts"])
    moved = moe | {"experts": experts, "places": places}
    cfg = dataclasses.replace(cfg, moe=dataclasses.replace(m, num_replicas=replicas))
    return params | {"layers": params["layers"] | {"moe": moved}}, cfg


def busiest_device(trace: np.ndarray, placement: Placement) -> np.ndarray:
    """[L]: the load of each layer's busiest device over an even share; copies share their expert's tokens evenly."""
    found = []
    for layer, order in zip(np.asarray(trace), placement.order, strict=True):
        load = _load(layer, int(placement.order.max()) + 1)
        each = (load / np.maximum(np.bincount(order, minlength=len(load)), 1))[order]
        found.append(each.reshape(placement.num_devices, -1).sum(axis=1).max() * placement.num_devices / each.sum())
    return np.array(found)


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


def _checked(trace: np.ndarray) -> np.ndarray:
    trace = np.asarray(trace)
    if trace.ndim != 4 or not np.issubdtype(trace.dtype, np.integer) or trace.max(initial=-1) < 0:
        raise ValueError(
            f"a trace is [L, B, T, K] of experts' numbers. Got {trace.dtype}{trace.shape}; make it with router_trace"
        )
    return trace


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


def _follow(before_layer, layer, before, groups, load, limit: float, seconds: float) -> list[np.ndarray]:
    """Experts given to devices so that most tokens stay and no device has more than `limit` to do: an integer program.
    Where it is too large or has no solution in time: `groups` as they are, given to devices so (an assignment)."""
    E, D = len(before), len(groups)
    a, b, good = _pairs(before_layer, layer, E)
    stay = np.zeros((E, D))  # tokens of an expert that are on a device already
    np.add.at(stay, (b[good], before[a][good]), 1)
    _, chosen = linear_sum_assignment(-np.stack([stay[g].sum(axis=0) for g in groups], axis=1))
    moved = [groups[g] for g in chosen]
    if E * D > _LARGEST:
        return moved
    solved = milp(
        -stay.ravel(),
        constraints=[LinearConstraint(_sums(np.ones(E), D), E // D, E // D), LinearConstraint(_sums(load, D), 0, limit)]
        + [LinearConstraint(kron(eye(E), np.ones((1, D))).tocsr(), 1, 1)],
        integrality=np.ones(E * D),
        bounds=Bounds(0, 1),
        options={"time_limit": seconds},
    )
    if solved.x is None:
        return moved
    where = solved.x.reshape(E, D).argmax(axis=1)
    kept = lambda groups: sum(stay[g, d].sum() for d, g in enumerate(groups))
    return max(moved, [np.flatnonzero(where == d) for d in range(D)], key=kept)


def _sums(weights: np.ndarray, num_devices: int):
    """The matrix that takes x [E * D], where experts are, to each device's sum of weights."""
    return kron(np.asarray(weights, float)[None], eye(num_devices)).tocsr()


def _pairs(first: np.ndarray, second: np.ndarray, num_experts: int):
    """Each expert of a token with each of the next layer, and which of these pairs are both somebody's."""
    a, b = np.broadcast_arrays(first[..., :, None], second[..., None, :])
    good = (a >= 0) & (a < num_experts) & (b >= 0) & (b < num_experts)
    return np.where(good, a, 0), np.where(good, b, 0), good
