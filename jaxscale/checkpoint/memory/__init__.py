"""Checkpoints in the memory of other processes and hosts: `checkpointer` (training's side), `keeper`, `wire`.

Imports nothing, so that a keeper starts without JAX.
"""
