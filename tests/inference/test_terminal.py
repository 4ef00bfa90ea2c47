"""The chat in the terminal and through a pipe."""

import io

import pytest

from rorchat.inference import terminal
from rorchat.inference.engine import ChatModel, generate_text
from rorchat.inference.terminal import run_chat


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
    assert target.getvalue() == f"{terminal.HELP}\nyou: model: echo: one\nyou: "


def test_replies_are_the_models_and_dropped_text_is_reported_on_stderr(lively, capsys):
    question = "What is 12 plus 34?"
    target = io.StringIO()
    assert run_chat(lively, max_new_tokens=16, temperature=0, source=io.StringIO(question), target=target) == 1
    assert target.getvalue() == generate_text(lively, question, max_new_tokens=16, temperature=0) + "\n"
    assert capsys.readouterr().err == ""
    run_chat(lively, max_new_tokens=8, temperature=0, source=io.StringIO("word " * 300), target=target)
    assert capsys.readouterr().err.startswith("(the message is too long: its first ")
