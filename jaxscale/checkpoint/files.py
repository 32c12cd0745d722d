"""The files of a step: written whole or not at all, listed with checksums, removed so that no half is ever a step."""

import json
import time
import zlib
from collections.abc import Mapping
from typing import Any

from jaxscale.checkpoint import arrays, peers

COMMIT = "commit.json"
REMOVING = "removing"  # marks a step whose removal has begun
SMALL_FILE = 1 << 20  # bytes; up to this a file has a checksum of its own beside those of the arrays
BARRIER_SECONDS = 600  # how long a process waits for the files of another that reports no failure


def list_files(root: Any) -> dict[str, list[int | None]]:
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


def file_problems(root: Any, files: Mapping[str, list[int | None]]) -> list[str]:
    """What differs from `list_files` when the step was saved; of an object store, which files are not there."""
    if hasattr(root, "walk_keys"):
        found_keys = set(root.walk_keys())
        return [f"file {name} is missing" for name in files if name not in found_keys]
    found = list_files(root)
    problems = []
    for name, (size, checksum) in files.items():
        if name not in found:
            problems.append(f"file {name} is missing")
        elif found[name][0] != size:
            problems.append(f"file {name} has {found[name][0]} bytes instead of {size}")
        elif found[name][1] != checksum:
            problems.append(f"the checksum of file {name} differs")
    return problems


def is_ours(path: Any) -> bool:
    if (path / REMOVING).exists():
        return True
    try:
        return json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"] == arrays.OWNER
    except (OSError, ValueError, KeyError):
        return False


def remove(path: Any) -> None:
    """Removes a step so that it is no step from the first moment on, and can be finished by another process."""
    (path / REMOVING).write_text("")
    (path / COMMIT).unlink(missing_ok=True)
    for child in path.iterdir():
        if child.is_dir():
            child.rmtree()
        elif child.name != REMOVING:
            child.unlink()
    path.rmtree()


def write_json(path: Any, payload: dict[str, Any]) -> None:
    """Written beside and renamed, behind a checksum of its own: it is there whole or not at all."""
    text = json.dumps(payload)
    part = path.parent / f"{path.name}.part"
    part.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
    part.replace(path)


def read_json(path: Any) -> dict[str, Any] | None:
    """What `write_json` wrote; None if it is not there or damaged."""
    try:
        checksum, _, text = path.read_text().partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    text = text.removesuffix("\n")
    if checksum != f"{zlib.crc32(text.encode()):08x}":
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def await_json(path: Any, failure_key: str) -> dict[str, Any]:
    """What another process writes; raises OSError as soon as one reports a failure under `failure_key`."""
    end = time.monotonic() + BARRIER_SECONDS
    while (found := read_json(path)) is None:
        if (failure := peers.reported_failure(failure_key)) is not None:
            raise OSError(failure)
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not appear in {BARRIER_SECONDS} s; the process that writes it is gone")
        time.sleep(0.05)
    return found
