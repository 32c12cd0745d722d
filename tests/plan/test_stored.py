"""A compiled step in a file: another process runs it, with the same bits and without compiling."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxscale import make_mesh
from jaxscale.config import MeshConfig
from jaxscale.models.presets import preset
from jaxscale.plan import stored
from jaxscale.plan.aot import compile_step

MESH = MeshConfig(fsdp=2, tp=2)

CHILD = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
from jaxscale import MeshConfig, make_mesh
from jaxscale.plan.stored import load_step
given = np.load(sys.argv[2])
mesh = make_mesh(MeshConfig(fsdp=2, tp=2))
step = load_step(sys.argv[1], mesh)
with jax.set_mesh(mesh):
    arrays = [jax.device_put(given[f"arr_{i}"], s) for i, s in enumerate(jax.tree.leaves(step.input_shardings[0]))]
    arrays = [jax.random.wrap_key_data(a) if a.dtype == np.uint32 else a for a in arrays]
    compiled.clear()
    args, _ = jax.tree.unflatten(step.in_tree, arrays)
    state, metrics = step(*args)
assert not [name for name in compiled if "compile" in name], compiled
np.savez(sys.argv[3], metrics["loss"], metrics["grad_norm"], *jax.tree.leaves(state.params))
"""


@pytest.fixture(scope="module")
def compiled():
    cfg = dataclasses.replace(preset("tiny"), num_layers=1)
    return compile_step(cfg, MESH, "cpu:4", batch_size=4, seq_len=32)


def test_another_process_runs_it_with_the_same_bits(compiled, rng, tmp_path):
    path = stored.save_step(compiled, tmp_path / "step.bin")

    def values(info):
        if jax.dtypes.issubdtype(info.dtype, jax.dtypes.prng_key):
            return np.array([0, 7], np.uint32)
        return rng.integers(0, 2, info.shape, np.int32) if info.dtype == np.int32 else rng.random(info.shape, "float32")

    args = jax.tree.leaves(compiled.executable.args_info)
    given = [values(info) for info in args]
    np.savez(tmp_path / "given.npz", *given)
    names = [str(tmp_path / n) for n in ("given.npz", "got.npz")]
    subprocess.run([sys.executable, "-c", CHILD, str(path), *names], check=True, timeout=300)
    mesh = make_mesh(MESH, jax.devices()[:4])
    with jax.set_mesh(mesh):
        places = jax.tree.leaves(compiled.executable.input_shardings[0])
        arrays = [jax.device_put(a, s) for a, s in zip(given, places, strict=True)]
        arrays = [jax.random.wrap_key_data(a) if a.dtype == np.uint32 else a for a in arrays]
        (state, batch), _ = jax.tree.unflatten(compiled.executable.in_tree, arrays)
        state, metrics = compiled.executable(state, batch)
    got = np.load(tmp_path / "got.npz")
    expected = [metrics["loss"], metrics["grad_norm"], *jax.tree.leaves(state.params)]
    assert np.isfinite(metrics["loss"]) and len(got.files) == len(expected)
    for i, x in enumerate(expected):
        np.testing.assert_array_equal(got[f"arr_{i}"], x)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"jax": "0.1.0"}, "compiled for jax 0.1.0, here"),
        ({"kind": "v5p"}, "compiled for kind v5p, here cpu"),
        ({"mesh": {"fsdp": 4}}, "compiled for mesh {'fsdp': 4}, here"),
    ],
)
def test_what_it_was_not_compiled_for_is_refused(changes, says, compiled, tmp_path):
    path = stored.save_step(compiled, tmp_path / "step.bin")
    magic, header, program = path.read_bytes().split(b"\n", 2)
    path.write_bytes(b"\n".join([magic, json.dumps(json.loads(header) | changes).encode(), program]))
    with pytest.raises(ValueError, match=says) as error:
        stored.load_step(path, make_mesh(MESH, jax.devices()[:4]))
    assert "\n" not in str(error.value)


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other"
    path.write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(ValueError, match="holds no compiled step"):
        stored.load_step(path, make_mesh(MESH, jax.devices()[:4]))
