"""Experts over several GPUs: the layer beside one GPU, and its transfers beside a plain all_to_all.

    python benchmarks/moe/devices.py                   # all GPUs of this host: ep of them
    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu python benchmarks/moe/devices.py --tiny

The layer is that of layer.py, the same tokens in all, remat dots. GB/s are bytes that leave a device, in one direction:
the (ep - 1) / ep of its rows that an all_to_all sends, and a psum_scatter (the combine of all_gather) too; the ep - 1
times its rows that an all_gather sends (its dispatch). Times are medians of rounds of calls issued back to back.
"""

import argparse
import concurrent.futures
import functools
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import runner
from benchmarks.moe.layer import configuration, inputs, layer, parameters
from jaxscale.mesh import make_mesh
from jaxscale.parallel.expert import compiler_options
from pallas_kernels import ragged_all_to_all

EP = "ep"
ROUND = 0.25  # seconds of the layer: what several devices wait for each other at its beginning is no step's
WAYS = [f"{dispatch}/{chunks}" for dispatch in ("all_gather", "all_to_all") for chunks in (1, 2, 4)]


def transfers(ep: int, n: int, D: int, dtype):
    """(name, function of a device's [n, D], bytes that leave each device)."""
    row = D * jnp.dtype(dtype).itemsize
    yield "all_to_all", lambda x: lax.all_to_all(x, EP, 0, 0, tiled=True), n * row * (ep - 1) / ep
    yield "all_gather", lambda x: lax.all_gather(x, EP, tiled=True), n * row * (ep - 1)
    yield "psum_scatter", lambda x: lax.psum_scatter(x, EP, tiled=True), n * row * (ep - 1) / ep

    def ragged(implementation, x):
        """An even exchange through the ragged primitive, in blocks of 8 rows: what it costs by itself."""
        x = x.reshape(-1, 8, D)
        part = jnp.full((ep,), len(x) // ep, jnp.int32)
        starts = jnp.arange(ep, dtype=jnp.int32) * part
        there = part * lax.axis_index(EP)
        runs = starts, part, there, part
        out = ragged_all_to_all(
            x, jax.ShapeDtypeStruct(x.shape, x.dtype), *runs, axis_name=EP, implementation=implementation
        )
        return out.reshape(n, D)

    size = n * row * (ep - 1) / ep
    yield "ragged_all_to_all", functools.partial(ragged, None), size
    if jax.default_backend() == "tpu":  # where that is remote copies
        yield "ragged_all_to_all of XLA", functools.partial(ragged, "xla"), size


def compare(cfg, mesh, place, rows: int, length: int) -> float:
    """The worst relative error, by norm, of outputs and gradients over ep against one device, where almost all tokens
    choose experts of one device: what has no room there takes further rounds."""
    assert cfg.moe is not None
    params, specs = parameters(cfg)
    first = jnp.arange(cfg.moe.num_experts) < cfg.moe.num_experts // mesh.shape[EP]
    params["router"]["w"] += jnp.where(first, 40.0 / cfg.embed_dim, 0.0).astype(cfg.param_dtype)[None]
    x, grad = inputs(cfg, rows, length)
    x = x + jnp.ones((), x.dtype)
    run = layer(cfg, specs, "dots")
    want = jax.jit(run)(params, x, grad)
    with jax.set_mesh(mesh):
        got = jax.jit(run, compiler_options=compiler_options(jax.default_backend()))(*place(params, x, grad))
    return max(runner.errors(jax.device_get(got), jax.device_get(want)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on any devices")
    parser.add_argument("--transfers", nargs="*", default=None, help="of these alone, by name; without a name none")
    parser.add_argument("--ways", nargs="*", default=WAYS, help="dispatch/chunks of the layer; none: no layer")
    args = parser.parse_args(argv)
    dtype = "float32" if args.tiny else "bfloat16"
    cfg = configuration(args.tiny, dtype)
    assert cfg.moe is not None
    ep = len(jax.devices())
    if ep < 2:
        raise SystemExit("devices.py compares devices with each other: it needs two or more. Got 1")
    rows, length = (2 * ep, 32) if args.tiny else (8, 4096)
    print(json.dumps({"device": jax.devices()[0].device_kind, "devices": ep, "jax": jax.__version__}))
    mesh, failed = make_mesh(ep=ep), 0
    split = NamedSharding(mesh, P(EP))

    n = rows * length // ep * (cfg.moe.top_k if not args.tiny else 1)
    x = jax.device_put(jax.random.normal(jax.random.key(0), (ep * n, cfg.embed_dim), dtype), split)
    for name, f, size in transfers(ep, n, cfg.embed_dim, cfg.dtype):
        if args.transfers is not None and name not in args.transfers:
            continue
        with jax.set_mesh(mesh):
            try:
                ms, _ = runner.measure(jax.shard_map(f, in_specs=P(EP), out_specs=P(EP)), x)
            except Exception as e:
                failed = 1
                print(f"{name:24}FAILED {runner.message(e)}", flush=True)
                continue
        print(f"{name:24}{ms:9.3f} ms {size / ms / 1e6:7.1f} GB/s leave each device", flush=True)
    del x
    if not args.ways:
        return failed

    params, specs = parameters(cfg)
    values = inputs(cfg, rows, length)
    where = {
        "experts": jax.tree.map(lambda _: split, params["experts"]),
        "router": jax.tree.map(lambda _: NamedSharding(mesh, P()), params["router"]),
    }
    place = lambda params, *values: (jax.device_put(params, where), *(jax.device_put(v, split) for v in values))
    alone, spread = (params, *values), place(params, *values)
    dispatch = args.ways[0].split("/")[0]
    worst = compare(configuration(args.tiny, dtype, dispatch=dispatch), mesh, place, ep, 32 if args.tiny else 512)
    print(f"{dispatch}, tokens that crowd on one device: worst relative error {worst:.4f}", flush=True)
    if not worst <= (1e-5 if args.tiny else 2e-2):
        return 1
    lowered = [jax.jit(layer(cfg, specs, "dots")).lower(*alone)]
    for way in args.ways:
        dispatch, chunks = way.split("/")
        part = configuration(args.tiny, dtype, dispatch=dispatch, dispatch_chunks=int(chunks))
        with jax.set_mesh(mesh):
            lowered.append(jax.jit(layer(part, specs, "dots")).lower(*spread))
    options = [{}] + [compiler_options(jax.default_backend())] * len(args.ways)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # side by side: compiling takes longer than running
        first, *others = pool.map(lambda program, more: program.compile(compiler_options=more), lowered, options)
    single, _ = runner.measure(first, *alone, seconds=ROUND)
    print(f"{'one device':34}{single:9.3f} ms", flush=True)
    for way, program in zip(args.ways, others, strict=True):
        ms, _ = runner.measure(program, *spread, seconds=ROUND)
        name = "ep={} {}, {} parts".format(ep, *way.split("/"))
        print(f"{name:34}{ms:9.3f} ms {single / ms:6.3f} x one device", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
