"""Compiles every attention kernel for hardware that is not here, and prints what the compilers say.

    JAX_PLATFORMS=cpu python benchmarks/attention/compile_ahead.py                  # H200 and four TPUs
    JAX_PLATFORMS=cpu python benchmarks/attention/compile_ahead.py --targets h200   # one of them

Needs jax[cuda13] for H200 and libtpu for TPUs, in an environment of its own (5 GB), and no device. For H200 a row
shows ptxas' report: bytes of registers spilled, shared memory, and C7512 or C7513, which say that tensor core
instructions run one after another. Exits with 1 when a kernel does not compile or is serialised.
"""

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
import jax.numpy as jnp

from pallas_kernels import attention, attention_float8

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


def calls(target: str):
    """Forward and backward in one program; for H200 the float8 forward, too."""
    implementation = "mosaic_gpu" if target == "h200" else "mosaic_tpu"
    new = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    for name, ((B, T, N, K, H, Hv), hidden) in CALLS.items():
        if "bias" in hidden and target != "h200":  # the TPU kernels take none
            continue
        hidden = dict(hidden)
        arrays = [new(B, T, N, H), new(B, T, K, H), new(B, T, K, Hv), new(B, T, N, Hv)]
        more = {}
        if hidden.pop("ids", False):
            more["segment_ids"] = new(B, T, dtype=jnp.int32)
        if hidden.pop("positions", False):
            more["positions"] = new(B, T, dtype=jnp.int32)
        if hidden.pop("sinks", False):
            more["sinks"] = new(N, dtype=jnp.float32)
        if hidden.pop("bias", False):
            more["bias"] = new(1, N, T, T, dtype=jnp.float32)

        def run(q, k, v, do, more, hidden=hidden):
            f = lambda q, k, v: attention(q, k, v, **hidden, **more, implementation=implementation)
            o, vjp = jax.vjp(f, q, k, v)
            return o, vjp(do)

        yield name, run, (*arrays, more)
        if target == "h200" and max(H, Hv) <= 128 and "bias" not in more:
            float8 = functools.partial(attention_float8, **hidden, implementation=implementation)
            yield f"{name}, float8", lambda q, k, v, more, f=float8: f(q, k, v, **more), (*arrays[:3], more)


if __name__ == "__main__":
    sys.exit(runner.compile_ahead(__doc__, ["h200", *runner.TPUS], calls, spill=None))
