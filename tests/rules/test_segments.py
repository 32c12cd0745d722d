"""Fused projections are computed by segments: the same numbers, one product, and no more traffic than three apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding_rules import evaluate, infer
from sharding_rules.applied import Cut, by_segments
from tests.rules.models.case import arrays, attend

N, K, H, D = 8, 4, 8, 64
SIZES = (N * H, K * H, K * H)


def _attention(q, k, v, wo):
    b, t = q.shape[:2]
    q, k, v = q.reshape(b, t, N, H), k.reshape(b, t, K, H), v.reshape(b, t, K, H)
    k, v = (jnp.broadcast_to(y[:, :, :, None], (b, t, K, N // K, H)).reshape(b, t, N, H) for y in (k, v))
    return attend(q, k, v).reshape(b, t, -1) @ wo


def fused(p, x):
    """Grouped heads from one projection with a bias, then gate and up from another; cut in two ways."""
    q, k, v = jnp.split(x @ p["wqkv"] + p["bias"].reshape(1, 1, -1), np.cumsum(SIZES)[:-1].tolist(), -1)
    x = x + _attention(q, k, v, p["wo"])
    y = 2.0 * (x @ p["w_in"])
    x = x + (jax.nn.silu(y[..., :96]) * y[..., 96:]) @ p["w_out"]
    return (x * x).mean()


def apart(p, x):
    q, k, v = (x @ p["w" + n] + p["b" + n].reshape(1, 1, -1) for n in "qkv")
    x = x + _attention(q, k, v, p["wo"])
    x = x + (jax.nn.silu(2.0 * (x @ p["w_gate"])) * (2.0 * (x @ p["w_up"]))) @ p["w_out"]
    return (x * x).mean()


SHAPES = arrays({"wqkv": (D, sum(SIZES)), "bias": (sum(SIZES),), "wo": (N * H, D), "w_in": (D, 192), "w_out": (96, D)})
X = jax.ShapeDtypeStruct((8, 16, D), jnp.float32)


def _fill(tree, rng):
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.1, s.dtype), tree)


def test_each_fused_projection_is_found():
    model = infer(fused, SHAPES, X)
    cuts = dict(zip(model.paths, (model.cut(i) for i in range(len(model.paths))), strict=True))
    assert {path: cut.sizes for path, cut in cuts.items() if cut} == {"wqkv": SIZES, "bias": SIZES, "w_in": (96, 96)}
    assert cuts["wqkv"].groups == K  # a group has the query heads of one key-value head, and that


def test_the_numbers_do_not_change(rng):
    model = infer(fused, SHAPES, X)
    cut = by_segments(fused, [model.cut(i) for i in range(len(model.paths))])
    params, x = _fill((SHAPES, X), rng)
    got, want = (jax.jit(jax.value_and_grad(f))(params, x) for f in (cut, fused))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), got, want)
    products = lambda f: str(jax.make_jaxpr(f)(params, x)).count(" dot_general[")
    assert products(cut) == products(fused)  # one product for all segments


def test_a_dim_of_three_is_cut_too(rng):
    """x @ w reshaped to (3, N, H) and taken apart, as vision transformers write it, under a scan."""

    def fn(p, x):
        def body(x, w):
            b, t, _ = x.shape
            q, k, v = (x @ w["qkv"] + w["b"].reshape(1, 1, -1)).reshape(b, t, 3, N, H).transpose(2, 0, 1, 3, 4)
            x = x + attend(q, k, v, causal=False).reshape(b, t, -1) @ w["proj"]
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        x, _ = jax.lax.scan(body, x, p)
        return (x * x).mean()

    shapes = {
        "qkv": (2, D, 3 * N * H),
        "b": (2, 3 * N * H),
        "proj": (2, N * H, D),
        "up": (2, D, 96),
        "down": (2, 96, D),
    }
    model = infer(fn, arrays(shapes), X)
    cuts = dict(zip(model.paths, (model.cut(i) for i in range(len(model.paths))), strict=True))
    assert {path for path, cut in cuts.items() if cut} == {"qkv", "b"}
    assert cuts["qkv"] == Cut(dim=-1, sizes=(N * H,) * 3, groups=N)
    params, x = _fill((arrays(shapes), X), rng)
    cut = by_segments(fn, list(cuts.values()))
    got, want = (jax.jit(jax.value_and_grad(f))(params, x) for f in (cut, fn))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
    found = evaluate(model, {"fsdp": 2, "tp": 4}, {"q_heads": ("tp",), "mlp": ("tp",)}).verify(fn, params, x)
    assert found.byte_error < 0.05, str(found)
    assert found.error is not None
    assert found.error < 1e-5
    gathers = [c.bytes for c in found.collectives if c.kind == "all-gather"]
    assert max(gathers) == 4 * D * 3 * N * H  # a layer at a time


@pytest.mark.parametrize("use", ["tanh", "transpose", "jit", "other cut", "twice"])
def test_what_has_no_rule_is_joined(use, rng):
    """The fused activation is used as a whole, or cut elsewhere, beside being cut into its segments."""

    def fn(p, x):
        y = x @ p["w"]
        a, b = jnp.split(y, 2, -1)
        whole = {
            "tanh": lambda: jnp.cumsum(jnp.tanh(y), -1),
            "transpose": lambda: y.T,
            "jit": lambda: jax.jit(lambda y: y * 2)(y),
            "other cut": lambda: y[:, 3:9],
            "twice": lambda: y @ y.T,
        }[use]()
        return (a * b).sum() + jnp.sin(whole).sum()

    params, x = {"w": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)}, jnp.asarray(rng.normal(size=(4, 8)), "f4")
    cut = by_segments(fn, [Cut(dim=-1, sizes=(6, 6), groups=3)])
    np.testing.assert_allclose(cut(params, x), fn(params, x), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        jax.grad(cut)(params, x),
        jax.grad(fn)(params, x),
    )


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 4}, {"fsdp": 4, "tp": 2}], ids=str)
def test_fused_sends_what_three_apart_send(mesh):
    """But for the fused weight, which rests whole over tp: its gradient is gathered, and so is all that is stored."""
    pieces = {"wq": (D, N * H), "wk": (D, K * H), "wv": (D, K * H), "bq": (N * H,), "bk": (K * H,), "bv": (K * H,)}
    shapes = {n: s for n, s in SHAPES.items() if n in ("wo", "w_out")}
    shapes |= arrays(pieces | {"w_gate": (D, 96), "w_up": (D, 96)})
    rules = dict.fromkeys(("kv_heads", "q_groups", "q_heads", "mlp"), ("tp",))
    found = {}
    for name, fn, params in (("fused", fused, SHAPES), ("apart", apart, shapes)):
        found[name] = evaluate(infer(fn, params, X), mesh, rules).verify(fn, params, X)
        assert found[name].byte_error < 0.05, str(found[name])
        assert found[name].error is not None
        assert found[name].error < 1e-5
    n, stored = mesh["tp"], mesh.get("fsdp", 1)
    size = 4 * (D * (sum(SIZES) + 192) + sum(SIZES)) * (n - 1) / n
    gathered = size + size * (stored - 1) / stored
    assert found["fused"].compiled_bytes <= found["apart"].compiled_bytes + gathered
