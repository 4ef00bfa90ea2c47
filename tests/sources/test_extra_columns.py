"""Columns beside the turns: marks of bad replies, system messages, earlier turns, and what cannot be used."""

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
    assert "read them with the source 'preference' (columns chosen and rejected)" in str(loaded.stats)


def test_only_bad_replies_end_with_the_way_to_learn_from_them(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{**PROMPT, "label": False}])
    with pytest.raises(DataError, match="1 marked as bad, first at .* with the source 'preference'"):
        read_source(f"prompt_completion={path}", "conversation")


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"trainable": "false"}], ids=str)
def test_a_row_that_is_marked_as_not_learned_is_rejected(mark, tmp_path):
    path = write(tmp_path, "rows.jsonl", [HELLO, {**HELLO, **mark}, {**HELLO, "weight": 1, "train": None}])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [HELLO] * 2 and loaded.stats.rejects == {"marked as not learned": 1}


@pytest.mark.parametrize(("source", "row"), CONVERSATIONS)
@pytest.mark.parametrize("column", ["tools", "functions", "images", "Audio", "video"])
def test_what_is_not_text_beside_the_turns_rejects_the_row_with_the_columns_name(source, row, column, tmp_path):
    empty = [None, [], "", "[]", {}]
    full = [[{"name": "add"}], "a.png", '[{"name": "add"}]']
    path = write(tmp_path, "train.jsonl", [row | {column: value} for value in (*empty, *full)])
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [HELLO] * len(empty)
    assert loaded.stats.rejects == {f"{column!r} cannot be used": len(full)}


def test_tools_beside_a_preference_reject_it(tmp_path):
    openai = {"input": {"messages": HELLO["messages"][:1], "tools": [{}]}, "preferred_output": HELLO["messages"][1:]}
    rows = [PREFERENCES[0] | {"images": ["a.png"]}, openai | {"non_preferred_output": HELLO["messages"][1:]}]
    path = write(tmp_path, "rows.jsonl", rows)
    _, loaded = read_source(f"preference={path}", "preference", allow_empty=True)
    assert loaded.stats.rejects == {"'images' cannot be used": 1, "'tools' cannot be used": 1}


def test_a_mark_in_a_table_counts_and_a_named_column_is_not_a_mark(tmp_path):
    path = write(tmp_path, "rows.csv", "prompt,completion,label\nHello,Hi!,True\nHello,No.,False\n")
    assert read_source(f"prompt_completion={path}", "conversation")[0] == [HELLO]
    path = write(tmp_path, "rows.jsonl", [{"text": "Hello", "label": "0"}])
    assert read_source(f"messages={path}:user=text:assistant=label", "conversation")[0] == [chat_row("Hello", "0")]


@pytest.mark.parametrize("column", ["system", "system_prompt", "System", "system_message"])
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


def test_an_instruction_that_is_not_the_question_is_the_system_message(tmp_path):
    beside = {"instruction": "Be short."}
    rows = [HELLO | beside, {"question": "Hello", "answer": "Hi!"} | beside, {"instruction": "Hello"} | HELLO]
    path = write(tmp_path, "rows.jsonl", [*rows, PROMPT | beside])
    with_system = {"messages": [SYSTEM, *HELLO["messages"]]}
    assert read_source(f"messages={path}", "conversation")[0] == [with_system, with_system, HELLO, with_system]
    assert read_source(f"prompt_completion={path}", "conversation")[0] == [with_system]
    pair = write(tmp_path, "pairs.jsonl", [PREFERENCES[0] | beside])
    assert read_source(f"preference={pair}", "preference")[0][0]["prompt"] == with_system["messages"][:2]


PREFERENCES = [
    {"prompt": "Hello", "chosen": "Hi!", "rejected": "No."},
    {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": {"from": "gpt", "value": "No."}},
    {**ALPACA, "chosen": "Hi!", "rejected": "No."},
]


@pytest.mark.parametrize("row", PREFERENCES, ids=lambda row: "+".join(row))
def test_a_preference_has_the_system_message_and_earlier_turns_of_its_row(row, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row | {"system": "Be short.", "history": [["Yes?", "No."]]}])
    (pair,) = read_source(f"preference={path}", "preference")[0]
    assert pair["prompt"] == [SYSTEM, *chat_row("Yes?", "No.")["messages"], HELLO["messages"][0]]


@pytest.mark.parametrize(("source", "row"), CONVERSATIONS[2:7])
def test_the_history_beside_a_question_is_its_earlier_turns(source, row, tmp_path):
    history = [["One?", "1"], ["Two?", "2"]]
    values = [history, json.dumps(history), [], None, "", ["One?", "1"], [["human", "One?"], ["ai", "1"]], "One?"]
    path = write(tmp_path, "train.jsonl", [row | {"history": value} for value in values])
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [chat_row("One?", "1", "Two?", "2", "Hello", "Hi!")] * 2 + [HELLO] * 3
    assert loaded.stats.rejects == {"unknown 'history'": 3}


def test_the_history_beside_a_list_of_turns_comes_before_them_once(tmp_path):
    one, both = chat_row("One?", "1")["messages"], chat_row("One?", "1", "Hello", "Hi!")
    histories = [[["One?", "1"]], one, json.dumps(one)]
    rows = [HELLO | {"history": history} for history in histories] + [both | {"history": one}]
    path = write(tmp_path, "rows.jsonl", [*rows, {"history": [["Hello", "Hi!"]]}])
    assert read_source(f"messages={path}", "conversation")[0] == [*[both] * 4, HELLO]


LONG = "You are in a dark tavern at night, and a dragon sits in front of its door."


TOLD_IN = [("messages", HELLO), ("prompt_completion", PROMPT), ("alpaca", ALPACA), ("smoltalk", HELLO)]


@pytest.mark.parametrize(("source", "row"), TOLD_IN)
def test_a_long_text_in_an_unknown_column_is_told_once(source, row, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row | {"scene": LONG}] * 3 + [row | {"title": LONG}] + [row] * 1)
    told = str(read_source(f"{source}={path}", "conversation")[1].stats)
    assert told.count("is not read") == 1
    assert "column 'scene' is not read: 3 rows have text there" in told
    listed = write(tmp_path, "listed.jsonl", [row | {"persona": LONG.split(", "), "tags": ["dark", "dragon"]}] * 2)
    assert read_source(f"{source}={listed}", "conversation")[1].stats.unread_columns == {"persona": 2}


NOT_TOLD = [{"scene": "dark"}, {"url": "http://" + "x" * 60}, {"whole": f"Below: {LONG} Answer: Hi!"}, {"prompt": LONG}]


@pytest.mark.parametrize("column", NOT_TOLD, ids=lambda column: next(iter(column)))
def test_a_short_text_and_one_that_is_in_the_turns_are_not_told(column, tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row(LONG, "Hi!") | column])
    assert read_source(f"messages={path}", "conversation")[1].stats.unread_columns == {}


def test_an_unusable_history_stops_with_the_name_of_its_column(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{**ALPACA, "chat_history": ["One?"]}])
    with pytest.raises(DataError, match="1 unknown 'chat_history', first at .*messages or \\[question, answer\\]"):
        read_source(f"messages={path}", "conversation")
