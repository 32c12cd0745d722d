"""Checkpoints: save any pytree asynchronously, restore it onto any mesh and layout, and never load a damaged byte.

The public names load on first use, so that a keeper (`memory.keeper`) starts without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxscale.checkpoint.levels import Level, Levels, open_levels
    from jaxscale.checkpoint.memory.checkpointer import MemoryCheckpointer
    from jaxscale.checkpoint.reading import CorruptCheckpointError
    from jaxscale.checkpoint.remote import RemoteCheckpointer
    from jaxscale.checkpoint.snapshot import HostPool
    from jaxscale.checkpoint.store import Checkpointer
    from jaxscale.checkpoint.tools import convert_step, diff_steps, export_step, list_steps, open_step, verify_step

_HOMES = {
    "levels": ("Level", "Levels", "open_levels"),
    "memory.checkpointer": ("MemoryCheckpointer",),
    "reading": ("CorruptCheckpointError",),
    "remote": ("RemoteCheckpointer",),
    "snapshot": ("HostPool",),
    "store": ("Checkpointer",),
    "tools": ("convert_step", "diff_steps", "export_step", "list_steps", "open_step", "verify_step"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxscale.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxscale.checkpoint.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
