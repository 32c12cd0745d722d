"""Memory of a device for one layer's ring attention, forward and backward, compiled for hardware that is not here.

    JAX_PLATFORMS=cpu python benchmarks/context/memory_ahead.py h200                    # needs jax[cuda13]
    JAX_PLATFORMS=cpu python benchmarks/context/memory_ahead.py v5p                     # needs libtpu
    JAX_PLATFORMS=cpu python benchmarks/context/memory_ahead.py h200 1048576 64 usp     # one cell, of any strategy
    python benchmarks/context/memory_ahead.py                                           # the tables of memory_ahead.csv

bfloat16, B1 N16 K16 H128, causal, zigzag. A target alone adds the cells that memory_ahead.csv lacks, half a CPU minute
each: MiB a device of temporaries beyond arguments and results, and of those: the local q, k, v, out, dout, dq, dk, dv.
"""

import csv
import functools
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxscale.config import CPStrategy
from jaxscale.parallel import context

HEADS, HEAD_DIM, DEVICES = 16, 128, 64
STORE = pathlib.Path(__file__).with_suffix(".csv")
LENGTHS = [2**n for n in range(16, 21)]
SIZES = [2, 4, 8, 16, 32, 64]


def devices(target: str):
    if target == "h200":
        config = (ROOT / "benchmarks/attention/h200.txtpb").read_text()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h200", target_config=config, topology=f"1x8x{DEVICES // 8}"
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:4x4x4")
    return np.array(topology.devices)


def memory(target: str, seq_len: int, cp: int, strategy: CPStrategy) -> tuple[float, float]:
    """MiB of temporaries, MiB of arguments and results."""
    mesh = Mesh(devices(target).reshape(-1, cp), ("dp", "cp"), axis_types=(AxisType.Explicit,) * 2)
    spec = P("dp", "cp")
    shape = (DEVICES // cp, seq_len, HEADS, HEAD_DIM)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    attend = functools.partial(context.attention, strategy=strategy, layout="zigzag", causal=True)

    def step(q, k, v, dout):
        out, vjp = jax.vjp(lambda q, k, v: jax.shard_map(attend, out_specs=spec)(q, k, v), q, k, v)
        return out, vjp(dout)

    with jax.set_mesh(mesh):
        stats: Any = jax.jit(step).lower(x, x, x, x).compile().memory_analysis()
    return stats.temp_size_in_bytes / 2**20, (stats.argument_size_in_bytes + stats.output_size_in_bytes) / 2**20


def stored() -> dict[tuple[str, int, int], tuple[int, int]]:
    """(target, T, cp) -> MiB of temporaries, MiB held."""
    with STORE.open() as file:
        rows = list(csv.reader(file))[1:]
    return {(target, int(T), int(cp)): (int(a), int(b)) for target, T, cp, a, b in rows}


def table(target: str, cells) -> str:
    lines = [f"| {target} | " + " | ".join(f"cp {cp}" for cp in SIZES) + " |", "|---" * (len(SIZES) + 1) + "|"]
    for T in LENGTHS:
        found = [cells.get((target, T, cp)) for cp in SIZES]
        lines.append(f"| {T // 1024}k | " + " | ".join(f"{x[0]:,} ({x[1]:,})" if x else "" for x in found) + " |")
    return "\n".join(lines)


def main():
    if not sys.argv[1:]:
        return print("\n\n".join(table(target, stored()) for target in ("h200", "v5p")))
    target, *rest = sys.argv[1:]
    if rest:
        strategy: Any = rest[2] if rest[2:] else "ring"
        return print("{:,.0f} ({:,.0f})".format(*memory(target, int(rest[0]), int(rest[1]), strategy)))
    for seq_len in LENGTHS:
        for cp in SIZES:
            if (target, seq_len, cp) not in stored():
                temporary, held = memory(target, seq_len, cp, "ring")
                with STORE.open("a") as file:
                    print(target, seq_len, cp, round(temporary), round(held), sep=",", file=file)


if __name__ == "__main__":
    main()
