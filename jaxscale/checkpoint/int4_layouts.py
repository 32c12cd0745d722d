"""Matrices in 4 bits as other tools store them <-> QuantizedArray, without going through floats.

GGUF blocks of 32 (Q4_0, Q4_1, Q8_0; ggml's block_q4_0, block_q4_1, block_q8_0), and the int32 words of GPTQ (arXiv
2210.17323, as AutoGPTQ writes them) and AWQ (arXiv 2306.00978, as AutoAWQ writes them). All have w = s (q - z) or
s q + m with one scale for a group of inputs; they differ in the order of the nibbles.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from pallas_kernels.quantized_matmul.array import ZERO, QuantizedArray

BLOCK = 32  # numbers of a GGUF block
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is output 8 j + _AWQ_ORDER[i]
_IN_ORDER = tuple(range(8))


def unpack_gguf(rows: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Bytes [rows, bytes] of a matrix [rows, K] -> values [rows, K], float16 scales and offsets [rows, K / 32].

    Args:
      kind: "Q4_0", "Q4_1" or "Q8_0". Values are int8; of Q4_0 and Q4_1 q - 8, of which Q4_1 has offsets to 8 more.
    """
    sizes = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
    if kind not in sizes:
        raise ValueError(f"GGUF tensors of type {kind} are not kept packed; those that are: {', '.join(sizes)}")
    blocks = np.ascontiguousarray(rows).view(np.uint8).reshape(rows.shape[0], -1, sizes[kind])
    head = blocks[..., : 4 if kind == "Q4_1" else 2].copy().view(np.float16)
    _check_finite(head)
    body = blocks[..., 2 * head.shape[-1] :]
    if kind == "Q8_0":
        values = body.view(np.int8)
    else:  # byte i holds numbers i and i + 16
        values = np.concatenate([body & 15, body >> 4], axis=-1).astype(np.int8) - ZERO
    offsets = head[..., 1] if kind == "Q4_1" else None
    return values.reshape(rows.shape[0], -1), head[..., 0], offsets


def import_gptq(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray | None = None
) -> QuantizedArray:
    """A matrix [K, N].

    Args:
      qweight: int32 [K / 8, N]; word k // 8 holds inputs 8 (k // 8) to + 7, the first in its lowest bits.
      qzeros: int32 [G, N / 8], zero points less one, of outputs in order.
      scales: float16 [G, N].
      g_idx: int32 [K], the group of each input; only groups of neighbours are supported.
    """
    q = _unpack(qweight.T, _IN_ORDER)  # [N, K]
    _check_groups(q.shape, scales, qzeros)
    group = q.shape[1] // scales.shape[0]
    if g_idx is not None and not np.array_equal(g_idx, np.arange(q.shape[1]) // group):
        raise ValueError(
            f"g_idx orders the {q.shape[1]} inputs by activation (desc_act): groups of {group} neighbours are "
            "supported; quantize with desc_act=False"
        )
    return _array(q, _unpack(qzeros, _IN_ORDER).T.astype(np.int32) + 1, scales)


def export_gptq(w: QuantizedArray) -> dict[str, np.ndarray]:
    """What `import_gptq` reads: qweight, qzeros, scales, g_idx."""
    q, zeros, scales = _parts(w)
    if zeros.min() < 1 or zeros.max() > 16:
        raise ValueError(
            f"GPTQ holds zero points from 1 to 16; these are {zeros.min()} to {zeros.max()}; use AWQ's layout"
        )
    return {
        "qweight": _pack(q, _IN_ORDER).T.copy(),
        "qzeros": _pack((zeros - 1).T, _IN_ORDER),
        "scales": scales,
        "g_idx": (np.arange(q.shape[1]) // w.group).astype(np.int32),
    }


def import_awq(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray) -> QuantizedArray:
    """A matrix [K, N].

    Args:
      qweight: int32 [K, N / 8]; word j holds outputs 8 j + 0, 2, 4, 6, 1, 3, 5, 7, the first in its lowest bits.
      qzeros: int32 [G, N / 8], zero points in the same order.
      scales: float16 [G, N].
    """
    q = _unpack(qweight, _AWQ_ORDER).T
    _check_groups(q.shape, scales, qzeros)
    return _array(q, _unpack(qzeros, _AWQ_ORDER).T.astype(np.int32), scales)


def export_awq(w: QuantizedArray) -> dict[str, np.ndarray]:
    """What `import_awq` reads: qweight, qzeros, scales."""
    q, zeros, scales = _parts(w)
    if zeros.min() < 0 or zeros.max() > 15:
        raise ValueError(f"AWQ holds zero points from 0 to 15; these are {zeros.min()} to {zeros.max()}")
    return {"qweight": _pack(q.T, _AWQ_ORDER), "qzeros": _pack(zeros.T, _AWQ_ORDER), "scales": scales}


def _array(q: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> QuantizedArray:
    """q [N, K] of 0 to 15, zeros [N, G], scales [G, N]. float32 holds the product of a zero point and a float16."""
    s = np.asarray(scales).T
    values = jnp.asarray((q.astype(np.int8) - ZERO).astype(jnp.int4))
    offsets = -s.astype(np.float32) * zeros.astype(np.float32)
    return QuantizedArray(values, jnp.asarray(s), jnp.asarray(offsets), unsigned=True)


def _parts(w: QuantizedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [N, K] of 0 to 15, integer zero points [N, G], float16 scales [G, N]."""
    if w.ndim != 2 or w.values.dtype != jnp.int4 or w.values.shape[1] % 8 or w.values.shape[0] % 8:
        raise ValueError(f"this layout holds matrices of int4 whose sizes are multiples of 8. Got {w.format} {w.shape}")
    q = np.asarray(w.natural().values).astype(np.int32) + ZERO
    s = np.asarray(w.scales, np.float32)
    zero = np.full_like(s, ZERO)
    if w.unsigned:
        offsets = np.zeros_like(s) if w.offsets is None else np.asarray(w.offsets, np.float32)
        zero = np.where(s == 0, 1, -offsets / np.where(s == 0, 1, s))
    zeros = np.round(zero).astype(np.int32)
    scales = s.astype(np.float16)
    if (w.offsets is not None and not w.unsigned) or np.abs(zero - zeros).max() > 1e-3 or (scales != s).any():
        raise ValueError("this layout holds float16 scales and integer zero points; this array has others")
    return q, zeros, np.ascontiguousarray(scales.T)


def _unpack(words: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """uint8 [rows, 8 n] of int32 words [rows, n]."""
    if words.dtype != np.int32:
        raise ValueError(f"eight numbers of 4 bits are a word in int32. Got {words.dtype}{list(words.shape)}")
    words = np.ascontiguousarray(words).view(np.uint32)
    out = np.empty((*words.shape, 8), np.uint8)
    for i, place in enumerate(order):
        out[..., place] = words >> (4 * i) & 15
    return out.reshape(words.shape[0], -1)


def _pack(q: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """int32 words [rows, n] of numbers [rows, 8 n]."""
    eight = np.ascontiguousarray(q).astype(np.uint32).reshape(q.shape[0], -1, 8)
    words = np.zeros(eight.shape[:2], np.uint32)
    for i, place in enumerate(order):
        words |= eight[..., place] << np.uint32(4 * i)
    return words.view(np.int32)


def _check_finite(scales: np.ndarray) -> None:
    if wrong := int((~np.isfinite(scales.astype(np.float32))).sum()):
        raise ValueError(
            f"{wrong} of {scales.size} scales and offsets are not finite: the file is damaged, or was made from "
            "weights that hold nan or infinities"
        )


def _check_groups(shape: tuple[int, ...], scales: np.ndarray, qzeros: np.ndarray) -> None:
    N, K = shape
    G = scales.shape[0]
    if scales.shape[1:] != (N,) or qzeros.shape != (G, N // 8) or G == 0 or K % G:
        raise ValueError(f"scales {scales.shape} and qzeros {qzeros.shape} do not fit a matrix of K={K}, N={N}")
    _check_finite(scales)
