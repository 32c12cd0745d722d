"""jaxscale.plan for functions that the library did not write."""

import dataclasses
import math
import subprocess
import sys
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxscale.plan  # the package is a function as well
from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder, presets
from jaxscale.params import abstract_params, init_params
from jaxscale.plan import function
from jaxscale.plan.aot import CompiledStep, MemoryUse
from jaxscale.plan.function import plan
from jaxscale.plan.hardware import find_pod
from jaxscale.plan.hlo import Census
from sharding_rules.hardware import find_hardware
from sharding_rules.rules import MEGATRON_FSDP


def shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def loss_fn(params, x, y):
    h = jax.nn.relu(x @ params["up"] + params["bias"])
    return jnp.mean((h @ params["down"] - y) ** 2)


def sizes(rng):
    D, F, B = 64 * int(rng.integers(1, 4)), 256 * int(rng.integers(1, 4)), 32 * int(rng.integers(1, 4))
    params = {"up": shape(D, F), "bias": shape(1, F), "down": shape(F, D)}
    return params, (shape(B, D), shape(B, D)), (B, D, F)


def test_any_function_gets_the_fastest_of_its_meshes(rng):
    params, batch, (B, D, F) = sizes(rng)
    found = jaxscale.plan(loss_fn, params, *batch, topology="h200:1x8")
    tried = {o.mesh for o in found.options} | {m for m, _ in found.refused}
    assert len(tried) >= 6 and all(m.num_devices == 8 and B % (m.dp * m.fsdp) == 0 for m in tried)
    assert found.best.seconds == min(o.seconds for o in found.options)
    numbers = D * F * 2 + F
    for o in found.options:  # a parameter, a gradient and two moments, each split as its spec says
        held = sum(leaf.bytes for leaf in o.rules.leaves)
        assert o.state_bytes == 4 * held >= 4 * 4 * numbers / 8
        alone = plan(loss_fn, params, *batch, topology="h200:1x8", mesh=o.mesh).best
        assert alone.seconds == o.seconds and str(alone.mesh) == str(o.mesh)
    specs = found.best.rules.specs
    assert jax.tree.structure(specs) == jax.tree.structure(params)


def test_a_mesh_that_is_set_changes_nothing(rng):
    """As in a notebook: parameters lie on a mesh, and the model constrains what it computes where one is set."""
    cfg = dataclasses.replace(presets.tiny(), num_layers=2, embed_dim=64, mlp_dim=128, vocab_size=256)
    tokens = {"tokens": rng.integers(0, 256, (16, 32), dtype=np.int32)}
    batch = tokens | {"labels": tokens["tokens"]}
    loss = lambda params, batch: decoder.loss_fn(params, batch, cfg)
    specs = decoder.param_specs(cfg)
    ask = lambda params: plan(loss, params, batch, topology="cpu:4", mesh="fsdp=2,tp=2", compile=True)
    mesh = make_mesh(MeshConfig(fsdp=4, tp=2))
    with jax.set_mesh(mesh):
        inside = ask(init_params(jax.random.key(0), specs, mesh, MEGATRON_FSDP))
    outside = ask(abstract_params(specs))
    assert inside.best.rules.specs == outside.best.rules.specs
    assert inside.best.compiled is not None and outside.best.compiled is not None
    assert inside.best.compiled.memory == outside.best.compiled.memory
    assert "models/decoder.py:" in str(inside)  # lines of the model, though the program was rewritten


def test_activations_are_what_the_backward_pass_keeps(rng):
    """Two sines keep two cosines; what they multiply is the parameter and the batch, which are there anyway."""
    B, D = 32, 64 * int(rng.integers(1, 5))
    found = plan(lambda p, x: jnp.sin(jnp.sin(x @ p)).sum(), shape(D, D), shape(B, D), topology="h200:1x8")
    assert found.best.activation_bytes == 2 * B * D * 4 / 8


def test_a_notebook_shows_pictures_and_the_parameters(rng):
    params, batch, _ = sizes(rng)
    found = plan(loss_fn, params, *batch, topology="v5e:2x4")
    page = found._repr_html_()
    assert page.count("<svg") == 2 and "down" in page and str(found.best.mesh) in page
    assert "loss_fn on v5e:2x4" in str(found) and "down" in str(found)


def test_the_compiler_confirms_the_fastest(rng, monkeypatch):
    """Two meshes compiled for simulated devices: state and collectives as predicted, integers left alone."""
    monkeypatch.setattr(function, "TOP", 2)
    D, B = 64 * int(rng.integers(2, 5)), 8 * int(rng.integers(1, 4))
    params = {"up": shape(D, 4 * D), "bias": shape(1, 4 * D), "down": shape(4 * D, D)}
    params["steps"] = jax.ShapeDtypeStruct((), jnp.int32)
    aux = lambda p, x, y: (loss_fn(p, x, y), {"rows": x.sum()})
    found = jaxscale.plan(aux, params, shape(B, D), shape(B, D), topology="cpu:4", compile=True)
    asked = [o for o in found.options if o.compiled]
    assert len(asked) == 2 and asked == list(found.options[:2])
    assert asked[0].seconds <= asked[1].seconds
    for o in asked:
        assert o.compiled.census.wire_bytes() == pytest.approx(o.sent, rel=0.05, abs=64)
        floats = sum(leaf.bytes for leaf in o.rules.leaves if leaf.dtype == "float32")
        rows = math.prod(getattr(o.mesh, a) for a in o.rules.rules.compute.get("batch", ()))
        # Parameters and two moments, the batch, two counters.
        assert o.compiled.memory.arguments == 3 * floats + 2 * 4 * B * D / rows + 2 * 4
        assert o.bytes == o.compiled.memory.total
    page = found._repr_html_()
    assert page.count("<svg") == 3 and "by the compiler" in page and "by the compiler" in str(found)


def test_a_mesh_without_room_is_behind_those_that_the_compiler_takes(rng, monkeypatch):
    params, batch, _ = sizes(rng)
    full = plan(loss_fn, params, *batch, topology="h200:1x4").best.mesh
    census, memory = Census(()), MemoryUse(10, 20, 30, 0)
    answer = CompiledStep(find_pod("h200:1x4"), full, memory, census, [], 1.0, 1.0, 1, cast(Any, None))

    def refuse_the_best(option, *_):
        if option.mesh == full:
            raise ValueError("no room in hbm")
        return answer._replace(mesh=option.mesh)

    monkeypatch.setattr(function, "_compile", refuse_the_best)
    found = plan(loss_fn, params, *batch, topology="h200:1x4", compile=True)
    assert found.best.mesh != full and found.best.bytes == 60
    assert [o.no_room for o in found.options if o.mesh == full] == ["no room in hbm"]
    # Nothing is sent by these programs: of each prediction what it takes to send is gone.
    alone = plan(loss_fn, params, *batch, topology="h200:1x4", mesh=found.best.mesh).best
    assert found.best.seconds < alone.seconds or alone.sent == 0
    with pytest.raises(ValueError, match=r"finds no room; .*: no room in hbm") as error:
        plan(loss_fn, params, *batch, topology="h200:1x4", mesh=full, compile=True)
    assert "\n" not in str(error.value)


def test_what_cannot_be_planned_is_said_in_one_line(rng):
    params, _, (_, D, _) = sizes(rng)
    odd = (shape(7, D), shape(7, D))
    with pytest.raises(ValueError, match=r"<lambda> returns float32\[64, \d+\], not a loss; plan its mean"):
        plan(lambda params, x, y: x, params, shape(64, D), shape(64, D), topology="h200:1x8")
    with pytest.raises(ValueError, match="7 rows divide over no mesh of 64 devices"):
        plan(loss_fn, params, *odd, topology="h200:8x8")
    with pytest.raises(ValueError, match="nearest are v5p"):
        plan(loss_fn, params, *odd, topology="v5p:3x3x3")
    with pytest.raises(ValueError, match="topology=8 is the name of a pod, such as"):
        plan(loss_fn, params, *odd, topology=8)  # pyright: ignore[reportArgumentType]
    big = {"up": shape(2**18, 2**18), "bias": shape(1, 2**18), "down": shape(2**18, 2**18)}
    rows = (shape(8, 2**18), shape(8, 2**18))
    with pytest.raises(ValueError, match=r"fits no mesh of h200:1x8: .*the smallest needs [\d.]+ GB") as error:
        plan(loss_fn, big, *rows, topology="h200:1x8")
    assert math.prod((2**18, 2**18)) * 2 * 16 / 8 > find_hardware("h200").memory and "\n" not in str(error.value)


def test_the_package_is_light_until_it_is_called():
    code = (
        "import jaxscale.plan, sys; assert 'sharding_rules.search' not in sys.modules; assert callable(jaxscale.plan)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
