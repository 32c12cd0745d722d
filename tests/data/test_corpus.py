"""Where documents come from, how they are split, and what is refused."""

import json
import logging
import shutil

import numpy as np
import pytest

from jaxscale.config import DataConfig
from jaxscale.data.corpus import scan_corpus


def texts_of(source, split=None, **kw):
    corpus = scan_corpus(DataConfig(source=str(source), **kw))
    return [t for d, t in corpus.texts() if split is None or corpus.held_out(np.uint64(d)) == (split == "valid")]


def write_jsonl(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), "utf-8")
    return path


def test_directory_in_order_and_by_suffix(text_dir):
    (text_dir / "notes.md").write_text("markdown")
    (text_dir / "empty.txt").write_text("")
    (text_dir / ".git").mkdir()
    (text_dir / ".git" / "hidden.txt").write_text("hidden")
    paths = sorted(
        (p for p in text_dir.rglob("doc*.txt")),
        key=lambda p: p.relative_to(text_dir).as_posix(),
    )
    assert texts_of(text_dir, suffixes=(".txt",)) == [p.read_bytes().decode() for p in paths]
    assert "markdown" in texts_of(text_dir)


def test_stdlib_is_the_running_pythons_source():
    corpus = scan_corpus(DataConfig())
    assert corpus.sizes.sum() > 5e6
    with open(json.__file__, encoding="utf-8", newline="") as f:
        source = f.read()
    assert sum(text == source for _, text in corpus.texts()) == 1
    share = corpus.sizes[corpus.held_out(corpus.digests)].sum() / corpus.sizes.sum()
    assert 0.005 < share < 0.06


def test_jsonl_equals_a_directory_of_the_same_texts(text_dir, tmp_path, rng):
    texts = texts_of(text_dir)
    path = write_jsonl(tmp_path / "c.jsonl", [{"body": t, "id": 1} for t in rng.permutation(texts)] + ["", ""])
    a, b = scan_corpus(DataConfig(source=str(text_dir))), scan_corpus(DataConfig(source=str(path), text_key="body"))
    assert sorted(texts_of(path, text_key="body")) == sorted(texts)
    for split in ("train", "valid"):
        assert a.fingerprint(split) == b.fingerprint(split)


def test_split_is_stable_when_documents_come_go_and_move(text_dir, tmp_path, rng):
    before = {split: set(texts_of(text_dir, split, holdout=0.3)) for split in ("train", "valid")}
    assert len(before["valid"]) in range(5, 36)  # 18 expected, sigma 3.5
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate(rng.permutation(sorted(text_dir.rglob("*.txt")))[:40]):
        shutil.copy(path, other / f"{i}.txt")
    (other / "new.txt").write_text("a new document")
    (other / "copy.txt").write_text("a new document")
    after = {split: set(texts_of(other, split, holdout=0.3)) for split in ("train", "valid")}
    assert not after["train"] & before["valid"]
    assert not after["valid"] & before["train"]
    assert not after["train"] & after["valid"]


def test_at_least_one_document_is_held_out(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    assert len(texts_of(tmp_path, "valid", holdout=1e-9)) == 1
    assert len(texts_of(tmp_path, "train", holdout=1e-9)) == 2


def test_a_lone_file_is_cut_at_line_ends(tmp_path, rng):
    text = "".join(f"line {i} " + "x" * int(rng.integers(0, 60)) + "\n" for i in range(2000))
    path = tmp_path / "book.txt"
    path.write_text(text, newline="")
    pieces = texts_of(path)
    assert "".join(pieces) == text
    assert 80 <= len(pieces) <= 101
    assert all(piece.endswith("\n") for piece in pieces)
    assert texts_of(path, "valid")


def test_a_few_binary_files_are_skipped_and_counted(text_dir, caplog):
    (text_dir / "a.txt").write_bytes(b"\xff\xfe\xfa")
    (text_dir / "b.txt").write_bytes(b"nul \0 nul")
    with caplog.at_level(logging.WARNING):
        assert len(texts_of(text_dir)) == 60
    (record,) = caplog.records
    assert "skipped 2 of 62 documents" in record.getMessage()
    assert str(text_dir / "a.txt") in record.getMessage()


def test_a_binary_corpus_is_refused_by_its_first_file(text_dir):
    for i in range(7):
        (text_dir / f"a{i}.txt").write_bytes(b"\x7fELF\0\0\xff")
    with pytest.raises(ValueError, match=r"is binary: .*a0\.txt holds NUL bytes or is not UTF-8, as 7 of 67 documents"):
        scan_corpus(DataConfig(source=str(text_dir)))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a"}, {"txt": "b"}], r"line 2 has no key 'text' but has the keys \['txt'\]; set data.text_key"),
        ([{"text": "a"}, "", '{"text": '], r"line 3 is not JSON"),
        ([["text"]], r"line 1 has no key 'text' but is a list"),
        ([{"text": 3}], r"line 1: 'text' holds a int, not text"),
        (['{"text": "\\ud800"}', '{"text": "\\u0000"}'], r"c\.jsonl:1 holds NUL bytes or is not UTF-8, as 2 of 2"),
        ([], r"c\.jsonl holds no text"),
    ],
)
def test_bad_jsonl(tmp_path, records, message):
    path = write_jsonl(tmp_path / "c.jsonl", records)
    with pytest.raises(ValueError, match=message) as e:
        scan_corpus(DataConfig(source=str(path)))
    assert "\n" not in str(e.value)


def test_bad_sources(tmp_path, text_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read .*nowhere \(No such file or directory\)"):
        scan_corpus(DataConfig(source=str(tmp_path / "nowhere")))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match=r"hollow holds no text in files ending in \.xyz; set data\.source"):
        scan_corpus(DataConfig(source=str(tmp_path / "hollow"), suffixes=(".xyz",)))
    (tmp_path / "hollow" / "one.txt").write_text("one line")
    with pytest.raises(ValueError, match="has 1 different documents, too few"):
        scan_corpus(DataConfig(source=str(tmp_path / "hollow")))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*doc00\.txt \(Permission denied\)"):
        scan_corpus(DataConfig(source=str(text_dir)))


@pytest.mark.parametrize("tokenizer", ["bpe:", "bpe:many", "bpe:256", "bpe:-5"])
def test_bad_tokenizer_names(tokenizer):
    with pytest.raises(ValueError, match="at least 257 ids"):
        DataConfig(tokenizer=tokenizer)
