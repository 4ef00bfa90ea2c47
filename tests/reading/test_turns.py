"""The turns of a conversation are found in any usual shape, and one of two speakers is the user."""

import json

import pytest
from support import as_jsonl, chat_row, read_source, write

from rorchat.errors import DataError
from rorchat.inspection.guess import guess_row_format
from rorchat.reading.turns import PAIR_COLUMNS, TURN_COLUMNS, Turn, assign_roles, find_pair, find_turn_column
from rorchat.rows import RejectedRow
from rorchat.sources import messages
from rorchat.sources.columns import pick_columns

HELLO = chat_row("Hello", "Hi!")
ANNA, BEN = {"speaker": "Anna", "text": "Hello"}, {"speaker": "Ben", "text": "Hi!"}
SHAPES = {
    "speaker and text": ({"id": 7, "dialogue": [ANNA, BEN]}, "('speaker' and 'text'); two speakers: the first is"),
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
    "speaker and text in a list": ({"messages": [["human", "Hello"], ["ai", "Hi!"]]}, "(speaker and text): the roles"),
    "parts": (
        {"contents": [{"role": r, "parts": [{"text": x}]} for r, x in (("user", "Hello"), ("model", "Hi!"))]},
        "'parts'",
    ),
    "Python in a column": ({"dialog": repr([ANNA, BEN])}, "'dialog' ('speaker' and 'text')"),
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
def test_a_conversation_in_a_usual_shape_is_found_and_its_rule_is_reported(name, tmp_path, monkeypatch):
    row, rule = SHAPES[name]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "rows.jsonl", as_jsonl([row]))
    rows, loaded = read_source("messages=rows.jsonl", "conversation")
    assert rows == [HELLO]
    assert rule in f"{loaded.stats}" and "1 row read as " in f"{loaded.stats}"
    assert guess_row_format(write(tmp_path, "rows.jsonl", as_jsonl([row])).relative_to(tmp_path)) == "messages"


def test_the_usual_format_has_no_rule_and_keeps_its_checks(tmp_path):
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, HELLO["messages"][1]]}
    tool = {"messages": [*HELLO["messages"], {"role": "tool", "content": "5"}]}
    path = write(tmp_path, "rows.jsonl", [HELLO, tool, {"messages": HELLO["messages"][::-1]}])
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [HELLO] and loaded.stats.rules == {}
    assert loaded.stats.rejects == {"tool call": 1, "wrong order": 1}
    assert read_source(f"messages={write(tmp_path, 'parts.jsonl', [parts])}", "conversation")[0] == [HELLO]


def test_columns_of_lists_that_are_no_turns_are_not_taken():
    turns = [ANNA, BEN]
    assert find_turn_column({"comments": turns, "replies": turns}) is None  # more than one
    assert find_turn_column({"tags": ["a", "b"]}) is None  # texts only under a usual name
    assert find_turn_column({"turns": ["What is red?", "Rephrase it."]}) is None  # MT-Bench: both are from the user
    assert find_turn_column({"authors": [{"name": "Anna", "affiliation": "Jena"}]}) is None
    assert find_turn_column({"sizes": [{"name": "a", "bytes": 5}]}) is None
    assert [find_turn_column({name.upper(): turns}) for name in TURN_COLUMNS] == [name.upper() for name in TURN_COLUMNS]


def test_no_pair_of_columns_hides_another():
    assert len(set(PAIR_COLUMNS)) == len(PAIR_COLUMNS) > 40
    assert [find_pair(dict.fromkeys(pair, "")) for pair in PAIR_COLUMNS] == list(PAIR_COLUMNS)
    assert find_pair({"user": "u123", "model": "gpt-4"}) is None


@pytest.mark.parametrize("key", ["id", "message_id", "type", "timestamp", "date", "created_at", "title", "to", "url"])
def test_beside_a_speaker_a_key_of_something_else_is_not_the_text(key):
    turns = [{"author": "a", key: "1"}, {"author": "b", key: "2"}]
    assert find_turn_column({"commits": turns}) is None
    assert find_turn_column({"people": [{"agent": "a", "said": "1"}, {"agent": "b", "said": "2"}]}) is None


def test_texts_are_in_turn_only_in_columns_of_conversations():
    for column in ("conversation", "dialogs", "utterances", "chat", "Dialogue"):
        assert find_turn_column({column: ["Hello", "Hi!"]}) == column
    for column in ("thread", "log", "transcript", "exchanges", "history"):
        assert find_turn_column({column: ["Hello", "Hi!"]}) is None
    assert find_turn_column({"history": [["Hello", "Hi!"]]}) == "history"
    assert find_turn_column({"thread": [["Hello", "Hi!"]]}) is None
    with pytest.raises(RejectedRow, match="wrong type"):
        messages.convert(pick_columns("messages", {}, {"messages": ["Hello", "Hi!"]}).row)


def test_pairs_of_speaker_and_text_are_not_questions_and_answers(tmp_path):
    pairs = [
        {"dialogue": [["Anna", "Hello"], ["Ben", "Hi!"], ["Anna", "Bye."], ["Ben", "Bye!"]]},
        {"dialogue": [["Hello", "Hi!"], ["What is red?", "A colour."]]},
        {"dialogue": [["Anna", "Hello"], ["Ben", "Hi!"]]},
    ]
    path = write(tmp_path, "rows.jsonl", pairs)
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row("Hello", "Hi!", "Bye.", "Bye!"), chat_row("Hello", "Hi!", "What is red?", "A colour.")]
    (place,) = loaded.stats.places["ambiguous pairs"]
    assert place == f"{path}:3 ([speaker, text] or [question, answer]? They begin with Anna, Ben)"
    assert read_source(f"messages={path}:assistant_name=Ben", "conversation")[0] == [rows[0], HELLO]


def test_the_assistant_is_named_among_roles_and_names(tmp_path):
    turns = [{**turn, "name": name} for turn, name in zip(HELLO["messages"], ("Anna", "Ben"), strict=True)]
    path = write(tmp_path, "rows.jsonl", [{"messages": [*turns, {**turns[0], "content": "And?"}]}])
    assert read_source(f"messages={path}", "conversation")[0] == [HELLO]
    assert read_source(f"messages={path}:assistant_name=Anna", "conversation")[0] == [chat_row("Hi!", "And?")]
    rows, loaded = read_source(f"messages={path}:assistant_name=Ben", "conversation")
    assert rows == [{"messages": [*HELLO["messages"], {"role": "user", "content": "And?"}][:2]}]
    assert "two speakers: 'Ben' is the assistant, as given" in f"{loaded.stats}"


UNNAMED = [HELLO, {"question": "Hello", "answer": "Hi!"}, {"dialog": ["Hello", "Hi!"]}] + [
    {"conversation": [{"human": "Hello", "assistant": "Hi!"}]},
    {"instruction": "Hello", "instances": [{"input": "", "output": "Hi!"}]},
]


@pytest.mark.parametrize("row", UNNAMED, ids=lambda row: "+".join(row))
def test_a_name_is_never_ignored_where_rows_have_no_speakers(row, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row])
    assert read_source(f"messages={path}", "conversation")[0] == [HELLO]
    with pytest.raises(DataError, match="1 no (speakers|assistant turn), first at .*'Anna'"):
        read_source(f"messages={path}:assistant_name=Anna", "conversation")


@pytest.mark.parametrize("encode", [json.dumps, repr])
def test_usual_messages_may_be_text_in_a_table(encode, tmp_path):
    text = encode([{"role": "user", "content": 'It\'s "red"\n?'}, HELLO["messages"][1]]).replace('"', '""')
    path = write(tmp_path, "rows.csv", f'id,messages\n1,"{text}"\n2,"[\'not a list"\n')
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row('It\'s "red"\n?', "Hi!")]
    assert loaded.stats.rejects == {"wrong type": 1} and loaded.stats.rules == {}


def test_a_part_that_is_not_a_text_rejects_the_row_by_its_name():
    turns = [{"role": "user", "parts": [{"text": "Look:"}, {"inline_data": {}}]}, {"role": "model", "parts": ["Hi!"]}]
    with pytest.raises(RejectedRow, match="not text: message 0: 'parts' has the part 'inline_data'"):
        pick_columns("messages", {}, {"contents": turns})


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
    (["Ai Weiwei", "Ben"], {"Ai Weiwei": "user", "Ben": "assistant"}),
    (["Top Model", "Ben"], {"Top Model": "user", "Ben": "assistant"}),
    (["Bing", "Ben", "Bing"], {"Ben": "user", "Bing": "assistant"}),
    (["agent_1", "agent_2"], {"agent_1": "user", "agent_2": "assistant"}),
]


@pytest.mark.parametrize(("speakers", "roles"), SPEAKERS, ids=lambda value: " ".join(value))
def test_the_first_of_two_speakers_is_the_user_unless_a_name_says_otherwise(speakers, roles):
    chat = assign_roles([Turn(speaker, speaker) for speaker in speakers], "turns")
    assert {turn["content"]: turn["role"] for turn in chat.row["messages"]} == roles


def test_turns_of_one_speaker_are_joined_and_a_first_reply_is_left_out(tmp_path):
    row = {"turns": [{"name": name, "text": text} for name, text in zip("BAABA", "12345", strict=True)]}
    path = write(tmp_path, "rows.jsonl", [row])
    rows, loaded = read_source(f"messages={path}:assistant_name=B", "conversation")
    assert rows == [chat_row("2\n3", "4")]
    assert loaded.stats.repairs == {
        "turns of one speaker joined": 1,
        "a first turn of the assistant left out": 1,
        "a last turn of the user, without a reply, left out": 1,
    }
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
    assert loaded.stats.places["tool call"] == [f"{path}:3 (a turn has the role 'observation')"]
    assert loaded.stats.places["empty text"] == [f"{path}:5 (message 1: 'text' is null)"]
    assert loaded.stats.rows_in == 5 == len(kept) + sum(loaded.stats.rejects.values())


def test_a_name_that_nobody_has_is_an_error_with_the_speakers(tmp_path):
    path = write(tmp_path, "rows.jsonl", [{"turns": [ANNA, BEN]}])
    with pytest.raises(DataError, match=r"no assistant turn, first at .*:1 \(no speaker 'Carl', only Anna, Ben\)"):
        read_source(f"messages={path}:assistant_name=Carl", "conversation")
    with pytest.raises(RejectedRow, match="one speaker: Anna"):
        assign_roles([Turn("Anna", "Hello")], "turns")
    with pytest.raises(RejectedRow, match="no text: all messages are without text"):
        assign_roles([], "turns", speakers=["Anna", "Ben"], assistant_name="Ben")
