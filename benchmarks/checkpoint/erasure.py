"""Reed-Solomon parity of 8 hosts, any 2 lost: encode and rebuild bandwidth, beside zfec where it imports; and restarts.

Of 8 keeper processes on this machine 2 are killed, their hosts' bytes are rebuilt and the state is restored. One
process restores all 8 devices, so that it fetches 7/8 of the bytes over loopback; on a cluster each host has its own.

python benchmarks/checkpoint/erasure.py --mib 256
"""

import argparse
import concurrent.futures
import os
import pathlib
import signal
import socket
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jaxscale.checkpoint.erasure import decode, encode, make_parity, recover


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=256)
    size = parser.parse_args().mib << 20
    rng = np.random.default_rng(0)
    piece = size // 6 // 2 * 2
    data = [np.frombuffer(rng.bytes(piece), np.uint8) for _ in range(6)]
    encode([d[:1024] for d in data], 2)  # the tables
    seconds, parity = timed(lambda: encode(data, 2))
    report("encode 6 + 2", 6 * piece, seconds)
    have = {k: data[k] for k in range(6) if k not in (1, 4)} | {6: parity[0], 7: parity[1]}
    seconds, back = timed(lambda: decode(have, 6, 2))
    assert all(np.array_equal(back[k], data[k]) for k in (1, 4))
    report("decode, two pieces missing", 6 * piece, seconds)

    blobs = [np.frombuffer(rng.bytes(size // 8), np.uint8) for _ in range(8)]
    seconds, kept = timed(lambda: make_parity(blobs, 2))
    report("parity of 8 hosts", size, seconds)
    left = {h: blobs[h] for h in range(8) if h not in (2, 3)}
    seconds, back = timed(lambda: recover(left, {h: kept[h] for h in left}, 8, 2, size // 8))
    assert all(np.array_equal(back[h], blobs[h]) for h in (2, 3))
    report("two of 8 hosts rebuilt", size, seconds)
    try:
        import zfec
    except ImportError:
        print("zfec is not installed")
    else:
        pieces = [d.tobytes() for d in data]
        seconds, _ = timed(lambda: zfec.Encoder(6, 8).encode(pieces, (6, 7)))
        report("zfec encode 6 + 2", 6 * piece, seconds)
    restart(size)
    print(f"{os.cpu_count()} cores, one used by the code; numpy {np.__version__}; load {os.getloadavg()[0]:.1f}")


def restart(size: int) -> None:
    """Each of 8 devices of this process is a host with a keeper; `size` bytes of state over all."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxscale.checkpoint import MemoryCheckpointer

    sockets = [socket.create_server(("localhost", 0)) for _ in range(8)]
    hosts = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    where = NamedSharding(jax.make_mesh((8,), ("fsdp",)), PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    state = {f"w{k}": jax.device_put(rng.random((8, size // 64), np.float32), where) for k in range(2)}
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for name, x in state.items()}
    open_host = lambda h: MemoryCheckpointer(hosts, job="bench", lost=2, host=h, devices=[jax.devices()[h]])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        everywhere = lambda call: list(pool.map(call, range(8)))
        clients = everywhere(open_host)
        everywhere(lambda h: clients[h].save(1, state))
        seconds, _ = timed(lambda: everywhere(lambda h: clients[h].wait()))
        report("saved and protected", size, seconds)
        seconds, _ = timed(lambda: clients[0].restore(target))
        report("restart, a process was lost", size, seconds)
        for h in (2, 3):
            os.kill(clients[h]._own.ask("status")[0]["pid"], signal.SIGKILL)
            clients[h]._own.await_end()
            clients[h]._own.close()

        def come_back():
            for h in (2, 3):
                clients[h] = open_host(h)
            return everywhere(lambda h: clients[h].restore(target) if h in (0, 2, 3) else None)[0]

        seconds, back = timed(come_back)
        report("restart, two hosts were lost", size, seconds)
        assert all(np.array_equal(back[name], state[name]) for name in state)
        everywhere(lambda h: clients[h].wait())
        everywhere(lambda h: clients[h].close())


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def report(name: str, size: int, seconds: float) -> None:
    print(f"{name:28} {seconds:7.2f} s {size / seconds / 1e6:8.0f} MB/s of data")


if __name__ == "__main__":
    main()
