"""Activations rounded to 8 bits on one GPU: the kernel's numbers beside XLA's, then the times of both.

    python benchmarks/quantized/rows.py
    python benchmarks/quantized/rows.py --rows 8192 --width 8192

A table of microseconds (all kernels of a call, by the GPU's profiler) and of the bytes that must be moved a second.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from pallas_kernels import quantize_rows, quantize_rows_implementation
from pallas_kernels.quantize_rows.api import BACKENDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 32768), ("width", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"rows.py times kernels for GPUs. This is {jax.default_backend()}")
    x = jax.random.normal(jax.random.key(0), (args.rows, args.width), jnp.bfloat16)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; None is {quantize_rows_implementation(x, 1)}")
    print(f"{'dtype':16}{'scales':>7}{'':8}{'us':>10}{'TB/s':>8}  values, scales that are not XLA's")
    for dtype, groups in (("float8_e4m3fn", args.width // 128), ("float8_e4m3fn", 1), ("int8", 1)):
        want = None
        for backend in reversed(BACKENDS):
            run = jax.jit(lambda x, b=backend, g=groups, d=dtype: quantize_rows(x, g, d, implementation=b))  # pyright: ignore
            got = [np.asarray(v, np.float32) for v in jax.tree.leaves(run(x))]
            want = got if want is None else want
            off = [float((a != b).mean()) for a, b in zip(got, want, strict=True)]
            np.testing.assert_allclose(got[1], want[1], rtol=1e-6)  # division is not exact in all of them
            assert off[0] < 1e-3, f"{dtype} on {backend}: {off[0]:.1e} of the values are others"
            us, _ = runner.profile(run, x)
            rate = (x.nbytes + x.size + 4 * args.rows * groups) / us / 1e6
            print(f"{dtype:16}{groups:7}{backend:>8}{us:10.1f}{rate:8.2f}  {off[0]:.1e} {off[1]:.1e}", flush=True)


if __name__ == "__main__":
    main()
