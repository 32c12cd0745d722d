"""Compiles every kernel of quantized_matmul for hardware that is not here, and prints what the compilers say.

    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py                      # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py --targets h200       # one of them
    JAX_PLATFORMS=cpu python benchmarks/quantized/compile_ahead.py --only "int4"        # calls whose name holds this

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row shows
ptxas' report: registers, bytes of them spilled, shared memory, and C7512 to C7514, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile, spills more than 64 bytes or is
serialised.
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

from benchmarks.quantized.bench import CHECKS, WORKS, Work, multiply
from pallas_kernels import QuantizedArray

TPU_CALLS = {
    "int4 g128 M=16": Work(16, group=128),
    "int4 g128 M=512": Work(512, group=128),
    "int8 M=16": Work(16, "int8"),
    "int8 channels": Work(512, "int8", None, "int8"),
    "int4 x int8": Work(16, "int4", None, "int8"),
}


def compile_call(target: str, work: Work) -> str:
    """What the compiler printed."""
    mesh = Mesh(np.array([device(target)]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    new = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    G = work.K // work.group if work.group else 1
    lead = (work.G,) if work.G else ()
    scales = new((*lead, work.N // 128 if work.tiles else work.N, G), jnp.dtype(work.scales))
    unsigned = work.format == "uint4"
    values = new((*lead, work.N, work.K), jnp.dtype("int4" if unsigned else work.format))
    w = QuantizedArray(values, scales, activations=work.activations, unsigned=unsigned)  # pyright: ignore
    implementation = "mosaic_gpu" if target == "h200" else "mosaic_tpu"
    run = multiply(work, implementation)
    with jax.set_mesh(mesh), tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            jax.jit(run).lower(new((work.M, work.K), jnp.bfloat16), w, new((work.G,), jnp.int32)).compile()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            file.seek(0)
            printed = file.read().decode(errors="replace")
    return printed


def report(target: str, name: str, work: Work) -> int:
    """Prints the rows of a call; how many say that something is wrong."""
    started, failed = time.perf_counter(), 0
    try:
        printed = compile_call(target, work)
    except Exception as e:
        print(f"{target:8}{name:24}FAILED {type(e).__name__}: {str(e)[:1000]}", flush=True)
        return 1
    smem = max(map(int, re.findall(r"smem_scratch_bytes=(\d+)", printed)), default=0)
    pattern = r"properties for (\w+?)_mosaic_gpu_kernel\s+.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    codes = " ".join(sorted(set(re.findall(r"C751[234]", printed))))
    reports = re.findall(pattern, printed, re.DOTALL)
    for kernel, spilled, registers in reports:
        failed += bool(codes) or int(spilled) > 64
        print(f"{target:8}{name:24}{kernel:20}{registers:>10}{spilled:>10}{smem:>9}  {codes}", flush=True)
    if not reports:
        print(f"{target:8}{name:24}compiled in {time.perf_counter() - started:.1f} s", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=["h200", *TPUS])
    parser.add_argument("--only", default="", help="calls whose name holds this")
    args = parser.parse_args()
    failed = 0
    print(f"jax {jax.__version__}")
    print(f"{'target':8}{'call':24}{'kernel':20}{'registers':>10}{'spilled B':>10}{'SMEM B':>9}")
    for target in args.targets:
        for name, work in (WORKS | CHECKS if target == "h200" else TPU_CALLS).items():
            if args.only in name:
                failed += report(target, name, work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
