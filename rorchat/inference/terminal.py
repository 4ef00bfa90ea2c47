"""Chat and text completion in the terminal or through a pipe."""

import re
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TextIO

from rorchat.chatml import encode_prompt
from rorchat.errors import UsageError
from rorchat.inference.engine import DEFAULT_REPLY_DIVISOR, ChatModel, stream_continuation, stream_text

HELP = "/reset starts a new conversation, /exit quits, /help shows this help"
_COMMAND = re.compile(r"/[A-Za-z]+")  # "/etc/hosts" and "/5" are messages


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

    The prompts "you:" and "model:" are printed only if `source` is a terminal, where the arrow keys edit the line and
    recall earlier ones. Notices go to stderr: an unknown command, a reset, and parts of the conversation that no longer
    fit into the context window.

    Args:
        system: system message of every conversation; "" for none, None for the model's default.
        source: stream of questions; default: stdin.
        target: stream to which replies are written; default: stdout.

    Returns:
        The number of questions answered.
    """
    source, target = source or sys.stdin, target or sys.stdout
    interactive = source.isatty()
    opening = [] if system is None else [{"role": "system", "content": system}]
    messages, answered, reported = list(opening), 0, False
    if interactive:
        print(HELP, file=target)
    for question in _read_questions(source, target, interactive):
        if question == "/exit":
            break
        if question == "/reset":
            messages, reported = list(opening), False
            _notify("new conversation")
            continue
        if question == "/help":
            print(HELP, file=target)
            continue
        if _COMMAND.fullmatch(question.split()[0]):
            _notify(f"no command {question.split()[0]}: {HELP}")
            continue
        messages.append({"role": "user", "content": question})
        reported = _report_dropped(chat, messages, max_new_tokens, reported)
        if interactive:
            print("model: ", end="", file=target)
        reply = stream_text(chat, messages, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        messages.append({"role": "assistant", "content": _print_stream(reply, target)})
        answered += 1
    return answered


def _read_questions(source: TextIO, target: TextIO, interactive: bool) -> Iterator[str]:
    """Yields the lines that are not blank, without the space around them."""
    edits = interactive and source is sys.stdin and target is sys.stdout
    if edits:
        import readline  # noqa: F401  # `input` then edits lines and recalls earlier ones
    while True:
        if edits:
            try:
                line = input("you: ") + "\n"
            except EOFError:
                line = ""
        else:
            if interactive:
                print("you: ", end="", file=target, flush=True)
            line = source.readline()
        if not line:
            if interactive:
                print(file=target)  # the shell's prompt starts on a new line
            return
        if line.strip():
            yield line.strip()


def _print_stream(pieces: Generator[str, None, None], target: TextIO) -> str:
    """Prints a text as it is generated, and returns it."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            print(piece, end="", file=target, flush=True)
    except BaseException:  # Ctrl-C or a closed pipe; the traceback would keep the generator until the interpreter exits
        pieces.close()
        raise
    print(file=target, flush=True)
    return text


def _notify(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _report_dropped(
    chat: ChatModel, messages: list[dict[str, str]], max_new_tokens: int | None, reported: bool
) -> bool:
    """Reports which part of the conversation does not fit into the context window: old messages only the first time.

    Returns:
        Whether dropped messages of this conversation have been reported.
    """
    limit = max_new_tokens or chat.n_positions // DEFAULT_REPLY_DIVISOR
    prompt = encode_prompt(chat.tokenizer, messages, n_positions=chat.n_positions, max_new_tokens=limit)
    if prompt.dropped_tokens or (prompt.dropped_turns and not reported):
        _notify(prompt.notice())
    return reported or prompt.dropped_turns > 0


def run_completion(
    chat: ChatModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    target: TextIO | None = None,
) -> None:
    """Continues texts, and streams each with what follows it. An empty line separates several texts.

    Args:
        prompts: beginnings of texts.
        target: stream to which the texts are written; default: stdout.

    Raises:
        UsageError: there is no prompt, or one of them is blank.
    """
    target = target or sys.stdout
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UsageError('No text to continue: give its beginning, as in "Once upon a time".')
    for number, prompt in enumerate(prompts):
        print("\n" * (number > 0) + prompt, end="", file=target, flush=True)
        continuation = stream_continuation(
            chat, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
        )
        _print_stream(continuation, target)
