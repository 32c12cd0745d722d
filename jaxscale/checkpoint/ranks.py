"""Files that other trainers write, one for each rank: opened lazily and joined, then mapped by a layout.

    ranks = [[open_safetensors(f"pp{p}_tp{t}.safetensors") for t in range(4)] for p in range(2)]
    arrays = join_stages([join_ranks(stage, {"*.qkv.weight": 0, "*.proj.weight": 1, "*": None}) for stage in ranks],
                         layer="layers.{i}.{rest}")
    params = read_into(target, arrays, layout)

Where a rank's own part is fused ([q, k, v] of its heads) split it with a layout before joining. Nothing is unpickled;
the sizes in a header are compared with the file before anything is read.
"""

import fnmatch
import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np

from jaxscale.checkpoint.layout import apply_layout, unflatten
from jaxscale.checkpoint.maps import Concat, Lazy

Path = str | os.PathLike[str]
DEFLATES = 1032  # bytes that one byte of a zip member becomes at the most

DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def open_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a file; a box is read through a memory map, so only its pages are.

    Raises:
      ValueError: the file or its header is not sound, or holds a dtype that numpy does not have.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, "np"):  # checks the header: sizes, overlaps, holes, trailing bytes
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; this reader has {', '.join(DTYPES)}")
        shape, dtype = tuple(entry["shape"]), jnp.dtype(DTYPES[entry["dtype"]])
        out[name] = Lazy(shape, dtype, _mapped(path, 8 + length + entry["data_offsets"][0], shape, dtype))
    return out


def open_npz(path: Path) -> dict[str, Lazy]:
    """The arrays of an .npz file. Each is read whole when a box of it is asked for (zip members are one stream).

    Raises:
      ValueError: the file is no .npz, or holds Python objects.
    """
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_size > os.path.getsize(path) or info.file_size > DEFLATES * info.compress_size + 64:
                    raise ValueError(
                        f"{info.filename} says {info.file_size} bytes, more than {info.compress_size} can hold"
                    )
                with archive.open(info) as member:
                    old = np.lib.format.read_magic(member) == (1, 0)
                    header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(member)
                if dtype.hasobject:
                    raise ValueError(f"{info.filename} holds Python objects, which are never unpickled")
                if math.prod(shape) * dtype.itemsize >= info.file_size:
                    raise ValueError(f"{info.filename} says shape {shape} but has {info.file_size} bytes")
                name = info.filename.removesuffix(".npy")
                out[name] = Lazy(shape, dtype, _member(path, name))
    except (zipfile.BadZipFile, ValueError) as error:
        raise ValueError(f"{path} is not a sound .npz file: {error}") from None
    return out


def join_ranks(ranks: Sequence[Mapping[str, Lazy]], axes: Mapping[str, int | None]) -> dict[str, Lazy]:
    """Tensor-parallel ranks -> whole arrays.

    Args:
      ranks: the arrays of each rank, in the order of ranks.
      axes: pattern -> the axis along which the ranks hold parts, or None where each rank holds all of it (rank 0's is
        taken). The first pattern that matches counts.

    Raises:
      ValueError: ranks hold different names, no pattern matches one, or the parts do not fit.
    """
    for k, rank in enumerate(ranks):
        if different := sorted(rank.keys() ^ ranks[0].keys()):
            raise ValueError(f"rank 0 and rank {k} differ in {', '.join(different[:6])}; pass the ranks of one stage")
    out = {}
    for name in ranks[0]:
        pattern = next((pattern for pattern in axes if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is None:
            raise ValueError(f"no pattern says how the ranks share {name}; add one, with None if each holds all of it")
        parts, axis = [rank[name] for rank in ranks], axes[pattern]
        if axis is None:
            if len({(x.shape, x.dtype) for x in parts}) != 1:
                raise ValueError(f"{name} is said to be whole on each rank but its shapes differ; give it an axis")
            out[name] = parts[0]
            continue
        try:
            (out[name],) = Concat(axis, tuple(x.shape[axis] for x in parts))(*parts)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name} along axis {axis}: {error}") from None
    return out


def join_zero(
    ranks: Sequence[Mapping[str, Lazy]], flat: str, shapes: Mapping[str, Sequence[int]], *, stage: Literal[1, 2, 3]
) -> dict[str, Lazy]:
    """ZeRO's flat partitions -> named arrays; call it for the parameters and for each moment.

    Stages 1 and 2 cut one flat array of all parameters into equal parts, with padding at its end. Stage 3 cuts each
    parameter by itself, padded to a multiple of the ranks, and each rank holds its parts one after the other.
    (DeepSpeed, `utils/zero_to_fp32.py`.)

    Args:
      ranks: the arrays of each data-parallel rank, in the order of ranks.
      flat: name of the flat array in each rank's file.
      shapes: of the parameters, in the order in which they were flattened.

    Raises:
      ValueError: a rank lacks the flat array, or it is too short for the shapes.
    """
    if lacking := [k for k, rank in enumerate(ranks) if flat not in rank]:
        raise ValueError(f"ranks {lacking[:6]} have no array {flat}; they have {', '.join(list(ranks[0])[:6])}")
    count = len(ranks)
    if stage < 3:
        whole = join_ranks([{flat: rank[flat]} for rank in ranks], {flat: 0})
        return apply_layout(whole, unflatten(flat, shapes, old=whole[flat].shape[0]))
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    parts = {name: (-(-size // count),) for name, size in sizes.items()}
    cut = [apply_layout({flat: rank[flat]}, unflatten(flat, parts, old=rank[flat].shape[0])) for rank in ranks]
    joined = join_ranks(cut, dict.fromkeys(parts, 0))
    for name, array in joined.items():
        joined |= apply_layout({name: array}, unflatten(name, {name: shapes[name]}, old=array.shape[0]))
    return joined


def join_stages(stages: Sequence[Mapping[str, Lazy]], layer: str) -> dict[str, Lazy]:
    """Pipeline stages -> one tree; the layers of a stage, numbered from 0, follow those of the stage before.

    Args:
      layer: template of a layer's names with `{i}` and `{rest}`, such as "layers.{i}.{rest}".

    Raises:
      ValueError: two stages hold one name.
    """
    before, after = (re.escape(part) for part in layer.replace("{rest}", "").split("{i}"))
    pattern = re.compile(f"{before}([0-9]+){after}(.+)")
    out: dict[str, Lazy] = {}
    first = 0
    for stage in stages:
        numbers = [int(match[1]) for match in map(pattern.fullmatch, stage) if match]
        for name, array in stage.items():
            match = pattern.fullmatch(name)
            if match:
                name = layer.format(i=first + int(match[1]), rest=match[2])
            if name in out:
                raise ValueError(f"two stages hold {name}; drop it from one of them")
            out[name] = array
        first += max(numbers, default=-1) + 1
    return out


def _mapped(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype):
    def read(box):
        if not math.prod(shape):
            return np.zeros(shape, dtype)[box]
        raw = np.memmap(path, np.uint8, "r", offset, (math.prod(shape) * dtype.itemsize,))
        return np.array(raw.view(dtype).reshape(shape)[box])

    return read


def _member(path: Path, name: str):
    def read(box):
        with np.load(path, allow_pickle=False) as archive:
            return archive[name][box]

    return read


def write_safetensors(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Contiguous arrays by name, in a file that others may read as the umask says; safetensors lets only its owner.

    Raises:
      SafetensorError: the disk is full or refuses.
    """
    from safetensors.numpy import save_file

    with open(path, "wb"):
        mode = os.stat(path).st_mode
    save_file(tensors, path, metadata=metadata)
    os.chmod(path, mode)
