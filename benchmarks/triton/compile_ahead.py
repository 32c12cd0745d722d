"""Compiles every Triton kernel for GPUs that are not here, and prints what ptxas says of each.

    JAX_PLATFORMS=cpu python benchmarks/triton/compile_ahead.py                     # A100, L4 and H200
    JAX_PLATFORMS=cpu python benchmarks/triton/compile_ahead.py --targets a100 --only attention

Needs jax[cuda13] in an environment of its own (5 GB) and no device. A row shows registers and bytes of registers
spilled. Exits with 1 when a kernel does not compile, for want of shared memory say.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
import jax.numpy as jnp

from pallas_kernels import QuantizedArray, attention, quantized_matmul, ragged_dot

# (B, T, N, K, H, Hv), and what hides keys.
ATTENTION = {
    "causal": ((4, 4096, 16, 16, 128, 128), {"causal": True}),
    "H64": ((4, 4096, 16, 16, 64, 64), {"causal": True}),
    "H256": ((2, 4096, 16, 16, 256, 256), {"causal": True}),
    "MLA 192/128": ((2, 4096, 16, 16, 192, 128), {"causal": True}),
    "H80, GQA": ((4, 4096, 32, 8, 80, 80), {"causal": True}),
    "packed, cap": ((2, 1000, 8, 2, 128, 128), {"causal": True, "soft_cap": 30.0, "ids": True}),
}
RAGGED = {"8 groups": (16384, 4096, 14336, 8), "64 groups": (32768, 2048, 1408, 64), "decode": (512, 2048, 768, 128)}
# M, dtype, group of a weight [8192, 8192], activations
QUANTIZED = {
    **{f"int4 M={M}": (M, jnp.int4, 128, None) for M in (1, 16, 64, 256)},
    "int8 M=1": (1, jnp.int8, 8192, None),
    "int8 g128 M=64": (64, jnp.int8, 128, None),
    "int4 g32": (8, jnp.int4, 32, None),
    "int8 x int8": (4096, jnp.int8, 8192, "int8"),
}


def calls(target: str):
    new = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    for name, ((B, T, N, K, H, Hv), hidden) in ATTENTION.items():
        hidden = dict(hidden)
        arrays = [new(B, T, N, H), new(B, T, K, H), new(B, T, K, Hv), new(B, T, N, Hv)]
        if hidden.pop("ids", False):
            arrays.append(new(B, T, dtype=jnp.int32))

        def attend(q, k, v, do, ids=None, hidden=hidden):
            f = functools.partial(attention, segment_ids=ids, **hidden, implementation="triton")
            o, vjp = jax.vjp(f, q, k, v)
            return o, vjp(do)

        yield f"attention {name}", attend, arrays
    for name, (M, K, N, G) in RAGGED.items():

        def multiply(lhs, rhs, sizes, grad):
            y, vjp = jax.vjp(lambda *x: ragged_dot(*x, sizes, implementation="triton"), lhs, rhs)
            return y, vjp(grad)

        yield f"ragged_dot {name}", multiply, [new(M, K), new(G, K, N), new(G, dtype=jnp.int32), new(M, N)]
    for name, (M, dtype, group, activations) in QUANTIZED.items():

        def widen(x, values, scales, activations=activations):
            return quantized_matmul(x, QuantizedArray(values, scales, activations=activations), implementation="triton")

        yield f"quantized {name}", widen, [new(M, 8192), new(8192, 8192, dtype=dtype), new(8192, 8192 // group)]


if __name__ == "__main__":
    sys.exit(runner.compile_ahead(__doc__, runner.GPUS, calls, spill=None))
