"""Which blocks meet, and who computes them: the tables of attention's kernels against the mask itself."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.blocks import coarser, key_ranges, query_ranges
from pallas_kernels.attention.inputs import Inputs, Options, visible

# importlib: the package's attribute `attention` is the function.
schedule = importlib.import_module("pallas_kernels.attention.schedule")


def in_blocks(mask, bq, bkv):
    """Of each block of a mask: does any pair see each other, do all of them, rows after the last one aside."""
    down, right = -mask.shape[1] % bq, -mask.shape[2] % bkv
    some = np.pad(mask, ((0, 0), (0, down), (0, right)))
    every = np.pad(np.pad(mask, ((0, 0), (0, down), (0, 0)), constant_values=True), ((0, 0), (0, 0), (0, right)))
    shape = len(mask), some.shape[1] // bq, bq, some.shape[2] // bkv, bkv
    return some.reshape(shape).any((2, 4)), every.reshape(shape).all((2, 4))


def test_block_tables_hold_every_visible_pair(rng):
    T, S, bq, bkv = int(rng.integers(20, 90)), int(rng.integers(20, 90)), 16, 8
    q, k = jnp.zeros((2, T, 1, 1)), jnp.zeros((2, S, 1, 1))
    ids = [jnp.asarray(np.sort(rng.integers(0, 4, (2, n)), axis=1), jnp.int32) for n in (T, S)]
    positions = [jnp.asarray(np.sort(rng.integers(0, 50, (2, n)), axis=1), jnp.int32) for n in (T, S)]
    shuffled = [jnp.asarray(rng.integers(0, 50, (2, n)), jnp.int32) for n in (T, S)]
    for _ in range(24):
        causal, packed, placed, anyhow = rng.random(4) < 0.5
        static = [(None, None), (int(rng.integers(0, 40)), None), (None, int(rng.integers(0, 40))), (5, 3)]
        inputs, options = Inputs(q, k, k), Options(bool(causal), static[rng.integers(4)], 1.0, None)
        if packed:
            inputs = inputs._replace(q_segment_ids=ids[0], kv_segment_ids=ids[1])
        if placed:
            q_positions, kv_positions = shuffled if anyhow else positions
            inputs = inputs._replace(q_positions=q_positions, kv_positions=kv_positions)
        if options.window == (None, None):
            inputs = inputs._replace(window=jnp.int32(rng.integers(1, 60)))
        mask = visible(inputs, options)
        mask = np.ones((1, T, S), bool) if mask is None else np.asarray(mask)
        (any_pair, all_pairs), by_rows = in_blocks(mask, bq, bkv), key_ranges(inputs, options, bq, bkv)
        rows, block = rng.integers(1, 4, 2)
        for table, some, whole in (
            (by_rows, any_pair, all_pairs),
            (query_ranges(inputs, options, bq, bkv), any_pair.swapaxes(1, 2), all_pairs.swapaxes(1, 2)),
            (coarser(by_rows, rows, block), *in_blocks(mask, rows * bq, block * bkv)),
        ):
            table = np.broadcast_to(np.asarray(table), (len(mask), *table.shape[1:]))
            lo, full_lo, full_hi, hi = np.moveaxis(table, 2, 0)[..., None]
            index = np.arange(some.shape[2])
            assert ((lo >= 0) & (lo <= full_lo) & (full_lo <= full_hi) & (full_hi <= hi)).all()
            assert not (some & ~((lo <= index) & (index < hi))).any(), "a block that some pair needs is skipped"
            assert not ((full_lo <= index) & (index < full_hi) & ~whole).any(), (
                "a block that hides a pair is not masked"
            )


@pytest.mark.parametrize("restart", [False, True])
def test_packed_documents_cost_what_they_cost(rng, restart):
    """Documents and padding of any lengths of a block and more: the tables visit the blocks in which a pair is visible,
    whether positions restart with each document or not, and mask only those that hide one."""
    block, lengths = 16, rng.integers(16, 200, 12)
    ids = np.repeat([*range(1, 12), 0], lengths)[None]
    order = np.arange(ids.shape[1], dtype=np.int32)[None]
    positions = jnp.asarray(order - (np.searchsorted(ids[0, : -lengths[-1]], ids[0]) if restart else 0))
    q, ids = jnp.zeros((1, ids.shape[1], 1, 1)), jnp.asarray(ids, jnp.int32)
    inputs = Inputs(q, q, q, None, None, ids, ids, positions, positions)
    options = Options(True, [(None, None), (40, None)][rng.integers(2)], 1.0, None)
    mask = np.asarray(visible(inputs, options))[0]
    mask = np.pad(mask, [(0, -len(mask) % block)] * 2).reshape(-1, block, -(-len(mask) // block), block)
    visible_blocks, full_blocks = mask.any((1, 3)), mask.all((1, 3))
    for ranges, some, every in (
        (key_ranges, visible_blocks, full_blocks),
        (query_ranges, visible_blocks.T, full_blocks.T),
    ):
        table = ranges(inputs, options, block, block)
        lo, full_lo, full_hi, hi = np.asarray(table)[0].T
        np.testing.assert_array_equal(hi - lo, some.sum(axis=1))
        np.testing.assert_array_equal((full_hi - full_lo)[:-1], every.sum(axis=1)[:-1])
        lo, full_lo, full_hi, hi = np.asarray(coarser(table, 2, 3))[0].T
        some, every = (np.pad(x, [(0, -n % m) for n, m in zip(x.shape, (2, 3))]) for x in (some, every))
        some, every = (x.reshape(-1, 2, x.shape[1] // 3, 3) for x in (some, every))
        np.testing.assert_array_equal(hi - lo, some.any((1, 3)).sum(axis=1))
        np.testing.assert_array_equal((full_hi - full_lo)[:-1], every.all((1, 3)).sum(axis=1)[:-1])


def test_tables_are_few_reductions(rng):
    """A table is one reduction of the queries' tokens, one of the keys' (the compiler finds where they are the same)
    and one of the table itself, each of several numbers: on a GPU, where each is a kernel, there were twenty."""
    ids, positions = (jnp.asarray(np.sort(rng.integers(1, 9, (1, 64))), jnp.int32) for _ in range(2))
    q = jnp.zeros((1, 64, 1, 1))
    inputs, options = Inputs(q, q, q, None, None, ids, ids, positions, positions), Options(True, (9, None), 1.0, None)
    for ranges in (key_ranges, query_ranges):
        text = str(jax.make_jaxpr(lambda inputs, ranges=ranges: ranges(inputs, options, 16, 8))(inputs))
        assert len(re.findall(r"= reduce(?:_\w+)?\[", text)) == 3, text


def test_every_tile_has_a_block(rng):
    """Each tile once, long ones first, blocks that end at about the same time, where the table is known and where it is
    made on the device: of one row or of one for each batch, few tiles or many."""
    heads, (tiles, together) = 3, [(40, 1), (40, 6), (150, 3), (400, 1)][rng.integers(4)]
    for rows, traced in ((1, False), (1, True), (2, True)):
        ranges = np.sort(rng.integers(0, tiles, (rows, tiles, 4)), axis=2).astype(np.int32)
        steps = ranges[..., 3] - ranges[..., 0]
        dealt = schedule.deal(jnp.asarray(steps) if traced else steps, 2, heads, together)
        assert isinstance(dealt, jax.Array) == traced and len(dealt) == schedule.SM_COUNT
        done = [row[1 : 1 + row[0]] for row in np.asarray(dealt)]
        np.testing.assert_array_equal(np.sort(np.concatenate(done)), np.arange(2 * heads * tiles))
        costs = [steps[x // tiles // heads % rows, x % tiles] + 1 for x in done]
        if together == 6:
            assert all((np.diff(x) <= 0).all() for x in costs)
        sums = [x.sum() for x in costs]
        assert max(sums) <= np.mean(sums) + tiles
        names = rng.permutation(100 + tiles)[:tiles].astype(np.int32)
        for row, order in zip(steps, np.asarray(schedule.longest_first(jnp.asarray(steps), names))):
            np.testing.assert_array_equal(np.sort(order), np.sort(names))
            assert (np.diff(row[[list(names).index(x) for x in order]]) <= 0).all()


def test_a_tile_is_described_where_it_is_scheduled(rng):
    """Where the table is known, and where it is made on the device with a row for each batch."""
    heads, tiles, wgs, parts = 3, 30, *rng.integers(1, 3, 2).tolist()
    for rows, traced in ((1, False), (2, True)):
        ranges = np.sort(rng.integers(0, 9, (rows, tiles * wgs, 4)), axis=2).astype(np.int32)
        given = jnp.asarray(ranges) if traced else ranges
        dealt = schedule.deal(schedule.tile_steps(given, wgs), 2, heads, 3)
        turns = np.asarray(schedule.in_turn(given, wgs))
        for row, of_row in zip(turns, ranges):
            np.testing.assert_array_equal(np.sort(row[:, 0]), np.arange(tiles))
            assert (np.diff(row[:, 2] - row[:, 1]) <= 0).all() or not traced
            lo, hi = row[:, 1, None], row[:, 2, None]
            mine = of_row.reshape(tiles, -1)[row[:, 0]]
            np.testing.assert_array_equal(row[:, 3:], np.clip(mine, lo, hi))
            assert ((lo <= mine[:, ::4]) | (mine[:, ::4] == mine[:, 3::4])).all() and (mine[:, 3::4] <= hi).all()
        found = schedule.describe(dealt, given, heads, wgs, parts)
        assert isinstance(found, jax.Array) == traced
        np.testing.assert_array_equal(found[:, 0, 0], dealt[:, 0])
        for block, w in np.ndindex(len(dealt), dealt.shape[1] - 1):
            b, n, t, lo, hi, *bounds = np.asarray(found)[block, w + 1].tolist()
            assert (b * heads + n) * tiles + t == dealt[block, w + 1]
            mine = ranges[b % rows, t * wgs : (t + 1) * wgs]
            visited = [x for x in mine if x[0] < x[3]]
            assert hi == max(-(-max(mine[:, 3]) // parts), lo + 1)
            assert not visited or lo == min(x[0] for x in visited) // parts
            np.testing.assert_array_equal(bounds, np.clip(mine, lo * parts, hi * parts).reshape(-1))
