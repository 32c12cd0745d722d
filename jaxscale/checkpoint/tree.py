"""Any pytree as named arrays, and what must hold before one tree is read into another."""

import contextlib
import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxscale.params import path_name

Record = dict[str, Any]  # JSON of one array: shape, dtype, and "key": the implementation if it holds PRNG keys


def named_leaves(tree: Any) -> dict[str, Any]:
    """`{"params/layers/attn/wq": leaf}` in the order of the tree.

    Raises:
      ValueError: two leaves have one name, as in {"a/b": x, "a": {"b": y}}.
    """
    out: dict[str, Any] = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        name = path_name(path) or "value"
        if name in out:
            raise ValueError(f"two leaves are named {name!r}; rename a key that holds a slash")
        out[name] = leaf
    return out


def describe(leaf: Any) -> Record:
    """Shape and dtype at rest of an array, ShapeDtypeStruct or Python scalar; PRNG keys rest as their uint32 data."""
    if is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return {"shape": list(data.shape), "dtype": data.dtype.name, "key": key_impl(leaf)}
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": jnp.dtype(leaf.dtype).name}


def is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_impl(leaf: Any) -> str:
    """`threefry2x32` for an array of PRNG keys or its ShapeDtypeStruct."""
    names = []
    jax.eval_shape(
        lambda key: names.append(str(jax.random.key_impl(key))), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    )
    return names[0]


def step_number(step: Any) -> int:
    """A step as its folder is named; anything else would be written and never found again."""
    number = -1
    with contextlib.suppress(TypeError):
        number = -1 if isinstance(step, bool) else operator.index(step)
    if number < 0:
        raise ValueError(f"a step is a whole number from 0 on. Got {step!r}")
    return number


def num_bytes(record: Record) -> int:
    return math.prod(record["shape"]) * jnp.dtype(record["dtype"]).itemsize


def tree_problem(saved: Mapping[str, Record], wanted: Mapping[str, Record]) -> str | None:
    """Why `saved` does not fit `wanted`, in one line: what is missing, extra, or of another shape or dtype."""
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name not in wanted]
    differ = [
        f"{name} is {show_record(saved[name])} where {show_record(wanted[name])} is wanted"
        for name in wanted
        if name in saved and show_record(saved[name]) != show_record(wanted[name])
    ]
    parts = [
        f"{len(group)} {what}: {_some(group)}"
        for what, group in (("missing", missing), ("extra", extra), ("of another shape or dtype", differ))
        if group
    ]
    return "; ".join(parts) or None


def show_record(record: Record) -> str:
    """`float32[8,4]`; for PRNG keys `key<threefry2x32>[]`."""
    if "key" in record:
        return f"key<{record['key']}>{_brackets(record['shape'][:-1])}"
    return f"{record['dtype']}{_brackets(record['shape'])}"


def _brackets(shape: Iterable[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _some(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
