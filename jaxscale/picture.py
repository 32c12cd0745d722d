"""Pictures of shardings for notebooks: which device holds which part of an array."""

import html
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

WIDTH, HEIGHT, MARGIN = 360, 200, 34  # pixels of the array, and around it


def show(
    mesh: Mesh | AbstractMesh,
    what: Any,
    shape: Sequence[int] | None = None,
    *,
    names: Sequence[str] = (),
    title: str = "",
) -> "Picture":
    """Which devices hold which part of an array. Two of its dims are drawn: those that are split, or the last two.

        show(mesh, params["layers"]["mlp"]["w_up"], names=("layers", "embed", "mlp"))
        show(mesh, P("fsdp", "tp"), (4096, 14336))

    Args:
      mesh: also one without devices: they are then numbered in the mesh's order.
      what: an array (or ShapeDtypeStruct) on the mesh, or a PartitionSpec.
      shape: of the array that a PartitionSpec splits.
      names: of its dims.

    Raises:
      ValueError: a PartitionSpec without a shape, a dim that does not divide, an array on another mesh.
    """
    if not isinstance(what, P):
        spec, sizes = _spec_of(what, mesh), tuple(what.shape)
    elif shape is None:
        raise ValueError(f"{what} says nothing about sizes; pass the shape, as in show(mesh, {what}, (64, 64))")
    else:
        spec, sizes = what, tuple(shape)
    entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in (*spec, *[None] * (len(sizes) - len(spec)))]
    if len(entries) != len(sizes):
        raise ValueError(f"{spec} has {len(spec)} entries for an array of {len(sizes)} dims {sizes}")
    parts = [math.prod(mesh.shape[axis] for axis in entry) for entry in entries]
    for size, entry, count in zip(sizes, entries, parts):
        if size % count:
            raise ValueError(f"a dim of {size} is not divisible by {'*'.join(entry)}={count}; see {spec} on {sizes}")
    named = (*names, *(f"dim {d}" for d in range(len(names), len(sizes))))
    labels = [
        f"{name} = {size}" + (f", over {', '.join(f'{a}={mesh.shape[a]}' for a in entry)}" if count > 1 else "")
        for name, size, entry, count in zip(named, sizes, entries, parts)
    ]
    held: dict[tuple[int, ...], list[int]] = {}
    for at, device in np.ndenumerate(_device_ids(mesh)):
        where = dict(zip(mesh.shape, at))
        held.setdefault(tuple(_index(entry, where, mesh.shape) for entry in entries), []).append(int(device))
    return Picture(title or f"{spec} on {_mesh_text(mesh)}", tuple(labels), tuple(parts), held)


class Picture(NamedTuple):
    """Notebooks show it as a drawing, `print` as a list.

    Attributes:
      labels: for each dim its name, size and what splits it.
      parts: into how many parts each dim is split.
      held: the part along each dim -> the devices that hold it.
    """

    title: str
    labels: tuple[str, ...]
    parts: tuple[int, ...]
    held: dict[tuple[int, ...], list[int]]

    def _repr_html_(self) -> str:
        return f"<figure style='margin:0'><figcaption>{html.escape(self.title)}</figcaption>{self.svg()}</figure>"

    def __str__(self) -> str:
        lines = [f"  part {', '.join(map(str, at))}: devices {_ranges(ids)}" for at, ids in sorted(self.held.items())]
        return "\n".join([self.title, *(f"  {label}" for label in self.labels), *lines])

    def svg(self) -> str:
        """The drawing alone."""
        rows, columns = self._drawn()
        num_rows, num_columns = (1 if dim is None else self.parts[dim] for dim in (rows, columns))
        boxes: dict[tuple[int, int], list[int]] = {}
        for at, ids in self.held.items():
            box = (0 if rows is None else at[rows], 0 if columns is None else at[columns])
            boxes.setdefault(box, []).extend(ids)
        width, height = WIDTH / num_columns, HEIGHT / num_rows
        font = max(5.0, min(15.0, height * 0.5, width * 0.3))
        out = [
            f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH + MARGIN}' height='{HEIGHT + MARGIN}' "
            f"font-family='sans-serif' font-size='12' text-anchor='middle' fill='currentColor'>"
        ]
        if columns is not None:
            out.append(_text(MARGIN + WIDTH / 2, 20, self.labels[columns]))
        if rows is not None:
            y = MARGIN + HEIGHT / 2
            out.append(_text(20, y, self.labels[rows], f"transform='rotate(-90 20 {y:g})'"))
        for i, j in itertools.product(range(num_rows), range(num_columns)):
            x, y = MARGIN + j * width, MARGIN + i * height
            hue = 360 * (i * num_columns + j) / (num_rows * num_columns)
            out.append(
                f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' fill='hsl({hue:.0f},45%,45%)' "
                f"stroke='white'/>"
            )
            style = f"fill='white' font-size='{font:g}' dominant-baseline='central'"
            out.append(_text(x + width / 2, y + height / 2, _ranges(sorted(boxes[i, j])), style))
        return "".join([*out, "</svg>"])

    def _drawn(self) -> tuple[int | None, int | None]:
        """The dims that are rows and columns: those split most, else the last ones."""
        dims = sorted(range(len(self.parts)), key=lambda d: (self.parts[d] > 1, d))[-2:]
        rows, columns = [None] * (2 - len(dims)) + sorted(dims)
        return rows, columns


def _spec_of(x: Any, mesh: Mesh | AbstractMesh) -> P:
    sharding = x.sharding
    if isinstance(sharding, NamedSharding) and dict(sharding.mesh.shape) != dict(mesh.shape):
        raise ValueError(f"the array lies on mesh {_mesh_text(sharding.mesh)}, not on {_mesh_text(mesh)}")
    if not isinstance(sharding, NamedSharding):
        raise ValueError(f"the array lies on {sharding}, not on mesh {_mesh_text(mesh)}; jax.device_put it there")
    return sharding.spec


def _device_ids(mesh: Mesh | AbstractMesh) -> np.ndarray:
    if isinstance(mesh, Mesh):
        return np.vectorize(lambda device: device.id, otypes=[int])(mesh.devices)
    return np.arange(mesh.size).reshape(tuple(mesh.shape.values()))


def _index(entry: Sequence[str], where: dict[str, int], sizes: Any) -> int:
    """Which part of a dim a device holds: the first of several axes is the slowest."""
    index = 0
    for axis in entry:
        index = index * sizes[axis] + where[axis]
    return index


def _mesh_text(mesh: Mesh | AbstractMesh) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _ranges(ids: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs = [[i for _, i in group] for _, group in itertools.groupby(enumerate(sorted(ids)), lambda p: p[1] - p[0])]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text x='{x:g}' y='{y:g}' {style}>{html.escape(text)}</text>"
