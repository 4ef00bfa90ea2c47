"""Columns beside the turns: marks of bad replies, system messages, and earlier turns."""

import json

import pytest
from support import chat_row, read_source, write

from rorchat.errors import DataError

HELLO = chat_row("Hello", "Hi!")
SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
ALPACA = {"instruction": "Hello", "input": "", "output": "Hi!"}
PROMPT = {"prompt": "Hello", "completion": "Hi!"}
CONVERSATIONS = [("messages", HELLO), ("messages", {"conversations": TURNS}), ("messages", ALPACA)] + [
    ("messages", {"question": "Hello", "answer": "Hi!"}),
    ("alpaca", ALPACA),
    ("alpaca", {key.title(): value for key, value in ALPACA.items()}),
    ("prompt_completion", PROMPT),
    ("prompt_completion", {"prompt": HELLO["messages"][:1], "completion": HELLO["messages"][1:]}),
    ("smoltalk", HELLO),
    ("code_alpaca", ALPACA),
]


@pytest.mark.parametrize(("source", "row"), CONVERSATIONS)
def test_a_reply_that_is_marked_as_bad_is_rejected_in_every_source(source, row, tmp_path):
    bad = [{"label": False}, {"kto_tag": False}, {"Label": 0}, {"KTO_Tag": "False"}, {"label": "0"}, {"label": 0.0}]
    good = [{"label": True}, {"kto_tag": True}, {"label": 1}, {"label": "true"}, {"label": None}, {"label": "science"}]
    path = write(tmp_path, "train.jsonl", [row | mark for mark in (*bad, *good)])
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [HELLO] * len(good)
    assert loaded.stats.rejects == {"marked as bad": len(bad)}
    assert loaded.stats.places["marked as bad"][0] == f"{path}:1 ('label' is false, as for bad replies in KTO)"


def test_a_mark_in_a_table_counts_and_a_named_column_is_not_a_mark(tmp_path):
    path = write(tmp_path, "rows.csv", "prompt,completion,label\nHello,Hi!,True\nHello,No.,False\n")
    assert read_source(f"prompt_completion={path}", "conversation")[0] == [HELLO]
    path = write(tmp_path, "rows.jsonl", [{"text": "Hello", "label": "0"}])
    assert read_source(f"messages={path}:user=text:assistant=label", "conversation")[0] == [chat_row("Hello", "0")]


@pytest.mark.parametrize("column", ["system", "system_prompt", "System"])
@pytest.mark.parametrize(("source", "row"), CONVERSATIONS)
def test_a_column_holds_the_system_message(source, row, column, tmp_path):
    rows = [row | {column: "Be short."}, row | {column: ""}, row | {column: None}]
    path = write(tmp_path, "train.jsonl", rows)
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [{"messages": [SYSTEM, *HELLO["messages"]]}, HELLO, HELLO]
    assert loaded.stats.repairs == {}


def test_the_system_message_of_the_turns_takes_precedence_over_a_column(tmp_path):
    messages = [SYSTEM, *HELLO["messages"]]
    columns = [{"system": "Be long."}, {"system": "Be short."}, {"system": ["Be long."]}]
    path = write(tmp_path, "rows.jsonl", [{"messages": messages, **column} for column in columns])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [{"messages": messages}] * 2
    assert loaded.stats.repairs == {"a second system message left out": 1}
    assert loaded.stats.places == {"no system message": [f"{path}:3 ('system' is of type list, expected a string)"]}


PREFERENCES = [
    {"prompt": "Hello", "chosen": "Hi!", "rejected": "No."},
    {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "No."}},
    {**ALPACA, "chosen": "Hi!", "rejected": "No."},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: "+".join(row))
def test_a_preference_has_the_system_message_and_earlier_turns_of_its_row(row, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row | {"system": "Be short.", "history": [["Yes?", "No."]]}])
    (pair,) = read_source(f"preference={path}", "preference")[0]
    earlier = [] if "conversations" in row else chat_row("Yes?", "No.")["messages"]  # these are all turns
    assert pair["prompt"] == [SYSTEM, *earlier, HELLO["messages"][0]]


@pytest.mark.parametrize(("source", "row"), CONVERSATIONS[2:7])
def test_the_history_beside_a_question_is_its_earlier_turns(source, row, tmp_path):
    history = [["One?", "1"], ["Two?", "2"]]
    values = [history, json.dumps(history), [], None, "", ["One?", "1"], [["human", "One?"], ["ai", "1"]], "One?"]
    path = write(tmp_path, "train.jsonl", [row | {"history": value} for value in values])
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [chat_row("One?", "1", "Two?", "2", "Hello", "Hi!")] * 2 + [HELLO] * 3
    assert loaded.stats.rejects == {"unknown 'history'": 3}
    with_list = write(tmp_path, "list.jsonl", [{**HELLO, "history": history}])
    assert read_source(f"messages={with_list}", "conversation")[0] == [HELLO]


def test_an_unusable_history_stops_with_the_name_of_its_column(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{**ALPACA, "chat_history": ["One?"]}])
    with pytest.raises(DataError, match="1 unknown 'chat_history', first at .*a list of \\[question, answer\\]"):
        read_source(f"messages={path}", "conversation")
