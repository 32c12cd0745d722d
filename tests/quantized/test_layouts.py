"""4-bit layouts of other tools: each word and block read by an oracle of its own, and written back bit for bit."""

import importlib.util
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.checkpoint.gguf import import_gguf
from jaxscale.checkpoint.int4_layouts import export_awq, export_gptq, import_awq, import_gptq, unpack_gguf
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import init_params, path_name
from pallas_kernels import QuantizedArray, quantize_array

# The writer of GGUF files of tests/generate: tests are no package.
spec = importlib.util.spec_from_file_location("test_gguf", Path(__file__).parents[1] / "generate" / "test_gguf.py")
assert spec is not None and spec.loader is not None
gguf_tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gguf_tests)
CFG = gguf_tests.CFG


def blocks(values, scales, offsets, kind):
    """The bytes of rows of blocks, one number after another."""
    out = bytearray()
    for v, s, *m in zip(
        values.reshape(-1, 32), scales.reshape(-1), *([] if offsets is None else [offsets.reshape(-1)])
    ):
        out += np.float16(s).tobytes() + b"".join(np.float16(x).tobytes() for x in m)
        if kind == "Q8_0":
            out += v.astype(np.int8).tobytes()
        else:
            q = v.astype(int) + 8
            out += bytes(int(q[i]) | int(q[i + 16]) << 4 for i in range(16))
    return np.frombuffer(bytes(out), np.uint8)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_blocks(rng, kind):
    low, high = (-128, 128) if kind == "Q8_0" else (-8, 8)
    values, scales = rng.integers(low, high, size=(3, 64)), rng.normal(size=(3, 2)).astype(np.float16)
    offsets = rng.normal(size=(3, 2)).astype(np.float16) if kind == "Q4_1" else None
    data = blocks(values, scales, offsets, kind).reshape(3, -1)
    got = unpack_gguf(data, kind)
    for a, b in zip(got, (values, scales, offsets)):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="type Q6_K are not kept packed"):
        unpack_gguf(data, "Q6_K")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_packed_file_is_the_dequantized_one(tmp_path, rng, kind):
    """The very numbers of the file, in the places of the parameters, and the same logits."""
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), decoder.param_specs(CFG))
    path = gguf_tests.write(tmp_path / "m.gguf", params, quantize=gguf.GGMLQuantizationType[kind])
    want, _, _ = import_gguf(path)
    got, _, _ = import_gguf(path, packed=True)
    quantized = 0
    for name, w in jax.tree.leaves_with_path(got, is_leaf=lambda x: isinstance(x, QuantizedArray)):
        other = want
        for key in name:
            other = other[key.key]
        dense = w.dequantize() if isinstance(w, QuantizedArray) else w
        np.testing.assert_array_equal(np.asarray(dense), np.asarray(other), err_msg=path_name(name))
        quantized += isinstance(w, QuantizedArray)
    assert quantized == 9
    forward = jax.jit(decoder.forward, static_argnames="cfg")
    tokens = jnp.asarray(rng.integers(0, CFG.vocab_size, size=(2, 8)), jnp.int32)
    a, b = forward(got, tokens, cfg=CFG), forward(want, tokens, cfg=CFG)
    np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))


def test_a_packed_file_goes_into_shards(tmp_path, rng):
    params = init_params(jax.random.key(int(rng.integers(1 << 30))), decoder.param_specs(CFG))
    path = gguf_tests.write(tmp_path / "m.gguf", params, quantize=gguf.GGMLQuantizationType.Q4_1)
    one, _, _ = import_gguf(path, packed=True)
    got, _, _ = import_gguf(path, packed=True, mesh=make_mesh(devices=jax.devices()[:6], fsdp=2, tp=3))
    jax.tree.map(np.testing.assert_array_equal, got, one)
    down = got["layers"]["mlp"]["w_down"]  # F=96 over tp=3: a block for each
    assert down.values.sharding.shard_shape(down.values.shape) == (3, 32, 32)
    assert down.scales.sharding.shard_shape(down.scales.shape) == (3, 32, 1)
    with pytest.raises(ValueError, match=r"no matrix in Q4_0, Q4_1 or Q8_0 to keep packed; its types are \['F32'\]"):
        import_gguf(gguf_tests.write(tmp_path / "f.gguf", params), packed=True)


def words(q, zeros, order, less):
    """AWQ and GPTQ words by shifting single bits, as their papers' code defines them: q [K, N], zeros [G, N]."""
    K, N = q.shape

    def word(numbers):
        bits = "".join(f"{int(n):04b}" for n in reversed(numbers))
        return np.array(int(bits, 2), np.uint32).view(np.int32)

    along_n = lambda x: np.array([[word([row[8 * j + o] for o in order]) for j in range(N // 8)] for row in x])
    if order == range(8):
        packed = np.array([[word(q[8 * i : 8 * i + 8, n]) for n in range(N)] for i in range(K // 8)])
    else:
        packed = along_n(q)
    return packed, along_n(zeros - less)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_words_of_gptq_and_awq(rng, kind):
    K, N, group = 64, 16, 32
    order, less = (range(8), 1) if kind == "gptq" else ([0, 2, 4, 6, 1, 3, 5, 7], 0)
    q = rng.integers(0, 16, size=(K, N))
    zeros = rng.integers(less, 16 + less, size=(K // group, N))
    zeros[:, :2] = less, 15 + less
    scales = rng.uniform(0.01, 1, size=(K // group, N)).astype(np.float16)
    qweight, qzeros = words(q, zeros, order, less)
    w = (
        import_gptq(qweight, qzeros, scales, np.arange(K) // group)
        if kind == "gptq"
        else import_awq(qweight, qzeros, scales)
    )
    want = np.repeat(scales.astype(np.float64), group, axis=0) * (q - np.repeat(zeros, group, axis=0))
    np.testing.assert_allclose(np.asarray(w.dequantize()), want, rtol=1e-6, atol=1e-6)
    back = export_gptq(w) if kind == "gptq" else export_awq(w)
    for name, x in {"qweight": qweight, "qzeros": qzeros, "scales": scales}.items():
        np.testing.assert_array_equal(back[name], x)
        assert back[name].dtype == x.dtype


def test_layouts_refuse_what_they_cannot_hold(rng):
    w = quantize_array(jnp.asarray(rng.normal(size=(64, 16)), jnp.float32), "uint4", group=32)
    with pytest.raises(ValueError, match="integer zero points"):
        export_awq(w)
    with pytest.raises(ValueError, match="matrices of int4"):
        export_gptq(quantize_array(jnp.ones((64, 16)), "int8"))
    symmetric = quantize_array(jnp.asarray(rng.normal(size=(64, 16)), jnp.float32), "int4", scale_dtype=jnp.float16)
    np.testing.assert_array_equal(import_gptq(**export_gptq(symmetric)).dequantize(), symmetric.dequantize())
    parts = export_gptq(symmetric)
    with pytest.raises(ValueError, match="quantize with desc_act=False"):
        import_gptq(**parts | {"g_idx": parts["g_idx"][::-1] + np.arange(64, dtype=np.int32) % 2})
    with pytest.raises(ValueError, match=r"scales \(1, 8\)"):
        import_awq(parts["qweight"].T, parts["qzeros"], parts["scales"][:, :8])
    with pytest.raises(ValueError, match=r"a word in int32\. Got int64\[16, 8\]"):
        import_gptq(**parts | {"qweight": parts["qweight"].astype(np.int64)})
    parts["scales"][0, 3] = np.nan
    with pytest.raises(ValueError, match="1 of 16 scales and offsets are not finite"):
        import_gptq(**parts)
    q4_1 = np.zeros((2, 20), np.uint8)
    q4_1[1, 2:4] = 0, 0x7C  # an infinite offset
    with pytest.raises(ValueError, match="1 of 4 scales and offsets are not finite"):
        unpack_gguf(q4_1, "Q4_1")
