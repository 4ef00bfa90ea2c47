"""Files of conversations: objects that hold a list of them, and the exports of chat programs."""

import json
from pathlib import Path

import pytest
from support import chat_row, read_source, write

from rorchat.inspection import guess_row_format
from rorchat.reading.chats import read_chats
from rorchat.reading.slices import FileSlice

TURNS = [{"role": "user", "text": "Hello"}, {"role": "assistant", "text": "Hi!"}]
HELLO = chat_row("Hello", "Hi!")


def read(path: Path, options: str = ""):
    rows, loaded = read_source(f"messages={path}{options}", "conversation", allow_empty=True)
    assert loaded.stats.rows_in == len(rows) + sum(loaded.stats.rejects.values())
    return rows, loaded.stats


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"version": 1, "data": [{"turns": TURNS}, {"turns": "none"}]}, "data[1]"),
        ({"version": 1, "chats": [TURNS, []]}, "chats[1]"),
        ([{"turns": TURNS}, {"turns": "none"}], "row 1"),
        ([TURNS, []], "row 1"),
    ],
)
def test_a_json_file_holds_a_list_of_conversations(content, places, indent, tmp_path):
    rows, stats = read(write(tmp_path, "chats.json", json.dumps(content, indent=indent)))
    assert rows == [HELLO] and stats.rows_in == 2
    assert places in f"{stats.places}"


def test_a_json_file_holds_conversations_by_name_or_a_single_one(tmp_path):
    rows, _ = read(write(tmp_path, "named.json", json.dumps({"t_1": {"content": TURNS}, "t_2": {"content": TURNS}})))
    assert rows == [HELLO, HELLO]
    assert read(write(tmp_path, "one.json", json.dumps({"id": 1, "dialog": TURNS}, indent=1)))[0] == [HELLO]
    pair = {"prompt": "Hello", "response": "Hi!", "sources": [{"user": "a", "text": "b"}]}
    assert read(write(tmp_path, "pair.json", json.dumps(pair)))[0] == [HELLO]


IPHONE = """\ufeff[31.12.20, 21:03:11] Anna: \u200eMessages and calls are end-to-end encrypted.
[31.12.20, 21:03:12] Anna: Hello
are you there?
[31.12.20, 21:04:00] Ben: Yes: I am.
\u200e[31.12.20, 21:04:10] Ben: \u200eimage omitted
[01.01.21, 09:00:00] Ben: Happy new year! \u200e<This message was edited>
[01.01.21, 09:00:10] Anna: To you, too.
[01.01.21, 09:01:00] Ben: Thanks.
"""
ANDROID = """12/31/20, 9:03\u202fPM - Messages and calls are end-to-end encrypted. Tap to learn more.
12/31/20, 9:03\u202fPM - Anna: Hello
are you there?
12/31/20, 9:04\u202fPM - Ben: Yes: I am.
12/31/20, 9:04\u202fPM - Ben: <Media omitted>
1/1/21, 9:00\u202fAM - Ben: Happy new year!
1/1/21, 9:00\u202fAM - Anna: To you, too.
1/1/21, 9:01\u202fAM - Ben: Thanks.
"""


@pytest.mark.parametrize("content", [IPHONE, ANDROID, ANDROID.replace("\n", "\r\n")], ids=["iPhone", "Android", "CRLF"])
def test_a_whatsapp_chat_is_divided_at_pauses(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "chat.txt", content)
    assert guess_row_format(Path("chat.txt")) == "messages"
    rows, stats = read(Path("chat.txt"))
    assert rows == [chat_row("Hello\nare you there?", "Yes: I am."), chat_row("To you, too.", "Thanks.")]
    assert stats.repairs == {"messages without text left out": 1, "a first turn of the assistant left out": 1}
    (rule,) = stats.rules
    assert "each pause of 3 hours" in rule and "'Anna' is the user, 'Ben' the assistant" in rule
    swapped, stats = read(Path("chat.txt"), ":assistant_name=Anna")
    assert swapped == [chat_row("Happy new year!", "To you, too.")]
    assert stats.places["no assistant turn"][0].startswith("chat.txt:")


STARTS = [
    "3/6/18, 1:55 p.m. - ", "03-06-2018, 01.55 PM - ", "[13.06.18 21:25:15] ", "[3/6/18 1:55:00 p. m.] ",
    "\u200e[2018/06/13, 21:25:15] ", "13.6.2018 klo 21.25 - ", "2018-06-13, 21:25 - ", "13.06.18, 21:25 – ",
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_a_whatsapp_message_begins_with_the_date_of_any_phone(start, tmp_path):
    path = write(tmp_path, "chat.txt", f"{start}Anna: Hello\n{start}Ben: Hi!\n")
    assert read(path)[0] == [HELLO]


def test_a_part_of_a_text_file_is_read_with_the_whole(tmp_path):
    path = write(tmp_path, "chat.txt", ANDROID)
    assert len(list(read_chats(FileSlice(path, 0, 50)))) == 2
    assert list(read_chats(FileSlice(path, 50))) == []


def test_a_whatsapp_group_is_rejected_and_other_texts_are_not_chats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "group.txt", ANDROID + "1/2/21, 9:00\u202fAM - Carl: Hey.\n")
    assert read(Path("group.txt"))[1].rejects == {"more than two speakers": 3}
    write(tmp_path, "letter.txt", "Dear Anna,\n\n31.12.20 was a fine day.\n")
    assert read(Path("letter.txt"))[1].rejects == {"not a dialogue": 1}
    assert guess_row_format(Path("letter.txt")) == "text"
    write(
        tmp_path,
        "bad.txt",
        "32.13.20, 21:03 - Anna: Hello\n31.12.20, 21:03 - Anna: Hello\n31.12.20, 21:04 - Ben: Hi!\n",
    )
    rows, stats = read(Path("bad.txt"))
    assert rows == [HELLO] and stats.places == {"no date": ["bad.txt:1 (32.13.20, 21:03 -)"]}


def node(name: str, parent: str | None, role: str, parts: list, kind: str = "text", recipient: str = "all") -> dict:
    content = {"content_type": kind, "parts": parts}
    return {
        "id": name,
        "parent": parent,
        "message": {"author": {"role": role}, "content": content, "recipient": recipient},
    }


def test_a_chatgpt_export_is_read_along_the_replies_that_were_shown(tmp_path):
    nodes = [
        {"id": "root", "parent": None, "message": None},
        node("a", "root", "system", [""]),
        node("b", "a", "user", ["Hello"]),
        node("old", "b", "assistant", ["Go away."]),
        node("c", "b", "assistant", ["search()"], "code", "browser"),
        node("d", "c", "tool", ["results"]),
        node("e", "d", "assistant", ["Hi!"]),
    ]
    picture = [
        nodes[0],
        node("b", "root", "user", [{"asset_pointer": "x"}], "multimodal_text"),
        node("e", "b", "assistant", ["A cat."]),
    ]
    chats = [{"title": "T", "mapping": {n["id"]: n for n in tree}, "current_node": "e"} for tree in (nodes, picture)]
    rows, stats = read(write(tmp_path, "conversations.json", json.dumps(chats)))
    assert rows == [HELLO]
    assert stats.places == {
        "not text": [f"{tmp_path}/conversations.json, row 1 (a message of the user is multimodal_text)"]
    }


def telegram(speaker: str, text: object, date: str, kind: str = "message") -> dict:
    return {"id": 1, "type": kind, "date": date, "from": speaker, "from_id": f"user{len(speaker)}", "text": text}


def test_a_telegram_export_holds_one_chat_or_all(tmp_path):
    messages = [
        telegram("Ben", "", "2020-12-31T20:00:00", "service"),
        telegram("Anna", ["Hel", {"type": "bold", "text": "lo"}], "2020-12-31T21:00:00"),
        telegram("Ben", "", "2020-12-31T21:00:30"),
        telegram("Ben", "Hi!", "2020-12-31T21:01:00"),
        telegram("Ben", "Anna?", "2021-01-02T21:01:00"),
        {"type": "message", "text": "lost"},
    ]
    chat = {"name": "Ben", "type": "personal_chat", "id": 1, "messages": messages}
    for content in (chat, {"about": "Your data", "chats": {"about": "Chats", "list": [chat]}}):
        rows, stats = read(write(tmp_path, "result.json", json.dumps(content, indent=1)))
        assert rows == [HELLO]
        assert stats.rejects == {"missing field": 1, "no assistant turn": 1}
        assert stats.repairs == {"messages without text left out": 1}
        assert stats.places["missing field"][0].endswith("message 5 (a message needs 'date' and 'from')")


def test_messenger_files_begin_with_the_newest_message_and_have_bytes_as_characters(tmp_path):
    messages = [
        {"sender_name": "Zo\u00c3\u00ab", "timestamp_ms": 1_700_000_060_000, "content": "Caf\u00c3\u00a9!"},
        {"sender_name": "Zo\u00c3\u00ab", "timestamp_ms": 1_700_000_050_000, "photos": [{"uri": "a.jpg"}]},
        {"sender_name": "Anna", "timestamp_ms": 1_700_000_000_000, "content": "Where?"},
        {"sender_name": "Anna", "content": "lost"},
    ]
    content = {"participants": [{"name": "Anna"}], "messages": messages, "title": "Anna"}
    rows, stats = read(write(tmp_path, "message_1.json", json.dumps(content)))
    assert rows == [chat_row("Where?", "Café!")]
    assert stats.rejects == {"missing field": 1}
    assert "'Anna' is the user, 'Zoë' the assistant" in f"{stats}"


def test_a_discord_export_knows_its_bot(tmp_path):
    def message(name: str, text: str, is_bot: bool, kind: str = "Default") -> dict:
        author = {"id": "1", "name": name, "isBot": is_bot}
        return {"type": kind, "timestamp": "2020-12-31T21:00:00.5+00:00", "content": text, "author": author}

    messages = [
        message("helper", "", True, "ChannelPinnedMessage"),
        message("helper", "Ask me!", True),
        message("anna", "Hello", False),
        message("helper", "Hi!", True, "Reply"),
    ]
    content = {"guild": {"id": "0"}, "channel": {"id": "1"}, "messages": messages}
    rows, stats = read(write(tmp_path, "channel.json", json.dumps(content)))
    assert rows == [HELLO]
    assert "'anna' is the user, 'helper (bot)' the assistant" in f"{stats}"
