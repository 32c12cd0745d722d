"""Attention for TPUs, written in Pallas: float32, bfloat16.

Three kernels (o and logsumexp; dq; dk and dv) that walk a grid of blocks. A table made before the kernel says which
key blocks a query block visits; the index maps stay on the last one visited, so that a block outside of the range is
neither copied nor computed, and a block that hides nothing is not masked. In the kernels arrays are [B, N, T, H].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import _dispatch
from pallas_kernels.attention.blocks import key_ranges, pad_inputs, pad_to, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options, nameable

_LANES = 128
_HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # a logit that is not seen: finite, so that differences stay finite


@dataclasses.dataclass(frozen=True)
class Config:
    """Block sizes of all three kernels, multiples of 128."""

    block_q: int = 512
    block_kv: int = 512


TUNED = Config()


def supported(inputs: Inputs, options: Options) -> str | None:
    """None, or the reason why these kernels cannot run this call."""
    del options
    if reason := _dispatch.unless_tpu():
        return reason
    if inputs.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 and bfloat16. Got {inputs.q.dtype}"
    if max(inputs.q.shape[3], inputs.v.shape[3]) > 256:
        return f"takes head_dim up to 256. Got {inputs.q.shape[3]} and {inputs.v.shape[3]}"
    if inputs.bias is not None:
        return "takes no bias"
    return None


def attention_mosaic_tpu(inputs: Inputs, options: Options, config: Config | None = None) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] in q's dtype and the logsumexp [B, T, N] in float32."""
    return _attention(inputs, options, _fit(config or TUNED, inputs))


def backward(inputs: Inputs, options: Options, do: jax.Array, lse: jax.Array, delta: jax.Array):
    """dq, dk, dv of a block of keys; do [B, T, N, Hv], lse and delta [B, T, N] are those of whole rows."""
    config = _fit(TUNED, inputs)
    rows = do, lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    return _backward_dq(inputs, options, config, *rows), *_backward_dkv(inputs, options, config, *rows)


def _fit(config: Config, inputs: Inputs) -> Config:
    up = lambda n: -(-n // _LANES) * _LANES
    return Config(min(config.block_q, up(inputs.q.shape[1])), min(config.block_kv, up(inputs.k.shape[1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(inputs: Inputs, options: Options, config: Config) -> tuple[jax.Array, jax.Array]:
    return _attention_fwd(inputs, options, config)[0]


def _attention_fwd(inputs: Inputs, options: Options, config: Config):
    """Residuals: the inputs, o, the logsumexp [B, N, T]."""
    o, lse = nameable(*_forward(inputs, options, config))
    return (o, lse.swapaxes(1, 2)), (inputs, o, lse)


def _attention_bwd(options: Options, config: Config, residuals, cotangents):
    inputs, o, lse = residuals
    do, dlse = cotangents
    unseen = lse == -jnp.inf
    dlse = jnp.where(unseen, 0.0, dlse.swapaxes(1, 2))  # a merge of blocks may send nan to a row that saw nothing
    delta = jnp.einsum("BTNH,BTNH->BNT", do, o, precision="highest", preferred_element_type=jnp.float32) - dlse
    dsinks = None
    if inputs.sinks is not None:
        p_sink = jnp.exp(inputs.sinks.astype(jnp.float32)[None, :, None] - lse)
        dsinks = -jnp.sum(p_sink * delta, axis=(0, 2)).astype(inputs.sinks.dtype)
    lse = jnp.where(unseen, 0.0, lse)
    dq = _backward_dq(inputs, options, config, do, lse, delta)
    dk, dv = _backward_dkv(inputs, options, config, do, lse, delta)
    none = dict.fromkeys(Inputs._fields[5:])
    return (inputs._replace(q=dq, k=dk, v=dv, bias=None, sinks=dsinks, **none),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(inputs: Inputs, options: Options, config: Config) -> tuple[jax.Array, jax.Array]:
    """o [B, T, N, Hv] and the logsumexp [B, N, T]."""
    B, T, N, H = inputs.q.shape
    S, K, Hv = inputs.k.shape[1], inputs.k.shape[2], inputs.v.shape[3]
    bq, bkv = config.block_q, config.block_kv
    padded = pad_inputs(inputs, bq, bkv)
    table = _Table(key_ranges(inputs, options, bq, bkv))
    mask = _Mask(padded, options, S)
    queries, keys = padded.q.shape[1] // bq, padded.k.shape[1] // bkv

    def kernel(ranges, window, sinks, q_ref, k_ref, v_ref, *refs):
        aux, (o_ref, lse_ref, acc, m, l) = refs[:-5], refs[-5:]
        b, n, i, j = (pl.program_id(axis) for axis in range(4))

        @pl.when(j == 0)
        def _start():
            acc[...] = jnp.zeros_like(acc)
            sink = _HIDDEN if inputs.sinks is None else sinks[n]
            m[...] = jnp.full(m.shape, sink, jnp.float32)
            l[...] = jnp.full(l.shape, 0.0 if inputs.sinks is None else 1.0, jnp.float32)

        def visit(masked):
            s, _ = _logits(q_ref[0, 0], k_ref[0, 0], options)
            if masked:
                keep = mask.keep(aux, window, s.shape, 0, i * bq, table.block(ranges, b, i, j) * bkv)
                s = jnp.where(keep, s, _HIDDEN)
            top = jnp.maximum(m[...], jnp.max(s, axis=1, keepdims=True))
            decay = jnp.exp(m[...] - top)
            p = jnp.exp(s - top[:, :1])
            if masked:
                p = jnp.where(keep, p, 0.0)
            m[...] = top
            l[...] = l[...] * decay + jnp.sum(p, axis=1, keepdims=True)
            acc[...] = acc[...] * decay[:, :1] + _dot(p.astype(v_ref.dtype), v_ref[0, 0], (1, 0))

        table.visit(ranges, b, i, j, visit)

        @pl.when(j == keys - 1)
        def _end():
            seen = l[...] > 0
            total = jnp.where(seen, l[...], 1.0)
            o_ref[0, 0] = (acc[...] * (1 / total)[:, :1]).astype(o_ref.dtype)
            lse_ref[0, 0] = jnp.where(seen, m[...] + jnp.log(total), -jnp.inf)[:, :1]

    key_block = lambda b, n, i, j, ranges, *_: (b, n // (N // K), table.block(ranges, b, i, j), 0)
    o, lse = _call(
        kernel,
        "attention_fwd",
        (B, N, queries, keys),
        [
            (padded.q.swapaxes(1, 2), (1, 1, bq, H), lambda b, n, i, j, *_: (b, n, i, 0)),
            (padded.k.swapaxes(1, 2), (1, 1, bkv, H), key_block),
            (padded.v.swapaxes(1, 2), (1, 1, bkv, Hv), key_block),
            *mask.specs(bq, bkv, 0, lambda b, n, i, j, ranges, *_: (b, i, table.block(ranges, b, i, j))),
        ],
        [
            ((B, N, queries * bq, Hv), inputs.q.dtype, (1, 1, bq, Hv), lambda b, n, i, j, *_: (b, n, i, 0)),
            ((B, N, queries * bq, 1), jnp.float32, (1, 1, bq, 1), lambda b, n, i, j, *_: (b, n, i, 0)),
        ],
        [(bq, Hv), (bq, _LANES), (bq, _LANES)],
        (table.array, *_scalars(inputs)),
    )
    return o.swapaxes(1, 2)[:, :T], lse[:, :, :T, 0]


def _backward_dq(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> jax.Array:
    """dq [B, T, N, H]; lse and delta are [B, N, T]."""
    B, T, N, H = inputs.q.shape
    S, K, Hv = inputs.k.shape[1], inputs.k.shape[2], inputs.v.shape[3]
    bq, bkv = config.block_q, config.block_kv
    padded = pad_inputs(inputs, bq, bkv)
    do, lse, delta = pad_to(do, 1, bq), pad_to(lse, 2, bq)[..., None], pad_to(delta, 2, bq)[..., None]
    table = _Table(key_ranges(inputs, options, bq, bkv))
    mask = _Mask(padded, options, S)
    queries, keys = padded.q.shape[1] // bq, padded.k.shape[1] // bkv

    def kernel(ranges, window, _, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        aux, (dq_ref, dq) = refs[:-2], refs[-2:]
        b, _, i, j = (pl.program_id(axis) for axis in range(4))

        @pl.when(j == 0)
        def _start():
            dq[...] = jnp.zeros_like(dq)

        def visit(masked):
            s, slope = _logits(q_ref[0, 0], k_ref[0, 0], options)
            p = jnp.exp(s - lse_ref[0, 0])
            if masked:
                keep = mask.keep(aux, window, s.shape, 0, i * bq, table.block(ranges, b, i, j) * bkv)
                p = jnp.where(keep, p, 0.0)
            ds = p * (_dot(do_ref[0, 0], v_ref[0, 0], (1, 1)) - delta_ref[0, 0])
            ds = ds if slope is None else ds * slope
            dq[...] += _dot(ds.astype(k_ref.dtype), k_ref[0, 0], (1, 0))

        table.visit(ranges, b, i, j, visit)

        @pl.when(j == keys - 1)
        def _end():
            dq_ref[0, 0] = (dq[...] * options.scale).astype(dq_ref.dtype)

    query_block = lambda b, n, i, j, *_: (b, n, i, 0)
    key_block = lambda b, n, i, j, ranges, *_: (b, n // (N // K), table.block(ranges, b, i, j), 0)
    (dq,) = _call(
        kernel,
        "attention_dq",
        (B, N, queries, keys),
        [
            (padded.q.swapaxes(1, 2), (1, 1, bq, H), query_block),
            (padded.k.swapaxes(1, 2), (1, 1, bkv, H), key_block),
            (padded.v.swapaxes(1, 2), (1, 1, bkv, Hv), key_block),
            (do.swapaxes(1, 2), (1, 1, bq, Hv), query_block),
            (lse, (1, 1, bq, 1), query_block),
            (delta, (1, 1, bq, 1), query_block),
            *mask.specs(bq, bkv, 0, lambda b, n, i, j, ranges, *_: (b, i, table.block(ranges, b, i, j))),
        ],
        [((B, N, queries * bq, H), inputs.q.dtype, (1, 1, bq, H), query_block)],
        [(bq, H)],
        (table.array, *_scalars(inputs)),
    )
    return dq.swapaxes(1, 2)[:, :T]


def _backward_dkv(inputs: Inputs, options: Options, config: Config, do, lse, delta) -> tuple[jax.Array, jax.Array]:
    """dk [B, S, K, H] and dv [B, S, K, Hv]: blocks are transposed, keys down, and sum over the heads of a group."""
    B, S, K, H = inputs.k.shape
    N, Hv = inputs.q.shape[2], inputs.v.shape[3]
    G = N // K
    bq, bkv = config.block_q, config.block_kv
    padded = pad_inputs(inputs, bq, bkv)
    do, lse, delta = pad_to(do, 1, bq), pad_to(lse, 2, bq)[:, :, None], pad_to(delta, 2, bq)[:, :, None]
    table = _Table(query_ranges(inputs, options, bq, bkv))
    mask = _Mask(padded, options, S)
    queries, keys = padded.q.shape[1] // bq, padded.k.shape[1] // bkv

    def kernel(ranges, window, _, q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, *refs):
        aux, (dk_ref, dv_ref, dk, dv) = refs[:-4], refs[-4:]
        b, _, i, g, j = (pl.program_id(axis) for axis in range(5))

        @pl.when((g == 0) & (j == 0))
        def _start():
            dk[...] = jnp.zeros_like(dk)
            dv[...] = jnp.zeros_like(dv)

        def visit(masked):
            s, slope = _logits(k_ref[0, 0], q_ref[0, 0], options)
            p = jnp.exp(s - lse_ref[0, 0])
            if masked:
                keep = mask.keep(aux, window, s.shape, 1, table.block(ranges, b, i, j) * bq, i * bkv)
                p = jnp.where(keep, p, 0.0)
            dv[...] += _dot(p.astype(do_ref.dtype), do_ref[0, 0], (1, 0))
            ds = p * (_dot(v_ref[0, 0], do_ref[0, 0], (1, 1)) - delta_ref[0, 0])
            ds = ds if slope is None else ds * slope
            dk[...] += _dot(ds.astype(q_ref.dtype), q_ref[0, 0], (1, 0))

        table.visit(ranges, b, i, j, visit)

        @pl.when((g == G - 1) & (j == queries - 1))
        def _end():
            dk_ref[0, 0] = (dk[...] * options.scale).astype(dk_ref.dtype)
            dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)

    key_block = lambda b, k, i, g, j, *_: (b, k, i, 0)
    query_block = lambda b, k, i, g, j, ranges, *_: (b, k * G + g, table.block(ranges, b, i, j), 0)
    row_block = lambda b, k, i, g, j, ranges, *_: (b, k * G + g, 0, table.block(ranges, b, i, j))
    dk, dv = _call(
        kernel,
        "attention_dkv",
        (B, K, keys, G, queries),
        [
            (padded.q.swapaxes(1, 2), (1, 1, bq, H), query_block),
            (padded.k.swapaxes(1, 2), (1, 1, bkv, H), key_block),
            (padded.v.swapaxes(1, 2), (1, 1, bkv, Hv), key_block),
            (do.swapaxes(1, 2), (1, 1, bq, Hv), query_block),
            (lse, (1, 1, 1, bq), row_block),
            (delta, (1, 1, 1, bq), row_block),
            *mask.specs(bq, bkv, 1, lambda b, k, i, g, j, ranges, *_: (b, table.block(ranges, b, i, j), i)),
        ],
        [
            ((B, K, keys * bkv, H), inputs.k.dtype, (1, 1, bkv, H), key_block),
            ((B, K, keys * bkv, Hv), inputs.v.dtype, (1, 1, bkv, Hv), key_block),
        ],
        [(bkv, H), (bkv, Hv)],
        (table.array, *_scalars(inputs)),
    )
    return dk.swapaxes(1, 2)[:, :S], dv.swapaxes(1, 2)[:, :S]


class _Table:
    """A range table of blocks.py, flat in scalar memory, and how a kernel walks it."""

    def __init__(self, ranges):
        self.rows, self.tiles = ranges.shape[:2]
        self.array = jnp.asarray(ranges).reshape(-1)

    def bounds(self, ranges, b, i):
        row = lax.rem(b, jnp.int32(self.rows)) * self.tiles + i
        return tuple(ranges[4 * row + x] for x in range(4))

    def block(self, ranges, b, i, j):
        """The block of step j; after the last one it stays there, and nothing more is copied."""
        lo, _, _, hi = self.bounds(ranges, b, i)
        return jnp.minimum(lo + j, jnp.maximum(hi - 1, 0))

    def visit(self, ranges, b, i, j, visit):
        lo, full_lo, full_hi, hi = self.bounds(ranges, b, i)
        inside = lo + j < hi
        full = (lo + j >= full_lo) & (lo + j < full_hi)
        pl.when(inside & full)(lambda: visit(False))
        pl.when(inside & ~full)(lambda: visit(True))


class _Mask:
    """The mask inside of a block: ids and positions as columns along the block's first dim, as rows along the other."""

    def __init__(self, padded: Inputs, options: Options, keys: int):
        self.padded, self.options, self.keys = padded, options, keys
        self.names = [x for x in ("positions", "segment_ids") if getattr(padded, f"q_{x}") is not None]

    def specs(self, bq: int, bkv: int, q_dim: int, index):
        """(array, block shape, index map) for each array; `index` gives (batch, query block, key block)."""
        out = []
        for name in self.names:
            for side, block, where in (("q", bq, 1), ("kv", bkv, 2)):
                x = getattr(self.padded, f"{side}_{name}")
                if (where == 1) == (q_dim == 0):
                    out.append(
                        (x[..., None], (1, block, 1), lambda *args, w=where: (index(*args)[0], index(*args)[w], 0))
                    )
                else:
                    out.append(
                        (x[:, None], (1, 1, block), lambda *args, w=where: (index(*args)[0], 0, index(*args)[w]))
                    )
        return out

    def keep(self, refs, window, shape, q_dim: int, q_start, kv_start):
        aux = {name: (refs[2 * i][0], refs[2 * i + 1][0]) for i, name in enumerate(self.names)}
        kv_index = kv_start + lax.broadcasted_iota(jnp.int32, shape, 1 - q_dim)
        if "positions" in aux:
            ahead = aux["positions"][1] - aux["positions"][0]
        else:
            ahead = kv_index - (q_start + lax.broadcasted_iota(jnp.int32, shape, q_dim))
        keep = kv_index < self.keys
        left, right = self.options.window
        if self.options.causal:
            right = 0 if right is None else min(right, 0)
        if left is not None:
            keep &= ahead >= -left
        if right is not None:
            keep &= ahead <= right
        if self.padded.window is not None:
            keep &= (ahead > -window[0]) & (ahead < window[0])
        if "segment_ids" in aux:
            q_ids, kv_ids = aux["segment_ids"]
            keep &= (q_ids == kv_ids) & (q_ids != 0)
        return keep


def _logits(x, y, options: Options):
    """scale * x @ y.T in float32, soft-capped, and the derivative of the cap."""
    s = options.scale * _dot(x, y, (1, 1))
    if options.soft_cap is None:
        return s, None
    tanh = jnp.tanh(s / options.soft_cap)
    return options.soft_cap * tanh, 1 - tanh * tanh


def _dot(x, y, contract):
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _scalars(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    window = jnp.zeros(1, jnp.int32) if inputs.window is None else inputs.window[None]
    sinks = jnp.zeros(inputs.q.shape[2], jnp.float32) if inputs.sinks is None else inputs.sinks.astype(jnp.float32)
    return window, sinks


def _call(kernel, name: str, grid, operands, outputs, scratch, scalars):
    """A grid of blocks: batch, head and tile in any order, the rest in sequence."""
    varying = jax.typeof(operands[0][0]).mat
    parallel = 3
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype, _, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[pl.BlockSpec(block, index) for _, block, index in operands],
            out_specs=[pl.BlockSpec(block, index) for _, _, block, index in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
        ),
        name=name,
    )(*scalars, *(x for x, _, _ in operands))
