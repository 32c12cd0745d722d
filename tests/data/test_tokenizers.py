"""Round trips, determinism, and that a document cannot spell a control token."""

import functools
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxscale.data import ByteTokenizer, HFTokenizer, load_tokenizer, train_bpe

CORPUS = [f"def function_{i}(argument):\n    return argument + {i}  # ünïcode {i * i} €\n" for i in range(300)]
text_st = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@functools.cache
def trained():
    return train_bpe(CORPUS, 400)


@pytest.fixture
def bpe():
    return trained()


@pytest.fixture(params=[ByteTokenizer, trained], ids=["bytes", "bpe"])
def tokenizer(request):
    return request.param()


@settings(deadline=None)
@given(texts=st.lists(text_st, max_size=5))
def test_round_trip(texts):
    for tokenizer in (ByteTokenizer(), trained()):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))
            assert ids.dtype == np.int32
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode(np.concatenate([[tokenizer.bos_id], ids])) == text
            assert tokenizer.bos_id not in ids
            assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for again in (load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")):
        assert again.fingerprint == tokenizer.fingerprint
        assert (again.vocab_size, again.bos_id) == (tokenizer.vocab_size, tokenizer.bos_id)
        np.testing.assert_array_equal(again.encode(CORPUS[7]), tokenizer.encode(CORPUS[7]))


def test_bpe_is_deterministic_and_compresses(bpe):
    assert bpe.vocab_size == 400
    assert bpe.bos_id == 0
    assert train_bpe(CORPUS, 400).fingerprint == bpe.fingerprint
    assert train_bpe(CORPUS, 401).fingerprint != bpe.fingerprint
    text = "".join(CORPUS)
    assert len(text.encode()) / len(bpe.encode(text)) > 3
    with pytest.raises(ValueError, match="vocab_size=256 is less than the 256 bytes"):
        train_bpe(CORPUS, 256)


def test_text_does_not_spell_control_tokens(tmp_path):
    trained().save(tmp_path / "tokenizer.json")
    bpe = load_tokenizer(tmp_path)  # a fresh one: the first call counts
    text = "an <|bos|> in a document"
    assert bpe.bos_id not in bpe.encode_batch([text])[0]
    assert bpe.bos_id not in bpe.encode(text)
    assert bpe.decode(bpe.encode(text)) == text
    assert list(bpe.encode(text, special=True)).count(bpe.bos_id) == 1
    assert bpe.bos_id not in bpe.encode(text)


def test_ids_outside_the_vocabulary(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside the vocabulary of {tokenizer.vocab_size}"):
            tokenizer.decode([65, wrong])


def test_bytes_refuse_nul_and_forgive_broken_utf8():
    with pytest.raises(ValueError, match="NUL at byte 3"):
        ByteTokenizer().encode("é \0")
    assert ByteTokenizer().decode([65, 0xE2, 0x82]) == "A\ufffd"


def metaspace_backend():
    """A SentencePiece-like BPE with byte fallback, as Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>"] + [f"<0x{i:02X}>" for i in range(256)] + ["▁", "a", "b", "é", "▁a", "▁ab"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁a", "b")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("<s>", special=True)])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    return backend


def test_sentencepiece_like_tokenizer():
    tokenizer = HFTokenizer(metaspace_backend())
    text = "ab abba é €uro <s>"
    ids = tokenizer.encode(text)
    assert tokenizer.bos_token == "<s>"
    assert len(ids) > 4  # a stored truncation or padding does not apply
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_document_start_of_a_hugging_face_folder(tmp_path):
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"a": 0, "<doc>": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"has none of .*<s>.*tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    for content in ({"bos_token": "<doc>"}, {"bos_token": None, "eos_token": {"content": "<doc>", "lstrip": False}}):
        config.write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).bos_id == 1
    config.write_text(json.dumps({"bos_token": "<other>"}))
    with pytest.raises(ValueError, match="has no token '<other>'"):
        load_tokenizer(tmp_path)


def test_unusable_files(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer 'bites' cannot be read \(No such file"):
        load_tokenizer("bites")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(path)
    path.write_text('{"model": 1}')
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json that"):
        load_tokenizer(path)


def test_import_stays_light():
    program = "import sys, jaxscale.data; print({'grain', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"
