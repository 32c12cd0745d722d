"""A keeper: one process on each host that holds its snapshots in shared memory, and parity of the other hosts'.

    python -m jaxscale.checkpoint.memory.keeper --job run-a --host 1 --hosts a:9100,b:9100,c:9100 --lost 1

It outlives training. A trainer that comes back finds its host's snapshot in memory. A keeper that comes back empty
rebuilds its host's bytes, and its parity, from the others. (REFT, arXiv 2310.12670.) Two slots are used in turn: a
snapshot is only overwritten once a newer one is complete, with its parity, on every host.

Needs numpy alone, no JAX.
"""

import argparse
import contextlib
import functools
import mmap
import os
import signal
import socketserver
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxscale.checkpoint import erasure
from jaxscale.checkpoint.memory import wire

CHUNK = 4 << 20  # bytes asked of another keeper at a time
WAIT_SECONDS = 2.0  # an answer that is not ready after this says so, and is asked for again
CONNECT_SECONDS = 20.0  # another host's keeper may just be starting
PROTECT_SECONDS = 120.0  # a snapshot that is not protected on every host by then counts as not saved
HOLDS_NOTHING_SECONDS = 30.0  # a keeper without a snapshot ends so long after its trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Holds snapshots of one host in shared memory.")
    parser.add_argument("--job", required=True)
    parser.add_argument("--host", type=int, required=True, help="which of --hosts this one is")
    parser.add_argument("--hosts", required=True, help="address:port of every keeper, with commas between")
    parser.add_argument("--lost", type=int, default=1, help="how many hosts may be lost at once")
    parser.add_argument("--idle", type=float, default=3600.0, help="end after so many seconds without a trainer")
    args = parser.parse_args()
    keeper = Keeper(args.job, args.host, args.hosts.split(","), args.lost)
    name, _, port = keeper.hosts[args.host].rpartition(":")
    server = Server((name if name in ("localhost", "127.0.0.1") else "", int(port)), handler(keeper))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Thread(target=keeper.protect_forever, daemon=True).start()
    while not keeper.stopped.wait(1.0):
        idle = args.idle if keeper.status()["data"] else min(args.idle, HOLDS_NOTHING_SECONDS)
        if time.monotonic() - keeper.last_trainer > idle and not keeper.connected:
            break
    time.sleep(0.1)  # for the answer to "stop"
    os._exit(0)  # handlers may be waiting for a peer that ended too


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128


class Slot:
    """One snapshot in shared memory; kept and grown, so that a later snapshot takes no new pages."""

    def __init__(self):
        self.step: int | None = None
        self.done = False
        self.manifest: dict[str, Any] = {}
        self.fd = os.memfd_create("jaxscale-checkpoint")
        self.size = 0
        self.view: mmap.mmap | None = None

    def take(self, step: int, num_bytes: int) -> None:
        self.step, self.done, self.manifest = step, False, {}
        if num_bytes > self.size:
            self.view = None
            os.posix_fallocate(self.fd, 0, num_bytes)  # too little memory is an error now, not a dead process later
            self.view, self.size = mmap.mmap(self.fd, num_bytes), num_bytes

    def drop(self) -> None:
        self.step, self.done, self.manifest = None, False, {}

    def bytes_of(self, start: int, stop: int) -> np.ndarray:
        """uint8[stop - start]; zeros beyond the end of the snapshot."""
        out = np.zeros(stop - start, np.uint8)
        end = min(stop, self.manifest["bytes"])
        if end > start and self.view is not None:
            out[: end - start] = np.frombuffer(self.view, np.uint8, end - start, start)
        return out


class Keeper:
    """What one host keeps, and what it does for the others."""

    def __init__(self, job: str, host: int, hosts: Sequence[str], lost: int):
        if not 0 <= host < len(hosts):
            raise ValueError(f"host={host} is none of the {len(hosts)} hosts")
        if lost:
            erasure.piece_bytes(0, len(hosts), lost)  # checks the numbers
        self.job, self.host, self.hosts, self.lost = job, host, list(hosts), lost
        self.changed = threading.Condition()
        self.slots = [Slot(), Slot()]
        self.manifests: dict[int, list[dict[str, Any]]] = {}  # of all hosts, by step
        self.parity: dict[int, list[np.ndarray]] = {}  # by step
        self.spare: list[list[np.ndarray]] = []  # parity buffers to use again
        self.protected: set[int] = set()  # steps that are complete, with their parity, on every host
        self.failures: dict[int, str] = {}
        self.begun = -1  # the newest step that was begun or recovered
        self.stopped = threading.Event()
        self.trainer = 0  # the trainer that may write; one that comes later takes its place
        self.connected = False
        self.last_trainer = time.monotonic()

    # What a trainer asks

    def take_over(self) -> int:
        """A new trainer; what an earlier one, killed perhaps, still asks for is refused from now on."""
        with self.changed:
            self.trainer += 1
            self.connected = True
            self.changed.notify_all()
            return self.trainer

    def leave(self, trainer: int, begun: int | None) -> None:
        """A trainer ended; what it had begun and not committed is no snapshot."""
        with self.changed:
            if trainer == self.trainer:
                self.connected, self.last_trainer = False, time.monotonic()
                slot = self._slot(begun) if begun is not None else None
                if slot is not None and not slot.done:
                    slot.drop()

    def begin(self, trainer: int, step: int, num_bytes: int) -> dict[str, Any]:
        """Memory for a snapshot, once it is known how the newest one ended; the path can be mapped by the trainer.

        If that is protected, the one before it is overwritten; if it could not be, it is overwritten itself.
        """
        with self.changed:
            self._check_trainer(trainer)
            newest = max((s.step for s in self.slots if s.done and s.step not in (None, step)), default=None)
            known = lambda: newest is None or newest in self.protected or newest in self.failures
            end = time.monotonic() + PROTECT_SECONDS
            while not known() and time.monotonic() < end:
                self.changed.wait(1.0)
                self._check_trainer(trainer)
            unprotected = None
            if newest is not None and newest not in self.protected:
                unprotected = {"step": newest, "why": self.failures.get(newest, f"not after {PROTECT_SECONDS:.0f} s")}
            slot = next((s for s in self.slots if s.step == step), None)
            slot = slot or next(s for s in self.slots if newest is None or (s.step == newest) == bool(unprotected))
            self._forget(slot)
            slot.take(step, num_bytes)
            self.begun = step
            return {"path": f"/proc/{os.getpid()}/fd/{slot.fd}", "step": step, "unprotected": unprotected}

    def commit(self, trainer: int, step: int, manifest: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            self._check_trainer(trainer)
            slot = self._slot(step)
            if slot is None:
                raise ValueError(f"step {step} was not begun")
            slot.manifest, slot.done = manifest, True
            self.failures.pop(step, None)
            self.changed.notify_all()
        return {}

    def recover(self, trainer: int, step: int) -> dict[str, Any]:
        """Makes `step` the newest one here: drops what is newer, and rebuilds this host's bytes if they are gone."""
        with self.changed:
            self._check_trainer(trainer)
            for slot in self.slots:
                if slot.step is not None and (slot.step > step or not slot.done):
                    self._forget(slot)
            self.begun = step
            slot = self._slot(step)
            rebuilt = slot is None
            if slot is None:
                slot = next((s for s in self.slots if s.step is None), self.slots[0])
                self._forget(slot)
        seconds = 0.0
        if rebuilt:
            start = time.monotonic()
            try:
                manifest = self._rebuild(slot, step)
            except BaseException:
                slot.drop()
                raise
            self.commit(trainer, step, manifest)
            seconds = time.monotonic() - start
        with self.changed:
            self.failures.pop(step, None)
            self.changed.notify_all()
        return {"rebuilt": rebuilt, "seconds": seconds, "path": f"/proc/{os.getpid()}/fd/{slot.fd}"}

    def clear(self, trainer: int) -> dict[str, Any]:
        with self.changed:
            self._check_trainer(trainer)
            for slot in self.slots:
                self._forget(slot)
        return {}

    def wait_protected(self, step: int) -> dict[str, Any]:
        self._wait(lambda: step in self.protected or step in self.failures)
        return {"protected": step in self.protected, "failure": self.failures.get(step)}

    # What anybody asks

    def status(self) -> dict[str, Any]:
        with self.changed:
            data = sorted(slot.step for slot in self.slots if slot.done and slot.step is not None)
            parity = sorted(self.parity) if self.lost else data
            return {
                "host": self.host,
                "pid": os.getpid(),
                "hosts": len(self.hosts),
                "lost": self.lost,
                "data": data,
                "parity": parity,
                "protected": sorted(self.protected),
            }

    def manifest(self, step: int) -> dict[str, Any]:
        """This host's, as soon as its snapshot is complete."""
        slot = self._unless_lost(step, lambda: self._complete(step))
        return {"manifest": slot.manifest if slot else None}

    def all_manifests(self, step: int) -> dict[str, Any]:
        found = self._wait(lambda: self.manifests.get(step))
        return {"manifests": found}

    def read(self, step: int, start: int, stop: int) -> np.ndarray | None:
        slot = self._unless_lost(step, lambda: self._complete(step))
        return slot.bytes_of(start, stop) if slot else None

    def read_parity(self, step: int, place: int, start: int, stop: int) -> np.ndarray:
        with self.changed:
            if step not in self.parity:
                raise ValueError(f"host {self.host} has no parity of step {step}")
            return self.parity[step][place][start:stop]

    # What it does by itself

    def protect_forever(self) -> None:
        """Builds the parity of each complete snapshot, and waits until every host has built its own."""
        while True:
            with self.changed:
                step = self.changed.wait_for(self._unprotected)[0]
                slot = self._complete(step)
                assert slot is not None
                mine = slot.manifest
            try:
                self._protect(step, mine)
            except Exception as error:
                with self.changed:
                    if self._holds(step, mine):  # of one that was dropped the same step of another run knows nothing
                        self.failures[step] = str(error) or type(error).__name__
                        self.changed.notify_all()

    def _protect(self, step: int, mine: dict[str, Any]) -> None:
        """Raises an error if the snapshot that was committed with the manifest `mine` is dropped meanwhile."""
        peers = self._connect(seconds=CONNECT_SECONDS)
        until = functools.partial(self._until, step, mine)
        try:
            manifests = {self.host: mine}
            for host, peer in peers.items():
                manifests[host] = until(lambda peer=peer: peer.ask("manifest", step=step)[0]["manifest"])
            ordered = [manifests[host] for host in range(len(self.hosts))]
            parity = self._build_parity(step, ordered, peers, until) if self.lost else []
            with self.changed:
                if not self._holds(step, mine):
                    return
                self.manifests[step], self.parity[step] = ordered, parity
                self.changed.notify_all()
            for peer in peers.values():
                until(lambda peer=peer: step in peer.ask("has_parity", step=step)[0]["parity"])
            with self.changed:
                if self._holds(step, mine):
                    self.protected.add(step)
                    self.changed.notify_all()
        finally:
            for peer in peers.values():
                peer.close()

    def has_parity(self, step: int) -> dict[str, Any]:
        self._unless_lost(step, lambda: step in self.parity)
        return self.status()

    def _build_parity(
        self,
        step: int,
        manifests: list[dict[str, Any]],
        peers: dict[int, wire.Connection],
        until: Callable[[Callable[[], Any]], Any],
    ) -> list[np.ndarray]:
        """The `lost` pieces that this host keeps, from one piece of every other host for each."""
        hosts, lost = len(self.hosts), self.lost
        piece = erasure.piece_bytes(max(m["bytes"] for m in manifests), hosts, lost)
        stripes = [s for s in range(hosts) if (self.host - s) % hosts < lost]
        out = self._buffers(lost, piece)
        for k, stripe in enumerate(stripes):
            inside = erasure.members(stripe, hosts, lost)
            factors = erasure.matrix_of(len(inside), lost)[(self.host - stripe) % hosts]
            for factor, member in zip(factors, inside):
                base = erasure.place_of(member, stripe, hosts, lost) * piece
                fetch = functools.partial(_fetch, peers[member], "read", step=step)
                for start in range(0, piece, CHUNK):
                    stop = min(start + CHUNK, piece)
                    part = until(functools.partial(fetch, start=base + start, stop=base + stop))
                    erasure.combine([factor], [np.frombuffer(part, np.uint8)], out[k][start:stop])
        return out

    def _rebuild(self, slot: Slot, step: int) -> dict[str, Any]:
        """This host's bytes from the hosts that have theirs, chunk by chunk into the slot; returns its manifest."""
        hosts, lost, me = len(self.hosts), self.lost, self.host
        peers = self._connect(seconds=5.0, some=True)
        states = {host: peer.ask("status")[0] for host, peer in peers.items()}
        data = [host for host, state in states.items() if step in state["data"]]
        parity = [host for host, state in states.items() if step in state["parity"]] if lost else []
        witness = next((host for host in data if host in parity), None)
        if witness is None or hosts - len(data) > lost:
            gone = hosts - len(data)
            raise ValueError(
                f"step {step} is lost: {gone} of {hosts} hosts are gone and the parity covers {lost}; "
                "restore from storage"
            )
        manifests = peers[witness].ask("all_manifests", step=step)[0]["manifests"]
        manifest = manifests[me]
        piece = erasure.piece_bytes(max(m["bytes"] for m in manifests), hosts, lost)
        slot.take(step, manifest["bytes"])
        for stripe in range(hosts):
            inside = erasure.members(stripe, hosts, lost)
            if me not in inside:
                continue
            mine, base = inside.index(me), erasure.place_of(me, stripe, hosts, lost) * piece
            # Where each piece of the stripe is: (position in the code, how to fetch a part of it).
            sources: list[tuple[int, Callable[..., bytearray]]] = []
            for position, host in enumerate(inside):
                if host in data:
                    first = erasure.place_of(host, stripe, hosts, lost) * piece
                    sources.append((position, functools.partial(_fetch, peers[host], "read", step=step, base=first)))
            for position, host in enumerate(((stripe + k) % hosts for k in range(lost)), len(inside)):
                if host in parity and len(sources) < len(inside):
                    place = erasure.parity_of(host, stripe, hosts, lost)
                    ask = functools.partial(_fetch, peers[host], "read_parity", step=step, place=place)
                    sources.append((position, ask))
            for start in range(0, min(piece, manifest["bytes"] - base), CHUNK):
                stop = min(start + CHUNK, piece)
                have = {k: np.frombuffer(fetch(start=start, stop=stop), np.uint8) for k, fetch in sources}
                part = erasure.decode(have, len(inside), lost, wanted=[mine])[mine]
                end = min(base + stop, manifest["bytes"])
                assert slot.view is not None
                slot.view[base + start : end] = part[: end - base - start].tobytes()
        for peer in peers.values():
            peer.close()
        for shard in manifest["shards"]:
            found = zlib.crc32(slot.view[shard["offset"] : shard["offset"] + shard["bytes"]]) if slot.view else 0
            if shard["bytes"] and found != shard["crc32"]:
                raise ValueError(
                    f"step {step}: {shard['name']} was rebuilt with a wrong checksum; restore from storage"
                )
        return manifest

    # Helpers

    def _check_trainer(self, trainer: int) -> None:
        if trainer != self.trainer:
            raise ValueError(f"another process saves to the keeper of host {self.host} of job {self.job!r}; end one")

    def _slot(self, step: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.step == step), None)

    def _complete(self, step: int) -> Slot | None:
        slot = self._slot(step)
        return slot if slot is not None and slot.done else None

    def _holds(self, step: int, manifest: dict[str, Any]) -> bool:
        """Whether the snapshot that was committed with this very manifest is still here."""
        slot = self._complete(step)
        return slot is not None and slot.manifest is manifest

    def _unprotected(self) -> list[int]:
        steps = [slot.step for slot in self.slots if slot.done and slot.step is not None]
        return sorted(step for step in steps if step not in self.protected and step not in self.failures)

    def _forget(self, slot: Slot) -> None:
        if slot.step is not None:
            self.protected.discard(slot.step)
            self.manifests.pop(slot.step, None)
            self.failures.pop(slot.step, None)
            if parity := self.parity.pop(slot.step, None):
                self.spare.append(parity)
        slot.drop()
        self.changed.notify_all()

    def _buffers(self, count: int, size: int) -> list[np.ndarray]:
        with self.changed:
            found = self.spare.pop() if self.spare else []
        if len(found) == count and all(len(x) == size for x in found):
            for x in found:
                x[...] = 0
            return found
        return [np.zeros(size, np.uint8) for _ in range(count)]

    def _connect(self, *, seconds: float, some: bool = False) -> dict[int, wire.Connection]:
        """To the other keepers; with `some`, to those that answer."""
        out = {}
        for host in range(len(self.hosts)):
            if host != self.host:
                with contextlib.suppress(wire.KeeperError) if some else contextlib.nullcontext():
                    out[host] = wire.Connection(self.hosts[host], self.job, seconds=seconds)
        return out

    def _wait(self, ready: Callable[[], Any]) -> Any:
        with self.changed:
            return self.changed.wait_for(ready, WAIT_SECONDS)

    def _unless_lost(self, step: int, ready: Callable[[], Any]) -> Any:
        """What is ready; raises ValueError at once if this host will never have it, so that the others go on too."""

        def lost() -> str | None:
            passed = self._slot(step) is None and self.begun > step
            return f"host {self.host} went on to step {self.begun}" if passed else self.failures.get(step)

        self._wait(lambda: ready() or lost())
        with self.changed:
            if not (found := ready()) and (why := lost()):
                raise ValueError(f"step {step}: {why}")
            return found

    def _until(self, step: int, mine: dict[str, Any], ask: Callable[[], Any]) -> Any:
        """Asks again while the answer is empty and this host still has the snapshot with the manifest `mine`."""
        end = time.monotonic() + PROTECT_SECONDS
        while not (found := ask()):
            if not self._holds(step, mine):
                raise ValueError(f"step {step} was dropped")
            if time.monotonic() > end:
                raise ValueError(f"other hosts did not finish step {step} in {PROTECT_SECONDS:.0f} s")
        return found


def handler(keeper: Keeper) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        """One connection; a trainer's stays open, so that its end is noticed."""

        def handle(self) -> None:
            begun, trainer = None, 0
            try:
                while (request := wire.receive(self.request)) is not None:
                    command = request.pop("command", None)
                    try:
                        if request.pop("job", None) != keeper.job:
                            raise ValueError(f"this keeper is of job {keeper.job!r}")
                        if command == "trainer":
                            trainer, answer, payload = keeper.take_over(), {}, b""
                        elif command in OF_TRAINER:
                            answer, payload = getattr(keeper, command)(trainer, **request), b""
                            begun = request["step"] if command == "begin" else None
                        else:
                            answer, payload = self.answer(command, request)
                    except Exception as error:
                        answer, payload = {"error": str(error) or type(error).__name__}, b""
                    wire.send(self.request, answer, payload)
            except OSError:
                pass  # the other side ended
            finally:
                if trainer:
                    keeper.leave(trainer, begun)

        def answer(self, command: str | None, request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
            if command in ("read", "read_parity"):
                part = getattr(keeper, command)(**request)
                return ({"bytes": 0}, b"") if part is None else ({"bytes": len(part)}, memoryview(part))
            if command == "stop":
                keeper.stopped.set()
                return {}, b""
            if command not in OF_ANYBODY:
                raise ValueError(f"no command {command!r}")
            return getattr(keeper, command)(**request), b""

    return Handler


OF_TRAINER = ("begin", "commit", "recover", "clear")
OF_ANYBODY = ("status", "manifest", "all_manifests", "has_parity", "wait_protected")


def _fetch(peer: wire.Connection, command: str, *, start: int, stop: int, base: int = 0, **what: int) -> bytearray:
    return peer.ask(command, start=base + start, stop=base + stop, **what)[1]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"keeper: {error}")
