"""Tokens that stay where their experts are: the same generation as with a way home, one all_to_all a layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale import generate as gen
from jaxscale.config import MLAConfig, ModelConfig, MoEConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import coherent, decoder
from jaxscale.parallel.coherent import check_coherent, device_of, home, move, share
from jaxscale.params import init_params
from jaxscale.plan.hlo import census
from jaxscale.sharding import place
from sharding_rules.rules import MEGATRON_FSDP

EP = 4
BASE = ModelConfig(
    name="experts",
    vocab_size=61,
    num_layers=3,
    embed_dim=24,
    mlp_dim=40,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    dtype="float32",
    moe=MoEConfig(num_experts=8, top_k=1, mlp_dim=16),
)
one_of = functools.partial(dataclasses.replace, BASE)
MODELS = [
    one_of(moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=16, num_groups=4, router="sigmoid", shared_dim=16)),
    one_of(
        moe=MoEConfig(num_experts=8, top_k=1, mlp_dim=16, first_dense=1, num_replicas=4),
        window=5,
        layer_pattern=("local", "global", "global"),
        post_norms=True,
        sinks=True,
    ),
    one_of(
        moe=MoEConfig(
            num_experts=4,
            top_k=1,
            mlp_dim=16,
            num_zero=1,
            num_copy=1,
            num_constant=2,
            gating_residual=True,
            router="cosine",
        ),
        qkv_bias=True,
        tie_embeddings=False,
    ),
    one_of(
        moe=MoEConfig(num_experts=8, top_k=2, mlp_dim=16, num_groups=4, first_dense=1),
        num_kv_heads=4,
        head_dim=12,
        mla=MLAConfig(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
    ),
]


def model(rng, cfg):
    """Parameters large enough that attention and routing matter, none of them zero."""
    params = init_params(jax.random.key(int(rng.integers(2**31))), decoder.param_specs(cfg))
    vary = lambda x: 1.5 * x + 0.1 * rng.standard_normal(x.shape).astype("f") if x.dtype == jnp.float32 else x
    return jax.tree.map(vary, params)


def test_the_same_generation(rng):
    """One of the models: tokens, the logits of a step, the cache after it; and what the program sends."""
    cfg = MODELS[rng.integers(len(MODELS))]
    params, mesh = model(rng, cfg), make_mesh(devices=jax.devices()[:EP], ep=EP)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (3, 9, 1, 5, 2, 7)]
    want = gen.generate(params, cfg, prompts, max_new_tokens=7)
    assert gen.generate(params, cfg, prompts, max_new_tokens=7, mesh=mesh, coherent=True) == want

    B = 2 * EP
    tokens, at = (jnp.asarray(rng.integers(0, 8, B), jnp.int32) for _ in range(2))
    shapes = jax.eval_shape(lambda: decoder.init_cache(cfg, B, 16))
    cache = {k: jnp.asarray(rng.standard_normal(s.shape), s.dtype) for k, s in shapes.items()}
    expected = jax.jit(gen.decode_step, static_argnames="cfg")(params, cache, tokens, at, cfg=cfg)
    rest = dataclasses.replace(MEGATRON_FSDP, params=coherent.PARAMS)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, place(params, decoder.param_specs(cfg), mesh, rest))
        others = jax.device_put((cache, tokens, at), NamedSharding(mesh, P()))
        step = functools.partial(gen.decode_step, cfg=cfg, coherent=True)
        run = jax.jit(step).lower(spread, *others).compile()
        got = run(spread, *others)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(b).max()))
    for shards in jax.tree.map(lambda c: [np.asarray(s.data) for s in c.addressable_shards], got[1]).values():
        assert all(np.array_equal(shards[0], other) for other in shards)  # every device has the same contexts
    found = census(run).counts
    assert found.pop("all-to-all") == {"ep": cfg.num_layers - cfg.moe.first_dense}
    assert list(found) == ["all-reduce"] and found["all-reduce"]["ep"] <= 3, found  # once a step, not for each layer


def test_moves_bit_by_bit(rng):
    """Any bits, rows that stay among those that go; each row is somewhere afterwards, and only there."""
    mesh, R = make_mesh(devices=jax.devices()[:EP], ep=EP), 2 * EP
    to = jnp.asarray(rng.integers(0, EP, R), jnp.int32)
    tokens = {
        "x": jax.lax.bitcast_convert_type(jnp.asarray(rng.integers(0, 2**16, (R, 1, 5)), jnp.uint16), jnp.bfloat16),
        "n": jnp.asarray(rng.integers(-(2**31), 2**31, (R, 2)), jnp.int32),
    }

    def body(tokens, to):
        got, here = move(tokens, home(R), to)
        small = jnp.arange(-R, 0, dtype=jnp.int8)[:, None] * 16
        return jax.tree.map(lambda x: x[None], (got, here, share(small, here)))

    with jax.set_mesh(mesh):
        got, here, shared = jax.jit(jax.shard_map(body, out_specs=P("ep"), check_vma=False))(tokens, to)
    np.testing.assert_array_equal(here, np.arange(EP)[:, None] == np.asarray(to))
    bits = lambda x: np.asarray(x).view(f"uint{8 * x.dtype.itemsize}")
    for name, x in tokens.items():
        mine = np.asarray(here).reshape(EP, R, *[1] * (x.ndim - 1))
        np.testing.assert_array_equal(bits(got[name]), np.where(mine, bits(x)[None], 0))
    np.testing.assert_array_equal(shared[..., 0], np.broadcast_to(np.arange(-R, 0) * 16, (EP, R)))


def test_a_token_without_experts_stays():
    mesh = make_mesh(devices=jax.devices()[:EP], ep=EP)
    places = jnp.asarray([[5, 4], [-1, 9], [8, -1], [7, 9]], jnp.int32)
    with jax.set_mesh(mesh):
        run = jax.shard_map(lambda p: device_of(p, 8)[None], out_specs=P("ep"), check_vma=False)
        found = np.asarray(jax.jit(run)(places))
    np.testing.assert_array_equal(found, [[2, d, d, 3] for d in range(EP)])


def test_where_tokens_cannot_stand():
    moe = functools.partial(MoEConfig, num_experts=8, mlp_dim=16)
    with pytest.raises(ValueError, match=r"top_k=2 experts in top_groups=1 of num_groups=1 groups .* of ep=4 devices"):
        check_coherent(moe(top_k=2), 4)
    with pytest.raises(ValueError, match=r"with num_replicas=4 copies may be on several of ep=4"):
        check_coherent(moe(top_k=2, num_groups=4, num_replicas=4), 4)
    with pytest.raises(ValueError, match="num_experts=8 and num_replicas=0 copies are not divisible by ep=3"):
        check_coherent(moe(top_k=1), 3)
    start = functools.partial(gen.generate, {}, prompts=[[1]], max_new_tokens=1, coherent=True)
    mesh = functools.partial(make_mesh, devices=jax.devices()[:EP])
    for words, cfg, where in (
        ("experts has none; leave it out", one_of(moe=None), mesh(ep=4)),
        (r"runs over ep alone. Got ep=2, tp=2; use make_mesh\(ep=...\)", BASE, mesh(ep=2, tp=2)),
        ("runs over ep alone. Got one device", BASE, make_mesh(devices=jax.devices()[:1])),
        ("may be on several of ep=4 devices", one_of(moe=moe(top_k=2)), mesh(ep=4)),
    ):
        with pytest.raises(ValueError, match=words):
            start(cfg=cfg, mesh=where)
