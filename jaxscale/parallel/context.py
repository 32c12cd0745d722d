"""Attention over a sequence that is split over devices (context parallelism), inside shard_map.

    out = jax.shard_map(partial(context.attention, strategy="ring", causal=True), out_specs=P(None, "cp"))(q, k, v)

Every strategy is a custom_vjp that keeps its own shards, the output and the logsumexp; the backward pass communicates
again instead of keeping what was gathered. A block of queries meets a block of keys in `pallas_kernels.attention`, and
blocks are merged by their logsumexps in float32.

- all_gather: K and V are gathered; their gradients are summed as they are scattered.
- ring: K and V go around, and in the backward pass float32 dK and dV follow one step behind (arXiv 2310.01889).
- bidirectional: both directions of the links work. Either K/V go around both ways, half as far, or, where this moves
  less, queries go one way and what they found comes back the other (TokenRing, arXiv 2412.20501).
- ulysses: heads are split instead of the sequence, by all-to-all (arXiv 2309.14509).
- usp: ulysses inside groups of neighbours, a ring across the groups (arXiv 2405.07719).
- halo: sliding windows; only those tokens of the neighbours travel that a window reaches.

Each stands in a file of its own: context_gather, context_ring, context_queries, context_heads; context_decode attends
to a cache that is split.
"""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxscale.config import CPLayout, CPStrategy
from jaxscale.parallel import context_cost
from jaxscale.parallel.context_blocks import Call, Cotangent, Rows, vary
from jaxscale.parallel.context_decode import decode
from jaxscale.parallel.context_gather import all_gather, all_gather_bwd
from jaxscale.parallel.context_heads import largest_group
from jaxscale.parallel.context_queries import bidirectional, bidirectional_bwd
from jaxscale.parallel.context_ring import ring, ring_bwd
from jaxscale.parallel.context_rows import PairOfRows, gather_rows
from pallas_kernels.attention.inputs import nameable

__all__ = ["attention", "compiler_options", "decode"]

type Pair = jax.Array | tuple[jax.Array, jax.Array]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str = "cp",
    strategy: CPStrategy | Literal["auto"] = "auto",
    layout: CPLayout = "contiguous",
    positions: Pair | None = None,
    segment_ids: Pair | None = None,
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    ulysses_size: int | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """Exact attention of this device's queries over the whole sequence; differentiable in q, k and v.

    The single-device twin is `pallas_kernels.attention` over the whole arrays.

    Args:
      q: [B, T, N, H], this device's T tokens of a sequence of T * cp.
      k, v: [B, T, K, H] and [B, T, K, Hv].
      axis_name: the mesh axis that the sequence is split over.
      strategy: "auto" takes the one that `context_cost.choose` expects to be fastest.
      layout: how `permute_batch` dealt the tokens over the devices.
      positions: int32 [B, T], or a pair for queries and keys. They may restart in each segment. By default a token's
        index in the sequence, which "packed" rows do not have. In a contiguous layout they must grow by one from token
        to token of a segment: this tells which devices a window reaches.
      segment_ids: int32 in the same forms; equal ids see each other, 0 is padding.
      causal, soft_cap, scale, implementation: as in `pallas_kernels.attention`.
      window: static, an int or a pair, as in `pallas_kernels.attention`.
      ulysses_size: usp's devices in a group; by default the most that divide the kv heads as well.
      return_lse: also return the logsumexp [B, T, N], float32; its cotangent is taken.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: sizes that do not fit, a strategy that cannot use this window or layout.
    """
    size = lax.axis_size(axis_name)
    T, N, K = q.shape[1], q.shape[2], k.shape[2]
    if k.shape[1] != T or v.shape[1] != T:
        raise ValueError(f"context.attention: queries and keys are split alike. Got T={T}, S={k.shape[1]}")
    if N % K:
        raise ValueError(f"context.attention: {N} query heads are not divisible by {K} kv heads")
    if layout not in get_args(CPLayout):
        raise ValueError(f"context.attention: layout={layout!r} is not one of {get_args(CPLayout)}")
    if strategy != "auto" and strategy not in get_args(CPStrategy):
        raise ValueError(f"context.attention: strategy={strategy!r} is not 'auto' or one of {get_args(CPStrategy)}")
    if layout == "zigzag" and T % 2:
        raise ValueError(
            f"context.attention: a zigzag layout gives each of cp={size} devices two equal chunks, but T={T} tokens a "
            f"device is odd; make the sequence a multiple of {2 * size}"
        )
    if layout == "packed" and (positions is None or segment_ids is None):
        raise ValueError("context.attention: a packed layout needs positions and segment_ids; pass those of the batch")
    reach = _reach(window, causal)
    if strategy == "auto":
        shape = context_cost.Shape(
            batch=q.shape[0],
            seq_len=T * size,
            num_heads=N,
            num_kv_heads=K,
            head_dim=q.shape[3],
            itemsize=q.dtype.itemsize,
            causal=causal,
            window=reach[0],
            packed=segment_ids is not None,
        )
        strategy = context_cost.choose(shape, size, layouts=(layout,)).strategy
    if strategy == "halo" and (layout != "contiguous" or None in reach):
        raise ValueError(
            f"context.attention: halo needs a contiguous layout and a window that ends on both sides (or causal and a "
            f"left end). Got layout={layout!r}, window={window}, causal={causal}; use ring or all_gather"
        )
    group = 1
    if strategy in ("ulysses", "usp"):
        group = size if strategy == "ulysses" else ulysses_size or largest_group(K, size)
        if size % group:
            raise ValueError(f"context.attention: ulysses_size={group} does not divide cp={size}")
        if group > N:
            raise ValueError(
                f"context.attention: ulysses splits {N} query heads over {group} devices, {group - N} of which would "
                f"have none; use ring, or usp with ulysses_size <= {N}"
            )
    if not causal and reach == (None, None):
        positions = None  # nothing compares them
    call = Call(
        axis_name=axis_name,
        size=size,
        strategy=strategy,
        layout=layout,
        group=group,
        causal=causal,
        window=reach if window is not None else (None, None),
        reach=reach,
        soft_cap=soft_cap,
        scale=q.shape[3] ** -0.5 if scale is None else float(scale),
        implementation=implementation,
    )
    pairs: list[Any] = [x if isinstance(x, tuple | list) else (x, x) for x in (positions, segment_ids)]
    own, other = (Rows(*(x[i] for x in pairs)) for i in range(2))
    q, k, v, own, other = vary((q, k, v, own, None if all(x is y for x, y in pairs) else other), axis_name)
    out_and_lse: Any = _attention(call, q, k, v, gather_rows(call, own, other))
    return out_and_lse if return_lse else out_and_lse[0]


def compiler_options(platform: str) -> dict[str, Any]:
    """For `jax.jit(step, compiler_options=...)`: what a step needs so that its transfers run beside its attention.

    XLA's scheduler for GPUs lets one collective at a time be in flight; K's transfer then waits for V's, and is made
    synchronous. Four: K and V, and in the backward pass dK and dV.
    """
    return {"xla_gpu_experimental_parallel_collective_overlap_limit": 4} if platform in ("gpu", "cuda") else {}


# One custom_vjp for all strategies.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, q, k, v, rows: PairOfRows):
    return _attention_fwd(call, q, k, v, rows)[0]


def _attention_fwd(call: Call, q, k, v, rows: PairOfRows):
    """Residuals: the arguments, out, the logsumexp: nothing that was gathered."""
    with jax.named_scope(f"context_{call.strategy}"):
        out, lse = _FORWARD.get(call.strategy, ring)(call, q, k, v, rows)
    out, lse = nameable(out.astype(q.dtype), lse)
    return (out, lse), (q, k, v, rows, out, lse)


def _attention_bwd(call: Call, residuals, cotangents):
    # XLA would find the forward pass's transfers again and keep what they brought; behind a barrier it cannot.
    (q, k, v, rows, out, lse), (dout, dlse) = lax.optimization_barrier((residuals, cotangents))
    delta = jnp.einsum("BTNH,BTNH->BTN", dout, out, precision="highest", preferred_element_type=jnp.float32) - dlse
    with jax.named_scope(f"context_{call.strategy}_backward"):
        backward = _BACKWARD.get(call.strategy, ring_bwd)
        dq, dk, dv = backward(call, q, k, v, rows, Cotangent(dout, lse, delta))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


_FORWARD = {"all_gather": all_gather, "bidirectional": bidirectional}
_BACKWARD = {"all_gather": all_gather_bwd, "bidirectional": bidirectional_bwd}


def _reach(window, causal: bool) -> tuple[int | None, int | None]:
    """How many tokens before and after itself a query may see."""
    given = window
    if isinstance(window, int | np.integer):
        window = (int(window) - 1, int(window) - 1)
    if window is not None and not isinstance(window, tuple | list):
        raise ValueError(
            "context.attention: the window is static, an int or a pair; a traced one does not say who sends"
        )
    left, right = window or (None, None)
    if any(n is not None and n < 0 for n in (left, right)):
        raise ValueError(
            f"context.attention: a window holds at least the query itself: an int >= 1, or a pair >= 0. Got {given}"
        )
    return left, (0 if causal else right)
