"""No preset makes the partitioner replicate an array on its way from one sharding to another: each is compiled with its
published widths (nothing is allocated) for the mesh that splits the most at eight devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.mesh import make_mesh
from jaxscale.models import decoder, presets
from jaxscale.params import abstract_params
from jaxscale.plan.hlo import census, compile_with_findings
from sharding_rules.rules import MEGATRON_FSDP

QUICK = ("smollm2-135m", "gemma3-1b")


# Layers with experts compile for minutes at their published widths: their steps are traced, and compiled where small.
COMPILED = [n for n in presets.PRESETS if presets.preset(n).moe is None]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in COMPILED])
def test_no_findings(name):
    cfg = presets.preset(name)
    cfg = dataclasses.replace(cfg, num_layers=2 * len(cfg.layer_pattern))  # scanned: the depth changes a trip count
    mesh = make_mesh(fsdp=2, cp=2, tp=2)
    params = abstract_params(decoder.param_specs(cfg), mesh, MEGATRON_FSDP)
    where = NamedSharding(mesh, P("fsdp", "cp"))
    names = ("tokens", "labels", "segment_ids", "positions")
    batch = {k: jax.ShapeDtypeStruct((4, 512), jnp.int32, sharding=where) for k in names}
    loss = functools.partial(decoder.loss_fn, cfg=cfg, remat="full")
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(lambda p, b: loss(p, b)[0])).lower(params, batch)
        compiled, findings = compile_with_findings(lowered)
    assert findings == []
    # Nothing of a whole parameter's gradient crosses one axis after the other.
    reduced = census(compiled).bytes["all-reduce"]
    assert reduced["fsdp+cp"] > sum(reduced.get(axis, 0) for axis in ("fsdp", "cp"))
