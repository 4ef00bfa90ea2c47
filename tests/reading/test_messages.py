"""Turns become messages: their texts, whether they are learned, and what is more than a text."""

import pytest
from support import chat_row, read_source, write

from rorchat.reading.messages import is_empty, is_tool, normalize_messages, read_flag
from rorchat.rows import RejectedRow, alternate_turns, exchange

USER, REPLY = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}
TEXT, IMAGE = {"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {"url": "a.png"}}


def rejected(*turns: dict) -> str:
    with pytest.raises(RejectedRow) as reason:
        normalize_messages([*turns])
    return str(reason.value)


def test_roles_of_published_datasets_are_normalized():
    turns = [{"from": "human", "value": "a"}, {"role": "GPT", "content": "b"}]
    assert normalize_messages(turns) == alternate_turns(["a", "b"]) == exchange("a", "b")["messages"]


NOT_LEARNED = [
    {"weight": 0}, {"weight": 0.0}, {"loss_weight": 0.0}, {"train": False}, {"training": False}, {"trainable": "false"},
    {"loss": False}, {"loss_mask": 0}, {"loss_scale": "0"}, {"masked": True}, {"weight": 1, "train": False},
]  # fmt: skip
LEARNED = [{}, {"weight": 1}, {"train": True}, {"loss_mask": "1.0"}, {"masked": False}, {"weight": None, "name": "x"}]


@pytest.mark.parametrize("mark", [*NOT_LEARNED, *LEARNED], ids=str)
@pytest.mark.parametrize("shape", ["role", "from", "speaker", "pair"])
def test_a_mark_on_a_turn_says_whether_it_is_learned(mark, shape, tmp_path):
    rows = {
        "role": {"messages": [USER, {**REPLY, **mark}, USER, REPLY]},
        "from": {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!", **mark}] * 1
                 + [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]},
        "speaker": {"turns": [{"speaker": "A", "text": "Hello"}, {"speaker": "B", "text": "Hi!", **mark},
                              {"speaker": "A", "text": "Hello"}, {"speaker": "B", "text": "Hi!"}]},
        "pair": {"conversation": [{"human": "Hello", "assistant": "Hi!", **mark},
                                  {"human": "Hello", "assistant": "Hi!"}]},
    }  # fmt: skip
    rows, _ = read_source(f"messages={write(tmp_path, 'rows.jsonl', [rows[shape]])}", "conversation")
    first = REPLY if mark in LEARNED else {**REPLY, "train": False}
    assert rows == [{"messages": [USER, first, USER, REPLY]}]


@pytest.mark.parametrize(
    "mark", [{"weight": 0.5}, {"weight": -1}, {"loss": "some"}, {"train": []}, {"mask": 1}], ids=str
)
def test_a_mark_that_is_unclear_rejects_the_row_with_its_name(mark):
    (name,) = mark
    assert rejected(USER, {**REPLY, **mark}).startswith(f"unknown mark {name!r}: message 1: ")
    detail = [{"begin_offset": 0, "end_offset": 2, "train": False}]
    assert "unknown mark 'train_detail': message 1: use 'weight'" in rejected(USER, {**REPLY, "train_detail": detail})


def test_a_row_without_a_reply_that_is_learned_is_rejected(tmp_path):
    pair = {"prompt": [USER], "chosen": [{**REPLY, "weight": 0}], "rejected": [{**REPLY, "content": "No."}]}
    for source, kind, row in (
        ("messages", "conversation", {"messages": [USER, {**REPLY, "weight": 0}]}),
        ("preference", "preference", pair),
    ):
        path = write(tmp_path, f"{source}.jsonl", [row])
        rows, loaded = read_source(f"{source}={path}", kind, allow_empty=True)
        assert rows == [] and loaded.stats.rejects == {"no reply is learned": 1}


def test_turns_in_succession_that_are_only_partly_learned_are_rejected(tmp_path):
    turns = [{"name": name, "text": name} for name in "ABBA"]
    marked = [turns[0], {**turns[1], "weight": 0}, *turns[2:]]
    path = write(tmp_path, "rows.jsonl", [{"turns": turns}, {"turns": marked}])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row("A", "B\nB")]
    assert loaded.stats.rejects == {"marked in part": 1}


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, "tool call: message 1 has 'tool_calls'"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "tool call: message 1 has 'tool_calls'"),
        ({**REPLY, "function_call": {"name": "add"}}, "tool call: message 1 has 'function_call'"),
        ({"role": "tool", "content": "5", "tool_call_id": "1"}, "tool call: message 1 has the role 'tool'"),
        ({"from": "function_call", "value": "{}"}, "tool call: message 1 has the role 'function_call'"),
        ({"role": "assistant", "content": None}, "empty text: message 1: 'content' is null"),
        ({**REPLY, "images": ["a.png"]}, "not text: message 1 has 'images'"),
        ({**REPLY, "audio": {"id": "1"}}, "not text: message 1 has 'audio'"),
    ],
)
def test_what_is_more_than_a_text_rejects_the_row(turn, reason):
    assert rejected(USER, turn) == reason


@pytest.mark.parametrize("key", ["tool_calls", "function_call", "images", "weight"])
@pytest.mark.parametrize("value", [None, [], {}, "", "[]", float("nan"), {"name": None}])
def test_a_key_that_says_nothing_is_no_mark(key, value):
    if key != "weight":
        assert normalize_messages([USER, {**REPLY, key: value}]) == [USER, REPLY]
    assert is_empty(value)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([TEXT], "Hello"),
        ([TEXT, {"type": "text", "text": "you"}], "Hello\nyou"),
        ([TEXT, {"type": "text", "text": " you"}], "Hello you"),
        (["Hello ", "you"], "Hello you"),
        ([{"type": "text", "value": "Hello"}], "Hello"),
        ([{"type": "text", "text": "Hello", "image_url": None}], "Hello"),
    ],
)
def test_the_texts_of_parts_are_joined_and_words_stay_apart(parts, text):
    assert normalize_messages([{**USER, "content": parts}, REPLY]) == [{**USER, "content": text}, REPLY]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (IMAGE, "image_url"),
        ({"type": "image", "text": ""}, "image"),
        ({"type": "thinking", "thinking": "a"}, "thinking"),
    ]
    + [({"image": "a.png"}, "image"), (5, "int")],
)
def test_a_part_that_is_no_text_rejects_the_row(part, name):
    assert rejected({**USER, "content": [TEXT, part]}, REPLY) == f"not text: message 0: 'content' has the part {name!r}"


@pytest.mark.parametrize("source", ["messages", "smoltalk", "ultrachat", "oasst"])
def test_marks_and_parts_count_in_every_source_of_messages(source, tmp_path):
    marked = [{**USER, "content": [TEXT]}, {**REPLY, "weight": 0}, USER, REPLY]
    path = write(tmp_path, "train.jsonl", [{"messages": marked}, {"messages": [USER, {**REPLY, "tool_calls": [1]}]}])
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert rows == [{"messages": [USER, {**REPLY, "train": False}, USER, REPLY]}]
    assert loaded.stats.rejects == {"tool call": 1}


def test_flags_and_tools_are_known_by_their_values_and_names():
    assert [read_flag(value) for value in (True, 1, "1.0", False, 0, " FALSE ")] == [True] * 3 + [False] * 3
    assert [read_flag(value) for value in (None, 2, 0.5, "yes", [], float("nan"))] == [None] * 6
    assert all(map(is_tool, ["tool", "function_call", "tool-response", "Observation"]))
    assert not any(map(is_tool, ["gpt", "human", "functionary", "Anna Tool"]))
