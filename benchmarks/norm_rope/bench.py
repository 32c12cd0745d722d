"""Norm and rotation of heads on one GPU: is it right, then how fast, beside XLA and a copy.

    python benchmarks/norm_rope/bench.py    # half a minute on a Hopper GPU

Needs a checkout and jax. Microseconds are those of all kernels of a call by the GPU's profiler (CUPTI), medians of 8
calls; GB/s count each array once.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import runner
from pallas_kernels import norm_rope

# B, T, N, H: queries and keys of Qwen3, of Gemma 3; then what tensor parallelism or few heads leave
SHAPES = [(4, 4096, 16, 128), (4, 4096, 8, 128), (4, 4096, 8, 256), (4, 4096, 4, 256)]
CHECKS = [(2, 512, 16, 128), (1, 128, 1, 128), (1, 256, 6, 128), (2, 128, 16, 64), (1, 128, 4, 256), (1, 64, 1, 256)]


def inputs(rng, B, T, N, H):
    x, grad = (jnp.asarray(rng.normal(size=(B, T, N, H)), jnp.bfloat16) for _ in range(2))
    angle = rng.uniform(0, 2 * np.pi, (B, T, H // 2))
    scale, cos, sin = (jnp.asarray(a, jnp.float32) for a in (rng.normal(size=H), np.cos(angle), np.sin(angle)))
    return x, scale, cos, sin, grad


def passes(implementation, norm=True):
    """Forward and backward pass, each a program of its own."""

    def forward(x, scale, cos, sin):
        return norm_rope(x, scale if norm else None, cos, sin, implementation=implementation)

    def backward(x, scale, cos, sin, grad):
        return jax.vjp(lambda x, scale: forward(x, scale, cos, sin), x, scale)[1](grad)

    return jax.jit(forward), jax.jit(backward)


def check(rng, shape) -> list[float]:
    """The largest errors of output, dx and dscale beside float32, as parts of the largest number."""
    x, *rest, grad = inputs(rng, *shape)
    results = []
    for name, dtype in (("mosaic_gpu", jnp.bfloat16), ("xla", jnp.float32)):
        forward, backward = passes(name)
        args = x.astype(dtype), *rest
        results.append([y.astype(jnp.float32) for y in (forward(*args), *backward(*args, grad.astype(dtype)))])
    errors = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*results)]
    assert errors[0] < 8e-3 and errors[1] < 8e-3 and errors[2] < 1e-4, (shape, errors)
    return errors


def main() -> None:
    rng = np.random.default_rng()
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    for shape in CHECKS:
        print(shape, "errors", *(f"{e:.1e}" for e in check(rng, shape)))
    for shape in SHAPES:
        x, scale, cos, sin, grad = inputs(rng, *shape)
        tables = cos.nbytes + sin.nbytes
        rows = [("copy", 2 * x.nbytes, jax.jit(lambda x: x + jnp.ones((), x.dtype)), (x,))]
        for name, *which in (("kernel", "mosaic_gpu", True), ("xla", "xla", True), ("rotation", "xla", False)):
            forward, backward = passes(*which)
            rows.append((f"{name} forward", 2 * x.nbytes + tables, forward, (x, scale, cos, sin)))
            rows.append((f"{name} backward", (2 + which[1]) * x.nbytes + tables, backward, (x, scale, cos, sin, grad)))
        for name, size, fn, args in rows:
            us, _ = runner.profile(fn, *args, iterations=8)
            print(f"{shape} {name:18s} {us:8.1f} us {size / us / 1e3:7.0f} GB/s", flush=True)


if __name__ == "__main__":
    main()
