"""Batches: the same for any number of processes, resumable, and nothing lost."""

import dataclasses
import itertools
import json
from collections import Counter

import numpy as np
import pytest

from jaxscale.config import DataConfig
from jaxscale.data import make_dataset, store
from jaxscale.data.corpus import scan_corpus


@pytest.fixture
def cfg(text_dir, rng):
    return DataConfig(
        source=str(text_dir), seq_len=int(rng.integers(8, 40)), batch_size=8, holdout=0.2, seed=int(rng.integers(2**31))
    )


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "labels", "segment_ids", "positions"}
    for name in a:
        assert a[name].dtype == b[name].dtype == np.int32
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def take(dataset, count, start: "int | dict" = 0):
    batches = dataset.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def texts(cfg, split):
    corpus = scan_corpus(cfg)
    return [t for d, t in corpus.texts() if corpus.held_out(np.uint64(d)) == (split == "valid")]


def labelled_bytes(batches):
    return Counter(np.concatenate([b["labels"][b["labels"] >= 0] for b in batches]).tolist())


@pytest.mark.parametrize("process_count", [2, 4])
def test_parts_of_processes_make_up_the_global_batch(cfg, process_count):
    for split in ("train", "valid"):
        whole = take(make_dataset(cfg, split=split), 12)
        parts = [
            take(make_dataset(cfg, split=split, process_index=i, process_count=process_count), 12)
            for i in range(process_count)
        ]
        for batch, *pieces in zip(whole, *parts, strict=True):
            assert_same(batch, {name: np.concatenate([piece[name] for piece in pieces]) for name in batch})


def test_resume_continues_the_stream_to_the_bit(cfg, rng):
    dataset = make_dataset(cfg)
    length = 3 * dataset.batches_per_epoch
    whole = take(dataset, length)
    stop = int(rng.integers(0, length))
    batches = dataset.batches()
    for batch in whole[:stop]:
        assert_same(next(batches), batch)
    state = json.loads(json.dumps(batches.state()))
    batches.close()
    assert state["batch"] == stop
    fresh = make_dataset(cfg)
    for batch, expected in zip(take(fresh, length - stop, state), whole[stop:], strict=True):
        assert_same(batch, expected)
    assert_same(fresh[stop], whole[stop])


def test_resume_on_other_processes_and_batch_sizes(cfg):
    state = make_dataset(cfg).state(6)  # 48 rows
    expected = make_dataset(cfg)[6]
    parts = [take(make_dataset(cfg, process_index=i, process_count=4), 1, state)[0] for i in range(4)]
    assert_same(expected, {name: np.concatenate([part[name] for part in parts]) for name in expected})
    double = take(make_dataset(dataclasses.replace(cfg, batch_size=16)), 1, state)[0]
    assert_same(expected, {name: double[name][:8] for name in double})
    with pytest.raises(
        ValueError, match=r"6 batches of 8 rows, which is no whole number of batches of 10; .*divisor of 48"
    ):
        make_dataset(dataclasses.replace(cfg, batch_size=10)).batches(state)


def test_resume_is_refused_on_anything_else(cfg, text_dir):
    state = make_dataset(cfg).state(3)
    for change in ({"seq_len": cfg.seq_len + 1}, {"seed": cfg.seed + 1}, {"tokenizer": "bpe:300"}):
        (name,) = change
        with pytest.raises(ValueError, match=rf"the saved data position has {name}=.* but this run has {name}="):
            make_dataset(dataclasses.replace(cfg, **change)).batches(state)
    with pytest.raises(ValueError, match="has split=train but this run has split=valid"):
        make_dataset(cfg, split="valid").batches(state)
    for i in range(20):  # surely one of them is not held out
        (text_dir / f"more{i}.txt").write_text(f"another document {i}")
    with pytest.raises(ValueError, match="has corpus="):
        make_dataset(cfg).batches(state)


def test_every_epoch_holds_the_training_text_once_in_a_new_order(cfg):
    dataset = make_dataset(cfg)
    text = "".join(texts(cfg, "train")).encode()
    assert dataset.num_tokens == len(text) + len(dataset.store.documents)
    cfg_rows = dataclasses.replace(cfg, batch_size=1)  # a batch is a row: epochs do not share batches
    rows = make_dataset(cfg_rows)
    epochs = [[rows[e * rows.num_rows + r] for r in range(rows.num_rows)] for e in range(3)]
    for epoch in epochs:
        assert labelled_bytes(epoch) == Counter(text)
    orders = [np.concatenate([row["tokens"] for row in epoch]) for epoch in epochs]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])
    assert not np.array_equal(
        rows[0]["tokens"], make_dataset(dataclasses.replace(cfg_rows, seed=cfg.seed + 1))[0]["tokens"]
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_validation_is_one_pass_and_counts_its_bytes(cfg, tokenizer, rng):
    cfg = dataclasses.replace(cfg, tokenizer=tokenizer)
    valid = make_dataset(cfg, split="valid")
    batches = list(valid.batches())
    held_out = texts(cfg, "valid")
    assert len(batches) == valid.batches_per_epoch == -(-valid.num_rows // 8)
    assert all(batch["tokens"].shape == (8, cfg.seq_len) for batch in batches)
    num_labels = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
    num_bytes = len("".join(held_out).encode())
    assert sum(valid.count_bytes(batch["labels"]) for batch in batches) == pytest.approx(num_bytes, rel=1e-12)
    assert valid.bytes_per_token * num_labels == pytest.approx(num_bytes, rel=1e-12)
    ids = [i for batch in batches for i in batch["labels"][batch["labels"] >= 0].tolist()]
    assert Counter(ids) == Counter(i for text in held_out for i in valid.tokenizer.encode(text).tolist())
    assert_same(valid[0], batches[0])


def test_documents_survive_the_store(cfg):
    dataset = make_dataset(dataclasses.replace(cfg, tokenizer="bpe:300"))
    ids, documents, learnt = dataset.store
    assert learnt is None
    found = []
    for document in documents:
        piece = ids[document["start"] : document["start"] + document["num_tokens"]]
        assert piece[0] == dataset.tokenizer.bos_id
        found.append(dataset.tokenizer.decode(piece[1:]))
        assert document["num_bytes"] == len(found[-1].encode())
    assert sorted(found) == sorted(texts(cfg, "train"))


def test_tokens_are_cached_and_a_damaged_cache_is_made_anew(cfg, cache, monkeypatch):
    first = make_dataset(cfg)[0]
    (ids,) = cache.glob("tokens/*/train.ids")
    with monkeypatch.context() as m:
        m.setattr(store, "_encode_corpus", None)  # would fail when called
        assert_same(make_dataset(cfg)[0], first)
    ids.write_bytes(ids.read_bytes()[:-3])
    assert_same(make_dataset(cfg)[0], first)
    ids.unlink()
    assert_same(make_dataset(cfg)[0], first)
    assert not list(cache.glob("tokens/.tmp-*"))


def test_a_tokenizer_can_be_handed_in(cfg, tmp_path):
    from jaxscale.data import load_tokenizer

    trained = make_dataset(dataclasses.replace(cfg, tokenizer="bpe:300"))
    trained.tokenizer.save(tmp_path / "tokenizer.json")
    again = make_dataset(cfg, tokenizer=load_tokenizer(tmp_path))
    assert_same(take(again, 1, trained.state(5))[0], trained[5])


def test_bad_processes_and_caches(cfg, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="batch_size=8 is not divisible by the 3 processes; use a multiple of 3"):
        make_dataset(cfg, process_count=3)
    with pytest.raises(ValueError, match=r"process_index=2 must lie in \[0, process_count=2\)"):
        make_dataset(cfg, process_index=2, process_count=2)
    blocker = tmp_path / "file"
    blocker.write_text("no directory")
    monkeypatch.setenv("JAXSCALE_CACHE", str(blocker))
    with pytest.raises(ValueError, match=r"cannot write the cache .* set JAXSCALE_CACHE"):
        make_dataset(cfg)


def test_a_full_disk_leaves_no_half_written_tokens(cfg, cache, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(np, "save", full)
        with pytest.raises(ValueError, match=r"cannot write the cache .*No space left on device"):
            make_dataset(cfg)
    assert list((cache / "tokens").iterdir()) == []
    make_dataset(cfg)


def test_a_corpus_smaller_than_a_batch_warns(cfg, caplog):
    dataset = make_dataset(dataclasses.replace(cfg, seq_len=4000, batch_size=64))
    assert "rows: each batch of 64 repeats text" in caplog.text
    batch = dataset[0]
    assert batch["tokens"].shape == (64, 4000)
    assert np.all(batch["segment_ids"].max(axis=1) >= 1)
