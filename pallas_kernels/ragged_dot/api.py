"""The public function: checks its input, picks a backend, runs it; the gradients, which are the backend's too."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.quantized_matmul.array import QuantizedArray, QuantizedRows
from pallas_kernels.quantized_ragged_dot.api import quantized_ragged_dot, quantized_ragged_dot_implementation
from pallas_kernels.ragged_dot.checks import check_rows

# In the order of preference. Each module has supported(lhs, rhs, dtype) -> None | reason, and the functions
# grouped(lhs, rhs, group_sizes, dtype, transposed=) and contraction(lhs, grad, group_sizes, dtype), and maybe
# grouped_sum, which adds up `grouped` of several.
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.ragged_dot.pallas_mosaic_gpu",
    "triton": "pallas_kernels.ragged_dot.triton",
    "mosaic_tpu": "pallas_kernels.ragged_dot.pallas_mosaic_tpu",
    "xla": "pallas_kernels.ragged_dot.xla",
    "reference": "pallas_kernels.ragged_dot.reference",
}

RAGGED_DOT = "ragged_dot"  # the output's name for jax.checkpoint policies: kept, it is not computed twice


def ragged_dot(
    lhs: jax.Array | QuantizedRows,
    rhs: jax.Array | QuantizedArray,
    group_sizes: jax.Array,
    *,
    preferred_element_type=None,
    implementation: str | None = None,
) -> jax.Array:
    """Rows in groups, each group times a matrix of its own: `jax.lax.ragged_dot`, faster where there is a kernel.

    Group g holds the `group_sizes[g]` rows after those of the groups before it, none to all of them. Rows after the
    last group give zeros, whatever they hold; sizes that add up to more than M end at row M, negative ones count as
    none. Sums are float32. The gradient to lhs reads rhs in place, transposed; that to rhs sums over the rows of each
    group, with zeros for an empty one; both take the cotangent in the dtype of lhs.

    Args:
      lhs: [M, K], float32, bfloat16 or float16; beside QuantizedArrays also from `quantize_rows`.
      rhs: [G, K, N], the same dtype; or a QuantizedArray of this shape, which has no gradient (`quantized_ragged_dot`).
      group_sizes: int32 [G], in rows.
      preferred_element_type: dtype of the output, floating; that of lhs by default.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [M, N].

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    return ragged_dots(
        lhs, (rhs,), group_sizes, preferred_element_type=preferred_element_type, implementation=implementation
    )[0]


def ragged_dots(
    lhs: jax.Array | QuantizedRows,
    rhs: tuple[jax.Array | QuantizedArray, ...],
    group_sizes: jax.Array,
    *,
    preferred_element_type=None,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """`ragged_dot` of the same rows with several matrices of one shape for each group (gate and up of an expert).

    Their gradients to lhs are one sum, in float32 inside the kernel where there is one for it.
    """
    plain = tuple(r for r in rhs if not isinstance(r, QuantizedArray))
    if plain and isinstance(lhs, QuantizedRows):
        raise ValueError(f"ragged_dot takes rows in {lhs.format} beside QuantizedArrays. Got rhs {plain[0].dtype}")
    if len(plain) < len(rhs):
        options = {"preferred_element_type": preferred_element_type, "implementation": implementation}
        return tuple(
            quantized_ragged_dot(lhs, r, group_sizes, **options)
            if isinstance(r, QuantizedArray)
            else ragged_dot(lhs, r, group_sizes, **options)
            for r in rhs
        )
    if not plain or len({r.shape for r in plain}) > 1 or len({r.dtype for r in plain}) > 1:
        raise ValueError(
            f"ragged_dots takes matrices of one shape and dtype. Got {[(r.shape, r.dtype) for r in plain]}"
        )
    assert isinstance(lhs, jax.Array)
    dtype = _check(lhs, plain[0], group_sizes, preferred_element_type)
    backend = _choose(lhs, plain[0], dtype, implementation)
    if 0 in (*lhs.shape, *plain[0].shape):
        return tuple(jnp.zeros((lhs.shape[0], r.shape[2]), dtype) for r in plain)
    lhs, group_sizes, *matrices = unify_vma((lhs, group_sizes, *plain))
    return _ragged_dots(lhs, tuple(matrices), group_sizes, dtype, backend)


def ragged_dot_implementation(lhs, rhs, group_sizes, *, preferred_element_type=None, implementation=None) -> str:
    """The backend that `ragged_dot` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    if isinstance(rhs, QuantizedArray):
        options = {"preferred_element_type": preferred_element_type, "implementation": implementation}
        return quantized_ragged_dot_implementation(lhs, rhs, group_sizes, **options)
    return _choose(lhs, rhs, _check(lhs, rhs, group_sizes, preferred_element_type), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged_dots(lhs: jax.Array, rhs: tuple[jax.Array, ...], group_sizes: jax.Array, dtype, backend: str):
    return tuple(_module(backend).grouped(lhs, r, group_sizes, dtype) for r in rhs)


def _ragged_dots_fwd(lhs: jax.Array, rhs: tuple[jax.Array, ...], group_sizes: jax.Array, dtype, backend: str):
    """Residuals: the inputs."""
    # Without the barrier XLA may run a kernel twice whose output a scan stacks: for the stack, and for its other users.
    out = jax.lax.optimization_barrier(_ragged_dots(lhs, rhs, group_sizes, dtype, backend))
    return tuple(checkpoint_name(x, RAGGED_DOT) for x in out), (lhs, rhs, group_sizes)


def _ragged_dots_bwd(dtype, backend: str, residuals, grads: tuple[jax.Array, ...]):
    del dtype
    lhs, rhs, group_sizes = residuals
    grads = tuple(g.astype(lhs.dtype) for g in grads)
    run = _module(backend)
    if hasattr(run, "grouped_sum"):
        d_lhs = run.grouped_sum(grads, rhs, group_sizes, lhs.dtype, transposed=True)
    else:
        first, *others = (run.grouped(g, r, group_sizes, lhs.dtype, transposed=True) for g, r in zip(grads, rhs))
        d_lhs = sum(others, start=first)
    return d_lhs, tuple(run.contraction(lhs, g, group_sizes, r.dtype) for g, r in zip(grads, rhs)), None


_ragged_dots.defvjp(_ragged_dots_fwd, _ragged_dots_bwd)


def _module(backend: str) -> types.ModuleType:
    return importlib.import_module(BACKENDS[backend])


def _choose(lhs, rhs, dtype, implementation: str | None) -> str:
    def check(name):
        supported = getattr(_module(name), "supported", None)
        return supported(lhs, rhs, dtype) if supported else None

    return _dispatch.choose("ragged_dot", implementation, {name: functools.partial(check, name) for name in BACKENDS})


def _check(lhs, rhs, group_sizes, preferred_element_type):
    """Every check of the public function's input; the dtype of the output."""
    dtype = check_rows(lhs, rhs, group_sizes, preferred_element_type)
    if lhs.dtype != rhs.dtype:
        raise ValueError(
            "ragged_dot takes lhs and rhs of one dtype, float32, bfloat16 or float16; cast them. "
            f"Got {lhs.dtype} and {rhs.dtype}"
        )
    return dtype
