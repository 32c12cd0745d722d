"""Named arrays on disk: Orbax writes the shards, TensorStore reads them."""

import concurrent.futures
import functools
import itertools
import logging
import operator
import os
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxscale.checkpoint.checksum import crc32_share, crc32_whole

# Orbax 0.12 keeps the id of its current operation per process: a second save makes the first one's threads wait for the
# wrong directory. One at a time, then, from its start to its end.
ONE_OPERATION = threading.Lock()

# Each of Orbax's threads prints the stack of what stopped a save, a full disk say, before the save's own error, which
# this package reports in a line, says the same.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run()" not in str(record.msg))

ITEM = "state"  # the folder of a step that holds the arrays
OWNER: dict[str, Any] = {
    "written_by": "jaxscale"
}  # in Orbax's metadata: such a step is ours to clean away when it is half-written


def start_save(path: str, arrays: Mapping[str, Any]) -> Any:
    """Starts writing; the answer's `.result()` waits for it. All processes call it, with arrays that nobody donates."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # random float32 shrinks by 7 % and takes five times as long
    context.array.saving.ocdbt_target_data_file_size = 256 << 20  # a file is sent to an object store in one piece
    context.asynchronous.timeout_secs = 600  # of a process for the others
    context.memory.deepcopy_host_arrays = False  # the snapshot is a copy already
    with context:
        return ocp.save_async(path, dict(arrays), checkpointable_name=ITEM, overwrite=True, custom_metadata=OWNER)


def open_array(path: Any, name: str) -> Any:
    """A lazy TensorStore of one array: index it, then `.read().result()`. Needs neither devices nor the model."""
    import tensorstore as ts

    return ts.open(
        {"driver": "zarr3", "kvstore": _database(path) | {"path": f"{name}/"}}, open=True, read=True
    ).result()


def check_index(path: Any) -> None:
    """Reads the index of all chunks, which checks its checksums; raises ValueError when it is damaged."""
    import tensorstore as ts

    ts.KvStore.open(_database(path)).result().list().result()


def _database(path: Any) -> dict[str, Any]:
    """The kvstore of a step's arrays; its folder is a path, a URL (gs://, s3://) or a `remote.RemotePath`."""
    if hasattr(path, "spec"):
        return {"driver": "ocdbt", "base": (path / ITEM / "").spec}
    path = os.fspath(path)
    base = path if "://" in path else f"file://{path}"
    return {"driver": "ocdbt", "base": f"{base}/{ITEM}/"}


def stored_crc32(path: Any, name: str) -> int:
    """CRC-32 of an array as it lies on disk, read chunk by chunk."""
    array = open_array(path, name)
    chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
    starts = itertools.product(*(range(0, size, step) for size, step in zip(array.shape, chunk)))

    def share(start: tuple[int, ...]) -> int:
        block = tuple(slice(i, min(i + step, size)) for i, step, size in zip(start, chunk, array.shape))
        return crc32_share(array[block].read().result(), start, array.shape)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        shares = functools.reduce(operator.xor, pool.map(share, starts), 0)
    return crc32_whole(shares, array.size * array.dtype.numpy_dtype.itemsize)


def local_share(array: Any) -> int:
    """This process's share of an array's CRC-32: its shards, each replicated part counted in one place only."""
    if not isinstance(array, jax.Array):
        return crc32_share(np.asarray(array), (0,) * np.ndim(array), np.shape(array)) if jax.process_index() == 0 else 0
    share = 0
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            start = [index.start or 0 for index in shard.index]
            share ^= crc32_share(np.asarray(shard.data), start, array.shape)
    return share
