"""Experts over ep equal a loop over experts on one device: outputs within 1e-5 and every gradient, in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.mesh import make_mesh
from jaxscale.parallel.expert import apply_experts, choose, gather_experts
from jaxscale.params import ParamSpec, constant

E, D, F = 8, 12, 16


def loop(x, experts, weights, p):
    """Every expert on every token, with the weight that it has there."""
    out = jnp.zeros_like(x)
    for e in range(E):
        h = jax.nn.silu(x @ p["w_gate"][e]) * (x @ p["w_up"][e])
        w = jnp.where(experts == e, weights, 0.0).sum(axis=-1)
        out = out + (h @ p["w_down"][e]) * w[..., None]
    return out


def make(rng, rows, length, top_k, routing):
    shape = (rows, length, top_k)
    ranked = np.argsort(rng.random((rows, length, E)), axis=-1)[..., :top_k]
    experts = {
        "random": ranked,
        "one expert": np.where(np.arange(top_k) == 0, 5, -1) * np.ones(shape, int),
        "one device": np.argsort(rng.random((rows, length, 2)), axis=-1)[..., :top_k] + 2,
        "few": np.where(rng.random(shape) < 0.3, ranked, E + 1),  # most are nobody's
    }[routing].astype(np.int32)
    weights = rng.random(shape, np.float32)
    size = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    p = {k: 0.4 * rng.standard_normal(s, np.float32) for k, s in size.items()}
    return rng.standard_normal((rows, length, D), np.float32), experts, weights, p


AXES = {
    "w_gate": ("experts", "embed", "mlp"),
    "w_up": ("experts", "embed", "mlp"),
    "w_down": ("experts", "mlp", "embed"),
}


@functools.lru_cache
def sharded(mesh_text, dispatch, chunks, shape):
    sizes = {k: int(n) for k, n in (part.split("=") for part in mesh_text.split(","))}
    mesh = make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)

    def loss(x, weights, p, experts, cotangent):
        specs = {k: ParamSpec(v.shape, AXES[k], constant(0.0)) for k, v in p.items()}
        p = gather_experts(p, specs, jnp.float32, x.shape[:2])
        out = apply_experts(x, experts, weights, p, dispatch=dispatch, chunks=chunks)
        return (jax.reshard(out, P()) * cotangent).sum(), out

    return mesh, jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2), has_aux=True))


def reference(x, weights, p, experts, cotangent):
    out = loop(x, experts, weights, p)
    return (out * cotangent).sum(), out


twin = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2), has_aux=True))


def check(rng, mesh_text, dispatch, routing, rows=8, length=5, top_k=2, chunks=1):
    mesh, fn = sharded(mesh_text, dispatch, chunks, (rows, length, top_k))
    x, experts, weights, p = make(rng, rows, length, top_k, routing)
    cotangent = rng.standard_normal(x.shape, np.float32)
    (_, expected), grads = twin(x, weights, p, experts, cotangent)
    with jax.set_mesh(mesh):
        (_, out), got = fn(x, weights, p, experts, cotangent)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(grads)):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=str(path))


ROUTINGS = ["random", "one expert", "one device", "few"]


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        ("ep=2", "all_to_all"),
        ("ep=4", "all_gather"),
        ("ep=4", "all_to_all"),
        ("ep=8", "all_gather"),
        ("ep=8", "all_to_all"),
    ],
)
def test_every_routing(mesh, dispatch, rng):
    for routing in ROUTINGS:
        check(rng, mesh, dispatch, routing)


@pytest.mark.parametrize(("mesh", "dispatch"), [("fsdp=2,ep=2,tp=2", "all_to_all"), ("ep=2,cp=2,tp=2", "all_gather")])
def test_with_other_axes(mesh, dispatch, rng):
    for routing in ("random", "one expert"):
        check(rng, mesh, dispatch, routing, length=6)


def test_in_chunks(rng):
    for routing in ("random", "one device"):
        check(rng, "ep=4", "all_to_all", routing, length=7, chunks=3)


def test_rows_that_do_not_divide(rng):
    """Three rows on ep=4: every device has all of them and adds what its own experts make."""
    check(rng, "ep=4", "auto", "random", rows=3)


def test_the_way_is_chosen_by_bytes():
    assert choose(2, 8) == "all_gather" and choose(64, 8) == "all_to_all"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_without_a_mesh(routing, rng):
    x, experts, weights, p = make(rng, 3, 7, 2, routing)
    np.testing.assert_allclose(apply_experts(x, experts, weights, p), loop(x, experts, weights, p), atol=1e-5)


def test_ep_that_does_not_divide(rng):
    x, experts, weights, p = make(rng, 6, 2, 2, "random")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:3], ep=3)):
        with pytest.raises(ValueError, match=r"num_experts=8 is not divisible by ep=3; use ep in \[1, 2, 4, 8\]"):
            apply_experts(x, experts, weights, p)
        with pytest.raises(ValueError, match="dispatch='none'"):
            apply_experts(x, experts, weights, p, dispatch="none")
