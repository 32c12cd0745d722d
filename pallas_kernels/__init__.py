"""Kernels: arrays in, arrays out, one shard, no mesh; depends on jax alone."""

from pallas_kernels.attention.api import attention, attention_backward, attention_implementation

__all__ = ["attention", "attention_backward", "attention_implementation"]
