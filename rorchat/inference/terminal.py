"""A conversation in the terminal, or through a pipe: one question a line, one answer each."""

import sys
from typing import TextIO

from rorchat.chatml import encode_prompt
from rorchat.inference.engine import DEFAULT_REPLY_DIVISOR, ChatModel, stream_text

HELP = "/reset begins anew, /exit ends, /help shows this"


def talk(
    chat: ChatModel,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> int:
    """Reads questions until /exit or the end of input and streams the answers.

    On a terminal it prompts; piped, it prints the answers alone, and notices go to stderr either way.

    Returns:
        The number of questions answered.
    """
    source, target = source or sys.stdin, target or sys.stdout
    interactive = source.isatty()
    opening = [{"role": "system", "content": system}] if system else []
    messages, answered = list(opening), 0
    if interactive:
        print(HELP, file=target)
    while True:
        if interactive:
            print("you: ", end="", file=target, flush=True)
        line = source.readline()
        question = line.strip()
        if not line or question == "/exit":
            return answered
        if not question:
            continue
        if question == "/reset":
            messages = list(opening)
            continue
        if question == "/help":
            print(HELP, file=target)
            continue
        messages.append({"role": "user", "content": question})
        _say_notice(chat, messages, max_new_tokens)
        if interactive:
            print("model: ", end="", file=target)
        pieces = []
        for piece in stream_text(chat, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p):
            pieces.append(piece)
            print(piece, end="", file=target, flush=True)
        print(file=target, flush=True)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        answered += 1


def _say_notice(chat: ChatModel, messages: list[dict], max_new_tokens: int | None) -> None:
    reserve = max_new_tokens or chat.n_positions // DEFAULT_REPLY_DIVISOR
    notice = encode_prompt(chat.tokenizer, messages, n_positions=chat.n_positions, max_new_tokens=reserve).notice()
    if notice:
        print(f"({notice})", file=sys.stderr, flush=True)
