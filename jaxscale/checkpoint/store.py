"""Checkpointer: asynchronous, atomic saves of any pytree; restores into the shards of any mesh; checksums of its own.

A step is a folder of `directory` named by its number:

    100/state/          the arrays, uncompressed, in Orbax's format (OCDBT, zarr3), under their paths in the tree
    100/commit.json     written last: shape, dtype and CRC-32 of every array, the files with their sizes (small ones
                        with a CRC-32 too), and the caller's metadata

A folder without a valid commit.json is no step: it is never listed, and the next writer removes it.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from jaxscale.checkpoint import arrays, files, peers, reading
from jaxscale.checkpoint.background import Background, OnError, one_line
from jaxscale.checkpoint.beside import DeviceCopies
from jaxscale.checkpoint.checksum import crc32_whole
from jaxscale.checkpoint.layout import Layout
from jaxscale.checkpoint.lock import WriterLock
from jaxscale.checkpoint.remote_path import RemotePath
from jaxscale.checkpoint.snapshot import HostPool, Snapshot, take_snapshot
from jaxscale.checkpoint.tree import num_bytes, step_number
from jaxscale.config import CheckpointConfig

log = logging.getLogger("jaxscale.checkpoint")


class Checkpointer:
    """Saves and restores the steps of one run.

        with Checkpointer("runs/a/checkpoints", CheckpointConfig(keep_last=2)) as ckpt:
            ckpt.save(100, state, metadata={"position": 25_600})
            state = ckpt.restore(abstract_state)

    Args:
      directory: shared by all processes. gs:// and s3:// are for reading: `RemoteCheckpointer` brings steps there.
      config: retention: `keep_last` steps, and for good those that are multiples of `keep_every`.
      axes: logical axes of each parameter by path, such as {"mlp/w_up": ("embed", "mlp")};
        they are written down with the parameters and with what has the parameters' tree, such as Adam moments.
      on_error: what a failed save does. "continue": it is logged and training goes on; `wait` and `close` raise if no
        later save succeeded. "stop": the next `save` raises. Steps saved before are left as they are either way.
      pool: bounds the host memory of the snapshots, of several levels together.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        axes: Mapping[str, Sequence[str | None]] | None = None,
        on_error: OnError = "continue",
        pool: HostPool | None = None,
    ):
        from etils import epath

        text = os.fspath(directory)
        self.directory: Any = RemotePath.open(text) if "://" in text else epath.Path(os.path.abspath(text))
        self.config = config or CheckpointConfig()
        self.axes = axes or {}
        self.pool = pool
        self._background = Background(self._explain, on_error)
        self._beside = DeviceCopies()
        self._verified: set[int] = set()
        self._lock: WriterLock | None = None  # process 0's, from the first save on
        self._count = 0  # of saves

    def save(self, step: int, state: Any, *, metadata: Mapping[str, Any] | None = None) -> bool:
        """Starts saving `state` and returns; the caller may donate it at once. All processes call it.

        Waits first for the save before it, so that at most one copy of the state is held in host memory.

        Args:
          state: any pytree of jax arrays, PRNG keys, numpy arrays and Python numbers.
          metadata: JSON to keep beside it: the run's config, the position in the data, the mesh.

        Returns:
          False when this step is complete already; nothing is written then.

        Raises:
          OSError: the directory cannot be written, or (on_error="stop") the save before this one failed.
          ValueError: `step` is no whole number from 0 on, or the state holds what no checkpoint can.
        """
        step = step_number(step)
        self._background.ready()
        if self._commit(step) is not None:
            return False
        json.dumps(dict(metadata or {}))  # a TypeError now rather than later
        # Several processes start the save in this thread, all of it on the host; one fetches in the background.
        fetch = jax.process_count() > 1
        snapshot = take_snapshot(state, beside=self._beside, axes=self.axes, pool=self.pool, fetch=fetch)
        return self.save_snapshot(step, snapshot, metadata=metadata)

    def save_snapshot(self, step: int, snapshot: Snapshot, *, metadata: Mapping[str, Any] | None = None) -> bool:
        """`save` of a snapshot that was taken already, which is released when it is written."""
        self._background.ready()
        if self._commit(step) is not None:
            snapshot.release()
            return False
        copied = json.loads(json.dumps(dict(metadata or {})))
        try:
            self.claim()
            path = os.fspath(self.directory / str(step))
            # Orbax agrees on the path with collectives, which must not race with those of the training step.
            started = arrays.start_save(path, snapshot.copies) if jax.process_count() > 1 else None
        except BaseException:
            snapshot.release()
            raise
        self._background.start(step, self._write, step, path, snapshot, copied, started)
        return True

    def steps(self) -> list[int]:
        """Complete steps in ascending order."""
        return [step for step in self._numbered() if self._commit(step) is not None]

    def latest_step(self, *, verified: bool = False) -> int | None:
        """The newest complete step; with `verified`, the newest whose bytes were read back and are those saved."""
        for step in reversed(self.steps()):
            if not verified or step in self._verified or not self._warn_problems(step):
                return step
        return None

    def restore(
        self,
        target: Any,
        step: int | None = None,
        *,
        layout: Layout = (),
        only: str | Sequence[str] | None = None,
        missing: Literal["refuse", "keep"] = "refuse",
    ) -> Any:
        """Reads a step straight into the shards of `target`, whatever mesh it was saved from, and checks every byte.

        Args:
          target: a pytree of ShapeDtypeStructs with a sharding, or of arrays, which are left alone.
          step: default: the newest. If that is corrupt a warning is logged and the one before it is taken.
          layout: from the stored tree to the target's (`jaxscale.checkpoint.layout`).
          only: patterns (`params/*`) of the leaves to read; the others are returned as they stand in `target`.
          missing: what becomes of leaves that the checkpoint does not have: "refuse", or "keep" the target's own array.

        Raises:
          ValueError: the step holds other arrays than `target`; the message says which.
          FileNotFoundError: there is no such step.
          CorruptCheckpointError: the given step, or every step, is damaged.
        """
        self._background.finish()
        newest = self._known(step)
        candidates = [s for s in self.steps() if s <= newest] if step is None else [step]
        options: dict[str, Any] = {"layout": layout, "only": only, "missing": missing}
        found, restored = reading.restore_newest(self.directory, candidates, target, **options)
        if only is None:  # what was read in part may be damaged elsewhere
            self._verified.add(found)
        return restored

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given, and under "jaxscale": the step, the versions and the arrays' shapes and checksums."""
        self._background.finish()
        step = self._known(step)
        commit = self._commit(step)
        assert commit is not None
        own = {key: commit[key] for key in ("format", "step", "time", "versions", "num_processes", "arrays")}
        return {**commit["metadata"], "jaxscale": own}

    def verify(self, step: int | None = None) -> list[str]:
        """Reads a step's arrays from disk and names those that are damaged; an empty list says that all is well."""
        self._background.finish()
        step = self._known(step)
        commit = self._commit(step)
        assert commit is not None
        problems = reading.find_problems(self.directory / str(step), commit)
        if not problems:
            self._verified.add(step)
        return problems

    def wait(self) -> None:
        """Waits for the save under way; raises OSError if the newest save failed."""
        self._background.finish()
        self._background.raise_failure()

    def close(self) -> None:
        """`wait`, and the end of the background thread."""
        try:
            self._background.close()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error that is on its way matters more

    # Saving

    def _write(self, step: int, path: str, snapshot: Snapshot, metadata: dict[str, Any], started: Any) -> None:
        """In the background thread: the arrays, their checksums, the commit, and then what is too old."""
        self._count += 1
        failure_key = f"jaxscale/checkpoint/{path}/{self._count}"  # the same in all processes
        try:
            self._write_and_commit(step, path, snapshot, metadata, started, failure_key)
        except Exception as error:
            peers.report_failure(failure_key, f"process {jax.process_index()}: {one_line(error)}")
            raise
        finally:
            snapshot.release()

    def _write_and_commit(
        self, step: int, path: str, snapshot: Snapshot, metadata: dict[str, Any], started: Any, failure_key: str
    ) -> None:
        records = snapshot.records
        snapshot.fetch()
        with arrays.ONE_OPERATION:
            started = started or arrays.start_save(path, snapshot.copies)
            try:
                shares = {name: arrays.local_share(copy) for name, copy in snapshot.copies.items()}
            finally:
                started.result()  # nothing may be left writing when this ends
        me, processes = jax.process_index(), jax.process_count()
        if me:
            files.write_json(self.directory / str(step) / f"shares.{me}.json", shares)
            # So that all processes list the same steps.
            files.await_json(self.directory / str(step) / files.COMMIT, failure_key)
            return
        for process in range(1, processes):
            others = self.directory / str(step) / f"shares.{process}.json"
            found = files.await_json(others, failure_key)
            shares = {name: share ^ found[name] for name, share in shares.items()}
            others.unlink()
        for name, record in records.items():
            record["crc32"] = crc32_whole(shares.get(name, 0), num_bytes(record))
        commit = {
            "format": reading.FORMAT,
            "step": step,
            "time": time.time(),
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
            "num_processes": processes,
            "arrays": records,
            "files": files.list_files(self.directory / str(step)),
            "metadata": metadata,
        }
        assert self._lock is not None
        self._lock.check()
        files.write_json(self.directory / str(step) / files.COMMIT, commit)
        self._retain()

    def _explain(self, step: int, error: BaseException) -> OSError:
        with contextlib.suppress(OSError):  # of a directory that another writer took over nothing is removed
            if self._lock is not None:
                self._lock.check()
                self._sweep(step)
        newest = self.latest_step()
        return OSError(
            f"step {step} was not saved in {self.directory}: {one_line(error)}; "
            f"the newest complete step is {'none' if newest is None else newest}"
        )

    def claim(self) -> None:
        """Makes the directory, without what a killed writer left in it, this process's to write until `close`; a save
        does so too, but a run wants to know before its first.

        Raises:
          OSError: it cannot be written, or another process writes to it.
        """
        if isinstance(self.directory, RemotePath):
            raise NotImplementedError(
                f"steps are not written to {self.directory} directly; save them to a directory that all processes "
                "share and let RemoteCheckpointer copy them"
            )
        if self._lock or jax.process_index():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OSError(f"checkpoint directory {self.directory} cannot be written: {one_line(error)}") from error
        self._lock = WriterLock(self.directory)
        self._sweep()

    def _sweep(self, step: int | None = None) -> None:
        """Removes half-written steps and temporary folders, all or those of one step; foreign folders stay."""
        for path in self.directory.iterdir() if self.directory.exists() else ():
            match = re.fullmatch(r"(\d+)(\.orbax-checkpoint-tmp.*)?", path.name)
            if not match or (step is not None and int(match[1]) != step):
                continue
            if match[2] or (files.is_ours(path) and self._commit(int(match[1])) is None):
                log.warning("removing the half-written checkpoint %s", path)
                files.remove(path)

    def _retain(self) -> None:
        """Removes steps beyond the last `keep_last`, but neither multiples of `keep_every` nor the last verified."""
        steps = self.steps()
        verified = [step for step in steps if step in self._verified]
        every = self.config.keep_every
        for step in steps[: -self.config.keep_last]:
            if step not in verified[-1:] and not (every and step % every == 0):
                files.remove(self.directory / str(step))

    # Reading

    def _warn_problems(self, step: int) -> list[str]:
        problems = self.verify(step)
        if problems:
            log.warning("checkpoint step %d is damaged: %s", step, "; ".join(problems[:6]))
        return problems

    def _numbered(self) -> list[int]:
        if not self.directory.exists():
            return []
        if not self.directory.is_dir():
            raise NotADirectoryError(f"{self.directory} is a file; give the directory of a run's steps, or a step")
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"\d+", path.name))

    def _commit(self, step: int) -> dict[str, Any] | None:
        return reading.read_commit(self.directory / str(step))

    def _known(self, step: int | None) -> int:
        known = self.steps()
        if not known or (step is not None and step not in known):
            what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise FileNotFoundError(f"no {what} in {self.directory}; it has {known or 'none'}")
        return known[-1] if step is None else step
