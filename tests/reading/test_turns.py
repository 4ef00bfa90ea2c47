"""The turns of a conversation are found in any usual shape, and one of two speakers is the user."""

import json

import pytest
from support import as_jsonl, chat_row, read_source, write

from rorchat.errors import DataError
from rorchat.inspection import guess_row_format
from rorchat.reading.turns import PAIR_COLUMNS, TURN_COLUMNS, assign_roles, find_pair, find_turn_column
from rorchat.rows import RejectedRow

HELLO = chat_row("Hello", "Hi!")
ANNA, BEN = {"speaker": "Anna", "text": "Hello"}, {"speaker": "Ben", "text": "Hi!"}
SHAPES = {
    "speaker and text": ({"id": 7, "dialogue": [ANNA, BEN]}, "'dialogue' ('speaker' and 'text'): of two speakers, the"),
    "an unusual column": ({"id": 7, "items": [ANNA, BEN], "tags": ["a"]}, "turns from 'items' ('speaker' and 'text')"),
    "a list as a row": ([ANNA, BEN], "turns from lists ('speaker' and 'text')"),
    "author and body": ({"thread": [{"author": "a", "body": "Hello"}, {"author": "b", "body": "Hi!"}]}, "'thread'"),
    "from and message": ({"log": [{"from": "a", "message": "Hello"}, {"from": "b", "message": "Hi!"}]}, "'log'"),
    "user and text": ({"chat": [{"user": "a", "text": "Hello"}, {"user": "b", "text": "Hi!"}]}, "('user' and 'text')"),
    "numbers": ({"turns": [{"speaker": 0, "utterance": "Hello"}, {"speaker": 1, "utterance": "Hi!"}]}, "'turns'"),
    "an unusual text": (
        {"items": [{"n": 1, "who": "a", "said": "Hello"}, {"n": 2, "who": "b", "said": "Hi!"}]},
        "('who' and 'said')",
    ),
    "role and text": (
        {"turns": [{"role": "User", "text": "Hello"}, {"role": "Assistant", "text": "Hi!"}]},
        "the roles",
    ),
    "an author with a name": (
        {"messages": [{"author": {"name": "a"}, "content": "Hello"}, {"author": {"name": "b"}, "content": "Hi!"}]},
        "('author' and 'content')",
    ),
    "texts in turn": ({"dialogs": ["Hello", "Hi!"]}, "'dialogs': texts in turn, the first is from the user"),
    "pairs of texts": ({"history": [["Hello", "Hi!"]]}, "'history': texts in turn"),
    "pairs of keys": (
        {"conversation": [{"human": "Hello", "assistant": "Hi!"}]},
        "'human' is the user, 'assistant' the",
    ),
    "JSON in a column": ({"messages": json.dumps([ANNA, BEN])}, "'messages' ('speaker' and 'text')"),
    "a header in capitals": ({"Question": "Hello", "Answer": "Hi!"}, "'Question' is the user, 'Answer' the assistant"),
    "German": ({"frage": "Hello", "antwort": "Hi!"}, "'frage' is the user, 'antwort' the assistant"),
    "Spanish": ({"pregunta": "Hello", "respuesta": "Hi!"}, "'pregunta' is the user"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_in_a_usual_shape_is_found_and_its_rule_is_told(name, tmp_path, monkeypatch):
    row, rule = SHAPES[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.jsonl", as_jsonl([row]))
    rows, loaded = read_source("messages=rows.jsonl", "conversation")
    assert rows == [HELLO]
    assert rule in f"{loaded.stats}" and "1 of them read as " in f"{loaded.stats}"
    assert guess_row_format(write(tmp_path, "rows.jsonl", as_jsonl([row])).relative_to(tmp_path)) == "messages"


def test_the_usual_format_has_no_rule_and_keeps_its_checks(tmp_path):
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, HELLO["messages"][1]]}
    tool = {"messages": [*HELLO["messages"], {"role": "tool", "content": "5"}]}
    path = write(tmp_path, "rows.jsonl", [HELLO, tool, {"messages": HELLO["messages"][::-1]}])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [HELLO] and loaded.stats.rules == {}
    assert loaded.stats.rejects == {"unknown role": 1, "wrong order": 1}
    assert read_source(f"messages={write(tmp_path, 'parts.jsonl', [parts])}", "conversation")[0] == [HELLO]


def test_columns_of_lists_that_are_no_turns_are_not_taken():
    turns = [ANNA, BEN]
    assert find_turn_column({"comments": turns, "replies": turns}) is None  # more than one
    assert find_turn_column({"tags": ["a", "b"]}) is None  # texts only under a usual name
    assert find_turn_column({"turns": ["What is red?", "Rephrase it."]}) is None  # MT-Bench: both are from the user
    assert find_turn_column({"authors": [{"name": "Anna", "affiliation": "Jena"}]}) is None
    assert find_turn_column({"sizes": [{"name": "a", "bytes": 5}]}) is None
    assert [find_turn_column({name.upper(): turns}) for name in TURN_COLUMNS] == [name.upper() for name in TURN_COLUMNS]
    assert len(PAIR_COLUMNS) > 40
    assert all(find_pair(dict.fromkeys(pair, "")) for pair in PAIR_COLUMNS)


def test_a_text_with_comments_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "posts.jsonl", [{"text": "Once upon a time.", "comments": [ANNA, BEN]}])
    assert guess_row_format(path.relative_to(tmp_path)) == "text"


SPEAKERS = [
    (["Anna", "Ben"], {"Anna": "user", "Ben": "assistant"}),
    (["Ben", "Anna"], {"Ben": "user", "Anna": "assistant"}),
    (["Anna", "Support Bot"], {"Anna": "user", "Support Bot": "assistant"}),
    (["Support Bot", "Anna", "Support Bot"], {"Anna": "user", "Support Bot": "assistant"}),
    (["agent", "customer", "agent"], {"customer": "user", "agent": "assistant"}),
    (["AI", "Abbot", "AI"], {"Abbot": "user", "AI": "assistant"}),  # a surname, not a bot
    (["agent_1", "agent_2"], {"agent_1": "user", "agent_2": "assistant"}),
]


@pytest.mark.parametrize(("speakers", "roles"), SPEAKERS, ids=lambda value: " ".join(value))
def test_the_first_of_two_speakers_is_the_user_unless_a_name_says_otherwise(speakers, roles):
    chat = assign_roles([(speaker, speaker) for speaker in speakers], "turns")
    assert {turn["content"]: turn["role"] for turn in chat.messages} == roles


def test_turns_of_one_speaker_are_joined_and_a_first_reply_is_left_out(tmp_path):
    row = {"turns": [{"name": name, "text": text} for name, text in zip("BAABA", "12345", strict=True)]}
    path = write(tmp_path, "rows.jsonl", [row])
    rows, loaded = read_source(f"messages={path}:assistant_name=B", "conversation")
    assert rows == [chat_row("2\n3", "4")]
    assert loaded.stats.repairs == {"turns of one speaker joined": 1, "a first turn of the assistant left out": 1}
    assert read_source(f"messages={path}", "conversation")[0] == [chat_row("1", "2\n3", "4", "5")]


def test_conversations_that_are_not_of_two_speakers_are_counted_at_their_lines(tmp_path):
    carl, tool = {"speaker": "Carl", "text": "Hey."}, {"from": "observation", "value": "5"}
    usual = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
    rows = [{"turns": [ANNA, BEN, carl]}, {"turns": [ANNA, ANNA]}, {"conversations": [*usual, tool]}, [ANNA, BEN]]
    path = write(tmp_path, "rows.jsonl", [*rows, {"turns": [ANNA, {"speaker": "Ben", "text": None}]}])
    kept, loaded = read_source(f"messages={path}", "conversation")
    assert len(kept) == 1
    assert loaded.stats.places["more than two speakers"] == [f"{path}:1 (Anna, Ben, Carl)"]
    assert loaded.stats.places["one speaker"] == [f"{path}:2 (Anna)"]
    assert loaded.stats.places["unknown role"][0].startswith(
        f"{path}:3 (a turn has the role 'observation'; allowed are"
    )
    assert loaded.stats.places["empty text"] == [f"{path}:5 (message 1: 'text' is null)"]
    assert loaded.stats.rows_in == 5 == len(kept) + sum(loaded.stats.rejects.values())


def test_a_name_that_nobody_has_is_an_error_with_the_speakers(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"turns": [ANNA, BEN]}])
    with pytest.raises(DataError, match=r"no assistant turn, first at .*:1 \(no speaker 'Carl', only Anna, Ben\)"):
        read_source(f"messages={path}:assistant_name=Carl", "conversation")
    with pytest.raises(RejectedRow, match="one speaker: Anna"):
        assign_roles([("Anna", "Hello")], "turns")
