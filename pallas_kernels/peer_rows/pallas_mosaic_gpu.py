"""Rows to and from the other GPUs of a host through their memory, for Hopper GPUs (sm90), in Pallas Mosaic GPU.

A device's kernel reads a peer's rows over NVLink as it reads its own, and writes into a peer's memory, so a transfer
takes no multiprocessors of its own and no buffer, and runs beside what memory here is asked for. XLA has all devices
wait for each other before such a kernel; at its end each tells the others that it has done with their memory. The
addresses are XLA's collective metadata: one process that holds all devices, no NVSHMEM, no multicast.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.mesh import get_concrete_mesh
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _dispatch

_BLOCKS = 132  # multiprocessors of an H100 or H200 SXM
_INNER = 256  # TMA moves boxes of up to 256 numbers a side
_SPREADING, _SLOTS = 4, 8  # warpgroups of a block that spreads, and rows on their way of each, at most
_COLLECTING, _TOKENS = 3, 2  # warpgroups of a block that collects, at most; tokens of each whose rows are on their way
_SHARED = 224 * 1024  # bytes of a block
_MOST_PLACES = 8  # of a token
_MOST_DEVICES = 8


def supported(x, place, devices: int) -> str | None:
    """None, or the reason why these kernels cannot run this call: rows x [.., D], place [devices * n, K]."""
    if reason := _dispatch.unless_hopper():
        return reason
    if not 1 < devices <= _MOST_DEVICES:
        return f"takes 2 to {_MOST_DEVICES} devices. Got {devices}"
    mesh = list(get_concrete_mesh().devices.flat)
    if jax.process_count() > 1 or not set(mesh) <= set(jax.devices()):
        return f"reads the memory of one process's devices, set by jax.set_mesh. Got {jax.process_count()} processes"
    # XLA's metadata goes by their numbers, and all of a mesh wait for each other, not those of one axis alone.
    if [d.id for d in mesh] != list(range(devices)):
        return f"takes a mesh of devices 0 to {devices - 1}, in this order, all on one axis. Got {[d.id for d in mesh]}"
    if jnp.dtype(x.dtype).itemsize not in (2, 4):
        return f"takes rows of 2 or 4 bytes a number. Got {x.dtype}"
    if x.shape[1] % _INNER or 0 in x.shape or place.shape[1] > _MOST_PLACES:
        return (
            f"takes D that is a multiple of {_INNER} and up to {_MOST_PLACES} places. "
            f"Got x {x.shape}, place {place.shape}"
        )
    if _slots(x) < 2 or not _collecting(x, place):
        return f"needs rows of two tokens in {_SHARED} bytes. Got x {x.dtype}{x.shape}, place {place.shape}"
    return None


def spread_from_peers(x: jax.Array, token: jax.Array, place: jax.Array, axis: str) -> jax.Array:
    """Rows go round the devices: while one comes over NVLink, others leave for memory."""
    S, (n, D), K, rows = lax.axis_size(axis), x.shape, place.shape[1], token.shape[0]
    step, slots = _BLOCKS * _SPREADING, _slots(x)
    ahead = slots // 2

    def kernel(x_ref, place_ref, out_ref, smem, full):
        me, wg = lax.axis_index(axis), lax.axis_index("wg")
        sources = [x_ref, *(plgpu.remote_ref(x_ref, _other(axis, me, j)) for j in range(1, S))]
        first = lax.axis_index("block") * _SPREADING + wg
        count = _share(n, first, step) * S
        slot_of = lambda i: lax.rem(i, jnp.int32(slots))
        turn = lambda i: lax.rem(i, jnp.int32(S))  # whose row: of the device so far after this one
        row = lambda i: first + lax.div(i, jnp.int32(S)) * step

        def load(i):
            slot = slot_of(i)
            for j, source in enumerate(sources):

                @pl.when(turn(i) == j)
                def _(source=source):
                    plgpu.copy_gmem_to_smem(source.at[row(i)], smem.at[wg, slot], full.at[wg * slots + slot])

        for i in range(ahead):
            pl.when(i < count)(functools.partial(load, jnp.int32(i)))

        @pl.loop(0, count)
        def _(i):
            slot = slot_of(i)
            at = lax.rem(me + turn(i), jnp.int32(S)) * n + row(i)
            places = [place_ref[at, k] + 0 for k in range(K)]
            plgpu.barrier_wait(full.at[wg * slots + slot])
            for p in places:

                @pl.when(p < rows)
                def _(p=p):
                    plgpu.copy_smem_to_gmem(smem.at[wg, slot], out_ref.at[p], commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            # What the next load overwrites has left: it was the row `slots - ahead` before this one.
            plgpu.wait_smem_to_gmem(slots - ahead, wait_read_only=True)
            pl.when(i + ahead < count)(functools.partial(load, i + ahead))

        plgpu.wait_smem_to_gmem(0)
        _meet(axis, me, S, step)

    out = jax.ShapeDtypeStruct((rows, D // _INNER, _INNER), x.dtype)
    scratch = (
        plgpu.SMEM((_SPREADING, slots, D // _INNER, _INNER), x.dtype),
        plgpu.Barrier(num_barriers=_SPREADING * slots),
    )
    (out,) = _call(kernel, "spread_from_peers", [out], scratch, _SPREADING, _boxes(x), place)
    return out.reshape(rows, D)


def collect_at_home(y: jax.Array, place: jax.Array, axis: str) -> jax.Array:
    """Sums of the peers' tokens go into their memory while own ones are added up here. Float32 inside; each device's
    part is rounded to y's dtype once, as where parts are summed by psum_scatter."""
    S, (R, D), K = lax.axis_size(axis), y.shape, place.shape[1]
    n, workers = place.shape[0] // S, _collecting(y, place)
    step = _BLOCKS * workers

    def kernel(y_ref, place_ref, own_ref, got_ref, smem, sums, full):
        me, wg = lax.axis_index(axis), lax.axis_index("wg")
        first = lax.axis_index("block") * workers + wg
        count = _share(n, first, step) * S
        turn = lambda i: lax.rem(i + 1, jnp.int32(S))  # whose token; peers' first
        row = lambda i: first + lax.div(i, jnp.int32(S)) * step

        def places(i):
            at = lax.rem(me + turn(i), jnp.int32(S)) * n + row(i)
            at = jnp.where(i < count, at, 0)
            return tuple(jnp.where(i < count, place_ref[at, k] + 0, R) for k in range(K))

        def load(i, where):
            slot = lax.rem(i, jnp.int32(_TOKENS))
            barrier = full.at[wg * _TOKENS + slot]
            for k, p in enumerate(where):
                pl.when(p >= R)(lambda: plgpu.barrier_arrive(barrier))

                @pl.when(p < R)
                def _(k=k, p=p):
                    plgpu.copy_gmem_to_smem(y_ref.at[p], smem.at[wg, slot, k], barrier)

        def one_token(i, ahead):
            where, *ahead = ahead
            new = places(i + _TOKENS)
            slot, out = lax.rem(i, jnp.int32(_TOKENS)), lax.rem(i, jnp.int32(2))
            plgpu.barrier_wait(full.at[wg * _TOKENS + slot])
            total = jnp.zeros((D // _INNER, _INNER), jnp.float32)
            for k, p in enumerate(where):
                add = lambda total, k=k: total + smem[wg, slot, k].astype(jnp.float32)
                total = lax.cond(p < R, add, lambda total: total, total)
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            sums[wg, out] = total.astype(y.dtype)
            plgpu.commit_smem()  # and all of the warpgroup have read the slot that is loaded next
            load(i + _TOKENS, new)

            @pl.when(turn(i) == 0)
            def _():
                plgpu.copy_smem_to_gmem(sums.at[wg, out], own_ref.at[row(i)], commit_group=False)

            for j in range(1, S):

                @pl.when(turn(i) == j)
                def _(j=j):
                    there = plgpu.remote_ref(got_ref, _other(axis, me, j)).at[j - 1, row(i)]
                    plgpu.copy_smem_to_gmem(sums.at[wg, out], there, commit_group=False)

            plgpu.commit_smem_to_gmem_group()
            return *ahead, new

        ahead = tuple(places(jnp.int32(i)) for i in range(_TOKENS))
        for i, where in enumerate(ahead):
            load(jnp.int32(i), where)
        lax.fori_loop(0, count, one_token, ahead)
        plgpu.wait_smem_to_gmem(0)
        _meet(axis, me, S, step)

    box = (D // _INNER, _INNER)
    outs = [jax.ShapeDtypeStruct((n, *box), y.dtype), jax.ShapeDtypeStruct((S - 1, n, *box), y.dtype)]
    scratch = (
        plgpu.SMEM((workers, _TOKENS, K, *box), y.dtype),
        plgpu.SMEM((workers, 2, *box), y.dtype),
        plgpu.Barrier(num_arrivals=K, num_barriers=workers * _TOKENS),
    )
    own, got = _call(kernel, "collect_at_home", outs, scratch, workers, _boxes(y), place)
    total = own.reshape(n, D).astype(jnp.float32)
    for j in range(S - 1):
        total = total + got[j].reshape(n, D).astype(jnp.float32)
    return total.astype(y.dtype)


# Pieces.


def _row(x) -> int:
    return x.shape[1] * jnp.dtype(x.dtype).itemsize


def _slots(x) -> int:
    return min(_SLOTS, _SHARED // (_SPREADING * _row(x)))


def _collecting(y, place) -> int:
    """Each has its tokens' rows, and two sums that leave."""
    return min(_COLLECTING, _SHARED // ((_TOKENS * place.shape[1] + 2) * _row(y)))


def _other(axis: str, me, j: int) -> Any:
    """The device j after this one on the axis; a number that the host, which makes TMA's descriptors, computes too."""
    return {axis: lax.rem(me + j, jnp.int32(lax.axis_size(axis)))}


def _share(n: int, first, step: int):
    """How many of n rows are first, first + step, ..."""
    return lax.div(jnp.int32(n) - first + step - 1, jnp.int32(step))


def _meet(axis: str, me, S: int, warpgroups: int) -> None:
    """Each warpgroup tells the peers that it is done with their memory; the kernel ends once all of them have."""
    done = pl.get_global(plgpu.SemaphoreType.REGULAR)
    for j in range(1, S):
        pl.semaphore_signal(done, device_id=_other(axis, me, j))

    @pl.when((lax.axis_index("block") == 0) & (lax.axis_index("wg") == 0))
    def _():
        pl.semaphore_wait(done, (S - 1) * warpgroups)


def _boxes(x):
    return x.reshape(x.shape[0], x.shape[1] // _INNER, _INNER)


def _call(kernel, name: str, out, scratch, warpgroups: int, *operands):
    result = plgpu.kernel(
        kernel,
        out_type=out,
        scratch_types=scratch,
        grid=(_BLOCKS,),
        grid_names=("block",),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name=name,
    )(*operands)
    axes = tuple(sorted(jax.typeof(operands[0]).mat.varying))
    return [lax.pcast(x, axes, to="varying") for x in result] if axes else result
