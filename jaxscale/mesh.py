"""Meshes: the six axes, always all present, every one Explicit (shardings are part of array types)."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxscale.config import MeshConfig
from sharding_rules.rules import MESH_AXES

BATCH_AXES = ("dp", "fsdp", "ep")


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None, **sizes: Any) -> Mesh:
    """A mesh over the given devices (default: all), ordered by their topology so that inner axes get the fastest links.

    Takes a MeshConfig or sizes by name, as in `make_mesh(fsdp=4, tp=2)`; one size may be -1 and takes what is left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or an axis has another name.
    """
    devices = list(jax.devices() if devices is None else devices)
    if odd := sizes.keys() - {field.name for field in dataclasses.fields(MeshConfig)}:
        raise ValueError(
            f"mesh {', '.join(sorted(odd))}: the axes are {' '.join(MESH_AXES)}, as in make_mesh(fsdp=4, tp=2)"
        )
    config = (config or MeshConfig(**sizes)).fill(len(devices))
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    kind = devices[0].platform
    num_slices = len({getattr(d, "slice_index", 0) or 0 for d in devices})
    if kind == "tpu" and num_slices > 1:
        # Several slices: the outermost axes that multiply to the number of slices cross the data-centre network.
        across, within = _split_outer(shape, num_slices)
        grid = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    elif kind == "cpu":
        # Simulated devices have no topology; ids keep the order plain.
        grid = mesh_utils.create_device_mesh(shape, sorted(devices, key=lambda d: (d.process_index, d.id)))
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def hosts_along(mesh: Mesh, axis: str) -> int:
    """Over how many sets of devices with fast links among them (hosts of GPUs, slices of TPUs) an axis runs."""
    places = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    homes = [getattr(d, "slice_index", 0) or 0 for d in places.reshape(len(places), -1)[:, 0]]
    part, rest = divmod(len(homes), len(set(homes)))
    neighbours = not rest and all(home == homes[i // part * part] for i, home in enumerate(homes))
    return len(set(homes)) if neighbours else 1


def make_abstract_mesh(config: MeshConfig | None = None, **sizes: Any) -> AbstractMesh:
    """A mesh without devices: enough to trace, check shardings and count bytes for a pod that is not there."""
    config = config or MeshConfig(**sizes)
    shape = tuple(getattr(config, axis) for axis in MESH_AXES)
    if any(size < 1 for size in shape):
        raise ValueError(f"an abstract mesh needs every size, got {dict(zip(MESH_AXES, shape))}; replace the -1")
    return AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _split_outer(shape: tuple[int, ...], num_slices: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Factor `shape` into (across slices, within a slice), taking the slices from the outermost axes."""
    across, left = [], num_slices
    for size in shape:
        take = math.gcd(size, left)
        across.append(take)
        left //= take
    if left != 1:
        raise ValueError(f"mesh {shape} cannot be laid over {num_slices} slices; let an outer axis be a multiple of it")
    return tuple(across), tuple(s // a for s, a in zip(shape, across))
