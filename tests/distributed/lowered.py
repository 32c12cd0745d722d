"""Prints, for each mesh, a fingerprint of a training step as it goes to the compiler."""

import dataclasses
import hashlib
import sys

import jax
import jax.numpy as jnp
from worker import config

from jaxscale import MeshConfig, make_mesh, make_train_step
from jaxscale.models import decoder
from jaxscale.optim import make_optimizer
from jaxscale.parallel.context_cost import plan
from jaxscale.train import abstract_train_state

for text in sys.argv[1:]:
    cfg = dataclasses.replace(config(), mesh=MeshConfig.parse(text), remat="dots")
    mesh, (B, T) = make_mesh(cfg.mesh), (cfg.data.batch_size, cfg.data.seq_len)
    context, _ = plan(cfg.mesh.fill(mesh.size), cfg.model, B, T) if cfg.mesh.cp > 1 else (None, "")

    def loss_fn(params, batch, cfg=cfg, context=context):
        return decoder.loss_fn(params, batch, cfg.model, remat=cfg.remat, context=context)

    optimizer = make_optimizer(cfg.optimizer, cfg.steps)
    rows = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = dict.fromkeys(("tokens", "labels", "segment_ids", "positions"), rows)
    with jax.set_mesh(mesh):
        state = abstract_train_state(decoder.param_specs(cfg.model), optimizer, mesh)
        step = make_train_step(loss_fn, optimizer).lower(state, batch).as_text()
    print(text, hashlib.sha256(step.encode()).hexdigest())
