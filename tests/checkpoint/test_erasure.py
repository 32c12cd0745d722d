"""Reed-Solomon parity: any k of n hosts come back bit for bit."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint.erasure import decode, encode, make_parity, recover
from jaxscale.mesh import make_mesh


@pytest.mark.parametrize(("hosts", "lost", "size"), [(8, 2, 1001), (3, 1, 64), (5, 3, 7), (4, 2, 131_077), (2, 1, 1)])
def test_any_lost_hosts_come_back(rng, hosts, lost, size):
    blobs = [rng.integers(0, 256, size, dtype=np.uint8) for _ in range(hosts)]
    parity = make_parity(blobs, lost)
    for gone in itertools.combinations(range(hosts), lost):
        left = {h: blobs[h] for h in range(hosts) if h not in gone}
        back = recover(left, {h: parity[h] for h in left}, hosts, lost, size)
        assert back.keys() == set(gone)
        for h in gone:
            np.testing.assert_array_equal(back[h], blobs[h])
    piece = -(-size // (2 * (hosts - lost))) * 2
    assert all(sum(map(len, kept)) == lost * piece for kept in parity)  # lost / (hosts - lost) of a host's bytes
    with pytest.raises(ValueError, match=f"{lost + 1} of {hosts} hosts are gone but the parity covers {lost}"):
        recover({h: blobs[h] for h in range(hosts - lost - 1)}, dict(enumerate(parity)), hosts, lost, size)


def test_shards_of_eight_simulated_hosts(rng):
    """Each device is a host; two of them, and their shards of every array, are lost."""
    where = NamedSharding(make_mesh(fsdp=8), PartitionSpec("fsdp"))
    state = [jax.device_put(rng.normal(size=(16, n)).astype(np.float32), where) for n in (5, 12)]
    blobs = [np.concatenate([np.asarray(x.addressable_shards[h].data).reshape(-1) for x in state]) for h in range(8)]
    blobs = [blob.view(np.uint8) for blob in blobs]
    parity = make_parity(blobs, 2)
    gone = rng.choice(8, 2, replace=False).tolist()
    left = {h: blobs[h] for h in range(8) if h not in gone}
    back = recover(left, {h: parity[h] for h in left}, 8, 2, blobs[0].size)
    for h in gone:
        assert back[h].tobytes() == b"".join(np.asarray(x.addressable_shards[h].data).tobytes() for x in state)


def test_the_first_parity_is_xor_and_the_code_is_linear(rng):
    data = rng.integers(0, 256, (6, 50), dtype=np.uint8)
    other = rng.integers(0, 256, (6, 50), dtype=np.uint8)
    a, b, both = (encode(list(x), 3) for x in (data, other, data ^ other))
    np.testing.assert_array_equal(a[0], np.bitwise_xor.reduce(data))
    for k in range(3):
        np.testing.assert_array_equal(a[k] ^ b[k], both[k])
    assert decode(dict(enumerate(data)), 6, 3) == {}
    with pytest.raises(ValueError, match="2 of 6 pieces are missing with 1 of parity"):
        decode({0: data[0], 1: data[1], 2: data[2], 3: data[3], 6: a[0]}, 6, 3)


def test_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match="lost=2 of 2 hosts"):
        make_parity([np.zeros(4, np.uint8)] * 2, 2)
