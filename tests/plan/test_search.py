"""Pods by name, the search over meshes, the command."""

import dataclasses
import functools
import itertools
import re
import subprocess
import sys

import pytest

from jaxscale.config import MeshConfig
from jaxscale.models.presets import preset
from jaxscale.plan import aot
from jaxscale.plan import confirm as confirm_module
from jaxscale.plan.command import PlanOptions, plan_command, rows_of
from jaxscale.plan.confirm import collective_seconds, confirm
from jaxscale.plan.estimate import estimate
from jaxscale.plan.hardware import find_pod
from jaxscale.plan.search import meshes, search


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v5p:8x8x8", 512),
        ("v6e:16x16", 256),
        ("tpu7x:4x4x4", 128),
        ("v4:4x4x8", 128),
        ("b200:4x8", 32),
        ("mi250x:3x8", 24),
        ("a100:2x8", 16),
        ("h100:2x8", 16),
        ("v5e:4x8", 32),
        ("h200:128x8", 1024),
        ("h200:16", 16),
        ("h200:4", 4),
    ],
)
def test_pods(name, devices):
    pod = find_pod(name)
    assert pod.num_devices == devices
    assert pod.hardware.name == pod.kind
    # No device multiplies faster than 3 PFLOP/s, and each can do at least 30 FLOPs with a byte of its memory.
    assert 1e14 < pod.hardware.flops < 3e15 and pod.hardware.flops / pod.hardware.memory_bandwidth > 30


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v5p:3x3x3", "the nearest are v5p:"),
        ("v6e:32x32", "v6e:16x16"),
        ("v6e:4x4x4", "the nearest are v6e:"),
        ("v55p:4x4x4", "v5p"),
        ("h200:4x16", "up to 8"),
        ("h200:12", "whole hosts"),
        ("v5p:", "write it as in"),
    ],
)
def test_a_pod_that_does_not_exist_is_answered_with_those_that_do(name, says):
    with pytest.raises(ValueError, match=says) as error:
        find_pod(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"flops": -1}, "flops=-1 must be a positive, finite number"),
        ({"memory": 0}, "memory=0 must be a positive, finite number"),
        ({"bandwidth": float("nan")}, "bandwidth=nan must be a positive, finite number"),
        ({"flops": '"much"'}, "flops='much' must be a positive, finite number"),
        ({"flops": "1" + "0" * 400}, "1e6 to 1e21"),  # an integer beyond any float
        ({"flops": 706}, "flops=706 must be a positive, finite number of bytes or FLOPs, 1e6 to 1e21"),
        ({"node": 8.5}, "node=8.5 must be a positive, finite, whole number"),
        ({"latency": 60}, "latency=60 must be a positive, finite number of seconds"),
        ({"name": '"mine" = '}, "mine.toml is no TOML file"),
        ({"flopz": 1e12}, "did you mean 'flops'"),
        ({"node": None}, "missing node"),
    ],
)
def test_a_hardware_file_with_impossible_numbers_is_refused(changes, says, tmp_path):
    values = {"name": '"mine"', "flops": 1e14, "memory_bandwidth": 1e12, "memory": 8e10, "bandwidth": 1e11}
    values |= {"outer_bandwidth": 1e10, "node": 8} | changes
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{k} = {v}\n" for k, v in values.items() if v is not None))
    with pytest.raises(ValueError, match=says) as error:
        plan_command(PlanOptions(on="h200:1x8", hardware=str(path), report=""))
    assert "\n" not in str(error.value)


def test_the_search_finds_what_an_exhaustive_sweep_finds(rng):
    cfg, pod = preset("qwen3-0.6b"), find_pod("h200:2x8")
    rows = 2 ** int(rng.integers(4, 8))
    found = search(cfg, pod, batch_size=rows, seq_len=4096)
    best = float("inf")
    for dp, fsdp, cp, tp in itertools.product((1, 2, 4, 8, 16), repeat=4):
        if dp * fsdp * cp * tp != 16 or tp > 8 or rows % (dp * fsdp):
            continue
        for remat, accum in itertools.product(("none", "dots", "full"), (1, 2, 4, 8, 16, 32, 64)):
            if rows % (dp * fsdp * accum):
                continue
            for strategy in ("all_gather",) if cp == 1 else ("all_gather", "ring", "bidirectional", "ulysses"):
                mesh = MeshConfig(dp=dp, fsdp=fsdp, cp=cp, tp=tp, cp_strategy=strategy)
                e = estimate(cfg, mesh, pod, batch_size=rows, seq_len=4096, remat=remat, accum_steps=accum)
                best = min(best, e.seconds if e.fits else best)
    assert found.best.seconds <= best
    assert found.best.fits
    times = [(e.seconds, -e.memory.total) for e in found.pareto]
    assert times == sorted(times) and all(a[1] < b[1] for a, b in itertools.pairwise(times))
    assert found.runner_up is not None and found.runner_up.mesh != found.best.mesh
    assert str(found.runner_up.mesh) in found.why


def test_every_mesh_of_a_search_uses_all_devices_and_divides():
    cfg, pod = preset("llama3-70b"), find_pod("h200:16x8")
    shapes = list(meshes(cfg, pod, batch_size=128, seq_len=8192))
    assert len(shapes) == len(set(shapes)) > 20
    assert all(m.num_devices == 128 and 128 % (m.dp * m.fsdp) == 0 and m.tp <= 8 for m in shapes)


def test_a_model_that_fits_nowhere_names_what_would():
    with pytest.raises(ValueError, match=r"llama3-405b fits no mesh of h200:1x8: .* at least \d+ devices"):
        search(preset("llama3-405b"), "h200:1x8", batch_size=8, seq_len=4096)
    # Where neither its state nor its rows fit, fewer rows alone would not help.
    with pytest.raises(ValueError, match=r"fewer or shorter rows, .* and more than \d+ devices, which its") as error:
        search(preset("llama3-405b"), "h200:1x8", batch_size=64, seq_len=4096)
    more = int(re.findall(r"more than (\d+) devices", str(error.value))[0])
    # 16 bytes a parameter (float32: itself, its gradient, two moments), in 80 % of an H200.
    assert more == int(405.85e9 * 16 / (0.8 * 141e9))


def test_a_mesh_that_does_not_fit_is_answered_for_itself():
    run = functools.partial(search, preset("llama3-70b"), "h200:1x8", seq_len=8192)
    with pytest.raises(ValueError, match=r"dp=8 with remat full.* does not fit: .* of it state; split it") as error:
        run(batch_size=8, mesh=MeshConfig(dp=8))
    assert "no mesh" not in str(error.value) and "\n" not in str(error.value)
    long = dataclasses.replace(preset("qwen3-0.6b"), max_seq_len=2**21)
    with pytest.raises(ValueError, match=r"fsdp=8 with .* does not fit: .* and buffers; use fewer or shorter rows"):
        search(long, "h200:1x8", batch_size=8, seq_len=2**21, mesh=MeshConfig(fsdp=8))


def test_rows_of_a_batch():
    assert rows_of("512", 8192) == 512
    assert rows_of("4M-tokens", 8192) == 512
    assert rows_of("16K-tokens", 4096) == 4
    for bad in ("4M-token", "4M", "many", "0", "1K-tokens", "10000-tokens"):
        with pytest.raises(ValueError, match="--batch"):
            rows_of(bad, 8192)


def test_the_command_prints_a_plan_and_writes_its_page(capsys, tmp_path):
    page = tmp_path / "report.html"
    options = PlanOptions(
        model="llama3-8b", on="v5p:4x4x4", seq=4096, batch="1M-tokens", mesh="fsdp=16,tp=4", report=str(page)
    )
    assert plan_command(options) == 0
    said = capsys.readouterr().out
    assert "fsdp=16,tp=4" in page.read_text() and str(page) in said
    assert "llama3-8b on v5p:4x4x4" in said and "Collectives of a step" in said and "there was one mesh" in said


def test_a_pod_is_told_of_hosts_as_the_hardware_file_has_them():
    measured = dataclasses.replace(find_pod("h200:8").hardware, node=2)
    with pytest.raises(ValueError, match="up to 2 h200 devices; write hosts x devices, as in h200:4x2"):
        find_pod("h200:1x8", measured)


def test_a_runner_up_that_the_estimate_holds_to_be_faster_is_not_called_slower():
    found = search(preset("llama3-8b"), "h200:1x8", batch_size=64, seq_len=4096)
    assert found.meshes > 1 and re.search(r"is \d+\.\d% slower: ", found.why)
    turned = found._replace(best=found.runner_up, runner_up=found.best)  # as a compiler may order them
    assert re.search(r"is \d+\.\d% faster by the estimate alone: ", turned.why)


@pytest.fixture(scope="module")
def small():
    """A search whose candidates compile in seconds, and a compile_step that compiles each of them once."""
    cfg = dataclasses.replace(preset("tiny"), num_layers=2)
    found = search(cfg, "cpu:2", batch_size=8, seq_len=128, remats=("full",))
    done = {}

    def compile_step(model, mesh, pod, **sizes):
        if mesh not in done:
            done[mesh] = aot.compile_step(model, mesh, pod, **sizes)
        return done[mesh]

    return found, compile_step


def test_the_candidates_of_a_search_are_ordered_by_what_the_compiler_says(small, monkeypatch):
    found, compile_step = small
    monkeypatch.setattr(confirm_module, "compile_step", compile_step)
    confirmed = confirm(found, batch_size=8, seq_len=128, top=2)
    best, other = confirmed.candidates
    assert {best.estimate.mesh, other.estimate.mesh} == {e.mesh for e in found.fitting[:2]}
    assert best.fits and best.seconds <= other.seconds
    assert confirmed.plan.best is best.estimate and str(other.estimate.mesh) in confirmed.plan.why
    for c in confirmed.candidates:  # the compiled program's own collectives at the pod's rates
        wire = collective_seconds(c.compiled.census, found.pod, c.estimate.mesh)
        assert c.seconds == pytest.approx(c.estimate.seconds - c.estimate.exposed_seconds + wire)
        assert str(c.estimate.mesh) in str(confirmed)


@pytest.mark.slow
def test_the_choice_is_as_cheap_as_the_best_of_every_mesh_there_is(small, monkeypatch):
    """By the compiled programs; benchmarks/plan/sweep.py does it for larger models and more devices."""
    found, compile_step = small
    monkeypatch.setattr(confirm_module, "compile_step", compile_step)
    every = confirm(found, batch_size=8, seq_len=128, top=len(found.fitting))
    assert {e.mesh for e in found.fitting} >= {MeshConfig(**{axis: 2}) for axis in ("dp", "fsdp", "tp", "cp")}
    chosen = confirm(found, batch_size=8, seq_len=128).best
    assert chosen.seconds <= 1.05 * min(c.seconds for c in every.candidates), str(every.table())


def test_what_the_compiler_finds_no_room_for_is_not_chosen(small, monkeypatch):
    found, compile_step = small

    def refuse_the_best(model, mesh, *args, **kwargs):
        if mesh == found.best.mesh:
            raise ValueError("the compiler finds no room: 20 GB of 16 GB")
        return compile_step(model, mesh, *args, **kwargs)

    monkeypatch.setattr(confirm_module, "compile_step", refuse_the_best)
    confirmed = confirm(found, batch_size=8, seq_len=128, top=2)
    assert confirmed.best.estimate.mesh == found.fitting[1].mesh
    assert "20 GB of 16 GB" in str(confirmed.table())
    with pytest.raises(ValueError, match=r"finds no room; .*20 GB"):
        confirm(found, batch_size=8, seq_len=128, top=1)


def test_a_missing_compiler_is_answered_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    for pod, package in (("v5p:4x4x4", r"pip install 'jax\[tpu\]'"), ("h200:1x8", r"pip install 'jax\[cuda13\]'")):
        with pytest.raises(ImportError, match=package):
            aot.pod_devices(find_pod(pod))


def test_importing_the_planner_starts_no_backend():
    code = (
        "import jaxscale.plan.command, jaxscale.plan.search, jax\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_stages_where_rows_are_few_and_links_between_hosts_slow():
    """Fewer bytes cross hosts between stages than weights; each stage is whole hosts, and idles in the seconds."""
    few = {"batch_size": 32, "seq_len": 4096}
    found = search(preset("llama3-70b"), "h200:16x8", **few)
    assert found.best.mesh.pp > 1 and found.best.seconds < min(e.seconds for e in found.fitting if e.mesh.pp == 1)
    assert {e.mesh.pp for e in found.fitting} <= {1, 2, 4, 8, 16}
    seconds = [
        estimate(preset("llama3-70b"), MeshConfig(pp=8, dp=2, tp=8, pp_micro_batches=m), "h200:16x8", **few).seconds
        for m in (8, 16)
    ]
    # 15 ticks of two rows, 23 of one: what is computed in a tick scales with its rows, and little lies outside.
    assert 1 < seconds[0] / seconds[1] < 15 * 2 / 23
    assert all(mesh.pp == 1 for mesh in meshes(preset("llama3-8b"), find_pod("v5p:4x4x4"), batch_size=64, seq_len=4096))
