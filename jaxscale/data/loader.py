"""Batches of packed rows: shuffled, prefetched, resumable to the batch, the same for any number of processes."""

import dataclasses
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from jaxscale.config import DataConfig
from jaxscale.data.corpus import Corpus, scan_corpus
from jaxscale.data.packing import document_order, pack_rows, row_order, whole_offsets
from jaxscale.data.store import TokenStore, corpus_bpe, open_store
from jaxscale.data.tokenizers import Tokenizer, load_tokenizer

_log = logging.getLogger(__name__)


def make_dataset(
    cfg: DataConfig,
    *,
    split: Literal["train", "valid"] = "train",
    process_index: int = 0,
    process_count: int = 1,
    tokenizer: Tokenizer | None = None,
    corpus: Corpus | None = None,
) -> "Dataset":
    """Read, split, tokenize (once: the ids are cached) and pack the corpus that `cfg` names.

    Args:
      cfg: what to read and how to cut it.
      split: "train" goes on for ever, in a new order each epoch; "valid" is one pass in a fixed order.
      process_index, process_count: which part of each global batch is wanted. On a mesh where several processes hold
        the same rows (tp, cp or pp across hosts), count groups of processes instead.
      tokenizer: in place of the one `cfg.tokenizer` names, such as the one saved with a run.
      corpus: what `scan_corpus(cfg)` found, for a second split; by default the text is read here.

    Raises:
      ValueError: the corpus or the tokenizer cannot be used (one line says why), or process_count does not divide the
        batch.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must lie in [0, process_count={process_count})")
    if cfg.batch_size % process_count:
        raise ValueError(
            f"batch_size={cfg.batch_size} is not divisible by the {process_count} processes; "
            f"use a multiple of {process_count}"
        )
    kind, _, size = cfg.tokenizer.partition(":")
    if tokenizer is None and kind != "bpe":
        tokenizer = load_tokenizer(cfg.tokenizer)  # before the corpus is read: there may be none
    corpus = scan_corpus(cfg) if corpus is None else corpus
    if tokenizer is None:
        tokenizer = corpus_bpe(corpus, int(size))
    dataset = Dataset(
        cfg=cfg,
        split=split,
        tokenizer=tokenizer,
        store=open_store(corpus, tokenizer, split),
        corpus=corpus.fingerprint(split),
        process_index=process_index,
        process_count=process_count,
    )
    if split == "train" and dataset.num_rows < cfg.batch_size:
        _log.warning("the corpus fills %d rows: each batch of %d repeats text", dataset.num_rows, cfg.batch_size)
    return dataset


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One process's part of the batches of one split. Also a random-access source: `dataset[i]` is batch i."""

    cfg: DataConfig
    split: Literal["train", "valid"]
    tokenizer: Tokenizer
    store: TokenStore = dataclasses.field(repr=False)
    corpus: str  # fingerprint of the split's documents
    process_index: int
    process_count: int

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens in an epoch, the BOS of each document included."""
        return int(self.store.documents["num_tokens"].sum())

    @property
    def num_rows(self) -> int:
        """Rows in an epoch, over all processes; the last is padded, of conversations others too."""
        length = self.num_tokens if self._conversations is None else int(self._conversations[1][-1])
        return -(-length // self.cfg.seq_len)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that touch the rows of an epoch. The validation split ends there, its last batch padded."""
        return -(-self.num_rows // self.cfg.batch_size)

    @functools.cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes for each labelled token of the split: bits per byte = nats per token / (ln 2 * this)."""
        documents = self.store.documents
        learnt = self.store.learnt
        labels = self.num_tokens - len(documents) if learnt is None else int(learnt.sum())
        return float(documents["num_bytes"].sum() / max(1, labels))

    def count_bytes(self, labels: np.ndarray) -> float:
        """UTF-8 bytes of text that the labels (int, -1 = none) stand for: bits per byte of exactly these rows."""
        return float(self._label_bytes[labels[labels >= 0]].sum())

    def __len__(self) -> int:
        return sys.maxsize if self.split == "train" else self.batches_per_epoch

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index`: int32 arrays [batch_size / process_count, seq_len], see `pack_rows`."""
        share = self.cfg.batch_size // self.process_count
        rows = index * self.cfg.batch_size + self.process_index * share + np.arange(share)
        if self.split == "valid":  # rows past the end are padding
            return self._rows_of_epoch(0, rows)
        epochs, rows = np.divmod(rows, self.num_rows)
        parts = [self._rows_of_epoch(int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def batches(self, start: "int | dict[str, Any]" = 0) -> "Batches":
        """Batches from `start`, a number or a state of `Batches`, made ahead of their use by two threads.

        Raises:
          ValueError: the state is of other text, another tokenizer, seed or row length, or its rows end inside one of
            these batches.
        """
        return Batches(self, start if isinstance(start, int) else self._resume(start))

    def state(self, batch: int) -> dict[str, Any]:
        """Where the stream stands before batch number `batch`, for JSON."""
        return {"batch": batch, "batch_size": self.cfg.batch_size, **self._identity}

    @property
    def _identity(self) -> dict[str, Any]:
        """What the rows depend on, by the names that an error shows."""
        packing = {} if self._conversations is None else {"packing": "whole conversations"}
        return packing | {
            "split": self.split,
            "seq_len": self.cfg.seq_len,
            "seed": self.cfg.seed,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer.fingerprint,
        }

    def _resume(self, state: dict[str, Any]) -> int:
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"the saved data position has {name}={state.get(name)} but this run has {name}={mine}; "
                    f"restore what it was or start the data anew from batch 0"
                )
        batch, rest = divmod(state["batch"] * state["batch_size"], self.cfg.batch_size)
        if rest:
            raise ValueError(
                f"the saved data position is {state['batch']} batches of {state['batch_size']} rows, which is no "
                f"whole number of batches of {self.cfg.batch_size}; go on with batch_size={state['batch_size']} or a "
                f"divisor of {state['batch'] * state['batch_size']}"
            )
        return batch

    @functools.cached_property
    def _label_bytes(self) -> np.ndarray:
        """[vocab_size] float64: scaled to the true total for tokenizers whose tokens have no fixed size."""
        counts = np.zeros(self.tokenizer.vocab_size, np.int64)
        for at in range(0, len(self.store.ids), 1 << 22):  # bincount widens what it reads to int64
            part = slice(at, at + (1 << 22))
            ids = self.store.ids[part] if self.store.learnt is None else self.store.ids[part][self.store.learnt[part]]
            counts += np.bincount(ids, minlength=len(counts))
        if self.store.learnt is None:
            counts[self.tokenizer.bos_id] -= len(self.store.documents)
        guess = self.tokenizer.token_bytes.astype(np.float64)
        return guess * (self.store.documents["num_bytes"].sum() / max(1.0, float(counts @ guess)))

    def _rows_of_epoch(self, epoch: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        starts, offsets, sizes, order = self._epoch(epoch)
        inside = rows < self.num_rows
        rows = np.where(inside, order[np.where(inside, rows, 0)], self.num_rows)
        return pack_rows(self.store.ids, starts, offsets, rows, self.cfg.seq_len, self.store.learnt, sizes)

    @functools.cached_property
    def _epoch(self):
        return functools.lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]:
        """starts [num_docs], offsets [num_docs + 1] and sizes for `pack_rows`, and the order of the rows [num_rows]."""
        order = row_order(self.num_rows, self.cfg.seed, epoch)
        if self._conversations is not None:
            return *self._conversations, order
        documents = self._shuffled(epoch)
        return documents["start"].copy(), np.concatenate([[0], np.cumsum(documents["num_tokens"])]), None, order

    @functools.cached_property
    def _conversations(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """starts, offsets and sizes of conversations, the same in each epoch: every one has as many rows, of which only
        the order changes. None: documents that may be cut."""
        if self.store.learnt is None:
            return None
        documents = self._shuffled(0)
        sizes = documents["num_tokens"].copy()
        return documents["start"].copy(), whole_offsets(sizes, self.cfg.seq_len), sizes

    def _shuffled(self, epoch: int) -> np.ndarray:
        return self.store.documents[document_order(self.store.documents["digest"], self.cfg.seed, epoch)]


class Batches(Iterator[dict[str, np.ndarray]]):
    """Batches of a Dataset in order. `state()` names the next one; hand it to `Dataset.batches` to go on there."""

    def __init__(self, dataset: Dataset, batch: int):
        import grain  # about 1 s beyond jax: only when batches are drawn

        source = grain.MapDataset.source(dataset)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._dataset, self._batch = dataset, batch
        self._iterator = iter(source.to_iter_dataset(options))
        self._iterator.set_state({"next_index": batch})

    def __next__(self) -> dict[str, np.ndarray]:
        arrays = next(self._iterator)
        self._batch += 1
        return arrays

    def state(self) -> dict[str, Any]:
        """A small JSON dict: the number of the next batch and what the rows depend on."""
        return self._dataset.state(self._batch)

    def close(self) -> None:
        """Stop the threads that make batches ahead."""
        self._iterator.close()
