"""States and meshes shared by the checkpoint tests."""

import dataclasses
import socket

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint.memory import wire
from jaxscale.mesh import make_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What a training loop carries, with a leaf of every kind."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    key: jax.Array
    count: int
    loss_scale: np.ndarray


SPECS = {
    "embed": (("fsdp", "tp"), (24, 16)),
    "layers/wq": ((None, "fsdp", "tp"), (3, 16, 8)),
    "layers/wo": ((None, "tp", "fsdp"), (3, 8, 16)),
    "norm": ((None,), (16,)),
}


def place(values, mesh):
    """Arrays (by the names of SPECS) in the shards of `mesh`; a dim that does not divide stays whole."""

    def put(name, value):
        axes = SPECS[name][0]
        spec = [a if a and size % mesh.shape[a] == 0 else None for a, size in zip(axes, value.shape)]
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "embed": put("embed", values["embed"]),
        "layers": {"wq": put("layers/wq", values["layers/wq"]), "wo": put("layers/wo", values["layers/wo"])},
        "norm": put("norm", values["norm"]),
        "tail": jax.device_put(jnp.zeros((0, 4)), NamedSharding(mesh, PartitionSpec())),
    }


@pytest.fixture
def make_state(rng):
    """make_state(mesh) -> a State of fresh random values on it, its Adam moments included."""

    def make(mesh, count=3):
        values = {n: rng.normal(size=shape).astype(np.float32) for n, (_, shape) in SPECS.items()}
        params = place(values, mesh)
        params["norm"] = params["norm"].astype(jnp.bfloat16)
        opt_state = optax.adamw(1e-3).init(params)
        opt_state = jax.tree.map(
            lambda x: jax.device_put(jnp.asarray(rng.normal(size=x.shape)).astype(x.dtype), x.sharding), opt_state
        )
        whole = NamedSharding(mesh, PartitionSpec())
        return State(
            step=jax.device_put(jnp.int32(7), whole),
            params=params,
            opt_state=opt_state,
            key=jax.device_put(jax.random.key(int(rng.integers(1 << 30))), whole),
            count=count,
            loss_scale=np.asarray(rng.normal(size=3), np.float64),
        )

    return make


@pytest.fixture(scope="session")
def meshes():
    """Meshes of 1 to 8 devices by name."""
    devices = jax.devices()
    return {
        "one": make_mesh(devices=devices[:1]),
        "fsdp8": make_mesh(fsdp=8),
        "tp4dp2": make_mesh(tp=4, dp=2),
        "fsdp2tp3": make_mesh(fsdp=2, tp=3, devices=devices[:6]),
        "fsdp3": make_mesh(fsdp=3, devices=devices[:3]),
    }


def abstract(state):
    """The same tree as ShapeDtypeStructs where it is made of jax arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) if isinstance(x, jax.Array) else x, state
    )


def bits(tree):
    """Bytes of every leaf by path: two trees are bit-equal when these are."""

    def leaf_bits(x):
        if hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).dtype.name, np.shape(x), np.asarray(x).tobytes()

    return {jax.tree_util.keystr(path): leaf_bits(x) for path, x in jax.tree.flatten_with_path(tree)[0]}


def free_addresses(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("localhost", 0))
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


@pytest.fixture
def hosts():
    """hosts(n) -> addresses; their keepers are ended after the test."""
    used = []

    def make(count):
        used.extend(free_addresses(count))
        return used[-count:]

    yield make
    for address in used:
        try:
            with wire.Connection(address, "job") as keeper:
                keeper.ask("stop")
        except OSError:
            pass
