"""Several places for checkpoints, each with its own interval: host memory, local disk, an object store.

disk = Checkpointer("/nvme/run-a", pool=pool)
levels = Levels([
    Level(MemoryCheckpointer(hosts, job="run-a"), every=10),
    Level(disk, every=100),
    Level(RemoteCheckpointer("gs://bucket/run-a", disk), every=1000),
], pool=pool)
levels.save(step, state, metadata=...)  # at every step; most have nothing to do
state = levels.restore(abstract_state)  # the newest step of all levels
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxscale.checkpoint.background import one_line
from jaxscale.checkpoint.beside import DeviceCopies
from jaxscale.checkpoint.memory.checkpointer import MemoryCheckpointer
from jaxscale.checkpoint.reading import CorruptCheckpointError
from jaxscale.checkpoint.remote import RemoteCheckpointer
from jaxscale.checkpoint.snapshot import HostPool, take_snapshot
from jaxscale.checkpoint.store import Checkpointer
from jaxscale.checkpoint.tree import step_number
from jaxscale.config import CheckpointConfig

log = logging.getLogger("jaxscale.checkpoint")

PORTS = range(20_000, 32_000)  # a run of one process takes one by its name; below those that systems hand out


@dataclasses.dataclass(frozen=True)
class Level:
    """A MemoryCheckpointer, Checkpointer or RemoteCheckpointer, and how many steps lie between its saves."""

    store: Any
    every: int


def open_levels(directory: str | os.PathLike[str], config: CheckpointConfig) -> "Levels":
    """The levels that a run's configuration asks for, with `directory` as the one on disk; all processes call it.

    What an earlier run with the same directory left in memory counts only while the directory is there.

    Raises:
      ValueError: processes and memory_hosts do not agree.
      OSError: a keeper cannot be started, or keeps the memory of another job.
    """
    disk = Checkpointer(directory, config, on_error=config.on_error)
    levels = [Level(disk, config.every)]
    if config.memory_every:
        job, processes = os.path.abspath(directory), jax.process_count()
        hosts = config.memory_hosts or (f"localhost:{PORTS.start + zlib.crc32(job.encode()) % len(PORTS)}",)
        if len(hosts) != processes:
            raise ValueError(
                f"memory_every is set for {processes} process(es) but memory_hosts names {len(hosts)}; "
                "give one address:port for each process"
            )
        memory = MemoryCheckpointer(hosts, job=job, lost=config.memory_lost, on_error=config.on_error)
        if not _agree(os.path.isdir(directory)):
            memory.clear()
        if jax.process_index() == 0:
            os.makedirs(directory, exist_ok=True)
        levels.insert(0, Level(memory, config.memory_every))
    if config.remote:
        remote = RemoteCheckpointer(config.remote, disk, keep_last=config.keep_last, on_error=config.on_error)
        levels.append(Level(remote, config.remote_every or config.every))
    return Levels(levels)


def _agree(mine: bool) -> bool:
    """Process 0's answer."""
    if jax.process_count() == 1:
        return mine
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(mine)))


class Levels:
    """Saves one snapshot to every level that is due; restores from the newest, and of equals the first.

    Args:
      levels: fastest first. A RemoteCheckpointer copies steps of its source, which must be a level whose interval
        divides its own.
      pool: bounds the host memory of the snapshots that the levels are still writing.
    """

    def __init__(self, levels: Sequence[Level], *, pool: HostPool | None = None):
        self.levels, self.pool = list(levels), pool
        self._beside = DeviceCopies()
        for level in self.levels:
            if level.every < 1:
                raise ValueError(f"every={level.every} of {type(level.store).__name__} must be at least 1")
            source = getattr(level.store, "source", None)
            if not hasattr(level.store, "copy"):
                continue
            under = [other.every for other in self.levels if other.store is source]
            if not under or level.every % under[0]:
                raise ValueError(
                    f"a copy every {level.every} steps needs its source among the levels, with an interval that "
                    f"divides {level.every}; its source has {under[0] if under else 'none'}"
                )

    def save(
        self, step: int, state: Any, *, metadata: Mapping[str, Any] | None = None, everywhere: bool = False
    ) -> bool:
        """Starts saving where `step` is due, or everywhere; False if there is nothing to do. All processes call it."""
        step = step_number(step)
        due = [level.store for level in self.levels if everywhere or step % level.every == 0]
        writers = [store for store in due if not hasattr(store, "copy")]
        json.dumps(dict(metadata or {}))
        if writers:
            axes = getattr(writers[-1], "axes", None)
            # Several processes start a save on disk in this thread, with all of it on the host.
            fetch = jax.process_count() > 1 and not all(isinstance(store, MemoryCheckpointer) for store in writers)
            snapshot = take_snapshot(state, beside=self._beside, axes=axes, pool=self.pool, fetch=fetch)
            try:
                for store in writers:
                    store.save_snapshot(step, snapshot.share(), metadata=metadata)
            finally:
                snapshot.release()
        for store in due:
            if hasattr(store, "copy"):
                store.copy(step)
        return bool(due)

    def claim(self) -> None:
        """Raises OSError where steps cannot be written to the disk, or another process writes them there."""
        for level in self.levels:
            if isinstance(level.store, Checkpointer):
                level.store.claim()

    @property
    def every(self) -> int:
        """The largest interval that meets all levels' own."""
        return math.gcd(*(level.every for level in self.levels))

    def latest_step(self) -> int | None:
        """The newest step of any level.

        Raises:
          OSError: no level has one, and one of them could not be asked: to start anew would lose what it has.
        """
        return self._newest()[0][0]

    def restore(self, target: Any, **options: Any) -> Any:
        """The newest step of any level; a level that is damaged or unreachable is passed over with a warning.

        Args:
          target, options: as in `Checkpointer.restore`; the levels choose the step.
        """
        known = self._newest()
        if known[0][0] is None:
            raise FileNotFoundError(f"none of {len(self.levels)} levels has a complete checkpoint")
        for step, store in known:
            try:
                return store.restore(target, **options)
            except (CorruptCheckpointError, OSError) as error:
                if store is known[-1][1]:
                    raise
                log.warning(
                    "%s has step %d, but %s; taking the next level", type(store).__name__, step, one_line(error)
                )
        raise AssertionError("unreachable")

    def _newest(self) -> list[tuple[int | None, Any]]:
        """(newest step, store) of the levels that have one, newest first, of equals in order; or [(None, None)]."""
        found: list[tuple[int, Any]] = []
        failure = None
        for level in self.levels:
            try:
                step = level.store.latest_step()
            except OSError as error:
                log.warning("%s is passed over: %s", type(level.store).__name__, one_line(error))
                failure = error
            else:
                if step is not None:
                    found.append((step, level.store))
        if failure is not None and not found:
            raise failure
        found.sort(key=lambda entry: entry[0], reverse=True)
        return [*found] or [(None, None)]

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given with a step, from the first level that has it."""
        step = self.latest_step() if step is None else step
        for level in self.levels:
            if step is not None and step in level.store.steps():
                return level.store.metadata(step)
        raise FileNotFoundError(f"no level has a checkpoint of step {step}")

    def wait(self) -> None:
        for level in self.levels:
            level.store.wait()

    def close(self) -> None:
        """Waits for every level, also if one fails."""
        with contextlib.ExitStack() as stack:
            for level in self.levels:  # the last is closed first: it copies from the ones before
                stack.callback(level.store.close)

    def __enter__(self) -> "Levels":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        with contextlib.ExitStack() as stack:
            for level in self.levels:
                end = getattr(level.store, "__exit__", None)
                stack.callback(end, kind, error, traceback) if end else stack.callback(level.store.close)
