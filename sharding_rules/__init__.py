"""Tensor-parallel rules for any model, derived from its own program."""

from sharding_rules.hardware import HARDWARE, Hardware
from sharding_rules.infer import Inferred, infer
from sharding_rules.plan import Plan
from sharding_rules.rules import MEGATRON_FSDP, MESH_AXES, Rules
from sharding_rules.search import evaluate, search

__all__ = [
    "HARDWARE", "MEGATRON_FSDP", "MESH_AXES", "Hardware", "Inferred", "Plan", "Rules", "evaluate", "infer", "search",
]  # fmt: skip
