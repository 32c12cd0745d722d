"""Remote copies between TPUs, written in Pallas: every run goes by one DMA straight into the receiver's memory.

All runs are in flight at once, over all links, and nothing is padded: DMAs take sizes that only the device knows. Rows
must begin where tiles do: one of [8, D] is whole tiles; any other is laid out anew by XLA on both sides, in words of 32
bits.

Nobody writes before the receiver's array is there: all devices that exchange meet first, twice. Once is not enough: a
device whose rows have come may be in the next call while another still waits here, and its signal for that call would
be taken for this one's.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from pallas_kernels import _dispatch

_LANES, _SUBLANES = 128, 8
_COLLECTIVE = 13  # which barrier: calls of one program follow each other, so one number does for all


def supported(operand) -> str | None:
    """None, or the reason why this kernel cannot run this call. All devices must be of one slice."""
    if reason := _dispatch.unless_tpu():
        return reason
    if operand.dtype.itemsize not in (1, 2, 4):
        return f"takes numbers of 1, 2 or 4 bytes. Got {operand.dtype}"
    mesh = jax.sharding.get_abstract_mesh()
    if free := [name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual]:
        return f"needs jax.shard_map over all axes of the mesh; {', '.join(map(str, free))} are not manual here"
    return None


def ragged_all_to_all(operand: jax.Array, output, runs, over) -> jax.Array:
    """output: [S, ...], or S."""
    into, out_of = _layout(operand)
    rows = output if isinstance(output, int) else output.shape[0]
    arrays = [into(operand)] + ([] if isinstance(output, int) else [into(output)])
    shape = rows, *arrays[0].shape[1:]
    groups = _groups(over)
    tables = over.index()[None], _peers(groups), *runs
    here = pl.BlockSpec(memory_space=pltpu.SMEM)
    there = pl.BlockSpec(memory_space=pltpu.HBM)

    def kernel(index, peers, starts, sizes, places, arriving, source, *refs):
        target, sent, came, second = refs[-4:]
        _exchange(index[0], peers, starts, sizes, places, arriving, source, target, sent, came, second)

    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, operand.dtype, manual_axis_type=jax.typeof(operand).mat),
        in_specs=[here] * len(tables) + [there] * len(arrays),
        out_specs=there,
        input_output_aliases={} if isinstance(output, int) else {len(tables) + 1: 0},
        scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.REGULAR],
        compiler_params=pltpu.CompilerParams(collective_id=_COLLECTIVE),
        name="ragged_all_to_all",
        metadata={  # for who counts a program's traffic: at most so much, from even loads
            "collective": "ragged-all-to-all",
            "replica_groups": json.dumps(groups.tolist()),
            "bytes": str(min(rows, operand.shape[0]) * math.prod(shape[1:]) * operand.dtype.itemsize),
        },
    )(*tables, *arrays)
    return out_of(out)


def _layout(operand):
    """Two functions: from the operand's shape to one whose rows begin where tiles do, and back."""
    if operand.ndim == 3 and operand.shape[1] % _SUBLANES == 0 and operand.shape[2] % _LANES == 0:
        return lambda x: x, lambda x: x
    D = math.prod(operand.shape[1:])
    pack = 4 // operand.dtype.itemsize
    width = -(-D // (_LANES * pack)) * _LANES

    def into(x):
        x = x.reshape(x.shape[0], D)
        return jnp.pad(x, ((0, 0), (0, width * pack - D))).reshape(x.shape[0], pack, width)

    return into, lambda x: x.reshape(x.shape[0], pack * width)[:, :D].reshape(x.shape[0], *operand.shape[1:])


def _exchange(index, peers, starts, sizes, places, arriving, source, target, sent, came, second):
    """sent, came: semaphores that count bytes."""
    devices, count = peers.shape[0], sizes.shape[0]
    per = count // devices
    _meet(pltpu.get_barrier_semaphore(), index, peers)
    _meet(second, index, peers)

    def send(i, leaving):
        to = lax.rem(index + 1 + lax.rem(i, devices), devices)  # around, from the next one on: all links from the start
        run = to * per + lax.div(i, devices)
        rows = sizes[run]
        part, place = source.at[pl.ds(starts[run], rows)], target.at[pl.ds(places[run], rows)]

        @pl.when((rows > 0) & (to != index))
        def _():
            pltpu.make_async_remote_copy(
                part, place, sent, came, device_id=peers[to], device_id_type=pl.DeviceIdType.LOGICAL
            ).start()

        @pl.when((rows > 0) & (to == index))
        def _():
            pltpu.make_async_copy(part, place, came).start()

        return leaving + jnp.where(to == index, 0, rows)

    leaving = lax.fori_loop(0, count, send, jnp.int32(0))
    entering = lax.fori_loop(0, count, lambda i, rows: rows + arriving[i], jnp.int32(0))
    _wait(source, leaving, sent)
    _wait(target, entering, came)


def _wait(ref, rows, semaphore):
    """Until the bytes of so many rows have been counted, which may be more than ref has: a row can go to several."""
    most = ref.shape[0]

    @pl.loop(0, lax.div(rows + most - 1, most))
    def _(i):
        part = ref.at[pl.ds(0, jnp.minimum(rows - i * most, most))]
        pltpu.make_async_copy(part, part, semaphore).wait()  # starts nothing


def _meet(semaphore, index, peers):
    devices = peers.shape[0]

    @pl.loop(1, devices)
    def _(i):
        to = peers[lax.rem(index + i, devices)]
        pl.semaphore_signal(semaphore, 1, device_id=to, device_id_type=pl.DeviceIdType.LOGICAL)

    pl.semaphore_wait(semaphore, devices - 1)


def _groups(over) -> np.ndarray:
    """[groups, devices]: numbers in the mesh of those that exchange with each other."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = tuple(mesh.shape.values())
    ids = np.moveaxis(np.arange(math.prod(sizes)).reshape(sizes), mesh.axis_names.index(over.axis_name), -1)
    parts = [ids] if over.groups is None else [ids[..., list(group)] for group in over.groups]
    return np.concatenate([part.reshape(-1, over.size) for part in parts])


def _peers(groups: np.ndarray) -> jax.Array:
    """int32 [devices]: numbers in the mesh of those that exchange with this one."""
    me = jnp.int32(0)
    for name, size in jax.sharding.get_abstract_mesh().shape.items():
        me = me * size + lax.axis_index(name)
    row = np.zeros(groups.size, np.int32)
    row[groups] = np.arange(len(groups))[:, None]
    return jnp.asarray(groups, jnp.int32)[jnp.asarray(row)[me]]
