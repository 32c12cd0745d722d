"""jaxscale: shard a model that is a pure function over any mesh, prove it, run it at the speed of the hardware.

The public names below load on first use, so that `import jaxscale` costs little more than `import jax`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxscale.config import (
        CheckpointConfig,
        DataConfig,
        MeshConfig,
        ModelConfig,
        OptimizerConfig,
        RopeScaling,
        TrainConfig,
    )
    from jaxscale.mesh import make_abstract_mesh, make_mesh
    from jaxscale.params import ParamSpec, abstract_params, init_params, param_shardings
    from jaxscale.plan.hlo import census, compile_with_findings
    from jaxscale.sharding import auto, constrain, explain, fsdp_shardings
    from jaxscale.train import Callback, TrainState, fit, make_train_state, make_train_step, put_batch
    from sharding_rules.rules import MEGATRON_FSDP, Rules

_HOMES = {
    "jaxscale.config": (
        "CheckpointConfig",
        "DataConfig",
        "MeshConfig",
        "ModelConfig",
        "OptimizerConfig",
        "RopeScaling",
        "TrainConfig",
    ),
    "jaxscale.mesh": ("make_abstract_mesh", "make_mesh"),
    "jaxscale.params": ("ParamSpec", "abstract_params", "init_params", "param_shardings"),
    "jaxscale.plan.hlo": ("census", "compile_with_findings"),
    "jaxscale.sharding": ("auto", "constrain", "explain", "fsdp_shardings"),
    "jaxscale.train": ("Callback", "TrainState", "fit", "make_train_state", "make_train_step", "put_batch"),
    "sharding_rules.rules": ("MEGATRON_FSDP", "Rules"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "plan", "quantize"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in ("plan", "quantize"):  # packages that can be called: jaxscale.plan(loss_fn, params, batch, topology=...)
        return importlib.import_module(f"jaxscale.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxscale' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
