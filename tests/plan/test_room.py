"""Whether a run fits here: what is said before anything is compiled, and when a device turns out to be full."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from jaxscale import DataConfig, MeshConfig, TrainConfig
from jaxscale.models import presets
from jaxscale.plan import room
from jaxscale.plan.estimate import estimate
from jaxscale.plan.room import memory_errors, room_note


def need(cfg):
    sizes = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len, "loss_chunk": cfg.loss_chunk}
    found = estimate(cfg.model, cfg.mesh, "cpu:8", remat=cfg.remat, accum_steps=cfg.accum_steps, **sizes)
    return found.memory


def followed(cfg, note):
    """The configuration that the options of a note ask for."""
    flags = dict(re.findall(r"--([a-z.-]+) (\S+)", note))
    mesh = {k[5:].replace("-", "_"): int(v) for k, v in flags.items() if k.startswith("mesh.")}
    return dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **mesh),
        remat=flags["remat"],
        accum_steps=int(flags["accum-steps"]),
    )


@pytest.fixture
def cfg(rng):
    mesh = [MeshConfig(dp=8), MeshConfig(dp=2, fsdp=4), MeshConfig(fsdp=8)][rng.integers(3)]
    data = DataConfig(source="none", seq_len=2048, batch_size=64)
    return TrainConfig(model=presets.smollm2_135m(), mesh=mesh, data=data, remat="none")


def test_what_would_fit_is_said(cfg, rng, monkeypatch):
    whole = need(cfg)
    state = whole.params + whole.optimizer
    monkeypatch.setattr(room, "device_memory", lambda: 1.01 * whole.total)
    assert room_note(cfg, jax.devices()) is None
    have = state + rng.uniform(0.2, 0.9) * (whole.total - state)
    monkeypatch.setattr(room, "device_memory", lambda: have)
    note = room_note(cfg, jax.devices())
    print(note)
    assert note.startswith("a step is estimated to need ") and "each of 8 device(s)" in note
    assert need(followed(cfg, note)).total <= have
    # It was tried and did not fit, though the estimate says so: something smaller.
    monkeypatch.setattr(room, "device_memory", lambda: 1.2 * whole.total)
    assert need(followed(cfg, room_note(cfg, jax.devices(), full=True))).total <= 0.9 * whole.total


def test_what_fits_nowhere_is_said_or_refused(cfg, monkeypatch):
    whole = need(dataclasses.replace(cfg, mesh=MeshConfig(dp=8)))
    monkeypatch.setattr(room, "device_memory", lambda: 0.9 * (whole.params + whole.optimizer))
    with pytest.raises(ValueError, match=r"134,515,008 parameters with Adam's moments need 1\.5 GiB of the 1\.4 GiB"):
        room_note(dataclasses.replace(cfg, mesh=MeshConfig(dp=8)), jax.devices())
    least = need(dataclasses.replace(cfg, mesh=MeshConfig(fsdp=8)))
    monkeypatch.setattr(room, "device_memory", lambda: 1.01 * (least.params + least.optimizer))
    assert "fits no mesh of cpu:8" in room_note(dataclasses.replace(cfg, mesh=MeshConfig(fsdp=8)), jax.devices())


def test_a_device_of_an_unknown_kind(cfg, monkeypatch):
    """Its rates are not known; what it needs to hold does not depend on them."""
    monkeypatch.setattr(room, "pod_of", lambda devices: None)
    monkeypatch.setattr(room, "device_memory", lambda: 0.9 * need(cfg).total)
    assert need(followed(cfg, room_note(cfg, jax.devices()))).total <= 0.9 * need(cfg).total
    monkeypatch.setattr(room, "device_memory", lambda: None)
    assert room_note(cfg, jax.devices()) is None


def test_a_full_device_is_said_with_the_remedy():
    with (
        pytest.raises(MemoryError, match=r"memory is full \(RESOURCE_EXHAUSTED: Out of memory.*\); do this"),
        memory_errors(lambda: "do this"),
    ):
        # Larger than any address space: XLA's own error.
        jax.block_until_ready(jax.jit(lambda x: jax.numpy.zeros((1 << 40,)) + x)(np.float32(1)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_errors(lambda: "do this"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
