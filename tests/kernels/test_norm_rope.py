"""Norm and rotation of heads: every backend against float64 numpy, values and both gradients.

The kernel runs in JAX's interpreter here; benchmarks/norm_rope/bench.py repeats the comparison on the device.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jaxscale import MeshConfig, make_mesh
from jaxscale.layers import rope, rope_angles, rope_frequencies
from pallas_kernels import norm_rope, norm_rope_implementation
from pallas_kernels.norm_rope import pallas_mosaic_gpu

EPS = 1e-3  # large enough that a wrong place for it shows


def oracle(x, scale, cos, sin, grad):
    """The output, and the gradients of sum(output * grad) to x and scale; heads are turned as complex numbers."""
    x, cos, sin, grad = (np.asarray(a, np.float64) for a in (x, cos, sin, grad))
    turn = (cos + 1j * sin)[:, :, None]

    def turned(x, turn):
        a, b = np.split(x, 2, axis=-1)
        y = (a + 1j * b) * turn
        return np.concatenate([y.real, y.imag], axis=-1)

    back = turned(grad, turn.conj())
    if scale is None:
        return turned(x, turn), back
    scale = np.asarray(scale, np.float64)
    size = np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS)
    n, dn = x / size, back * scale
    dx = (dn - n * (dn * n).mean(axis=-1, keepdims=True)) / size
    return turned(n * scale, turn), dx, (back * n).sum(axis=(0, 1, 2))


def random(rng, B, T, N, H, dtype):
    new = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)
    angle = rng.uniform(0, 2 * np.pi, (B, T, H // 2))
    turn = jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)
    return new(B, T, N, H), jnp.asarray(rng.normal(size=H), jnp.float32), turn, new(B, T, N, H)


def check(rng, name, shape, dtype, *, norm=True, offset=0.0):
    x, scale, turn, grad = random(rng, *shape, dtype)
    f = functools.partial(norm_rope, eps=EPS, offset=offset, implementation=name)
    with plgpu.force_gpu_interpret_mode() if name == "mosaic_gpu" else contextlib.nullcontext():
        if norm:
            got, vjp = jax.vjp(lambda x, scale: f(x, scale, *turn), x, scale)
        else:
            got, vjp = jax.vjp(lambda x: f(x, None, *turn), x)
        got = got, *vjp(grad)
    want = oracle(x, scale + offset if norm else None, *turn, grad)
    bound = 2e-6 if dtype == jnp.float32 else 8e-3
    for what, a, b in zip(("y", "dx", "dscale"), got, want, strict=False):
        atol = (2e-6 if what == "dscale" else bound) * np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=atol, err_msg=f"{what} {shape}")
    assert got[0].dtype == got[1].dtype == dtype and len(got) == len(want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("norm", [True, False])
def test_values_and_gradients(rng, norm, dtype):
    check(rng, "xla", (2, 5, 3, 8), dtype, norm=norm, offset=float(norm))


KERNEL_SHAPES = [
    (2, 16, 4, 128),  # a warp holds four heads of one token
    (1, 64, 3, 128),  # one head of four tokens
    (1, 48, 6, 64),  # two heads of four tokens
    (2, 8, 2, 256),
]


def test_kernel(rng, monkeypatch):
    monkeypatch.setattr(pallas_mosaic_gpu, "_BLOCKS", 2)  # several steps in a block, as large arrays have
    for i in rng.choice(len(KERNEL_SHAPES), 2, replace=False):  # two in each run: the interpreter is slow
        dtype = rng.choice([jnp.bfloat16, jnp.float16])
        check(rng, "mosaic_gpu", KERNEL_SHAPES[i], dtype, offset=float(rng.integers(2)))


def test_kernel_under_vmap(rng):
    x, scale, turn, grad = random(rng, 2, 8, 4, 64, jnp.bfloat16)

    def run(name):
        f = functools.partial(norm_rope, implementation=name)
        y, vjp = jax.vjp(jax.vmap(lambda x, *rest: f(x[None], scale, *(r[None] for r in rest))[0]), x, *turn)
        return y, vjp(grad)[0]

    with plgpu.force_gpu_interpret_mode():
        got = run("mosaic_gpu")
    for a, b in zip(got, run("xla"), strict=True):
        np.testing.assert_allclose(*(np.asarray(c, np.float32) for c in (a, b)), rtol=0, atol=1e-2 * jnp.abs(b).max())


def test_scan_remat_vmap(rng):
    """Two layers, each norm and rotation computed again in the backward pass, for two rows of a vmap."""
    x, scale, turn, grad = random(rng, 2, 4, 2, 16, jnp.float32)
    scales = jnp.stack([scale, 2.0 - scale])

    def run(x, turn, wrap, scan):
        layer = lambda x, scale: (x + norm_rope(x, scale, *turn), None)
        return scan(wrap(layer), x, scales)[0]

    def plain(f, x, scales):
        return functools.reduce(lambda x, scale: f(x, scale)[0], scales, x), None

    both = jax.vmap(lambda x, *turn: run(x[None], [t[None] for t in turn], jax.checkpoint, jax.lax.scan)[0])
    got = jax.vjp(lambda x: both(x, *turn), x)
    want = jax.vjp(lambda x: run(x, turn, lambda f: f, plain), x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[1](grad)[0], want[1](grad)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["tp=2,fsdp=2,cp=2", "tp=4,dp=2"])
def test_heads_over_a_mesh(rng, mesh):
    """Tokens over dp, fsdp and cp, heads over tp: as on one device, and the scale's gradient is the sum of all."""
    x, scale, _, grad = random(rng, 4, 6, 4, 16, jnp.float32)
    positions = jnp.asarray(rng.integers(0, 1000, (4, 6)), jnp.int32)
    frequencies, _ = rope_frequencies(16, 1e4, None)

    def run(x, scale, positions, grad):
        y, vjp = jax.vjp(lambda x, scale: rope(x, rope_angles(positions, frequencies), scale, offset=1.0), x, scale)
        return y, *vjp(grad)

    want = jax.jit(run)(x, scale, positions, grad)
    mesh = make_mesh(MeshConfig.parse(mesh))
    heads, tokens = P(("dp", "fsdp"), "cp", "tp"), P(("dp", "fsdp"), "cp")
    with jax.set_mesh(mesh):
        args = [jax.device_put(a, s) for a, s in ((x, heads), (scale, P()), (positions, tokens), (grad, heads))]
        got = jax.jit(run)(*args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("check_vma", [True, False])
def test_kernel_types_under_shard_map(check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = make_mesh(MeshConfig.parse("dp=4,tp=2"))
    specs = P("dp", None, "tp"), P(), P("dp"), P("dp")
    with jax.set_mesh(mesh), plgpu.force_gpu_interpret_mode():

        def loss(x, scale, cos, sin):
            local = functools.partial(norm_rope, implementation="mosaic_gpu")
            y = jax.shard_map(local, in_specs=specs, out_specs=specs[0], check_vma=check_vma)(x, scale, cos, sin)
            return y.astype(jnp.float32).sum()

        shapes = ((4, 32, 8, 64), jnp.bfloat16), ((64,), jnp.float32), *[((4, 32, 32), jnp.float32)] * 2
        args = [jax.ShapeDtypeStruct(*a, sharding=jax.NamedSharding(mesh, s)) for a, s in zip(shapes, specs)]
        grads = jax.eval_shape(jax.grad(loss, (0, 1)), *args)
    assert [(g.shape, g.dtype) for g in grads] == list(shapes[:2])


def test_what_runs(rng):
    x, scale, turn, _ = random(rng, 1, 64, 4, 64, jnp.bfloat16)
    assert norm_rope_implementation(x, scale, *turn) == "xla"  # this is a CPU
    with pytest.raises(NotImplementedError, match="Hopper"):
        norm_rope(x, scale, *turn, implementation="mosaic_gpu")
    with plgpu.force_gpu_interpret_mode():
        assert norm_rope_implementation(x, scale, *turn) == "mosaic_gpu"
        for bad, reason in [
            ((x, None), "XLA rotates alone"),
            ((x.astype(jnp.float32), scale), "float32"),
            ((x[..., :32], scale[:32]), "head_dim"),
            ((x[:, :3], scale), "tokens"),
        ]:
            few = [t[:, : bad[0].shape[1], : bad[0].shape[3] // 2] for t in turn]
            assert norm_rope_implementation(*bad, *few) == "xla"
            with pytest.raises(NotImplementedError, match=reason):
                norm_rope(*bad, *few, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.zeros((2, 4, 8))}, "B, T, N, H"),
        ({"x": jnp.zeros((1, 2, 3, 8), jnp.int32)}, "cast"),
        ({"scale": jnp.zeros(4)}, "H=8"),
        ({"cos": jnp.zeros((1, 2, 8))}, "H/2=4"),
        ({"cos": jnp.zeros((1, 2, 4), jnp.bfloat16)}, "float32"),
        ({"implementation": "cuda"}, "unknown"),
    ],
    ids=str,
)
def test_errors(change, message):
    call = {"x": jnp.zeros((1, 2, 3, 8)), "scale": jnp.zeros(8)} | dict.fromkeys(("cos", "sin"), jnp.zeros((1, 2, 4)))
    with pytest.raises(ValueError, match=message):
        norm_rope(**call | change)
