"""Real processes: two that save together, and one that is killed while it saves."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxscale.checkpoint import Checkpointer
from jaxscale.mesh import make_mesh

ROOT = pathlib.Path(__file__).parents[2]

PAIR = """
import sys, time, numpy as np, jax, jax.experimental.multihost_utils
port, index, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxscale.checkpoint import Checkpointer
from jaxscale.mesh import make_mesh
mesh = make_mesh(fsdp=2, tp=2)
def put(values, *spec):
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, P(*spec)), lambda i: values[i])
base = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
state = {"w": put(base, "fsdp", "tp"), "r": put(base + 1), "t": put(base + 2, None, ("tp",))}
state |= {"key": jax.random.key(3), "n": 5}
triple = jax.jit(lambda tree: jax.tree.map(lambda x: x * 3, tree), donate_argnums=0)
with Checkpointer(directory) as ckpt:
    for step in (1, 2, 3):
        assert ckpt.save(step, state, metadata={"step": step})
        state |= triple({k: state[k] for k in "wrt"})
    ckpt.wait()
    assert ckpt.steps() == [2, 3], ckpt.steps()
    target = {"w": jax.ShapeDtypeStruct((64, 6), np.float32, sharding=NamedSharding(mesh, P("tp", "fsdp"))),
              "r": put(base), "t": put(base, "fsdp"), "key": jax.random.key(0), "n": 0}
    back = ckpt.restore(target, 2)
    for name, offset in (("w", 0), ("r", 1), ("t", 2)):
        for shard in back[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, 3 * (base + offset)[shard.index])
    assert back["n"] == 5 and (jax.random.key_data(back["key"]) == jax.random.key_data(jax.random.key(3))).all()
    # A process that fails tells the others at once, and the steps before stay.
    from jaxscale.checkpoint import arrays
    healthy = arrays.local_share
    if index == 1:
        arrays.local_share = lambda array: 1 / 0
    begin = time.monotonic()
    ckpt.save(4, state)
    try:
        ckpt.wait()
    except OSError as error:
        print(f"FAILED {error}", flush=True)  # in one piece: libraries write to the same pipe
    assert time.monotonic() - begin < 20
    assert ckpt.steps() == [2, 3], ckpt.steps()
    arrays.local_share = healthy
    jax.experimental.multihost_utils.sync_global_devices("swept")
    # As on accelerators with room for copies.
    from jaxscale.checkpoint import snapshot
    from jaxscale.checkpoint.beside import DeviceCopies
    snapshot._can_hold = lambda array: False
    DeviceCopies.room_on = lambda self, device: 1 << 20
    assert ckpt.save(4, state)
    state |= triple({k: state[k] for k in "wrt"})
    ckpt.wait()
    assert ckpt.steps() == [2, 3, 4], ckpt.steps()  # 2 was verified
print("DONE")
"""


def environment(devices):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.mark.slow
def test_two_processes_save_one_checkpoint(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, str(port), str(i), str(tmp_path)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=180)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    for process, output in zip(pair, outputs):
        assert process.returncode == 0, output[-3000:]
        assert "FAILED step 4 was not saved" in output
    assert "process 1: division by zero" in outputs[0]
    # One process of another mesh reads what two wrote; the checksums, made from both, hold.
    where = jax.sharding.NamedSharding(make_mesh(tp=2, fsdp=4), jax.sharding.PartitionSpec("fsdp", "tp"))
    array = jax.ShapeDtypeStruct((64, 6), np.float32, sharding=where)
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.verify(3) == []
        assert ckpt.verify(4) == []
        assert ckpt.metadata(2)["step"] == 2
        back = ckpt.restore({"w": array, "r": array, "t": array, "key": jax.random.key(0), "n": 0}, 3)
        last = ckpt.restore({"w": array, "r": array, "t": array}, 4, only=["w", "r", "t"])
    base = np.arange(64 * 6, dtype=np.float32).reshape(64, 6)
    for name, offset in (("w", 0), ("r", 1), ("t", 2)):
        np.testing.assert_array_equal(back[name], 9 * (base + offset))
        np.testing.assert_array_equal(last[name], 27 * (base + offset))


@pytest.mark.slow
def test_kill_9_at_random_moments_of_saving(tmp_path):
    """`python tests/checkpoint/kill.py DIRECTORY 200` does the same for longer."""
    program = pathlib.Path(__file__).with_name("kill.py")
    child = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "run"), "25"],
        env=environment(4),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert child.stdout.startswith("25 kills"), child.stdout
