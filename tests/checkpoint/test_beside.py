"""Copies on the devices: which arrays fit, and that a donated state is saved as it was whichever way its arrays go."""

import gc
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint import Checkpointer, Level, Levels, MemoryCheckpointer, snapshot
from jaxscale.checkpoint.beside import DeviceCopies

from .conftest import abstract, bits

GIB = 1 << 30


class Device:
    def __init__(self, **stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats or None


def test_room_is_what_training_at_its_peak_leaves():
    """128 GiB, of which 8 stay free."""
    stats = lambda used, peak: {
        "bytes_limit": 128 * GIB,
        "bytes_in_use": used * GIB,
        "peak_bytes_in_use": peak * GIB,
    }
    beside = DeviceCopies()
    assert beside.room_on(Device()) == 0  # the CPU says nothing
    assert beside.room_on(Device(**stats(12, 125))) == 0
    device = Device(**stats(12, 40))
    assert beside.room_on(device) == 80 * GIB
    beside._copied[device] = 12 * GIB
    device.stats = stats(12, 52)  # the copies made the peak
    assert beside.room_on(device) == 80 * GIB
    device.stats = stats(12, 62)  # and something else did
    assert beside.room_on(device) == 70 * GIB


def arrays_of(rng, mesh, sizes):
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    return {n: jax.device_put(rng.normal(size=(8, k)).astype(np.float32), split) for n, k in sizes.items()}


def test_large_arrays_first_as_far_as_every_device_has_room(meshes, rng, monkeypatch):
    mesh = meshes["fsdp8"]
    state = arrays_of(rng, mesh, {"small": 10, "middle": 60, "large": 100})  # 4 bytes each on every device
    one = {"one": jax.device_put(jnp.zeros(5), mesh.devices.flat[3])}
    rooms = dict.fromkeys(mesh.devices.flat, 500)
    monkeypatch.setattr(DeviceCopies, "room_on", lambda self, device: rooms[device])
    beside = DeviceCopies()
    assert beside.fitting(state) == ["large", "small"]
    rooms[mesh.devices.flat[3]] = 250  # one device decides for an array that lies on all
    assert beside.fitting(state | one) == ["middle"]
    rooms[mesh.devices.flat[3]] = 39
    assert beside.fitting(state | one) == ["one"]


@pytest.mark.parametrize("room", [0, 1300, 1 << 20], ids=["none", "some", "all"])
@pytest.mark.parametrize("level", ["disk", "memory", "both"])
def test_a_donated_state_is_saved_as_it_was(tmp_path, meshes, rng, monkeypatch, hosts, level, room):
    """As on an accelerator with so much free memory: simulated devices, whose buffers are not held."""
    monkeypatch.setattr(snapshot, "_can_hold", lambda array: False)
    monkeypatch.setattr(DeviceCopies, "room_on", lambda self, device: room)
    copied = []
    copy = DeviceCopies.copy
    monkeypatch.setattr(DeviceCopies, "copy", lambda self, xs: copied.append(len(xs)) or copy(self, xs))
    mesh = meshes["fsdp8"]
    state = arrays_of(rng, mesh, {"small": 10, "middle": 60, "large": 300})
    state["key"] = jax.device_put(jax.random.key(int(rng.integers(1 << 30))), NamedSharding(mesh, PartitionSpec()))
    state["int4"] = jax.device_put(rng.integers(-8, 8, (16, 3)).astype(jnp.int4), NamedSharding(mesh, PartitionSpec()))
    change = lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x * 3 + x
    step = jax.jit(lambda tree: jax.tree.map(change, tree), donate_argnums=0)
    state = jax.block_until_ready(step(state))
    want = bits(jax.tree.map(jnp.copy, state))

    stores = {}
    if level != "disk":
        stores["memory"] = MemoryCheckpointer(hosts(1), job="job", lost=0)
    if level != "memory":
        stores["disk"] = Checkpointer(tmp_path)
    with Levels([Level(store, 1) for store in stores.values()]) as levels:
        levels.save(1, state)
        state = step(step(state))
        levels.wait()
        for store in stores.values():
            assert bits(store.restore(abstract(state))) == want
    assert copied == [{0: 0, 1300: 4, 1 << 20: 5}[room]]


def test_copies_leave_one_by_one_behind_training(tmp_path, meshes, rng, monkeypatch):
    """What has room on the devices comes to the host in the background, one array after the other."""
    monkeypatch.setattr(snapshot, "_can_hold", lambda array: False)
    rooms = dict.fromkeys(meshes["fsdp8"].devices.flat, 500)
    monkeypatch.setattr(DeviceCopies, "room_on", lambda self, device: rooms[device])
    sent = []
    fetch_all = snapshot.fetch_all

    def watched(group):
        sent.append((threading.current_thread() is threading.main_thread(), sorted(group)))
        return fetch_all(group)

    monkeypatch.setattr(snapshot, "fetch_all", watched)
    state = arrays_of(rng, meshes["fsdp8"], {"a": 20, "b": 30, "c": 40, "d": 200})  # d, of 800 bytes, has no room
    want = bits(state)
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state)
        ckpt.wait()
        assert bits(ckpt.restore(abstract(state))) == want
    assert sent == [(True, ["d"]), (False, ["a"]), (False, ["b"]), (False, ["c"])]


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["host", "device"])
def test_what_is_written_is_let_go(tmp_path, meshes, rng, monkeypatch, room):
    """At once: what waits for the garbage collector is a second state in pinned memory, which takes seconds to pin."""
    monkeypatch.setattr(snapshot, "_can_hold", lambda array: False)
    monkeypatch.setattr(DeviceCopies, "room_on", lambda self, device: room)
    taken = []
    take = snapshot.copy_state

    def watched(leaves, beside, **options):
        copies, held = take(leaves, beside, **options)
        taken.extend(map(weakref.ref, copies.values()))
        return copies, held

    monkeypatch.setattr(snapshot, "copy_state", watched)
    state = arrays_of(rng, meshes["fsdp8"], {"a": 20, "b": 30})
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state)  # the first one imports and caches
        ckpt.wait()
        gc.collect()
        taken.clear()
        gc.disable()
        try:
            ckpt.save(2, state)
            ckpt.wait()
            assert len(taken) == 2 and not any(copy() is not None for copy in taken)
        finally:
            gc.enable()
