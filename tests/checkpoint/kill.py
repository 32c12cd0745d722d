"""kill -9 at random moments of saving: `python tests/checkpoint/kill.py DIRECTORY TRIALS`.

Each trial is a real process. It restores the newest step and compares it bit by bit with what that step must hold,
then saves one step after another until it is killed. A step that it reported complete must be found by the next one,
or a newer one. Processes are forked after the imports and before JAX starts its backend: a trial takes about a second.
"""

import os
import random
import select
import signal
import sys
import time
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1  # noqa: F401  imported here so that every fork has it

from jaxscale.checkpoint import Checkpointer
from jaxscale.config import CheckpointConfig
from jaxscale.mesh import make_mesh


def main(directory: str, trials: int) -> None:
    newest, moments, advanced = 0, [], 0
    for trial in range(trials):
        report, child_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(report)
            run(directory, child_end)
        os.close(child_end)
        restored = receive(report)
        if restored is None:
            raise SystemExit(f"trial {trial}: the process ended before it had restored")
        if restored < newest:
            raise SystemExit(f"trial {trial}: step {newest} was complete but {restored} was restored")
        advanced += restored > newest
        moment = random.uniform(0, 0.8)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        moments.append(moment)
        newest = restored
        while (done := receive(report)) is not None:
            newest = done
        os.close(report)
    print(f"{trials} kills, {newest} steps; {advanced} restarts found a step that was complete but not yet reported")


def run(directory: str, report: int) -> None:
    try:
        where = NamedSharding(make_mesh(fsdp=4), PartitionSpec("fsdp"))
        with Checkpointer(directory, CheckpointConfig(keep_last=2)) as ckpt:
            step = ckpt.latest_step() or 0
            if step:
                restored = ckpt.restore({name: jax.device_put(x, where) for name, x in values(0).items()})
                for name, value in values(step).items():
                    np.testing.assert_array_equal(restored[name], value)
                assert ckpt.metadata()["of"] == step
            os.write(report, f"{step}\n".encode())
            while True:
                step += 1
                state = {name: jax.device_put(x, where) for name, x in values(step).items()}
                ckpt.save(step, state, metadata={"of": step})
                if random.random() < 0.5:
                    ckpt.wait()
                    os.write(report, f"{step}\n".encode())
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def values(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {f"w{i}": rng.normal(size=(64, 64 << i)).astype(np.float32) for i in range(4)}


def receive(report: int) -> int | None:
    """The next line, or None at the end."""
    line = b""
    while not line.endswith(b"\n"):
        select.select([report], [], [], 120)
        byte = os.read(report, 1)
        if not byte:
            return None
        line += byte
    return int(line)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*fork.*")
    main(sys.argv[1], int(sys.argv[2]))
