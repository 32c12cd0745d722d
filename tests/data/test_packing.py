"""Packing against a row-by-row oracle in plain Python."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.data.packing import _mix, document_order, pack_rows, row_order

lengths_st = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def make_stream(lengths, order):
    """Documents whose token is 1000 * document + offset, laid out in file order, to be read in `order`."""
    documents = [1000 * (d + 1) + np.arange(n) for d, n in enumerate(lengths)]
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths)[order])])
    return documents, np.concatenate(documents).astype(np.uint16), starts[order], offsets


def oracle_rows(documents, order, seq_len):
    """The stream written out token by token, then cut."""
    stream = []
    for d in order:
        tokens = documents[d].tolist()
        stream += [(d, token, label) for token, label in zip(tokens, tokens[1:] + [-1])]
    rows = []
    for start in range(0, len(stream), seq_len):
        row = {"tokens": [], "labels": [], "segment_ids": [], "positions": []}
        before, segment, position = None, 0, 0
        for d, token, label in stream[start : start + seq_len]:
            if d != before:
                before, segment, position = d, segment + 1, 0
            for name, value in zip(row, (token, label, segment, position)):
                row[name].append(value)
            position += 1
        for name, fill in zip(row, (0, -1, 0, 0)):
            row[name] += [fill] * (seq_len - len(row[name]))
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@settings(deadline=None, max_examples=200)
@given(lengths=lengths_st, seq_len=st.integers(2, 25), order_seed=st.integers(0, 2**32 - 1))
def test_rows_equal_the_stream_written_out(lengths, seq_len, order_seed):
    order = np.random.default_rng(order_seed).permutation(len(lengths))
    documents, ids, starts, offsets = make_stream(lengths, order)
    expected = oracle_rows(documents, order, seq_len)
    num_rows = len(expected["tokens"])
    rows = pack_rows(ids, starts, offsets, np.arange(num_rows), seq_len)
    for name, array in rows.items():
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    # any row by itself, in any order, and nothing but padding past the end
    pick = np.random.default_rng(order_seed).integers(0, num_rows + 2, 5)
    for name, array in pack_rows(ids, starts, offsets, pick, seq_len).items():
        padded = np.concatenate([expected[name], np.full((2, seq_len), -1 if name == "labels" else 0)])
        np.testing.assert_array_equal(array, padded[pick], err_msg=name)


@settings(deadline=None, max_examples=100)
@given(lengths=lengths_st, seq_len=st.integers(2, 25), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_token_once_and_in_order(lengths, seq_len, seed, epoch):
    digests = np.arange(len(lengths), dtype=np.uint64)
    order = document_order(digests, seed, epoch)
    _, ids, starts, offsets = make_stream(lengths, order)
    num_rows = -(-sum(lengths) // seq_len)
    rows = pack_rows(ids, starts, offsets, np.arange(num_rows), seq_len)
    real = rows["segment_ids"] > 0
    tokens, labels = rows["tokens"][real], rows["labels"][real]
    for d, length in enumerate(lengths):
        mine = tokens // 1000 == d + 1
        np.testing.assert_array_equal(tokens[mine] % 1000, np.arange(length))
        # the label is the next token of the same document; its last token has none
        np.testing.assert_array_equal(labels[mine], np.append(tokens[mine][1:], -1))
    assert np.all(rows["labels"][~real] == -1)


def test_splitmix64_known_answers():
    # the first outputs of the generator seeded with 0, from the reference program (Vigna, prng.di.unimi.it)
    increments = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _mix(increments).tolist() == expected


def test_order_of_documents_depends_on_their_digests_alone(rng):
    digests = rng.integers(0, 2**64, 200, dtype=np.uint64)
    shuffled = rng.permutation(digests)
    first = digests[document_order(digests, 7, 3)]
    np.testing.assert_array_equal(first, shuffled[document_order(shuffled, 7, 3)])
    for seed, epoch in ((7, 4), (8, 3), (4, 7)):
        assert (first != digests[document_order(digests, seed, epoch)]).mean() > 0.9


def test_orders_are_unbiased():
    """Over 2,000 epochs the mean place of each of 20 documents and rows is the middle: sigma of the mean is 0.13."""
    digests = np.arange(20, dtype=np.uint64)
    for order in (lambda e: document_order(digests, 0, e), lambda e: row_order(20, 0, e)):
        places = np.array([np.argsort(order(epoch)) for epoch in range(2000)])
        assert np.all(np.sort(places, axis=1) == np.arange(20))
        assert np.abs(places.mean(axis=0) - 9.5).max() < 0.75
        assert abs(np.corrcoef(places[:-1, 0], places[1:, 0])[0, 1]) < 0.12  # one epoch says nothing of the next
