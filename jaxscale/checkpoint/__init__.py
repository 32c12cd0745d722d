"""Checkpoints: save any pytree asynchronously, restore it onto any mesh and layout, and never load a damaged byte."""

from jaxscale.checkpoint.reading import CorruptCheckpointError
from jaxscale.checkpoint.store import Checkpointer
from jaxscale.checkpoint.tools import convert_step, diff_steps, list_steps, open_step, verify_step

__all__ = [
    "Checkpointer",
    "CorruptCheckpointError",
    "convert_step",
    "diff_steps",
    "list_steps",
    "open_step",
    "verify_step",
]
