"""Reads one step into the leaves of a target tree: through a layout, in part, and never a damaged byte."""

import fnmatch
import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.checkpoint import arrays, files
from jaxscale.checkpoint.background import one_line
from jaxscale.checkpoint.checksum import crc32_whole
from jaxscale.checkpoint.fill import Bounds, bounds, fill
from jaxscale.checkpoint.layout import Layout, apply_layout
from jaxscale.checkpoint.maps import Lazy
from jaxscale.checkpoint.snapshot import rests_on_host
from jaxscale.checkpoint.tree import Record, describe, named_leaves, num_bytes, show_record, tree_problem

log = logging.getLogger("jaxscale.checkpoint")

FORMAT = 1  # of commit.json; raised when an older reader could not understand it


class CorruptCheckpointError(ValueError):
    """A step whose bytes are not those that were saved; the message names the arrays or files."""


def read_commit(step: Any) -> dict[str, Any] | None:
    """What was committed with the step in this folder; None when it is not complete."""
    commit = files.read_json(step / files.COMMIT)
    if commit is None:
        return None
    written = commit.get("format") if isinstance(commit, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise ValueError(f"checkpoint {step} has format {written}, this jaxscale reads up to {FORMAT}; upgrade it")
    try:
        sizes = [num_bytes(record) for record in commit["arrays"].values()]
        sizes += [size for size, _ in commit["files"].values()]
        sound = isinstance(written, int) and min(sizes, default=0) >= 0 and isinstance(commit["metadata"], dict)
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise ValueError(f"{step / files.COMMIT} is not what a save writes; move {step} out of the way")
    return commit


def restore_newest(directory: Any, steps: Sequence[int], target: Any, **options: Any) -> tuple[int, Any]:
    """(step, tree) of the newest of `steps` that is not damaged; the options are those of `restore_step`."""
    for step in sorted(steps, reverse=True):
        try:
            return step, restore_step(directory / str(step), target, **options)
        except CorruptCheckpointError as error:
            if step == min(steps):
                raise
            log.warning("%s; falling back to the step before", error)
    raise AssertionError("unreachable")


def restore_step(
    step: Any,
    target: Any,
    *,
    layout: Layout = (),
    only: str | Sequence[str] | None = None,
    missing: Literal["refuse", "keep"] = "refuse",
) -> Any:
    """The tree `target` with its leaves read from the step in this folder; see `Checkpointer.restore`."""
    commit = read_commit(step)
    if commit is None:
        raise FileNotFoundError(f"{step} is not a complete checkpoint")
    saved: dict[str, Record] = commit["arrays"]
    leaves = named_leaves(target)
    stored = open_lazily(step, commit)
    mapped, chosen = _plan(f"checkpoint {step} does", leaves, stored, saved, layout, only, missing)
    direct = [name for name in chosen if name in stored and mapped.get(name) is stored[name]]
    data = read_arrays(step, commit, {name: _target(saved[name], leaves[name]) for name in direct})
    out = {name: _as_leaf(data.pop(name), leaves[name], saved[name]) for name in direct}
    made = {name: mapped[name] for name in chosen if name not in out}
    check_arrays(step, commit, sorted(set().union(*(array.sources for array in made.values()))))
    out |= {name: _as_leaf(_place(array, leaves[name]), leaves[name], {}) for name, array in made.items()}
    return jax.tree.unflatten(jax.tree.structure(target), [out.get(name, leaf) for name, leaf in leaves.items()])


def read_into(
    target: Any,
    arrays: Mapping[str, Lazy],
    layout: Layout = (),
    *,
    records: Mapping[str, Record] | None = None,
    only: str | Sequence[str] | None = None,
    missing: Literal["refuse", "keep"] = "refuse",
) -> Any:
    """The tree `target` with its leaves read from lazy arrays of any origin under `layout`, shard by shard.

    Args:
      records: says which of the arrays are the data of PRNG keys.
      only, missing: as in `Checkpointer.restore`.

    Raises:
      ValueError: the arrays are not those of `target`; the message says which.
    """
    leaves, records = named_leaves(target), records or {}
    mapped, chosen = _plan("the arrays do", leaves, arrays, records, layout, only, missing)
    out = {name: _as_leaf(_place(mapped[name], leaves[name]), leaves[name], records.get(name, {})) for name in chosen}
    return jax.tree.unflatten(jax.tree.structure(target), [out.get(name, leaf) for name, leaf in leaves.items()])


def _plan(
    what: str,
    leaves: Mapping[str, Any],
    stored: Mapping[str, Lazy],
    saved: Mapping[str, Record],
    layout: Layout,
    only: str | Sequence[str] | None,
    missing: Literal["refuse", "keep"],
) -> tuple[dict[str, Lazy], list[str]]:
    """What the layout offers, and the names of the leaves to read; ValueError if the two do not fit."""
    mapped = apply_layout(stored, layout)
    chosen = choose(leaves, only)
    if missing == "keep":
        chosen = [name for name in chosen if name in mapped or isinstance(leaves[name], jax.ShapeDtypeStruct)]
    offered = {
        name: saved[name] if name in saved and array is stored.get(name) else describe(array)
        for name, array in mapped.items()
        if only is None or name in chosen
    }
    problem = tree_problem(offered, {name: describe(leaves[name]) for name in chosen})
    if problem:
        raise ValueError(f"{what} not fit: {problem}")
    return mapped, chosen


def open_lazily(step: Any, commit: dict[str, Any]) -> dict[str, Lazy]:
    """The stored arrays by name; each is opened when a box of it is first read."""
    return {name: _open_lazily(step, name, record) for name, record in commit["arrays"].items()}


def read_arrays(step: Any, commit: dict[str, Any], targets: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays by name, each in the shards of its ShapeDtypeStruct, or as numpy where that is None; all are checked.

    Raises:
      CorruptCheckpointError: a file or an array is not as it was saved.
    """
    saved = commit["arrays"]
    problems = files.file_problems(step, commit["files"])
    if problems:  # Orbax would find most of it too, and fail halfway with threads and coroutines left behind
        raise _damaged(step, problems)
    full = {name: target for name, target in targets.items() if target is not None and num_bytes(saved[name])}
    data: dict[str, Any] = {}
    shares: dict[str, int] = {}
    failure = None
    try:
        arrays.check_index(step)
        for name, array, share in fill(full, functools.partial(_open_checked, step, saved)):
            data[name], shares[name] = array, share
        for name in targets.keys() - full.keys():
            record = saved[name]
            if num_bytes(record):
                data[name] = arrays.open_array(step, name).read().result()
                shares[name] = arrays.local_share(data[name])
            else:
                empty = np.zeros(record["shape"], record["dtype"])
                data[name] = empty if targets[name] is None else jax.device_put(empty, targets[name].sharding)
    except Exception as error:  # TensorStore raises many kinds
        failure = error
    differ = _mismatches(saved, targets, shares, failed=failure is not None)
    if failure is not None or differ is None:
        problems = find_problems(step, commit) or [
            one_line(failure) if failure else "another process could not read it"
        ]
        raise _damaged(step, problems) from failure
    if differ:
        raise _damaged(step, [f"the checksum of {name} differs" for name in differ])
    return data


def _open_checked(step: Any, saved: Mapping[str, Record], name: str) -> Any:
    """The stored array, which has the shape and dtype that were written down."""
    store = arrays.open_array(step, name)
    found = {"shape": list(store.shape), "dtype": store.dtype.numpy_dtype.name}
    wanted = {key: saved[name][key] for key in found}
    if found != wanted:
        raise ValueError(f"{name} is {show_record(found)} on disk, {show_record(wanted)} was saved")
    return store


def check_arrays(step: Any, commit: dict[str, Any], names: Sequence[str]) -> None:
    """Compares arrays on disk with their checksums; the processes share the work.

    Raises:
      CorruptCheckpointError: an array is not as it was saved.
    """
    records = commit["arrays"]
    me, processes = jax.process_index(), jax.process_count()
    names = [name for name in names if num_bytes(records[name])]
    problems = np.zeros(len(names), np.uint32)
    for k in range(me, len(names), processes):
        problems[k] = _problem(step, names[k], records[names[k]]) is not None
    if processes > 1:
        from jax.experimental import multihost_utils

        problems = np.asarray(multihost_utils.process_allgather(problems)).max(axis=0)
    if problems.any():
        raise _damaged(step, [f"{name} is not as it was saved" for name, bad in zip(names, problems) if bad])


def find_problems(step: Any, commit: dict[str, Any]) -> list[str]:
    """Reads every byte of a step and says what is damaged; needs no devices."""
    problems = files.file_problems(step, commit["files"])
    found = (_problem(step, name, record) for name, record in commit["arrays"].items() if num_bytes(record))
    return problems + [problem for problem in found if problem]


def _problem(step: Any, name: str, record: Record) -> str | None:
    try:
        if arrays.stored_crc32(step, name) != record["crc32"]:
            return f"the checksum of {name} differs"
    except Exception as error:  # TensorStore raises many kinds
        return f"{name} cannot be read ({one_line(error)})"
    return None


def _damaged(step: Any, problems: list[str]) -> CorruptCheckpointError:
    more = f" and {len(problems) - 6} more problems" if len(problems) > 6 else ""
    return CorruptCheckpointError(f"checkpoint {step} is damaged: {'; '.join(problems[:6])}{more}")


def choose(leaves: Mapping[str, Any], only: str | Sequence[str] | None) -> list[str]:
    """Names that match the patterns; each pattern must match one."""
    if only is None:
        return list(leaves)
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not fnmatch.filter(leaves, pattern):
            raise ValueError(f"only={pattern!r} matches none of {len(leaves)} arrays such as {next(iter(leaves))}")
    return [name for name in leaves if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _target(record: Record, leaf: Any) -> jax.ShapeDtypeStruct | None:
    """What is read for a leaf as it is; PRNG keys' data takes the keys' sharding, its last dim whole."""
    if rests_on_host(leaf):
        return None
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(tuple(record["shape"]), jnp.dtype(record["dtype"]), sharding=sharding)


def _open_lazily(step: Any, name: str, record: Record) -> Lazy:
    shape, dtype = tuple(record["shape"]), jnp.dtype(record["dtype"])
    opened = functools.cache(lambda: arrays.open_array(step, name))
    if not num_bytes(record):
        return Lazy(shape, dtype, lambda box: np.zeros([s.stop - s.start for s in box], dtype), frozenset([name]))
    return Lazy(shape, dtype, lambda box: opened()[box].read().result(), frozenset([name]))


def _place(array: Lazy, leaf: Any) -> Any:
    """A lazy array in the shards of `leaf`, each box read once in this process."""
    sharding = getattr(leaf, "sharding", None)
    if sharding is None or rests_on_host(leaf):
        whole = array.whole()
        return whole if rests_on_host(leaf) else jax.device_put(whole)

    boxes = {bounds(index, array.shape) for index in sharding.addressable_devices_indices_map(array.shape).values()}
    if not boxes:
        return jax.make_array_from_callback(array.shape, sharding, lambda index: np.empty(0), dtype=array.dtype)
    corner = [min(box[dim][0] for box in boxes) for dim in range(len(array.shape))]
    hull = tuple(slice(first, max(box[dim][1] for box in boxes)) for dim, first in enumerate(corner))
    tiled = math.prod(s.stop - s.start for s in hull) == sum(math.prod(b - a for a, b in box) for box in boxes)

    @functools.cache
    def read(box: Bounds) -> np.ndarray:
        if tiled:  # what lies under several shards is read, and dequantized, once
            return read_hull()[tuple(slice(a - first, b - first) for (a, b), first in zip(box, corner))]
        return array.read(tuple(slice(*part) for part in box))

    read_hull = functools.cache(lambda: array.read(hull))
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: read(bounds(index, array.shape)), dtype=array.dtype
    )


def _as_leaf(data: Any, leaf: Any, record: Record) -> Any:
    """The array as the kind of leaf that `leaf` is."""
    if not hasattr(leaf, "dtype"):
        return type(leaf)(data)
    if isinstance(leaf, np.ndarray | np.generic):
        return data
    if not isinstance(data, jax.Array):  # an array that each process has for itself
        data = jax.device_put(data, leaf.sharding)
    return jax.random.wrap_key_data(data, impl=record["key"]) if "key" in record else data


def _mismatches(
    saved: Mapping[str, Record], names: Iterable[str], local: Mapping[str, int], *, failed: bool
) -> list[str] | None:
    """Names of arrays whose bytes in memory, over all processes, are not those saved; None if a process failed."""
    names = sorted(name for name in names if num_bytes(saved[name]))
    shares = np.array([*(local.get(name, 0) for name in names), failed], np.uint32)
    if jax.process_count() > 1:  # also after a failure, for which the others would wait
        from jax.experimental import multihost_utils

        gathered = np.asarray(multihost_utils.process_allgather(shares))
        shares = np.bitwise_xor.reduce(gathered, axis=0)
        failed = bool(gathered[:, -1].any())
    if failed:
        return None
    return [
        name
        for name, share in zip(names, shares[:-1])
        if crc32_whole(int(share), num_bytes(saved[name])) != saved[name]["crc32"]
    ]
