"""Compiles the kernels of norm_rope for an H200 that is not here: registers, and bytes of them spilled.

    JAX_PLATFORMS=cpu python benchmarks/norm_rope/compile_ahead.py

Needs jax[cuda13] and no device. Exits with 1 when a kernel does not compile or spills.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
import jax.numpy as jnp

from pallas_kernels import norm_rope

HEADS = [(16, 128), (8, 128), (6, 128), (1, 128), (16, 64), (9, 64), (8, 256), (1, 256)]


def calls(target: str, B: int = 4, T: int = 4096):
    """Forward and backward in one program."""
    new = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)

    def run(x, scale, cos, sin, grad):
        y, vjp = jax.vjp(lambda x, scale: norm_rope(x, scale, cos, sin, implementation="mosaic_gpu"), x, scale)
        return y, vjp(grad)

    for N, H in HEADS:
        x, turn = new(B, T, N, H, dtype=jnp.bfloat16), new(B, T, H // 2)
        yield f"{N} heads of {H}", run, (x, new(H), turn, turn, x)


if __name__ == "__main__":
    sys.exit(runner.compile_ahead(__doc__, ["h200"], calls))
