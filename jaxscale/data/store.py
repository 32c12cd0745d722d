"""Token ids on disk, made once for a corpus and a tokenizer and memory-mapped after that."""

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

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


def open_store(corpus: Corpus, tokenizer: Tokenizer, split: str) -> TokenStore:
    """The split's tokens, encoding the whole corpus when the cache does not hold it."""
    key = _hash(FORMAT, corpus.fingerprint("train"), corpus.fingerprint("valid"), tokenizer.fingerprint)
    folder = cache_dir() / "tokens" / key

    def whole(folder: Path) -> bool:
        return all(_load(folder, each, tokenizer) for each in ("train", "valid"))

    store = _load(folder, split, tokenizer)
    if store is None:
        _install(folder, lambda out: _encode_corpus(corpus, tokenizer, out), whole)
        store = _load(folder, split, tokenizer)
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
    bos = np.array([tokenizer.bos_id], dtype)
    rows: dict[str, list[tuple]] = {"train": [], "valid": []}
    ends = dict.fromkeys(rows, 0)
    with (folder / "train.ids").open("wb") as train, (folder / "valid.ids").open("wb") as valid:
        files = {"train": train, "valid": valid}
        for batch in _batched(corpus.texts(), 1 << 23):
            ids = tokenizer.encode_batch([text for _, text in batch])
            for (digest, text), tokens in zip(batch, ids, strict=True):
                split = "valid" if corpus.held_out(np.uint64(digest)) else "train"
                tokens = np.concatenate([bos, tokens.astype(dtype)])
                files[split].write(tokens.tobytes())
                rows[split].append((digest, ends[split], len(tokens), len(text.encode("utf-8"))))
                ends[split] += len(tokens)
    for split in rows:
        documents = np.array(rows[split], DOCUMENT)
        documents = documents[np.argsort(documents["digest"], kind="stable")]
        expected = corpus.digests[corpus.held_out(corpus.digests) == (split == "valid")]
        if not np.array_equal(documents["digest"], expected):
            raise ValueError(f"{corpus.cfg.source} changed while it was read; start again when it is at rest")
        np.save(folder / f"{split}.npy", documents)
    _log.info("encoded %d tokens in %.1f s", sum(ends.values()), time.perf_counter() - began)


def _load(folder: Path, split: str, tokenizer: Tokenizer) -> TokenStore | None:
    """None when it is not there, or cut short."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    try:
        documents = np.load(folder / f"{split}.npy")
        ids = np.memmap(folder / f"{split}.ids", dtype, mode="r")
    except (OSError, ValueError):
        return None
    whole = documents.dtype == DOCUMENT and documents["num_tokens"].sum() == len(ids)
    return TokenStore(ids, documents) if whole else None


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
