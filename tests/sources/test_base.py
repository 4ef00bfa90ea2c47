"""Digests of texts identify duplicates and decide the validation split."""

import json

import pytest
from support import chat_row

from rorchat.rows import row_text
from rorchat.validation_split import exact_digest, is_validation_text, text_digest


def test_the_validation_split_has_its_share_and_depends_only_on_words():
    held_out = [is_validation_text(f"document {number}", 0.1) for number in range(20_000)]
    assert 0.09 < sum(held_out) / len(held_out) < 0.11
    assert not any(is_validation_text(f"document {number}", 0.0) for number in range(100))
    assert all(is_validation_text(f"document {number}", 1.0) for number in range(100))
    for number, held in enumerate(held_out[:500]):
        assert is_validation_text(f"  DOCUMENT\n\t{number} ", 0.1) == held
        assert not held or is_validation_text(f"document {number}", 0.2)  # a larger share only adds


UNLEARNED = [chat_row("a", "b")["messages"][0], {"role": "assistant", "content": "b", "train": False}]
DIFFERENT = [
    ({"text": "if x:\n    a()\n    b()"}, {"text": "if x:\n    a()\nb()"}),
    ({"text": "Polish"}, {"text": "polish"}),
    (chat_row("Sort 1 23.", "1 23"), chat_row("Sort 12 3.", "12 3")),
    (chat_row("Say a", "b c"), chat_row("Say a b", "c")),
    (
        {"messages": [*chat_row("a", "b")["messages"], *UNLEARNED]},
        {"messages": [*UNLEARNED, *chat_row("a", "b")["messages"]]},
    ),
    ({"messages": chat_row("a", "b")["messages"] * 2}, {"messages": chat_row("a", "b\na\nb")["messages"]}),
    (
        {"messages": [{"role": "system", "content": "a"}, *chat_row("b", "c")["messages"]]},
        {"messages": [{"role": "user", "content": "a"}, *chat_row("b", "c")["messages"]]},
    ),
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_similar_texts_share_a_split_but_are_not_duplicates(first, second):
    loose = [text_digest(row_text(row)) for row in (first, second)]
    assert loose[0] == loose[1]
    assert exact_digest(first, loose[0]) != exact_digest(second, loose[1])
    again = json.loads(json.dumps(first))
    assert exact_digest(again, loose[0]) == exact_digest(first, loose[0]) and len(exact_digest(first, loose[0])) == 16


@pytest.mark.parametrize("length", [10, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_exact_digest_ignores_white_space_around_a_document(length):
    text = ("It was the best of times. " * (length // 26 + 1))[: length - 1] + "x"
    bare, padded = ({"text": form} for form in (text, f"\n {text}\r\n"))
    assert exact_digest(bare, text_digest(text)) == exact_digest(padded, text_digest(padded["text"]))
    assert exact_digest(bare, text_digest(text)) != exact_digest(
        {"text": text.replace("was", "Was", 1)}, text_digest(text)
    )
