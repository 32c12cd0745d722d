"""A flipped bit, a truncated or missing file, a damaged commit: detected, named, and the step before is loaded."""

import logging
import shutil
import zlib

import jax
import numpy as np
import pytest

from jaxscale.checkpoint import Checkpointer, CorruptCheckpointError, files, list_steps, verify_step
from jaxscale.checkpoint import layout as lay
from jaxscale.mesh import make_mesh

from .conftest import abstract, bits


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, module_rng):
    """A directory with the complete steps 1 and 2, and their states."""
    directory = tmp_path_factory.mktemp("pristine")
    mesh = make_mesh(fsdp=8)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))

    def state():
        values = {n: module_rng.normal(size=(256, 1024)).astype(np.float32) for n in ("w", "b", "c")}
        return jax.device_put(values, where)

    states = {1: state(), 2: state()}
    with Checkpointer(directory) as ckpt:
        for step, value in states.items():
            ckpt.save(step, value)
    return directory, states


def flip_bit(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)


def truncate(path, rng):
    path.write_bytes(path.read_bytes()[: rng.integers(path.stat().st_size)])


def remove(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, truncate, remove])
def test_damage_is_found_named_and_survived(pristine, tmp_path, rng, caplog, damage):
    """Damage in any file either leaves every restored bit as it was, or is reported; nothing wrong is ever loaded."""
    directory, states = pristine
    target = abstract(states[1])
    found = 0
    for trial in range(12):
        copy = tmp_path / str(trial)
        shutil.copytree(directory, copy)
        files = [p for p in (copy / "2").rglob("*") if p.is_file() and p.stat().st_size]
        weights = np.array([p.stat().st_size for p in files], float) + 50
        file = files[rng.choice(len(files), p=weights / weights.sum())]
        damage(file, rng)
        with Checkpointer(copy) as ckpt, caplog.at_level(logging.WARNING, "jaxscale.checkpoint"):
            problems = ckpt.verify(2) if 2 in ckpt.steps() else ["no step"]
            restored = ckpt.restore(target)
            if bits(restored) == bits(states[2]):
                continue  # the file plays no part in reading
            found += 1
            assert bits(restored) == bits(states[1]), file
            assert problems, file
            if 2 in ckpt.steps():
                assert "falling back" in caplog.text
                assert any(
                    file.name in problem or f"the checksum of {n} differs" in problem
                    for problem in problems
                    for n in "wbc"
                )
                with pytest.raises(CorruptCheckpointError, match="damaged"):
                    ckpt.restore(target, 2)
                assert ckpt.latest_step(verified=True) == 1
            caplog.clear()
    assert found >= 3


def test_every_flipped_bit_of_the_values_is_found(pristine, tmp_path, rng):
    """Orbax alone loads these in silence."""
    directory, states = pristine
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    target = abstract(states[2])
    needle = np.asarray(states[2]["w"])[:32].tobytes()  # the first shard, as it lies uncompressed in a data file
    (file,) = [p for p in (copy / "2").rglob("*") if p.is_file() and needle in p.read_bytes()]
    clean = file.read_bytes()
    with Checkpointer(copy) as ckpt:
        for _ in range(20):
            data = bytearray(clean)
            data[clean.index(needle) + rng.integers(len(needle))] ^= 1 << rng.integers(8)
            file.write_bytes(data)
            with pytest.raises(CorruptCheckpointError, match="the checksum of w differs"):
                ckpt.restore(target, 2)
        ckpt.restore(target, 2, only="b")  # whose bytes are as they were: of the step it says nothing
        assert ckpt.latest_step(verified=True) == 1
        assert ckpt.verify(2) == ["the checksum of w differs"]
        file.write_bytes(clean)
        assert ckpt.verify(2) == []
        assert bits(ckpt.restore(target)) == bits(states[2])


def test_when_every_step_is_damaged_it_says_so(pristine, tmp_path):
    directory, states = pristine
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    for step in "12":
        shutil.rmtree(copy / step / "state" / "ocdbt.process_0")
    with Checkpointer(copy) as ckpt:
        with pytest.raises(CorruptCheckpointError, match=r"1 is damaged: file state/ocdbt.process_0/.* is missing"):
            ckpt.restore(abstract(states[1]))
        assert ckpt.latest_step() == 2
        assert ckpt.latest_step(verified=True) is None


def test_a_foreign_commit_is_refused(pristine, tmp_path):
    """One with a right checksum that no save wrote: one line, from whoever reads it; nothing is removed."""
    directory, states = pristine
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    path = copy / "2" / "commit.json"
    commit = files.read_json(path)
    assert commit is not None
    record = commit["arrays"]["w"]
    hostile = [[1], "x", {}, commit | {"format": "1"}, commit | {"arrays": [1]}, commit | {"files": {"state/x": 3}}]
    hostile += [commit | {"arrays": {"w": x}} for x in ({}, record | {"shape": [-8]}, record | {"dtype": "float77"})]
    for payload in hostile:
        files.write_json(path, payload)
        for read in (list_steps, verify_step, lambda x: Checkpointer(x.parent).restore(abstract(states[2]))):
            with pytest.raises(ValueError, match=r"commit\.json is not what a save writes") as caught:
                read(copy if read is list_steps else copy / "2")
            assert "\n" not in str(caught.value)
    text = "[" * 100_000  # deeper than a reader goes: as good as damaged
    path.write_text(f"{zlib.crc32(text.encode()):08x}\n{text}\n")
    with Checkpointer(copy) as ckpt:
        assert ckpt.steps() == [1]
        assert bits(ckpt.restore(abstract(states[1]))) == bits(states[1])


def test_damage_behind_a_layout_is_found(pristine, tmp_path, rng):
    """Boxes of arrays do not show a checksum of the whole; the arrays behind them are checked all the same."""
    directory, states = pristine
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    shape = jax.ShapeDtypeStruct((1024, 256), np.float32, sharding=states[2]["w"].sharding)
    target = {"w": shape, "b": shape, "c": shape}
    layout = [lay.transpose(name, (1, 0)) for name in "wbc"]
    needle = np.asarray(states[2]["b"])[:32].tobytes()
    (file,) = [p for p in (copy / "2").rglob("*") if p.is_file() and needle in p.read_bytes()]
    data = bytearray(file.read_bytes())
    data[data.index(needle) + rng.integers(len(needle))] ^= 1 << rng.integers(8)
    file.write_bytes(data)
    with Checkpointer(copy) as ckpt:
        with pytest.raises(CorruptCheckpointError, match="damaged: b is not as it was saved"):
            ckpt.restore(target, 2, layout=layout)
        restored = ckpt.restore(target, layout=layout)
        assert bits(restored["b"]) == bits(np.asarray(states[1]["b"]).T.copy())
