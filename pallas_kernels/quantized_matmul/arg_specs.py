"""Matmuls of real models, for tests and benchmarks: rows M, contracted K, outputs N, format and group of the weight."""

from typing import NamedTuple


class ArgSpec(NamedTuple):
    name: str
    M: int
    K: int
    N: int
    format: str
    group: int | None
    activations: str | None = None


_LLAMA = {"qkv": (4096, 6144), "out": (4096, 4096), "up": (4096, 28672), "down": (14336, 4096)}

ARG_SPECS = (
    *(ArgSpec(f"square int4 g128 M={M}", M, 8192, 8192, "int4", 128) for M in (1, 8, 16, 64)),
    *(ArgSpec(f"square int8 M={M}", M, 8192, 8192, "int8", None) for M in (1, 8, 16, 64)),
    *(ArgSpec(f"llama3-8b {n} int4 g128 M=1", 1, K, N, "int4", 128) for n, (K, N) in _LLAMA.items()),
    ArgSpec("smollm2-135m down uint4 g32", 1, 1536, 576, "uint4", 32),
    ArgSpec("square int8 x int8", 8192, 8192, 8192, "int8", None, "int8"),
    ArgSpec("square fp8 x fp8", 8192, 8192, 8192, "float8_e4m3fn", None, "float8_e4m3fn"),
    ArgSpec("square fp8 x fp8 tiles of 128", 8192, 8192, 8192, "float8_e4m3fn", 128, "float8_e4m3fn"),
)
