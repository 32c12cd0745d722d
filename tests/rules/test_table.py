"""Every model of the table: the compiled program sends what was predicted, no more than the expert's, and computes the
same as one device."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from sharding_rules import evaluate, infer
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
OTHERS = [(name, OTHER_MESHES[i % len(OTHER_MESHES)]) for i, name in enumerate(CASES) if name not in SLOW]
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
