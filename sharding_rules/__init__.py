"""Tensor-parallel rules for any model, derived from its own program.

The names below load on first use: tables of rules and hardware need no JAX, so that a command's help need not wait.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharding_rules.hardware import HARDWARE, Hardware
    from sharding_rules.infer import Inferred, infer
    from sharding_rules.plan import Plan
    from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules
    from sharding_rules.search import evaluate, search

_HOMES = {
    "hardware": ("HARDWARE", "Hardware"),
    "infer": ("Inferred", "infer"),
    "plan": ("Plan",),
    "rules": ("MEGATRON_FSDP", "MESH_AXES", "Rules"),
    "search": ("evaluate", "search"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "HARDWARE", "MEGATRON_FSDP", "MESH_AXES", "Hardware", "Inferred", "Plan", "Rules", "evaluate", "infer", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'sharding_rules' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sharding_rules.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """Whoever imports the modules `infer` and `search`, these names of the package stay the functions in them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("infer", "search") and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
