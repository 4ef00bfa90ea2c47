"""Dialogues in numbered lines, as ParlAI writes PersonaChat."""

import pytest
from support import chat_row, read_source, write

from rorchat.inspection.guess import guess_row_format
from rorchat.reading.parlai import begins_dialogue

PERSONA_CHAT = """\
1 your persona: i like to remodel homes.
2 your persona: i like to go hunting.
3 hi , how are you ?\ti am fine .\t\tno|another reply
4 good\tyes .
1 partner's persona: i am old.
2 your persona: i am new.
3 __SILENCE__\thi !
4 who are you ?\tme .
1 hello\tthere
2 bye
1 hello\tworld
3 a line is missing\tyes
1 last\tone
"""


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def test_personas_are_system_messages_and_dialogues_begin_at_one(tmp_path):
    path = write(tmp_path, "train_self_original.txt", PERSONA_CHAT)
    rows, loaded = read_source(f"messages={path}", "conversation")
    first, second = chat_row("hi , how are you ?", "i am fine .", "good", "yes ."), chat_row("who are you ?", "me .")
    assert rows == [
        {"messages": [system("Your persona: i like to remodel homes. i like to go hunting."), *first["messages"]]},
        {"messages": [system("Your persona: i am new."), *second["messages"]]},
        chat_row("hello", "there"),
        chat_row("last", "one"),
    ]
    assert loaded.stats.places == {"not a dialogue": [f"{path}:11 (line 2 has another number, or none)"]}
    assert loaded.stats.repairs == {
        "the persona of the user left out": 1,
        "a first turn of the assistant left out": 1,
        "a last turn of the user, without a reply, left out": 1,
    }


def test_a_damaged_line_rejects_its_dialogue_only(tmp_path):
    path = write(tmp_path, "a.txt", b"1 hello\tthere\n2 hi\t\xff\xfe\n3 bye\tbye\n1 yes\tno\n")
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row("yes", "no")]
    assert loaded.stats.rejects == {"invalid UTF-8": 1}


@pytest.mark.parametrize(
    ("line", "begins"),
    [("1 your persona: i am.", True), ("1 hi\tyou", True), ("2 hi\tyou", False), ("1 the\t22038615", False)]
    + [("1 apple", False), ("10 hi\tyou", False), ("1. hi\tyou", False)],
)
def test_a_dialogue_begins_with_line_one_and_a_persona_or_two_texts(line, begins):
    assert begins_dialogue(line) == begins


def test_numbered_lines_are_guessed_as_a_conversation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guess_row_format(write(tmp_path, "chats.txt", PERSONA_CHAT).relative_to(tmp_path)) == "messages"
