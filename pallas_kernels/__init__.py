"""Kernels: arrays in, arrays out, one shard, no mesh; depends on jax alone."""

from pallas_kernels.attention.api import attention, attention_backward, attention_implementation
from pallas_kernels.attention.float8 import attention_float8
from pallas_kernels.decode_attention.api import decode_attention, decode_attention_implementation
from pallas_kernels.float8_grads.api import float8_grads_implementation, gated_grads, round_both
from pallas_kernels.norm_rope.api import norm_rope, norm_rope_implementation
from pallas_kernels.peer_rows.api import collect_at_home, peer_rows_implementation, spread_from_peers
from pallas_kernels.quantize_rows.api import quantize_rows, quantize_rows_implementation
from pallas_kernels.quantized_matmul.api import quantized_matmul, quantized_matmul_implementation
from pallas_kernels.quantized_matmul.array import QuantizedArray, QuantizedRows, quantize_array
from pallas_kernels.ragged_all_to_all.api import ragged_all_to_all, ragged_all_to_all_implementation
from pallas_kernels.ragged_dot.api import ragged_dot, ragged_dot_implementation, ragged_dots
from pallas_kernels.spread_rows.api import spread_rows, spread_rows_implementation

__all__ = [
    "QuantizedArray",
    "QuantizedRows",
    "attention",
    "attention_backward",
    "attention_float8",
    "attention_implementation",
    "collect_at_home",
    "decode_attention",
    "decode_attention_implementation",
    "float8_grads_implementation",
    "gated_grads",
    "norm_rope",
    "norm_rope_implementation",
    "peer_rows_implementation",
    "quantize_array",
    "quantize_rows",
    "quantize_rows_implementation",
    "quantized_matmul",
    "quantized_matmul_implementation",
    "ragged_all_to_all",
    "ragged_all_to_all_implementation",
    "ragged_dot",
    "ragged_dot_implementation",
    "ragged_dots",
    "round_both",
    "spread_from_peers",
    "spread_rows",
    "spread_rows_implementation",
]
