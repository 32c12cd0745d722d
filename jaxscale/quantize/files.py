"""Quantized parameters in one safetensors file, two values of 4 bits to a byte, and back.

An array `layers/mlp/w_up` is one tensor of that name; of a QuantizedArray each part is one, `layers/mlp/w_up.values`,
`.scales`, ... The header's metadata says in JSON what the tensors do not: "quantized" dtype and shape of values whose
bytes are kept, contracted dims, unsigned, activations; "crc32" that of each tensor's bytes.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from jaxscale.checkpoint.ranks import write_safetensors
from jaxscale.params import path_name
from jaxscale.sharding import place
from pallas_kernels.quantized_matmul.api import check_array
from pallas_kernels.quantized_matmul.array import QuantizedArray
from sharding_rules.rules import MEGATRON_FSDP, Rules

PARTS = ("values", "scales", "offsets", "inputs", "outliers")


def save_quantized(params: Any, path: str | Path) -> None:
    """Write the file; every shard must be addressable by this process."""
    tensors: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {}
    for key, w in jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, QuantizedArray)):
        name = path_name(key)
        if not isinstance(w, QuantizedArray):
            tensors[name] = np.ascontiguousarray(w)
            continue
        w = w.natural()
        meta[name] = {
            "dtype": jnp.dtype(w.values.dtype).name,
            "shape": w.values.shape,
            "contraction": w.contraction,
            "unsigned": w.unsigned,
            "activations": w.activations,
        }
        tensors[f"{name}.values"] = _bytes(np.asarray(w.values))
        for part in PARTS[1:]:
            if (x := getattr(w, part)) is not None:
                tensors[f"{name}.{part}"] = np.ascontiguousarray(x)
    sums = {name: _crc32(x) for name, x in tensors.items()}
    write_safetensors(tensors, path, {"quantized": json.dumps(meta), "crc32": json.dumps(sums)})


def load_quantized(path: str | Path, specs: Any, mesh: Mesh | None = None, rules: Rules = MEGATRON_FSDP) -> Any:
    """The parameters of a file, like `specs`, a tree of ParamSpec; on a mesh in their shards.

    Raises:
      ValueError: a damaged file, or parameters that are not those of specs.
    """
    damaged = lambda why: ValueError(f"{path} is damaged: {why}; convert the model again")
    try:
        with safe_open(path, "np") as file:
            about = file.metadata() or {}
            meta, sums = (json.loads(about.get(key, "{}")) for key in ("quantized", "crc32"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, json.JSONDecodeError) as e:
        raise damaged(e) from None
    for name, crc32 in sums.items():  # files written before 2026-11-28 have none
        if name not in tensors or _crc32(tensors[name]) != crc32:
            raise damaged(f"{name} is not what was written")

    def load(key, spec):
        name = path_name(key)
        if name in tensors:
            out = jnp.asarray(tensors[name])
        elif name in meta:
            try:
                out = _quantized(name, meta[name], tensors)
            except (KeyError, TypeError, ValueError) as e:
                raise damaged(f"{name}: {e}") from None
        else:
            raise ValueError(f"{path} has no parameter {name}; is it a file of this configuration?")
        if out.shape != spec.shape:
            raise ValueError(f"{path}: {name} has shape {out.shape} but the configuration says {spec.shape}")
        return out

    params = jax.tree.map_with_path(load, specs)
    return params if mesh is None else jax.device_put(params, place(params, specs, mesh, rules))


def _quantized(name: str, about: dict[str, Any], tensors: dict[str, np.ndarray]) -> QuantizedArray:
    values = jnp.asarray(_values(tensors[f"{name}.values"], jnp.dtype(about["dtype"]), tuple(about["shape"])))
    parts = {p: jnp.asarray(x) for p in PARTS[1:] if (x := tensors.get(f"{name}.{p}")) is not None}
    rest = {"contraction": tuple(about["contraction"]), "unsigned": about["unsigned"]}
    out = QuantizedArray(values, **parts, **rest, activations=about["activations"])
    check_array(name, out)
    return out


def _crc32(x: np.ndarray) -> int:
    return zlib.crc32(x.reshape(-1).view(np.uint8))


def _bytes(x: np.ndarray) -> np.ndarray:
    """uint8: of 4-bit values two to a byte, the first in the low bits."""
    if jax.dtypes.itemsize_bits(x.dtype) == 8:
        return np.ascontiguousarray(x).view(np.uint8)
    nibbles = np.ascontiguousarray(x).view(np.uint8).reshape(-1) & 15
    nibbles = np.concatenate([nibbles, np.zeros(nibbles.size % 2, np.uint8)])
    return nibbles[::2] | nibbles[1::2] << 4


def _values(x: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    if jax.dtypes.itemsize_bits(dtype) == 8:
        return x.view(dtype).reshape(shape)
    nibbles = np.stack([x & 15, x >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
    if dtype == jnp.int4:
        return ((nibbles.astype(np.int8) ^ 8) - 8).astype(dtype).reshape(shape)
    return nibbles.view(dtype).reshape(shape)
