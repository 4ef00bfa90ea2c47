"""Chat in the terminal or through a pipe: every input line is a question and gets one reply."""

import sys
from typing import TextIO

from rorchat.chatml import encode_prompt
from rorchat.inference.engine import DEFAULT_REPLY_DIVISOR, ChatModel, stream_text

HELP = "/reset starts a new conversation, /exit quits, /help shows this help"


def run_chat(
    chat: ChatModel,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    source: TextIO | None = None,
    target: TextIO | None = None,
) -> int:
    """Reads questions until /exit or the end of input, and streams the replies.

    The prompts "you:" and "model:" are printed only if `source` is a terminal. Parts of the conversation that no longer
    fit into the context window are reported on stderr.

    Args:
        source: stream of questions; default: stdin.
        target: stream to which replies are written; default: stdout.

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
        _report_dropped(chat, messages, max_new_tokens)
        if interactive:
            print("model: ", end="", file=target)
        pieces = []
        for piece in stream_text(chat, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p):
            pieces.append(piece)
            print(piece, end="", file=target, flush=True)
        print(file=target, flush=True)
        messages.append({"role": "assistant", "content": "".join(pieces)})
        answered += 1


def _report_dropped(chat: ChatModel, messages: list[dict[str, str]], max_new_tokens: int | None) -> None:
    """Prints to stderr which part of the conversation does not fit into the context window."""
    limit = max_new_tokens or chat.n_positions // DEFAULT_REPLY_DIVISOR
    notice = encode_prompt(chat.tokenizer, messages, n_positions=chat.n_positions, max_new_tokens=limit).notice()
    if notice:
        print(f"({notice})", file=sys.stderr, flush=True)
