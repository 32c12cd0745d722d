"""Every preset's training step traces for 1,024 devices that are not here; gradients and optimizer state are sharded as
the parameters are."""

import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.config import MeshConfig, OptimizerConfig
from jaxscale.mesh import make_abstract_mesh
from jaxscale.models import decoder, presets
from jaxscale.optim import make_optimizer
from jaxscale.params import abstract_params
from jaxscale.train import TrainState, make_train_step
from sharding_rules.rules import MEGATRON_FSDP

SEQ_LEN = 4096
# Wider or deeper than another of their family and no different otherwise: `make quick` traces that one.
LARGER = (
    *("llama3-70b", "llama3-405b", "qwen3-8b", "qwen3-32b", "smollm2-1-7b", "gemma2-9b", "gemma3-4b", "gemma3-12b"),
    *("qwen3-235b-a22b", "gpt-oss-120b"),
)


def trace_step(cfg, mesh_config, batch_size):
    """The state before and after a traced step, its metrics, the types of the gradients that reach the optimizer."""
    mesh = make_abstract_mesh(mesh_config)
    grads = {}

    def record(updates, state, params=None):
        grads["types"] = [jax.typeof(g) for g in jax.tree.leaves(updates)]
        return updates, state

    recorder = optax.GradientTransformation(lambda _: optax.EmptyState(), record)
    optimizer = optax.chain(recorder, make_optimizer(OptimizerConfig(), 100))
    loss_fn = functools.partial(decoder.loss_fn, cfg=cfg, remat="full")
    with jax.sharding.use_abstract_mesh(mesh):
        params = abstract_params(decoder.param_specs(cfg), mesh, MEGATRON_FSDP)
        where = NamedSharding(mesh, P(("dp", "fsdp", "ep"), "cp"))
        names = ("tokens", "labels", "segment_ids", "positions")
        batch = {k: jax.ShapeDtypeStruct((batch_size, SEQ_LEN), jnp.int32, sharding=where) for k in names}
        state = TrainState(
            step=jax.ShapeDtypeStruct((), jnp.int32),
            params=params,
            opt_state=jax.eval_shape(optimizer.init, params),
            key=jax.eval_shape(lambda: jax.random.key(0)),
        )
        after, metrics = jax.eval_shape(make_train_step(loss_fn, optimizer), state, batch)
    return state, after, metrics, grads["types"]


def spec_of(x):
    return None if x.sharding is None else x.sharding.spec


def check(cfg, mesh_config):
    batch_size = 2 * mesh_config.dp * mesh_config.fsdp * mesh_config.ep
    state, after, metrics, grads = trace_step(cfg, mesh_config, batch_size)
    wanted = [(p.shape, p.dtype, spec_of(p)) for p in jax.tree.leaves(state.params)]
    assert any(any(spec) for _, _, spec in wanted)  # something is split
    assert [(g.shape, g.dtype, spec_of(g)) for g in grads] == wanted
    assert [(p.shape, p.dtype, spec_of(p)) for p in jax.tree.leaves(after.params)] == wanted
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert [(m.shape, m.dtype, spec_of(m)) for m in moments] == wanted * 2  # AdamW's two
    assert [spec_of(m) for m in jax.tree.leaves(after.opt_state) if m.ndim] == [spec_of(m) for m in moments]
    assert {"loss", "nll", "grad_norm"} <= set(metrics)
    # Nothing large rests whole: a device holds a 64th of a matrix at most. Biases of experts rest over ep and tp alone.
    for p, spec in zip(jax.tree.leaves(state.params), jax.tree.leaves(decoder.param_specs(cfg))):
        if p.size > 10_000_000 and len(set(spec.axes) - {"layers", "experts"}) > 1:
            assert math.prod(p.sharding.shard_shape(p.shape)) <= p.size / 64


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in LARGER else name for name in presets.PRESETS]
)
def test_train_step_on_the_preset_mesh_of_1024(name):
    cfg = presets.preset(name)
    check(cfg, presets.preset_mesh(cfg, 1024))


@pytest.mark.parametrize(
    "mesh",
    ["dp=4,fsdp=32,cp=4,tp=2", "fsdp=64,tp=16", "dp=2,fsdp=128,ep=4", "fsdp=16,cp=64"],
)
def test_train_step_on_meshes_that_do_not_divide_everything(mesh):
    """Nine heads, three kv heads, one width of 576: the fallbacks trace too."""
    check(presets.smollm2_135m(), MeshConfig.parse(mesh))
