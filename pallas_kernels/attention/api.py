"""The public function: checks its input, picks a backend, runs it."""

import functools
import importlib
import math
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import Inputs, Options, unify_vma

# In the order of preference. Each module has supported(inputs, options) -> None | reason, and the function named here.
BACKENDS = {
    "mosaic_gpu": ("pallas_kernels.attention.pallas_mosaic_gpu", "attention_mosaic_gpu"),
    "triton": ("pallas_kernels.attention.triton", "attention_triton"),
    "mosaic_tpu": ("pallas_kernels.attention.pallas_mosaic_tpu", "attention_mosaic_tpu"),
    "xla": ("pallas_kernels.attention.xla", "attention_xla"),
    "reference": ("pallas_kernels.attention.reference", "attention_reference"),
}

type Pair = jax.Array | tuple[jax.Array, jax.Array]
type Window = int | tuple[int | None, int | None] | jax.Array


@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    segment_ids: Pair | None = None,
    positions: Pair | None = None,
    window: Window | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
    return_lse: Literal[False] = False,
    implementation: str | None = None,
) -> jax.Array: ...
@overload
def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    segment_ids: Pair | None = None,
    positions: Pair | None = None,
    window: Window | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    bias: jax.Array | None = None,
    return_lse: Literal[True],
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]: ...
def attention(
    q,
    k,
    v,
    *,
    causal=False,
    segment_ids=None,
    positions=None,
    window=None,
    soft_cap=None,
    scale=None,
    sinks=None,
    bias=None,
    return_lse=False,
    implementation=None,
):
    """Exact softmax attention over one shard, differentiable in q, k, v, sinks and bias.

    `logits = soft_cap * tanh(scale * q @ k / soft_cap) + bias`, in float32; keys that a query does not see count as
    -inf; a sink is one more key per head with that logit and a value of zero. A query that sees no key gives zeros,
    passes zero gradients and has a logsumexp of -inf (with sinks: the sink). No queries (B, T or N of 0) give no rows.

    Args:
      q: [B, T, N, H], float32, bfloat16 or float16.
      k: [B, S, K, H], N divisible by K: query head n reads kv head n // (N // K). The dtype of q.
      v: [B, S, K, Hv]; Hv may differ from H. The dtype of q.
      causal: a query sees the keys whose position is not after its own. Without `positions`, query t and key s stand at
        t and s, also where T != S.
      segment_ids: int32 [B, T] (S == T), or a pair [B, T], [B, S]. Equal ids see each other; id 0 is padding, which
        sees nothing and is not seen.
      positions: int32 in the same two forms; `causal` and `window` compare them. They may restart in each segment, and
        a step of ring attention says with them where its blocks stand.
      window: an int w: a query sees the keys less than w positions away, itself counted (w - 1 earlier ones under
        `causal`: the `sliding_window` of Mistral, Gemma, GPT-OSS). A pair (left, right): the keys from `left` before it
        to `right` after it, both included, None unbounded (as in jax.nn). An int32 scalar array acts as the int and may
        be traced: a scan over local and global layers gives a huge one to the global layers.
      soft_cap: bounds the logits, before bias and mask.
      scale: of the logits; H ** -0.5 by default.
      sinks: [N] floating.
      bias: floating, broadcastable to [B, N, T, S], four dims; added after scale and soft_cap.
      return_lse: also return the logsumexp of the logits, sinks included; its cotangent is taken.
      implementation: a key of `BACKENDS`: "mosaic_gpu", "triton", "mosaic_tpu", "xla", "reference"; None takes the
        first that can run the call here.

    Returns:
      [B, T, N, Hv] in q's dtype; with return_lse, also [B, T, N] float32.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    inputs, options = normalize(q, k, v, causal, segment_ids, positions, window, soft_cap, scale, sinks, bias)
    name = choose(inputs, options, implementation)
    if 0 in q.shape:
        out, lse = empty(inputs)
        return (out, lse) if return_lse else out
    if bias is not None:  # one value for all keys: backends take a value for each
        inputs = inputs._replace(bias=jnp.broadcast_to(bias, (*bias.shape[:3], k.shape[1])))
    out, lse = _run(name)(unify_vma(inputs), options)
    return (out, lse) if return_lse else out


def attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    causal: bool = False,
    segment_ids: Pair | None = None,
    positions: Pair | None = None,
    window: Window | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a block of keys adds to the gradients, given the logsumexp of whole rows: one step of ring attention.

    With `p = exp(logits - lse)` and `dlogits = p * (dout @ v - delta)` the parts of all blocks add up to the gradients
    of attention over all keys; nothing of the forward pass is computed again.

    Args:
      q, k, v, and what hides keys: as in `attention`.
      dout: [B, T, N, Hv], the cotangent of the output, in q's dtype.
      lse: [B, T, N] float32, the logsumexp over all keys; -inf where a query saw none.
      delta: [B, T, N] float32: sum(dout * out, -1), less the cotangent of lse if it has one.

    Returns:
      dq, dk, dv in the shapes and dtypes of q, k, v.

    Raises:
      As `attention` does.
    """
    inputs, options = normalize(q, k, v, causal, segment_ids, positions, window, soft_cap, scale, None, None)
    B, T, N, _ = q.shape
    if dout.shape != (B, T, N, v.shape[3]) or not lse.shape == delta.shape == (B, T, N):
        raise ValueError(
            f"attention_backward takes dout [B={B}, T={T}, N={N}, Hv={v.shape[3]}], lse and delta [B, T, N]. "
            f"Got {dout.shape}, {lse.shape}, {delta.shape}"
        )
    module, _ = BACKENDS[choose(inputs, options, implementation)]
    if 0 in q.shape:
        q, k, v = map(jnp.zeros_like, unify_vma(inputs)[:3])
        return q, k, v
    module = importlib.import_module(module)
    if not hasattr(module, "backward"):
        module = importlib.import_module(BACKENDS["xla"][0])
    unseen = lse == -jnp.inf
    rows = dout.astype(q.dtype), jnp.where(unseen, 0.0, lse), jnp.where(unseen, 0.0, delta)
    inputs, rows = unify_vma((inputs, rows))
    return module.backward(inputs, options, *rows)


def attention_implementation(
    q,
    k,
    v,
    *,
    causal=False,
    segment_ids=None,
    positions=None,
    window=None,
    soft_cap=None,
    scale=None,
    sinks=None,
    bias=None,
    return_lse=False,
    implementation=None,
) -> str:
    """The backend that `attention` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    del return_lse  # every backend returns it
    inputs, options = normalize(q, k, v, causal, segment_ids, positions, window, soft_cap, scale, sinks, bias)
    return choose(inputs, options, implementation)


def choose(inputs: Inputs, options: Options, implementation: str | None, op="attention", backends=BACKENDS) -> str:
    def check(module):
        supported = getattr(importlib.import_module(module), "supported", None)
        return supported(inputs, options) if supported else None

    supported = {name: functools.partial(check, module) for name, (module, _) in backends.items()}
    return _dispatch.choose(op, implementation, supported)


def empty(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """The output and the logsumexp of no query."""
    q = unify_vma(inputs).q
    return jnp.zeros_like(q, shape=(*q.shape[:3], inputs.v.shape[3])), jnp.zeros_like(q, jnp.float32, q.shape[:3])


def _run(name: str):
    module, function = BACKENDS[name]
    return getattr(importlib.import_module(module), function)


def normalize(q, k, v, causal, segment_ids, positions, window, soft_cap, scale, sinks, bias) -> tuple[Inputs, Options]:
    """Every check of the public function's input."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (len(q.shape) == len(k.shape) == len(v.shape) == 4):
        raise ValueError(f"attention takes q [B,T,N,H], k [B,S,K,H], v [B,S,K,Hv]. Got {shapes}")
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if k.shape != (B, S, K, H) or v.shape[:3] != (B, S, K):
        raise ValueError(f"attention takes q [B,T,N,H], k [B,S,K,H], v [B,S,K,Hv]; the sizes disagree. Got {shapes}")
    if K == 0 or N % K:
        raise ValueError(f"attention: {N} query heads are not divisible by {K} kv heads. Got {shapes}")
    if 0 in (S, H, v.shape[3]):
        raise ValueError(f"attention needs at least one key and head_dims of at least 1. Got {shapes}")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            "attention takes q, k, v of one dtype, float32, bfloat16 or float16; cast them. "
            f"Got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    q_ids, kv_ids = _pair("segment_ids", segment_ids, B, T, S)
    q_pos, kv_pos = _pair("positions", positions, B, T, S)
    if sinks is not None and (sinks.shape != (N,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"attention: sinks must be floating [N={N}]. Got {sinks.dtype} {sinks.shape}")
    if bias is not None:
        fits = len(bias.shape) == 4 and all(d in (1, full) for d, full in zip(bias.shape, (B, N, T, S)))
        if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
            raise ValueError(
                f"attention: bias must be floating and broadcast to [B={B}, N={N}, T={T}, S={S}] with four dims. "
                f"Got {bias.dtype} {bias.shape}"
            )
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"attention: soft_cap must be positive, or None. Got {soft_cap}")
    scale = 1.0 / math.sqrt(H) if scale is None else float(scale)
    static, traced = _window(window)
    inputs = Inputs(q, k, v, bias, sinks, q_ids, kv_ids, q_pos, kv_pos, traced)
    return inputs, Options(bool(causal), static, scale, None if soft_cap is None else float(soft_cap))


def _pair(name, value, B, T, S):
    if value is None:
        return None, None
    if not isinstance(value, tuple | list):
        if T != S:
            raise ValueError(f"attention: one array of {name} needs T == S; give a pair [B,T], [B,S]. Got T={T}, S={S}")
        value = (value, value)
    if len(value) != 2 or value[0].shape != (B, T) or value[1].shape != (B, S):
        got = ", ".join(str(x.shape) for x in value)
        raise ValueError(f"attention: {name} must be [B={B}, T={T}], or a pair with [B={B}, S={S}]. Got {got}")
    if not all(x.dtype == jnp.int32 for x in value):
        raise ValueError(f"attention: {name} must be int32. Got {', '.join(str(x.dtype) for x in value)}")
    return tuple(value)


def _window(window) -> tuple[tuple[int | None, int | None], jax.Array | None]:
    """The static (left, right), and the traced one."""
    if window is None:
        return (None, None), None
    if isinstance(window, int | np.integer):
        window = (int(window) - 1, int(window) - 1)
    if isinstance(window, tuple | list):
        left, right = window
        if any(w is not None and w < 0 for w in (left, right)):
            raise ValueError(
                f"attention: a window holds at least the query itself: an int >= 1, or a pair >= 0. Got {window}"
            )
        return (left, right), None
    if window.shape != () or window.dtype != jnp.int32:
        raise ValueError(f"attention: a window array must be an int32 scalar. Got {window.dtype} {window.shape}")
    return (None, None), window
