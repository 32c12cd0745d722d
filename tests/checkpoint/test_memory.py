"""Checkpoints in memory: real keeper processes, killed trainers, lost hosts."""

import concurrent.futures
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jaxscale.checkpoint import CorruptCheckpointError, MemoryCheckpointer
from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.memory import keeper, wire

from .conftest import abstract, bits, free_addresses

ROOT = pathlib.Path(__file__).parents[2]


def pid_of(address):
    with wire.Connection(address, "job", seconds=10) as own:
        return own.ask("status")[0]["pid"]


def everywhere(clients, call):
    """What all hosts call at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(call, clients))


def pair(addresses):
    """What makes a host's client, and those of two hosts."""
    client = lambda host: MemoryCheckpointer(addresses, job="job", lost=1, host=host, devices=jax.devices()[:1])
    return client, everywhere(range(2), client)


@pytest.mark.slow
def test_two_of_eight_hosts_are_rebuilt(hosts, make_state, meshes, rng):
    """Each device is a host with a keeper process of its own; two keepers are killed, and their memory with them."""
    addresses = hosts(8)
    states = {step: make_state(meshes["fsdp8"], count=step) for step in (1, 2, 3)}

    def client(host):
        return MemoryCheckpointer(addresses, job="job", lost=2, host=host, devices=[jax.devices()[host]])

    clients = everywhere(range(8), client)
    for step, state in states.items():
        everywhere(clients, lambda c: c.save(step, state, metadata={"position": step}))  # noqa: B023
        everywhere(clients, lambda c: c.wait())
    assert clients[0].steps() == [2, 3]
    gone = rng.choice(8, 2, replace=False).tolist()
    for host in gone:
        os.kill(pid_of(addresses[host]), signal.SIGKILL)
        clients[host]._own.close()
    time.sleep(0.1)
    for host in gone:
        clients[host] = client(host)  # starts an empty keeper
    assert clients[gone[0]].steps() == [2, 3]
    target = abstract(make_state(meshes["tp4dp2"], count=0))  # onto another mesh
    for restored in everywhere(clients, lambda c: c.restore(target)):
        assert bits(restored) == bits(states[3])
    assert [c.metadata()["position"] for c in clients] == [3] * 8
    # The parity is whole again: two others may go.
    everywhere(clients, lambda c: c._own.ask("wait_protected", step=3))
    others = rng.choice([host for host in range(8) if host not in gone], 2, replace=False).tolist()
    for host in others:
        os.kill(pid_of(addresses[host]), signal.SIGKILL)
        clients[host]._own.close()
    time.sleep(0.1)
    for host in others:
        clients[host] = client(host)
    for restored in everywhere(clients, lambda c: c.restore(target)):
        assert bits(restored) == bits(states[3])
    # Three are too many, and it says so.
    for host in (0, 1, 2):
        os.kill(pid_of(addresses[host]), signal.SIGKILL)
        clients[host]._own.close()
    with pytest.raises(FileNotFoundError, match=r"no step in the memory of the 8 hosts .* restore from storage"):
        clients[5].restore(target)
    for c in clients[3:]:
        c.close()


TRAINER = """
import sys, os, time, numpy as np, jax
port, index, addresses = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=index)
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxscale.checkpoint import MemoryCheckpointer
from jaxscale.mesh import make_mesh
mesh = make_mesh(fsdp=2, tp=2)
def say(word, step):  # in one piece: libraries write to the same pipe
    os.write(1, f"{word} {step}\\n".encode())
def put(values, *spec):
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, P(*spec)), lambda i: values[i])
base = np.arange(512 * 60, dtype=np.float32).reshape(512, 60)
start = {"w": put(base, "fsdp", "tp"), "t": put(2 * base, "tp"), "r": put(base[:3]), "key": jax.random.key(3), "n": 0}
update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
memory = MemoryCheckpointer(addresses, job="job", lost=1)
step, state = 0, start
if memory.latest_step() is not None:
    state = memory.restore(start)
    step = state["n"]
    assert memory.metadata()["step"] == step
    for name, want in (("w", base), ("t", 2 * base), ("r", base[:3])):
        for shard in state[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, (want + step)[shard.index])
say("FROM", step)
goal = step + int(sys.argv[4])
while step < goal:
    state |= update({k: state[k] for k in "wtr"}) | {"n": state["n"] + 1}
    step += 1
    memory.save(step, state, metadata={"step": step})
    if step % 3 == 0:
        memory.wait()
        say("SAFE", step)
memory.close()
say("DONE", step)
"""


def start_trainers(addresses, steps):
    port = free_addresses(1)[0].rpartition(":")[2]
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, port, str(i), ",".join(addresses), str(steps)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]


def run_until_killed(addresses, *, also=None):
    """(step it began from, last step said to be safe) of a job that is killed -9 at a random moment of saving."""
    pair = start_trainers(addresses, 1_000_000)
    lines = []
    try:
        while len(numbers("SAFE", "".join(lines))) < 3:
            line = pair[0].stdout.readline()
            assert line, "".join(lines) + pair[1].communicate()[0][-3000:]
            lines.append(line)
        time.sleep(random.uniform(0, 0.1))
        pair[1].send_signal(signal.SIGKILL)  # one process is lost; the launcher then ends the others
        if also is not None:
            os.kill(pid_of(also), signal.SIGKILL)
        time.sleep(0.2)
    finally:
        for process in pair:
            process.kill()
            rest = process.communicate()[0]
            lines += [rest] if process is pair[0] else []
    return numbers("FROM", "".join(lines))[0], max(numbers("SAFE", "".join(lines)))


def numbers(word, text):
    """A child's report; other lines, of its libraries, may stand before it on the same line."""
    return [int(n) for n in re.findall(rf"{word} (\d+)\n", text)]


@pytest.mark.slow
def test_training_comes_back_from_memory(hosts):
    """A lost process, then a lost host; no directory is ever written."""
    addresses = hosts(2)
    began, safe = run_until_killed(addresses)
    assert began == 0
    again, safer = run_until_killed(addresses, also=addresses[1])
    assert again >= safe >= 9
    last = start_trainers(addresses, 6)
    outputs = [process.communicate(timeout=120)[0] for process in last]
    for process, output in zip(last, outputs):
        assert process.returncode == 0, output[-3000:]
        (resumed,) = numbers("FROM", output)
        assert resumed >= safer > again
        assert numbers("DONE", output) == [resumed + 6]
    for address in addresses:  # a job that ended well leaves nothing behind
        with pytest.raises(wire.KeeperError, match="no keeper answers"):
            wire.Connection(address, "job", seconds=0)


def test_one_host_through_a_layout_and_in_part(hosts, rng):
    (address,) = hosts(1)
    state = {"params": {"w": rng.normal(size=(6, 4)).astype(np.float32), "b": np.arange(3)}, "key": jax.random.key(5)}
    with MemoryCheckpointer([address], job="job", lost=0) as memory:
        with pytest.raises(FileNotFoundError, match="no step in the memory of the 1 hosts of job 'job'"):
            memory.restore(state)
        memory.save(4, state)
        memory.wait()
        turned = {"params": {"w": np.zeros((4, 6), np.float32), "b": np.zeros(3, int)}, "key": jax.random.key(0)}
        restored = memory.restore(turned, layout=(lay.transpose("w", (1, 0)),))
        np.testing.assert_array_equal(restored["params"]["w"], state["params"]["w"].T)
        assert bits(restored["key"]) == bits(state["key"])
        assert memory.restore(state, only="params/b")["params"]["w"] is state["params"]["w"]
        with pytest.raises(ValueError, match=r"do not fit: 1 missing: extra"):
            memory.restore(state | {"extra": np.zeros(1)})
        with pytest.raises(OSError, match=r"this keeper is of job 'job'"):
            MemoryCheckpointer([address], job="another", lost=0)
    with MemoryCheckpointer([address], job="job", lost=0) as memory:
        memory.save(4, state)
        memory.wait()
        second = MemoryCheckpointer([address], job="job", lost=0)  # takes over
        memory.save(5, state)
        with pytest.raises(OSError, match="another process saves to the keeper of host 0 of job 'job'"):
            memory.wait()
        # A bit of the shared memory turns over, in the first array after the key.
        path = second._own.ask("recover", step=4)[0]["path"]
        with open(path, "r+b") as shared:
            shared.seek(64)
            byte = shared.read(1)
            shared.seek(64)
            shared.write(bytes([byte[0] ^ 4]))
        with pytest.raises(CorruptCheckpointError, match="step 4 in the memory of host 0 is not as it was saved"):
            second.restore(state)
        second.close(stop=False)


def test_a_keeper_that_ends_is_replaced(hosts, rng, caplog):
    """Training goes on, the step that was lost counts as not saved, and the next one is whole again on both hosts."""
    addresses = hosts(2)
    states = {step: {"x": jax.numpy.asarray(rng.normal(size=(2, 100)).astype(np.float32))} for step in range(1, 6)}
    client, clients = pair(addresses)

    def save(step):
        everywhere(clients, lambda c: c.save(step, states[step]))

    for step in (1, 2):
        save(step)
        everywhere(clients, lambda c: c.wait())
    os.kill(pid_of(addresses[1]), signal.SIGKILL)
    save(3)
    everywhere(clients, lambda c: c._background.finish())
    assert "starting another, which holds nothing yet" in caplog.text
    save(4)
    save(5)
    everywhere(clients, lambda c: c.wait())
    assert 5 in clients[0].steps() and 2 not in clients[0].steps()
    os.kill(pid_of(addresses[0]), signal.SIGKILL)
    clients[0]._own.await_end()
    clients[0]._own.close()
    clients[0] = client(0)
    for restored in everywhere(clients, lambda c: c.restore(abstract(states[1]))):
        assert bits(restored) == bits(states[5])
    everywhere(clients, lambda c: c.wait())
    everywhere(clients, lambda c: c.close())


def test_a_step_that_was_dropped_is_saved_again(hosts, rng):
    """A host alone saved a step before the job went back: what became of that one is nothing to the step of now."""
    addresses = hosts(2)
    states = {step: {"x": rng.normal(size=50)} for step in (1, 2, 3)}
    client, clients = pair(addresses)
    everywhere(clients, lambda c: c.save(1, states[1]))
    everywhere(clients, lambda c: c.wait())
    clients[0].save(2, states[2])  # it alone
    clients[0].close(stop=False)
    clients[0] = client(0)
    for restored in everywhere(clients, lambda c: c.restore(states[1], 1)):
        assert bits(restored) == bits(states[1])
    time.sleep(keeper.WAIT_SECONDS + 1)  # its keeper learns that there is no such step elsewhere
    clients[1].save(2, states[3])
    time.sleep(0.5)  # and is asked for it before the new one is there
    clients[0].save(2, states[3])
    everywhere(clients, lambda c: c.wait())
    for restored in everywhere(clients, lambda c: c.restore(states[1])):
        assert bits(restored) == bits(states[3])
    everywhere(clients, lambda c: c.close())


def test_a_snapshot_that_cannot_be_protected_leaves_the_one_before(hosts, rng, caplog, monkeypatch):
    """The other host is gone for good: a new snapshot takes the place of the one that was not protected."""
    addresses = hosts(2)
    states = {step: {"x": rng.normal(size=50)} for step in (1, 2, 3)}
    _, clients = pair(addresses)
    everywhere(clients, lambda c: c.save(1, states[1]))
    everywhere(clients, lambda c: c.wait())
    clients[1].save(2, states[2])  # it alone: host 0 ends
    clients[1]._background.finish()
    os.kill(pid_of(addresses[0]), signal.SIGKILL)
    clients[1].save(3, states[3])
    clients[1]._background.finish()
    assert "step 2 is not in the memory of every host" in caplog.text
    status = clients[1]._own.ask("status")[0]
    assert status["data"] == [1, 3] and status["protected"] == [1]
    for c in clients:
        c._own.close()
        c._background.close()
