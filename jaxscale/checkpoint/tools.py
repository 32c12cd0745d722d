"""Looking at checkpoints and rewriting them: ls, verify, diff, convert, and reading without the model.

Each function takes the path of a step, or of a directory of steps, or of a run: the newest complete step then.
"""

import contextlib
import dataclasses
import datetime
import math
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxscale.checkpoint import files, reading
from jaxscale.checkpoint.background import one_line
from jaxscale.checkpoint.layout import Layout, apply_layout
from jaxscale.checkpoint.maps import Box, Lazy
from jaxscale.checkpoint.remote_path import RemotePath
from jaxscale.checkpoint.snapshot import Snapshot
from jaxscale.checkpoint.store import Checkpointer
from jaxscale.checkpoint.tree import describe, named_leaves, num_bytes, show_record, tree_problem
from jaxscale.config import ModelConfig, from_dict

Path = str | os.PathLike[str]
ANSWER_RETRIES = 2  # of a store's first answer: three seconds
BLOCK_BYTES = 64 << 20  # held at a time of each array that is compared


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """One line of `list_steps`."""

    step: int
    saved: str  # UTC
    num_bytes: int  # of the arrays
    num_arrays: int
    num_processes: int
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Difference:
    """One array that differs between two steps; the figures are None where the arrays cannot be subtracted."""

    name: str
    kind: str  # "only in the first", "only in the second", "shape or dtype", "values"
    detail: str = ""
    changed: float | None = None  # share of the elements
    max_abs: float | None = None
    relative: float | None = None  # norm of the difference over the norm of the first


def list_steps(directory: Path) -> list[StepInfo]:
    """The complete steps of a directory or a run, in ascending order; of a step, itself."""
    steps = []
    with Checkpointer(_steps_in(directory)) as ckpt:
        for path in [ckpt.directory / str(step) for step in ckpt.steps()] or [ckpt.directory]:
            commit = reading.read_commit(path)
            if commit is not None:
                records = commit["arrays"].values()
                saved = datetime.datetime.fromtimestamp(commit["time"], datetime.UTC).isoformat(timespec="seconds")
                found = commit["step"], saved, sum(map(num_bytes, records)), len(records)
                steps.append(StepInfo(*found, commit["num_processes"], commit["metadata"]))
    return steps


def verify_step(path: Path) -> list[str]:
    """Reads every byte and names the files and arrays that are damaged; an empty list says that all is well."""
    step, commit = _find(path)
    return reading.find_problems(step, commit)


def open_step(path: Path, layout: Layout = ()) -> dict[str, Lazy]:
    """The arrays of a step by name, read when asked: `open_step(p)["params/embed"].whole()`, or a box with `.read`.

    Needs neither the model nor its mesh. What is read this way is not compared with the checksums; see `verify_step`.
    """
    step, commit = _find(path)
    return apply_layout(reading.open_lazily(step, commit), layout)


def diff_steps(first: Path, second: Path, *, layout: Layout = ()) -> list[Difference]:
    """Which arrays of the first step (under `layout`) differ from the second's, and by how much.

    Arrays whose checksums agree are not read. Others are compared in blocks of at most 64 MiB.
    """
    (_, one), (_, two) = _find(first), _find(second)
    left, right = open_step(first, layout), open_step(second)
    out = [Difference(name, "only in the first") for name in left if name not in right]
    out += [Difference(name, "only in the second") for name in right if name not in left]
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            shown = [show_record({"shape": x.shape, "dtype": x.dtype.name}) for x in (a, b)]
            out.append(Difference(name, "shape or dtype", f"{shown[0]} against {shown[1]}"))
        elif layout or one["arrays"][name]["crc32"] != two["arrays"][name]["crc32"]:
            out += _compare(name, a, b)
    return sorted(out, key=lambda difference: difference.name)


def convert_step(
    path: Path, directory: Path, *, layout: Layout = (), only: str | Sequence[str] | None = None
) -> list[str]:
    """Writes a step of `directory` with the arrays of another under `layout`; the metadata goes along.

    Args:
      only: patterns of the new names to keep, such as `params/*`.

    Arrays pass through a file beside the new step, 64 MiB at a time, so that no host ever holds them all.

    Returns:
      The names written.

    Raises:
      CorruptCheckpointError: the step that is read is damaged.
    """
    step, commit = _find(path)
    stored = reading.open_lazily(step, commit)
    as_saved = {id(array): commit["arrays"][name] for name, array in stored.items()}
    mapped = apply_layout(stored, layout)
    names = reading.choose(mapped, only)
    with Checkpointer(directory) as ckpt, _said_of(directory):
        if commit["step"] in ckpt.steps():
            raise ValueError(f"{directory} has step {commit['step']} already; choose another directory")
        reading.check_arrays(step, commit, sorted(set().union(*(mapped[name].sources for name in names))))
        records, copies = {}, {}
        pathlib.Path(ckpt.directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=ckpt.directory) as spool:
            for k, name in enumerate(names):
                extras = as_saved.get(id(mapped[name]), {})  # of an array that no operation changed
                records[name] = describe(mapped[name]) | {k: extras[k] for k in ("key", "axes") if k in extras}
                if num_bytes(records[name]):
                    copies[name] = _spool(mapped[name], os.path.join(spool, str(k)))
            ckpt.save_snapshot(commit["step"], Snapshot(records, copies, [], 0, None), metadata=commit["metadata"])
            ckpt.wait()
    return names


def export_step(path: Path, directory: Path) -> list[str]:
    """Writes the parameters of a step that `jaxscale train` saved as a Hugging Face directory; needs no devices.

    The tokenizer goes along if the step lies where the run left it, OUT/checkpoints/STEP.

    Returns:
      The names of the parameters.

    Raises:
      ValueError: the step's metadata does not say which model it is, or Hugging Face has no such model.
      CorruptCheckpointError: the step is damaged.
    """
    from jaxscale.checkpoint.huggingface import export_hf
    from jaxscale.models.decoder import param_specs

    step, commit = _find(path)
    model = commit["metadata"].get("config", {}).get("model")
    if model is None:
        raise ValueError(f"{step} does not say which model it holds, as steps of `jaxscale train` do; use export_hf")
    cfg = from_dict(ModelConfig, model)
    stored = reading.open_lazily(step, commit)
    specs = param_specs(cfg)
    wanted = {name: describe(spec) for name, spec in named_leaves({"params": specs}).items()}
    saved = {name: record for name, record in commit["arrays"].items() if name.startswith("params/")}
    if problem := tree_problem(saved, wanted):
        raise ValueError(f"checkpoint {step} does not fit its configuration: {problem}")
    reading.check_arrays(step, commit, list(wanted))
    params = jax.tree.unflatten(jax.tree.structure(specs), [stored[name] for name in wanted])
    run = step.parent.parent
    with _said_of(directory):
        export_hf(params, cfg, os.fspath(directory), tokenizer=run if (run / "tokenizer.json").exists() else None)
    return list(wanted)


@contextlib.contextmanager
def _said_of(directory: Path) -> Iterator[None]:
    """An error of the file system, such as a full disk, says which directory was written."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{os.fspath(directory)} could not be written: {one_line(error)}") from error


def _spool(array: Lazy, path: str) -> np.ndarray:
    """The array in a file, mapped into memory; the disk gives its blocks first, so that a full one is an error here."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, math.prod(array.shape) * array.dtype.itemsize)
    raw = np.memmap(path, np.uint8, "r+")
    out = raw.view(array.dtype).reshape(array.shape)
    for box in _blocks(array):
        out[box] = array.read(box)
    return out


def _find(path: Path) -> tuple[Any, dict[str, Any]]:
    """The folder and commit of a step, or of the newest step of a directory."""
    with Checkpointer(_steps_in(path)) as ckpt:
        folder = ckpt.directory
        commit = reading.read_commit(folder)
        if commit is None:
            newest = ckpt.latest_step()
            if newest is None:
                why = f"its {files.COMMIT} is missing or damaged" if folder.exists() else "there is no such path"
                raise FileNotFoundError(f"{folder} is no complete checkpoint and holds none: {why}")
            folder = folder / str(newest)
            commit = reading.read_commit(folder)
    assert commit is not None
    return folder, commit


def _steps_in(path: Path) -> Path:
    """Where the steps are: of the directory of a run, its checkpoints/.

    Raises:
      OSError: nobody answers there; of an object store this is said in seconds, not after a run's minute of retries.
    """
    if "://" in os.fspath(path):
        (RemotePath.open(os.fspath(path), ANSWER_RETRIES) / files.COMMIT).exists()
        return path
    inside = os.path.join(path, "checkpoints")
    return inside if os.path.isdir(inside) else path


def _compare(name: str, a: Lazy, b: Lazy) -> list[Difference]:
    changed, largest, square, norm, size = 0, 0.0, 0.0, 0.0, int(np.prod(a.shape))
    for box in _blocks(a):
        x, y = a.read(box), b.read(box)
        changed += int((x.reshape(-1, 1).view(np.uint8) != y.reshape(-1, 1).view(np.uint8)).any(axis=1).sum())
        x64, y64 = x.astype(np.float64), y.astype(np.float64)
        largest = max(largest, float(np.abs(x64 - y64).max(initial=0.0)))
        square += float(np.square(x64 - y64).sum())
        norm += float(np.square(x64).sum())
    if not changed:
        return []
    relative = (square / norm) ** 0.5 if norm else float("inf")
    return [Difference(name, "values", changed=changed / size, max_abs=largest, relative=relative)]


def _blocks(array: Lazy) -> Iterator[Box]:
    if not array.shape:
        yield ()
        return
    row = max(1, int(np.prod(array.shape[1:])) * array.dtype.itemsize)
    rows = max(1, BLOCK_BYTES // row)
    for start in range(0, array.shape[0], rows):
        rest = (slice(0, size) for size in array.shape[1:])
        yield (slice(start, min(start + rows, array.shape[0])), *rest)
