"""Pieces read by many threads into shards: values, checksums, damage, bounds on memory."""

import threading
import zlib

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint import fill as filling
from jaxscale.checkpoint.checksum import crc32_whole
from jaxscale.mesh import make_mesh

SHAPE, CHUNK = (48, 40), (8, 10)


def store(path, values, chunk=CHUNK):
    """Values on disk in chunks, opened anew."""
    spec = {"driver": "zarr3", "kvstore": f"file://{path}/"}
    grid = {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}}
    kinds = {"dtype": ts.dtype(values.dtype), "shape": values.shape}
    ts.open(spec | {"metadata": grid}, create=True, **kinds).result().write(values).result()
    return ts.open(spec, open=True, read=True).result()


def target(values, *spec, **axes):
    where = NamedSharding(make_mesh(**axes), PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=where)


@pytest.mark.parametrize("piece_bytes", [1, 1000, 1 << 20])
def test_values_and_checksums_whatever_the_pieces(tmp_path, rng, monkeypatch, piece_bytes):
    """Rows, columns, blocks and copies; pieces below a chunk, of some chunks, of a whole array."""
    monkeypatch.setattr(filling, "PIECE_BYTES", piece_bytes)
    values = {n: rng.normal(size=SHAPE).astype(np.float32) for n in "abcd"}
    stores = {n: store(tmp_path / n, x) for n, x in values.items()}
    targets = {
        "a": target(values["a"], "fsdp", fsdp=8),
        "b": target(values["b"], None, "tp", tp=8),
        "c": target(values["c"], "dp", "tp", dp=2, tp=4),
        "d": target(values["d"], None, "tp", tp=4, dp=2),
    }
    found = {n: (x, share) for n, x, share in filling.fill(targets, stores.__getitem__)}
    assert list(found) == list(targets)
    for name, (array, share) in found.items():
        np.testing.assert_array_equal(np.asarray(array), values[name])
        assert array.sharding == targets[name].sharding
        assert crc32_whole(share, values[name].nbytes) == zlib.crc32(values[name].tobytes())


def test_a_changed_piece_changes_the_checksum(tmp_path, rng):
    """Bytes that are not those saved come with another number; the other arrays keep theirs."""
    values = {n: rng.normal(size=SHAPE).astype(np.float32) for n in "ab"}
    changed = values["b"].copy()
    changed.view(np.uint32)[tuple(rng.integers(SHAPE))] ^= 1 << int(rng.integers(32))
    stores = {"a": store(tmp_path / "a", values["a"]), "b": store(tmp_path / "b", changed)}
    targets = {n: target(x, "fsdp", "tp", fsdp=2, tp=4) for n, x in values.items()}
    right = {
        n: crc32_whole(share, x.nbytes) == zlib.crc32(values[n].tobytes())
        for n, x, share in filling.fill(targets, stores.__getitem__)
    }
    assert right == {"a": True, "b": False}


def test_a_piece_that_cannot_be_read_ends_it(tmp_path, rng):
    """Arrays before the damaged one arrive, its error comes out, and no thread stays."""
    values = {n: rng.normal(size=SHAPE).astype(np.float32) for n in "abc"}
    stores = {n: store(tmp_path / n, x) for n, x in values.items()}
    chunk = tmp_path / "b" / "c" / "3" / "2"
    chunk.write_bytes(chunk.read_bytes()[:7])
    targets = {n: target(x, "fsdp", fsdp=8) for n, x in values.items()}
    before = threading.active_count()
    arriving = filling.fill(targets, stores.__getitem__)
    assert next(arriving)[0] == "a"
    with pytest.raises(ValueError, match="c/3/2"):
        next(arriving)
    assert threading.active_count() == before


@pytest.mark.parametrize("budget", [1, 3 * 48 * 40 * 4, 1 << 30])
def test_no_more_arrays_are_opened_than_the_budget_holds(tmp_path, rng, monkeypatch, budget):
    """A budget below one array takes them one at a time."""
    monkeypatch.setattr(filling, "AHEAD_BYTES", budget)
    values = {f"w{k}": rng.normal(size=SHAPE).astype(np.float32) for k in range(6)}
    stores = {n: store(tmp_path / n, x) for n, x in values.items()}
    targets = {n: target(x, "fsdp", fsdp=8) for n, x in values.items()}
    opened, ahead = [], []

    def open_array(name):
        opened.append(name)
        return stores[name]

    for done, (name, array, _) in enumerate(filling.fill(targets, open_array)):
        ahead.append(len(opened) - done)
        np.testing.assert_array_equal(np.asarray(array), values[name])
    assert max(ahead) == {1: 1, 3 * 48 * 40 * 4: 3, 1 << 30: 6}[budget]


def test_another_dtype_is_refused_rather_than_cast(tmp_path, rng):
    values = rng.normal(size=SHAPE).astype(np.float32)
    stored = store(tmp_path / "w", values)
    wrong = target(values.astype(np.int32), "fsdp", fsdp=8)
    with pytest.raises(ValueError, match="w is stored as float32 but its target is int32"):
        list(filling.fill({"w": wrong}, lambda name: stored))


def test_scalars_and_dims_that_chunks_do_not_divide(tmp_path, rng):
    values = {"s": np.float32(rng.normal()), "odd": rng.normal(size=(7, 5)).astype(np.float32)}
    stores = {"s": store(tmp_path / "s", values["s"], ()), "odd": store(tmp_path / "odd", values["odd"], (3, 2))}
    targets = {n: target(np.asarray(x), fsdp=8) for n, x in values.items()}
    for name, array, share in filling.fill(targets, stores.__getitem__):
        np.testing.assert_array_equal(np.asarray(array), values[name])
        assert crc32_whole(share, values[name].nbytes) == zlib.crc32(values[name].tobytes())
