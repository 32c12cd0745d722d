"""Text to ids and back: raw bytes, a Hugging Face tokenizer.json, or a byte-level BPE trained on the corpus."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Tokenizer(Protocol):
    """What a run needs of a tokenizer. `encode` never adds `bos_id`; packing puts it before each document."""

    vocab_size: int
    bos_id: int
    fingerprint: str  # equal for tokenizers that encode alike, stable over processes and machines
    token_bytes: np.ndarray  # [vocab_size] int32: UTF-8 bytes of text that each id stands for

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """int32 ids of `text`. With special, control tokens written in it (`<|im_start|>`) become their ids: only for
        text that the program wrote itself."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each, on all cores."""
        ...

    def decode(self, ids: Any) -> str:
        """The text of `ids`, without control tokens; bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, path: str | os.PathLike) -> None:
        """Write a file from which `load_tokenizer` makes the same tokenizer."""
        ...


def load_tokenizer(spec: str | os.PathLike) -> Tokenizer:
    """A tokenizer by name or file.

    Args:
      spec: "bytes"; a tokenizer.json (of Hugging Face, or of a run); or the directory that holds one.

    Raises:
      ValueError: the file is missing or is no tokenizer, or it names no token that starts a document.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        text = path.read_text("utf-8")
        content = json.loads(text)
    except OSError as e:
        raise ValueError(
            f"tokenizer {str(spec)!r} cannot be read ({e.strerror}); use bytes, bpe:4096 or a path to a tokenizer.json"
        ) from None
    except ValueError:
        raise ValueError(f"{path} is not JSON; a tokenizer is a tokenizer.json of Hugging Face tokenizers") from None
    if content == _BYTES_JSON:
        return ByteTokenizer()
    from tokenizers import Tokenizer as Backend  # 40 ms: only when used

    try:
        backend = Backend.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise ValueError(f"{path} is not a tokenizer.json that `tokenizers` can read: {e}") from None
    return HFTokenizer(backend, bos_token=_configured_bos(path.with_name("tokenizer_config.json")))


_BYTES_JSON = {"type": "jaxscale.bytes"}


class ByteTokenizer:
    """The 256 bytes of UTF-8 text. Id 0, the NUL that text does not hold, starts a document."""

    vocab_size = 256
    bos_id = 0
    fingerprint = "bytes"
    token_bytes = np.array([0] + [1] * 255, np.int32)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        """int32 [bytes of text]. Raises ValueError on a NUL, which is the document start."""
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        if not ids.all():
            raise ValueError(f"the text holds a NUL at byte {int(ids.argmin())}, which starts a document; remove it")
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Any) -> str:
        return bytes(i for i in _checked(ids, self.vocab_size) if i).decode("utf-8", errors="replace")

    def save(self, path: str | os.PathLike) -> None:
        Path(path).write_text(json.dumps(_BYTES_JSON), "utf-8")


class HFTokenizer:
    """A `tokenizers.Tokenizer`. bos_token: its document start; None looks for a usual name among its tokens."""

    def __init__(self, backend: Any, *, bos_token: str | None = None):
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a document that spells <|endoftext|> is text, not a document end
        vocab = backend.get_vocab(with_added_tokens=True)
        self.backend = backend
        self.bos_token = bos_token or next((t for t in _BOS_NAMES if t in vocab), None)
        if self.bos_token not in vocab:
            raise ValueError(
                f"the tokenizer has no token {bos_token!r} to start a document"
                if bos_token
                else f"the tokenizer has none of {', '.join(_BOS_NAMES)}; "
                f"name its bos_token in a tokenizer_config.json beside it"
            )
        self.bos_id: int = vocab[self.bos_token]
        self.vocab_size: int = max(vocab.values()) + 1
        settings = f"{backend.to_str()}{self.bos_id}".encode()
        self.fingerprint = hashlib.blake2b(settings, digest_size=8).hexdigest()
        self.token_bytes = _token_bytes(backend, vocab, self.vocab_size)

    def encode(self, text: str, *, special: bool = False) -> np.ndarray:
        self.backend.encode_special_tokens = not special
        try:
            return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)
        finally:
            self.backend.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    def decode(self, ids: Any) -> str:
        return self.backend.decode(_checked(ids, self.vocab_size), skip_special_tokens=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json at `path`, and tokenizer_config.json with the bos_token beside it."""
        Path(path).write_text(self.backend.to_str(), "utf-8")
        Path(path).with_name("tokenizer_config.json").write_text(json.dumps({"bos_token": self.bos_token}), "utf-8")


_BOS_NAMES = ("<|bos|>", "<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>", "[BOS]", "[CLS]")


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """A byte-level BPE: id 0 is `<|bos|>`, 1 to 256 the bytes, then merges. The same texts give the same tokenizer.

    16 MB of Python source and 4,096 ids take 3 to 4 s on two cores.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is less than the 256 bytes and <|bos|>; use at least 257")
    backend: Any = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|bos|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HFTokenizer(backend)


# Merges stay inside: a word with the mark before it, up to 3 digits, marks, line ends with the indentation after them.
# This holds 3.51 bytes of Python source in a token at 4,096 ids; GPT-2's pattern 3.34, Llama 3's 3.44.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|[\r\n]+[ \t]*|[ \t]+(?!\S)|\s+"


def _checked(ids: Any, vocab_size: int) -> list[int]:
    ids = np.asarray(ids, np.int64).reshape(-1)
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"token id {int(wrong[0])} is outside the vocabulary of {vocab_size}")
    return ids.tolist()


def _configured_bos(path: Path) -> str | None:
    """The bos_token, else the eos_token (Qwen separates documents by it), of a tokenizer_config.json."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    token = config.get("bos_token") or config.get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _token_bytes(backend: Any, vocab: dict[str, int], vocab_size: int) -> np.ndarray:
    """[vocab_size] int32. Exact for byte-level vocabularies (one character a byte) and for byte fallback."""
    config = json.loads(backend.to_str())
    byte_level = '"ByteLevel"' in json.dumps(config["decoder"])
    sizes = np.zeros(vocab_size, np.int32)
    for token, i in vocab.items():
        if byte_level:
            sizes[i] = len(token)
        else:
            is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            sizes[i] = 1 if is_byte else len(token.replace("\u2581", " ").encode("utf-8"))
    for added in config["added_tokens"]:
        sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
    return sizes
