"""Resolution of specs (properties), its notes, and the layout of activations."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.mesh import make_abstract_mesh, make_mesh
from jaxscale.models import decoder, presets
from jaxscale.params import abstract_params
from jaxscale.sharding import constrain, einsum, enter, explain, gather_params
from sharding_rules.resolve import resolve_spec
from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules

SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 8, 9, 12, 16, 30, 64, 97, 128])
LOGICAL = st.sampled_from([None, *MEGATRON_FSDP.params, "head_dim", "batch"])
DIMS = st.lists(st.tuples(SIZES, LOGICAL), max_size=5)
MESHES = st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4, 8]) for axis in MESH_AXES})


def axes_in(entry):
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


@hypothesis.given(DIMS, MESHES, st.booleans())
def test_a_spec_divides_uses_an_axis_once_and_explains_the_rest(dims, mesh, spill):
    shape, logical = [size for size, _ in dims], [name for _, name in dims]
    spec, notes = resolve_spec(shape, logical, MEGATRON_FSDP.params, mesh, MEGATRON_FSDP.spill if spill else ())

    placed = [axes_in(entry) for entry in spec]
    used = [axis for axes in placed for axis in axes]
    assert len(used) == len(set(used))
    for size, axes in zip(shape, placed, strict=True):
        assert size % math.prod(mesh[a] for a in axes) == 0
        assert all(mesh[a] > 1 for a in axes)
    for dim, axes in enumerate(placed):
        for axis in axes:
            asked = logical[dim] is not None and axis in MEGATRON_FSDP.params.get(logical[dim], ())
            # What a dim did not ask for was spilled from one that did, and a note says so.
            assert asked or (spill and axis in MEGATRON_FSDP.spill and any(f"{axis} splits" in note for note in notes))
    for name in filter(None, logical):
        for axis in MEGATRON_FSDP.params.get(name, ()):
            assert mesh[axis] == 1 or axis in used or any(f"kept whole over {axis}" in note for note in notes)


def test_notes_give_the_numbers():
    mesh = {"fsdp": 4, "cp": 1, "tp": 2}
    assert resolve_spec((9, 64), ("q_heads", "head_dim"), MEGATRON_FSDP.params, mesh) == (
        P(None, None),
        ("q_heads=9 is not divisible by tp=2: kept whole over tp",),
    )
    spec, notes = resolve_spec((30, 9, 576), (None, "embed", "mlp"), {"embed": ("fsdp",)}, mesh, spill=("fsdp",))
    assert spec == P(None, None, "fsdp")
    assert notes == ("embed=9 is not divisible by fsdp=4: fsdp splits mlp=576 instead",)


def test_wrong_rules_and_axes_are_refused():
    with pytest.raises(ValueError, match="2 dims but axes"):
        resolve_spec((2, 3), ("embed",), MEGATRON_FSDP.params, {})
    with pytest.raises(ValueError, match="'data'"):
        resolve_spec((2,), ("embed",), {"embed": ("data",)}, {"fsdp": 2})
    with pytest.raises(ValueError, match="tuple of distinct"):
        Rules(params={"embed": "fsdp"}, compute={})


def test_without_a_mesh_nothing_happens(rng):
    x, w = jnp.asarray(rng.standard_normal((2, 4, 8))), jnp.asarray(rng.standard_normal((8, 6)))
    assert constrain(x, ("batch", "seq", "embed")) is x
    assert enter(x, ("batch", "seq", "embed"), (w, w)) == [x, x]
    out = einsum("BTD,DF->BTF", x, w, axes=("batch", "seq", "mlp"))
    want = np.einsum("BTD,DF->BTF", x, w)
    np.testing.assert_allclose(out, want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_layouts_show_in_types():
    """Traced on 64 devices that are not there: what enters a block, what leaves it, and the gradients' own layout."""
    cfg = presets.tiny()
    specs = decoder.param_specs(cfg)["layers"]["mlp"]
    specs = {k: s.__class__(s.shape[1:], s.axes[1:], s.init, s.dtype) for k, s in specs.items()}
    mesh = make_abstract_mesh(dp=2, fsdp=4, cp=2, tp=4)

    def f(x, w):
        w = gather_params(w, specs, jnp.float32, rows=x.shape[:2])
        (y,) = enter(x, ("batch", "seq", "embed"), (w["w_up"],))
        h = jnp.einsum("BTD,DF->BTF", y, w["w_up"])
        seen.update(y=y, w=w["w_up"], h=h)
        return einsum("BTF,FD->BTD", h, w["w_down"], axes=("batch", "norm_seq", "embed")).sum()

    seen = {}
    where = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
    x = jax.ShapeDtypeStruct((16, 64, cfg.embed_dim), jnp.float32, sharding=where(("dp", "fsdp"), ("cp", "tp"), None))
    w = abstract_params(specs, mesh, MEGATRON_FSDP)
    with jax.sharding.use_abstract_mesh(mesh):
        grads = jax.eval_shape(jax.grad(f, argnums=(0, 1)), x, w)
    spec = {k: jax.typeof(v).sharding.spec for k, v in seen.items()}
    assert spec["y"] == P(("dp", "fsdp"), "cp", None, reduced={"tp"})
    assert spec["w"] == P(None, "tp", reduced={"dp", "fsdp", "cp"})
    assert spec["h"] == P(("dp", "fsdp"), "cp", "tp")
    assert grads[0].sharding.spec == x.sharding.spec
    assert [g.sharding.spec for g in jax.tree.leaves(grads[1])] == [p.sharding.spec for p in jax.tree.leaves(w)]


def test_explain_gives_bytes_and_reasons():
    cfg = presets.smollm2_135m()
    mesh = make_mesh(fsdp=4, tp=2)
    table = explain(decoder.param_specs(cfg), mesh)
    rows = {row[0]: row for row in table.rows}
    _, shape, axes, spec, size, note = rows["layers/attn/wq"]
    assert (shape, axes) == ("30x576x9x64", "layers embed q_heads head_dim")
    assert spec == "P(·, fsdp, ·, ·)"
    assert size == "9.5 MiB"  # 30 * 576 * 9 * 64 * 4 bytes over 4 shards
    assert "q_heads=9 is not divisible by tp=2: kept whole over tp" in note
    assert rows["layers/mlp/w_up"][5] == ""
    assert "fsdp=4,tp=2" in table.title
    total = sum(math.prod(s.shape) for s in jax.tree.leaves(decoder.param_specs(cfg))) * 4
    assert rows["all"][1] == f"{total // 4:,} numbers"
