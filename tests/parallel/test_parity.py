"""parity() itself: it passes what is right, for any function, and names what is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale.mesh import make_mesh
from jaxscale.parity import ParityError, parity


def mlp_loss(params, batch):
    h = jnp.tanh(batch["x"] @ params["in"]["w"] + params["in"]["b"][None])
    return jnp.mean((h @ params["out"] - batch["y"]) ** 2), {"hidden": h.sum()}


@pytest.fixture
def problem(rng):
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {"in": {"w": draw(16, 32), "b": draw(32)}, "out": draw(32, 8)}, {"x": draw(8, 16), "y": draw(8, 8)}


def test_a_function_of_the_user_with_shardings_of_its_own(problem):
    shardings = {"in": {"w": P("fsdp", "tp"), "b": P("tp")}, "out": P("tp", "fsdp")}
    report = parity(mlp_loss, *problem, ["fsdp=4,tp=2", make_mesh(tp=8)], shardings=shardings)
    assert [m.mesh for m in report.meshes] == ["fsdp=4,tp=2", "tp=8"]
    assert all(0 <= m.worst[1] <= 1e-5 and set(m.grad_diffs) == {"in/w", "in/b", "out"} for m in report.meshes)
    assert "fsdp=4,tp=2" in str(report)
    assert "<table>" in report._repr_html_()


def test_a_function_of_the_user_without_a_word_about_shardings(problem):
    parity(mlp_loss, *problem, ["fsdp=8"])


def test_the_first_parameter_that_differs_is_named(problem):
    """A function that asks for its shards computes something else on a mesh: its own part of the sum."""

    def wrong(params, batch):
        loss, _ = mlp_loss(params, batch)
        mesh = jax.sharding.get_abstract_mesh()
        return loss + (0.0 if mesh.empty else 1e-3) * jnp.sum(params["out"] ** 2)

    with pytest.raises(ParityError, match=r"on mesh fsdp=2 the gradient of out differs by .* the first of 1;") as info:
        parity(wrong, *problem, ["fsdp=2"])
    (result,) = info.value.report.meshes
    assert result.worst[0] == "out"
    report = parity(wrong, *problem, ["fsdp=2"], check=False)
    assert "differs" in str(report)


def test_not_a_number_differs(problem):
    def broken(params, batch):
        loss, _ = mlp_loss(params, batch)
        return loss * (1.0 if jax.sharding.get_abstract_mesh().empty else jnp.nan)

    with pytest.raises(ParityError, match="in/b"):
        parity(broken, *problem, ["fsdp=2"])


def test_specs_and_shardings_exclude_each_other(problem):
    with pytest.raises(ValueError, match="not both"):
        parity(mlp_loss, *problem, ["fsdp=2"], specs={}, shardings={})
