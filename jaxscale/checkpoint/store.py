"""Checkpointer: asynchronous, atomic saves of any pytree; restores into the shards of any mesh; checksums of its own.

A step is a folder of `directory` named by its number:

    100/state/          the arrays, uncompressed, in Orbax's format (OCDBT, zarr3), under their paths in the tree
    100/commit.json     written last: shape, dtype and CRC-32 of every array, the files with their sizes (small ones
                        with a CRC-32 too), and the caller's metadata

A folder without a valid commit.json is no step: it is never listed, and the next writer removes it.
"""

import concurrent.futures
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from jaxscale.checkpoint import arrays, files, reading
from jaxscale.checkpoint.checksum import crc32_whole
from jaxscale.checkpoint.layout import Layout, param_roots
from jaxscale.checkpoint.tree import Record, describe, is_key, named_leaves, num_bytes
from jaxscale.config import CheckpointConfig

log = logging.getLogger("jaxscale.checkpoint")


class Checkpointer:
    """Saves and restores the steps of one run.

        with Checkpointer("runs/a/checkpoints", CheckpointConfig(keep_last=2)) as ckpt:
            ckpt.save(100, state, metadata={"position": 25_600})
            state = ckpt.restore(abstract_state)

    Args:
      directory: a local path, or gs:// and s3:// where Orbax has access; shared by all processes.
      config: retention: `keep_last` steps, and for good those that are multiples of `keep_every`.
      axes: logical axes of each parameter by path, such as {"mlp/w_up": ("embed", "mlp")};
        they are written down with the parameters and with what has the parameters' tree, such as Adam moments.
      on_error: what a failed save does. "continue": it is logged and training goes on; `wait` and `close` raise if no
        later save succeeded. "stop": the next `save` raises. Steps saved before are left as they are either way.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        axes: Mapping[str, Sequence[str | None]] | None = None,
        on_error: Literal["continue", "stop"] = "continue",
    ):
        from etils import epath

        text = os.fspath(directory)
        self.directory = epath.Path(text if "://" in text else os.path.abspath(text))
        self.config = config or CheckpointConfig()
        self.axes = axes or {}
        self.on_error = on_error
        self._worker = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: concurrent.futures.Future[None] | None = None
        self._saving_step = -1
        self._failure: OSError | None = None
        self._verified: set[int] = set()
        self._cleaned = False

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
        """
        self._finish()
        if self.on_error == "stop":
            self._raise_failure()
        if step in self.steps():
            return False
        copied = json.loads(json.dumps(dict(metadata or {})))  # a TypeError now rather than later
        leaves = named_leaves(state)
        if not leaves:
            raise ValueError("there is nothing to save: the state has no arrays")
        records = {name: describe(leaf) for name, leaf in leaves.items()}
        for name, record in records.items():
            if record["dtype"] in ("uint4", "uint2"):
                raise NotImplementedError(f"{name}: {record['dtype']} cannot be saved; bitcast it to int4 or uint8")
        for root in param_roots(records) if self.axes else ():
            for path in self.axes.keys() & {name.removeprefix(root) for name in records if name.startswith(root)}:
                if len(self.axes[path]) == len(records[root + path]["shape"]):  # factored moments have fewer dims
                    records[root + path]["axes"] = list(self.axes[path])
        self._prepare()
        stored = {name: leaf for name, leaf in leaves.items() if num_bytes(records[name])}
        copies, held = arrays.snapshot(
            {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in stored.items()}
        )
        path = os.fspath(self.directory / str(step))
        # Orbax agrees on the path with collectives, which must not race with those of the training step.
        started = arrays.start_save(path, copies) if jax.process_count() > 1 else None
        self._saving_step = step
        self._saving = self._worker.submit(self._write, step, path, copies, held, records, copied, started)
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
        self._finish()
        newest = self._known(step)
        candidates = [s for s in reversed(self.steps()) if s <= newest] if step is None else [step]
        for candidate in candidates:
            try:
                folder = self.directory / str(candidate)
                restored = reading.restore_step(folder, target, layout=layout, only=only, missing=missing)
            except reading.CorruptCheckpointError as error:
                if candidate == candidates[-1]:
                    raise
                log.warning("%s; falling back to the step before", error)
            else:
                self._verified.add(candidate)
                return restored
        raise AssertionError("unreachable")

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What `save` was given, and under "jaxscale": the step, the versions and the arrays' shapes and checksums."""
        self._finish()
        step = self._known(step)
        commit = self._commit(step)
        assert commit is not None
        own = {key: commit[key] for key in ("format", "step", "time", "versions", "num_processes", "arrays")}
        return {**commit["metadata"], "jaxscale": own}

    def verify(self, step: int | None = None) -> list[str]:
        """Reads a step's arrays from disk and names those that are damaged; an empty list says that all is well."""
        self._finish()
        step = self._known(step)
        commit = self._commit(step)
        assert commit is not None
        problems = reading.find_problems(self.directory / str(step), commit)
        if not problems:
            self._verified.add(step)
        return problems

    def wait(self) -> None:
        """Waits for the save under way; raises OSError if the newest save failed."""
        self._finish()
        self._raise_failure()

    def close(self) -> None:
        """`wait`, and the end of the background thread."""
        self._worker.shutdown(wait=True)
        self.wait()

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

    def _write(
        self,
        step: int,
        path: str,
        copies: dict[str, Any],
        held: list[Any],
        records: dict[str, Record],
        metadata: dict[str, Any],
        started: Any,
    ) -> None:
        """In the background thread: the arrays, their checksums, the commit, and then what is too old."""
        with arrays.ONE_OPERATION:
            started = started or arrays.start_save(path, copies)
            try:
                shares = {name: arrays.local_share(copy) for name, copy in copies.items()}
            finally:
                started.result()  # nothing may be left writing when this ends
        held.clear()
        me, processes = jax.process_index(), jax.process_count()
        if me:
            files.write_json(self.directory / str(step) / f"shares.{me}.json", shares)
            files.await_json(self.directory / str(step) / files.COMMIT)  # so that all processes list the same steps
            return
        for process in range(1, processes):
            others = self.directory / str(step) / f"shares.{process}.json"
            shares = {name: share ^ files.await_json(others)[name] for name, share in shares.items()}
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
        files.write_json(self.directory / str(step) / files.COMMIT, commit)
        self._retain()

    def _finish(self) -> None:
        """Waits for the save under way and keeps its failure."""
        future, self._saving = self._saving, None
        if future is None:
            return
        try:
            future.result()
            self._failure = None
        except Exception as error:
            if jax.process_index() == 0:
                self._sweep(self._saving_step)
            newest = self.latest_step()
            self._failure = OSError(
                f"step {self._saving_step} was not saved in {self.directory}: {reading.one_line(error)}; "
                f"the newest complete step is {'none' if newest is None else newest}"
            )
            self._failure.__cause__ = error
            log.error("%s", self._failure)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _prepare(self) -> None:
        """Before the first save: the directory, without what a killed writer left in it."""
        if self._cleaned or jax.process_index():
            return
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe = self.directory / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"checkpoint directory {self.directory} cannot be written: {reading.one_line(error)}"
            ) from error
        self._sweep()
        self._cleaned = True

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
        return sorted(int(path.name) for path in self.directory.iterdir() if re.fullmatch(r"\d+", path.name))

    def _commit(self, step: int) -> dict[str, Any] | None:
        return reading.read_commit(self.directory / str(step))

    def _known(self, step: int | None) -> int:
        known = self.steps()
        if not known or (step is not None and step not in known):
            what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise FileNotFoundError(f"no {what} in {self.directory}; it has {known or 'none'}")
        return known[-1] if step is None else step
