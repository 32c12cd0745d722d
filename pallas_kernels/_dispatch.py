"""Which backend of an op runs: the only fallback loop of the package."""

import functools
import logging
import re
from collections.abc import Callable, Mapping

import jax
from jax._src import config as _config  # the only place that knows of an interpreter forced from outside

logger = logging.getLogger("pallas_kernels")


def choose(op: str, implementation: str | None, supported: Mapping[str, Callable[[], str | None]]) -> str:
    """The backend to run: the named one, or the first whose `supported()` gives no reason against it.

    Args:
      op: name of the op, for messages.
      implementation: a key of `supported`, or None to fall back in the mapping's order.
      supported: backend name -> a function that returns None, or the reason why this call cannot run there.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: the named backend cannot run this call (the reason follows), or none can.
    """
    if implementation is not None:
        if implementation not in supported:
            raise ValueError(
                f"{op}: implementation={implementation!r} is unknown; use one of {sorted(supported)} or None"
            )
        if reason := supported[implementation]():
            raise NotImplementedError(f"{op}: implementation={implementation!r} cannot run this call: {reason}")
        return implementation
    reasons = []
    for name, check in supported.items():
        reason = check()
        if reason is None:
            _log_once(op, name, tuple(reasons))
            return name
        reasons.append(f"{name}: {reason}")
    raise NotImplementedError(f"{op}: no implementation can run this call: " + "; ".join(reasons))


@functools.lru_cache(maxsize=256)
def _log_once(op: str, name: str, reasons: tuple[str, ...]) -> None:
    logger.info("%s runs on %s%s", op, name, f" ({'; '.join(reasons)})" if reasons else "")


def device_kind() -> str:
    """The kind of device that this trace is for, e.g. 'NVIDIA H200', 'TPU v5p', 'cpu'.

    A mesh set with jax.set_mesh wins, so that a program compiled ahead of time for hardware that is not here gets that
    hardware's kernel; then jax_default_device; then the first device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None or isinstance(device, str):
        device = jax.local_devices(backend=device)[0]
    return device.device_kind


def interpreted(hardware: str) -> bool:
    """Whether kernels traced now run in one of JAX's interpreters: "gpu", "tpu" (force_*_interpret_mode), "triton"."""
    params = _config.pallas_tpu_interpret_mode_context_manager.value
    if params is None:
        return False
    name = type(params).__name__
    return hardware == ("triton" if params is True else "gpu" if "GPU" in name else "tpu")


def unless_hopper() -> str | None:
    """None where kernels for Hopper GPUs (sm90) run, their interpreter included; else the reason."""
    kind = device_kind()
    hopper = interpreted("gpu") or re.search(r"\b(H100|H200|H800|H20|GH200)\b", kind)
    return None if hopper else f"needs a Hopper GPU; this is {kind}"


def unless_tpu() -> str | None:
    """None where kernels for TPUs run, their interpreter included; else the reason."""
    kind = device_kind()
    return None if interpreted("tpu") or kind.startswith("TPU") else f"needs a TPU; this is {kind}"
