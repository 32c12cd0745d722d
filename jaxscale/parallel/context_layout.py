"""How the tokens of a row are dealt over cp devices: a permutation, applied once where batches are made (numpy)."""

from typing import Any, get_args

import numpy as np

from jaxscale.config import CPLayout

_PARTS = 256  # of a device's tokens, at most: what the planner deals
_PART_TOKENS = 128  # at least, where the row allows it: a kernel's block
_SIDE = 8  # documents that a device gives for one
_BALANCED = 1.015  # the busiest device's work over the mean, where documents may stay whole


def permute_batch(
    batch: dict[str, Any], layout: CPLayout, cp: int, *, causal: bool = True, window: int | None = None
) -> dict[str, Any]:
    """A batch whose rows, cut into cp equal pieces, give every device the tokens that the layout gives it.

    Positions go along, so rotary embeddings and masks see the sequence as it was; a loss over tokens does not change.

    Args:
      batch: arrays [B, T, ...] by name; `positions` are added where there are none.
      layout: see `layout_order`.
      causal, window: of the attention that "packed" balances.

    Raises:
      ValueError: T does not divide; positions restart but there are no segment_ids to tell the documents apart.
    """
    B, T = np.shape(next(iter(batch.values())))[:2]
    if layout == "contiguous":
        _check(T, cp, layout)
        return batch
    if "positions" not in batch:
        batch = batch | {"positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))}
    if "segment_ids" not in batch and (np.diff(batch["positions"]) <= 0).any():
        raise ValueError(
            f"positions restart inside a row but the batch has no segment_ids: once dealt as {layout!r}, tokens of one "
            f"document could not be told from another's; add segment_ids, or use the layout 'contiguous'"
        )
    order = layout_order(layout, T, cp, batch["positions"], batch.get("segment_ids"), causal=causal, window=window)
    return {name: permute(x, order) for name, x in batch.items()}


def layout_order(
    layout: CPLayout,
    seq_len: int,
    cp: int,
    positions: np.ndarray | None = None,
    segment_ids: np.ndarray | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> np.ndarray:
    """int32 [T], or [B, T] for "packed": the token that stands at each place.

    - contiguous: as it was.
    - zigzag: 2 cp chunks, the i-th and the i-th from the end together.
    - striped: token t on device t % cp.
    - packed: devices do the same attention work (`token_work`), and most documents stay whole. Within a device tokens
      keep their order.

    Raises:
      ValueError: T does not divide by cp (zigzag: 2 cp).
    """
    _check(seq_len, cp, layout)
    t = np.arange(seq_len, dtype=np.int32)
    if layout == "zigzag":
        chunks = t.reshape(2, cp, -1)
        return np.concatenate([chunks[0], chunks[1, ::-1]], axis=1).reshape(-1)
    if layout == "striped":
        return t.reshape(-1, cp).T.reshape(-1)
    if layout == "contiguous":
        return t
    if positions is None:
        raise ValueError("the layout 'packed' balances documents: give it positions and segment_ids of the rows")
    work = token_work(positions, segment_ids, causal=causal, window=window)
    ids = np.ones_like(work) if segment_ids is None else np.asarray(segment_ids)
    return np.stack([_deal(*row, cp) for row in zip(work, ids)])


def permute(x: Any, order: np.ndarray) -> np.ndarray:
    """x [B, T, ...] with the tokens of each row in the given order, [T] or [B, T]."""
    x = np.asarray(x)
    if order.ndim == 1:
        return x[:, order]
    return np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), axis=1)


def restore(x: Any, order: np.ndarray) -> np.ndarray:
    """The inverse of `permute`: what a model says of each token, back in the order of the text."""
    return permute(x, np.argsort(order, axis=-1))


def token_work(
    positions: np.ndarray, segment_ids: np.ndarray | None = None, *, causal: bool = True, window: int | None = None
) -> np.ndarray:
    """int64 [B, T]: how many keys each token sees, where positions count up from the start of its document.

    Args:
      window: as in `pallas_kernels.attention`, an int.
    """
    positions = np.asarray(positions).astype(np.int64)
    ids = np.ones_like(positions) if segment_ids is None else np.asarray(segment_ids)
    before = positions + 1
    if window is not None:
        before = np.minimum(before, window)
    work = before
    if not causal:
        length = np.zeros_like(positions)
        for row, (row_ids, row_positions) in enumerate(zip(ids, positions)):
            last = np.zeros(row_ids.max() + 1, np.int64)
            np.maximum.at(last, row_ids, row_positions)
            length[row] = last[row_ids] + 1
        after = length - positions - 1
        work = before + (after if window is None else np.minimum(after, window - 1))
    return np.where(ids > 0, work, 0)


def work_per_device(work: np.ndarray, cp: int) -> np.ndarray:
    """[B, T] work of tokens as they are dealt -> [B, cp]."""
    return work.reshape(work.shape[0], cp, -1).sum(axis=2)


def _deal(work: np.ndarray, ids: np.ndarray, cp: int) -> np.ndarray:
    """The order [T] of one row.

    Little is cut: no document, a single one, at first one of few tokens, some side by side, or else those with the most
    work. The others stay whole, on the device that has least work and still has room, until devices exchange some. What
    is cut, and padding, fills the devices up. Tokens keep their order on a device: kernels skip ranges of keys, by the
    extremes of segment ids.
    """
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    sizes = np.diff(starts, append=len(ids))
    loads = np.add.reduceat(work, starts)
    documents = [i for i in np.argsort(-loads, kind="stable") if ids[starts[i]] > 0]
    document = np.repeat(np.arange(len(starts)), sizes)
    halvings = range(len(documents).bit_length())
    count = len(documents)
    ranks = [count * 7 // 8, count * 3 // 4, *(count >> i for i in halvings[1:])] if count else []
    single = [documents[i] for i in dict.fromkeys(ranks)]
    near = [[i for i in range(d - n, d + n + 1) if i in documents] for n in (0, 1, 2, 4) for d in single]
    cuts = [[], *near, *(documents[: 2**i] for i in halvings)]

    def excess(order):
        return work_per_device(work[order][None], cp).max() / max(1.0, work.sum() / cp)

    best = _deal_all(work, cp)
    for cut in cuts:
        owner = _owners(work, document, sizes, loads, [i for i in documents if i not in cut], cp)
        if owner is not None:
            order = np.argsort(owner, kind="stable").astype(np.int32)
            if excess(order) <= _BALANCED:
                return order
            best = min(best, order, key=excess)
    return best if excess(best) <= _BALANCED else _evened(best, work, cp)


def _owners(work, document, sizes, loads, whole, cp: int) -> np.ndarray | None:
    """The device of each token, [T]; None where a whole document finds no room. `whole` in order of work."""
    T = len(work)
    room, load = np.full(cp, T // cp), np.zeros(cp)
    where = np.full(len(sizes), -1)
    for i in whole:
        fits = np.flatnonzero(room >= sizes[i])
        if not fits.size:
            return None
        device = fits[np.argmin(load[fits])]
        where[i], room[device], load[device] = device, room[device] - sizes[i], load[device] + loads[i]
    _exchange(where, room, load, sizes, loads)
    owner = where[document]
    pool = np.flatnonzero(owner < 0)
    pool = pool[np.argsort(work[pool] > 0, kind="stable")]  # padding first: odd sizes cost nothing there
    part = min(_PART_TOKENS, max(1, T // cp // 32))
    odd = room % part
    owner[pool[: odd.sum()]] = np.repeat(np.arange(cp), odd)
    load += np.bincount(owner[pool[: odd.sum()]], work[pool[: odd.sum()]], cp)
    parts, room = pool[odd.sum() :].reshape(-1, part), room // part
    part_work = work[parts].sum(axis=1)
    for i in np.argsort(-part_work, kind="stable"):
        fits = np.flatnonzero(room > 0)
        device = fits[np.argmin(load[fits])]
        owner[parts[i]], room[device], load[device] = device, room[device] - 1, load[device] + part_work[i]
    return owner


def _exchange(where, room, load, sizes, loads) -> None:
    """In place: the busiest device gives the idlest a document for one or several (`_SIDE` at most) that hold nearly as
    many tokens, so that they differ by as little as can be. One for one would not fit a device that is full: what is
    heavier is longer."""
    by_size = np.argsort(sizes, kind="stable")
    while True:
        busy, idle = load.argmax(), load.argmin()
        gap = load[busy] - load[idle]
        give, take = (x[:: len(x) // 128 + 1] for x in (by_size[where[by_size] == d] for d in (busy, idle)))
        if gap <= (_BALANCED - 1) / 4 * load.mean() or not give.size or not take.size:
            return
        ends = [(i, i + n) for n in range(1, min(_SIDE, len(take)) + 1) for i in range(len(take) - n + 1)]
        start, stop = np.array(ends).T
        taken_load, taken_size = (np.append(0, np.cumsum(x[take])) for x in (loads, sizes))
        moved = loads[give][:, None] - (taken_load[stop] - taken_load[start])
        grown = sizes[give][:, None] - (taken_size[stop] - taken_size[start])
        fits = (moved > 0) & (moved < gap) & (grown <= room[idle]) & (-grown <= room[busy])
        off = np.where(fits, abs(moved - gap / 2), np.inf)
        i, j = np.unravel_index(off.argmin(), off.shape)
        if not fits[i, j]:
            return
        where[give[i]], where[take[start[j] : stop[j]]] = idle, busy
        room[[busy, idle]] += grown[i, j] * np.array([1, -1])
        load[[busy, idle]] += moved[i, j] * np.array([-1, 1])


def _deal_all(work: np.ndarray, cp: int) -> np.ndarray:
    """The order [T] of a row whose documents are all cut: in order of work, cp parts at a time, the largest to the
    device that has least."""
    T = len(work)
    local = T // cp
    fitting = [n for n in range(1, min(_PARTS, local) + 1) if local % n == 0]
    parts = max([n for n in fitting if local // n >= _PART_TOKENS or n <= 32], default=1)
    part_work = work.reshape(cp * parts, -1).sum(axis=1)
    load, owner = np.zeros(cp, np.int64), np.zeros(cp * parts, np.int64)
    for turn in np.argsort(-part_work, kind="stable").reshape(parts, cp):
        least = np.argsort(load, kind="stable")
        owner[turn] = least
        load[least] += part_work[turn]
    tokens = np.arange(T, dtype=np.int32).reshape(cp * parts, -1)
    return tokens[np.argsort(owner, kind="stable")].reshape(-1)


def _evened(order: np.ndarray, work: np.ndarray, cp: int) -> np.ndarray:
    """Where parts are too coarse: the busiest device changes a run of tokens for one of the idlest that is lighter by
    half of their difference, runs ever shorter, until all do nearly the same."""
    device = order.reshape(cp, -1).copy()
    run = min(_PART_TOKENS, max(1, device.shape[1] // 32))
    while run and device.shape[1] % run:
        run //= 2
    while run:
        runs = device.reshape(cp, -1, run)
        loads = work[runs].sum(axis=2)  # [cp, runs]
        total = loads.sum(axis=1)
        busy, idle = total.argmax(), total.argmin()
        if total[busy] <= _BALANCED * total.mean():
            break
        gap = total[busy] - total[idle]
        lightest = np.argsort(loads[idle], kind="stable")
        at = np.searchsorted(loads[idle][lightest], loads[busy] - gap // 2).clip(max=len(lightest) - 1)
        moved = loads[busy] - loads[idle][lightest[at]]
        give = np.abs(moved - gap // 2).argmin()
        if not 0 < moved[give] < gap:
            run //= 2
            continue
        take = lightest[at[give]]
        runs[[busy, idle], [give, take]] = runs[[idle, busy], [take, give]]
    return np.sort(device, axis=1).reshape(-1)


def _check(seq_len: int, cp: int, layout: CPLayout) -> None:
    if layout not in get_args(CPLayout):
        raise ValueError(f"layout={layout!r} is not one of {get_args(CPLayout)}")
    unit = 2 * cp if layout == "zigzag" else cp
    if seq_len % unit:
        raise ValueError(
            f"seq_len={seq_len} is not divisible by {'2 * ' if unit > cp else ''}cp={cp}, as a {layout} layout needs; "
            f"use {seq_len // unit * unit or unit} or {-(-seq_len // unit) * unit}, or a cp that divides"
        )
