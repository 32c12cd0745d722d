"""Saving and restoring beside stock Orbax and torch.distributed.checkpoint: blocked time, bandwidth, host memory.

    python benchmarks/checkpoint/bench.py --gib 2                 # CPU: 8 simulated devices
    python benchmarks/checkpoint/bench.py --gib 4 --out /scratch  # a GPU; 12: 1B parameters with Adam moments
    python benchmarks/checkpoint/bench.py --rows jaxscale memory  # some rows; a row whose packages are missing says so

Each row is a process of its own. A step updates every array and donates the old ones, so what a save costs shows in two
places: in the call ("blocked") and in the steps that follow ("during"). One save of the same state goes before, so that
pools are filled. "save" is of one with the machine to itself. "restore" is onto another mesh, with the page cache
dropped; "disk" is what plain reads of the same files reach then. "extra" is the most host memory beyond that before.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).parents[2]
ROWS = ("jaxscale", "memory", "orbax async", "orbax sync", "torch async", "torch sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--arrays", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="taken while a save is under way")
    parser.add_argument("--out", default=tempfile.gettempdir())
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=ROWS)
    parser.add_argument("--row", choices=ROWS, help="measure one row in this process")
    args = parser.parse_args()
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.row:
        print(json.dumps(measure(args)))
        return
    heads = ("blocked ms", "step ms", "during ms", "save s", "GB/s", "restore s", "GB/s", "disk GB/s", "extra GiB")
    print(f"{'':12}" + "".join(f"{head:>11}" for head in heads))
    for row in args.rows:
        command = [sys.executable, __file__, "--row", row, "--gib", args.gib, "--arrays", args.arrays]
        command += ["--steps", args.steps, "--out", args.out]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=1200)
        if done.returncode:
            print(f"{row:12} did not run: {done.stderr.strip().splitlines()[-1][:160]}", flush=True)
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        size = args.gib * 1.074
        figures = [1e3 * r["blocked"], 1e3 * r["step"], 1e3 * r["during"], r["save"], size / r["save"], r["restore"]]
        figures += [size / r["restore"], r["disk"], r["extra"]]
        print(f"{row:12}" + "".join(f"{x:11.2f}" for x in figures), flush=True)
        print(f"{'':12} ms of each step during: " + " ".join(f"{1e3 * x:.1f}" for x in r["each"]))
        print(f"{'':12} {r['machine']}", flush=True)


def measure(args: argparse.Namespace) -> dict:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="checkpoint-bench-", dir=args.out))
    try:
        run = (torch_run if args.row.startswith("torch") else jax_run)(args, directory)
        return timings(args, directory, *run)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def timings(args, directory, update, save, wait, restore, close, machine) -> dict:
    """update() is one step; save(n) starts a save; restore(n) reads it onto another mesh."""
    base, peak, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.01):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    save(0)
    wait()
    step = sorted(timed(update) for _ in range(5))[2]
    blocked = timed(lambda: save(1))
    during = [timed(update) for _ in range(args.steps)]
    wait()
    total = timed(lambda: (save(2), wait()))  # once more with the machine to itself
    done.set()
    watcher.join()
    drop_cache(directory)
    restored = timed(lambda: restore(2))
    disk = read_bandwidth(directory)
    close()
    machine += f", {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return {
        "blocked": blocked,
        "step": step,
        "during": sum(during) / len(during),
        "each": during,  # one long wait and ten slow steps have the same mean
        "save": total,
        "restore": restored,
        "disk": disk,
        "extra": (max(peak[0], base) - base) / (1 << 30),
        "machine": machine,
    }


def jax_run(args: argparse.Namespace, directory: pathlib.Path):
    if "XLA_FLAGS" not in os.environ and not pathlib.Path("/dev/nvidia0").exists():
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    sys.path.insert(0, str(ROOT))
    import importlib.metadata

    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = 1024
    rows = int(args.gib * (1 << 30) / 4 / columns / args.arrays) // 8 * 8
    make = jax.jit(lambda k: jax.random.normal(k, (rows, columns)), out_shardings=where)
    held = {"state": {f"w{i}": make(jax.random.key(i)) for i in range(args.arrays)}}
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0.999 + 1e-3, tree), donate_argnums=0)
    other = NamedSharding(jax.make_mesh((len(jax.devices()),), ("tp",)), PartitionSpec(None, "tp"))
    target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other) for n, x in held["state"].items()}
    jax.block_until_ready(held["state"])

    def update():
        held["state"] = jax.block_until_ready(step(held["state"]))

    update()
    save, wait, restore, close = saver(args.row, directory)
    versions = {"jax": jax.__version__}
    if args.row != "memory":
        versions["orbax-checkpoint"] = importlib.metadata.version("orbax-checkpoint")
    machine = f"{len(jax.devices())} x {jax.devices()[0].device_kind}, {versions}"
    return (
        update,
        lambda n: save(n, held["state"]),
        wait,
        lambda n: jax.block_until_ready(restore(n, target)),
        close,
        machine,
    )


def saver(row: str, directory: pathlib.Path):
    """(save(step, state), wait(), restore(step, target), close()) of a peer."""
    if row == "jaxscale":
        from jaxscale.checkpoint import Checkpointer

        ckpt = Checkpointer(directory)
        return ckpt.save, ckpt.wait, lambda step, target: ckpt.restore(target, step), ckpt.close
    if row == "memory":
        from jaxscale.checkpoint import MemoryCheckpointer

        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        memory = MemoryCheckpointer([address], job="bench", lost=0)
        return memory.save, memory.wait, lambda step, target: memory.restore(target, step), memory.close
    from orbax.checkpoint import v1 as ocp

    peer = ocp.training.Checkpointer(directory)
    pending = []
    load = lambda step, target: peer.load(step, target)
    if row == "orbax sync":
        return peer.save, lambda: None, load, peer.close
    start = lambda step, state: pending.append(peer.save_async(step, state))
    return start, lambda: pending[-1].result(), load, peer.close


def torch_run(args: argparse.Namespace, directory: pathlib.Path):
    """The same bytes on one device; a rank saves and loads them alone."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=0, world_size=1)
    numbers = int(args.gib * (1 << 30) / 4 / args.arrays)
    state = {f"w{i}": torch.randn(numbers, device=device) for i in range(args.arrays)}
    pending = []

    def update():
        for x in state.values():
            x.mul_(0.999).add_(1e-3)
        if device == "cuda":
            torch.cuda.synchronize()

    def save(n):
        if args.row == "torch sync":
            dcp.save(state, checkpoint_id=str(directory / str(n)))
        else:
            pending.append(dcp.async_save(state, checkpoint_id=str(directory / str(n))))

    def restore(n):
        dcp.load({name: torch.empty_like(x) for name, x in state.items()}, checkpoint_id=str(directory / str(n)))

    machine = f"{torch.cuda.get_device_name() if device == 'cuda' else 'cpu'}, torch {torch.__version__}"
    wait = lambda: pending[-1].result() if pending else None
    return update, save, wait, restore, dist.destroy_process_group, machine


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def drop_cache(directory: pathlib.Path) -> None:
    """Writes the files out and drops them from the page cache, as far as the kernel lets us."""
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def read_bandwidth(directory: pathlib.Path) -> float:
    """GB/s of plain reads of the newest step's files, eight at a time; 0 where there are none."""
    drop_cache(directory)
    files = [path for path in (directory / "2").rglob("*") if path.is_file()]
    blocks = [(path, k) for path in files for k in range(0, path.stat().st_size, 64 << 20)]

    def read(block):
        fd = os.open(block[0], os.O_RDONLY)
        size = len(os.pread(fd, 64 << 20, block[1]))
        os.close(fd)
        return size

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        size = sum(pool.map(read, blocks))
    return size / (time.perf_counter() - start) / 1e9


def resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
