"""Layouts: declared, invertible maps between a stored tree of arrays and a wanted one.

    layout = (
        layers_unstacked := unstack("layers/{rest}", "layers.{i}.{rest}"),
        fuse(("attn/wq", "attn/wk"), "attn/wqk", axis=-1, sizes=(64, 32)),
    )

An operation names arrays by templates over the *parameters'* paths. `{i}` stands for a number, any other `{word}` for
whatever is there. It is applied to the parameters and, as it stands, wherever their tree occurs again: Adam moments,
averages of weights. It is checked on shapes alone, before a
byte is read.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from jaxscale.checkpoint import maps


@dataclasses.dataclass(frozen=True)
class Op:
    """`map` takes the arrays that match `sources`, under one reading of the templates' words, to `targets`."""

    map: maps.Map
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    first: int = 0  # where `{i}` starts to count

    def inverse(self) -> "Op":
        return Op(self.map.inverse(), self.targets, self.sources, self.first)

    def __str__(self):
        return f"{type(self.map).__name__.lower()} {' + '.join(self.sources)} -> {' + '.join(self.targets)}"


Layout = Sequence[Op]


def inverse(layout: Layout) -> tuple[Op, ...]:
    """The layout that undoes this one; raises ValueError when an operation loses information."""
    return tuple(op.inverse() for op in reversed(layout))


# The operations


def rename(old: str, new: str) -> Op:
    return Op(maps.Rename(), (old,), (new,))


def transpose(path: str, order: Sequence[int]) -> Op:
    return Op(maps.Transpose(tuple(order)), (path,), (path,))


def unstack(stacked: str, unrolled: str, *, first: int = 0) -> Op:
    """[L, ...] -> L arrays; `unrolled` holds `{i}`, which counts from `first`."""
    return Op(maps.Unstack(), (stacked,), (unrolled,), first)


def stack(unrolled: str, stacked: str) -> Op:
    return Op(maps.Stack(), (unrolled,), (stacked,))


def fuse(parts: Sequence[str], whole: str, *, axis: int, sizes: Sequence[int]) -> Op:
    """Concatenates along `axis`, where the parts have `sizes`: QKV, gate and up."""
    if len(parts) != len(sizes):
        raise ValueError(f"fuse has {len(parts)} parts but {len(sizes)} sizes; give one size for each part")
    return Op(maps.Concat(axis, tuple(sizes)), tuple(parts), (whole,))


def split(whole: str, parts: Sequence[str], *, axis: int, sizes: Sequence[int]) -> Op:
    return fuse(parts, whole, axis=axis, sizes=sizes).inverse()


def merge_dims(path: str, dim: int, sizes: Sequence[int]) -> Op:
    """[.., *sizes, ..] -> [.., product, ..]: heads and head_dim as one. A negative `dim` counts after merging."""
    return Op(maps.MergeDims(dim, tuple(sizes)), (path,), (path,))


def split_dim(path: str, dim: int, sizes: Sequence[int]) -> Op:
    return merge_dims(path, dim, sizes).inverse()


def permute(path: str, axis: int, order: Sequence[int]) -> Op:
    """Entry k along `axis` becomes entry order[k] of what is stored: heads, rotary halves, experts."""
    if sorted(order) != list(range(len(order))):
        raise ValueError(f"permute {path}: {tuple(order)} is not an order of 0..{len(order) - 1}")
    return Op(maps.Permute(axis, tuple(order)), (path,), (path,))


def pad(path: str, axis: int, *, old: int, new: int) -> Op:
    """Zeros at the end of `axis`: a vocabulary that must divide."""
    if new < old:
        raise ValueError(f"pad {path}: {new} is smaller than {old}; use unpad")
    return Op(maps.Pad(axis, old, new), (path,), (path,))


def unpad(path: str, axis: int, *, old: int, new: int) -> Op:
    return pad(path, axis, old=new, new=old).inverse()


def repeat(path: str, axis: int, times: int) -> Op:
    """Each entry along `axis` `times` in a row: kv heads for a larger tp, experts grown from fewer."""
    return Op(maps.Repeat(axis, times), (path,), (path,))


def select(path: str, axis: int, entries: Sequence[int], *, old: int) -> Op:
    """Entry k along `axis` becomes entry entries[k] of the `old` stored ones: experts grown, dropped or reordered.

    `select("moe/w_up", 1, (0, 1, 0, 1), old=2)` makes four experts of two. The way back takes the first copy of each.
    """
    if any(not 0 <= k < old for k in entries):
        raise ValueError(f"select {path}: {tuple(entries)} are not all entries of 0..{old - 1}")
    return Op(maps.Select(axis, tuple(entries), old), (path,), (path,))


def merge(path: str, axis: int, groups: Sequence[Sequence[int]]) -> Op:
    """Entry k along `axis` becomes the mean of the stored entries groups[k]: experts merged. Its inverse grows copies.

    Every entry must be in one group. The router's columns are merged likewise.
    """
    return Op(maps.Mean(axis, tuple(map(tuple, groups))), (path,), (path,))


def copies(path: str, new_dim: int, times: int) -> Op:
    """A new dim with `times` copies: the experts of a model that was dense (sparse upcycling, arXiv 2212.05055)."""
    return Op(maps.Copies(new_dim, times), (path,), (path,))


def compute(
    sources: Sequence[str],
    targets: Sequence[str],
    function: Callable[..., tuple[np.ndarray, ...]],
    *,
    axis: int,
    inverse: Callable[..., tuple[np.ndarray, ...]] | None = None,
) -> Op:
    """The targets are `function(*sources)`, as when a weight is quantized: `compute((w,), (values, scales), ...)`.

    Args:
      function: numpy arrays that are whole along `axis` and of any size along the other dims -> a tuple of arrays with
        the same other dims. Each line along `axis` must not depend on the others: shards compute theirs alone. It is
        called with zeros once, to learn sizes and dtypes.
      inverse: the function back, or None if there is none.
    """
    return Op(maps.Compute(function, inverse, axis), tuple(sources), tuple(targets))


def unflatten(flat: str, shapes: Mapping[str, Sequence[int]], *, old: int) -> tuple[Op, ...]:
    """One flat array of `old` numbers -> named arrays, one after the other; padding at its end is dropped.

    As ZeRO holds parameters and moments; `(*unflatten(...), other operations)`. Its inverse flattens.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    if old < sum(sizes):
        raise ValueError(f"unflatten {flat}: {len(shapes)} shapes need {sum(sizes)} numbers, there are {old}")
    cut = split(flat, tuple(shapes), axis=0, sizes=sizes)
    shaped = (split_dim(name, 0, shape) for name, shape in shapes.items() if len(shape) != 1)
    return (*([unpad(flat, 0, old=old, new=sum(sizes))] if old > sum(sizes) else []), cut, *shaped)


def cast(path: str, dtype: str, *, old: str) -> Op:
    """To another dtype. The way back is exact only if `dtype` holds every value of `old`."""
    return Op(maps.Cast(old, dtype), (path,), (path,))


def stage(path: str, *, stages: int, rounds: int = 1) -> Op:
    """[L, ...] -> [stages, L / stages, ...] for a pipeline.

    With `rounds` > 1 the layers go round the stages that many times (interleaved schedules): stage s holds layers
    r * L / rounds + s * per ... for each round r, where per = L / (stages * rounds).
    """
    return Op(maps.Stage(stages, rounds), (path,), (path,))


def restage(path: str, *, old: int, new: int, old_rounds: int = 1, new_rounds: int = 1) -> tuple[Op, Op]:
    """From one pipeline to another: `(*restage(...), other operations)`."""
    return stage(path, stages=old, rounds=old_rounds).inverse(), stage(path, stages=new, rounds=new_rounds)


# Applying a layout


def apply_layout(stored: Mapping[str, maps.Lazy], layout: Layout) -> dict[str, maps.Lazy]:
    """The arrays of a stored tree under `layout`. Only shapes are looked at; nothing is read.

    Raises:
      ValueError: an operation matches nothing, misses a part, makes a name twice or does not fit the shapes.
    """
    env = dict(stored)
    for op in layout:
        made: dict[str, maps.Lazy] = {}
        taken: set[str] = set()
        for inputs, root, words in _groups(op, env):
            try:
                out = op.map(*(env[name] for name in inputs))
            except (ValueError, IndexError) as error:
                raise ValueError(f"layout: {op} on {', '.join(inputs[:4])}: {error}") from None
            names = _output_names(op, root, words, len(out))
            if both := [name for name in names if name in made]:
                raise ValueError(f"layout: {op} makes {both[0]} twice; let the templates tell them apart")
            made |= zip(names, out)
            taken |= set(inputs)
        env = {name: array for name, array in env.items() if name not in taken}
        if both := sorted(made.keys() & env.keys()):
            raise ValueError(f"layout: {op} makes {both[0]}, which is there already; rename one of them")
        env |= made
    return env


def param_roots(names: Iterable[str]) -> list[str]:
    """Prefixes under which the tree of parameters occurs: `params/`, `opt_state/0/mu/`, ...; [""] if there is none.

    A prefix counts when everything below it is the path of a parameter, so optimizer states over some parameters count.
    """
    names = list(names)
    params = {name.removeprefix("params/") for name in names if name.startswith("params/")}
    if not params:
        return [""]
    candidates = {name[: len(name) - len(p)] for name in names for p in _suffixes(name) if p in params}
    roots: list[str] = []
    for root in sorted(candidates - {""}, key=len):
        below = [name[len(root) :] for name in names if name.startswith(root)]
        if all(p in params for p in below) and not any(root.startswith(r) for r in roots):
            roots.append(root)
    return roots


def _suffixes(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[k:]) for k in range(len(parts))]


def _groups(op: Op, names: Iterable[str]) -> list[tuple[list[str], str, dict[str, str]]]:
    """(names in, root, words) for each reading of the templates' words."""
    names = list(names)
    found: dict[tuple, dict[tuple[int, int], str]] = {}
    for root in param_roots(names):
        for name in names:
            if not name.startswith(root):
                continue
            for position, template in enumerate(op.sources):
                match = _pattern(template).fullmatch(name[len(root) :])
                if match:
                    words = match.groupdict()
                    index = int(words.pop("i", -1))
                    found.setdefault((root, *sorted(words.items())), {})[position, index] = name
    if not found:
        raise ValueError(f"layout: {op} matches no array")
    groups = []
    for (root, *words), members in found.items():
        inputs = [members[key] for key in sorted(members)]
        indices = sorted({index for _, index in members})
        if indices[0] >= 0 and indices != (counted := list(range(op.first, op.first + len(indices)))):
            raise ValueError(f"layout: {op}: the layers of {inputs[0]} are {indices}, not {counted[0]}..{counted[-1]}")
        missing = [template for p, template in enumerate(op.sources) if not any(q == p for q, _ in members)]
        if missing:
            raise ValueError(f"layout: {op}: {', '.join(inputs[:3])} is there but its {', '.join(missing)} is not")
        groups.append((inputs, root, dict(words)))
    return groups


def _output_names(op: Op, root: str, words: dict[str, str], count: int) -> list[str]:
    indexed = "{i}" in op.targets[0]
    numbers = range(op.first, op.first + count) if indexed else (0,)
    names = [root + t.format(**words, i=k) for t in op.targets for k in numbers]
    if len(names) != count:
        raise ValueError(f"layout: {op} makes {count} arrays for {len(names)} names")
    return names


@functools.lru_cache(maxsize=512)
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    regex = "".join(
        re.escape(part) if k % 2 == 0 else rf"(?P<{part}>\d+)" if part == "i" else rf"(?P<{part}>.+)"
        for k, part in enumerate(parts)
    )
    return re.compile(regex)
