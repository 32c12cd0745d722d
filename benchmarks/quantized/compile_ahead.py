"""Compiles every kernel of quantized_matmul and decode_layer for hardware that is not here; prints what compilers say.

    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py                      # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py --targets h200       # one of them
    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py --only "int4"        # calls whose name holds this

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row shows
ptxas' report: registers, bytes of them spilled, shared memory, and C7512 to C7514, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile, spills more than 64 bytes or is
serialised.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
import jax.numpy as jnp

from benchmarks.quantized.bench import CHECKS, WORKS, Work, multiply, round_for, routed, rows
from pallas_kernels import QuantizedArray
from pallas_kernels.decode_layer.api import matmul_add, matmul_gate, matmul_parts
from pallas_kernels.decode_layer.rows import Rows

TPU_CALLS = {
    "int4 g128 M=16": Work(16, group=128),
    "int4 g128 M=512": Work(512, group=128),
    "int8 M=16": Work(16, "int8"),
    "int8 channels": Work(512, "int8", None, "int8"),
    "int4 x int8": Work(16, "int4", None, "int8"),
}


DECODED = {f"decode M={M}": M for M in (1, 12, 16, 32)}


def calls(target: str):
    new = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    for name, work in (WORKS | CHECKS if target == "h200" else TPU_CALLS).items():
        G = work.K // work.group if work.group else 1
        lead = (work.G,) if work.G else ()
        scales = new(*lead, work.N // 128 if work.tiles else work.N, G, dtype=work.scales)
        unsigned = work.format == "uint4"
        values = new(*lead, work.N, work.K, dtype="int4" if unsigned else work.format)
        w = QuantizedArray(values, scales, activations=work.activations, unsigned=unsigned)  # pyright: ignore
        run = multiply(work, "mosaic_gpu" if target == "h200" else "mosaic_tpu")
        x, where = jax.eval_shape(lambda key, work=work: (rows(key, work), routed(work)), jax.random.key(0))
        x = jax.eval_shape(functools.partial(round_for, work), x) if work.rounded else x
        yield name, run, (x, w, where)
    for name, M in DECODED.items() if target == "h200" else ():
        x = new(M, 4096, dtype="bfloat16")
        normed = Rows(x, new(max(8, 1 << (M - 1).bit_length()), 128, dtype="float32"))
        w = lambda K, N: QuantizedArray(new(N, K, dtype="int4"), new(N, K // 128, dtype="bfloat16"), interleaved=True)
        yield f"{name} parts", functools.partial(matmul_parts, eps=1e-5), (normed, w(4096, 6144))
        yield f"{name} gate", functools.partial(matmul_gate, eps=1e-5), (normed, w(4096, 28672))
        yield (
            f"{name} add",
            matmul_add,
            (new(M, 14336, dtype="bfloat16"), w(14336, 4096), x, new(4096, dtype="float32")),
        )


if __name__ == "__main__":
    sys.exit(runner.compile_ahead(__doc__, ["h200", *runner.TPUS], calls, spill=64))
