"""Attention's Mosaic kernels in JAX's interpreters, at the smallest sizes that reach each path.

Blocks of 64 and 128 keep them small; each case reaches what the others do not: several blocks, skipped and unmasked
ones, ragged ends, groups of heads, rows that see nothing. benchmarks/attention/bench.py and check.py repeat the
comparison on the device at real sizes.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import attention, attention_backward
from pallas_kernels.attention.inputs import Inputs, Options
from tests.kernels.attention_oracle import check, close, documents, interpreter, one, registers, restarting

# importlib: the package's attribute `attention` is the function.
mosaic_tpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_tpu")
mosaic_gpu = importlib.import_module("pallas_kernels.attention.pallas_mosaic_gpu")
schedule = importlib.import_module("pallas_kernels.attention.schedule")
stored = importlib.import_module("pallas_kernels.attention.mosaic_gpu_stored")
fused = importlib.import_module("pallas_kernels.attention.mosaic_gpu_fused")
pieces = importlib.import_module("pallas_kernels.attention.mosaic_gpu_pieces")


def small_blocks(monkeypatch, **gpu):
    monkeypatch.setattr(mosaic_tpu, "TUNED", mosaic_tpu.Config(128, 128))
    monkeypatch.setattr(mosaic_gpu, "tuned", lambda H, Hv: mosaic_gpu.Config(**({"block_kv": 64} | gpu)))


def test_mosaic_gpu_causal_documents(rng, monkeypatch):
    small_blocks(monkeypatch, warpgroups=int(rng.choice([2, 3])), block_kv=int(rng.choice([64, 128])))
    ids = documents(rng, 1, 150, padding=20)
    kwargs = {"causal": True, "segment_ids": ids, "sinks": one(rng, (2,))}
    check(rng, "mosaic_gpu", 1, 150, 150, 2, 1, 64, 128, jnp.bfloat16, **kwargs)


def test_mosaic_gpu_window_positions(rng, monkeypatch):
    small_blocks(monkeypatch, warpgroups_bwd=1, split_dkv=True)
    positions = jnp.arange(100, dtype=jnp.int32)[None] + 30, jnp.arange(260, dtype=jnp.int32)[None]
    kwargs = {"causal": True, "window": jnp.int32(50), "positions": positions, "soft_cap": 3.0}
    check(rng, "mosaic_gpu", 1, 100, 260, 1, 1, 64, 64, jnp.float16, **kwargs)


def test_mosaic_gpu_stored_gradient_of_logits(rng, monkeypatch):
    """dq and dk from what the kernel of dv stores: blocks on and off the diagonal, ragged, groups of heads; too large
    to be stored, all is made again."""
    wgs, block = int(rng.integers(1, 3)), int(rng.choice([64, 128]))
    small_blocks(monkeypatch, warpgroups_bwd=wgs, block_q_dkv=block, split_dkv=True)
    hidden = [{"causal": True}, {"causal": True, "window": 90}, {"window": (30, 60)}, {}][rng.integers(4)]
    window = hidden.get("window", (None, None))
    options = Options("causal" in hidden, window if isinstance(window, tuple) else (window - 1,) * 2, 0.1, None)
    inputs = Inputs(*(jnp.zeros((1, n, h, 64), jnp.bfloat16) for n, h in ((200, 2), (290, 1), (290, 1))))
    found = stored.Stored.of(inputs, options)
    assert found is not None
    _, blocks, *_ = found.shape(inputs)
    assert blocks == (3 if hidden.get("causal") else 5 if hidden else 6)  # of 2 x 3 blocks, counted on paper
    check(rng, "mosaic_gpu", 1, 200, 290, 2, 1, 64, 64, jnp.bfloat16, soft_cap=5.0, **hidden)
    at = [jnp.arange(n, dtype=jnp.int32)[None] for n in (200, 290)]
    given = inputs._replace(q_positions=at[0], kv_positions=at[1])  # as the models here do: what a plan counts on
    assert stored.Stored.of(given, options) is None
    monkeypatch.setattr(stored, "_MOST_BYTES", 2 * 2 * blocks * 128 * 128 - 1)
    assert stored.Stored.of(inputs, options) is None


def test_mosaic_gpu_backward_in_one_kernel(rng, monkeypatch):
    """One group of heads after another: all but the last walk up their queries. More steps than places in the rings; a
    head_dim of v of its own, which ends in another place of shared memory."""
    small_blocks(monkeypatch, fused=True)
    monkeypatch.setattr(fused, "pays", lambda inputs: True)
    monkeypatch.setattr(pieces, "_L2_BYTES", int(rng.choice([1, 2**25])))
    ids = documents(rng, 1, 210, padding=20)
    hidden = [
        {"causal": True},
        {"window": (70, 20), "soft_cap": 3.0},
        {"bias": one(rng, (1, 4, 1, 210))},
        {"causal": True, "segment_ids": ids, "positions": restarting(ids), "window": jnp.int32(50)},
    ][rng.integers(4)]
    check(rng, "mosaic_gpu", 1, 210, 210, 4, 2, 64, int(rng.choice([64, 128])), jnp.bfloat16, **hidden)


def test_each_block_of_queries_is_summed_in_one_order(rng):
    """Both orders name each tile that visits a block once, one after the other, and the last of them."""
    starts = rng.integers(0, 9, (2, 5))
    ranges = np.stack([starts, starts, starts, starts + rng.integers(0, 4, (2, 5))], axis=-1).astype(np.int32)
    visits, turns = fused._order(ranges, 12)
    for b, block in np.ndindex(2, 12):
        tiles = [t for t in range(5) if ranges[b, t, 0] <= block < ranges[b, t, 3]]
        assert tiles == list(np.flatnonzero(visits[b, :, block]))
        for order, there in zip(turns, (tiles[::-1], tiles)):
            assert [order[b, t, block] for t in there] == [2 * i + (i == len(there) - 1) for i in range(len(there))]


def test_mosaic_gpu_several_tiles_in_a_block(rng, monkeypatch):
    """The one block of the forward kernel goes on to the next tile: q from two places in turn, a ring of k and v; rows
    past the end are computed twice by tiles of three warpgroups."""
    small_blocks(monkeypatch, warpgroups=int(rng.choice([2, 3])), block_kv=int(rng.choice([64, 128])))
    monkeypatch.setattr(schedule, "SM_COUNT", 1)
    kwargs = {"window": (17, 0), "soft_cap": 3.0, "sinks": one(rng, (1,))}
    check(rng, "mosaic_gpu", 1, 270, 330, 1, 1, 64, 64, jnp.float16, **kwargs)


def test_mosaic_gpu_backward_of_a_ring_step(rng, monkeypatch):
    """Given the whole rows' logsumexp, at a head_dim that is filled up."""
    one_warpgroup = {"warpgroups_bwd": 1, "split_dkv": True}
    H, Hv, more = [(64, 64, {}), (80, 24, {}), (24, 200, one_warpgroup)][rng.integers(3)]
    small_blocks(monkeypatch, **more)
    at, ids = jnp.arange(140, dtype=jnp.int32)[None], documents(rng, 1, 140, padding=10)
    hidden = [{}, {"segment_ids": ids}, {"positions": (at + 20, at)}][rng.integers(3)]
    shapes = (2, H), (1, H), (1, Hv), (2, Hv)
    q, k, v, do = (one(rng, (1, 140, *shape), jnp.bfloat16) for shape in shapes)
    rows = one(rng, (1, 140, 2)) + 4.0, one(rng, (1, 140, 2))

    def grads(name, *arrays):
        f = functools.partial(attention_backward, causal=True, implementation=name, **hidden)
        return jax.block_until_ready(f(*arrays, *rows))

    with plgpu.force_gpu_interpret_mode():
        got = grads("mosaic_gpu", q, k, v, do)
    for x, y in zip(got, grads("xla", *(x.astype(jnp.float32) for x in (q, k, v, do))), strict=True):
        assert x.shape == y.shape
        close("gradient", x, np.asarray(y, np.float64), 1e-2)


def test_mosaic_gpu_one_query_of_many_heads(rng, monkeypatch):
    small_blocks(monkeypatch)
    check(rng, "mosaic_gpu", 1, 1, 70, 3, 1, 24, 80, jnp.bfloat16)  # filled up to 64 and 128


def test_mosaic_gpu_under_vmap(rng):
    """And gradients repeat bit by bit. (Remat refuses the interpreter's effects.)"""
    x = [one(rng, (2, 1, 70, 1, 64), jnp.bfloat16) for _ in range(3)]

    def grads(name):
        layer = functools.partial(attention, causal=True, implementation=name)
        loss = lambda *x: jnp.sum(jnp.sin(layer(*x).astype(jnp.float32)))
        return jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))

    with plgpu.force_gpu_interpret_mode():
        f = grads("mosaic_gpu")
        got, again = (jax.block_until_ready(f(*x)) for _ in range(2))
    for a, b, c in zip(got, again, grads("reference")(*(a.astype(jnp.float32) for a in x))):
        np.testing.assert_array_equal(a, b)
        close("gradient", a, np.asarray(c, np.float64), 1e-2)


def test_mosaic_gpu_bias(rng, monkeypatch):
    """Of each pair, which differs between heads, or of each key; some of it -inf, for one query all of it."""
    small_blocks(monkeypatch)
    shape, dtype = [((1, 2, 70, 150), jnp.float32), ((1, 1, 1, 150), jnp.bfloat16)][rng.integers(2)]
    hidden = jnp.asarray(rng.random(shape) < 0.2).at[..., 0].set(False).at[:, :, 30:31].set(True)
    kwargs = {"bias": jnp.where(hidden, -jnp.inf, one(rng, shape, dtype)), "causal": True, "soft_cap": 3.0}
    check(rng, "mosaic_gpu", 1, 70, 150, 2, 1, 64, 64, jnp.bfloat16, **kwargs)


def test_columns_of_an_accumulator_stand_where_masks_take_them():
    """Masks count columns from the lane and the register, which the interpreter does not run: by the layout itself."""
    pieces = importlib.import_module("pallas_kernels.attention.mosaic_gpu_pieces")
    layout = mgpu.WGMMA_LAYOUT
    held = registers(np.broadcast_to(np.arange(128), (64, 128)), layout)
    held_rows = registers(np.broadcast_to(np.arange(64)[:, None], (64, 128)), layout)
    assert layout.registers_shape((64, 128)) == tuple(
        1 if i - held.ndim in (*layout.warp_dims, *layout.lane_dims, layout.vector_dim) else d
        for i, d in enumerate(held.shape)
    )
    for at in np.ndindex(held.shape):
        lane = at[layout.lane_dims[0]] * held.shape[layout.lane_dims[1]] + at[layout.lane_dims[1]]
        assert held[at] == pieces.column(at, at[layout.vector_dim]) + lane % 4 * 2
        warp = at[layout.warp_dims[0]]
        assert held_rows[at] == warp * 16 + pieces.row(at) * 8 + lane // 4
    starts = mgpu.WGMMA_ROW_LAYOUT
    assert plgpu.Layout.WGMMA.reduce(1).to_mgpu() == starts and starts.registers_shape((64,)) == (1, 1, 2, 1, 1)


def test_mosaic_tpu_causal_documents(rng, monkeypatch):
    small_blocks(monkeypatch)
    ids = documents(rng, 1, 300, padding=20)
    kwargs = {"causal": True, "segment_ids": ids, "positions": restarting(ids), "sinks": one(rng, (2,))}
    check(rng, "mosaic_tpu", 1, 300, 300, 2, 1, 16, 24, jnp.bfloat16, **kwargs)


def test_mosaic_tpu_window(rng, monkeypatch):
    small_blocks(monkeypatch)
    kwargs = {"window": jnp.int32(40), "soft_cap": 3.0}
    check(rng, "mosaic_tpu", 1, 350, 200, 1, 1, 16, 16, jnp.float32, **kwargs)  # the last queries see nothing


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", ["mosaic_gpu", "mosaic_tpu"])
def test_mosaic_types_under_shard_map(name, check_vma):
    """Only traced: what differs from outside of shard_map is which mesh axes a value varies over."""
    mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    heads = P("dp", None, "tp", None)
    specs = (heads, heads, heads, P("tp"), P("dp", None))
    shapes = [((2, 140, 4, 64), jnp.bfloat16)] + [((2, 140, 2, 64), jnp.bfloat16)] * 2
    shapes += [((4,), jnp.float32), ((2, 140), jnp.int32)]

    def loss(*args):
        def local(q, k, v, sinks, ids):
            return attention(q, k, v, causal=True, segment_ids=ids, sinks=sinks, implementation=name)

        o = jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=check_vma)(*args)
        return jnp.sum(o.astype(jnp.float32))

    with jax.set_mesh(mesh), interpreter(name):
        args = [jax.ShapeDtypeStruct(*x, sharding=jax.NamedSharding(mesh, s)) for x, s in zip(shapes, specs)]
        grads = jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2, 3)), *args)
    assert [(x.shape, x.dtype) for x in grads] == shapes[:4]


def test_equal_calls_are_one_kernel():
    """JAX lowers a kernel's body once as long as it is the same object: two layers' gradients have two, not four."""

    def bodies(jaxpr):
        for eqn in jaxpr.eqns:
            parts = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns"))
            inner = [x for part in parts if hasattr(x := getattr(part, "jaxpr", part), "eqns")]
            if eqn.primitive.name == "mpmd_map":  # what plgpu.kernel binds
                yield from map(id, inner)
            else:
                for x in inner:
                    yield from bodies(x)

    def layers(x):
        layer = lambda x: jnp.sum(attention(x, x, x, causal=True, implementation="mosaic_gpu").astype(jnp.float32))
        return jax.grad(layer)(x) + jax.grad(layer)(2 * x)

    with plgpu.force_gpu_interpret_mode():
        found = list(bodies(jax.make_jaxpr(layers)(jnp.zeros((1, 128, 1, 64), jnp.bfloat16)).jaxpr))
    assert len(found) == 4 and len(set(found)) == 2
