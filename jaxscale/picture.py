"""A picture of how one array lies on a mesh, for notebooks: `Picture(x.shape, x.sharding.spec, mesh)`."""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

MAX_CELLS = 32  # drawn along a side
MAX_IDS = 6  # written into a cell


class Picture:
    """An array cut into its shards, each a coloured cell with the ids of the devices that hold a copy.

    The first two dims that are split are drawn downwards and across; what else is split stands in the caption.
    """

    def __init__(self, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh):
        self.shape, self.mesh = tuple(shape), mesh
        entries = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec.partitions]
        self.entries = entries + [()] * (len(self.shape) - len(entries))

    def grid(self) -> np.ndarray:
        """Device ids [rows of cells, columns of cells, devices of a cell]."""
        names = list(self.mesh.shape)
        sizes = tuple(self.mesh.shape.values())
        ids = self.mesh.device_ids if isinstance(self.mesh, Mesh) else np.arange(math.prod(sizes)).reshape(sizes)
        down, across = self._drawn()
        order = [*self._axes(down), *self._axes(across)]
        order += [name for name in names if name not in order]
        rows = math.prod(self.mesh.shape[a] for a in self._axes(down))
        columns = math.prod(self.mesh.shape[a] for a in self._axes(across))
        return ids.transpose([names.index(a) for a in order]).reshape(rows, columns, -1)

    def caption(self) -> str:
        used = [a for entry in self.entries for a in entry]
        shards = math.prod(self.mesh.shape[a] for a in used)
        devices = math.prod(self.mesh.shape.values())
        dims = "  ".join(f"{n}/{'+'.join(e)}" if e else str(n) for n, e in zip(self.shape, self.entries, strict=True))
        mesh = ",".join(f"{a}={n}" for a, n in self.mesh.shape.items() if n > 1) or "one device"
        return f"[{dims}] on {mesh}: {devices} devices, {shards} shards, {devices // shards} copies of each"

    def _repr_html_(self) -> str:
        grid = self.grid()
        rows, columns = (min(n, MAX_CELLS) for n in grid.shape[:2])
        width, height = max(480 // columns, 12), max(min(240 // rows, 40), 12)
        cells = []
        for i in range(rows):
            for j in range(columns):
                ids = grid[i, j]
                label = " ".join(map(str, ids[:MAX_IDS])) + (" …" if len(ids) > MAX_IDS else "")
                hue = 360 * (i * columns + j) // (rows * columns)
                x, y = j * width, i * height
                cells.append(
                    f"<rect x='{x}' y='{y}' width='{width}' height='{height}' fill='hsl({hue},60%,80%)' stroke='#fff'/>"
                )
                if len(label) * 6 < width:
                    cells.append(
                        f"<text x='{x + width / 2}' y='{y + height / 2}' font-size='10' text-anchor='middle' "
                        f"dominant-baseline='central'>{label}</text>"
                    )
                cells.append(f"<title>shard {i},{j}: devices {label}</title>")
        svg = f"<svg width='{columns * width}' height='{rows * height}' xmlns='http://www.w3.org/2000/svg'>"
        return f"<figure>{svg}{''.join(cells)}</svg><figcaption>{html.escape(self.caption())}</figcaption></figure>"

    def _drawn(self) -> tuple[int | None, int | None]:
        """The dims drawn downwards and across: those that are split, or the last two."""
        split = [d for d, entry in enumerate(self.entries) if entry][:2]
        last = [d for d in range(len(self.shape))[-2:] if d not in split]
        dims = sorted([*split, *last[len(last) - (2 - len(split)) :]]) if len(split) < 2 else split
        return (None, dims[0]) if len(dims) == 1 else (dims[0], dims[1]) if dims else (None, None)

    def _axes(self, dim: int | None) -> tuple[Any, ...]:
        return () if dim is None else self.entries[dim]
