"""Compiles the kernels of norm_rope for an H200 that is not here: registers, and bytes of them spilled.

    JAX_PLATFORMS=cpu python benchmarks/norm_rope/compile_ahead.py

Needs jax[cuda13] and no device. Exits with 1 when a kernel does not compile or spills.
"""

import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# This import comes before JAX: it says what to dump.
from benchmarks.attention.compile_ahead import device  # isort: skip

import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import norm_rope

HEADS = [(16, 128), (8, 128), (6, 128), (1, 128), (16, 64), (9, 64), (8, 256), (1, 256)]


def compile_call(N: int, H: int, B: int = 4, T: int = 4096) -> str:
    """Forward and backward in one program; what the compiler printed."""
    mesh = Mesh(np.array([device("h200")]), ("x",))
    new = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )

    def run(x, scale, cos, sin, grad):
        y, vjp = jax.vjp(lambda x, scale: norm_rope(x, scale, cos, sin, implementation="mosaic_gpu"), x, scale)
        return y, vjp(grad)

    x, turn = new(B, T, N, H, dtype=jnp.bfloat16), new(B, T, H // 2)
    with jax.set_mesh(mesh), tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            jax.jit(run).lower(x, new(H), turn, turn, x).compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            file.seek(0)
            printed = file.read().decode(errors="replace")
    return printed


def main() -> int:
    failed = 0
    print(f"jax {jax.__version__}")
    print(f"{'heads':>6}{'head_dim':>9}  {'kernel':16}{'registers':>10}{'spilled B':>10}")
    for N, H in HEADS:
        report = r"properties for (\w+?)_mosaic_gpu_kernel\s+.*?(\d+) bytes spill stores.*?Used (\d+) registers"
        reports = re.findall(report, compile_call(N, H), re.DOTALL)
        failed += len(reports) != 2
        for kernel, spilled, registers in reports:
            failed += spilled != "0"
            print(f"{N:6}{H:9}  {kernel:16}{registers:>10}{spilled:>10}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
