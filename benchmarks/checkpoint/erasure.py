"""Reed-Solomon parity of 8 hosts, any 2 lost: encode and rebuild bandwidth, beside zfec where it imports.

python benchmarks/checkpoint/erasure.py --mib 256
"""

import argparse
import os
import pathlib
import sys
import time

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
    print(f"{os.cpu_count()} cores, one used; numpy {np.__version__}; load {os.getloadavg()[0]:.1f}")


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def report(name: str, size: int, seconds: float) -> None:
    print(f"{name:28} {seconds:7.2f} s {size / seconds / 1e6:8.0f} MB/s of data")


if __name__ == "__main__":
    main()
