"""MemoryCheckpointer: snapshots in the memory of a keeper process, with parity on the other hosts; no storage.

Each host's shards go to the shared memory of its keeper, which outlives training. After a crash the processes find
their bytes there; up to `lost` hosts that are gone altogether are rebuilt from the others. (REFT, arXiv 2310.12670.)
"""

import concurrent.futures
import contextlib
import functools
import json
import logging
import mmap
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxscale.checkpoint.background import Background, OnError, one_line
from jaxscale.checkpoint.beside import DeviceCopies
from jaxscale.checkpoint.layout import Layout
from jaxscale.checkpoint.maps import Box, Lazy
from jaxscale.checkpoint.memory import keeper, wire
from jaxscale.checkpoint.reading import CorruptCheckpointError, read_into
from jaxscale.checkpoint.snapshot import HostPool, Snapshot, on_host, rests_on_host, take_snapshot
from jaxscale.checkpoint.tree import step_number

log = logging.getLogger("jaxscale.checkpoint")

ALIGN = 64  # bytes; each shard starts at a multiple
FETCH_BYTES = 1 << 30  # of copies on devices that are on their way through host memory; one shard may be larger
RECOVER_SECONDS = 1800.0


class MemoryCheckpointer:
    """Saves and restores like `Checkpointer`, in memory.

        with MemoryCheckpointer(["a:9100", "b:9100", "c:9100"], job="run-a", lost=1) as memory:
            memory.save(10, state, metadata={"position": 2_560})
            state = memory.restore(abstract_state)

    This host's keeper is started unless it runs. It is stopped when the `with` block ends well; after an error or a
    kill it stays, for an hour at most, and the next start of the job finds it.

    Args:
      hosts: "address:port" of every host's keeper, the same list everywhere. One JAX process on each host.
      job: a name that two jobs do not share; keepers of another job refuse to answer.
      lost: how many hosts may be lost at once; each holds lost / (hosts - lost) of its bytes in parity besides.
        0 guards against the loss of processes alone.
      host: which of `hosts` this is.
      devices: those whose shards belong to this host; by default this process's.
      on_error, pool: as in `Checkpointer`.
      idle_seconds: how long a keeper waits for its trainer to come back.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        job: str,
        lost: int = 1,
        host: int | None = None,
        devices: Sequence[Any] | None = None,
        on_error: OnError = "continue",
        pool: HostPool | None = None,
        idle_seconds: float = 3600.0,
    ):
        self.hosts, self.job, self.lost, self.pool = list(hosts), job, lost, pool
        self.host = jax.process_index() if host is None else host
        self.devices = set(jax.local_devices() if devices is None else devices)
        self._background = Background(self._explain, on_error)
        self._beside = DeviceCopies()
        self._maps: dict[str, mmap.mmap] = {}
        self._last: int | None = None
        keeper.Keeper(job, self.host, self.hosts, lost)  # checks the numbers
        self.idle_seconds = idle_seconds
        self._own = self._attach()

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any] | None = None) -> bool:
        """Starts copying `state` and returns; the caller may donate it at once. All hosts call it."""
        step = step_number(step)
        self._background.ready()
        return self.save_snapshot(
            step, take_snapshot(state, beside=self._beside, pool=self.pool, fetch=False), metadata=metadata
        )

    def save_snapshot(self, step: int, snapshot: Snapshot, *, metadata: Mapping[str, Any] | None = None) -> bool:
        """`save` of a snapshot that was taken already, which is released when it is copied; False if it is there."""
        self._background.ready()
        if step == self._last:
            snapshot.release()
            return False
        copied = json.loads(json.dumps(dict(metadata or {})))
        self._background.start(step, self._write, step, snapshot, copied)
        return True

    def restore(
        self,
        target: Any,
        step: int | None = None,
        *,
        layout: Layout = (),
        only: str | Sequence[str] | None = None,
        missing: Literal["refuse", "keep"] = "refuse",
    ) -> Any:
        """Reads the newest step that all hosts have, or can rebuild, into the shards of `target`. All hosts call it.

        Shards that this host kept are read in place, others come from their hosts' keepers; all are checked.

        Raises:
          FileNotFoundError: too many hosts are gone, or nothing was saved.
          CorruptCheckpointError: bytes in memory are not those that were saved.
          ValueError: the step holds other arrays than `target`.
        """
        self._background.finish()
        step = self._known(step)
        answer = self._own.ask("recover", step=step, timeout=RECOVER_SECONDS)[0]
        if answer["rebuilt"]:
            log.warning("step %d of host %d was rebuilt from the other hosts", step, self.host)
        if jax.process_count() > 1:  # before any host saves again: others may hold a later step of the run that ended
            multihost_utils.sync_global_devices(f"jaxscale memory step {step}")
        manifests = self._manifests(step)
        with contextlib.ExitStack() as peers:
            read = self._reader(step, manifests, answer["path"], peers)
            arrays, records = _open_arrays(manifests, self.host, read)
            return read_into(target, arrays, layout, records=records, only=only, missing=missing)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given."""
        self._background.finish()
        step = self._known(step)
        self._own.ask("recover", step=step, timeout=RECOVER_SECONDS)
        return self._manifests(step)[self.host]["metadata"]

    def steps(self) -> list[int]:
        """Steps that every host has, or that can be rebuilt, in ascending order."""
        states = []
        for address in self.hosts:
            try:
                with wire.Connection(address, self.job, seconds=2.0) as peer:
                    states.append(peer.ask("status")[0])
            except wire.KeeperError as error:
                log.warning("%s", one_line(error))
        out = []
        for step in sorted({step for state in states for step in state["data"]}):
            have = [state for state in states if step in state["data"]]
            gone = len(self.hosts) - len(have)
            if not gone or (gone <= self.lost and all(step in state["parity"] for state in have)):
                out.append(step)
        return out

    def latest_step(self) -> int | None:
        """The newest step that can be restored; the same in every process."""
        steps = self.steps()
        newest = steps[-1] if steps else -1
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def clear(self) -> None:
        """Drops what this host's keeper holds: a new run begins."""
        self._background.finish()
        self._own.ask("clear")
        self._last = None

    def wait(self) -> None:
        """Waits until the newest save is protected on every host; raises OSError if it failed."""
        self._background.finish()
        self._background.raise_failure()
        end = time.monotonic() + keeper.PROTECT_SECONDS
        while self._last is not None:
            answer = self._own.ask("wait_protected", step=self._last)[0]
            if answer["protected"]:
                break
            if answer["failure"] or time.monotonic() > end:
                raise OSError(f"step {self._last} is not protected by the other hosts: {answer['failure']}")

    def close(self, *, stop: bool = True) -> None:
        """Waits for the save under way; with `stop`, until it is protected, and ends this host's keeper.

        Without `stop`, as after an error, the keeper goes on by itself and nobody waits for the other hosts.
        """
        try:
            self._background.close()
            if stop:
                self.wait()
        finally:
            if stop:
                self._own.ask("stop")
                self._own.await_end()
            self._own.close()

    def __enter__(self) -> "MemoryCheckpointer":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.close(stop=error is None)
        except OSError as failure:
            if error is None:
                raise
            log.error("%s", failure)

    # Saving

    def _write(self, step: int, snapshot: Snapshot, metadata: dict[str, Any]) -> None:
        """In the background thread: every local shard into the keeper's memory, with its checksum."""
        try:
            parts, offset = [], 0
            for name, copy in snapshot.copies.items():
                for start, part in self._parts(copy):
                    offset = -(-offset // ALIGN) * ALIGN
                    record = {"name": name, "start": start, "shape": list(part.shape)}
                    parts.append((record | {"offset": offset, "bytes": part.nbytes}, part))
                    offset += part.nbytes
            memory = self._map(self._begin(step, offset), offset)
            window = HostPool(max([FETCH_BYTES, *(record["bytes"] for record, _ in parts)]))

            def put(item: tuple[dict[str, Any], Any]) -> dict[str, Any]:
                record, part = item
                place = np.frombuffer(memory, np.uint8, record["bytes"], record["offset"])
                window.reserve(record["bytes"])
                try:
                    values = np.ascontiguousarray(on_host(part))
                    np.copyto(place, values.reshape(-1).view(np.uint8))
                finally:
                    window.release(record["bytes"])
                return record | {"crc32": zlib.crc32(place)}

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                shards = list(pool.map(put, parts))
        finally:
            parts = []
            snapshot.release()
        manifest = {"bytes": offset, "records": snapshot.records, "metadata": metadata, "shards": shards}
        self._own.ask("commit", step=step, manifest=manifest)
        self._last = step

    def _begin(self, step: int, num_bytes: int) -> str:
        """The path of a slot of this host's keeper, which is started anew if it has ended."""
        ask = lambda: self._own.ask("begin", step=step, num_bytes=num_bytes, timeout=keeper.PROTECT_SECONDS + 60)[0]
        try:
            answer = ask()
        except wire.KeeperGone as error:
            log.warning("%s; starting another, which holds nothing yet", one_line(error))
            self._own.await_end()
            self._own.close()
            self._maps.clear()
            self._own = self._attach()
            answer = ask()
        if before := answer["unprotected"]:
            log.warning("step %d is not in the memory of every host: %s", before["step"], before["why"])
        return answer["path"]

    def _parts(self, leaf: Any) -> list[tuple[list[int], Any]]:
        """(first index, array) of the parts of a leaf that this host keeps; what its devices share counts once."""
        if not isinstance(leaf, jax.Array) or rests_on_host(leaf):
            return [([0] * np.ndim(leaf), np.asarray(leaf))]
        found = {}
        for shard in leaf.addressable_shards:
            if shard.device in self.devices:
                start = tuple(index.start or 0 for index in shard.index)
                if start not in found:
                    found[start] = shard.data
        return [(list(start), part) for start, part in found.items()]

    def _explain(self, step: int, error: BaseException) -> OSError:
        return OSError(f"step {step} was not saved in memory: {one_line(error)}")

    # Reading

    def _known(self, step: int | None) -> int:
        known = self.steps() if step is not None else [] if (newest := self.latest_step()) is None else [newest]
        if not known or (step is not None and step not in known):
            what = "no step" if step is None else f"step {step} is not"
            raise FileNotFoundError(
                f"{what} in the memory of the {len(self.hosts)} hosts of job {self.job!r} (up to {self.lost} may be "
                f"lost); it has {known or 'none'}; restore from storage"
            )
        return known[-1] if step is None else step

    def _manifests(self, step: int) -> list[dict[str, Any]]:
        end = time.monotonic() + keeper.PROTECT_SECONDS
        while not (found := self._own.ask("all_manifests", step=step)[0]["manifests"]):
            if time.monotonic() > end:
                raise OSError(f"other hosts did not offer step {step} in {keeper.PROTECT_SECONDS:.0f} s")
        return found

    def _reader(
        self, step: int, manifests: list[dict[str, Any]], path: str, open_peers: contextlib.ExitStack
    ) -> "Reader":
        """(host, offset, bytes, crc32) -> uint8[bytes], checked."""
        peers: dict[int, wire.Connection] = {}
        own = self._map(path, manifests[self.host]["bytes"])

        def fetch(host: int, offset: int, size: int, crc32: int) -> np.ndarray:
            if host == self.host:
                part = np.frombuffer(own, np.uint8, size, offset)
            else:
                if host not in peers:
                    peers[host] = open_peers.enter_context(wire.Connection(self.hosts[host], self.job, seconds=5))
                peer = peers[host]
                part, end = np.empty(size, np.uint8), time.monotonic() + keeper.PROTECT_SECONDS
                for first in range(0, size, keeper.CHUNK):
                    last = min(first + keeper.CHUNK, size)
                    while not len(got := peer.ask("read", step=step, start=offset + first, stop=offset + last)[1]):
                        if time.monotonic() > end:  # that host is rebuilding its own bytes
                            raise OSError(f"host {host} did not offer step {step}")
                    part[first:last] = np.frombuffer(got, np.uint8)
            if zlib.crc32(part) != crc32:
                raise CorruptCheckpointError(f"step {step} in the memory of host {host} is not as it was saved")
            return part

        return functools.lru_cache(maxsize=16)(fetch)

    # The keeper

    def _map(self, path: str, size: int) -> mmap.mmap:
        if path not in self._maps or len(self._maps[path]) < size:
            fd = os.open(path, os.O_RDWR)
            try:
                self._maps[path] = mmap.mmap(fd, max(size, 1))
            finally:
                os.close(fd)
        return self._maps[path]

    def _attach(self) -> wire.Connection:
        """A connection to this host's keeper as its trainer."""
        own = self._start()
        try:
            own.ask("trainer")
        except OSError:
            own.close()
            raise
        return own

    def _start(self) -> wire.Connection:
        """A connection to this host's keeper, which is started unless it runs."""
        address = self.hosts[self.host]
        port = address.rpartition(":")[2]
        local = address if address.startswith(("localhost:", "127.")) else f"localhost:{port}"
        try:
            return wire.Connection(local, self.job)
        except wire.KeeperError:
            pass
        command = [sys.executable, "-m", "jaxscale.checkpoint.memory.keeper", "--job", self.job]
        command += ["--host", str(self.host), "--hosts", ",".join(self.hosts), "--lost", str(self.lost)]
        output = pathlib.Path(tempfile.gettempdir()) / f"jaxscale-keeper-{os.getuid()}-{port}.log"
        root = str(pathlib.Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        with output.open("wb") as file:
            child = subprocess.Popen(
                [*command, "--idle", str(self.idle_seconds)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=os.environ | {"PYTHONPATH": path},
                start_new_session=True,  # so that what kills training does not kill it
            )
        try:
            return wire.Connection(local, self.job, seconds=30)
        except wire.KeeperError as error:
            child.kill()
            raise OSError(f"{one_line(error)}; {output} says: {output.read_text()[-300:].strip()}") from None
        finally:
            child.returncode = child.poll() or 0  # it is not ours to wait for


Reader = Callable[[int, int, int, int], np.ndarray]  # (host, offset, bytes, crc32) -> uint8[bytes]


def _open_arrays(
    manifests: list[dict[str, Any]], me: int, read: Reader
) -> tuple[dict[str, Lazy], dict[str, dict[str, Any]]]:
    """Lazy arrays over the shards that all hosts hold, and their records. What several hold is taken from this one."""
    records = manifests[me]["records"]
    shards: dict[str, dict[tuple[int, ...], tuple[int, dict[str, Any]]]] = {name: {} for name in records}
    for host in sorted(range(len(manifests)), key=lambda host: host != me):
        for shard in manifests[host]["shards"]:
            shards[shard["name"]].setdefault(tuple(shard["start"]), (host, shard))
    arrays = {}
    for name, record in records.items():
        shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
        box = functools.partial(_read_box, name, dtype, shards[name], read)
        arrays[name] = Lazy(shape, dtype, box, frozenset([name]))
    return arrays, records


def _read_box(name: str, dtype: np.dtype, shards: Mapping[tuple[int, ...], Any], read: Reader, box: Box) -> np.ndarray:
    """The part `box` of an array, put together from the shards that it touches."""
    out, filled = np.empty([s.stop - s.start for s in box], dtype), 0
    for start, (host, shard) in shards.items():
        ends = [first + size for first, size in zip(start, shard["shape"])]
        common = [(max(s.start, first), min(s.stop, end)) for s, first, end in zip(box, start, ends)]
        if any(a >= b for a, b in common):
            continue
        part = read(host, shard["offset"], shard["bytes"], shard["crc32"]).view(dtype).reshape(shard["shape"])
        inside = tuple(slice(a - first, b - first) for (a, b), first in zip(common, start))
        place = tuple(slice(a - s.start, b - s.start) for (a, b), s in zip(common, box))
        out[place] = part[inside]
        filled += out[place].size
    if filled != out.size:
        raise CorruptCheckpointError(f"{name}: the hosts hold {filled} of {out.size} elements that are wanted")
    return out
