"""Saving and restoring beside stock Orbax: how long training is blocked, bytes per second, peak host memory.

    python benchmarks/checkpoint/bench.py --gib 2                 # CPU: 8 simulated devices
    python benchmarks/checkpoint/bench.py --gib 12 --out /scratch # 1B parameters with Adam moments on a GPU

Each row is a process of its own. A step updates every array and donates the old ones, so what a save costs shows in two
places: in the call ("blocked") and in the steps that follow ("during"). "save" is of one with the machine to itself.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]
ROWS = ("jaxscale", "orbax async", "orbax sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--arrays", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="taken while a save is under way")
    parser.add_argument("--out", default=tempfile.gettempdir())
    parser.add_argument("--row", choices=ROWS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args)))
        return
    heads = ("blocked ms", "step ms", "during ms", "save s", "GB/s", "restore s", "extra GiB")
    print(f"{'':12}" + "".join(f"{head:>11}" for head in heads))
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row, "--gib", args.gib, "--arrays", args.arrays]
        command += ["--steps", args.steps, "--out", args.out]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        r = json.loads(done.stdout.splitlines()[-1])
        figures = (1e3 * r["blocked"], 1e3 * r["step"], 1e3 * r["during"], r["save"], args.gib * 1.074 / r["save"])
        print(f"{row:12}" + "".join(f"{x:11.2f}" for x in (*figures, r["restore"], r["extra"])))
    print(r["machine"])


def measure(args: argparse.Namespace) -> dict:
    if "XLA_FLAGS" not in os.environ and not pathlib.Path("/dev/nvidia0").exists():
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, str(ROOT))
    import importlib.metadata

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = 1024
    rows = int(args.gib * (1 << 30) / 4 / columns / args.arrays) // 8 * 8
    make = jax.jit(lambda k: jax.random.normal(k, (rows, columns)), out_shardings=where)
    state = {f"w{i}": make(jax.random.key(i)) for i in range(args.arrays)}
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999 + 1e-3, tree), donate_argnums=0)
    state = jax.block_until_ready(update(state))

    directory = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=args.out))
    save, wait, restore = saver(args.row, directory)
    save(0, {"warm": jnp.zeros((8, 8))})
    wait()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        state = jax.block_until_ready(update(state))
        times.append(time.perf_counter() - start)
    step = float(np.median(times))

    base, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    save(1, state)
    blocked = time.perf_counter() - start
    during = []
    for _ in range(args.steps):
        tick = time.perf_counter()
        state = jax.block_until_ready(update(state))
        during.append(time.perf_counter() - tick)
    wait()
    start = time.perf_counter()  # once more with the machine to itself
    save(2, state)
    wait()
    total = time.perf_counter() - start
    done.set()
    watcher.join()

    other = NamedSharding(jax.make_mesh((len(jax.devices()),), ("tp",)), PartitionSpec(None, "tp"))
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other) for name, x in state.items()}
    os.sync()
    start = time.perf_counter()
    jax.block_until_ready(restore(2, target))
    restored = time.perf_counter() - start
    shutil.rmtree(directory)
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    return {
        "blocked": blocked,
        "step": step,
        "during": float(np.mean(during)),
        "save": total,
        "restore": restored,
        "extra": (max(peak[0], base) - base) / (1 << 30),
        "machine": f"{len(jax.devices())} x {device}, {os.cpu_count()} cores, {versions}, maxrss "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 20} GiB",
    }


def saver(row: str, directory: pathlib.Path):
    """(save(step, state), wait(), restore(step, target)) of a peer."""
    if row == "jaxscale":
        from jaxscale.checkpoint import Checkpointer

        ckpt = Checkpointer(directory)
        return ckpt.save, ckpt.wait, lambda step, target: ckpt.restore(target, step)
    from orbax.checkpoint import v1 as ocp

    peer = ocp.training.Checkpointer(directory)
    pending = []
    if row == "orbax sync":
        return peer.save, lambda: None, lambda step, target: peer.load(step, target)
    return (
        lambda step, state: pending.append(peer.save_async(step, state)),
        lambda: pending[-1].result(),
        lambda step, target: peer.load(step, target),
    )


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
