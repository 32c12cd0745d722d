"""ChatML: how a conversation is written, as a prompt and as what is learnt."""

START, END = "<|im_start|>", "<|im_end|>"


def texts(role: str, content: str) -> tuple[str, str, str]:
    """Of a message, which is written START, the first of these, the second, END, the third."""
    return f"{role}\n", content, "\n"


def chatml(messages: list[dict[str, str]], system: str | None = None) -> str:
    """Messages {"role", "content"} as ChatML text that asks for the assistant's next one.

    Args:
      system: said first when the messages do not begin with a system message of their own.
    """
    if system is not None and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    out = ""
    for message in messages:
        head, body, gap = texts(message["role"], message["content"])
        out += f"{START}{head}{body}{END}{gap}"
    return out + START + texts("assistant", "")[0]
