"""The public functions: check their input, pick a backend, run it."""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import _dispatch
from pallas_kernels.attention.inputs import unify_vma
from pallas_kernels.decode_attention.inputs import Inputs, Options

# In the order of preference. Each module has supported(inputs, options) -> None | reason, and the function named here.
BACKENDS = {
    "mosaic_gpu": ("pallas_kernels.decode_attention.pallas_mosaic_gpu", "decode_attention_mosaic_gpu"),
    "xla": ("pallas_kernels.decode_attention.xla", "decode_attention_xla"),
    "reference": ("pallas_kernels.decode_attention.reference", "decode_attention_reference"),
}

MAX_QUERIES = 8
_FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
_QUANTIZED = (jnp.int8, jnp.int4, jnp.float8_e4m3fn, jnp.float8_e5m2)


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    k_scales: jax.Array | None = None,
    v_scales: jax.Array | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    first_page: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Exact softmax attention of the last one to eight tokens of each sequence to a paged key-value cache.

    The T queries are the last T of `lengths[b]` tokens, whose keys already lie in the cache: query t stands at position
    `lengths[b] - T + t` and sees the keys up to its own. `logits = soft_cap * tanh(scale * q @ k / soft_cap)` in
    float32. A query that sees no key (a length of 0, or below T) gives zeros. What lies in slots past a sequence's end,
    and in its page table past its last page, is never seen: it may be anything, nan too. No gradients.

    Args:
      q: [B, T, N, H], 1 <= T <= 8; float32, bfloat16 or float16.
      k_pages: [P, page, K, H]: P pages of `page` tokens, N divisible by K. In q's dtype, or int8, int4, float8_e4m3fn,
        float8_e5m2. A contiguous cache [B, S, K, H] is `k.reshape(B * S // page, page, K, H)`.
      v_pages: [P, page, K, Hv], the dtype of k_pages.
      page_table: int32 [B, M]: the page that holds tokens [i * page, (i + 1) * page) of sequence b.
      lengths: int32 [B], in tokens, at most M * page.
      k_scales, v_scales: float32, what a head's numbers are multiplied with: [P, K] of a page, or [P, page, K] of a
        token. int8 and int4 need both, float8 takes them, pages in q's dtype have none.
      window: a query sees the keys less than `window` positions before it, itself counted.
      soft_cap: bounds the logits.
      scale: of the logits; H ** -0.5 by default.
      sinks: [N] floating: one more key per head with that logit and a value of zero.
      first_page: int32 []: the page that the table counts from, 0 by default. So all layers of a model share a table.
      implementation: a key of `BACKENDS`: "mosaic_gpu", "xla", "reference"; None takes the first that can run the call
        here.

    Returns:
      [B, T, N, Hv] in q's dtype.

    Raises:
      ValueError: shapes or dtypes that disagree, an unknown implementation.
      NotImplementedError: the named implementation cannot run this call.
    """
    arrays = q, k_pages, v_pages, page_table, lengths, k_scales, v_scales, sinks, first_page
    inputs, options = _check(Inputs(*arrays), window, soft_cap, scale)
    module, function = BACKENDS[_choose(inputs, options, implementation)]
    if 0 in q.shape:
        return jnp.zeros((*q.shape[:3], v_pages.shape[3]), q.dtype)
    return getattr(importlib.import_module(module), function)(unify_vma(inputs), options)


def decode_attention_implementation(
    q,
    k_pages,
    v_pages,
    page_table,
    lengths,
    *,
    k_scales=None,
    v_scales=None,
    window=None,
    soft_cap=None,
    scale=None,
    sinks=None,
    first_page=None,
    implementation=None,
) -> str:
    """The backend that `decode_attention` runs for the same arguments, here; arrays may be jax.ShapeDtypeStruct."""
    arrays = q, k_pages, v_pages, page_table, lengths, k_scales, v_scales, sinks, first_page
    return _choose(*_check(Inputs(*arrays), window, soft_cap, scale), implementation)


def attend_new_token(
    parts: jax.Array,
    k_cache: jax.Array,
    v_cache: jax.Array,
    index: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    window: int | None = None,
    soft_cap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of one new token of each sequence, whose key and value are written to a contiguous cache on the way.

    Queries and keys are rotated by position (rope). The cache is written in place where it is donated. Masks, windows
    and soft caps are those of `decode_attention` for lengths of `positions + 1`.

    Args:
      parts: [P, B, N + 2 K, H]: their sum, rounded to the cache's dtype, is queries, keys and values.
      k_cache, v_cache: [L, B, S, K, H].
      index: int32 [], the layer.
      positions: int32 [B], the slots; what is outside of the cache is not written.
      cos, sin: float32 [B, H/2], of each token's angles.
      implementation: "mosaic_gpu", "xla" (whose attention is `decode_attention`), or None: the first that runs here.

    Returns:
      [B, N, H] in the cache's dtype, and both caches.
    """
    shapes = f"parts {parts.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}, cos {cos.shape}, sin {sin.shape}"
    if parts.ndim != 4 or k_cache.ndim != 5 or k_cache.shape != v_cache.shape or k_cache.shape[1] != parts.shape[1]:
        raise ValueError(f"attend_new_token takes parts [P, B, N + 2 K, H], caches [L, B, S, K, H]. Got {shapes}")
    _, B, both, H = parts.shape
    K = k_cache.shape[3]
    N = both - 2 * K
    if N < 1 or N % K or k_cache.shape[4] != H or not cos.shape == sin.shape == (B, H // 2) or positions.shape != (B,):
        raise ValueError(f"attend_new_token: the sizes disagree. Got {shapes}, positions {positions.shape}")
    options = _options(window, soft_cap, scale, H)
    kernel = importlib.import_module("pallas_kernels.decode_attention.pallas_mosaic_gpu_short")
    xla = importlib.import_module("pallas_kernels.decode_attention.xla")
    mosaic = lambda: _dispatch.unless_hopper() or kernel.unfit_new_token(k_cache, N)
    chosen = _dispatch.choose("attend_new_token", implementation, {"mosaic_gpu": mosaic, "xla": lambda: None})
    index = jnp.asarray(index, jnp.int32)
    arrays = parts, k_cache, v_cache, index, positions, cos, sin
    if chosen == "mosaic_gpu":
        return kernel.attend_new_token(*arrays, options)
    q, k_cache, v_cache = xla.rotate_and_write(*arrays)
    k, v = (x.reshape(-1, *x.shape[2:]) for x in (k_cache, v_cache))
    table = jnp.asarray(np.arange(B, dtype=np.int32)[:, None])  # a constant, where an iota is a kernel
    out = decode_attention(q[:, None], k, v, table, positions + 1, first_page=index * B, **dataclasses.asdict(options))
    return out[:, 0], k_cache, v_cache


def _choose(inputs: Inputs, options: Options, implementation: str | None) -> str:
    def check(module):
        supported = getattr(importlib.import_module(module), "supported", None)
        return supported(inputs, options) if supported else None

    supported = {name: functools.partial(check, module) for name, (module, _) in BACKENDS.items()}
    return _dispatch.choose("decode_attention", implementation, supported)


def _check(inputs: Inputs, window, soft_cap, scale) -> tuple[Inputs, Options]:
    """Every check of the public function's input."""
    q, k, v, table, lengths, k_scales, v_scales, sinks, first_page = inputs
    shapes = f"q {q.shape}, k_pages {k.shape}, v_pages {v.shape}, page_table {table.shape}, lengths {lengths.shape}"
    if not (len(q.shape) == len(k.shape) == len(v.shape) == 4) or len(table.shape) != 2 or len(lengths.shape) != 1:
        raise ValueError(
            "decode_attention takes q [B,T,N,H], k_pages [P,page,K,H], v_pages [P,page,K,Hv], page_table [B,M], "
            f"lengths [B]. Got {shapes}"
        )
    B, T, N, H = q.shape
    P, page, K, _ = k.shape
    if v.shape[:3] != (P, page, K) or k.shape[3] != H or table.shape[0] != B or lengths.shape != (B,):
        raise ValueError(f"decode_attention: the sizes disagree. Got {shapes}")
    if min(*k.shape, v.shape[3], table.shape[1]) == 0:
        raise ValueError(f"decode_attention needs pages, at least one for each sequence. Got {shapes}")
    if not 1 <= T <= MAX_QUERIES:
        raise ValueError(
            f"decode_attention takes 1 to {MAX_QUERIES} query tokens; use attention for longer ones. Got {shapes}"
        )
    if N % K:
        raise ValueError(f"decode_attention: {N} query heads are not divisible by {K} kv heads. Got {shapes}")
    if q.dtype not in _FLOATS or k.dtype != v.dtype or k.dtype not in (q.dtype, *_QUANTIZED):
        raise ValueError(
            "decode_attention takes q in float32, bfloat16 or float16, and pages in its dtype or in int8, int4, "
            f"float8_e4m3fn, float8_e5m2. Got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if table.dtype != jnp.int32 or lengths.dtype != jnp.int32:
        raise ValueError(
            f"decode_attention: page_table and lengths must be int32. Got {table.dtype} and {lengths.dtype}"
        )
    for name, x in (("k_scales", k_scales), ("v_scales", v_scales)):
        must = f"float32 [P={P}, K={K}] or [P={P}, page={page}, K={K}]"
        if x is None and k.dtype in (jnp.int8, jnp.int4):
            raise ValueError(f"decode_attention: {k.dtype} pages need {name}, {must}")
        if x is not None and k.dtype == q.dtype:
            raise ValueError(f"decode_attention: {name} belongs to pages of fewer bits. Got pages in {k.dtype}")
        if x is not None and (x.shape not in ((P, K), (P, page, K)) or x.dtype != jnp.float32):
            raise ValueError(f"decode_attention: {name} must be {must}. Got {x.dtype} {x.shape}")
    if sinks is not None and (sinks.shape != (N,) or not jnp.issubdtype(sinks.dtype, jnp.floating)):
        raise ValueError(f"decode_attention: sinks must be floating [N={N}]. Got {sinks.dtype} {sinks.shape}")
    if first_page is not None and (first_page.shape != () or first_page.dtype != jnp.int32):
        raise ValueError(f"decode_attention: first_page must be int32 []. Got {first_page.dtype} {first_page.shape}")
    return inputs, _options(window, soft_cap, scale, H)


def _options(window, soft_cap, scale, H: int) -> Options:
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"decode_attention: soft_cap must be positive, or None. Got {soft_cap}")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: a window holds at least the query itself: an int >= 1. Got {window}")
    scale = 1.0 / math.sqrt(H) if scale is None else float(scale)
    return Options(window, scale, None if soft_cap is None else float(soft_cap))
