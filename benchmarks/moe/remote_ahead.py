"""Compiles experts over ep=4 for TPUs that are not here, by remote copies and by the other dispatches.

    JAX_PLATFORMS=cpu python benchmarks/moe/remote_ahead.py                    # five kinds of TPU
    JAX_PLATFORMS=cpu python benchmarks/moe/remote_ahead.py --targets v5p:2x2x1

Needs libtpu (jaxscale[tpu]) and no device. Of the layer of layer.py (Qwen3-30B-A3B, 32k tokens in all, forward and
backward, remat dots) a row shows what its program sends from each device and what it holds beside its arguments.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from benchmarks import runner

runner.ask_compilers()  # before JAX

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.moe.layer import configuration, inputs, layer, parameters
from jaxscale.mesh import make_mesh
from jaxscale.plan.hlo import census

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
WAYS = ("remote_copy", "all_to_all", "all_gather")
EP = 4


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    failed = 0
    for target in args.targets:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[:EP]
        mesh = make_mesh(devices=list(devices), ep=EP)
        for way in args.ways:
            try:
                seconds, compiled = build(mesh, way, args.tiny)
            except Exception as e:
                failed = 1
                print(f"{target:14}{way:14}FAILED {runner.message(e)}", flush=True)
                continue
            sent = {row.kind: row for row in census(compiled).rows}
            memory = compiled.memory_analysis()
            assert memory is not None
            held = memory.temp_size_in_bytes
            print(f"{target:14}{way:14}{held / 2**20:8.0f} MiB held, compiled in {seconds:.0f} s; sent:", end="")
            print(*(f" {kind} {r.count} x, {r.wire_bytes / 2**20:.1f} MiB;" for kind, r in sent.items()), flush=True)
    return failed


def build(mesh, way: str, tiny: bool):
    cfg = configuration(tiny, "bfloat16", dispatch=way)
    specs = None

    def arrays():
        nonlocal specs
        params, specs = parameters(cfg)
        return params, *inputs(cfg, 8, 32 if tiny else 4096)

    split, whole = NamedSharding(mesh, P("ep")), NamedSharding(mesh, P())
    place = lambda where: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    params, *values = jax.eval_shape(arrays)
    params = {name: jax.tree.map(place(split if name == "experts" else whole), part) for name, part in params.items()}
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = jax.jit(layer(cfg, specs, "dots")).lower(params, *map(place(split), values)).compile()
    return time.perf_counter() - start, compiled


if __name__ == "__main__":
    sys.exit(main())
