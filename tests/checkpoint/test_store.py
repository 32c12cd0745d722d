"""Checkpointer: round trips over meshes, donation, retention, refusals."""

import logging
import os
import pathlib
import subprocess
import sys
import textwrap
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxscale.checkpoint import Checkpointer, arrays, snapshot
from jaxscale.config import CheckpointConfig

from .conftest import abstract, bits


@pytest.mark.parametrize(
    ("source", "target"),
    [("fsdp8", "fsdp8"), ("fsdp8", "tp4dp2"), ("tp4dp2", "fsdp3"), ("fsdp2tp3", "one"), ("one", "fsdp2tp3")],
)
def test_round_trip_over_meshes(tmp_path, make_state, meshes, source, target):
    state, other = make_state(meshes[source]), make_state(meshes[target], count=0)
    with Checkpointer(tmp_path / "ckpt") as ckpt:
        assert ckpt.save(7, state, metadata={"position": 123, "mesh": source})
        ckpt.wait()
        restored = ckpt.restore(abstract(other))
        assert ckpt.metadata()["position"] == 123
        assert ckpt.verify() == []
    assert bits(restored) == bits(state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(other), strict=True):
        if isinstance(want, jax.Array):
            assert got.sharding.is_equivalent_to(want.sharding, want.ndim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4", "bool"])
@pytest.mark.parametrize("hold", [True, False], ids=["held", "copied"])
def test_the_state_may_be_donated_at_once(tmp_path, meshes, rng, monkeypatch, dtype, hold):
    """Held, as on the CPU, and copied, as on an accelerator."""
    if not hold:
        monkeypatch.setattr(snapshot, "_can_hold", lambda array: False)
    mesh = meshes["tp4dp2"]
    specs = {"split": ("tp",), "both": ("tp", "dp"), "whole": ()}
    state = {
        name: jax.device_put(
            rng.integers(0, 2, (512, 256)).astype(jnp.dtype(dtype)), NamedSharding(mesh, PartitionSpec(*spec))
        )
        for name, spec in specs.items()
    }
    change = {"bool": jnp.logical_not, "int4": lambda x: 1 - x}.get(dtype, lambda x: x * 3 + 1)
    step = jax.jit(lambda tree: jax.tree.map(change, tree), donate_argnums=0)
    state = jax.block_until_ready(step(state))  # compiled: the next call starts to overwrite at once
    for trial in range(3):
        want = bits(jax.tree.map(jnp.copy, state))  # of a copy: a numpy view would keep the buffers from being reused
        with Checkpointer(tmp_path / str(trial)) as ckpt:
            ckpt.save(1, state)
            donated, state = state, step(state)
            state = step(step(state))
            assert hold or all(x.is_deleted() for x in donated.values())
            ckpt.wait()
            assert bits(ckpt.restore(abstract(state))) == want
        assert bits(jax.tree.map(jnp.copy, state)) != want


def test_keep_last_and_keep_every(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=2, keep_every=4)) as ckpt:
        for step in range(1, 8):
            assert ckpt.save(step, {"x": jnp.full(3, float(step))})
        ckpt.wait()
        assert ckpt.steps() == [4, 6, 7]
        assert not ckpt.save(7, {"x": jnp.zeros(3)})
        for step in ckpt.steps():
            assert ckpt.restore({"x": jnp.zeros(3)}, step)["x"][0] == step


def test_the_last_verified_step_is_kept(tmp_path):
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1)) as ckpt:
        ckpt.save(1, {"x": jnp.zeros(3)})
        assert ckpt.verify(1) == []
        for step in (2, 3, 4):
            ckpt.save(step, {"x": jnp.zeros(3)})
        ckpt.wait()
        assert ckpt.steps() == [1, 4]


def test_another_tree_is_refused_with_the_differences(tmp_path):
    saved = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "c": {"d": jnp.int32(1)}}
    wanted = {"a": jnp.zeros((2, 5)), "b": jnp.zeros(4, jnp.bfloat16), "e": jnp.zeros(1)}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, saved)
        with pytest.raises(ValueError) as caught:
            ckpt.restore(wanted)
    message = str(caught.value)
    for part in (
        "1 missing: e",
        "1 extra: c/d",
        "a is float32[2,3] where float32[2,5]",
        "b is float32[4] where bfloat16",
    ):
        assert part in message
    assert "\n" not in message


def test_half_written_steps_are_ignored_and_cleaned(tmp_path, caplog):
    state = {"x": jnp.arange(4.0)}
    with Checkpointer(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, state)
    (tmp_path / "2" / "commit.json").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3.orbax-checkpoint-tmp" / "data").write_bytes(b"half")
    (tmp_path / "4").mkdir()  # not ours: nothing says that jaxscale wrote it
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "removing").touch()  # a removal that was killed
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.steps() == [1]
        assert bits(ckpt.restore(state)) == bits(state)
        assert (tmp_path / "2").exists()  # a reader leaves everything as it is
        ckpt.save(6, state)
        ckpt.wait()
        assert ckpt.steps() == [1, 6]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4", "6"]


def test_missing_and_unwritable_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .*nowhere; it has none"):
        Checkpointer(tmp_path / "nowhere").restore({"x": jnp.zeros(1)})
    with Checkpointer(tmp_path / "run") as ckpt:
        ckpt.save(1, {"x": jnp.zeros(1)})
        with pytest.raises(FileNotFoundError, match=r"no complete checkpoint of step 9 in .* it has \[1\]"):
            ckpt.metadata(9)
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"checkpoint directory .*file/run cannot be written"):
        Checkpointer(tmp_path / "file" / "run").save(1, {"x": jnp.zeros(1)})


def test_a_second_writer_is_refused(tmp_path):
    """Here, in another process, and after a kill; readers are welcome at all times."""
    state = {"x": jnp.arange(3.0)}
    with Checkpointer(tmp_path) as first, Checkpointer(tmp_path) as second:
        first.save(1, state)
        first.wait()
        refusal = rf"process {os.getpid()} on .* writes checkpoints to {tmp_path}; a directory has one writer"
        with pytest.raises(OSError, match=refusal):
            second.save(2, state)
        assert bits(second.restore(state)) == bits(state)
        child = run_child(
            """
            try:
                Checkpointer(sys.argv[1]).save(2, {"x": small})
            except OSError as error:
                print("REFUSED", error, flush=True)
            ckpt = Checkpointer(sys.argv[1] + "/killed")
            ckpt.save(2, {"x": small}); ckpt.wait()
            os.kill(os.getpid(), signal.SIGKILL)
            """,
            tmp_path,
        )
        assert f"REFUSED process {os.getpid()} on" in child.stdout, child.stderr
        assert child.returncode == -9
        assert first.steps() == [1]
    assert (tmp_path / "killed" / ".writer").exists()
    with Checkpointer(tmp_path / "killed") as ckpt:  # a dead writer holds nothing
        assert ckpt.steps() == [2]
        ckpt.save(3, state)
        ckpt.wait()
        # Where there are no locks, the one who came last may write.
        (tmp_path / "killed" / ".writer").write_text('{"pid": 77, "host": "far", "since": "2026-01-01T00:00:00"}')
        ckpt.save(4, state)
        with pytest.raises(
            OSError, match=r"step 4 was not saved .* process 77 on far since 2026-01-01T00:00:00 UTC writes"
        ):
            ckpt.wait()
        assert ckpt.steps() == [2, 3]


def test_a_newer_format_is_refused(tmp_path):
    from jaxscale.checkpoint import files, reading

    state = {"x": jnp.zeros(1)}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state)
        ckpt.wait()
        commit = files.read_json(ckpt.directory / "1" / "commit.json")
        assert commit is not None
        files.write_json(ckpt.directory / "1" / "commit.json", commit | {"format": reading.FORMAT + 1})
        with pytest.raises(ValueError, match="upgrade"):
            ckpt.restore(state)


def test_logical_axes_are_written_down(tmp_path):
    params = {"embed": jnp.zeros((4, 2)), "norm": jnp.zeros(2)}
    state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "norm": jnp.zeros(3)}
    with Checkpointer(tmp_path, axes={"embed": ("vocab", "embed"), "norm": ("embed",)}) as ckpt:
        ckpt.save(1, state)
        records = ckpt.metadata()["jaxscale"]["arrays"]
    named = {name: record["axes"] for name, record in records.items() if "axes" in record}
    roots = ("params", "opt_state/0/mu", "opt_state/0/nu")
    assert named == {f"{r}/embed": ["vocab", "embed"] for r in roots} | {f"{r}/norm": ["embed"] for r in roots}
    assert records["params/embed"]["crc32"] == zlib.crc32(np.zeros((4, 2), np.float32).tobytes())


def test_what_cannot_be_saved_says_so(tmp_path):
    with Checkpointer(tmp_path) as ckpt:
        with pytest.raises(ValueError, match="no arrays"):
            ckpt.save(1, {})
        with pytest.raises(TypeError, match="JSON"):
            ckpt.save(1, {"x": jnp.zeros(1)}, metadata={"f": print})
        with pytest.raises(ValueError, match="two leaves are named 'a/b'"):
            ckpt.save(1, {"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})
        with pytest.raises(NotImplementedError, match="uint4"):
            ckpt.save(1, {"x": jnp.zeros(1, jnp.uint4)})


@pytest.mark.parametrize("dtype", ["int4", "float8_e4m3fn", "bfloat16", "bool", "uint8", "int16", "float16"])
def test_narrow_dtypes(tmp_path, rng, dtype):
    state = {"x": jnp.asarray(rng.integers(0, 7, (5, 6)).astype(jnp.dtype(dtype)))}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state)
        assert bits(ckpt.restore(abstract(state))) == bits(state)
        assert ckpt.verify() == []


CHILD = """
    import os, signal, resource, sys, logging
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax.numpy as jnp
    from jaxscale.checkpoint import Checkpointer, arrays
    from jaxscale.config import CheckpointConfig
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    small, big = jnp.arange(1000.0), jnp.ones((1 << 20,)) * 3
"""


def run_child(code, *args):
    root = pathlib.Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD) + textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""},
    )


def test_a_full_disk_leaves_the_last_good_step(tmp_path):
    """The kernel refuses to let a file grow, as a full disk does, while step 2 and 3 are saved."""
    child = run_child(
        """
        ckpt = Checkpointer(sys.argv[1], CheckpointConfig(keep_last=3))
        ckpt.save(1, {"x": small}); ckpt.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        assert ckpt.save(2, {"x": big})           # fails in the background
        assert ckpt.save(3, {"x": big})           # training goes on
        try:
            ckpt.wait()
        except OSError as error:
            print("WAIT", error)
        assert ckpt.steps() == [1], ckpt.steps()
        assert (ckpt.restore({"x": small})["x"] == small).all()
        print("LEFT", sorted(name for name in os.listdir(sys.argv[1]) if name != ".writer"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert ckpt.save(4, {"x": big})           # space again
        ckpt.close()
        assert ckpt.steps() == [1, 4]
        stop = Checkpointer(sys.argv[1] + "/stop", on_error="stop")
        stop.save(1, {"x": small}); stop.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        stop.save(2, {"x": big})
        try:
            stop.save(3, {"x": big})
        except OSError as error:
            print("STOP", error)
        stop.save(4, {"x": small}); stop.close()  # raised once, not again
        assert stop.steps() == [1, 4]
        """,
        tmp_path / "run",
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "LEFT ['1']" in child.stdout and "Traceback" not in child.stderr
    for line in child.stdout.splitlines():
        if line.startswith(("WAIT", "STOP")):
            assert "was not saved" in line
            assert "the newest complete step is 1" in line
    assert child.stdout.count("was not saved") == 2


def test_a_full_disk_while_converting(tmp_path):
    """One line, nothing is left, and the process lives: the pages of a mapped file were there before it was filled."""
    child = run_child(
        """
        from jaxscale.checkpoint import convert_step
        from jaxscale.checkpoint import layout as lay
        with Checkpointer(sys.argv[1]) as ckpt:
            ckpt.save(1, {"x": big})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        for layout in ((), (lay.rename("x", "y"),)):
            try:
                convert_step(sys.argv[1], sys.argv[2], layout=layout)
            except OSError as error:
                print("ERROR", error)
        print("LEFT", os.listdir(sys.argv[2]))
        """,
        tmp_path / "run",
        tmp_path / "new",
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.count(f"ERROR {tmp_path / 'new'} could not be written: ") == 2
    assert "LEFT []" in child.stdout


def test_import_of_jaxscale_does_not_import_orbax():
    child = run_child("import jaxscale; assert not any(m.startswith('orbax') for m in sys.modules)".strip())
    assert child.returncode == 0, child.stderr


def test_failures_are_logged(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.ERROR, "jaxscale.checkpoint"), Checkpointer(tmp_path) as ckpt:
        with monkeypatch.context() as patch:
            patch.setattr(arrays, "local_share", lambda array: 1 / 0)
            ckpt.save(1, {"x": jnp.zeros(3)})
            ckpt.save(2, {"x": jnp.zeros(3)})
            with pytest.raises(OSError, match="step 2 was not saved"):
                ckpt.wait()
        ckpt.save(3, {"x": jnp.zeros(3)})
    assert "step 1 was not saved" in caplog.text
    assert Checkpointer(tmp_path).steps() == [3]


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, None])
def test_a_step_is_a_whole_number(tmp_path, step):
    """Anything else would be written under a name that nobody lists."""
    with Checkpointer(tmp_path) as ckpt:
        with pytest.raises(ValueError, match=r"a step is a whole number from 0 on. Got "):
            ckpt.save(step, {"w": np.ones(3)})
        assert ckpt.steps() == []


@pytest.mark.parametrize("leaf", ["text", np.array([{}], dtype=object), np.array(["2026-11-27"], "datetime64[D]")])
def test_what_is_no_number_is_refused_at_once(tmp_path, leaf):
    with Checkpointer(tmp_path) as ckpt:
        with pytest.raises(ValueError, match=r"other/leaf holds .*; a checkpoint holds numbers"):
            ckpt.save(1, {"w": np.ones(3), "other": {"leaf": leaf}})
        with pytest.raises(ValueError, match="all arrays of the state are empty"):
            ckpt.save(1, {"w": np.ones((0, 3))})
        assert ckpt.steps() == []
