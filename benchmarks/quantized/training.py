"""One training step of a model of 1 to 2 B parameters in fp8 beside bfloat16, on one GPU.

    python benchmarks/quantized/training.py                                 # smollm2-1.7b, 4 rows of 4,096 tokens
    python benchmarks/quantized/training.py --precisions bf16 fp8 --profile # and the kernels that take longest

Medians over turns of steps issued back to back; each precision in a process of its own on the same card.
"""

import argparse
import collections
import functools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax

TURNS, STEPS = 3, 5


def measure(model_name: str, precision: str, rows: int, seq_len: int, remat: Any, profile: bool, triton: bool) -> dict:
    """Seconds of a step, and its loss after a few."""
    from jaxscale import init_params, make_mesh, make_train_state, make_train_step, put_batch
    from jaxscale.config import OptimizerConfig
    from jaxscale.models import decoder
    from jaxscale.models.presets import preset
    from jaxscale.optim import make_optimizer
    from jaxscale.quantize import training
    from sharding_rules.rules import MEGATRON_FSDP

    model, mesh = preset(model_name), make_mesh(devices=jax.devices()[:1])
    tx, specs = make_optimizer(OptimizerConfig(), 1000), decoder.param_specs(model)
    loss_fn, scales = functools.partial(decoder.loss_fn, cfg=model, remat=remat), None
    options = {} if triton else {"xla_gpu_enable_triton_gemm": False}
    if precision != "bf16":
        parsed = training.parse_precision(precision)
        loss_fn, scales = training.rounded(loss_fn, specs, parsed), training.init_scales(specs, parsed)
        options |= training.compiler_options(parsed, jax.default_backend())
    step = make_train_step(loss_fn, tx, compiler_options=options or None)
    with jax.set_mesh(mesh):
        state = make_train_state(
            init_params(jax.random.key(0), specs, mesh, MEGATRON_FSDP), tx, jax.random.key(1), scales
        )
        tokens = jax.device_get(jax.random.randint(jax.random.key(2), (rows, seq_len + 1), 0, model.vocab_size))
        batch = put_batch({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]}, mesh)
        start = time.perf_counter()
        for _ in range(3):
            state, metrics = step(state, batch)
        loss = float(metrics["loss"])
        compiled, turns = time.perf_counter() - start, []
        for _ in range(TURNS):
            start = time.perf_counter()
            for _ in range(STEPS):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            turns.append((time.perf_counter() - start) / STEPS)
        if profile:
            kernels(lambda: jax.block_until_ready(step(state, batch)))
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "precision": precision + ("" if triton else " without Triton"),
        "device": jax.devices()[0].device_kind,
        "seconds": statistics.median(turns),
        "spread": max(turns) / min(turns) - 1,
        "compile_seconds": compiled,
        "loss": loss,
        "GiB": stats.get("peak_bytes_in_use", 0) / 2**30,
    }


def kernels(run: Any, most: int = 30) -> None:
    """Prints what takes longest on the device while `run()` runs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    total, count = collections.Counter(), collections.Counter()
    for plane in data.planes:
        if "/device:GPU" not in plane.name:
            continue
        for line in plane.lines:
            if "Stream" not in line.name:
                continue
            for event in line.events:
                name = re.sub(r"\d+", "#", event.name)[:90]
                total[name] += event.duration_ns
                count[name] += 1
    print(f"  {sum(total.values()) / 1e6:.3f} ms on the device, {sum(count.values())} kernels")
    for name, ns in total.most_common(most):
        print(f"  {ns / 1e6:9.3f} ms {count[name]:6} x {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-1-7b")
    parser.add_argument("--precisions", nargs="*", default=["bf16", "fp8", "fp8-current"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-triton", action="store_true", help="matmuls by cuBLASLt alone")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each precision")
    parser.add_argument("--one", help="measure this precision here, and print it as JSON")
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(
                measure(args.model, args.one, args.rows, args.seq_len, args.remat, args.profile, not args.no_triton)
            )
        )
        return
    results = []
    for precision in args.precisions:
        command = [sys.executable, __file__, "--one", precision, "--model", args.model, "--rows", str(args.rows)]
        command += ["--seq-len", str(args.seq_len), "--remat", args.remat]
        command += ["--profile"] * args.profile + ["--no-triton"] * args.no_triton
        try:
            # 50 GiB of an 80 GB card: more than JAX takes by itself.
            env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"} | os.environ
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.timeout, check=True, env=env)
        except subprocess.SubprocessError as error:
            print(f"{precision}: {error}", flush=True)
            continue
        *printed, last = done.stdout.splitlines()
        print(precision, *printed, last, sep="\n", flush=True)
        results.append(json.loads(last))
    tokens = args.rows * args.seq_len
    print(f"jax {jax.__version__}, {args.model}, {args.rows} x {args.seq_len} tokens, remat {args.remat}")
    print(f"{'precision':24}{'ms':>9}{'tokens/s':>11}{'x bf16':>8}{'spread':>8}{'GiB':>7}{'loss':>8}  device")
    for r in results:
        ratio = results[0]["seconds"] / r["seconds"]
        print(
            f"{r['precision']:24}{r['seconds'] * 1e3:9.1f}{tokens / r['seconds']:11,.0f}{ratio:8.2f}{r['spread']:8.1%}"
            f"{r['GiB']:7.1f}{r['loss']:8.3f}  {r['device']}"
        )


if __name__ == "__main__":
    main()
