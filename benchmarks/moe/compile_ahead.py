"""Compiles every kernel of ragged_dot and ragged_dots for hardware that is not here, and prints what the compilers say.

    JAX_PLATFORMS=cpu python benchmarks/moe/compile_ahead.py                  # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/moe/compile_ahead.py --targets h200   # one of them

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row
shows ptxas' report: registers, bytes of them spilled, shared memory, and C7512 or C7513, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile, spills or is serialised.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
import jax.numpy as jnp

from pallas_kernels import ragged_dots
from pallas_kernels.ragged_dot.gated import ragged_dot_gated

# M, K, N, G, dtype, matrices for each group
CALLS = {
    "Mixtral": (16384, 4096, 14336, 8, jnp.bfloat16),
    "Mixtral down": (16384, 14336, 4096, 8, jnp.bfloat16),
    "64 groups": (32768, 2048, 1408, 64, jnp.bfloat16),
    "64 groups f16": (32768, 2048, 1408, 64, jnp.float16),
    "Qwen3-MoE": (262144, 2048, 768, 128, jnp.bfloat16, 2),
    "decode": (512, 2048, 768, 128, jnp.bfloat16),
    "decode down": (512, 768, 2048, 128, jnp.bfloat16),
    "GPT-OSS": (16384, 2880, 2880, 32, jnp.bfloat16),
    "ragged": (1001, 192, 320, 5, jnp.bfloat16),
}


def calls(target: str):
    """Forward and backward in one program."""
    implementation = "mosaic_gpu" if target == "h200" else "mosaic_tpu"

    def run(lhs, rhs, sizes, grad):
        f = lambda lhs, rhs: ragged_dots(lhs, rhs, sizes, implementation=implementation)
        out, vjp = jax.vjp(f, lhs, rhs)
        return out, vjp(grad)

    for name, (M, K, N, G, dtype, *count) in CALLS.items():
        if target == "h200" or dtype == jnp.bfloat16:
            new = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
            matrices, grads = (tuple(new(*s) for _ in range(*count or (1,))) for s in ((G, K, N), (M, N)))
            yield name, run, (new(M, K), matrices, new(G, dtype=jnp.int32), grads)
    for name in ("64 groups", "Qwen3-MoE", "decode") if target == "h200" else ():
        M, K, N, G, dtype, *_ = CALLS[name]
        new = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
        rest = new(M, 1, dtype=jnp.float32), new(G, dtype=jnp.int32)
        yield f"{name}, gated", ragged_dot_gated, (new(M, K), new(G, K, N), new(G, K, N), *rest)


if __name__ == "__main__":
    sys.exit(runner.compile_ahead(__doc__, ["h200", *runner.TPUS], calls))
