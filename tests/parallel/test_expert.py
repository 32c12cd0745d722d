"""Experts over ep equal a loop over experts on one device: outputs within 1e-5 and every gradient, in float32."""

import functools
import time
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from benchmarks.moe import devices, layer
from jaxscale.config import MeshConfig, MoEConfig
from jaxscale.mesh import hosts_along, make_mesh
from jaxscale.models.routing import route
from jaxscale.parallel import chunks, expert, expert_local, expert_remote
from jaxscale.parallel.chunks import fastest_chunks
from jaxscale.parallel.expert import apply_experts, choose, gather_experts, remote_cost
from jaxscale.params import ParamSpec, constant
from jaxscale.plan.experts import place_experts
from jaxscale.plan.hlo import census
from pallas_kernels import ragged_dot, ragged_dots
from pallas_kernels.ragged_all_to_all import reference as reference_exchange

E, D, F = 8, 12, 16


def loop(x, experts, weights, p):
    """Every expert on every token, with the weight that it has there."""
    out = jnp.zeros_like(x)
    for e in range(E):
        h = jax.nn.silu(x @ p["w_gate"][e]) * (x @ p["w_up"][e])
        w = jnp.where(experts == e, weights, 0.0).sum(axis=-1)
        out = out + (h @ p["w_down"][e]) * w[..., None]
    return out


def make(rng, rows, length, top_k, routing):
    shape = (rows, length, top_k)
    size = {"w_gate": (E, D, F), "w_up": (E, D, F), "w_down": (E, F, D)}
    p = {k: 0.4 * rng.standard_normal(s, np.float32) for k, s in size.items()}
    x = rng.standard_normal((rows, length, D), np.float32)
    if routing in ROUTERS:
        cfg = MoEConfig(num_experts=E, top_k=2, mlp_dim=F, router=routing, **ROUTERS[routing])
        logits = rng.standard_normal((rows, length, E), np.float32)
        chosen = route(logits, None, rng.random((rows, length)) < 0.8, cfg)
        return x, np.asarray(chosen.experts), np.asarray(chosen.weights), p
    ranked = np.argsort(rng.random((rows, length, E)), axis=-1)[..., :top_k]
    experts = {
        "random": ranked,
        "one expert": np.where(np.arange(top_k) == 0, 5, -1) * np.ones(shape, int),
        "one device": np.argsort(rng.random((rows, length, 2)), axis=-1)[..., :top_k] + 2,
        "few": np.where(rng.random(shape) < 0.3, ranked, E + 1),  # most are nobody's
    }[routing].astype(np.int32)
    return x, experts, rng.random(shape, np.float32), p


AXES = {
    "w_gate": ("experts", "embed", "mlp"),
    "w_up": ("experts", "embed", "mlp"),
    "w_down": ("experts", "mlp", "embed"),
}


@functools.lru_cache
def sharded(mesh_text, dispatch, chunks, shape, hosts):
    sizes = {k: int(n) for k, n in (part.split("=") for part in mesh_text.split(","))}
    mesh = make_mesh(devices=jax.devices()[: int(np.prod(list(sizes.values())))], **sizes)

    def loss(x, weights, p, experts, cotangent):
        specs = {k: ParamSpec(v.shape, AXES[k], constant(0.0)) for k, v in p.items()}
        p = gather_experts(p, specs, jnp.float32, x.shape[:2])
        out = apply_experts(x, experts, weights, p, dispatch=dispatch, chunks=chunks, hosts=hosts)
        return (jax.reshard(out, P()) * cotangent).sum(), out

    return mesh, jax.jit(jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2), has_aux=True))


def reference(x, weights, p, experts, cotangent):
    out = loop(x, experts, weights, p)
    return (out * cotangent).sum(), out


twin = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2), has_aux=True))


def check(rng, mesh_text, dispatch, routing, rows=8, length=5, top_k=2, chunks=1, hosts=1):
    mesh, fn = sharded(mesh_text, dispatch, chunks, (rows, length, top_k), hosts)
    x, experts, weights, p = make(rng, rows, length, top_k, routing)
    cotangent = rng.standard_normal(x.shape, np.float32)
    (_, expected), grads = twin(x, weights, p, experts, cotangent)
    with jax.set_mesh(mesh):
        (_, out), got = fn(x, weights, p, experts, cotangent)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(grads)):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), err_msg=str(path))


ROUTINGS = ["random", "one expert", "one device", "few"]
ROUTERS = {
    "softmax": {},
    "sigmoid": {"num_groups": 4, "top_groups": 2},
    "gshard": {"capacity_factor": 1.0, "dropless": False},  # -1 for what finds no place
    "cosine": {"num_zero": 2, "num_copy": 1},  # numbers past E for experts that are not here
    "expert_choice": {"dropless": False},  # a token has up to E experts
}


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [
        ("ep=1", "auto"),
        ("ep=2", "all_gather"),
        ("ep=2", "all_to_all"),
        ("ep=4", "all_gather"),
        ("ep=4", "all_to_all"),
        ("ep=8", "all_gather"),
        ("ep=8", "all_to_all"),
    ],
)
def test_every_routing(mesh, dispatch, rng):
    for routing in ROUTINGS + [r for r in ROUTERS if r != "expert_choice"]:
        check(rng, mesh, dispatch, routing)
    if mesh != "ep=4":  # compiled again for E experts a token
        check(rng, mesh, dispatch, "expert_choice", length=3, top_k=E)


@pytest.fixture
def peers(monkeypatch):
    """Tokens travel as where kernels read peers' memory, by collectives: the kernels run on GPUs alone."""
    monkeypatch.setattr(expert, "reads_peers", lambda x, place, devices: True)
    sharded.cache_clear()
    yield
    sharded.cache_clear()


@pytest.mark.usefixtures("peers")
def test_rows_of_peers(rng):
    """All routings on a mesh drawn from three; crowds on one device are several rounds of all of them."""
    mesh = ("ep=2", "ep=4", "ep=8")[rng.integers(3)]
    for routing in ROUTINGS + [r for r in ROUTERS if r != "expert_choice"]:
        check(rng, mesh, "all_gather", routing, length=6)


@pytest.mark.parametrize(("mesh", "dispatch"), [("fsdp=2,ep=2,tp=2", "all_to_all"), ("ep=2,cp=2,tp=2", "all_gather")])
def test_with_other_axes(mesh, dispatch, rng):
    for routing in ("random", "one expert"):
        check(rng, mesh, dispatch, routing, length=6)


def test_in_chunks(rng):
    for routing in ("random", "one device"):
        check(rng, "ep=4", "all_to_all", routing, length=7, chunks=3)


@pytest.fixture
def copies(rng, monkeypatch):
    """Remote copies, by rows or in blocks, as if they ran here: `ragged_all_to_all` does the same on a CPU. What nobody
    writes holds nan."""
    exchange = reference_exchange.ragged_all_to_all

    def poisoned(x, output, runs, over):
        if isinstance(output, int):
            axes = tuple(sorted(jax.typeof(x).mat.varying))
            output = jax.lax.pcast(jnp.full((output, *x.shape[1:]), jnp.nan, x.dtype), axes, to="varying")
        return exchange(x, output, runs, over)

    monkeypatch.setattr(reference_exchange, "ragged_all_to_all", poisoned)
    monkeypatch.setattr(expert_remote, "unless_remote", lambda x: None)
    monkeypatch.setattr(expert_remote, "_LONG", rng.choice([0, 1000]))
    sharded.cache_clear()
    yield
    sharded.cache_clear()


REMOTE = ["ep=2", "ep=8", "fsdp=2,ep=2,tp=2", "ep=4,cp=2"]


def test_remote_copies_meet_every_routing(copies, rng):
    """On a layout drawn from many; `test_remote_copies_everywhere` has them all."""
    _remote(rng, str(rng.choice(REMOTE)))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", REMOTE)
def test_remote_copies_everywhere(mesh, copies, rng):
    _remote(rng, mesh)
    check(rng, mesh, "remote_copy", "expert_choice", length=2, top_k=E)
    check(rng, mesh, "remote_copy", "one device", length=6, chunks=3)
    if mesh == "ep=8":
        check(rng, mesh, "two_level", "random", hosts=2)  # and inside of hosts


def _remote(rng, mesh):
    for routing in ROUTINGS + [r for r in ROUTERS if r != "expert_choice"]:
        check(rng, mesh, "remote_copy", routing, length=6 if "cp" in mesh else 5)


def test_remote_copies_in_the_interpreter(rng, monkeypatch):
    """One mesh and one routing of many, values and gradients, without races; the interpreter knows no remat."""
    monkeypatch.setattr(jax, "checkpoint", lambda f: f)
    monkeypatch.setattr(expert_remote, "_LONG", rng.choice([0, 1000]))
    monkeypatch.setattr(expert_local, "ragged_dot", functools.partial(ragged_dot, implementation="xla"))
    monkeypatch.setattr(expert_local, "ragged_dots", functools.partial(ragged_dots, implementation="xla"))
    sharded.cache_clear()
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        check(rng, str(rng.choice(["ep=2", "ep=4", "ep=2,tp=2"])), "remote_copy", "few", length=2, top_k=E)
    sharded.cache_clear()
    assert (found := interpret_pallas_call.races) is not None and not found.races_found


TWO_LEVELS = [("ep=8", 2), ("ep=8", 4), ("ep=4,tp=2", 2), ("ep=8", 8)]


def test_two_levels(rng):
    """All routings on a layout drawn from many; `test_two_levels_everywhere` has them all."""
    _two_levels(rng, *TWO_LEVELS[rng.integers(len(TWO_LEVELS))])


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "hosts"), TWO_LEVELS)
def test_two_levels_everywhere(mesh, hosts, rng):
    _two_levels(rng, mesh, hosts)
    check(rng, mesh, "two_level", "expert_choice", length=3, top_k=E, hosts=hosts)


def _two_levels(rng, mesh, hosts):
    for routing in [*ROUTINGS, "gshard"]:
        check(rng, mesh, "two_level", routing, hosts=hosts)


def test_collectives_of_two_levels():
    """Across hosts rows, expert numbers, weights and what comes back; inside one the same three are gathered, the sums
    scattered. With the backward pass and what the estimate says of it: to the byte."""
    top_k, rows, length, hosts = E, 8, 6, 4  # so many choices that buffers hold any routing: no second way
    mesh = make_mesh(ep=8)
    with jax.set_mesh(mesh):
        new = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.NamedSharding(mesh, P("ep"))
        )
        p = {"w_gate": new(E, D, F), "w_up": new(E, D, F), "w_down": new(E, F, D)}
        x, experts = new(rows, length, D), new(rows, length, top_k, dtype=jnp.int32)
        weights = new(rows, length, top_k)
        layer = lambda x, experts, weights, p: apply_experts(x, experts, weights, p, dispatch="two_level", hosts=hosts)

        def both(x, experts, weights, p, grad):
            out, vjp = jax.vjp(lambda x, weights, p: layer(x, experts, weights, p), x, weights, p)
            return out, vjp(grad)

        forward = census(jax.jit(layer).lower(x, experts, weights, p).compile())
        found = census(jax.jit(both).lower(x, experts, weights, p, x).compile())
    assert forward.counts == {"all-to-all": {"ep": 4}, "all-gather": {"ep": 3}, "reduce-scatter": {"ep": 1}}
    moe = MoEConfig(num_experts=E, top_k=top_k, mlp_dim=F, dispatch="two_level", ep_hosts=hosts)
    held = place_experts(moe, MeshConfig(ep=8), rows * length // 8, hosts)
    expected = held.transfers(D * 4, "none")
    assert {axis for _, axis, _, _ in expected} == {"ep hosts", "ep inside"}
    assert found.counts == {kind: {"ep": count} for kind, _, count, _ in expected}
    assert found.bytes == {kind: {"ep": size} for kind, _, _, size in expected}


class _Device(NamedTuple):
    slice_index: int


@pytest.mark.parametrize(
    ("homes", "hosts"), [([0, 0, 1, 1], 2), ([0, 0, 0, 0], 1), ([3, 2, 1, 0], 4), ([0, 1, 0, 1], 1), ([0, 0, 0, 1], 1)]
)
def test_hosts_along_an_axis(homes, hosts):
    """As many as hold neighbours, each equally many; else one, for all."""
    devices = np.empty((4, 2), object)
    for i, home in enumerate(homes):
        devices[i] = [_Device(home)] * 2
    assert hosts_along(SimpleNamespace(devices=devices, axis_names=("ep", "tp")), "ep") == hosts


def test_fastest_chunks(rng):
    x, experts, weights, p = make(rng, 4, 6, 2, "random")
    mesh = make_mesh(devices=jax.devices()[:2], ep=2)
    with jax.set_mesh(mesh):
        specs = {k: ParamSpec(v.shape, AXES[k], constant(0.0)) for k, v in p.items()}
        p = gather_experts(jax.device_put(p, jax.NamedSharding(mesh, P())), specs, jnp.float32, x.shape[:2])
        split = lambda a: jax.device_put(a, jax.NamedSharding(mesh, P("ep")))
        count, times = fastest_chunks(*map(split, (x, experts, weights)), p, counts=(2, 1), rounds=1)
    assert list(times) == [1, 2] and count == min(times, key=times.__getitem__) and all(t > 0 for t in times.values())
    slow = {1: lambda: time.sleep(0.03), 2: lambda: time.sleep(0.001), 4: lambda: time.sleep(0.02)}
    assert chunks._fastest(slow, rounds=3)[0] == 2
    with pytest.raises(ValueError, match=r"counts=\[0, 2\] must be"):
        fastest_chunks(x, experts, weights, p, counts=(2, 0))


def test_rows_that_do_not_divide(rng):
    """Three rows on ep=4: every device has all of them and adds what its own experts make."""
    check(rng, "ep=4", "auto", "random", rows=3)


def test_the_way_is_chosen_by_bytes():
    assert choose(2, 8) == "all_gather" and choose(64, 8) == "all_to_all"
    assert choose(16, 8, hosts=2) == "two_level" and choose(16, 1, hosts=16) == "all_to_all"
    assert choose(16, 1, hosts=2, far=1.0) == "all_to_all"  # links alike: the second hop is for nothing
    training, step = (remote_cost(tokens, 128, 4096) for tokens in (4096, 8))
    assert choose(4, 8, remote=training) == "all_gather" and choose(64, 8, remote=training) == "remote_copy"
    assert choose(64, 8, remote=step) == "all_to_all"  # rows are so few that starting their copies takes longer
    assert choose(64, 8, hosts=2, remote=training) == "two_level"  # memory of another host is out of reach
    # 4096 tokens in 8 pairs and 3.5 rows to fill up each of 128 runs, 3/4 of which leave with an eighth of 512 bytes
    # for weights; 128 copies to start, 4 rows each.
    assert training(4, 8) == pytest.approx((8 + 3.5 * 128 / 4096) * (1 + 64 / 4096) * 3 / 4 + 128 * 4 / 4096)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_without_a_mesh(routing, rng):
    x, experts, weights, p = make(rng, 3, 7, 2, routing)
    np.testing.assert_allclose(apply_experts(x, experts, weights, p), loop(x, experts, weights, p), atol=1e-5)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        x = jax.device_put(x, P())
    with pytest.raises(ValueError, match=r"lie on a mesh but none is set; call this under `with jax.set_mesh"):
        apply_experts(x, experts, weights, p)


def test_ep_that_does_not_divide(rng):
    x, experts, weights, p = make(rng, 6, 2, 2, "random")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:3], ep=3)):
        with pytest.raises(ValueError, match=r"num_experts=8 is not divisible by ep=3; use ep in \[1, 2, 4, 8\]"):
            apply_experts(x, experts, weights, p)
        with pytest.raises(ValueError, match="dispatch='none'"):
            apply_experts(x, experts, weights, p, dispatch="none")
    with jax.set_mesh(make_mesh(devices=jax.devices()[:4], ep=4)):
        with pytest.raises(ValueError, match="needs hosts=2 or more"):
            apply_experts(x, experts, weights, p, dispatch="two_level")
        with pytest.raises(NotImplementedError, match="'remote_copy' cannot run here: needs a TPU; this is cpu; use"):
            apply_experts(x, experts, weights, p, dispatch="remote_copy")
        with pytest.raises(ValueError, match=r"ep=4 lies over hosts=2; use dispatch='two_level', which copies inside"):
            apply_experts(x, experts, weights, p, dispatch="remote_copy", hosts=2)
        with pytest.raises(ValueError, match=r"ep=4 does not lie evenly over hosts=3; use ep in \[3, 6, 12, 24\]"):
            apply_experts(x, experts, weights, p, hosts=3)
    with pytest.raises(ValueError, match="but ep_hosts=2; use dispatch='two_level'"):
        MoEConfig(num_experts=E, top_k=2, mlp_dim=F, dispatch="remote_copy", ep_hosts=2)
    with pytest.raises(ValueError, match="ep_hosts=1; set it to the hosts that ep spans"):
        MoEConfig(num_experts=E, top_k=2, mlp_dim=F, dispatch="two_level", ep_hosts=1)


@pytest.mark.slow
def test_benchmarks_run_in_small(capsys):
    """The scripts of a GPU: the layer is right and has a time, alone and over all devices."""
    assert layer.main(["--tiny", "--remat", "dots"]) == 0
    assert devices.main(["--tiny", "--transfers", "all_gather", "--ways", "all_to_all/2"]) == 0
    out = capsys.readouterr().out
    assert "layer, remat dots" in out and "GB/s leave each device" in out and "ep=8 all_to_all, 2 parts" in out
