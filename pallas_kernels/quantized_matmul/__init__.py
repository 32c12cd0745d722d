"""Matmul with quantized weights: int8, int4, fp8, fp4 values with scales and offsets."""
