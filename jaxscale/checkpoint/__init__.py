"""Checkpoints: save any pytree asynchronously, restore it onto any mesh, and never load a damaged byte."""

from jaxscale.checkpoint.reading import CorruptCheckpointError
from jaxscale.checkpoint.store import Checkpointer

__all__ = ["Checkpointer", "CorruptCheckpointError"]
