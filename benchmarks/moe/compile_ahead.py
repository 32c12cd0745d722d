"""Compiles every kernel of ragged_dot and ragged_dots for hardware that is not here, and prints what the compilers say.

    JAX_PLATFORMS=cpu python benchmarks/moe/compile_ahead.py                  # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/moe/compile_ahead.py --targets h200   # one of them

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row
shows ptxas' report: registers, bytes of them spilled, shared memory, and C7512 or C7513, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile, spills or is serialised.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# This import comes before JAX: it says what to dump.
from benchmarks.attention.compile_ahead import TPUS, device  # isort: skip

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import ragged_dots

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


def compile_call(target: str, sizes) -> str:
    """Forward and backward in one program; what the compiler printed."""
    M, K, N, G, dtype, *count = sizes
    mesh = Mesh(np.array([device(target)]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    new = lambda shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    implementation = "mosaic_gpu" if target == "h200" else "mosaic_tpu"

    def run(lhs, rhs, sizes, grad):
        f = lambda lhs, rhs: ragged_dots(lhs, rhs, sizes, implementation=implementation)
        out, vjp = jax.vjp(f, lhs, rhs)
        return out, vjp(grad)

    matrices, grads = (tuple(new(s) for _ in range(*count or (1,))) for s in ((G, K, N), (M, N)))

    with jax.set_mesh(mesh), tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            jax.jit(run).lower(new((M, K)), matrices, new((G,), jnp.int32), grads).compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            file.seek(0)
            printed = file.read().decode(errors="replace")
    return printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=["h200", *TPUS])
    parser.add_argument("--only", default="", help="calls whose name holds this")
    args = parser.parse_args()
    failed = 0
    print(f"jax {jax.__version__}")
    print(f"{'target':8}{'call':16}{'kernel':24}{'registers':>10}{'spilled B':>10}{'most SMEM B':>13}")
    for target in args.targets:
        for name, sizes in CALLS.items():
            if args.only not in name or (target != "h200" and sizes[4] == jnp.float16):
                continue
            started = time.perf_counter()
            try:
                printed = compile_call(target, sizes)
            except Exception as e:
                failed += 1
                print(f"{target:8}{name:16}FAILED {type(e).__name__}: {str(e)[:1000]}", flush=True)
                continue
            smem = max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", printed)), default=0)
            reports = re.findall(
                r"properties for (\w+?)_mosaic_gpu_kernel\s+.*?(\d+) bytes spill stores.*?Used (\d+) registers",
                printed,
                re.DOTALL,
            )
            serial = re.findall(r"\((C751[23])\).*?function '(\w+?)_mosaic_gpu_kernel'", printed)
            for kernel, spilled, registers in reports:
                codes = sorted({code for code, where in serial if where == kernel})
                failed += bool(codes) or spilled != "0"
                print(
                    f"{target:8}{name:16}{kernel:24}{registers:>10}{spilled:>10}{smem:>13}  {' '.join(codes)}",
                    flush=True,
                )
            if not reports:
                print(f"{target:8}{name:16}compiled in {time.perf_counter() - started:.1f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
