"""Whether a run fits on the devices that are here, said before anything is compiled, and what would fit."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxscale.config import MeshConfig, TrainConfig
from jaxscale.models import decoder
from jaxscale.params import num_params
from jaxscale.plan.estimate import HEADROOM, Estimate, estimate
from jaxscale.plan.hardware import Pod, pod_of
from jaxscale.plan.search import search
from jaxscale.table import human_bytes
from sharding_rules.hardware import find_hardware
from sharding_rules.rules import MEGATRON_FSDP, Rules


def room_note(
    cfg: TrainConfig, devices: Sequence[Any], rules: Rules = MEGATRON_FSDP, *, full: bool = False
) -> str | None:
    """None where a step of `cfg` is estimated to fit, or nothing is known of its memory; else what it needs, and the
    options of the command line with which it is estimated to fit.

    Args:
      full: it was seen not to fit, whatever the estimate says: options that need a tenth less.

    Raises:
      ValueError: the parameters with Adam's two moments alone are more than the devices hold.
    """
    have, count = device_memory(), len(devices)
    if have is None:
        return None
    pod = pod_of(devices) or Pod(devices[0].device_kind, "", "cuda", (1, count), count, find_hardware("h100"))
    mesh = cfg.mesh.fill(count)
    sizes = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "loss_chunk": cfg.loss_chunk}
    try:
        found = estimate(cfg.model, mesh, pod, remat=cfg.remat, accum_steps=cfg.accum_steps, rules=rules, **sizes)
    except ValueError:  # such as heads that tp does not split, which are computed whole: there is no estimate
        return None
    need, held = found.memory.total, found.memory.params + found.memory.optimizer
    of = f"of the {human_bytes(have)} that each of {count} device(s) may hold"
    if held > have:
        raise ValueError(
            f"{num_params(decoder.param_specs(cfg.model)):,} parameters with Adam's moments need {human_bytes(held)} "
            f"{of}; use more devices, fsdp or tp that splits them, or a smaller model (`jaxscale plan` says what fits)"
        )
    if need <= have and not full:
        return None
    # What may be planned for is what the runtime says here, and not a share of what the device was sold with.
    room = max(min(have, 0.9 * need) if full else have, 1e6)  # Hardware knows no less
    pod = pod._replace(hardware=dataclasses.replace(pod.hardware, memory=room / HEADROOM[pod.platform]))
    return f"a step is estimated to need {human_bytes(need)} {of}; {_what_fits(cfg, mesh, pod, sizes)}"


@contextlib.contextmanager
def memory_errors(remedy: Callable[[], str]) -> Iterator[None]:
    """Raises a MemoryError in one line, with the remedy, where the runtime finds no room on a device."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(f"a device's memory is full ({str(error).splitlines()[0]}); {remedy()}") from error


def device_memory() -> float | None:
    """Bytes that a device of this process may hold: what its runtime says, or a share of this machine's memory."""
    device = jax.local_devices()[0]
    have = (device.memory_stats() or {}).get("bytes_limit")
    if have is None and device.platform == "cpu":
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jax.local_device_count()
    return have


def _what_fits(cfg: TrainConfig, mesh: MeshConfig, pod: Pod, sizes: dict[str, Any]) -> str:
    """On this mesh, or on another one of the same devices."""
    for shape in (mesh, None):
        try:
            best = search(cfg.model, pod, mesh=shape, **sizes).best
        except ValueError as error:
            why = str(error)
        else:
            return f"{_options(best, mesh)} would need {human_bytes(best.memory.total)}"
    return why


def _options(e: Estimate, mesh: MeshConfig) -> str:
    """The options of `jaxscale train` that ask for this."""
    named = {field.name: (getattr(e.mesh, field.name), getattr(mesh, field.name)) for field in dataclasses.fields(mesh)}
    flags = [f"--mesh.{name.replace('_', '-')} {new}" for name, (new, old) in named.items() if new != old]
    return " ".join([*flags, f"--remat {e.remat}", f"--accum-steps {e.accum_steps}"])
