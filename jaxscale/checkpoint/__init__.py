"""Checkpoints: save any pytree asynchronously, restore it onto any mesh, and never load a damaged byte."""

from jaxscale.checkpoint.store import Checkpointer, CorruptCheckpointError

__all__ = ["Checkpointer", "CorruptCheckpointError"]
