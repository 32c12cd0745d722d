"""Conversations: what is learnt of them, how they are written, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxscale import DataConfig
from jaxscale.chatml import chatml
from jaxscale.data import HFTokenizer, make_dataset, train_bpe

WORDS = ["mesh", "array", "shard", "and", "the", "two", "devices", "hold", "<|im_end|>", "é"]


@pytest.fixture
def tokenizer():
    backend = train_bpe(["the mesh shards arrays and the devices hold them", *WORDS] * 4, 300).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return HFTokenizer(backend)


@pytest.fixture
def conversations(rng):
    say = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 12)))
    turns = lambda: [
        m
        for _ in range(rng.integers(1, 4))
        for m in ({"role": "user", "content": say()}, {"role": "assistant", "content": say()})
    ]
    return [([{"role": "system", "content": say()}] if rng.random() < 0.5 else []) + turns() for _ in range(40)]


def write(path: Path, rows, key="messages") -> str:
    path.write_text("".join(json.dumps({key: row}) + "\n" for row in rows))
    return str(path)


def test_answers_alone_are_learnt(tmp_path, tokenizer, conversations):
    """Each row's labels, put together, are the answers with the token that ends each; its tokens are what a prompt for
    the same conversation would be."""
    cfg = DataConfig(
        source=write(tmp_path / "chats.jsonl", conversations),
        messages_key="messages",
        seq_len=4096,
        batch_size=1,
        holdout=0.2,
    )
    start, end = (tokenizer.backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    learnt, seen, num_bytes = [], [], 0.0
    for split in ("train", "valid"):
        data = make_dataset(cfg, split=split, tokenizer=tokenizer)
        for i in range(data.batches_per_epoch):
            rows = data[i]
            labels = rows["labels"]
            at = np.nonzero(labels[:, :-1] >= 0)
            np.testing.assert_array_equal(labels[:, :-1][at], rows["tokens"][:, 1:][at])
            learnt.append(labels[labels >= 0])
            seen.append(rows["tokens"][rows["segment_ids"] > 0])
            num_bytes += data.count_bytes(labels)
    answers = [m["content"] for chat in conversations for m in chat if m["role"] == "assistant"]
    text = tokenizer.backend.decode(np.concatenate(learnt).tolist(), skip_special_tokens=False)
    count = (np.concatenate(learnt) == end).sum()
    assert count == len(answers)
    ids = lambda text: tokenizer.encode(text).tolist()
    want = sorted((*ids(a), end) for a in answers)
    at = np.flatnonzero(np.concatenate(learnt) == end)
    assert sorted(map(tuple, np.split(np.concatenate(learnt), at[:-1] + 1))) == want, text
    assert num_bytes == pytest.approx(sum(len(a.encode()) for a in answers), rel=1e-9)
    # The tokens are ChatML's, but that a message's own <|im_end|> is text.
    plain = [chat for chat in conversations if not any("<|im_end|>" in m["content"] for m in chat)]
    stream = "," + ",".join(map(str, np.concatenate(seen).tolist())) + ","
    for chat in plain:
        prompt = chatml(chat).removesuffix("<|im_start|>assistant\n")
        whole = tokenizer.encode(prompt, special=True)
        assert "," + ",".join(map(str, whole.tolist())) + "," in stream
    assert (np.concatenate(seen) == start).sum() == sum(len(chat) for chat in conversations)


def test_conversations_are_not_cut(tmp_path, tokenizer, conversations):
    """Every epoch holds each once: in one piece of a row, or from a row's start in as many rows as it is long; a saved
    position goes on there, for two processes as for one."""
    source = write(tmp_path / "chats.jsonl", conversations)
    cfg = DataConfig(source=source, messages_key="messages", seq_len=96, batch_size=2)
    data = make_dataset(cfg, tokenizer=tokenizer)
    documents = data.store.documents
    known = {bytes(data.store.ids[s : s + n].astype(np.int32)): n for s, n in documents[["start", "num_tokens"]]}
    assert len(known) == len(documents) and max(known.values()) > 96 > min(known.values())  # both kinds are there
    rows = [{name: a[i] for name, a in data[b].items()} for b in range(data.num_rows) for i in range(2)]
    epochs = rows[: data.num_rows], rows[data.num_rows :]
    for epoch in epochs:
        found, cut = [], []
        for row in epoch:
            for i in range(1, row["segment_ids"].max() + 1):
                piece = row["tokens"][row["segment_ids"] == i]
                np.testing.assert_array_equal(row["positions"][row["segment_ids"] == i], np.arange(len(piece)))
                found.append(piece) if bytes(piece) in known else cut.append((i, piece))
        lengths = [known[bytes(piece)] for piece in found]
        assert len({bytes(piece) for piece in found}) == len(found) and sum(lengths) <= data.num_tokens
        assert sorted(lengths) == sorted(n for n in known.values() if n <= 96)
        assert sum(lengths) + sum(len(piece) for _, piece in cut) == data.num_tokens
        assert all(i == 1 for i, _ in cut)
        assert sum((row["labels"] >= 0).sum() for row in epoch) == data.store.learnt.sum()
    assert any(not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(*epochs))

    started = data.batches(3)
    state = json.loads(json.dumps(started.state()))
    want = next(started)
    started.close()
    halves = [make_dataset(cfg, tokenizer=tokenizer, process_index=i, process_count=2).batches(state) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([next(half)["tokens"] for half in halves]), want["tokens"])
    for half in halves:
        half.close()
    with pytest.raises(ValueError, match="has packing=None but this run has packing=whole conversations"):
        data.batches({name: value for name, value in state.items() if name != "packing"})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("text", "line 3: 'messages' holds a str; a conversation is a list"),
        ([{"role": "user"}], "has a message with role 'user' and content None"),
        ([{"role": "user", "content": "why?"}], "has no answer of the assistant, so nothing to learn"),
    ],
)
def test_what_is_no_conversation(tmp_path, tokenizer, conversations, row, words):
    source = write(tmp_path / "chats.jsonl", [*conversations[:2], row, *conversations[2:]])
    with pytest.raises(ValueError, match=words):
        make_dataset(DataConfig(source=source, messages_key="messages"), tokenizer=tokenizer)


def test_conversations_want_their_kind_of_source_and_tokenizer(tmp_path, conversations):
    source = write(tmp_path / "chats.jsonl", conversations)
    with pytest.raises(
        ValueError, match=r"no token <\|im_start\|>, which conversations .* --data.tokenizer smollm2-135m"
    ):
        make_dataset(DataConfig(source=source, messages_key="messages"))
    with pytest.raises(ValueError, match=r"source='stdlib' is no \.jsonl file"):
        DataConfig(messages_key="messages")
    with pytest.raises(
        ValueError, match=r"'messages' holds a list, not text; .* data.messages_key where it is a conversation"
    ):
        make_dataset(DataConfig(source=source, text_key="messages"))
    with pytest.raises(ValueError, match=r"no key 'chat' but has the keys \['messages'\]; set data.messages_key"):
        make_dataset(DataConfig(source=source, messages_key="chat"))
