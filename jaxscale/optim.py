"""Optimizer chains from optax. The state is sharded as its parameters, since shardings are part of array types."""

from typing import Any

import jax
import optax

from jaxscale.config import OptimizerConfig
from jaxscale.params import path_name


def make_schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the decay that cfg names, down to final_fraction at `steps`."""
    warmup = min(cfg.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    peak, end = cfg.learning_rate, cfg.learning_rate * cfg.final_fraction
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=cfg.final_fraction),
        "linear": optax.linear_schedule(peak, end, rest),
        "constant": optax.constant_schedule(peak),
    }[cfg.schedule]
    # One step in, not zero: the first update of a run should move something.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, decay], [warmup]) if warmup else decay


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay for everything but norms and biases."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(
            make_schedule(cfg, steps), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=decays
        ),
    )


def decays(params: Any) -> Any:
    """A tree of booleans: which parameters weight decay shrinks. Norm scales (*norm) and biases (b*) stay."""

    def weighs(path, _):
        last = path_name(path).rsplit("/", 1)[-1]
        return not (last.endswith("norm") or last.startswith("b"))

    return jax.tree.map_with_path(weighs, params)
