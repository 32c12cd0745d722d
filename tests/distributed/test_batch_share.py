"""Which rows a process loads, and that a batch arrives on the mesh as it was, whatever part of it each process has."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxscale import make_mesh, put_batch
from jaxscale.train import _equal_parts, batch_share


def test_one_process_has_the_whole_batch():
    for sizes in ({"fsdp": 8}, {"dp": 2, "cp": 2, "tp": 2}, {"tp": 8}):
        assert batch_share(make_mesh(**sizes), 16) == (0, 1)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([range(8), range(8, 16)], [(0, 2), (1, 2)]),  # rows apart
        ([range(16), range(16)], [(0, 1), (0, 1)]),  # tp or cp across processes
        ([range(8), range(8), range(8, 16), range(8, 16)], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([range(8, 16), range(8)], [(1, 2), (0, 2)]),  # devices in another order than processes
        ([[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]], [(0, 1), (0, 1)]),  # not side by side
        ([range(8), range(4, 12), range(8, 16)], [(0, 1)] * 3),  # overlapping
        ([range(12), range(12, 16)], [(0, 1)] * 2),  # unequal
    ],
)
def test_equal_parts(rows, want):
    got = _equal_parts({process: set(held) for process, held in enumerate(rows)}, 16)
    assert got == dict(enumerate(want))
    for process, (index, count) in got.items():  # whatever the share, it holds what the process needs
        assert set(rows[process]) <= set(range(index * 16 // count, (index + 1) * 16 // count))


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"dp": 2, "cp": 2, "tp": 2}, {"tp": 8}])
def test_put_batch(sizes, rng):
    mesh = make_mesh(**sizes)
    tokens, frames = rng.integers(0, 99, (8, 6), dtype=np.int32), rng.standard_normal((8, 4, 3)).astype(np.float32)
    out = put_batch({"tokens": tokens, "more": [frames, tokens[:, 0]]}, mesh)
    np.testing.assert_array_equal(out["tokens"], tokens)
    np.testing.assert_array_equal(out["more"][0], frames)
    np.testing.assert_array_equal(out["more"][1], tokens[:, 0])
    batch_axes = tuple(a for a in ("dp", "fsdp") if mesh.shape[a] > 1)
    rows = batch_axes[0] if batch_axes else None
    assert out["tokens"].sharding.spec == P(rows, "cp" if mesh.shape["cp"] > 1 else None)


def test_batch_that_does_not_divide_is_kept_whole(rng):
    tokens = rng.integers(0, 99, (3, 6), dtype=np.int32)
    out = put_batch({"tokens": tokens}, make_mesh(fsdp=8))["tokens"]
    assert out.sharding.is_fully_replicated
    np.testing.assert_array_equal(out, tokens)


def test_a_share_that_is_not_this_process_s():
    rows = np.zeros((4, 6), np.int32)
    with pytest.raises(ValueError, match=r"holds rows 4 to 5 of 8 but was given 0 to 4; .* batch_share\(mesh, 8\)"):
        put_batch({"tokens": rows}, make_mesh(fsdp=8), share=(0, 2))
    assert jax.process_count() == 1
