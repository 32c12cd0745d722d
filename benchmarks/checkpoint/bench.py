"""Saving and restoring beside stock Orbax and torch.distributed.checkpoint: what a save costs, bandwidth, host memory.

    python benchmarks/checkpoint/bench.py --gib 2                             # CPU: 8 simulated devices
    python benchmarks/checkpoint/bench.py --gib 12 --step-ms 389 --out /scratch  # a GPU: 1B parameters, Adam moments
    python benchmarks/checkpoint/bench.py --rows jaxscale memory  # some rows; a row whose packages are missing says so

Each row is a process of its own. A step updates every array and donates the old ones; with --step-ms it multiplies
matrices for that long as well. What a save costs training is the call ("blocked") and what the ten steps after it take
beyond steps without a save ("waits": donated buffers that are on their way to the host, shared cores); "cost" is both,
and its share of ten steps. One save of the same state goes before, so that pools are filled. "restore" is onto another
mesh, with the page cache dropped; "disk" is what plain reads of the same files reach then. "extra" is the most host
memory beyond that before; of "memory" it is the keeper's two snapshots and what was on its way to them. "device full"
is "jaxscale" where no device memory is left for copies.
"""

import argparse
import concurrent.futures
import functools
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
SIDE = 8192 if pathlib.Path("/dev/nvidia0").exists() else 256  # of the matrices that fill a step
ROWS = ("jaxscale", "device full", "memory", "orbax async", "orbax sync", "torch async", "torch sync")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--arrays", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10, help="taken while a save is under way")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of matrix products in each step")
    parser.add_argument(
        "--quick", action="store_true", help="two saves, not three (save s is of the first, cold one), no restore"
    )
    parser.add_argument("--seconds", type=float, default=1200.0, help="a row that takes longer is given up")
    parser.add_argument("--out", default=tempfile.gettempdir())
    parser.add_argument("--rows", choices=ROWS, nargs="+", default=ROWS)
    parser.add_argument("--row", choices=ROWS, help="measure one row in this process")
    args = parser.parse_args()
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.row:
        print(json.dumps(measure(args)))
        return
    heads = ("blocked ms", "step ms", "waits ms", "cost ms", "of 10 steps", "save s", "GB/s", "restore s", "GB/s")
    print(f"{'':12}" + "".join(f"{head:>12}" for head in (*heads, "disk GB/s", "extra GiB")))
    for row in args.rows:
        command = [sys.executable, __file__, "--row", row, "--gib", args.gib, "--arrays", args.arrays]
        command += ["--steps", args.steps, "--step-ms", args.step_ms, "--out", args.out]
        command += ["--quick"] if args.quick else []
        command = [str(part) for part in command]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds)
        except subprocess.TimeoutExpired:
            print(f"{row:12} did not end within {args.seconds:.0f} s", flush=True)
            continue
        if done.returncode:
            print(f"{row:12} did not run: {done.stderr.strip().splitlines()[-1][:160]}", flush=True)
            continue
        r = json.loads(done.stdout.splitlines()[-1])
        size = args.gib * 1.074
        waits = sum(r["each"]) - len(r["each"]) * r["step"]
        cost = r["blocked"] + waits
        figures = [f"{1e3 * x:.2f}" for x in (r["blocked"], r["step"], waits, cost)]
        figures += [f"{cost / (10 * r['step']):.2%}"]
        figures += [f"{x:.2f}" for x in (r["save"], size / r["save"], r["restore"], size / r["restore"])]
        figures += [f"{r['disk']:.2f}", f"{r['extra']:.2f}"]
        print(f"{row:12}" + "".join(f"{x:>12}" for x in figures), flush=True)
        print(f"{'':12} ms of each step beside the save: " + " ".join(f"{1e3 * x:.1f}" for x in r["each"]))
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
    start = time.perf_counter()
    save(0)
    wait()
    first = time.perf_counter() - start
    steps = [timed(update) for _ in range(5)]
    step = sorted(steps)[2]
    blocked = timed(lambda: save(1))
    during = [timed(update) for _ in range(args.steps)]
    wait()
    total = first
    if not args.quick:
        total = timed(lambda: (save(2), wait()))  # once more with the machine to itself
    done.set()
    watcher.join()
    restored = disk = float("nan")
    if not args.quick:
        drop_cache(directory)
        restored = timed(lambda: restore(2))
        disk = read_bandwidth(directory / "2")
    close()
    machine += f", {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return {
        "blocked": blocked,
        "step": step,
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
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((len(jax.devices()),), ("fsdp",))
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    columns = 1024
    rows = int(args.gib * (1 << 30) / 4 / columns / args.arrays) // 8 * 8
    make = jax.jit(lambda k: jax.random.normal(k, (rows, columns)), out_shardings=where)
    held = {"state": {f"w{i}": make(jax.random.key(i)) for i in range(args.arrays)}}
    square = jnp.zeros((SIDE, SIDE), jnp.bfloat16)  # zeros: the clocks stay where they are

    def multiply(
        a, times
    ):  # a fixed number: XLA would read the condition of another loop back behind what is being copied
        return jax.lax.fori_loop(0, times, lambda _, x: x @ a, a)

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=2)
    def step(tree, a, times):
        return jax.tree.map(lambda x: x * 0.999 + 1e-3, tree), multiply(a, times)

    run = jax.jit(multiply, static_argnums=1)
    jax.block_until_ready(run(square, 20))
    each = timed(lambda: jax.block_until_ready(run(square, 20))) / 20
    times = int(args.step_ms / 1e3 / each)
    other = NamedSharding(jax.make_mesh((len(jax.devices()),), ("tp",)), PartitionSpec(None, "tp"))
    target = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=other) for n, x in held["state"].items()}
    jax.block_until_ready(held["state"])

    def update():
        held["state"], _ = jax.block_until_ready(step(held["state"], square, times))

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
    if row in ("jaxscale", "device full"):
        from jaxscale.checkpoint import Checkpointer
        from jaxscale.checkpoint.beside import DeviceCopies

        if row == "device full":
            DeviceCopies.room_on = lambda self, device: 0
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

    square = torch.zeros(SIDE, SIDE, device=device, dtype=torch.bfloat16)
    spare = torch.empty_like(square)

    def multiply(times):
        for _ in range(times):
            torch.mm(square, square, out=spare)
        if device == "cuda":
            torch.cuda.synchronize()

    multiply(2)
    each = timed(lambda: multiply(20)) / 20
    times = int(args.step_ms / 1e3 / each)

    def update():
        multiply(times)
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
    """GB/s of plain reads of a step's files, eight at a time; 0 where there are none."""
    drop_cache(directory)
    files = [path for path in directory.rglob("*") if path.is_file()]
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
