"""Documents of a corpus, and the split that holds some of them out."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxscale.config import DataConfig
from jaxscale.data import chats

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What one pass over the text found; `texts` makes another pass, so a corpus may be larger than memory.

    A document is held out when the hash of its text falls below `threshold`: whatever the order, the file names or the
    other documents, it stays on its side, and copies of it stay together.
    """

    cfg: DataConfig
    sizes: np.ndarray  # [num_docs] int64, UTF-8 bytes, in the order of `digests`
    digests: np.ndarray  # [num_docs] uint64 hashes of the texts, ascending
    threshold: int

    def texts(self) -> Iterator[tuple[int, str]]:
        """(digest, text) of every document, in the order of the files."""
        for _, text in _documents(self.cfg, []):
            yield _digest(text), text

    def held_out(self, digests: np.ndarray | np.uint64) -> Any:
        """bool, for each digest whether its document belongs to the validation split."""
        return digests < np.uint64(self.threshold)

    def fingerprint(self, split: str) -> str:
        """Of the split's documents as a set."""
        mine = self.digests[self.held_out(self.digests) == (split == "valid")]
        return hashlib.blake2b(mine.astype("<u8").tobytes(), digest_size=8).hexdigest()


def scan_corpus(cfg: DataConfig) -> Corpus:
    """Read every document once.

    Raises:
      ValueError: the source is missing or unreadable, holds no text, is binary (more than one document in ten holds
        NUL bytes or is not UTF-8), has a malformed JSON line, or has too few documents to hold one out.
    """
    skipped: list[str] = []
    found = [(_digest(text), len(text.encode("utf-8"))) for _, text in _documents(cfg, skipped)]
    total = len(found) + len(skipped)
    if skipped and len(skipped) * 10 > total:
        raise ValueError(
            f"{cfg.source} is binary: {skipped[0]} holds NUL bytes or is not UTF-8, as {len(skipped)} of {total} "
            f"documents; convert them to UTF-8 text or narrow data.suffixes={list(cfg.suffixes)}"
        )
    if not found:
        where = f" in files ending in {', '.join(cfg.suffixes)}" if Path(cfg.source).is_dir() else ""
        raise ValueError(f"{cfg.source} holds no text{where}; set data.source or data.suffixes to where there is some")
    if skipped:
        _log.log(  # the standard library always has a few, which test just that
            logging.INFO if cfg.source == "stdlib" else logging.WARNING,
            "skipped %d of %d documents that hold NUL bytes or are not UTF-8, first %s",
            len(skipped),
            total,
            skipped[0],
        )
    found.sort()
    digests = np.array([digest for digest, _ in found], np.uint64)
    threshold = max(int(cfg.holdout * 2**64), found[0][0] + 1)  # at least one document is held out
    if found[-1][0] < threshold:
        raise ValueError(
            f"{cfg.source} has {len(np.unique(digests))} different documents, too few to train on some and hold out "
            f"{cfg.holdout:.0%}; add documents or lower data.holdout"
        )
    return Corpus(cfg=cfg, digests=digests, sizes=np.array([size for _, size in found], np.int64), threshold=threshold)


def _documents(cfg: DataConfig, skipped: list[str]) -> Iterator[tuple[str, str]]:
    """(where, text) of every document that is not empty; the names of binary ones are added to `skipped`."""

    def readable():
        for where, raw in _raw_documents(cfg):
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                skipped.append(where)
            elif text:
                yield where, text

    documents = readable()
    first, second = next(documents, None), next(documents, None)
    if first and not second:
        yield from _pieces(*first)
        return
    yield from filter(None, (first, second))
    yield from documents


def _pieces(where: str, text: str, num_pieces: int = 100) -> Iterator[tuple[str, str]]:
    """A lone document, cut at line ends, so that some of it can be held out."""
    piece, size = [], 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        piece.append(line)
        size += len(line)
        if size * num_pieces >= len(text):
            yield f"{where}:{number}", "".join(piece)
            piece, size = [], 0
    if piece:
        yield f"{where}:end", "".join(piece)


def require_source(cfg: DataConfig) -> None:
    """ValueError where there is nothing to read: before a tokenizer is read, which may take longer."""
    if not (root := _root(cfg)).exists():
        raise _unreadable(root, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))


def _root(cfg: DataConfig) -> Path:
    return Path(sysconfig.get_path("stdlib") if cfg.source == "stdlib" else cfg.source).expanduser()


def _raw_documents(cfg: DataConfig) -> Iterator[tuple[str, bytes]]:
    root = _root(cfg)
    if root.suffix == ".jsonl":
        yield from _json_lines(root, cfg)
    elif root.is_dir():
        suffixes = (".py",) if cfg.source == "stdlib" else cfg.suffixes
        for path in _files(root, suffixes):
            yield str(path), _read(path)
    else:
        yield str(root), _read(root)


def _files(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files below root in the order of their names; hidden and installed-package directories are left out."""

    def refuse(error: OSError):
        raise _unreadable(Path(error.filename), error)

    paths = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in ("site-packages", "dist-packages")
        ]
        paths += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


def _json_lines(path: Path, cfg: DataConfig) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", _json_text(line, cfg, f"{path} line {number}")
    except OSError as e:
        raise _unreadable(path, e) from None


def _json_text(line: bytes, cfg: DataConfig, where: str) -> bytes:
    key, name = (cfg.messages_key, "messages_key") if cfg.messages_key else (cfg.text_key, "text_key")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return b"\0"  # counted as binary
    except ValueError as e:
        raise ValueError(f"{where} is not JSON ({e}); each line is an object with the key {key!r}") from None
    if not isinstance(record, dict) or key not in record:
        keys = f"has the keys {sorted(record)}" if isinstance(record, dict) else f"is a {type(record).__name__}"
        raise ValueError(f"{where} has no key {key!r} but {keys}; set data.{name} to the one that is meant")
    if cfg.messages_key:
        return chats.canonical(record[key], f"{where}: {key!r}").encode("utf-8", errors="surrogatepass")
    if not isinstance(record[key], str):
        raise ValueError(
            f"{where}: {key!r} holds a {type(record[key]).__name__}, not text; set data.text_key to another key, or "
            "data.messages_key where it is a conversation"
        )
    return record[key].encode("utf-8", errors="surrogatepass")  # a lone surrogate then fails to decode


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise _unreadable(path, e) from None


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"data: cannot read {path} ({error.strerror}); data.source is stdlib, a directory, a .jsonl or a text file"
    )


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")
