"""Tokens that stay where their experts are: the same generation as a loop over experts, one all_to_all a layer."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.config import MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.parallel.coherent import check_coherent, coherent_layers
from jaxscale.plan.hlo import census

L, E, D, F, T, EP, R = 3, 8, 8, 16, 4, 4, 8


def weights_of(rng):
    new = lambda *shape: jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)
    experts = {"w_gate": new(L, E, D, F), "w_up": new(L, E, D, F), "w_down": new(L, E, F, D)}
    return {"wq": new(L, D, D), "wk": new(L, D, D), "wv": new(L, D, D), "router": 4 * new(L, D, E), "experts": experts}


def norm(x):
    return x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def attend(layer, x, row, context, *, step):
    """One head; the keys and values of `step` tokens before, and its own."""
    y = norm(x)
    k, v = y @ layer["wk"], y @ layer["wv"]
    at = jnp.minimum(row, R - 1)
    keys, values = (c[at].at[:, step].set(own) for c, own in ((context["k"], k), (context["v"], v)))
    scores = jnp.einsum("RD,RTD->RT", y @ layer["wq"], keys)
    p = jax.nn.softmax(jnp.where(jnp.arange(T)[None] <= step, scores, -jnp.inf), axis=-1)
    return x + jnp.einsum("RT,RTD->RD", p, values), {"k": k, "v": v}


def route(layer, x, *, cfg):
    y = norm(x)
    probs = jax.nn.softmax(y @ layer["router"], axis=-1)
    groups = probs.reshape(-1, cfg.num_groups, E // cfg.num_groups)
    group = groups.max(axis=-1).argmax(axis=-1)
    inside = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    weights, chosen = jax.lax.top_k(inside, cfg.top_k)
    return y, (chosen + group[:, None] * (E // cfg.num_groups)).astype(jnp.int32), weights


def twin(params, x, contexts, step, *, cfg):
    added = []
    for i in range(L):
        layer, context = (jax.tree.map(operator.itemgetter(i), tree) for tree in (params, contexts))
        x, new = attend(layer, x, jnp.arange(R), context, step=step)
        y, experts, weights = route(layer, x, cfg=cfg)
        p = layer["experts"]
        for e in range(E):
            h = jax.nn.silu(y @ p["w_gate"][e]) * (y @ p["w_up"][e])
            x = x + (h @ p["w_down"][e]) * jnp.where(experts == e, weights, 0.0).sum(axis=-1, keepdims=True)
        added.append(new)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *added)


CASES = [
    MoEConfig(num_experts=E, top_k=1, mlp_dim=F),
    MoEConfig(num_experts=E, top_k=2, mlp_dim=F, num_groups=EP),
]


def test_the_same_generation(rng):
    """Two steps, of one of the cases; and what the program sends."""
    cfg = CASES[rng.integers(len(CASES))]
    params = weights_of(rng)
    mesh = make_mesh(devices=jax.devices()[:EP], ep=EP)
    specs = jax.tree.map(lambda _: P(), params) | {"experts": {k: P(None, "ep") for k in params["experts"]}}
    specs = specs, P("ep"), {"k": P(), "v": P()}, P()

    def body(params, x, contexts, step):
        steps = functools.partial(attend, step=step), functools.partial(route, cfg=cfg)
        return coherent_layers(x, params, contexts, *steps, cfg)

    contexts, run = {k: jnp.zeros((L, R, T, D)) for k in ("k", "v")}, None
    expect = jax.jit(functools.partial(twin, cfg=cfg))
    for step in range(2):
        args = params, jnp.asarray(rng.standard_normal((R, D)), jnp.float32), contexts, jnp.int32(step)
        expected, new = expect(*args)
        with jax.set_mesh(mesh):
            args = jax.device_put(args, jax.tree.map(lambda s: jax.NamedSharding(mesh, s), specs))
            run = run or jax.jit(jax.shard_map(body, out_specs=(P("ep"), P()))).lower(*args).compile()
            out, added = run(*args)
        for a, b in ((out, expected), (added["k"], new["k"]), (added["v"], new["v"])):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
        contexts = {k: contexts[k].at[:, :, step].set(new[k]) for k in contexts}
    assert run is not None
    found = census(run).counts
    assert found.pop("all-to-all") == {"ep": L}
    assert list(found) == ["all-reduce"] and found["all-reduce"]["ep"] <= 3, found  # once a step, not for each layer


def test_where_tokens_cannot_stand():
    with pytest.raises(
        ValueError, match=r"top_k=2 experts in top_groups=1 of num_groups=1 groups may be on several of ep=4"
    ):
        check_coherent(MoEConfig(num_experts=E, top_k=2, mlp_dim=F), 4)
    with pytest.raises(ValueError, match="num_experts=8 is not divisible by ep=3"):
        check_coherent(MoEConfig(num_experts=E, top_k=1, mlp_dim=F), 3)
