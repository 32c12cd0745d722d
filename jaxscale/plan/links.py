"""`jaxscale bench links`: what this machine's matmuls, memory and links do, as a hardware file for the planner."""

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.table import Table
from sharding_rules.hardware import Hardware
from sharding_rules.hlo import wire_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinksOptions:
    """Measure matmuls, memory and the links of each mesh axis here; write them as a hardware file for `plan`."""

    mesh: str = "fsdp=-1"
    """its axes are measured one by one; the innermost is taken to lie within a host"""
    out: str = "hardware.toml"
    megabytes: int = 64
    """of one device's part of a large transfer"""
    matmul: int = 4096
    """side of the matrices"""


class Link(NamedTuple):
    """One mesh axis: all-gathers over it."""

    axis: str
    size: int
    bandwidth: float  # bytes that a device sends in a second
    latency: float  # seconds of one step of a small one


class Measured(NamedTuple):
    hardware: Hardware
    links: tuple[Link, ...]

    def table(self) -> Table:
        hw = self.hardware
        rows = [
            ("matmul", f"{hw.flops / 1e12:.3g} TFLOP/s", ""),
            ("memory", f"{hw.memory_bandwidth / 1e9:.3g} GB/s", ""),
        ]
        rows += [
            (f"{x.axis}={x.size}", f"{x.bandwidth / 1e9:.3g} GB/s", f"{x.latency * 1e6:.3g} us") for x in self.links
        ]
        return Table(f"Measured on {hw.name}", ("what", "rate", "latency"), rows)


def links_command(options: LinksOptions) -> int:
    """Measures, prints and writes; returns the exit status."""
    mesh = make_mesh(MeshConfig.parse(options.mesh).fill(len(jax.devices())))
    for name in ("megabytes", "matmul"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} {getattr(options, name)} must be at least 1")
    out = Path(options.out)
    new = not out.exists()
    out.open("a").close()  # a place that cannot be written is said before the work
    try:
        measured = measure(mesh, num_bytes=options.megabytes * 2**20, side=options.matmul)
    except BaseException:
        if new:
            out.unlink()
        raise
    print(measured.table())
    out.write_text(to_toml(measured.hardware))
    print(f"written: {options.out}; use it with jaxscale plan --hardware {options.out}")
    return 0


def measure(mesh: Mesh, *, num_bytes: int = 2**26, side: int = 4096) -> Measured:
    """Rates of the devices of a mesh.

    Args:
      num_bytes: of one device's part of a large transfer, and of the array that memory is measured with.
      side: of the square bfloat16 matrices that are multiplied.
    """
    device = mesh.devices.flat[0]
    x = jax.device_put(jnp.ones((side, side), jnp.bfloat16), device)
    flops = 2 * side**3 / _seconds(jax.jit(jnp.matmul), x, x)
    wide = jax.device_put(jnp.ones((num_bytes // 4,), jnp.float32), device)
    memory_bandwidth = 2 * num_bytes / _seconds(jax.jit(lambda a: a + 1), wide)
    links = tuple(_link(mesh, axis, num_bytes) for axis, size in mesh.shape.items() if size > 1)
    inner = links[-1].bandwidth if links else memory_bandwidth
    hardware = Hardware(
        name=device.device_kind.lower().replace(" ", "-"),
        flops=flops,
        memory_bandwidth=memory_bandwidth,
        memory=float(_memory(device)),
        bandwidth=inner,
        outer_bandwidth=min((x.bandwidth for x in links[:-1]), default=inner),
        node=links[-1].size if len(links) > 1 else mesh.size,
        latency=max((x.latency for x in links), default=1e-6),
        scatters=device.platform != "cpu",
    )
    return Measured(hardware, links)


def to_toml(hardware: Hardware) -> str:
    """The file that `Hardware.load` reads."""
    lines = []
    for name, value in dataclasses.asdict(hardware).items():
        text = (
            f'"{value}"' if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value:g}"
        )
        lines.append(f"{name} = {text}\n")
    return "".join(lines)


def _link(mesh: Mesh, axis: str, num_bytes: int) -> Link:
    size = mesh.shape[axis]

    def gather(count: int) -> float:
        x = jax.device_put(jnp.ones((size, count), jnp.float32), jax.sharding.NamedSharding(mesh, P(axis)))
        local = functools.partial(jax.lax.all_gather, axis_name=axis, tiled=True)
        run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(axis), out_specs=P(), check_vma=False))
        return _seconds(run, x)

    small, count = gather(16), num_bytes // 4
    large = gather(count)
    sent = wire_bytes("all-gather", 4 * count * size, size)
    # Large transfers are never slower than the clock can tell apart from small ones.
    return Link(axis, size, sent / max(large - small, large / 2), small / math.ceil(math.log2(size)))


def _seconds(run: Callable, *args: jax.Array, repeats: int = 5, calls: int = 10) -> float:
    """Of one call, the median of a few repeats after the first. Calls are issued back to back: waiting for each would
    time the host, which took 0.3 ms a call over two H100s. Of what takes long, as a CPU's matmuls do, fewer."""
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    calls = max(1, min(calls, int(0.1 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[repeats // 2]


def _memory(device: Any) -> int:
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
