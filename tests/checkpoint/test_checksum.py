"""CRC-32 from shards against zlib over the whole array."""

import itertools
import zlib

import hypothesis.strategies as st
import jax
import numpy as np
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint.arrays import local_share
from jaxscale.checkpoint.checksum import crc32_share, crc32_whole


@st.composite
def cut_arrays(draw):
    shape = tuple(draw(st.lists(st.integers(1, 9), max_size=4)))
    if shape and draw(st.booleans()):
        shape = (*shape[:-1], draw(st.integers(1, 400)))  # runs on both sides of the short-run limit
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    dtype = draw(st.sampled_from(["uint8", "uint16", "float32", "int64"]))
    seed = draw(st.integers(0, 1 << 30))
    values = np.random.default_rng(seed).integers(0, 256, size=shape).astype(dtype)
    return values, cuts


@settings(max_examples=150, deadline=None)
@given(cut_arrays())
def test_shares_of_any_cut_make_the_crc_of_the_whole(case):
    values, cuts = case
    share = 0
    for part in itertools.product(*(list(itertools.pairwise(c)) for c in cuts)):
        share ^= crc32_share(values[tuple(slice(*p) for p in part)], [first for first, _ in part], values.shape)
    assert crc32_whole(share, values.nbytes) == zlib.crc32(values.tobytes())


def test_every_sharding_gives_one_number(meshes, rng):
    values = rng.normal(size=(24, 16, 8)).astype(np.float32)
    specs = [(), ("fsdp",), (None, "tp"), ("tp", None, "fsdp"), (("fsdp", "tp"),), (None, None, ("dp", "fsdp"))]
    for mesh, spec in itertools.product(meshes.values(), specs):
        sizes = [np.prod([mesh.shape[a] for a in np.atleast_1d(part)]) if part else 1 for part in spec]
        if any(size % int(n) for size, n in zip(values.shape, sizes)):
            continue
        array = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
        assert crc32_whole(local_share(array), values.nbytes) == zlib.crc32(values.tobytes())
