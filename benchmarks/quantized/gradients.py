"""The passes of a float8 training step that round gradients, on one GPU: right first, then times beside XLA's own.

    python benchmarks/quantized/gradients.py
    python benchmarks/quantized/gradients.py --rows 16384 --width 2048 --hidden 8192

A table of microseconds (medians over calls issued back to back) and of the bytes that must be moved a second.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from pallas_kernels.float8_grads.api import BACKENDS, float8_grads_implementation, gated_grads, round_both

GRADIENTS, FORWARD = jnp.float8_e5m2, jnp.float8_e4m3fn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 16384), ("width", 2048), ("hidden", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(f"gradients.py times kernels for GPUs. This is {jax.default_backend()}")
    key, scale = jax.random.key(0), jnp.float32(2.0**-8)
    new = lambda i, width: jax.random.normal(jax.random.fold_in(key, i), (args.rows, width), jnp.bfloat16)
    grads = [new(i, args.hidden) for i in range(3)]
    scales, dtypes = (scale,) * 3, (GRADIENTS, FORWARD)
    works = {
        "round_both": (lambda x, i: round_both(x, scale, GRADIENTS, implementation=i), [new(3, args.width)], 4),
        "gated_grads": (lambda g, a, b, i: gated_grads(g, a, b, scales, dtypes, "silu", implementation=i), grads, 11),
    }
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; None is {float8_grads_implementation(grads[0])}")
    print(f"{'':14}{'':8}{'us':>10}{'TB/s':>8}  numbers that are not XLA's")
    for name, (f, arrays, width) in works.items():
        want = None
        for backend in reversed(BACKENDS):
            compiled = jax.jit(lambda *xs, f=f, backend=backend: f(*xs, backend))
            got = [np.asarray(x, np.float32) for x in jax.tree.leaves(compiled(*arrays))]
            want = got if want is None else want
            off = max(float((a != b).mean()) for a, b in zip(got, want, strict=True))
            assert off < 1e-3, f"{name} on {backend}: {off:.1e} of the numbers are others"
            ms, _ = runner.measure(compiled, *arrays)
            rate = arrays[0].size * width / ms / 1e9
            print(f"{name:14}{backend:8}{ms * 1e3:10.1f}{rate:8.2f}  {off:.1e}", flush=True)


if __name__ == "__main__":
    main()
