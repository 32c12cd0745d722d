"""Conversations as token ids in ChatML, with what of them is to be learnt: the assistant's answers."""

import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxscale.chatml import END, START, texts
from jaxscale.data.tokenizers import Tokenizer


class Conversation(NamedTuple):
    ids: np.ndarray  # int32 [tokens], without a leading BOS
    learnt: np.ndarray  # bool [tokens]: of an answer, or its end
    num_bytes: int  # of the answers, in UTF-8


def encode_chats(conversations: Sequence[str], tokenizer: Tokenizer) -> list[Conversation]:
    """Of conversations as `canonical` writes them.

    What a message holds is text, also where it spells a control token: it cannot end its turn.

    Raises:
      ValueError: the tokenizer has no control tokens of ChatML.
    """
    start, end = (control_token(tokenizer, name) for name in (START, END))
    chats = [json.loads(text) for text in conversations]
    # The pieces of all conversations at once: tokenizers encode them in parallel.
    pieces = [piece for chat in chats for role, content in chat for piece in texts(role, content)]
    encoded = iter(tokenizer.encode_batch(pieces))
    out = []
    for chat in chats:
        ids, learnt, num_bytes = [], [], 0
        for role, content in chat:
            head, body, gap = (next(encoded) for _ in range(3))
            answer = role == "assistant"
            for part, is_learnt in (([start], False), (head, False), (body, answer), ([end], answer), (gap, False)):
                ids.append(np.asarray(part, np.int32))
                learnt.append(np.full(len(part), is_learnt))
            num_bytes += len(content.encode("utf-8")) if answer else 0
        out.append(Conversation(np.concatenate(ids), np.concatenate(learnt), num_bytes))
    return out


def control_token(tokenizer: Tokenizer, name: str) -> int:
    """The id of a control token."""
    ids = tokenizer.encode(name, special=True)
    if len(ids) != 1:
        raise ValueError(
            f"the tokenizer has no token {name}, which conversations (data.messages_key) are written with; take one "
            "of a model that chats, as --data.tokenizer smollm2-135m with --init-from smollm2-135m"
        )
    return int(ids[0])


def canonical(messages: object, where: str) -> str:
    """One text for a conversation, by which it is told from others: JSON of [role, content] pairs.

    Raises:
      ValueError: these are no messages, or none of them is the assistant's.
    """
    wanted = 'a list of {"role": "user" or "assistant" or "system", "content": text}'
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f"{where} holds a {type(messages).__name__}; a conversation is {wanted}")
    pairs = [[m.get("role"), m.get("content")] for m in messages]
    wrong = next((pair for pair in pairs if not all(isinstance(x, str) for x in pair)), None)
    if wrong is not None:
        raise ValueError(f"{where} has a message with role {wrong[0]!r} and content {wrong[1]!r}; wanted is {wanted}")
    if not any(role == "assistant" and content for role, content in pairs):
        raise ValueError(f"{where} has no answer of the assistant, so nothing to learn; leave it out")
    return json.dumps(pairs, ensure_ascii=False)
