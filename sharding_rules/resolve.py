"""Shapes + logical axes + rules + mesh sizes -> PartitionSpecs, with a reason for everything that did not divide."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.sharding import PartitionSpec as P

from sharding_rules.rules import AxisTable


class Resolution(NamedTuple):
    """A spec and the reasons for what it could not split as the rules asked."""

    spec: P
    notes: tuple[str, ...]


def resolve_spec(
    shape: Sequence[int],
    axes: Sequence[str | None],
    table: AxisTable,
    mesh_shape: Mapping[str, int],
    spill: Sequence[str] = (),
) -> Resolution:
    """The PartitionSpec of one array.

    A mesh axis is used at most once per array, by the first dim that asks for it and divides by it; mesh axes of size 1
    are left out. What does not divide is dropped, or, for an axis in `spill`, given to the largest other dim that
    divides; both are said in the notes.

    Raises:
      ValueError: shape and axes disagree in length, or a rule names an axis that the mesh lacks.
    """
    if len(shape) != len(axes):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dims but axes {tuple(axes)} name {len(axes)}")
    placed: list[list[str]] = [[] for _ in shape]
    used: set[str] = set()
    homeless: list[tuple[str, str, int]] = []
    notes = []

    def split(dim: int) -> int:
        size = 1
        for axis in placed[dim]:
            size *= mesh_shape[axis]
        return size

    for dim, (size, logical) in enumerate(zip(shape, axes, strict=True)):
        for axis in table.get(logical, ()) if logical else ():
            if axis not in mesh_shape:
                raise ValueError(f"the rule {logical!r} names mesh axis {axis!r}; the mesh has {tuple(mesh_shape)}")
            if mesh_shape[axis] == 1 or axis in used:
                continue
            if size % (split(dim) * mesh_shape[axis]) == 0:
                placed[dim].append(axis)
                used.add(axis)
            else:
                homeless.append((axis, logical or "", size))

    for axis, logical, size in homeless:
        if axis in used:
            continue
        reason = f"{logical}={size} is not divisible by {axis}={mesh_shape[axis]}"
        others = [d for d in range(len(shape)) if axes[d] not in (logical, "layers")] if axis in spill else []
        fits = [d for d in others if shape[d] % (split(d) * mesh_shape[axis]) == 0]
        if fits:
            dim = max(fits, key=lambda d: shape[d] // split(d))
            placed[dim].append(axis)
            used.add(axis)
            notes.append(f"{reason}: {axis} splits {axes[dim] or f'dim {dim}'}={shape[dim]} instead")
        else:
            notes.append(f"{reason}: kept whole over {axis}")

    entries = [None if not p else p[0] if len(p) == 1 else tuple(p) for p in placed]
    return Resolution(P(*entries), tuple(notes))
