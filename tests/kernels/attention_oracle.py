"""A float64 oracle of attention that shares no code with its backends: values and gradients are compared with it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention


def oracle(q, k, v, *, do, dlse, causal=False, segment_ids=None, positions=None, window=None, soft_cap=None, scale=None,
           sinks=None, bias=None):  # fmt: skip
    """o, lse and every gradient of sum(o * do) + sum(lse * dlse), row by row in numpy float64."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    (B, T, N, H), (_, S, K, _) = q.shape, k.shape
    scale = H**-0.5 if scale is None else scale
    pair = lambda x: x if isinstance(x, tuple) else (x, x)
    q_ids, kv_ids = (None, None) if segment_ids is None else pair(segment_ids)
    q_pos, kv_pos = (
        (np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)) if positions is None else pair(positions)
    )
    left, right = window if isinstance(window, tuple) else (None, None) if window is None else (int(window) - 1,) * 2
    full_bias = np.zeros((B, N, T, S)) if bias is None else np.broadcast_to(np.asarray(bias, np.float64), (B, N, T, S))
    o, lse = np.zeros((B, T, N, v.shape[-1])), np.zeros((B, T, N))
    dq, dk, dv, dbias = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros((B, N, T, S))
    dsinks = None if sinks is None else np.zeros(N)
    for b, n, t in np.ndindex(B, N, T):
        ahead = np.asarray(kv_pos[b], np.int64) - int(q_pos[b, t])
        see = np.ones(S, bool)
        if causal:
            see &= ahead <= 0
        if left is not None:
            see &= -ahead <= left
        if right is not None:
            see &= ahead <= right
        if q_ids is not None:
            see &= (np.asarray(kv_ids[b]) == int(q_ids[b, t])) & (int(q_ids[b, t]) != 0)
        keys, values = k[b, :, n * K // N], v[b, :, n * K // N]
        x = scale * keys @ q[b, t, n]
        tanh = np.tanh(x / soft_cap) if soft_cap else 0.0
        x = np.where(see, (soft_cap * tanh if soft_cap else x) + full_bias[b, n, t], -np.inf)
        sink = -np.inf if sinks is None else float(sinks[n])
        top = max(x.max(), sink)
        if top == -np.inf:
            lse[b, t, n] = -np.inf
            continue
        lse[b, t, n] = top + np.log(np.exp(x - top).sum() + np.exp(sink - top))
        p = np.exp(x - lse[b, t, n])
        o[b, t, n] = p @ values
        delta = do[b, t, n] @ o[b, t, n] - dlse[b, t, n]
        dx = p * (values @ do[b, t, n] - delta)
        dbias[b, n, t] = dx
        dx = dx * (1 - tanh**2)
        dv[b, :, n * K // N] += p[:, None] * do[b, t, n]
        dk[b, :, n * K // N] += scale * dx[:, None] * q[b, t, n]
        dq[b, t, n] = scale * dx @ keys
        if dsinks is not None:
            dsinks[n] -= np.exp(sink - lse[b, t, n]) * delta
    grads = {"q": dq, "k": dk, "v": dv}
    if sinks is not None:
        grads["sinks"] = dsinks
    if bias is not None:
        axes = tuple(i for i, d in enumerate(bias.shape) if d == 1)
        grads["bias"] = dbias.sum(axis=axes, keepdims=True)
    return o, lse, grads


def one(rng, shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def documents(rng, B, T, padding=0):
    """Ids of documents of mixed length, in order, then padding."""
    starts = np.sort(rng.choice(np.arange(1, T - padding), size=(B, 3)), axis=1)
    ids = 1 + (np.arange(T)[None, :, None] >= starts[:, None, :]).sum(axis=2)
    ids[:, T - padding :] = 0
    return jnp.asarray(ids, jnp.int32)


def restarting(ids):
    """Positions that count from 0 in each document."""
    ids = np.asarray(ids)
    first = np.stack(
        [np.searchsorted(np.where(row == 0, 1 << 20, row), np.where(row == 0, 1 << 20, row)) for row in ids]
    )
    return jnp.asarray(np.arange(ids.shape[1])[None] - first, jnp.int32)


def interpreter(name):
    if name == "mosaic_gpu":
        return plgpu.force_gpu_interpret_mode()
    return pltpu.force_tpu_interpret_mode() if name == "mosaic_tpu" else contextlib.nullcontext()


def check(rng, name, B, T, S, N, K, H, Hv, dtype, *, value=None, grad=None, **kwargs):
    """Values and gradients of one backend against the oracle, by relative norm; rows that see nothing exactly."""
    value = value or (1e-5 if dtype == jnp.float32 else 1e-2)
    grad = grad or (1e-5 if dtype == jnp.float32 else 1e-2)
    q, k, v = one(rng, (B, T, N, H), dtype), one(rng, (B, S, K, H), dtype), one(rng, (B, S, K, Hv), dtype)
    do, dlse = one(rng, (B, T, N, Hv), dtype), one(rng, (B, T, N))
    leaves = {"q": q, "k": k, "v": v} | {x: kwargs.pop(x) for x in ("sinks", "bias") if x in kwargs}

    def loss(leaves):
        o, lse = attention(**leaves, **kwargs, return_lse=True, implementation=name)
        seen = jnp.where(lse == -jnp.inf, 0.0, lse)
        return jnp.sum((o * do).astype(jnp.float32)) + jnp.sum(seen * dlse), (o, lse)

    with interpreter(name):
        (_, (o, lse)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(leaves)
        jax.block_until_ready(grads)
    want_o, want_lse, want = oracle(**leaves, **kwargs, do=do, dlse=dlse)
    assert o.dtype == dtype
    assert lse.dtype == jnp.float32
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    finite = ~np.isneginf(want_lse)
    np.testing.assert_allclose(np.asarray(lse)[finite], want_lse[finite], atol=1e-4 if dtype == jnp.float32 else 1e-3)
    assert not np.asarray(o, np.float64)[~finite].any()
    close("o", o, want_o, value)
    for leaf, x in want.items():
        assert grads[leaf].dtype == leaves[leaf].dtype
        # A sink's gradient is a sum of terms of both signs: the error counts against their size.
        close(f"d{leaf}", grads[leaf], x, 4 * grad if leaf == "sinks" else grad)


def close(what, got, want, tolerance):
    got = np.asarray(got, np.float64)
    assert np.isfinite(got).all(), what
    error = np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30)
    assert error < tolerance, f"{what}: relative error {error:.2e}, at most {tolerance:.0e}"


def registers(x, layout):
    """The numbers of x [64, n] as each thread of a warpgroup holds them, by the layout itself."""
    for tile in layout.tiling.tiles:
        n, first = len(tile), x.ndim - len(tile)
        x = x.reshape(*x.shape[:first], *(y for d, t in zip(x.shape[first:], tile) for y in (d // t, t)))
        order = [*range(first), *range(first, first + 2 * n, 2), *range(first + 1, first + 2 * n, 2)]
        x = x.transpose(order)
    return x
