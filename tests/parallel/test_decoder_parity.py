"""The decoder on every mesh equals one device: loss within 1e-6, every gradient within 1e-5, in float32."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from jaxscale.config import MLAConfig, ModelConfig, MoEConfig, RopeScaling
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.parallel.context_cost import Context
from jaxscale.parallel.pipeline import Pipeline
from jaxscale.params import param_shardings
from jaxscale.parity import parity
from jaxscale.train import make_train_state, make_train_step, put_batch
from sharding_rules.rules import MEGATRON_FSDP

BASE = ModelConfig(
    vocab_size=96,
    num_layers=2,
    embed_dim=48,
    mlp_dim=72,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    tie_embeddings=False,
    dtype="float32",
)
GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": 1.0,
    "post_norms": True,
    "qk_norm": True,
    "tie_embeddings": True,
    "scale_embeddings": True,
    "query_scale": 0.3,
    "attn_soft_cap": 2.0,
    "logit_soft_cap": 3.0,
    "local_rope_theta": 100.0,
    "window": 5,
    "layer_pattern": ("local", "global"),
}


def check(cfg, meshes, rng, batch_size=8, seq_len=24, **kwargs):
    specs = decoder.param_specs(cfg)
    # Everything random, norm scales and biases too, so that a forgotten one shows.
    params = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), specs)
    loss = functools.partial(decoder.loss_fn, cfg=cfg, z_loss=1e-2, chunk=20, **kwargs)
    report = parity(loss, params, packed_batch(cfg, rng, batch_size, seq_len), meshes, specs=specs)
    assert len(report.meshes) == len(meshes)


def packed_batch(cfg, rng, batch_size, seq_len):
    """Rows of two documents and some padding; some tokens without a label."""
    shape = (batch_size, seq_len)
    cut = rng.integers(2, seq_len - 4, (batch_size, 1))
    at = np.broadcast_to(np.arange(seq_len), shape)
    segments = np.where(at < cut, 1, np.where(at < seq_len - 3, 2, 0))
    labels = rng.integers(-1, cfg.vocab_size, shape)
    return {
        "tokens": rng.integers(0, cfg.vocab_size, shape).astype(np.int32),
        "labels": np.where(segments > 0, labels, -1).astype(np.int32),
        "segment_ids": segments.astype(np.int32),
        "positions": np.where(at < cut, at, at - cut).astype(np.int32),
    }


def test_each_axis_and_their_products(rng):
    check(BASE, ["dp=8", "fsdp=8", "tp=2", "dp=2,fsdp=2,tp=2"], rng)


def test_sequence_split_over_cp(rng):
    check(BASE, ["fsdp=2,cp=2,tp=2"], rng)


def test_nine_heads_do_not_divide_by_two(rng):
    """SmolLM2-135M: attention is then computed whole on each shard of tp."""
    cfg = dataclasses.replace(BASE, num_heads=9, num_kv_heads=3, tie_embeddings=True)
    check(cfg, ["fsdp=2,tp=2"], rng)


def test_fewer_kv_heads_than_shards(rng):
    """Each shard takes the kv heads of its own queries; with 12 heads on 4 shards a group of 6 is cut, too."""
    check(dataclasses.replace(BASE, num_kv_heads=1, qk_norm=True), ["cp=2,tp=4"], rng)
    check(dataclasses.replace(BASE, num_heads=12, num_kv_heads=2, qkv_bias=True), ["fsdp=2,tp=4"], rng)


def test_gemma_windows_caps_and_a_tied_vocabulary_that_does_not_divide(rng):
    check(dataclasses.replace(BASE, vocab_size=97, **GEMMA), ["fsdp=2,cp=2,tp=2"], rng)


def test_every_bias_and_an_untied_vocabulary_that_does_not_divide(rng):
    scaling = RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16)
    cfg = dataclasses.replace(
        BASE, vocab_size=97, qkv_bias=True, out_bias=True, mlp_bias=True, rope_scaling=scaling, window=7
    )
    check(dataclasses.replace(cfg, layer_pattern=("local",)), ["fsdp=2,tp=4"], rng)


@pytest.mark.parametrize(("q_rank", "context"), [(24, None), (None, Context("ring", "contiguous"))])
def test_latent_attention(q_rank, context, rng):
    """Down-projections where tp splits the sequence, heads over tp; with five heads and odd ranks nothing divides."""
    mla = MLAConfig(kv_rank=16, q_rank=q_rank, nope_dim=8, rope_dim=4, value_dim=6)
    cfg = dataclasses.replace(BASE, num_kv_heads=4, head_dim=12, mla=mla)
    check(cfg, ["fsdp=2,cp=2,tp=2"], rng, context=context)
    if context is None:
        mla = dataclasses.replace(mla, kv_rank=15, q_rank=21)
        check(dataclasses.replace(cfg, num_heads=5, num_kv_heads=5, mla=mla), ["fsdp=2,tp=2"], rng)


@pytest.mark.parametrize("context", [None, Context("ring", "contiguous")])
def test_sinks(context, rng):
    """GPT-OSS's attention: over a ring the sinks take their share once all blocks are merged."""
    cfg = dataclasses.replace(BASE, sinks=True, qkv_bias=True, out_bias=True, window=5)
    check(dataclasses.replace(cfg, layer_pattern=("local", "global")), ["fsdp=2,cp=2,tp=2"], rng, context=context)


def test_odd_sizes_keep_dims_whole(rng):
    """Rows, lengths, widths that no axis divides: nothing is split there, and the result is the same."""
    cfg = dataclasses.replace(BASE, embed_dim=45, mlp_dim=74)
    check(cfg, ["fsdp=2,cp=2,tp=2"], rng, batch_size=3, seq_len=23)


def test_remat_of_dots_changes_no_gradient(rng):
    check(BASE, ["fsdp=2,cp=2,tp=2"], rng, remat="dots")


def test_remat_of_everything_changes_no_gradient(rng):
    check(dataclasses.replace(BASE, **GEMMA), ["fsdp=2,tp=2"], rng, remat="full")


def test_stages(rng):
    """Layers over pp: micro-batches of any number, chunks of layers, every remat. The windows of alternate layers lie
    with their layers, segments and positions go with their micro-batch."""
    cfg = dataclasses.replace(BASE, num_layers=4)
    gemma = dataclasses.replace(cfg, vocab_size=97, **GEMMA)
    remat = str(rng.choice(["none", "dots", "full"]))
    pipeline = Pipeline(int(rng.choice([2, 4])), int(rng.choice([1, 2])))
    case = int(rng.integers(4))
    print(case, remat, pipeline)
    if case == 0:
        check(cfg, ["pp=4"], rng, remat=remat)
    elif case == 1:
        check(cfg, ["pp=2,fsdp=2,tp=2"], rng, remat=remat, pipeline=pipeline)
    elif case == 2:
        check(gemma, ["pp=2,cp=2,tp=2"], rng, remat=remat, pipeline=pipeline)
    else:
        check(gemma, ["pp=2,fsdp=2,cp=2"], rng, remat=remat, context=Context("ring", "contiguous"))


def test_stages_with_experts(rng):
    """Losses that balance experts see the load of the whole batch; layers without experts are outside of the stages."""
    router = [{"router": "softmax", "gating_residual": True}, {"router": "sigmoid"}, {"balance_rows": 2}][
        rng.integers(3)
    ]
    first = int(rng.integers(2))
    moe = MoEConfig(num_experts=4, top_k=2, mlp_dim=24, first_dense=first, balance_weight=0.1, **router)
    print(moe)
    cfg = dataclasses.replace(BASE, num_layers=2 + first, moe=dataclasses.replace(moe, router_z_weight=0.01))
    if rng.integers(2):
        mla = MLAConfig(kv_rank=16, q_rank=None, nope_dim=8, rope_dim=4, value_dim=6)
        cfg = dataclasses.replace(cfg, mla=mla, num_kv_heads=4, head_dim=12)
    check(cfg, ["pp=2,ep=2"], rng, seq_len=16, pipeline=Pipeline(2))


def test_accumulated_micro_batches_equal_the_whole_batch(rng):
    """On a mesh, two micro-batches with different numbers of labels; alone, the batch at once."""
    specs = decoder.param_specs(BASE)
    params = jax.tree.map(lambda s: (0.3 * rng.standard_normal(s.shape)).astype(np.float32), specs)
    batch = packed_batch(BASE, rng, 8, 24)
    loss, key = functools.partial(decoder.loss_fn, cfg=BASE), jax.random.key(0)
    state = make_train_state(params, optax.sgd(1.0), key)
    whole, metrics = make_train_step(loss, optax.sgd(1.0), donate=False)(state, batch)
    mesh = make_mesh(fsdp=2, tp=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(specs, mesh, MEGATRON_FSDP))
        state = make_train_state(placed, optax.sgd(1.0), key)
        parts, split_metrics = make_train_step(loss, optax.sgd(1.0), accum_steps=2)(state, put_batch(batch, mesh))
    np.testing.assert_allclose(split_metrics["loss"], metrics["loss"], rtol=1e-6)
    assert float(split_metrics["weight"]) == float(metrics["weight"]) == (batch["labels"] >= 0).sum()
    for (path, before), a, b in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        update = np.asarray(a) - before
        off = np.linalg.norm(np.asarray(b) - np.asarray(a)) / np.linalg.norm(update)
        assert off < 1e-5, f"{path}: {off}"
