"""Calibration: the rates of this machine, written as a file that the planner reads."""

import itertools

import jax
import pytest

from jaxscale.config import MeshConfig
from jaxscale.mesh import make_mesh
from jaxscale.plan import links
from jaxscale.plan.command import PlanOptions, plan_command
from sharding_rules.hardware import Hardware


def test_what_is_measured_is_a_hardware_file_that_plan_takes(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    options = links.LinksOptions(mesh="fsdp=2,tp=4", out=str(path), megabytes=1, matmul=256)
    assert links.links_command(options) == 0
    assert "fsdp=2" in capsys.readouterr().out
    mine = Hardware.load(path)
    assert mine.node == 4 and not mine.scatters
    plan = PlanOptions(model="smollm2-135m", on="cpu:8", seq=512, batch="8", hardware=str(path), report="")
    assert plan_command(plan) == 0
    assert "smollm2-135m on cpu:8" in capsys.readouterr().out


def test_rates_are_work_over_time(monkeypatch):
    """With a clock that says how long each transfer takes, the rates are known."""
    took = iter([0.002, 0.004, 1e-3, 0.101, 2e-3, 0.202])  # matmul, memory, then small and large of fsdp and of tp
    monkeypatch.setattr(links, "_seconds", lambda run, *args: next(took))
    found = links.measure(make_mesh(MeshConfig(fsdp=2, tp=4)), num_bytes=2**20, side=128)
    hw = found.hardware
    assert hw.flops == 2 * 128**3 / 0.002 and hw.memory_bandwidth == 2 * 2**20 / 0.004
    assert hw.outer_bandwidth == pytest.approx(2**20 / 0.1)  # a device of two sends its own part once
    assert hw.bandwidth == pytest.approx(3 * 2**20 / 0.2)
    assert [x.latency for x in found.links] == [1e-3, 1e-3]  # of four devices in two steps


def test_a_written_file_reads_back(tmp_path, rng):
    values = {k: float(rng.integers(1, 1000)) * 1e9 for k in ("flops", "memory_bandwidth", "memory", "bandwidth")}
    for node, scatters in itertools.product((1, 8), (True, False)):
        hw = Hardware(name="a b", outer_bandwidth=5e9, node=node, latency=2.5e-6, scatters=scatters, **values)
        (tmp_path / "x.toml").write_text(links.to_toml(hw))
        assert Hardware.load(tmp_path / "x.toml") == hw
    assert len(jax.devices()) == 8
