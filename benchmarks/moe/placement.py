"""What placing experts by a trace is worth: tokens that change the device, the busiest device, how far from the best.

    python benchmarks/moe/balance.py --out runs/balance              trains, and keeps traces
    python benchmarks/moe/placement.py runs/balance/trace-global-*.npy

Needs no device. Experts are placed by one half of a trace's rows and judged by the other, beside experts that are dealt
out one by one. `changes` is the share of a token's steps from an expert to one of the next layer that change the
device; `busiest` the load of a layer's busiest device over an even one, the mean of all layers; `gap` how far the
worst layer's busiest device may be from the best possible, on the half that placed it.
"""

import argparse
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np

from jaxscale.plan.placement import busiest_device, crossings, place, replicate, round_robin


def rows_of(trace: np.ndarray, devices: int, seconds: float):
    """(placement, changes, busiest, gap, seconds) of each way to place."""
    L, B, _, _ = trace.shape
    experts = int(trace.max()) + 1
    seen, judged = trace[:, : B // 2], trace[:, B // 2 :]
    options = {"num_experts": experts, "num_devices": devices, "seconds": seconds}
    ways = {
        "dealt out": lambda: round_robin(L, experts, devices),
        "load alone": lambda: place(seen, affinity=False, **options),
        "load, then affinity": lambda: place(seen, **options),
        f"{devices} copies": lambda: replicate(seen, num_replicas=devices, **options),
    }
    for name, make in ways.items():
        start = time.perf_counter()
        placement = make()
        took, whole = time.perf_counter() - start, placement.order.shape[1] == experts
        changes = crossings(judged, placement) if whole else float("nan")
        yield name, changes, busiest_device(judged, placement).mean(), max(placement.gap), took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=pathlib.Path, nargs="+", help=".npy files of int [L, B, T, K]")
    parser.add_argument("--devices", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each layer")
    options = parser.parse_args()
    print("| trace | devices | placed by | changes | busiest | gap | seconds |\n" + "|---" * 7 + "|")
    for path in options.traces:
        trace = np.load(path).astype(int)
        for devices in options.devices:
            for name, changes, busiest, gap, took in rows_of(trace, devices, options.seconds):
                moved = "" if np.isnan(changes) else f"{changes:.1%}"
                far = "" if np.isnan(gap) else f"{gap:.2%}"
                print(
                    f"| {path.stem} | {devices} | {name} | {moved} | {busiest:.3f} | {far} | {took:.1f} |", flush=True
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
