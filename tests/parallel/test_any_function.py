"""auto() and fsdp_shardings(): any function and any tree on a mesh, with the gradients of one device."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import Callback, fit, make_abstract_mesh, make_mesh, make_train_state, make_train_step, put_batch
from jaxscale.plan.hlo import census
from jaxscale.sharding import auto, fsdp_shardings
from sharding_rules.rules import MESH_AXES

D, F, H, V = 16, 32, 4, 24


class Model(nnx.Module):
    """One block, as a user of nnx writes it."""

    def __init__(self, *, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(H, D, use_bias=False, decode=False, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attn(self.norm(x), mask=nnx.make_causal_mask(tokens))
        return self.embed.attend(x + self.down(nnx.gelu(self.up(self.norm(x)))))


@functools.cache
def split_model(seed):
    graphdef, params = nnx.split(Model(rngs=nnx.Rngs(seed)), nnx.Param)

    def loss_fn(params, batch):
        logits = nnx.merge(graphdef, params)(batch["tokens"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return losses.mean(), {"largest": losses.max()}

    return loss_fn, jax.device_get(params)


def make_batch(rng, rows=8):
    draw = lambda: rng.integers(0, V, (rows, 8), dtype=np.int32)
    return {"tokens": draw(), "labels": draw()}


def by_hand(params):
    split = {"query": P(None, "tp"), "key": P(None, "tp"), "value": P(None, "tp"), "out": P("tp"), "down": P("tp")}
    split |= {"up": P(None, "tp"), "embed": P("tp")}

    def spec(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return next((s for part, s in split.items() if part in name and x.ndim > 1), P())

    return jax.tree.map_with_path(spec, params)


@pytest.mark.parametrize(
    ("sizes", "tp"), [({"fsdp": 8}, False), ({"dp": 2, "fsdp": 4}, False), ({"fsdp": 2, "cp": 2, "tp": 2}, True)]
)
def test_gradients_of_an_nnx_model(sizes, tp, rng):
    loss_fn, params = split_model(int(rng.integers(2**31)))
    batch = make_batch(rng)
    (loss, aux), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)

    mesh = make_mesh(**sizes)
    shardings = fsdp_shardings(params, mesh, by_hand(params) if tp else None)
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        fn = jax.jit(jax.value_and_grad(auto(loss_fn), has_aux=True))
        (mesh_loss, mesh_aux), mesh_grads = fn(placed, put_batch(batch, mesh))

    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    np.testing.assert_allclose(mesh_aux["largest"], aux["largest"], rtol=1e-5)
    for (path, got), want, where in zip(
        jax.tree.leaves_with_path(mesh_grads), jax.tree.leaves(grads), jax.tree.leaves(shardings), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert got.sharding.is_equivalent_to(where, got.ndim), name
        difference = np.linalg.norm(np.asarray(got) - want) / np.linalg.norm(want)
        assert difference < 1e-5, f"{name}: {difference}"


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_metrics(self, step, metrics):
        self.losses.append(metrics["loss"])


def test_trains_with_state_in_the_shards_of_the_parameters(rng):
    loss_fn, params = split_model(int(rng.integers(2**31)))
    batch, optimizer = make_batch(rng), optax.adamw(1e-2)
    alone, sharded = Losses(), Losses()
    state = make_train_state(params, optimizer, jax.random.key(0))
    fit(state, make_train_step(auto(loss_fn), optimizer), iter([batch] * 3), steps=3, callbacks=[alone])

    mesh = make_mesh(fsdp=4, tp=2)
    placed = jax.device_put(params, fsdp_shardings(params, mesh, by_hand(params)))
    with jax.set_mesh(mesh):
        state = make_train_state(placed, optimizer, jax.random.key(0))
        step = make_train_step(auto(loss_fn), optimizer, accum_steps=2)
        state = fit(state, step, iter([put_batch(batch, mesh)] * 3), steps=3, callbacks=[sharded])
    moments = state.opt_state[0]
    for p, mu, nu in zip(*map(jax.tree.leaves, (state.params, moments.mu, moments.nu)), strict=True):
        assert mu.sharding == nu.sharding == p.sharding
    assert alone.losses[-1] < alone.losses[0]
    np.testing.assert_allclose(sharded.losses, alone.losses, rtol=1e-5)


def test_a_function_without_shardings_says_what_to_do(rng):
    """What JAX says of it names neither auto nor the mesh that is not set: a note does."""
    params, batch = {"w": np.eye(8, dtype=np.float32)}, {"x": rng.standard_normal((8, 8)).astype(np.float32)}
    mesh, optimizer = make_mesh(fsdp=8), optax.sgd(0.1)
    loss_fn = lambda params, batch: jnp.square(batch["x"] @ params["w"].T).mean()
    with jax.set_mesh(mesh):
        state = make_train_state(jax.device_put(params, fsdp_shardings(params, mesh)), optimizer, jax.random.key(0))
        batch = put_batch(batch, mesh)
        with pytest.raises(Exception, match="fsdp") as error:
            make_train_step(loss_fn, optimizer)(state, batch)
        assert any("make_train_step(jaxscale.auto(loss_fn), optimizer)" in note for note in error.value.__notes__)
    with pytest.raises(Exception, match="fsdp") as error:
        make_train_step(auto(loss_fn), optimizer)(state, batch)
    assert any("with jax.set_mesh(mesh)" in note for note in error.value.__notes__)


def test_keys_and_metrics_pass_through(rng):
    x = rng.standard_normal((8, 4)).astype(np.float32)

    def loss_fn(params, batch, key):
        keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
        return jnp.where(keep, batch["x"] @ params["w"], 0.0).sum(), {"kept": keep.sum()}

    params, key = {"w": np.eye(4, dtype=np.float32)}, jax.random.key(int(rng.integers(2**31)))
    want = loss_fn(params, {"x": x}, key=key)
    mesh = make_mesh(fsdp=4, tp=2)
    assert "key" in inspect.signature(auto(loss_fn)).parameters
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, fsdp_shardings(params, mesh))
        got = jax.jit(auto(loss_fn))(placed, put_batch({"x": x}, mesh), key=key)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert int(got[1]["kept"]) == int(want[1]["kept"])


def test_weights_are_gathered_not_activations(rng):
    """With fsdp alone, what travels is parameters and gradients: nothing has the batch's size."""
    loss_fn, params = split_model(int(rng.integers(2**31)))
    mesh = make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, fsdp_shardings(params, mesh))
        batch = put_batch(make_batch(rng, rows=512), mesh)
        compiled = jax.jit(jax.grad(lambda p, b: auto(loss_fn)(p, b)[0])).lower(placed, batch).compile()
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    assert 0 < sum(row.bytes for row in census(compiled).rows) < 4 * held


@pytest.mark.parametrize(
    ("shape", "spec", "sizes", "want"),
    [
        ((16, 64), None, {"fsdp": 8}, P(None, "fsdp")),
        ((64, 12), None, {"fsdp": 4, "cp": 2}, P(("fsdp", "cp"), None)),
        ((6, 9), None, {"fsdp": 8}, P(None, None)),
        ((), None, {"fsdp": 8}, P()),
        ((8, 64), P(None, "tp"), {"fsdp": 2, "tp": 4}, P(None, ("tp", "fsdp"))),
        ((32, 64), P(None, "tp"), {"fsdp": 2, "tp": 4}, P("fsdp", "tp")),
        ((64, 64), P("fsdp"), {"fsdp": 8}, P("fsdp", None)),
        ((64, 64), None, {"dp": 8}, P(None, None)),
        ((64, 32), P(None, "tp"), {"fsdp": 8}, P("fsdp", None)),
    ],
)
def test_fsdp_shardings(shape, spec, sizes, want):
    mesh = make_abstract_mesh(**sizes)
    got = fsdp_shardings([jax.ShapeDtypeStruct(shape, jnp.float32)], mesh, None if spec is None else [spec])
    assert got == [NamedSharding(mesh, want)]
    assert set(mesh.shape) == set(MESH_AXES)
