"""Every model of the table: the compiled program sends what was predicted, no more than the expert's, and computes the
same as one device."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import jax
import pytest
from jax.experimental.topologies import TopologyDescription
from jax.sharding import PartitionSpec as P

from sharding_rules import evaluate, infer
from sharding_rules.hardware import hardware_of
from tests.rules import redco
from tests.rules.models import CASES
from tests.rules.models.language import LLAMA_TINY, llama
from tests.rules.table import MESH, OTHER_MESHES, REAL_MESH, at_tiny_size, compiled_bytes, derived

SLOW = ("ResNet", "CLIP (two towers)")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_the_derived_plan(name):
    case = CASES[name]
    plan = derived(case, REAL_MESH)
    assert len([a for a in plan.rules.compute if a != "batch"]) > 0
    found = at_tiny_size(case, plan, MESH)
    assert found.byte_error < 0.05, str(found)
    assert found.error is not None
    assert found.error < 1e-4, str(found)
    assert all(c.trips_known for c in found.collectives)
    assert found.compiled_bytes <= compiled_bytes(case, case.expert_specs)


# Each model on one more mesh, and Llama on all: stored parameters are gathered in the loop, tp beyond the kv heads
# leaves them whole. Every model on every mesh: python -m tests.rules.table --meshes.
OTHERS = [(name, OTHER_MESHES[i % len(OTHER_MESHES)]) for i, name in enumerate(CASES) if name not in (*SLOW, "DiT")]
OTHERS += [("Llama (raw JAX, scanned)", mesh) for mesh in OTHER_MESHES[1:]]


@pytest.mark.parametrize(("name", "mesh"), OTHERS, ids=str)
def test_other_meshes(name, mesh):
    case = CASES[name]
    found = at_tiny_size(case, derived(case, mesh), mesh)
    assert found.byte_error < 0.05, str(found)
    assert found.error is not None
    assert found.error < 1e-4


def test_verify_sees_a_wrong_prediction():
    """A plan that is compiled otherwise than it says is caught."""
    fn, params, args = llama(**LLAMA_TINY)
    plan = evaluate(infer(fn, params, *args), {"dp": 2, "tp": 4}, {"mlp": ("tp",)})
    found = plan.verify(fn, params, *args)
    assert plan.prediction is not None
    other = evaluate(infer(fn, params, *args), {"dp": 2, "tp": 4}, {"vocab_out": ("tp",)})
    assert other.prediction is not None
    assert abs(other.prediction.wire_bytes - found.compiled_bytes) > 0.05 * found.compiled_bytes


def test_too_few_devices():
    fn, params, args = llama(**LLAMA_TINY)
    plan = evaluate(infer(fn, params, *args), {"dp": 4, "tp": 4}, {})
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=16"):
        plan.verify(fn, params, *args)


def test_verify_for_a_topology():
    """A description of devices: compiled for, not run on; the prediction is for what the devices call themselves."""
    fn, params, args = llama(**LLAMA_TINY)
    plan = evaluate(infer(fn, params, *args), {"dp": 2, "tp": 4}, {"mlp": ("tp",)}, "h200")
    found = plan.verify(fn, params, *args, topology=TopologyDescription(jax.devices()[:8]))
    assert found.error is None
    assert found.byte_error < 0.01  # as h200 partial sums would be added first
    with pytest.raises(
        ValueError, match=r"for 8 devices \(dp=2, tp=4\) but there are 4; name a topology of at least 8"
    ):
        plan.verify(fn, params, *args, topology=TopologyDescription(jax.devices()[:4]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("TPU v5", "v5p"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "h200"), ("cpu", "cpu"),
     ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("TPU7x", "tpu7x")],
)  # fmt: skip
def test_hardware_of_a_device(kind, name):
    assert hardware_of(SimpleNamespace(device_kind=kind)).name == name


def test_hardware_of_an_unknown_device():
    with pytest.raises(ValueError, match=r"devices of kind 'Abacus' are not known; known are H200.* give hardware="):
        hardware_of(SimpleNamespace(device_kind="Abacus"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("name", ["Llama (raw JAX, scanned)", "Mamba", "Mixtral"])
def test_verify_for_a_tpu(name):
    """Partial sums that are added meet before they are reduced."""
    case = CASES[name]
    plan = dataclasses.replace(derived(case, REAL_MESH), mesh_shape=MESH)
    fn, params, args = case.build(**case.tiny)
    assert plan.verify(fn, params, *args, topology="v5p:2x2x2").byte_error < 0.01


def test_redco_as_described():
    """The failures that are known of name rules."""

    def spec(tree):
        shapes = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s, "float32"), tree, is_leaf=lambda x: isinstance(x, tuple)
        )
        return jax.tree.leaves(redco.specs(shapes, 4), is_leaf=lambda x: isinstance(x, P))

    column, row = P(None, "tp"), P("tp", None)
    assert spec({"attn": {"q_proj": {"kernel": (64, 64)}, "o_proj": {"kernel": (64, 64)}}}) == [row, column]
    assert spec({"fc1": {"kernel": (64, 96)}, "fc2": {"kernel": (96, 64)}}) == [column, row]
    assert spec({"a_second": {"kernel": (96, 64)}, "b_first": {"kernel": (64, 96)}}) == [column, row]  # sorted wrongly
    assert spec({"attention": {"dense": {"kernel": (64, 64)}}}) == [column]  # column after column
    assert spec({"attn": {"query": {"kernel": (64, 2, 32)}}}) == [P(None, None, "tp")]  # cuts heads
    assert spec({"embed": {"embedding": (50257, 64)}}) == [P(None, "tp")]
