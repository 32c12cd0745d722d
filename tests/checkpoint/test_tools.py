"""ls, verify, diff, convert, reading without the model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxscale.checkpoint import (
    Checkpointer,
    convert_step,
    diff_steps,
    list_steps,
    open_step,
    reading,
    tools,
    verify_step,
)
from jaxscale.checkpoint import layout as lay
from jaxscale.config import CheckpointConfig

from .conftest import bits


@pytest.fixture
def run(tmp_path, rng):
    """A run with steps 1 and 2: w moved, b did not, e is new."""
    w = rng.normal(size=(40, 6)).astype(np.float32)
    moved = w.copy()
    moved[3, 2] += 0.5
    first = {"params": {"w": jnp.asarray(w), "b": jnp.ones(6)}, "key": jax.random.key(1)}
    second = {"params": {"w": jnp.asarray(moved), "b": jnp.ones(6), "e": jnp.zeros((0, 3))}, "key": jax.random.key(1)}
    with Checkpointer(tmp_path / "run", CheckpointConfig(keep_last=2)) as ckpt:
        ckpt.save(1, first, metadata={"position": 10})
        ckpt.save(2, second, metadata={"position": 20})
    return tmp_path / "run", w, moved


def test_ls(run):
    first, second = list_steps(run[0])
    assert (first.step, first.num_arrays, first.metadata) == (1, 3, {"position": 10})
    assert (second.step, second.num_arrays, second.num_bytes) == (2, 4, 40 * 6 * 4 + 6 * 4 + 8)
    assert first.saved <= second.saved
    assert list_steps(run[0].parent / "nothing") == []
    assert list_steps(run[0] / str(second.step)) == [second]


@pytest.mark.parametrize("block", [16, 1 << 20])
def test_diff(run, monkeypatch, block):
    path, w, moved = run
    monkeypatch.setattr(tools, "BLOCK_BYTES", block)
    changed, added = sorted(diff_steps(path / "1", path / "2"), key=lambda d: d.kind, reverse=True)
    assert (changed.name, changed.kind, changed.changed) == ("params/w", "values", 1 / w.size)
    assert changed.max_abs == pytest.approx(np.abs(moved - w).max())
    assert changed.relative == pytest.approx(np.linalg.norm(moved - w) / np.linalg.norm(w), rel=1e-5)
    assert (added.name, added.kind) == ("params/e", "only in the second")
    assert diff_steps(path, path / "2") == []  # a directory stands for its newest step


def test_convert_and_diff_through_a_layout(run, tmp_path):
    path, w, _ = run
    layout = (lay.transpose("w", (1, 0)), lay.rename("b", "bias"))
    names = convert_step(path / "1", tmp_path / "new", layout=layout)
    assert sorted(names) == ["key", "params/bias", "params/w"]
    assert verify_step(tmp_path / "new") == []
    assert diff_steps(path / "1", tmp_path / "new", layout=layout) == []
    assert list_steps(tmp_path / "new")[0].metadata == {"position": 10}
    np.testing.assert_array_equal(open_step(tmp_path / "new")["params/w"].whole(), w.T)
    with Checkpointer(tmp_path / "new") as ckpt:
        target = {"params": {"w": jnp.zeros((6, 40)), "bias": jnp.zeros(6)}, "key": jax.random.key(0)}
        assert bits(ckpt.restore(target)["key"]) == bits(jax.random.key(1))
    convert_step(tmp_path / "new", tmp_path / "back", layout=lay.inverse(layout))
    assert diff_steps(path / "1", tmp_path / "back") == []
    assert convert_step(path / "1", tmp_path / "params", only="params/*") == ["params/b", "params/w"]
    with pytest.raises(ValueError, match="has step 1 already"):
        convert_step(path / "1", tmp_path / "new")


def test_convert_streams(run, tmp_path, monkeypatch):
    """No array is read in one piece, whatever the layout; a key stays a key."""
    path, w, _ = run
    boxes = []
    opened = reading.open_lazily

    def recorded(step, commit):
        def watch(array):
            def read(box):
                boxes.append(int(np.prod([s.stop - s.start for s in box])) * array.dtype.itemsize)
                return array.read(box)

            return dataclasses.replace(array, read=read)

        return {name: watch(array) for name, array in opened(step, commit).items()}

    monkeypatch.setattr(reading, "open_lazily", recorded)
    monkeypatch.setattr(tools, "BLOCK_BYTES", 160)
    convert_step(path / "1", tmp_path / "new", layout=(lay.transpose("w", (1, 0)),))
    assert max(boxes) == 160 and len(boxes) >= 6
    np.testing.assert_array_equal(open_step(tmp_path / "new")["params/w"].whole(), w.T)
    with Checkpointer(tmp_path / "new") as ckpt:
        assert ckpt.metadata()["jaxscale"]["arrays"]["key"]["key"] == "threefry2x32"
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["1"]


def test_shape_and_dtype_differences(run, tmp_path):
    path, *_ = run
    convert_step(path / "1", tmp_path / "half", layout=(lay.cast("w", "bfloat16", old="float32"),), only="params/*")
    differences = {d.name: d for d in diff_steps(path / "1", tmp_path / "half")}
    assert differences["params/w"].detail == "float32[40,6] against bfloat16[40,6]"
    assert differences["key"].kind == "only in the first"
    assert "params/b" not in differences


def test_a_box_is_read_without_the_rest(run):
    path, w, _ = run
    arrays = open_step(path / "1")
    np.testing.assert_array_equal(arrays["params/w"].read((slice(5, 7), slice(1, 3))), w[5:7, 1:3])


def test_no_checkpoint_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no complete checkpoint and holds none: there is no such path"):
        verify_step(tmp_path / "nothing")
    (tmp_path / "7").mkdir()
    with pytest.raises(FileNotFoundError, match=r"7 is no complete .* commit.json is missing or damaged"):
        open_step(tmp_path / "7")
