"""Chat and completion in the terminal and through a pipe."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from preloaded import client

from rorchat.errors import UsageError
from rorchat.inference import terminal
from rorchat.inference.engine import ChatModel, continue_texts, generate_text
from rorchat.inference.terminal import run_chat, run_completion
from rorchat.model import build_model, save_model


@pytest.fixture
def conversations(monkeypatch):
    """Replaces the model by one that repeats the question; the conversations and settings of all calls."""
    calls = []

    def answer(chat, messages, **settings):
        calls.append(([dict(message) for message in messages], settings))
        yield from ("echo: ", messages[-1]["content"])

    monkeypatch.setattr(terminal, "stream_text", answer)
    return calls


def run(text: str, chat: ChatModel, **settings) -> tuple[int, list[str]]:
    target = io.StringIO()
    answered = run_chat(chat, source=io.StringIO(text), target=target, **settings)
    return answered, target.getvalue().splitlines()


def test_every_line_of_a_pipe_that_is_not_empty_is_answered(conversations, chat):
    assert run("one\n\n   \ntwo", chat) == (2, ["echo: one", "echo: two"])
    assert [len(messages) for messages, _ in conversations] == [1, 3]
    assert conversations[1][0] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "echo: one"},
        {"role": "user", "content": "two"},
    ]


def test_reset_starts_anew_exit_ends_and_help_explains(conversations, chat):
    answered, lines = run("one\n/reset\ntwo\n/help\n/exit\nthree\n", chat, system="Be kind.")
    assert (answered, lines) == (2, ["echo: one", "echo: two", terminal.HELP])
    for messages, _ in conversations:
        assert [message["role"] for message in messages] == ["system", "user"]
        assert messages[0]["content"] == "Be kind."


def test_an_empty_system_message_is_passed_on_because_it_replaces_the_default(conversations, chat):
    run("one\n", chat, system="")
    run("one\n", chat)
    assert [messages[0] for messages, _ in conversations] == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "one"},
    ]


def test_settings_reach_the_model(conversations, chat):
    run("one\n", chat, max_new_tokens=7, temperature=0.3, top_p=0.4)
    assert conversations[0][1] == {"max_new_tokens": 7, "temperature": 0.3, "top_p": 0.4}


@pytest.mark.parametrize("text", ["", "\n\n", "/exit\n", "/reset\n/reset\n"])
def test_no_question_gets_no_reply(text, conversations, chat):
    assert run(text, chat) == (0, [])


def test_a_terminal_shows_prompts(conversations, chat):
    source, target = io.StringIO("one\n"), io.StringIO()
    source.isatty = lambda: True
    assert run_chat(chat, source=source, target=target) == 1
    assert target.getvalue() == f"{terminal.HELP}\nyou: model: echo: one\nyou: \n"


def test_a_reset_is_confirmed_and_an_unknown_command_lists_the_known_ones(conversations, chat, capsys):
    assert run("/rest\n/Reset now\none\n/reset\n/5 /a/b\n", chat) == (2, ["echo: one", "echo: /5 /a/b"])
    assert [len(messages) for messages, _ in conversations] == [1, 1]
    assert capsys.readouterr().err.splitlines() == [
        f"(no command /rest: {terminal.HELP})",
        f"(no command /Reset: {terminal.HELP})",
        "(new conversation)",
    ]


def test_dropped_messages_are_reported_once_in_a_conversation(conversations, chat, capsys):
    long = "word " * 12  # two of them do not fit into the window
    run(f"{long}\n{long}\n{long}\n/reset\n{long}\n{long}\n{long}\n", chat, max_new_tokens=8, system="Be kind.")
    notices = capsys.readouterr().err.splitlines()
    assert [notice.split(" ", 2)[2] for notice in notices if notice != "(new conversation)"] == [
        "oldest messages do not fit into the context and were dropped)"
    ] * 2
    assert notices.index("(new conversation)") == 1
    run("word " * 300 + "\n" + "word " * 300, chat, max_new_tokens=8)  # the beginning of each message is cut
    assert capsys.readouterr().err.count("the message is too long: its first ") == 2


def test_arrow_keys_edit_the_line_on_a_terminal():
    """Types "abd", left, "c", Enter. Without readline, the escape code of the key would be part of the message."""
    code = (
        "from types import SimpleNamespace\nfrom rorchat.inference import terminal\n"
        "terminal.encode_prompt = lambda *given, **more: SimpleNamespace(dropped_tokens=0, dropped_turns=0)\n"
        "terminal.stream_text = lambda chat, messages, **given: iter([repr(messages[-1]['content'])])\n"
        "terminal.run_chat(SimpleNamespace(tokenizer=None, n_positions=8))"
    )
    process, screen = pty.fork()
    if not process:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    while b"you: " not in shown:
        shown += os.read(screen, 4096)
    os.write(screen, b"abd\x1b[Dc\n")
    while b"model: " not in shown or shown.count(b"you: ") < 2:
        shown += os.read(screen, 4096)
    os.write(screen, b"/exit\n")
    os.waitpid(process, 0)
    assert b"model: 'abcd'" in shown


def complete(chat: ChatModel, *prompts: str, **settings) -> str:
    target = io.StringIO()
    run_completion(chat, prompts, target=target, **settings)
    return target.getvalue()


def test_a_completion_continues_each_text_and_ends_with_a_newline(lively):
    first, second = "Once upon a time", "The <|im_end|> mill\n"
    settings = {"max_new_tokens": 12, "temperature": 0}
    expected = [text + continue_texts(lively, [text], 12)[0] for text in (first, second)]
    assert complete(lively, first, **settings) == expected[0] + "\n"
    assert len(expected[0]) > len(first)
    assert complete(lively, first, second, **settings) == f"{expected[0]}\n\n{expected[1]}\n"


def test_a_text_longer_than_the_window_is_continued_from_its_end(lively):
    long = "word " * 400 + "The model lived in a house"
    settings = {"max_new_tokens": 12, "temperature": 0}
    assert complete(lively, long, **settings) == long + continue_texts(lively, [long], 12)[0] + "\n"


@pytest.mark.parametrize("prompts", [[], [""], ["Once", " \n"]])
def test_a_completion_without_a_text_is_refused(prompts, lively):
    with pytest.raises(UsageError, match="No text to continue"):
        complete(lively, *prompts)


def test_replies_are_the_models_and_dropped_text_is_reported_on_stderr(lively, capsys):
    question = "What is 12 plus 34?"
    target = io.StringIO()
    assert run_chat(lively, max_new_tokens=16, temperature=0, source=io.StringIO(question), target=target) == 1
    assert target.getvalue() == generate_text(lively, question, max_new_tokens=16, temperature=0) + "\n"
    assert capsys.readouterr().err == ""
    run_chat(lively, max_new_tokens=8, temperature=0, source=io.StringIO("word " * 300), target=target)
    assert capsys.readouterr().err.startswith("(the message is too long: its first ")


class TestBadEnds:
    """The real command, with a model that never ends a reply by itself."""

    @pytest.fixture(scope="class")
    def endless(self, tokenizer, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("endless")
        model = build_model("2x2x32", tokenizer, n_positions=1024)
        with torch.no_grad():  # what the last norm adds makes control tokens unlikely
            model.transformer.ln_f.bias[0] = 10
            model.transformer.wte.weight[tokenizer.all_special_ids, 0] = -10
        save_model(model, tokenizer, folder)
        return folder

    @pytest.fixture
    def start(self, endless):
        def start(*options: str, encoding: str = "utf-8", **streams) -> subprocess.Popen:
            command = [client("rorchat"), "chat", endless, "--temperature", "1", *options]
            return subprocess.Popen(command, env=os.environ | {"PYTHONIOENCODING": encoding}, **streams)

        return start

    def test_ctrl_c_in_a_reply_leaves_one_line(self, start):
        screen, terminal_end = pty.openpty()
        process = start("--max_new_tokens", "900", **dict.fromkeys(("stdin", "stdout", "stderr"), terminal_end))
        os.close(terminal_end)
        shown = b""
        while b"you: " not in shown:
            shown += os.read(screen, 4096)
        os.write(screen, b"Tell me a story\n")
        while not re.search(rb"model: .", shown):
            shown += os.read(screen, 4096)
        os.write(screen, b"\x03")
        rest = b""
        while part := read_terminal(screen):
            rest += part
        assert process.wait(timeout=60) == 130
        after = rest.decode(errors="replace").partition("^C")[2]
        assert after.endswith("\r\nstopped\r\n") and "Traceback" not in after, after

    def test_a_closed_pipe_ends_the_reply(self, start):
        process = start("--max_new_tokens", "900", **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE))
        process.stdin.write(b"Tell me a story\n" * 9)
        process.stdin.flush()
        assert process.stdout.read(1)
        process.stdout.close()
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, b"stopped: the reader of the output has ended\n")

    @pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
    def test_a_stream_without_a_terminal_in_another_encoding_gets_question_marks(self, start, encoding):
        process = start(encoding=encoding, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        shown, errors = process.communicate("Hello 你好\n".encode(), timeout=60)
        assert (process.returncode, errors) == (0, b"")
        assert b"?" in shown and shown.decode(encoding)


def read_terminal(screen: int) -> bytes:
    """What a pseudo terminal shows next; empty after its last program has ended."""
    try:
        return os.read(screen, 4096)
    except OSError:  # EIO
        return b""
