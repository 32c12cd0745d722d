"""Rank files of other trainers, joined and restored into the shards of a mesh."""

import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from jaxscale.checkpoint import layout as lay
from jaxscale.checkpoint.layout import apply_layout
from jaxscale.checkpoint.ranks import join_ranks, join_stages, join_zero, open_npz, open_safetensors
from jaxscale.checkpoint.reading import read_into
from jaxscale.mesh import make_mesh

from .conftest import bits

L, D, N, H, F = 4, 8, 4, 2, 6
AXES = {"*.wq": 0, "*.wkv": 0, "*.down": 1, "*norm": None, "embed": 0}


def rank_files(tmp_path, rng, write):
    """Two stages of two tensor-parallel ranks, Megatron's way: [out, in], fused k and v of the rank's own heads."""
    whole = {
        "embed": rng.normal(size=(10, D)).astype(np.float32),
        "wq": rng.normal(size=(L, N * H, D)).astype(np.float32),
        "wk": rng.normal(size=(L, N * H, D)).astype(np.float32),
        "wv": rng.normal(size=(L, N * H, D)).astype(np.float32),
        "down": rng.normal(size=(L, D, F)).astype(np.float32),
        "norm": rng.normal(size=(L, D)).astype(np.float32),
    }
    paths = []
    for stage in range(2):
        for rank in range(2):
            mine = lambda x, axis, rank=rank: np.ascontiguousarray(np.split(x, 2, axis)[rank])
            arrays = {"embed": mine(whole["embed"], 0)} if stage == 0 else {}
            for i in range(2):
                layer = {name: x[2 * stage + i] for name, x in whole.items() if name != "embed"}
                arrays[f"layers.{i}.wq"] = mine(layer["wq"], 0)
                arrays[f"layers.{i}.wkv"] = np.concatenate([mine(layer["wk"], 0), mine(layer["wv"], 0)])
                arrays[f"layers.{i}.down"] = mine(layer["down"], 1)
                arrays[f"layers.{i}.norm"] = layer["norm"]
            path = tmp_path / f"pp{stage}_tp{rank}"
            write(arrays, path)
            paths.append(path)
    return whole, [paths[:2], paths[2:]]


def write_npz(arrays, path):
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(("open_file", "write"), [(open_safetensors, save_file), (open_npz, write_npz)])
def test_ranks_and_stages_onto_a_mesh(tmp_path, rng, open_file, write):
    whole, paths = rank_files(tmp_path, rng, write)
    unfuse = (lay.split("layers.{k}.wkv", ("layers.{k}.wk", "layers.{k}.wv"), axis=0, sizes=(N * H // 2, N * H // 2)),)
    axes = AXES | {"*.wk": 0, "*.wv": 0}
    stages = [join_ranks([apply_layout(open_file(p), unfuse) for p in stage], axes) for stage in paths]
    arrays = join_stages(stages, layer="layers.{i}.{rest}")
    layout = (lay.stack("layers.{i}.{rest}", "{rest}"), lay.transpose("wq", (0, 2, 1)), lay.split_dim("wq", -1, (N, H)))
    want = whole | {"wq": whole["wq"].transpose(0, 2, 1).reshape(L, D, N, H)}
    mesh = make_mesh(fsdp=4, tp=2)
    specs = {"wq": (None, "fsdp", "tp"), "wk": (None, "tp", "fsdp"), "down": ("fsdp", None, "tp"), "embed": ("tp",)}
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*specs.get(name, ()))))
        for name, x in want.items()
    }
    got = read_into(target, arrays, layout)
    assert bits(got) == bits(want)
    for name, x in got.items():
        assert x.sharding == target[name].sharding
    with pytest.raises(ValueError, match=r"do not fit: 1 missing: bias; 1 extra: wv"):
        read_into({n: t for n, t in target.items() if n != "wv"} | {"bias": target["norm"]}, arrays, layout)


@pytest.mark.parametrize("stage", [1, 3])
def test_zero_partitions(tmp_path, rng, stage):
    """Flat partitions of parameters and moments over three ranks, as DeepSpeed pads and cuts them."""
    shapes = {"embed": (10, D), "norm": (D,), "wq": (D, N, H), "odd": (7,)}
    kinds = {kind: {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()} for kind in ("fp32", "mu")}
    ranks: list[dict] = [{}, {}, {}]
    for kind, tree in kinds.items():
        if stage == 1:
            flat = np.concatenate([x.reshape(-1) for x in tree.values()])
            flat = np.concatenate([flat, np.zeros(-len(flat) % 6, np.float32)])  # to a multiple of 2 x ranks
            parts = np.split(flat, 3)
        else:
            padded = [np.concatenate([x.reshape(-1), np.zeros(-x.size % 3, np.float32)]) for x in tree.values()]
            parts = [np.concatenate([np.split(x, 3)[r] for x in padded]) for r in range(3)]
        for rank, part in zip(ranks, parts):
            rank[kind] = part
    files = []
    for r, rank in enumerate(ranks):
        save_file(rank, tmp_path / f"rank{r}")
        files.append(open_safetensors(tmp_path / f"rank{r}"))
    for kind, tree in kinds.items():
        joined = join_zero(files, kind, shapes, stage=stage)
        assert bits({n: x.whole() for n, x in joined.items()}) == bits(tree)
        np.testing.assert_array_equal(joined["wq"].read((slice(3, 5), slice(1, 3), slice(0, 2))), tree["wq"][3:5, 1:3])
    if stage == 1:  # and flat again
        flatten = lay.inverse(lay.unflatten("flat", shapes, old=len(flat)))
        assert bits(apply_layout(joined, flatten)["flat"].whole()) == bits(flat)
    with pytest.raises(ValueError, match=r"ranks \[0, 1, 2\] have no array nu"):
        join_zero(files, "nu", shapes, stage=stage)
    with pytest.raises(ValueError, match=r"shapes need .* numbers, there are"):
        join_zero(files, "mu", shapes | {"more": (99, 99)}, stage=stage)


def test_what_does_not_join_is_refused(tmp_path, rng):
    _, paths = rank_files(tmp_path, rng, save_file)
    first, second = ([open_safetensors(p) for p in stage] for stage in paths)
    with pytest.raises(ValueError, match="rank 0 and rank 1 differ in embed"):
        join_ranks([first[0], second[0]], AXES)
    with pytest.raises(ValueError, match=r"no pattern says how the ranks share .*norm"):
        join_ranks(first, {k: v for k, v in AXES.items() if k != "*norm"})
    with pytest.raises(ValueError, match=r"down along axis 5"):
        join_ranks(first, AXES | {"*.down": 5})
    with pytest.raises(ValueError, match="two stages hold embed"):
        join_stages([join_ranks(first, AXES)] * 2, layer="layers.{i}.{rest}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int8", "bool", "float16"])
def test_dtypes_and_boxes(tmp_path, rng, dtype):
    x = rng.integers(0, 2, (5, 7)).astype(getattr(ml_dtypes, dtype, dtype))
    save_file({"odd": np.ones(3, np.uint8), "x": x, "empty": np.zeros((0, 2), np.float32)}, tmp_path / "f")
    arrays = open_safetensors(tmp_path / "f")
    assert bits(arrays["x"].whole()) == bits(x)
    assert bits(arrays["x"].read((slice(2, 4), slice(1, 6)))) == bits(x[2:4, 1:6])
    assert arrays["empty"].whole().shape == (0, 2)


def test_hostile_files_are_refused(tmp_path):
    def safetensors(header, data=b"", length=None):
        text = json.dumps(header).encode()
        path = tmp_path / "hostile"
        path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
        return path

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for path in (
        safetensors({"x": entry | {"shape": [1 << 40], "data_offsets": [0, 1 << 42]}}),
        safetensors({"x": entry | {"shape": [1 << 40]}}, bytes(8)),
        safetensors({"x": entry, "y": entry}, bytes(8)),
        safetensors({"x": entry}, bytes(100)),
        safetensors({"x": entry}, bytes(8), length=1 << 60),
    ):
        with pytest.raises(ValueError, match="not a sound safetensors file") as caught:
            open_safetensors(path)
        assert "\n" not in str(caught.value)
    objects = tmp_path / "objects.npz"
    np.savez(objects, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="never unpickled"):
        open_npz(objects)
    (tmp_path / "not.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"not a sound \.npz file"):
        open_npz(tmp_path / "not.npz")
    # A member that says it holds 4 GiB, as the archive's directory has it: nothing is allocated.
    np.savez(tmp_path / "small.npz", x=np.zeros(1000, np.float32))
    data = (tmp_path / "small.npz").read_bytes()
    at = data.index(b"PK\x01\x02")
    claimed = struct.pack("<I", 0xFFFF_FFF0)
    (tmp_path / "large.npz").write_bytes(data[: at + 24] + claimed + data[at + 28 :])
    with pytest.raises(ValueError, match=r"says 4294967280 bytes, more than 41\d\d can hold"):
        open_npz(tmp_path / "large.npz")
