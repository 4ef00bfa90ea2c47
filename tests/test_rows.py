"""Rows of every kind are checked; helpers raise RejectedRow with a reason."""

import pytest

from rorchat.rows import (
    CHECKS,
    MAX_DETAIL_CHARACTERS,
    RejectedRow,
    decode_byte_literal,
    exchange,
    message,
    row_text,
)


def reason_of(kind: str, row: dict) -> str:
    with pytest.raises(RejectedRow) as rejected:
        CHECKS[kind](row)
    return rejected.value.reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty text"),
        (" \n", "empty text"),
        ("a\x00b", "control character"),
        ("é\x85\x9f", "control character"),
        ("half \ud800", "invalid Unicode"),
        ("b'all of it'", "byte literal"),
        ("x" * 2**20 + "\x7f", "control character"),
    ],
    ids=["empty", "blank", "NUL", "C1", "surrogate", "literal", "second piece"],
)
def test_unusable_documents_are_rejected(text, reason):
    assert reason_of("document", {"text": text}) == reason


@pytest.mark.parametrize("text", ["tab\tline\r\n\x0b\x0c\x85", "b'a' + b'b'", "naïve 你好 🙂"])
def test_white_space_and_expressions_are_allowed(text):
    row = {"text": text}
    CHECKS["document"](row)  # raises RejectedRow otherwise
    assert row == {"text": text}


def test_preferences_need_one_reply_per_side_after_a_user_message():
    turns = exchange("a", "b")["messages"]
    row = {"prompt": turns[:1], "chosen": turns[1:], "rejected": exchange("a", "c")["messages"][1:]}
    CHECKS["preference"](row)
    assert reason_of("preference", {**row, "rejected": row["chosen"]}) == "identical chosen and rejected"
    assert reason_of("preference", {**row, "prompt": [], "chosen": turns, "rejected": turns}) == "wrong order"


def test_a_conversation_needs_a_reply_that_is_learned():
    question, reply = exchange("a", "b")["messages"]
    unlearned = message("assistant", "b", train=False)
    assert unlearned == {**reply, "train": False}
    CHECKS["conversation"]({"messages": [question, unlearned, question, reply]})
    assert reason_of("conversation", {"messages": [question, unlearned]}) == "no reply is learned"
    pair = {"prompt": [question], "chosen": [reply], "rejected": [message("assistant", "c", train=False)]}
    assert reason_of("preference", pair) == "no reply is learned"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("b'caf\\xc3\\xa9\\n'", "café\n"), (' b"a" ', "a"), ("b'\\xff'", None), ("b'a' + b'b'", None), ("plain", None)],
)
def test_byte_literals_are_decoded_as_utf8(text, expected):
    assert decode_byte_literal(text) == expected


def test_a_detail_is_one_short_printable_line():
    detail = RejectedRow("reason", "\x1b[31m\n" + "x" * 1000).detail
    assert detail.isprintable() and detail.startswith("\\x1b[31m\\n")
    assert len(detail) < MAX_DETAIL_CHARACTERS + 20


def test_row_text_joins_all_contents():
    assert row_text({"text": "a"}) == "a"
    assert row_text(exchange("a", "b")) == "a\nb"
