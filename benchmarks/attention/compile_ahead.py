"""Compiles every attention kernel for hardware that is not here, and prints what the compilers say.

    JAX_PLATFORMS=cpu python benchmarks/attention/compile_ahead.py                  # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/attention/compile_ahead.py --targets h200   # one of them

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row
shows ptxas' report: bytes of registers spilled, shared memory, and C7512 or C7513, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile or is serialised.
"""

import argparse
import os
import pathlib
import re
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
# libtpu lets one process at a time own the chips; here are none, and several may compile.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import attention

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# (B, T, N, K, H, Hv), and what hides keys.
CALLS = {
    "causal": ((4, 4096, 16, 16, 128, 128), {"causal": True}),
    "full": ((4, 4096, 16, 16, 128, 128), {}),
    "GQA 32/8": ((4, 4096, 32, 8, 128, 128), {"causal": True}),
    "H64": ((4, 4096, 16, 16, 64, 64), {"causal": True}),
    "H256": ((2, 4096, 16, 16, 256, 256), {"causal": True}),
    "MLA 192/128": ((2, 4096, 16, 16, 192, 128), {"causal": True}),
    "packed": ((1, 16384, 16, 16, 128, 128), {"causal": True, "ids": True, "positions": True}),
    "window": ((1, 32768, 16, 16, 128, 128), {"causal": True, "window": 1024}),
    "bias": ((4, 4096, 16, 16, 128, 128), {"causal": True, "bias": True}),
    "ragged, cap, sinks": ((2, 1000, 8, 2, 128, 128), {"causal": True, "soft_cap": 30.0, "sinks": True}),
}


def device(target: str):
    if target == "h200":
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name="h200",
            target_config=(HERE / "h200.txtpb").read_text(),
            topology="1x1x1",
        ).devices[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target]).devices[0]


def compile_call(target: str, sizes, hidden) -> str:
    """Forward and backward in one program; what the compiler printed."""
    B, T, N, K, H, Hv = sizes
    hidden = dict(hidden)
    mesh = Mesh(np.array([device(target)]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    new = lambda shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=here)
    arrays = {"q": new((B, T, N, H)), "k": new((B, T, K, H)), "v": new((B, T, K, Hv)), "do": new((B, T, N, Hv))}
    if hidden.pop("ids", False):
        arrays["segment_ids"] = new((B, T), jnp.int32)
    if hidden.pop("positions", False):
        arrays["positions"] = new((B, T), jnp.int32)
    if hidden.pop("sinks", False):
        arrays["sinks"] = new((N,), jnp.float32)
    if hidden.pop("bias", False):
        arrays["bias"] = new((1, N, T, T), jnp.float32)
    implementation = "mosaic_gpu" if target == "h200" else "mosaic_tpu"

    def run(q, k, v, do, **more):
        f = lambda q, k, v: attention(q, k, v, **hidden, **more, implementation=implementation)
        o, vjp = jax.vjp(f, q, k, v)
        return o, vjp(do)

    with jax.set_mesh(mesh), tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            jax.jit(run).lower(**arrays).compile()
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
    print(f"jax {jax.__version__}\n{'target':8}{'call':20}{'kernel':16}{'spilled B':>10}{'most SMEM B':>13}  warnings")
    for target in args.targets:
        for name, (sizes, hidden) in CALLS.items():
            if args.only not in name or ("bias" in hidden and target != "h200"):  # the TPU kernels take none
                continue
            try:
                printed = compile_call(target, sizes, hidden)
            except Exception as e:
                failed += 1
                print(f"{target:8}{name:20}FAILED {type(e).__name__}: {str(e)[:300]}", flush=True)
                continue
            smem = re.findall(r"smem_scratch_bytes=(\d+)", printed)
            spills = re.findall(
                r"Function properties for (\w+?)_mosaic_gpu_kernel\s+.*?(\d+) bytes spill stores", printed
            )
            serial = re.findall(r"\((C751[23])\).*?function '(\w+?)_mosaic_gpu_kernel'", printed)
            for kernel, spilled in spills:  # printed in another order than the resources
                codes = sorted({code for code, where in serial if where == kernel})
                failed += bool(codes)
                print(
                    f"{target:8}{name:20}{kernel:16}{spilled:>10}{max(map(int, smem)):>13}  {' '.join(codes)}",
                    flush=True,
                )
            if not spills:
                print(f"{target:8}{name:20}compiled", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
