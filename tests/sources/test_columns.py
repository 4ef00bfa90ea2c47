"""Columns of a row are found by their usual names, or named by the user."""

import pytest
from support import chat_row, json_lines, read_source, write

from rorchat.errors import DataError, UsageError
from rorchat.rows import RejectedRow
from rorchat.sources.columns import (
    ROLES,
    all_roles,
    parse_columns,
    pick_columns,
    require_columns,
    source_for_columns,
    takes_columns,
)

HELLO = chat_row("Hello", "Hi!")
KNOWN_PAIRS = [
    {"question": "Hello", "answer": "Hi!"},
    {"user": "Hello", "assistant": "Hi!"},
    {"query": "Hello", "response": "Hi!"},
    {"input": "Hello", "output": "Hi!"},
    {"instruction": "Hello", "output": "Hi!"},
    {"instruction": "Hello", "input": "", "output": "Hi!"},
    {"instruction": "Hello", "response": "Hi!"},
    {"prompt": "Hello", "completion": "Hi!"},
    {"prompt": "Hello", "response": "Hi!"},
    {"prompt": HELLO["messages"][:1], "completion": HELLO["messages"][1:]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}], "question": "other"},
    {"messages": HELLO["messages"], "prompt": "other", "completion": "other"},
]


@pytest.mark.parametrize("row", KNOWN_PAIRS, ids=lambda row: "+".join(row))
def test_messages_are_made_from_columns_with_known_names(row, tmp_path):
    path = write(tmp_path, "rows.jsonl", json_lines(row))
    assert read_source(f"messages={path}", "conversation")[0] == [HELLO]


@pytest.mark.parametrize("name", ["messages", "alpaca"])
def test_an_instruction_in_capitals_is_the_question_and_not_its_input(name, tmp_path):
    path = write(tmp_path, "rows.csv", "Instruction,Input,Output\nAdd.,1 and 2,3\n")
    rows, loaded = read_source(f"{name}={path}", "conversation")
    assert rows == [chat_row("Add.\n\n1 and 2", "3")]
    if name == "messages":
        rule = "question and answer: 'Instruction' (and 'Input') is the user, 'Output' the assistant"
        assert loaded.stats.rules == {rule: 1}


@pytest.mark.parametrize("answer", ["output", "response", "answer"])
@pytest.mark.parametrize("context", ["input", "context", "Context"])
def test_what_an_instruction_is_about_is_part_of_the_question(context, answer, tmp_path):
    values = ["Anna and Ben.", "", None]
    rows = [{"instruction": "Who?", context: value, answer: "Anna.", "category": "qa"} for value in values]
    path = write(tmp_path, "rows.jsonl", [*rows, {"instruction": "Who?", context: 5, answer: "Anna."}])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row("Who?\n\nAnna and Ben.", "Anna."), *[chat_row("Who?", "Anna.")] * 2]
    assert loaded.stats.places["wrong type"] == [f"{path}:4 ({context!r} is of type int, expected a string)"]


def test_both_columns_of_what_an_instruction_is_about_are_read():
    row = pick_columns("messages", {}, {"instruction": "Who?", "input": "A", "context": "B", "output": "C"}).row
    assert row == chat_row("Who?\n\nA\n\nB", "C")


CAPITALS = [
    ("text", "document", "Text\nHello\n"),
    ("prompt_completion", "conversation", "Prompt,Response\nHello,Hi!\n"),
    ("preference", "preference", "Question,Chosen,Rejected\nHello,Hi!,No.\n"),
]


@pytest.mark.parametrize(("name", "kind", "table"), CAPITALS)
def test_known_columns_may_have_capitals(name, kind, table, tmp_path):
    (row,) = read_source(f"{name}={write(tmp_path, 'rows.csv', table)}", kind)[0]
    assert "Hello" in f"{row}"
    require_columns(name, {}, table.partition("\n")[0].split(","), "me/data")


def test_suggested_columns_are_quoted_for_the_shell_and_the_spec(tmp_path):
    path = write(tmp_path, "my rows.csv", "a:1,b c\nHello,Hi!\n")
    with pytest.raises(DataError) as error:
        read_source(f"messages={path}", "conversation")
    given, swapped = f"'messages={path}:user=a%3A1:assistant=b c'", f"'messages={path}:user=b c:assistant=a%3A1'"
    assert f"Name the columns of the question and the answer: {given}; or, the other way round, {swapped}." in str(
        error.value
    )
    assert read_source(given.strip("'"), "conversation")[0] == [HELLO]


@pytest.mark.parametrize("column", ["text", "content", "document", "article"])
def test_a_text_has_one_of_several_known_names(column, tmp_path):
    path = write(tmp_path, "rows.jsonl", json_lines({"title": "T", column: "Once upon a time."}))
    assert read_source(f"text={path}", "document")[0] == [{"text": "Once upon a time."}]


@pytest.mark.parametrize("column", ["prompt", "question", "input", "query"])
def test_the_prompt_of_a_preference_has_one_of_several_known_names(column, tmp_path):
    path = write(tmp_path, "rows.jsonl", json_lines({column: "Hello", "chosen": "Hi!", "rejected": "No."}))
    (row,) = read_source(f"preference={path}", "preference")[0]
    assert row["prompt"] == [{"role": "user", "content": "Hello"}]


BETTER, WORSE = chat_row("Hello", "Hi!")["messages"][1:], chat_row("Hello", "No.")["messages"][1:]
OTHER_PREFERENCES = [
    {"qid": 1, "question": "Hello", "response_j": "Hi!", "response_k": "No."},
    {"Question": "Hello", "Response_J": "Hi!", "Response_K": "No."},
    {"input": {"messages": HELLO["messages"][:1]}, "preferred_output": BETTER, "non_preferred_output": WORSE},
    {"prompt": "Hello", "chosen": BETTER, "rejected": WORSE},
]


@pytest.mark.parametrize("row", OTHER_PREFERENCES, ids=lambda row: "+".join(row))
def test_the_replies_of_a_preference_have_one_of_several_known_names(row, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row])
    pair = {"prompt": HELLO["messages"][:1], "chosen": BETTER, "rejected": WORSE}
    assert read_source(f"preference={path}", "preference")[0] == [pair]
    require_columns("preference", {}, list(row), "me/data")


def test_columns_of_a_csv_file_are_named_in_the_spec(tmp_path):
    path = write(tmp_path, "pairs.csv", "q,a,s,text\nHello,Hi!,Be short.,other\n")
    assert read_source(f"messages={path}:user=q:assistant=a", "conversation")[0] == [HELLO]
    (row,) = read_source(f"messages={path}:system=s:user=q:assistant=a", "conversation")[0]
    assert row["messages"] == [{"role": "system", "content": "Be short."}, *HELLO["messages"]]
    assert read_source(f"text={path}:text=s", "document")[0] == [{"text": "Be short."}]  # not the column `text`
    assert read_source(f"alpaca={path}:instruction=q:output=a", "conversation")[0] == [HELLO]
    assert read_source(f"prompt_completion={path}:prompt=q:completion=a", "conversation")[0] == [HELLO]
    (pair,) = read_source(f"preference={path}:prompt=q:chosen=a:rejected=s", "preference")[0]
    assert [pair[side][0]["content"] for side in ("prompt", "chosen", "rejected")] == ["Hello", "Hi!", "Be short."]


def test_a_missing_column_is_rejected_with_those_that_exist_and_an_example(tmp_path):
    path = write(tmp_path, "pairs.csv", "q,a\nHello,Hi!\n")
    with pytest.raises(DataError, match=r"no column 'b' among q, a\). Name the columns, as in --columns user=question"):
        read_source(f"messages={path}:user=q:assistant=b", "conversation")
    with pytest.raises(DataError, match=r"'text' among q, a\). Name the columns, as in --columns text=body"):
        read_source(f"text={path}", "document")


def test_a_value_that_is_no_text_rejects_the_row():
    for columns, row in (
        ({"user": "q", "assistant": "a"}, {"q": 5, "a": "Hi!"}),
        ({}, {"question": "x", "answer": []}),
    ):
        with pytest.raises(RejectedRow, match="wrong type"):
            pick_columns("messages", columns, row)


def test_rows_that_are_no_objects_and_sources_with_their_own_format_are_unchanged():
    assert pick_columns("messages", {}, HELLO["messages"]).row is HELLO["messages"]
    row = {"question": "Hello", "answer": "Hi!"}
    assert pick_columns("gsm8k", {}, row).row is row


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["user"], "'user' is not ROLE=COLUMN"),
        (["user="], "'user=' is not ROLE=COLUMN"),
        (["usr=q"], "no role 'usr'. Did you mean 'user'?"),
        (["user=q", "user=p"], "'user' is given twice"),
    ],
)
def test_a_wrong_column_is_a_usage_error(words, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        parse_columns(words)


def test_the_columns_decide_which_source_a_file_is():
    assert parse_columns(["user=q", "assistant=a=b"]) == {"user": "q", "assistant": "a=b"}
    for name, forms in ROLES.items():
        for form in forms:
            assert source_for_columns(dict.fromkeys(form, "x")) == name
            assert takes_columns(name, dict.fromkeys(form, "x")) and set(form) <= set(all_roles(name))
    assert takes_columns("messages", {"system": "s", "user": "q", "assistant": "a"})
    assert not takes_columns("messages", {"system": "s", "user": "q"})
    with pytest.raises(UsageError, match="No source takes the columns user, text together. Possible are text: text"):
        source_for_columns({"user": "q", "text": "t"})


@pytest.mark.parametrize(
    ("name", "columns", "present", "fits"),
    [
        ("text", {}, ["id", "text"], True),
        ("text", {}, ["id", "body"], False),
        ("text", {"text": "body"}, ["id", "body"], True),
        ("text", {"text": "body"}, ["id", "text"], False),
        ("messages", {}, ["conversations"], True),
        ("messages", {}, ["prompt", "text"], False),
        ("preference", {}, ["chosen", "rejected"], True),
        ("preference", {}, ["prompt", "chosen"], False),
        ("alpaca", {}, ["instruction", "output"], True),
        ("alpaca", {}, ["question", "answer"], False),
        ("prompt_completion", {}, ["prompt", "response"], True),
        ("tinystories", {}, ["anything"], True),
    ],
)
def test_columns_of_a_dataset_are_checked_before_it_is_downloaded(name, columns, present, fits):
    if fits:
        require_columns(name, columns, present, "me/data")
        return
    with pytest.raises(DataError, match=f"me/data has no column.*only {', '.join(present)}. Name the columns, as in"):
        require_columns(name, columns, present, "me/data")
