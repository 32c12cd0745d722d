"""Topologies by name: `v5p:8x8x8`, `h200:128x8` -> which device, how many, how they are wired, without any plugin."""

import difflib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sharding_rules.hardware import Hardware, find_hardware


class Pod(NamedTuple):
    """A set of devices that can be rented: TPU chips in a grid, or hosts of GPUs."""

    name: str  # as it was asked for
    kind: str  # "v5p", "h200"
    platform: str  # "tpu", "cuda" or "cpu"
    grid: tuple[int, ...]  # chips along each dim of a TPU slice; (hosts, devices in each) otherwise
    num_devices: int
    hardware: Hardware


class _Slices(NamedTuple):
    """What slices of a TPU generation exist (cloud.google.com/tpu/docs/system-architecture-tpu-vm)."""

    dims: int
    max_side: int
    max_chips: int
    devices_per_chip: int = 1


TPUS = {
    "v4": _Slices(3, 16, 4096),
    "v5e": _Slices(2, 16, 256),
    "v5p": _Slices(3, 28, 8960),
    "v6e": _Slices(2, 16, 256),
    "tpu7x": _Slices(3, 48, 9216, devices_per_chip=2),
}
MAX_GPUS = 2**20  # more than any machine has: every mesh of them is looked at
GPUS = ("h200", "h100", "b200", "a100", "mi250x")
# What JAX calls one device of a kind, which is what kernels are chosen by.
DEVICES = {
    "h200": "NVIDIA H200",
    "h100": "NVIDIA H100 80GB HBM3",
    "b200": "NVIDIA B200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "mi250x": "AMD Instinct MI250X",
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
    "cpu": "cpu",
}
DATA = Path(__file__).parent / "data"  # KIND.toml: rates of kinds that sharding_rules has none of, with their sources


def find_pod(name: str, hardware: Hardware | None = None) -> Pod:
    """The pod called `name`: KIND:AxBxC for TPU chips in a grid, KIND:HOSTSxDEVICES for GPUs, cpu:N.

    Args:
      hardware: rates to use instead of the table's (measured ones, say).

    Raises:
      ValueError: no such kind or slice; names the nearest ones that exist.
    """
    kind, _, size = name.lower().partition(":")
    known = (*TPUS, *GPUS, "cpu")
    if kind not in known:
        near = difflib.get_close_matches(kind, known, 2, cutoff=0.3) or known
        raise ValueError(f"--on {name!r}: no hardware is called {kind!r}; use {' or '.join(near)}, as in v5p:4x4x4")
    parts = size.split("x")
    if not all(p.isdecimal() and int(p) for p in parts):
        example = "h200:16x8 (16 hosts of 8)" if kind in GPUS else "v6e:16x16" if kind == "v6e" else "v5p:8x8x8"
        raise ValueError(f"--on {name!r}: {size!r} is no size; write it as in {example}")
    grid = tuple(map(int, parts))
    own = DATA / f"{kind}.toml"
    rates = hardware or (Hardware.load(own) if own.exists() else find_hardware(kind))
    if kind in TPUS:
        slices = TPUS[kind]
        if not _exists(grid, slices):
            nearest = " or ".join(f"{kind}:{'x'.join(map(str, g))}" for g in _nearest(grid, slices))
            raise ValueError(f"--on {name!r}: there is no such slice of {kind}; the nearest are {nearest}")
        return Pod(name, kind, "tpu", grid, math.prod(grid) * slices.devices_per_chip, rates)
    if len(grid) == 1:
        grid = (max(1, grid[0] // rates.node), min(grid[0], rates.node))
        if math.prod(grid) != int(size):
            raise ValueError(f"--on {name!r}: {size} devices are not whole hosts of {rates.node}; write HOSTSxDEVICES")
    if len(grid) != 2 or grid[1] > rates.node:
        raise ValueError(
            f"--on {name!r}: a host holds up to {rates.node} {kind} devices; "
            f"write hosts x devices, as in {kind}:{max(1, math.prod(grid) // rates.node)}x{rates.node}"
        )
    if math.prod(grid) > MAX_GPUS:
        raise ValueError(
            f"--on {name!r}: {math.prod(grid):,} devices are more than any machine has; use up to {MAX_GPUS:,}"
        )
    return Pod(name, kind, "cpu" if kind == "cpu" else "cuda", grid, math.prod(grid), rates)


def pod_of(devices: Sequence[Any]) -> Pod | None:
    """These devices, hosts as they are numbered; None where there are no rates for their kind."""
    kind = next((kind for kind, name in DEVICES.items() if name == devices[0].device_kind), None)
    if kind is None:
        return None
    own, count = DATA / f"{kind}.toml", len(devices)
    rates = Hardware.load(own) if own.exists() else find_hardware(kind)
    hosts = len({d.process_index for d in devices})
    platform = "cpu" if kind == "cpu" else "tpu" if kind in TPUS else "cuda"
    return Pod(f"{kind}:{count}", kind, platform, (hosts, count // hosts), count, rates)


def _exists(grid: tuple[int, ...], slices: _Slices) -> bool:
    """Chips come in trays of 2x2; from 4 on a side is a multiple of 4 (3-D tori) or a power of two (2-D)."""
    if len(grid) != slices.dims or max(grid) > slices.max_side or math.prod(grid) > slices.max_chips:
        return False
    if slices.dims == 2:
        return grid[0] <= grid[1] <= 2 * grid[0] and all(side in (2, 4, 8, 16) for side in grid)
    small = {(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)}
    return grid in small or all(side % 4 == 0 for side in grid)


def _nearest(grid: tuple[int, ...], slices: _Slices) -> list[tuple[int, ...]]:
    sides = (1, 2, *range(4, slices.max_side + 1, 4))
    found = [g for g in itertools.combinations_with_replacement(sides, slices.dims) if _exists(g, slices)] + (
        [(2, 2, 1)] if slices.dims == 3 else []
    )
    chips = math.prod(grid)
    return sorted(found, key=lambda g: (abs(math.log(math.prod(g) / chips)), max(g)))[:3]
