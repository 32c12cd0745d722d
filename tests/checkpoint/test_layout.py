"""Layouts: every form into every other over many meshes, bit for bit against numpy; and what is refused."""

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint import Checkpointer, maps
from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.tree import named_leaves
from jaxscale.mesh import make_mesh

from .conftest import bits

L, D, N, K, H, F, V = 6, 8, 3, 1, 4, 12, 10  # three heads: tp=2 cuts none of them
SHAPES = {
    "embed": (V, D),
    "layers/attn/wq": (L, D, N, H),
    "layers/attn/wk": (L, D, K, H),
    "layers/attn/wv": (L, D, K, H),
    "layers/mlp/w_gate": (L, D, F),
    "layers/mlp/w_up": (L, D, F),
    "norm": (D,),
}
LAYER = [name for name in SHAPES if name.startswith("layers/")]


def unrolled(p):
    out = {n: x for n, x in p.items() if n not in LAYER}
    return out | {n.replace("layers/", f"layer_{i}/"): p[n][i] for n in LAYER for i in range(L)}


def fused(p):
    out = {n: x for n, x in p.items() if n not in LAYER}
    out["layers/attn/wqkv"] = np.concatenate([p[f"layers/attn/w{n}"] for n in "qkv"], axis=2)
    out["layers/mlp/w_gate_up"] = np.concatenate([p["layers/mlp/w_gate"], p["layers/mlp/w_up"]], axis=-1)
    return out


def hugging(p):
    """One array a layer, [out, in], heads merged, rotary halves interleaved, other names."""
    out = {"model.embed": p["embed"], "model.norm": p["norm"]}
    for i in range(L):
        for n in "qkv":
            w = p[f"layers/attn/w{n}"][i]
            if n != "v":
                w = w.reshape(D, -1, 2, H // 2).swapaxes(2, 3)
            out[f"model.layers.{i}.{n}_proj"] = w.reshape(D, -1).T
        out[f"model.layers.{i}.gate"] = p["layers/mlp/w_gate"][i].T
        out[f"model.layers.{i}.up"] = p["layers/mlp/w_up"][i].T
    return out


def staged(p):
    return {n: x.reshape(2, L // 2, *x.shape[1:]) if n in LAYER else x for n, x in p.items()}


def interleaved(p):
    """Three stages, layers 0 and 3 on the first, 1 and 4 on the second, 2 and 5 on the third."""
    return {n: np.stack([x[[s, s + 3]] for s in range(3)]) if n in LAYER else x for n, x in p.items()}


def widened(p):
    """The vocabulary padded to 16, each kv head three times."""
    out = p | {"embed": np.concatenate([p["embed"], np.zeros((6, D), np.float32)])}
    for n in "kv":
        out[f"layers/attn/w{n}"] = np.repeat(p[f"layers/attn/w{n}"], N // K, axis=2)
    return out


ROTARY = [0, 2, 1, 3]  # H = 4: halves (0, 1 | 2, 3) -> pairs (0, 2 | 1, 3)
FORMS = {
    "scanned": (lambda p: p, ()),
    "unrolled": (unrolled, (lay.unstack("layers/{rest}", "layer_{i}/{rest}"),)),
    "fused": (
        fused,
        (
            lay.fuse(tuple(f"layers/attn/w{n}" for n in "qkv"), "layers/attn/wqkv", axis=2, sizes=(N, K, K)),
            lay.fuse(("layers/mlp/w_gate", "layers/mlp/w_up"), "layers/mlp/w_gate_up", axis=-1, sizes=(F, F)),
        ),
    ),
    "hugging": (
        hugging,
        (
            lay.rename("embed", "model.embed"),
            lay.rename("norm", "model.norm"),
            lay.permute("layers/attn/wq", -1, ROTARY),
            lay.permute("layers/attn/wk", -1, ROTARY),
            lay.merge_dims("layers/attn/wq", -1, (N, H)),
            lay.merge_dims("layers/attn/wk", -1, (K, H)),
            lay.merge_dims("layers/attn/wv", -1, (K, H)),
            lay.transpose("layers/{part}", (0, 2, 1)),
            lay.rename("layers/attn/w{n}", "layers/{n}_proj"),
            lay.rename("layers/mlp/w_gate", "layers/gate"),
            lay.rename("layers/mlp/w_up", "layers/up"),
            lay.unstack("layers/{rest}", "model.layers.{i}.{rest}"),
        ),
    ),
    "staged": (staged, (lay.stage("layers/{rest}", stages=2),)),
    "interleaved": (interleaved, (lay.stage("layers/{rest}", stages=3, rounds=2),)),
    "widened": (
        widened,
        (
            lay.pad("embed", 0, old=V, new=16),
            lay.repeat("layers/attn/wk", 2, N // K),
            lay.repeat("layers/attn/wv", 2, N // K),
        ),
    ),
}


def on_mesh(values, mesh):
    """Spread with no regard to meaning: the first two dims that divide take (pp, fsdp, dp) and tp."""
    out = {}
    for name, x in values.items():
        spec = [None] * x.ndim
        for axes in (("pp",), ("fsdp", "dp"), ("tp",)):
            size = int(np.prod([mesh.shape[a] for a in axes]))
            free = [d for d in range(x.ndim) if spec[d] is None and x.shape[d] % size == 0]
            if free and size > 1:
                spec[free[0]] = axes
        out[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return out


def as_state(form, values, mesh=None):
    """Parameters, Adam moments and a step in one form: numpy, or ShapeDtypeStructs on a mesh."""
    params, mu, nu = (form(v) for v in values)
    count = np.asarray(5, np.int32)
    if mesh is not None:
        params, mu, nu = (on_mesh(x, mesh) for x in (params, mu, nu))
        count = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return {"params": params, "opt_state": (optax.ScaleByAdamState(count, mu, nu), optax.EmptyState()), "step": count}


def put(target, values):
    return jax.tree.map(lambda t, x: jax.device_put(x, t.sharding), target, values)


MESHES = {
    "one": {"devices": 1},
    "fsdp8": {"fsdp": 8},
    "tp8": {"tp": 8},
    "tp2": {"tp": 2, "devices": 2},
    "tp4dp2": {"tp": 4, "dp": 2},
    "fsdp3": {"fsdp": 3, "devices": 3},
    "pp2tp2": {"pp": 2, "tp": 2, "devices": 4},
    "pp3tp2": {"pp": 3, "tp": 2, "devices": 6},
}


def mesh_named(name):
    sizes = dict(MESHES[name])
    return make_mesh(devices=jax.devices()[: sizes.pop("devices", 8)], **sizes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, module_rng):
    """A checkpoint of one state in each form, each from another mesh."""
    values = [{n: module_rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()} for _ in range(3)]
    root = tmp_path_factory.mktemp("forms")
    for name, mesh in zip(FORMS, itertools.cycle(MESHES)):
        form, target = FORMS[name][0], mesh_named(mesh)
        with Checkpointer(root / name) as ckpt:
            state = put(as_state(form, values, target), as_state(form, values))
            ckpt.save(5, state, metadata={"position": 77, "form": name, "mesh": mesh})
    return root, values


@pytest.mark.parametrize("source", FORMS)
def test_every_form_into_every_other(saved, source):
    """49 pairs of (layout, mesh), optimizer state included."""
    root, values = saved
    meshes = itertools.cycle(MESHES)
    for _ in range(list(FORMS).index(source)):
        next(meshes)
    with Checkpointer(root / source) as ckpt:
        for wanted, mesh in zip(FORMS, meshes):
            layout = (*lay.inverse(FORMS[source][1]), *FORMS[wanted][1])
            target = as_state(FORMS[wanted][0], values, mesh_named(mesh))
            restored = ckpt.restore(target, layout=layout)
            assert bits(restored) == bits(as_state(FORMS[wanted][0], values)), (source, wanted, mesh)
            for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                assert got.sharding.is_equivalent_to(want.sharding, want.ndim)
        assert ckpt.metadata()["position"] == 77


def halves(x):
    return x // 10, (x % 10).astype(np.int8)


def whole_again(high, low):
    return (high * 10 + low,)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_operation_and_its_inverse_cancel(data):
    shape = data.draw(st.lists(st.sampled_from([2, 4, 6]), min_size=2, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    ops = {
        "transpose": lay.transpose("w", data.draw(st.permutations(range(len(shape))))),
        "permute": lay.permute("w", axis, data.draw(st.permutations(range(size)))),
        "pad": lay.pad("w", axis, old=size, new=size + 3),
        "repeat": lay.repeat("w", axis, 3),
        "merge": lay.merge_dims("w", 0, shape[:2]),
        "split": lay.split_dim("w", axis, (2, size // 2)),
        "stage": lay.stage("w", stages=2, rounds=shape[0] // 2),
        "unstack": lay.unstack("{rest}", "{rest}.{i}"),
        "parts": lay.split("w", ("a", "b"), axis=axis, sizes=(1, size - 1)),
        "cast": lay.cast("w", "float32", old="bfloat16"),
        "select": lay.select("w", axis, [*data.draw(st.permutations(range(size))), 0, size - 1], old=size),
        "copies": lay.copies("w", axis, 3),
        "compute": lay.compute(("w",), ("high", "low"), halves, axis=axis, inverse=whole_again),
    }
    op = ops[data.draw(st.sampled_from(sorted(ops)))]
    dtype = "bfloat16" if "cast" in str(op) else "int32"
    x = np.random.default_rng(0).integers(0, 99, shape).astype(jnp.dtype(dtype))
    there_and_back = lay.apply_layout({"w": maps.lazy(x)}, (op, *lay.inverse([op])))
    assert there_and_back.keys() == {"w"}
    assert bits(there_and_back["w"].whole()) == bits(x)
    # A box of any result is that box of the whole result.
    for result in lay.apply_layout({"w": maps.lazy(x)}, (op,)).values():
        assert result.whole().shape == result.shape and result.whole().dtype == result.dtype
        bounds = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in result.shape]
        box = tuple(slice(a, b) if a < b else slice(0, n) for (a, b), n in zip(bounds, result.shape))
        assert bits(result.read(box)) == bits(result.whole()[box])


def quantize(x):
    """Eight bits with a scale for each block of four along axis 1."""
    blocks = x.reshape(x.shape[0], -1, 4, *x.shape[2:])
    scale = np.maximum(np.abs(blocks).max(axis=2, keepdims=True) / 127, 1e-12).astype(np.float32)
    return np.round(blocks / scale).astype(np.int8).reshape(x.shape), scale.squeeze(2)


def dequantize(values, scale):
    return ((values.reshape(values.shape[0], -1, 4, *values.shape[2:]) * scale[:, :, None]).reshape(values.shape),)


def test_weights_are_quantized_on_the_way_into_shards(tmp_path, rng):
    """Float32 parameters are restored as int8 with scales, each shard quantized by itself; and back."""
    w = rng.normal(size=(4, 8, 6)).astype(np.float32)
    layout = (lay.compute(("w",), ("w/values", "w/scale"), quantize, axis=1, inverse=dequantize),)
    values, scale = quantize(w)
    mesh = make_mesh(fsdp=4, tp=2)
    sharded = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    target = {
        "w/values": sharded((4, 8, 6), np.int8, "fsdp", "tp"),
        "w/scale": sharded((4, 2, 6), np.float32, None, None, "tp"),
    }
    with Checkpointer(tmp_path / "float") as ckpt, Checkpointer(tmp_path / "int8") as small:
        ckpt.save(1, {"params": {"w": w}})
        restored = ckpt.restore({"params": target}, layout=layout)["params"]
        assert bits(restored) == bits({"w/values": values, "w/scale": scale})
        small.save(1, {"params": restored})
        back = small.restore({"params": {"w": np.zeros_like(w)}}, layout=lay.inverse(layout))["params"]["w"]
    assert bits(back) == bits(dequantize(values, scale)[0])
    assert np.abs(back - w).max() <= np.repeat(scale, 4, axis=1).max() * 0.501


def test_experts_grow_and_merge(rng):
    """A dense layer becomes four experts, four become six, six become three; moments go along."""
    w = rng.normal(size=(3, 5)).astype(np.float32)
    tree = {n: maps.lazy(w + k) for k, n in enumerate(("params/up", "opt/mu/up", "opt/nu/up"))}
    layout = (
        lay.copies("up", 0, 4),
        lay.select("up", 0, (0, 1, 2, 3, 0, 1), old=4),
    )
    grown = lay.apply_layout(tree, layout)
    for k, name in enumerate(tree):
        assert bits(grown[name].whole()) == bits(np.broadcast_to(w + k, (6, 3, 5)))
    x = rng.normal(size=(2, 6, 3)).astype(np.float32)
    merged = lay.merge("w", 1, ((0, 5), (1, 2, 4), (3,)))
    (m,) = lay.apply_layout({"w": maps.lazy(x)}, (merged,)).values()
    want = np.stack([x[:, [0, 5]].mean(1), x[:, [1, 2, 4]].mean(1), x[:, 3]], 1)
    np.testing.assert_allclose(m.whole(), want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(m.read((slice(1, 2), slice(2, 3), slice(0, 2))), x[1:2, 3:4, 0:2])
    (back,) = lay.apply_layout({"w": m}, lay.inverse((merged,))).values()
    np.testing.assert_array_equal(back.whole(), m.whole()[:, [0, 1, 1, 2, 1, 0]])
    with pytest.raises(ValueError, match=r"entries \[1\] of 3 were dropped; there is no way back"):
        lay.inverse((lay.select("w", 0, (0, 2), old=3),))
    with pytest.raises(ValueError, match=r"do not hold each of 3 entries once"):
        lay.apply_layout({"w": maps.lazy(x)}, (lay.merge("w", 2, ((0, 1), (1,))),))
    with pytest.raises(ValueError, match=r"computed array has no way back"):
        lay.inverse((lay.compute(("w",), ("q",), lambda x: (x,), axis=0),))


def test_experts_of_layers_are_arrays_of_their_own(monkeypatch, rng):
    """The layout of a Hugging Face family whose tensor names count layers and experts, there and back."""
    from jaxscale.checkpoint import huggingface
    from jaxscale.models import presets
    from jaxscale.params import ParamSpec, constant

    spec = ParamSpec((2, 12, 5, 3), ("layers", "experts", "embed", "mlp"), constant(0.0))
    monkeypatch.setattr(huggingface, "param_specs", lambda cfg: {"layers": {"moe": {"w_up": spec}}})
    name = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    monkeypatch.setitem(huggingface._TENSORS, "layers/moe/w_up", (name, ((1,), (0,))))
    layout = huggingface.hf_layout(presets.tiny())
    w = rng.normal(size=spec.shape).astype(np.float32)
    tensors = lay.apply_layout({"layers/moe/w_up": maps.lazy(w)}, layout)
    assert {n: bits(x.whole()) for n, x in tensors.items()} == {
        name.format(i, e): bits(np.ascontiguousarray(w[i, e].T)) for i in range(2) for e in range(12)
    }
    back = lay.apply_layout(tensors, lay.inverse(layout))
    assert bits(back["layers/moe/w_up"].whole()) == bits(w)


def test_restage_between_pipelines():
    x = np.arange(12 * 2).reshape(12, 2)
    two = lay.stage("w", stages=2)
    got = lay.apply_layout({"w": maps.lazy(x)}, (two, *lay.restage("w", old=2, new=3, new_rounds=2)))["w"].whole()
    np.testing.assert_array_equal(got, np.stack([x[[2 * s, 2 * s + 1, 2 * s + 6, 2 * s + 7]] for s in range(3)]))


def test_roots_are_the_trees_of_parameters_and_no_others():
    params = {"w": 0, "a": {"norm": 1}, "norm": 2}
    masked = {"w": optax.MaskedNode(), "a": {"norm": 1}, "norm": 2}
    state = {"params": params, "opt": ({"count": 0, "mu": params, "nu": masked},), "norms": {"w": 3, "x": 4}, "step": 5}
    assert sorted(lay.param_roots(named_leaves(state))) == ["opt/0/mu/", "opt/0/nu/", "params/"]
    names = named_leaves(jax.tree.map(np.float32, state))
    renamed = lay.apply_layout({n: maps.lazy(np.asarray(x)) for n, x in names.items()}, (lay.rename("norm", "scale"),))
    assert renamed.keys() - names.keys() == {"params/scale", "opt/0/mu/scale", "opt/0/nu/scale"}
    assert "params/a/norm" in renamed


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([lay.rename("nothing", "x")], r"rename nothing -> x matches no array"),
        ([lay.rename("a/w", "b")], r"makes b, which is there already"),
        ([lay.rename("{x}/w", "one")], r"makes one twice"),
        ([lay.fuse(("b", "c"), "d", axis=0, sizes=(4, 4))], r"b is there but its c is not"),
        ([lay.fuse(("a/w", "z/w"), "d", axis=0, sizes=(4, 4))], r"sizes along 0 are \(2, 3\), not \(4, 4\)"),
        ([lay.pad("b", 0, old=5, new=8)], r"dim 0 of \(4,\) is not 5"),
        ([lay.stage("a/w", stages=3)], r"\(2,\) layers do not divide over 3 stages"),
        ([lay.stack("s/{i}", "s")], r"the layers of .* are \[0, 2\], not 0..1"),
        ([lay.split("b", ("p", "q"), axis=0, sizes=(1, 1))], r"dim 0 of \(4,\) is not 2"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, message):
    tree = {"a": {"w": np.zeros((2, 5))}, "b": np.zeros(4), "z": {"w": np.zeros((3, 5))}, "s": {"0": 1.0, "2": 1.0}}
    arrays = {n: maps.lazy(np.asarray(x)) for n, x in named_leaves(tree).items()}
    with pytest.raises(ValueError, match=message) as caught:
        lay.apply_layout(arrays, layout)
    assert "\n" not in str(caught.value)


def test_a_layout_that_leaves_an_array_unmapped_is_refused_before_reading(saved):
    root, values = saved
    target = as_state(unrolled, values, mesh_named("fsdp8"))
    with Checkpointer(root / "scanned") as ckpt:
        only_mlp = (lay.unstack("layers/mlp/{rest}", "layer_{i}/mlp/{rest}"),)
        with pytest.raises(ValueError, match=r"54 missing: .*; 9 extra: opt_state/0/mu/layers/attn/wk"):
            ckpt.restore(target, layout=only_mlp)


def test_partial_restore(saved):
    root, values = saved
    target = as_state(fused, values, mesh_named("tp4dp2"))
    layout = FORMS["fused"][1]
    with Checkpointer(root / "scanned") as ckpt:
        some = ckpt.restore(target, layout=layout, only=["params/*"])
        assert bits(some["params"]) == bits(fused(values[0]))
        assert some["opt_state"] == target["opt_state"]
        with pytest.raises(ValueError, match=r"only='parms/\*' matches none"):
            ckpt.restore(target, layout=layout, only="parms/*")
        lora = {"w": jnp.full((2, 2), 3.0)}
        with pytest.raises(ValueError, match="1 missing: lora/w"):
            ckpt.restore(target | {"lora": lora}, layout=layout)
        kept = ckpt.restore(target | {"lora": lora}, layout=layout, missing="keep")
        assert kept["lora"]["w"] is lora["w"]
        assert bits(kept["params"]) == bits(fused(values[0]))
        with pytest.raises(ValueError, match="1 missing: lora/w"):
            ckpt.restore(
                target | {"lora": {"w": jax.ShapeDtypeStruct((2, 2), np.float32)}}, layout=layout, missing="keep"
            )


def test_training_continues_on_the_loss_curve(tmp_path, rng):
    """Stopped after 4 of 8 steps and resumed: on the same mesh bit for bit, through another layout and mesh too."""
    data = rng.normal(size=(8, 32, 16)).astype(np.float32)
    optimizer = optax.adamw(1e-2)

    def loss_fn(params, batch):
        return jnp.mean(jnp.square(jnp.tanh(batch @ params["layers/w"][0]) @ params["layers/w"][1] - batch))

    @jax.jit
    def train(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an integer power
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt_state": opt_state}, loss

    params = {"layers/w": jnp.asarray(rng.normal(size=(2, 16, 16)).astype(np.float32) / 4)}
    state = {"params": params, "opt_state": optimizer.init(params)}
    target = jax.eval_shape(lambda: state)
    losses, unrolled_form = [], (lay.unstack("layers/{rest}", "{rest}/{i}"),)
    with Checkpointer(tmp_path / "a") as ckpt, Checkpointer(tmp_path / "b") as other:
        for step in range(8):
            if step == 4:
                ckpt.save(step, state, metadata={"position": step})
            state, loss = train(state, data[step])
            losses.append(float(loss))
        spread = {n: NamedSharding(make_mesh(tp=4, dp=2), PartitionSpec(None, "tp")) for n in "01"}
        unrolled = {f"w/{n}": jax.ShapeDtypeStruct((16, 16), np.float32, sharding=spread[n]) for n in "01"}
        count = target["opt_state"][0].count
        moments = optax.ScaleByAdamState(count, unrolled, unrolled)
        elsewhere = {"params": unrolled, "opt_state": (moments, *target["opt_state"][1:])}
        other.save(4, ckpt.restore(elsewhere, layout=unrolled_form), metadata={"position": 4})
        for source, layout in ((ckpt, ()), (other, lay.inverse(unrolled_form))):
            resumed = source.restore(target, layout=layout)
            again = []
            for step in range(source.metadata()["position"], 8):
                resumed, loss = train(resumed, data[step])
                again.append(float(loss))
            assert again == losses[4:]
            assert bits(resumed) == bits(state)
