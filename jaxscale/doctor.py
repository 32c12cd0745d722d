"""What hardware, versions and backends are here, and what each unlocks."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the report. state: "ok", "missing" or "note"."""

    topic: str
    state: str
    found: str
    unlocks: str


def examine() -> list[Finding]:
    """Look around; touches no device beyond listing it."""
    import jax

    out = [
        Finding(
            "python", "ok" if sys.version_info >= (3, 12) else "missing", platform.python_version(), "3.12 or newer"
        ),
        *(_package(name, why) for name, why in _PACKAGES.items()),
    ]
    devices = jax.devices()
    kinds = {}
    for device in devices:
        kinds[(device.platform, device.device_kind)] = kinds.get((device.platform, device.device_kind), 0) + 1
    for (backend, kind), count in kinds.items():
        out.append(Finding("devices", "ok", f"{count} x {kind} ({backend})", _unlocks(devices[0])))
    if devices[0].platform == "cpu" and len(devices) == 1:
        hint = "--simulate 8 (or XLA_FLAGS=--xla_force_host_platform_device_count=8) splits it into eight"
        out.append(Finding("simulation", "note", "one CPU device", hint))
    out.append(Finding("processes", "ok", str(jax.process_count()), "set JAX_COORDINATOR_ADDRESS and co. for several"))
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        out.append(Finding("device memory", "ok", f"{stats['bytes_limit'] / 2**30:.0f} GiB", ""))
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    hint = "a command started again compiles nothing" + ("" if kept else ": set JAX_COMPILATION_CACHE_DIR=~/.cache/jax")
    out.append(Finding("compiled programs", "ok" if kept else "note", kept or "not kept", hint))
    out.append(_aot("libtpu", "TPU ahead-of-time compilation (pip install libtpu)", "TPU pods"))
    out.append(
        _aot(
            "jax_plugins.xla_cuda13",
            "NVIDIA ahead-of-time compilation (pip install 'jaxscale[cuda13]')",
            "GPU clusters",
            also="jax_plugins.xla_cuda12",
        )
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    out.append(Finding("host", "ok", f"{cores} cores, {platform.machine()}", ""))
    return out


_PACKAGES = {
    "jax": "everything",
    "jaxlib": "the compiler",
    "optax": "optimizers",
    "orbax-checkpoint": "checkpoints",
    "grain": "data loading",
    "flax": "flax models through the same functions",
    "tokenizers": "subword tokenizers",
    "gguf": "GGUF import",
}


def _package(name: str, why: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name), why)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", why)


def _aot(module: str, remedy: str, what: str, also: str | None = None) -> Finding:
    for name in filter(None, (module, also)):
        try:
            if importlib.util.find_spec(name) is not None:
                return Finding(f"compile for {what}", "ok", name, "programs for hardware that is not here")
        except ModuleNotFoundError:
            continue
    return Finding(f"compile for {what}", "missing", f"no {module}", remedy)


def _unlocks(device) -> str:
    if device.platform == "tpu":
        return "Pallas Mosaic TPU kernels"
    if device.platform == "gpu":
        major = int(str(getattr(device, "compute_capability", "0")).split(".")[0] or 0)
        if major == 9:
            return "Pallas Mosaic GPU kernels (sm90)"
        return "Triton kernels, XLA for what they do not take" if major >= 8 else "XLA; the kernels need 8.0"
    return "XLA and the kernel interpreters: correctness at any mesh, not speed"
