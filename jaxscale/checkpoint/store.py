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
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from jaxscale.checkpoint import arrays
from jaxscale.checkpoint.checksum import crc32_whole
from jaxscale.checkpoint.tree import Record, describe, is_key, named_leaves, num_bytes, tree_problem
from jaxscale.config import CheckpointConfig

log = logging.getLogger("jaxscale.checkpoint")

FORMAT = 1  # of commit.json; raised when an older reader could not understand it
COMMIT = "commit.json"
REMOVING = "removing"  # marks a step whose removal has begun
SMALL_FILE = 1 << 20  # bytes; up to this a file has a checksum of its own beside those of the arrays
BARRIER_SECONDS = 1200  # how long process 0 waits for the other processes' shares


class CorruptCheckpointError(ValueError):
    """A step whose bytes are not those that were saved; the message names the arrays."""


class Checkpointer:
    """Saves and restores the steps of one run.

        with Checkpointer("runs/a/checkpoints", CheckpointConfig(keep_last=2)) as ckpt:
            ckpt.save(100, state, metadata={"position": 25_600})
            state = ckpt.restore(abstract_state)

    Args:
      directory: a local path, or gs:// and s3:// where Orbax has access; shared by all processes.
      config: retention: `keep_last` steps, and for good those that are multiples of `keep_every`.
      on_error: what a failed save does. "continue": it is logged and training goes on; `wait` and `close` raise if no
        later save succeeded. "stop": the next `save` raises. Steps saved before are left as they are either way.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        *,
        on_error: Literal["continue", "stop"] = "continue",
    ):
        from etils import epath

        text = os.fspath(directory)
        self.directory = epath.Path(text if "://" in text else os.path.abspath(text))
        self.config = config or CheckpointConfig()
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
        self._prepare()
        stored = {name: leaf for name, leaf in leaves.items() if num_bytes(records[name])}
        copies = arrays.snapshot(
            {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in stored.items()}
        )
        path = os.fspath(self.directory / str(step))
        # Orbax agrees on the path with collectives, which must not race with those of the training step.
        started = arrays.start_save(path, copies) if jax.process_count() > 1 else None
        self._saving_step = step
        self._saving = self._worker.submit(self._write, step, path, copies, records, copied, started)
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

    def restore(self, target: Any, step: int | None = None) -> Any:
        """Reads a step straight into the shards of `target`, whatever mesh it was saved from, and checks every byte.

        Args:
          target: a pytree as saved, of ShapeDtypeStructs with a sharding (or of arrays, which are left alone).
          step: default: the newest. If that is corrupt a warning is logged and the one before it is taken.

        Raises:
          ValueError: the step holds other arrays than `target`; the message says which.
          FileNotFoundError: there is no such step.
          CorruptCheckpointError: the given step, or every step, is damaged.
        """
        self._finish()
        candidates = list(reversed(self.steps())) if step is None else [step]
        if not candidates:
            raise FileNotFoundError(f"no complete checkpoint in {self.directory}; save one, or correct the path")
        for candidate in candidates:
            try:
                restored = self._restore(target, candidate)
            except CorruptCheckpointError as error:
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
        own = {key: commit[key] for key in ("format", "step", "versions", "num_processes", "arrays")}
        return {**commit["metadata"], "jaxscale": own}

    def verify(self, step: int | None = None) -> list[str]:
        """Reads a step's arrays from disk and names those that are damaged; an empty list says that all is well."""
        self._finish()
        step = self._known(step)
        problems = self._problems(step)
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
        records: dict[str, Record],
        metadata: dict[str, Any],
        started: Any,
    ) -> None:
        """In the background thread: the arrays, their checksums, the commit, and then what is too old."""
        started = started or arrays.start_save(path, copies)
        try:
            shares = {name: arrays.local_share(copy) for name, copy in copies.items()}
        finally:
            started.result()  # nothing may be left writing when this ends
        me, processes = jax.process_index(), jax.process_count()
        if me:
            _write_json(self.directory / str(step) / f"shares.{me}.json", shares)
            _await_json(self.directory / str(step) / COMMIT)  # so that all processes list the same steps
            return
        for process in range(1, processes):
            others = self.directory / str(step) / f"shares.{process}.json"
            shares = {name: share ^ _await_json(others)[name] for name, share in shares.items()}
            others.unlink()
        for name, record in records.items():
            record["crc32"] = crc32_whole(shares.get(name, 0), num_bytes(record))
        commit = {
            "format": FORMAT,
            "step": step,
            "versions": {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "numpy")},
            "num_processes": processes,
            "arrays": records,
            "files": _list_files(self.directory / str(step)),
            "metadata": metadata,
        }
        _write_json(self.directory / str(step) / COMMIT, commit)
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
                f"step {self._saving_step} was not saved in {self.directory}: {_one_line(error)}; "
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
            raise OSError(f"checkpoint directory {self.directory} cannot be written: {_one_line(error)}") from error
        self._sweep()
        self._cleaned = True

    def _sweep(self, step: int | None = None) -> None:
        """Removes half-written steps and temporary folders, all or those of one step; foreign folders stay."""
        for path in self.directory.iterdir() if self.directory.exists() else ():
            match = re.fullmatch(r"(\d+)(\.orbax-checkpoint-tmp.*)?", path.name)
            if not match or (step is not None and int(match[1]) != step):
                continue
            if match[2] or (_is_ours(path) and self._commit(int(match[1])) is None):
                log.warning("removing the half-written checkpoint %s", path)
                _remove(path)

    def _retain(self) -> None:
        """Removes steps beyond the last `keep_last`, but neither multiples of `keep_every` nor the last verified."""
        steps = self.steps()
        verified = [step for step in steps if step in self._verified]
        every = self.config.keep_every
        for step in steps[: -self.config.keep_last]:
            if step not in verified[-1:] and not (every and step % every == 0):
                _remove(self.directory / str(step))

    # Reading

    def _restore(self, target: Any, step: int) -> Any:
        commit = self._commit(step)
        if commit is None:
            raise FileNotFoundError(f"no complete checkpoint of step {step} in {self.directory}; it has {self.steps()}")
        saved, leaves = commit["arrays"], named_leaves(target)
        problem = tree_problem(saved, {name: describe(leaf) for name, leaf in leaves.items()})
        if problem:
            raise ValueError(f"checkpoint step {step} in {self.directory} does not fit: {problem}")
        path = os.fspath(self.directory / str(step))
        on_host = {name for name, leaf in leaves.items() if arrays.rests_on_host(leaf)}
        targets = {
            name: arrays.data_target(
                tuple(saved[name]["shape"]), np.dtype(saved[name]["dtype"]), getattr(leaf, "sharding", None)
            )
            for name, leaf in leaves.items()
            if name not in on_host
        }
        full = {name: shape for name, shape in targets.items() if num_bytes(saved[name])}
        data: dict[str, Any] = {name: arrays.zeros(targets[name]) for name in targets.keys() - full.keys()}
        problems = _file_problems(self.directory / str(step), commit["files"])
        if problems:  # Orbax would find most of it too, and fail halfway with threads and coroutines left behind
            raise CorruptCheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems[:6])}")
        try:
            arrays.check_index(path)
            data |= arrays.load(path, full) if full else {}
            data |= {
                name: arrays.open_array(path, name).read().result()
                if num_bytes(saved[name])
                else np.zeros(saved[name]["shape"], saved[name]["dtype"])
                for name in on_host
            }
        except Exception as error:  # Orbax and TensorStore raise many kinds, bare Exception among them
            problems = self._problems(step) or [_one_line(error)]
            raise CorruptCheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems[:6])}") from error
        damaged = _mismatches(saved, data)
        if damaged:
            raise CorruptCheckpointError(f"checkpoint {path} is damaged: the checksum of {', '.join(damaged)} differs")
        leaves_out = {name: _as_target(data[name], leaf, saved[name]) for name, leaf in leaves.items()}
        return jax.tree.unflatten(jax.tree.structure(target), list(leaves_out.values()))

    def _problems(self, step: int) -> list[str]:
        commit = self._commit(step)
        if commit is None:
            return [f"{COMMIT} is missing or damaged"]
        path, problems = (
            os.fspath(self.directory / str(step)),
            _file_problems(self.directory / str(step), commit["files"]),
        )
        for name, record in commit["arrays"].items():
            if not num_bytes(record):
                continue
            try:
                if arrays.stored_crc32(path, name) != record["crc32"]:
                    problems.append(f"the checksum of {name} differs")
            except Exception as error:
                problems.append(f"{name} cannot be read ({_one_line(error)})")
        return problems

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
        commit = _read_json(self.directory / str(step) / COMMIT)
        if commit is not None and commit["format"] > FORMAT:
            raise ValueError(
                f"checkpoint {self.directory / str(step)} has format {commit['format']}, this jaxscale reads up to "
                f"{FORMAT}; upgrade it"
            )
        return commit

    def _known(self, step: int | None) -> int:
        known = self.steps()
        if not known or (step is not None and step not in known):
            what = "complete checkpoint" if step is None else f"complete checkpoint of step {step}"
            raise FileNotFoundError(f"no {what} in {self.directory}; it has {known or 'none'}")
        return known[-1] if step is None else step


def _mismatches(saved: Mapping[str, Record], data: Mapping[str, Any]) -> list[str]:
    """Names of arrays whose bytes in memory, over all processes, are not those that were saved."""
    names = sorted(data)
    shares = np.array([arrays.local_share(data[name]) for name in names], np.uint32)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        shares = np.bitwise_xor.reduce(np.asarray(multihost_utils.process_allgather(shares)), axis=0)
    return [
        name
        for name, share in zip(names, shares)
        if crc32_whole(int(share), num_bytes(saved[name])) != saved[name]["crc32"]
    ]


def _as_target(data: Any, leaf: Any, record: Record) -> Any:
    """The array as the kind of leaf that `leaf` is."""
    if not hasattr(leaf, "dtype"):
        return type(leaf)(data)
    if isinstance(leaf, np.ndarray | np.generic):
        return data
    if not isinstance(data, jax.Array):  # an array that each process has for itself
        data = jax.device_put(data, leaf.sharding)
    return jax.random.wrap_key_data(data, impl=record["key"]) if "key" in record else data


def _list_files(root: Any) -> dict[str, list[int | None]]:
    """Size and, of small files, CRC-32 of everything under `root`."""
    files: dict[str, list[int | None]] = {}
    folders = [(root, "")]
    while folders:
        folder, prefix = folders.pop()
        for path in folder.iterdir():
            if path.is_dir():
                folders.append((path, f"{prefix}{path.name}/"))
            else:
                size = path.stat().length
                files[prefix + path.name] = [size, zlib.crc32(path.read_bytes()) if size <= SMALL_FILE else None]
    return files


def _file_problems(root: Any, files: Mapping[str, list[int | None]]) -> list[str]:
    """What differs from `_list_files` when the step was saved."""
    found = _list_files(root)
    problems = []
    for name, (size, checksum) in files.items():
        if name not in found:
            problems.append(f"file {name} is missing")
        elif found[name][0] != size:
            problems.append(f"file {name} has {found[name][0]} bytes instead of {size}")
        elif found[name][1] != checksum:
            problems.append(f"the checksum of file {name} differs")
    return problems


def _is_ours(path: Any) -> bool:
    if (path / REMOVING).exists():
        return True
    try:
        return json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == arrays.OWNER
    except (OSError, ValueError, KeyError):
        return False


def _remove(path: Any) -> None:
    """Removes a step so that it is no step from the first moment on, and can be finished by another process."""
    (path / REMOVING).write_text("")
    (path / COMMIT).unlink(missing_ok=True)
    for child in path.iterdir():
        if child.is_dir():
            child.rmtree()
        elif child.name != REMOVING:
            child.unlink()
    path.rmtree()


def _write_json(path: Any, payload: dict[str, Any]) -> None:
    """Written beside and renamed, behind a checksum of its own: it is there whole or not at all."""
    text = json.dumps(payload)
    part = path.parent / f"{path.name}.part"
    part.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
    part.replace(path)


def _read_json(path: Any) -> dict[str, Any] | None:
    """What `_write_json` wrote; None if it is not there or damaged."""
    try:
        checksum, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.removesuffix("\n")
    return json.loads(text) if checksum == f"{zlib.crc32(text.encode()):08x}" else None


def _await_json(path: Any) -> dict[str, Any]:
    end = time.monotonic() + BARRIER_SECONDS
    while (found := _read_json(path)) is None:
        if time.monotonic() > end or not path.parent.exists():
            raise TimeoutError(f"{path} did not appear; the process that writes it failed")
        time.sleep(0.05)
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
