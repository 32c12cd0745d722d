"""The public function: checks its input, picks a backend, runs it; the gradients, which are the backend's too."""

import functools
import importlib
import types

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma

# In the order of preference. Each module has supported(lhs, rhs, dtype) -> None | reason, and the functions
# grouped(lhs, rhs, group_sizes, dtype, transposed=) and contraction(lhs, grad, group_sizes, dtype).
BACKENDS = {
    "mosaic_gpu": "pallas_kernels.ragged_dot.pallas_mosaic_gpu",
    "mosaic_tpu": "pallas_kernels.ragged_dot.pallas_mosaic_tpu",
    "xla": "pallas_kernels.ragged_dot.xla",
    "reference": "pallas_kernels.ragged_dot.reference",
}

RAGGED_DOT = "ragged_dot"  # the output's name for jax.checkpoint policies: kept, it is not computed twice

_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def ragged_dot(
    lhs: jax.Array,
    rhs: jax.Array,
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
      lhs: [M, K], float32, bfloat16 or float16.
      rhs: [G, K, N], the same dtype.
      group_sizes: int32 [G], in rows.
      preferred_element_type: dtype of the output, floating; that of lhs by default.
      implementation: a key of `BACKENDS`; None takes the first that can run the call here.

    Returns:
      [M, N].

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    dtype = _check(lhs, rhs, group_sizes, preferred_element_type)
    backend = _choose(lhs, rhs, dtype, implementation)
    if 0 in (*lhs.shape, *rhs.shape):
        return jnp.zeros((lhs.shape[0], rhs.shape[2]), dtype)
    return _ragged_dot(*unify_vma((lhs, rhs, group_sizes)), dtype, backend)


def ragged_dot_implementation(lhs, rhs, group_sizes, *, preferred_element_type=None, implementation=None) -> str:
    """The backend that `ragged_dot` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    return _choose(lhs, rhs, _check(lhs, rhs, group_sizes, preferred_element_type), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ragged_dot(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype, backend: str) -> jax.Array:
    return _module(backend).grouped(lhs, rhs, group_sizes, dtype)


def _ragged_dot_fwd(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dtype, backend: str):
    """Residuals: the inputs."""
    # Without the barrier XLA may run a kernel twice whose output a scan stacks: for the stack, and for its other users.
    out = jax.lax.optimization_barrier(_ragged_dot(lhs, rhs, group_sizes, dtype, backend))
    return checkpoint_name(out, RAGGED_DOT), (lhs, rhs, group_sizes)


def _ragged_dot_bwd(dtype, backend: str, residuals, grad: jax.Array):
    del dtype
    lhs, rhs, group_sizes = residuals
    grad = grad.astype(lhs.dtype)
    run = _module(backend)
    d_lhs = run.grouped(grad, rhs, group_sizes, lhs.dtype, transposed=True)
    return d_lhs, run.contraction(lhs, grad, group_sizes, rhs.dtype), None


_ragged_dot.defvjp(_ragged_dot_fwd, _ragged_dot_bwd)


def _module(backend: str) -> types.ModuleType:
    return importlib.import_module(BACKENDS[backend])


def _choose(lhs, rhs, dtype, implementation: str | None) -> str:
    def check(name):
        supported = getattr(_module(name), "supported", None)
        return supported(lhs, rhs, dtype) if supported else None

    return _dispatch.choose("ragged_dot", implementation, {name: functools.partial(check, name) for name in BACKENDS})


def _check(lhs, rhs, group_sizes, preferred_element_type):
    """Every check of the public function's input; the dtype of the output."""
    shapes = f"lhs {lhs.shape}, rhs {rhs.shape}, group_sizes {group_sizes.shape}"
    if len(lhs.shape) != 2 or len(rhs.shape) != 3 or len(group_sizes.shape) != 1:
        raise ValueError(f"ragged_dot takes lhs [M,K], rhs [G,K,N], group_sizes [G]. Got {shapes}")
    if lhs.shape[1] != rhs.shape[1]:
        raise ValueError(f"ragged_dot: K={lhs.shape[1]} of lhs is not K={rhs.shape[1]} of rhs [G,K,N]. Got {shapes}")
    if rhs.shape[0] != group_sizes.shape[0]:
        raise ValueError(
            f"ragged_dot: {group_sizes.shape[0]} group sizes for {rhs.shape[0]} matrices; give as many. Got {shapes}"
        )
    if rhs.shape[0] == 0:
        raise ValueError(f"ragged_dot needs at least one group. Got {shapes}")
    if lhs.dtype != rhs.dtype or lhs.dtype not in _FLOATS:
        raise ValueError(
            "ragged_dot takes lhs and rhs of one dtype, float32, bfloat16 or float16; cast them. "
            f"Got {lhs.dtype} and {rhs.dtype}"
        )
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"ragged_dot: group_sizes must be int32. Got {group_sizes.dtype}")
    dtype = jnp.dtype(lhs.dtype if preferred_element_type is None else preferred_element_type)
    if dtype not in _FLOATS:
        raise ValueError(
            f"ragged_dot: preferred_element_type must be float32, bfloat16 or float16, or None. Got {dtype}"
        )
    return dtype
