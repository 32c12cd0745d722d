"""Copies of a state in host memory that stay as they are while training goes on, from a bounded pool."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxscale.checkpoint.beside import DeviceCopies
from jaxscale.checkpoint.layout import param_roots
from jaxscale.checkpoint.tree import Record, describe, is_key, named_leaves, num_bytes


def take_snapshot(
    state: Any,
    *,
    beside: DeviceCopies,
    axes: Mapping[str, Sequence[str | None]] | None = None,
    pool: "HostPool | None" = None,
    fetch: bool = True,
) -> "Snapshot":
    """Starts copying `state` and returns; the caller may donate it at once.

    Args:
      state: any pytree of jax arrays, PRNG keys, numpy arrays and Python numbers.
      beside: the caller's; what it could copy leaves behind what training runs next.
      axes: logical axes of the parameters by path; they go into the records.
      pool: waits until it has room.
      fetch: False leaves what could be copied on its device there, for whoever writes it to fetch in the background.

    Raises:
      ValueError: there is nothing to save, or the pool is smaller than the state.
    """
    leaves = named_leaves(state)
    if not leaves:
        raise ValueError("there is nothing to save: the state has no arrays")
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array) and (dtype := np.asarray(leaf).dtype).kind in "OSUMm":
            raise ValueError(f"{name} holds {dtype}; a checkpoint holds numbers: put other things into `metadata`")
    records = {name: describe(leaf) for name, leaf in leaves.items()}
    for name, record in records.items():
        if record["dtype"] in ("uint4", "uint2"):
            raise NotImplementedError(f"{name}: {record['dtype']} cannot be saved; bitcast it to int4 or uint8")
    for root in param_roots(records) if axes else ():
        for path in (axes or {}).keys() & {name.removeprefix(root) for name in records if name.startswith(root)}:
            if axes and len(axes[path]) == len(records[root + path]["shape"]):  # factored moments have fewer dims
                records[root + path]["axes"] = list(axes[path])
    stored = {n: jax.random.key_data(x) if is_key(x) else x for n, x in leaves.items() if num_bytes(records[n])}
    if not stored:
        raise ValueError("there is nothing to save: all arrays of the state are empty")
    size = 0
    if pool is not None:
        size = sum(map(_local_bytes, stored.values()))
        pool.reserve(size)
    try:
        copies, held = copy_state(stored, beside, fetch=fetch)
    except BaseException:
        if pool is not None:
            pool.release(size)
        raise
    return Snapshot(records, copies, held, size, pool)


@dataclasses.dataclass
class Snapshot:
    """Arrays by name, in host memory (or, not fetched, on devices), with their records. The last user frees them."""

    records: dict[str, Record]
    copies: dict[str, Any]
    held: list[np.ndarray]
    num_bytes: int  # taken from the pool
    pool: "HostPool | None"
    users: int = 1
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def share(self) -> "Snapshot":
        """For one more user, who calls `release` as well."""
        with self.lock:
            self.users += 1
        return self

    def fetch(self) -> None:
        """Brings what is still on devices to the host, one array after the other, in the background while steps run."""
        with self.lock:
            for name, copy in self.copies.items():
                if _on_device(copy):
                    self.copies[name] = jax.block_until_ready(fetch_all({name: copy})[name])

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users:
                return
            self.copies, self.held = {}, []
        if self.pool is not None:
            self.pool.release(self.num_bytes)


class HostPool:
    """A bound on the host memory that snapshots hold together, all levels of a run.

    On an accelerator the memory itself is pinned and pooled by XLA: what a snapshot gives back the next one takes,
    without new pages. (XLA's own bound is XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, 64 by default.)

    Args:
      limit_bytes: of this process. Twice its share of the state lets one save start while another is written.
    """

    def __init__(self, limit_bytes: int):
        self.limit_bytes, self.used_bytes, self.peak_bytes = limit_bytes, 0, 0
        self._changed = threading.Condition()

    def reserve(self, num_bytes: int) -> None:
        """Waits until so much is free."""
        if num_bytes > self.limit_bytes:
            raise ValueError(
                f"a snapshot needs {num_bytes} bytes of host memory in this process but the pool has "
                f"{self.limit_bytes}; raise limit_bytes to {num_bytes} or more"
            )
        with self._changed:
            self._changed.wait_for(lambda: self.used_bytes + num_bytes <= self.limit_bytes)
            self.used_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def release(self, num_bytes: int) -> None:
        with self._changed:
            self.used_bytes -= num_bytes
            self._changed.notify_all()


def copy_state(
    leaves: Mapping[str, Any], beside: DeviceCopies, *, fetch: bool = True
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Arrays that stay as they are though `leaves` be donated at once, and what must be kept alive with them.

    On an accelerator these are copies in pinned host memory, ordered before whatever the devices run next, so this
    returns at once while the copying goes on. A step that donates the leaves waits until they have left the device;
    so where memory is free they are copied on the device first, and only the others leave from where they are.

    On the CPU the arrays are in host memory already: views of their buffers are held, and a step that donates them
    writes its results elsewhere for once.
    """
    copies = {name: np.array(leaf) for name, leaf in leaves.items() if rests_on_host(leaf)}
    arrays = {name: leaf for name, leaf in leaves.items() if name not in copies}
    held = {name: leaf for name, leaf in arrays.items() if _can_hold(leaf)}
    views = [np.asarray(shard.data) for leaf in held.values() for shard in leaf.addressable_shards]
    moved = {name: _one_replica(leaf) for name, leaf in arrays.items() if name not in held}
    names = beside.fitting(moved)
    copied = dict(zip(names, beside.copy([moved.pop(name) for name in names])))
    copies |= held | fetch_all(moved)  # these first: the next step waits for them
    copies |= fetch_all(copied) if fetch else copied
    return {name: copies[name] for name in leaves}, views


def fetch_all(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Starts copying arrays to pinned host memory; numpy sees them there without another copy."""
    shardings = [array.sharding.with_memory_kind(_host_memory(array)) for array in arrays.values()]
    return dict(zip(arrays, jax.device_put(list(arrays.values()), shardings, may_alias=False)))


def on_host(part: Any) -> np.ndarray:
    """A shard as numpy sees it; one that is still on its device comes through pinned memory, which is then free."""
    if _on_device(part):
        (part,) = fetch_all({"": part}).values()
    return np.asarray(part)


def _on_device(array: Any) -> bool:
    return isinstance(array, jax.Array) and not _can_hold(array) and array.sharding.memory_kind != "pinned_host"


def _can_hold(array: jax.Array) -> bool:
    """Whether numpy sees the buffer itself: on the CPU, but for int4 and its like, which are unpacked on the way."""
    whole_bytes = jnp.dtype(array.dtype).name not in ("int4", "int2", "float4_e2m1fn")
    return whole_bytes and all(device.platform == "cpu" for device in array.sharding.device_set)


def rests_on_host(leaf: Any) -> bool:
    """Numbers, numpy arrays and, among several processes, arrays that each has for itself: process 0 writes those."""
    if not hasattr(leaf, "dtype") or isinstance(leaf, np.ndarray | np.generic):
        return True
    sharding = getattr(leaf, "sharding", None)
    return jax.process_count() > 1 and (sharding is None or sharding.is_fully_addressable)


def _host_memory(array: jax.Array) -> str:
    device = next(iter(array.sharding.device_set))
    kinds = {memory.kind for memory in device.addressable_memories()}
    if "pinned_host" not in kinds:
        raise NotImplementedError(f"{device.platform} has no pinned_host memory to copy a checkpoint to, only {kinds}")
    return "pinned_host"


def _one_replica(array: jax.Array) -> jax.Array:
    """The same array without its copies on other devices, so that a host holds replicated parameters once."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or not array.is_fully_addressable:
        return array
    used = {axis for part in sharding.spec if part for axis in (part if isinstance(part, tuple) else (part,))}
    mesh = sharding.mesh
    index = tuple(slice(None) if axis in used else slice(0, 1) for axis in mesh.axis_names)
    devices = np.asarray(mesh.devices)[index]
    if devices.size == mesh.size:
        return array
    kept = NamedSharding(Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types), sharding.spec)
    by_device = {shard.device: shard.data for shard in array.addressable_shards}
    shards = [by_device[device] for device in kept.addressable_devices]
    return jax.make_array_from_single_device_arrays(array.shape, kept, shards)


def _local_bytes(leaf: Any) -> int:
    """Of a leaf's copy in this process; what several devices hold counts once where `_one_replica` copies it once."""
    if rests_on_host(leaf):
        return np.asarray(leaf).nbytes
    shards = leaf.addressable_shards
    if leaf.is_fully_addressable:
        return sum({str(shard.index): shard.data.nbytes for shard in shards}.values())
    return sum(shard.data.nbytes for shard in shards)
