"""Token ids on disk, made once for a corpus and a tokenizer and memory-mapped after that."""

import contextlib
import functools
import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxscale.data.chats import encode_chats
from jaxscale.data.corpus import Corpus
from jaxscale.data.tokenizers import HFTokenizer, Tokenizer, load_tokenizer, train_bpe
from jaxscale.fetch import cache_dir

_log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the files below, or what the ids mean, change
BPE_SAMPLE = 16_000_000  # bytes of the training split that a BPE is trained on
DOCUMENT = np.dtype([("digest", "<u8"), ("start", "<i8"), ("num_tokens", "<i8"), ("num_bytes", "<i8")])


class TokenStore(NamedTuple):
    """The tokens of one split."""

    ids: np.ndarray  # [num_tokens] memory map of the smallest unsigned type that holds the vocabulary
    documents: np.ndarray  # [num_docs] of DOCUMENT by ascending digest; num_tokens counts the leading BOS
    learnt: np.ndarray | None = None  # bool [num_tokens] memory map, of conversations: their answers; None: all is


def open_store(corpus: Corpus, tokenizer: Tokenizer, split: str) -> TokenStore:
    """The split's tokens, encoding the whole corpus when the cache does not hold it."""
    key = _hash(FORMAT, corpus.fingerprint("train"), corpus.fingerprint("valid"), tokenizer.fingerprint)
    folder = cache_dir() / "tokens" / key

    load = functools.partial(_load, folder, tokenizer=tokenizer, chats=bool(corpus.cfg.messages_key))

    def whole(folder: Path) -> bool:
        return all(load(split=each) for each in ("train", "valid"))

    store = load(split=split)
    if store is None:
        _install(folder, lambda out: _encode_corpus(corpus, tokenizer, out), whole)
        store = load(split=split)
        assert store is not None, folder
    return store


def corpus_bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
    """A BPE trained on documents of the training split, BPE_SAMPLE bytes of them at most, or the cached one."""
    folder = cache_dir() / "bpe" / _hash(FORMAT, corpus.fingerprint("train"), vocab_size, BPE_SAMPLE)

    def whole(folder: Path) -> bool:
        return (folder / "tokenizer.json").exists()

    if not whole(folder):
        _install(folder, lambda out: _train(corpus, vocab_size).save(out / "tokenizer.json"), whole)
    return load_tokenizer(folder)


def _train(corpus: Corpus, vocab_size: int) -> HFTokenizer:
    began = time.perf_counter()
    mine = ~corpus.held_out(corpus.digests)
    sizes = np.cumsum(corpus.sizes[mine])  # by digest: a random sample that no file order changes
    chosen = set(corpus.digests[mine][: max(1, int(np.searchsorted(sizes, BPE_SAMPLE)))].tolist())
    sample = {digest: text for digest, text in corpus.texts() if digest in chosen}
    tokenizer = train_bpe((sample[digest] for digest in sorted(sample)), vocab_size)
    _log.info("trained a BPE of %d ids in %.1f s", tokenizer.vocab_size, time.perf_counter() - began)
    return tokenizer


def _encode_corpus(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    began = time.perf_counter()
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    rows: dict[str, list[tuple]] = {"train": [], "valid": []}
    ends = dict.fromkeys(rows, 0)
    with contextlib.ExitStack() as opened:
        new = lambda name: opened.enter_context((folder / name).open("wb"))
        files = {split: (new(f"{split}.ids"), new(f"{split}.learnt")) for split in rows}
        for batch in _batched(corpus.texts(), 1 << 23):
            documents = _encode([text for _, text in batch], tokenizer, bool(corpus.cfg.messages_key))
            for (digest, _), (ids, learnt, num_bytes) in zip(batch, documents, strict=True):
                split = "valid" if corpus.held_out(np.uint64(digest)) else "train"
                for file, array in zip(files[split], (ids.astype(dtype), learnt)):
                    file.write(array.tobytes())
                rows[split].append((digest, ends[split], len(ids), num_bytes))
                ends[split] += len(ids)
    for split in rows:
        documents = np.array(rows[split], DOCUMENT)
        documents = documents[np.argsort(documents["digest"], kind="stable")]
        expected = corpus.digests[corpus.held_out(corpus.digests) == (split == "valid")]
        if not np.array_equal(documents["digest"], expected):
            raise ValueError(f"{corpus.cfg.source} changed while it was read; start again when it is at rest")
        np.save(folder / f"{split}.npy", documents)
    _log.info("encoded %d tokens in %.1f s", sum(ends.values()), time.perf_counter() - began)


def _encode(texts: list[str], tokenizer: Tokenizer, chats: bool) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """ids, which of them are learnt, and the bytes of those, of each document: led by BOS, or a conversation."""
    if chats:
        yield from encode_chats(texts, tokenizer)
        return
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        yield np.concatenate([[tokenizer.bos_id], ids]), np.zeros(0, bool), len(text.encode("utf-8"))


def _load(folder: Path, split: str, tokenizer: Tokenizer, chats: bool) -> TokenStore | None:
    """None when it is not there, or cut short."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    try:
        documents = np.load(folder / f"{split}.npy")
        ids = np.memmap(folder / f"{split}.ids", dtype, mode="r")
        learnt = np.memmap(folder / f"{split}.learnt", np.bool_, mode="r") if chats else None
    except (OSError, ValueError):
        return None
    whole = documents.dtype == DOCUMENT and documents["num_tokens"].sum() == len(ids)
    whole = whole and (learnt is None or len(learnt) == len(ids))
    return TokenStore(ids, documents, learnt) if whole else None


def _install(folder: Path, fill: Callable[[Path], None], whole: Callable[[Path], bool]) -> None:
    """Fill a temporary folder and rename it, so that a crash or a process beside this one leaves no half of it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-", ignore_cleanup_errors=True) as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            fill(made)
            if folder.is_dir() and not whole(folder):
                folder.rename(Path(temporary, "damaged"))
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, with the same content
                    raise
    except OSError as e:
        raise ValueError(
            f"cannot write the cache {folder.parent} ({e.strerror}); set JAXSCALE_CACHE to a directory with room"
        ) from None


def _batched(texts: Iterator[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    batch, held = [], 0
    for item in texts:
        batch.append(item)
        held += len(item[1])
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _hash(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
