"""What a device can do: the numbers that the cost model needs, for named hardware or from a TOML file."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

# What a device can be: wide enough for any, narrow enough to notice 706 that was meant as 706e12.
_RATES = (1e6, 1e21, "a positive, finite number of bytes or FLOPs, 1e6 to 1e21: 141e9 for 141 GB")
_RANGES = {
    "node": (1, 2**20, "a positive, finite, whole number of devices, up to 2**20"),
    "latency": (1e-12, 10.0, "a positive, finite number of seconds, 1e-12 to 10: 2e-6 for 2 us"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its links; bytes and seconds throughout.

    A collective over n devices takes `latency * steps + bytes on the wire / bandwidth`: alpha-beta, per mesh axis. An
    axis whose groups lie within `node` consecutive devices uses `bandwidth`, any other `outer_bandwidth`.
    """

    name: str
    flops: float  # dense bfloat16 FLOP/s that large matmuls reach
    memory_bandwidth: float  # B/s
    memory: float  # bytes
    bandwidth: float  # B/s that a device sends along one mesh axis, within a node or an interconnect torus
    outer_bandwidth: float  # B/s between nodes or slices
    node: int  # devices in a node or slice
    latency: float = 2e-6  # seconds of one step of a collective
    scatters: bool = True  # the compiler turns all-reduce and slice into a reduce-scatter
    merges: bool = True  # the compiler adds partial sums before it reduces them

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type not in (int, float):
                sound, wanted = isinstance(value, field.type), f"a {field.type.__name__}"  # pyright: ignore
            else:  # nan is no number between any two
                low, high, wanted = _RANGES.get(field.name, _RATES)
                sound = isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high
                sound = sound and (field.type is float or float(value).is_integer())
            if not sound:
                raise ValueError(f"hardware {self.name!r}: {field.name}={value!r} must be {wanted}")

    @classmethod
    def load(cls, path: str | Path) -> "Hardware":
        """Reads a TOML file with these fields as keys."""
        try:
            data = tomllib.loads(Path(path).read_text("utf-8"))
        except ValueError as error:  # no TOML, or no text at all
            raise ValueError(f"{path} is no TOML file: {error}") from None
        known = {f.name for f in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                raise ValueError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in data]
        if missing:
            raise ValueError(f"{path}: missing {', '.join(missing)}")
        return cls(**data)

    def link(self, axis: str, mesh_shape: Mapping[str, int]) -> float:
        """B/s along a mesh axis; the last axis of the mesh runs over neighbouring devices."""
        names = list(mesh_shape)
        span = math.prod(mesh_shape[n] for n in names[names.index(axis) :])
        return self.bandwidth if span <= self.node else self.outer_bandwidth

    def seconds(self, kind: str, wire: float, axes: tuple[str, ...], mesh_shape: Mapping[str, int]) -> float:
        """Time of a collective that sends `wire` bytes per device."""
        n = math.prod(mesh_shape[a] for a in axes)
        if n == 1:
            return 0.0
        steps = 1 if kind == "collective-permute" else math.ceil(math.log2(n)) * (2 if kind == "all-reduce" else 1)
        return steps * self.latency + wire / min(self.link(a, mesh_shape) for a in axes)


# Matmul rates: 706 TFLOP/s of 989 measured on an H200; the others are taken at the same 0.7 of the vendor's peak.
# Links: NVLink 4 450 GB/s each way by the vendor, of which two H100s reached 259 in an all-gather of 128 MiB parts and
# two H200s 280 in an all-to-all, 329 in a permute (docs/LOG.md); 400 Gb/s network per GPU; TPU figures are the
# vendor's per-chip interconnect, two directions of one torus axis (jax-ml.github.io/scaling-book, "TPUs";
# cloud.google.com/tpu/docs).
# A tpu7x chip is two JAX devices: half of the chip's 2307 TFLOP/s, 7380 GB/s, 192 GiB and links each
# (cloud.google.com/tpu/docs/tpu7x).
HARDWARE = {
    h.name: h
    for h in (
        Hardware(name="h200", flops=706e12, memory_bandwidth=4.3e12, memory=141e9, bandwidth=450e9,
                 outer_bandwidth=50e9, node=8),
        Hardware(name="h100", flops=700e12, memory_bandwidth=3.0e12, memory=80e9, bandwidth=280e9,
                 outer_bandwidth=50e9, node=8),
        Hardware(name="a100", flops=220e12, memory_bandwidth=1.8e12, memory=80e9, bandwidth=300e9,
                 outer_bandwidth=25e9, node=8),
        Hardware(name="v5e", flops=140e12, memory_bandwidth=0.82e12, memory=16e9, bandwidth=90e9,
                 outer_bandwidth=6e9, node=256, latency=1e-6),
        Hardware(name="v5p", flops=320e12, memory_bandwidth=2.77e12, memory=95e9, bandwidth=180e9,
                 outer_bandwidth=6e9, node=8960, latency=1e-6),
        Hardware(name="v6e", flops=640e12, memory_bandwidth=1.64e12, memory=32e9, bandwidth=180e9,
                 outer_bandwidth=12e9, node=256, latency=1e-6),
        Hardware(name="tpu7x", flops=807e12, memory_bandwidth=3.69e12, memory=103e9, bandwidth=90e9,
                 outer_bandwidth=6e9, node=18432, latency=1e-6),
        # Eight simulated devices in one process: for verification, where bytes matter and seconds do not.
        Hardware(name="cpu", flops=1e11, memory_bandwidth=2e10, memory=16e9, bandwidth=5e9, outer_bandwidth=1e9,
                 node=1024, latency=1e-5, scatters=False, merges=False),
    )
}  # fmt: skip


# What a device calls itself (jax.Device.device_kind) -> the name here; the first that is found in it.
KINDS = {
    "H200": "h200", "H100": "h100", "A100": "a100", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p",
    "TPU v6": "v6e", "TPU7x": "tpu7x", "TPU v7": "tpu7x", "cpu": "cpu",
}  # fmt: skip


def hardware_of(device: Any) -> Hardware:
    """The Hardware of a jax.Device."""
    for kind, name in KINDS.items():
        if kind.lower() in device.device_kind.lower():
            return HARDWARE[name]
    raise ValueError(
        f"devices of kind {device.device_kind!r} are not known; known are {', '.join(KINDS)}; give hardware= "
        "(a name, a .toml file or a Hardware)"
    )


def find_hardware(hardware: "str | Path | Hardware") -> Hardware:
    """A Hardware, one by name, or one from a TOML file."""
    if isinstance(hardware, Hardware):
        return hardware
    if str(hardware) in HARDWARE:
        return HARDWARE[str(hardware)]
    if str(hardware).endswith(".toml"):
        return Hardware.load(hardware)
    near = difflib.get_close_matches(str(hardware), HARDWARE, 1)
    raise ValueError(
        f"hardware {str(hardware)!r} is not one of {', '.join(HARDWARE)}"
        + (f"; did you mean {near[0]!r}?" if near else "")
        + "; or give a .toml file"
    )
