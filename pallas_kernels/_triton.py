"""What the kernels in Pallas' Triton backend share.

The backend is part of JAX, lowers for NVIDIA GPUs from compute capability 8.0 on, and its kernels run in Pallas'
interpreter on a CPU.

A kernel gets whole arrays and loads blocks of them. Sizes of blocks are powers of two, so a dim of 192 is taken in
pieces of 128 and 64; what lies past the end of an array is masked, not padded.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import config as _config
from jax.experimental import pallas as pl

from pallas_kernels import _dispatch

try:
    from jax.experimental.pallas import triton as plgpu
except ImportError:  # JAX 0.11 calls this backend deprecated: without it, other backends run
    plgpu = None

LEAST = 16  # a tensor core multiplies blocks of at least 16 x 16


def unfit() -> str | None:
    """None, or the reason why no kernel of this backend can run here."""
    if plgpu is None:
        return f"JAX {jax.__version__} has no Triton backend for Pallas; use a JAX that has it (0.11)"
    if _dispatch.interpreted("triton"):
        return None
    kind = _dispatch.device_kind()
    if capability() < 80:
        return f"needs an NVIDIA GPU of compute capability 8.0 or above (A100, L4, RTX 3090, ...); this is {kind}"
    return None


def capability() -> int:
    """Of the GPU that this trace is for: 80 for an A100, 90 for an H100, 0 for what is no NVIDIA GPU."""
    assert plgpu is not None
    try:
        return plgpu.get_gpu_info().compute_capability
    except ValueError:
        return 0


def shared_memory() -> int:
    """Bytes of shared memory that one block may have."""
    if _dispatch.interpreted("triton"):
        return 163 * 1024
    return {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}.get(capability(), 99) * 1024


@contextlib.contextmanager
def force_interpret_mode() -> Iterator[None]:
    """Kernels traced in this context run in Pallas' interpreter."""
    mode = _config.pallas_tpu_interpret_mode_context_manager  # of all backends, whatever its name says
    before = mode.swap_local(True)
    try:
        yield
    finally:
        mode.set_local(before)


def launch(kernel, name: str, grid, arrays, outputs, *, warps: int, stages: int):
    """Runs the kernel at each place of the grid, the first axis varying fastest; outputs are (shape, dtype)."""
    assert plgpu is not None
    varying = jax.typeof(arrays[0]).mat
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in outputs],
        grid=grid,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        name=name,
    )(*arrays)


def load(ref, *index, keep: jax.Array | None = None) -> jax.Array:
    """A block; zeros where `keep`, of its shape, is false: nothing is read there."""
    assert plgpu is not None
    if keep is None:
        return ref[index]
    return plgpu.load(ref.at[index], mask=keep, other=jnp.zeros((), ref.dtype))


def store(ref, value: jax.Array, *index, keep: jax.Array | None = None) -> None:
    """Writes a block, where `keep` is true."""
    assert plgpu is not None
    plgpu.store(ref.at[index], value.astype(ref.dtype), mask=keep)


def inside(*dims) -> jax.Array | None:
    """Which places of a block lie in the array, for (start, size, end) of each dim; None where all blocks are full."""
    shape = tuple(size for _, size, _ in dims)
    keep = None
    for dim, (start, size, end) in enumerate(dims):
        if not isinstance(end, int) or end % size:
            below = start + lax.broadcasted_iota(jnp.int32, shape, dim) < end
            keep = below if keep is None else keep & below
    return keep


def pieces(size: int) -> list[tuple[int, int]]:
    """(start, length) of the powers of two that add up to a multiple of 16, the largest first."""
    out, start = [], 0
    while start < size:
        length = 1 << ((size - start).bit_length() - 1)
        out.append((start, length))
        start += length
    return out


def cover(size: int, most: int) -> int:
    """The smallest power of two from 16 on that holds `size`, or `most`."""
    return min(most, max(LEAST, 1 << (size - 1).bit_length()))


def dot(x: jax.Array, y: jax.Array, x_dim: int, y_dim: int, kind=jnp.float32) -> jax.Array:
    """x and y contracted over one dim each, summed in `kind`."""
    return lax.dot_general(x, y, (((x_dim,), (y_dim,)), ((), ())), preferred_element_type=kind)
