"""The collectives of compiled training steps equal what is derived on paper; partitioner warnings become findings."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.config import ModelConfig
from jaxscale.mesh import make_mesh
from jaxscale.models import decoder
from jaxscale.params import abstract_params
from jaxscale.plan.hlo import Census, census, compile_with_findings
from jaxscale.train import TrainState, make_train_step
from sharding_rules.rules import MEGATRON_FSDP

L, D, F, V, N, K, H = 3, 64, 128, 256, 4, 4, 16
B, T = 8, 32
CFG = ModelConfig(
    vocab_size=V,
    num_layers=L,
    embed_dim=D,
    mlp_dim=F,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    tie_embeddings=False,
    dtype="float32",
)
LAYER = D * (2 * N + 2 * K) * H + 3 * D * F  # numbers in the matrices of a layer
FLOAT = 4


@functools.cache
def train_step(**sizes) -> Census:
    """The census of one step with SGD, which adds no collective; asserts that nothing was found."""
    count = 1
    for size in sizes.values():
        count *= size
    mesh = make_mesh(devices=jax.devices()[:count], **sizes)
    params = abstract_params(decoder.param_specs(CFG), mesh, MEGATRON_FSDP)
    where = NamedSharding(mesh, P(("dp", "fsdp"), "cp"))
    batch = {k: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=where) for k in ("tokens", "labels", "segment_ids")}
    scalar = NamedSharding(mesh, P())
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar),
        params=params,
        opt_state=optax.sgd(0.1).init(params),
        key=jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=scalar),
    )
    # chunk: all rows of a device at once, so that the loss is no loop.
    step = make_train_step(functools.partial(decoder.loss_fn, cfg=CFG, chunk=B * T), optax.sgd(0.1))
    with jax.set_mesh(mesh):
        compiled, findings = compile_with_findings(step.lower(state, batch))
    assert findings == []
    return census(compiled)


def small(found: Census, *kinds: str) -> dict[str, dict[str, int]]:
    return {k: v for k, v in found.counts.items() if k in kinds}


def test_dp_all_reduces_the_gradients_and_nothing_else():
    found = train_step(dp=4)
    assert set(found.counts) == {"all-reduce"}
    assert set(found.counts["all-reduce"]) == {"dp"}
    # Once each: embed, head and final norm, the layers' matrices and two norms; then the loss and its weight (scalars)
    # and the two scalar sums of the metrics.
    gradients = (2 * V * D + D + L * (LAYER + 2 * D)) * FLOAT
    assert gradients <= found.bytes["all-reduce"]["dp"] <= gradients + 64


def test_fsdp_gathers_weights_twice_and_reduces_gradients_once():
    found = train_step(fsdp=4)
    assert set(found.counts) == {"all-gather", "all-reduce"}
    assert set(found.counts["all-gather"]) == set(found.counts["all-reduce"]) == {"fsdp"}
    # Forward and backward each gather the 7 matrices of a layer; its 2 norm scales are kept. Embed, head, final norm.
    assert found.counts["all-gather"]["fsdp"] == (2 * 7 + 2) * L + 3
    assert found.bytes["all-gather"]["fsdp"] == (2 * L * (LAYER + D) + 2 * V * D + D) * FLOAT
    # CPU reduces where GPU and TPU reduce and scatter: the same payload.
    gradients = (2 * V * D + D + L * (LAYER + 2 * D)) * FLOAT
    assert gradients <= found.bytes["all-reduce"]["fsdp"] <= gradients + 64


def test_tp_moves_activations_four_times_a_layer():
    """Megatron-LM with sequence-parallel norms (arXiv 2205.05198): forward and backward each gather the rows before
    attention and before the MLP, and reduce-scatter them after; here the backward pass gathers its inputs again."""
    found = train_step(tp=4)
    rows = B * T * D * FLOAT
    assert {axis for axes in found.counts.values() for axis in axes} == {"tp"}
    # Forward: 2 a layer and the loss. Backward: 2 a layer for the incoming gradients and 2 for the inputs again; embed.
    assert found.counts["all-gather"]["tp"] == (2 + 2 + 2) * L + 2
    assert found.bytes["all-gather"]["tp"] == ((2 + 2 + 2) * L + 2) * rows
    # The embedding scatters in its shard_map; the sums around the layers are all-reduces on CPU, 2 forward and 2
    # backward in a layer, and one for the loss. The rest are scalars a row: maximum, sum and picked logit of the loss;
    # and the gradients of the norm scales, 2 a layer and the last.
    assert found.counts["reduce-scatter"] == {"tp": 1}
    assert found.bytes["reduce-scatter"] == {"tp": rows}
    sums = (4 * L + 1) * rows
    rest = 3 * B * T * FLOAT + (2 * L + 1) * D * FLOAT
    assert sums <= found.bytes["all-reduce"]["tp"] <= sums + 2 * rest


def test_fsdp_x_tp_is_the_sum_of_both_on_their_own_shards():
    found = train_step(fsdp=2, tp=2)
    rows = B // 2 * T * D * FLOAT
    assert {axis for axes in found.counts.values() for axis in axes} <= {"fsdp", "tp", "fsdp+tp"}
    assert found.counts["all-gather"] == {"fsdp": (2 * 7 + 2) * L + 3, "tp": 6 * L + 2}
    matrices = (2 * V * D + L * LAYER) // 2  # each shard of tp gathers its own half
    assert found.bytes["all-gather"]["fsdp"] == (matrices + L * LAYER // 2 + 2 * L * D + D) * FLOAT
    assert found.bytes["all-gather"]["tp"] == (6 * L + 2) * rows
    norms = (2 * L + 1) * D
    reduced = found.bytes["all-reduce"]
    assert matrices * FLOAT <= reduced["fsdp"] <= (matrices + norms) * FLOAT + 64
    assert (4 * L + 1) * rows <= reduced["tp"] <= (4 * L + 1) * rows + 2 * (3 * B * T + norms) * FLOAT


def test_cp_reduces_gradients_over_fsdp_and_cp_together():
    """Parameters rest over both axes; without `reduced` types XLA sums over one, then over the other."""
    found = train_step(fsdp=2, cp=2)
    matrices = (2 * V * D + L * LAYER) * FLOAT
    assert matrices <= found.bytes["all-reduce"]["fsdp+cp"]
    assert found.counts["all-gather"]["fsdp+cp"] == (2 * 7 + 2) * L + 3
    # Over cp alone: the gradients of the keys and values that were gathered. Over fsdp alone: the norm scales.
    keys_and_values = L * 2 * (B // 2) * T * K * H * FLOAT
    norms = (2 * L + 1) * D * FLOAT
    assert keys_and_values <= found.bytes["all-reduce"]["cp"] <= keys_and_values + norms + 64
    assert norms <= found.bytes["all-reduce"]["fsdp"] <= norms + 64


def test_loops_are_multiplied_and_tables_say_so():
    mesh = make_mesh(fsdp=2, tp=4)

    def f(w, x):  # five times: x summed over tp
        def body(x, _):
            return jax.reshard(jnp.einsum("bd,df->bf", x, w, out_sharding=P("fsdp", None)), P("fsdp", "tp")), None

        return jax.lax.scan(body, x, None, length=5)[0]

    w = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, P("tp", None)))
    x = jax.ShapeDtypeStruct((8, 32), jnp.float32, sharding=NamedSharding(mesh, P("fsdp", "tp")))
    with jax.set_mesh(mesh):
        found = census(jax.jit(f), w, x)
    assert found.counts == {"all-reduce": {"tp": 5}}
    assert found.bytes == {"all-reduce": {"tp": 5 * 4 * 32 * FLOAT}}
    assert found.wire_bytes("tp") == found.wire_bytes() == 5 * 4 * 32 * FLOAT * 2 * 3 // 4
    assert found.wire_bytes("fsdp") == 0
    assert "all-reduce  tp        5" in str(found)
    assert "<td style='text-align:left'>all-reduce</td>" in found._repr_html_()


def test_a_program_without_a_mesh_says_what_to_pass():
    with pytest.raises(ValueError, match="pass mesh="):
        census(jax.jit(lambda x: x + 1), jnp.ones(3))


def test_involuntary_rematerialization_is_a_finding(capfd):
    """The gradient of a table that is split over both of its dims, looked up by a plain gather."""
    mesh = make_mesh(fsdp=2, tp=4)
    table = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=NamedSharding(mesh, P("tp", "fsdp")))
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))

    def loss(table, tokens):
        return (table.at[tokens].get(out_sharding=P("fsdp", None, None)) ** 2).sum()

    with jax.set_mesh(mesh):
        _, findings = compile_with_findings(jax.jit(jax.grad(loss)).lower(table, tokens))
        assert [f.name for f in findings] == ["involuntary-full-rematerialization"]
        assert findings[0].count >= 1
        assert "f32[" in findings[0].message
        _, findings = compile_with_findings(jax.jit(loss).lower(table, tokens))
    assert findings == []
    assert "rematerialization" not in capfd.readouterr().err
