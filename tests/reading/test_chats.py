"""Files of conversations: objects that hold a list of them, and the exports of chat programs."""

import json
from datetime import datetime
from pathlib import Path

import pytest
from support import chat_row, read_source, write

from rorchat.inspection.guess import guess_row_format
from rorchat.reading import whatsapp
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


def test_a_log_with_only_a_picture_after_a_pause_is_rejected_with_its_reason(tmp_path):
    later = "1/3/21, 9:00\u202fAM - Ben: <Media omitted>\n"
    path = write(tmp_path, "chat.txt", ANDROID + later)
    for options in ("", ":assistant_name=Ben"):
        rows, stats = read(path, options)
        assert len(rows) == 2 and stats.places == {"no text": [f"{path}:9 (all messages are without text)"]}


def test_the_hint_that_swaps_the_speakers_is_quoted(tmp_path):
    path = write(tmp_path, "chat.txt", "13.6.18, 13:55 - A: B C: Hello\n13.6.18, 13:56 - Ben: Hi!\n")
    assert ":assistant_name=A after the source swaps them" in f"{read(path)[1]}"
    path = write(tmp_path, "chat.txt", "13.6.18, 13:55 - Anna B=C: Hello\n13.6.18, 13:56 - Ben: Hi!\n")
    assert "':assistant_name=Anna B%3DC' after the source swaps them" in f"{read(path)[1]}"


DATES = [("3/6/18, 1:55 PM", datetime(2018, 3, 6, 13, 55)), ("3.6.18, 13:55", datetime(2018, 6, 3, 13, 55))] + [
    ("3/6/18, 12:05 AM", datetime(2018, 3, 6, 0, 5)),
    ("2018-06-13, 21:25", datetime(2018, 6, 13, 21, 25)),
]


@pytest.mark.parametrize(("start", "time"), DATES)
def test_the_clock_of_the_phone_decides_whether_the_month_is_first(start, time, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(whatsapp, "split_log", lambda program, log: messages.extend(log) or iter(()))
    list(whatsapp.read_whatsapp(write(tmp_path, "chat.txt", f"{start} - Anna: Hello\n")))
    assert [message.time for message in messages] == [time]


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
    assert rows == [HELLO] and stats.repairs == {"messages of tools and thoughts left out": 1}
    assert stats.places == {
        "not text": [f"{tmp_path}/conversations.json, row 1 (a message of the user is multimodal_text)"]
    }


def test_joined_replies_of_chatgpt_are_counted_and_a_damaged_tree_is_rejected(tmp_path):
    root = {"id": "root", "parent": None, "message": None}
    joined = [
        root,
        node("b", "root", "user", ["Hello"]),
        node("d", "b", "assistant", ["Hi!"]),
        node("e", "d", "assistant", ["Yes?"]),
    ]
    lost = [node("b", "gone", "user", ["Hello"]), node("e", "b", "assistant", ["Hi!"])]
    circle = [node("b", "e", "user", ["Hello"]), node("e", "b", "assistant", ["Hi!"])]
    chats = [{"mapping": {n["id"]: n for n in tree}, "current_node": "e"} for tree in (joined, lost, circle)]
    path = write(tmp_path, "conversations.json", json.dumps(chats))
    rows, stats = read(path)
    assert rows == [chat_row("Hello", "Hi!\n\nYes?")]
    assert stats.repairs == {"turns of one speaker joined": 1}
    detail = "no way from the last message to the first: {!r} is not a message"
    assert stats.places["damaged tree"][0] == f"{path}, row 1 ({detail.format('gone')})"
    assert stats.rejects == {"damaged tree": 2}
    assert read(path, ":assistant_name=Anna")[1].rejects == {"no assistant turn": 1, "damaged tree": 2}


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


def test_every_chat_of_a_telegram_export_is_counted(tmp_path):
    messages = [telegram("Anna", "Hello", "2020-12-31T21:00:00"), telegram("Ben", "Hi!", "2020-12-31T21:01:00")]
    chat = {"name": "Ben", "type": "personal_chat", "id": 1, "messages": messages}
    empty = {"type": "private_group", "id": 2, "messages": [telegram("Ben", "", "2020-12-31T20:00:00", "service")]}
    content = {"chats": {"list": [empty, chat, 5]}, "left_chats": {"list": [empty, chat]}}
    rows, stats = read(write(tmp_path, "result.json", json.dumps(content, indent=1)))
    assert rows == [HELLO, HELLO]
    assert stats.rejects == {"no messages": 3}
    assert [place.partition(", ")[2].partition(" (")[0] for place in stats.places["no messages"]] == [
        "row 0, chat 0",
        "row 0, chat 2",
        "row 0, left chat 0",
    ]


def test_messenger_messages_of_one_time_keep_their_order(tmp_path):
    names = ["Ben", "Anna", "Ben", "Anna"]  # the newest first
    messages = [{"sender_name": name, "timestamp_ms": 5, "content": f"{4 - n}"} for n, name in enumerate(names)]
    assert read(write(tmp_path, "message_1.json", json.dumps({"messages": messages})))[0] == [chat_row(*"1234")]


def test_a_row_with_one_of_the_keys_of_messenger_is_not_an_export(tmp_path):
    turns = [{"role": "user", "content": "Hello", "timestamp_ms": 5}, {"role": "assistant", "content": "Hi!"}]
    assert read(write(tmp_path, "rows.jsonl", [{"messages": turns}]))[0] == [HELLO]


@pytest.mark.parametrize("rows", [1, 2])
def test_json_and_json_lines_hold_the_same_conversations(rows, tmp_path):
    container = {"topic": "a", "data": [{"turns": TURNS}, {"turns": TURNS}]}
    write(tmp_path, "rows.json", json.dumps([container] * rows, indent=1))
    write(tmp_path, "rows.jsonl", [container] * rows)
    array, lines = (read(tmp_path / name)[0] for name in ("rows.json", "rows.jsonl"))
    assert array == lines == [HELLO] * (2 if rows == 1 else 0)


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


def test_pauses_are_measured_between_times_with_different_offsets(tmp_path):
    def message(name: str, text: str, time: str) -> dict:
        return {"type": "Default", "timestamp": time, "content": text, "author": {"name": name}}

    messages = [
        message("anna", "Hello", "2020-10-25T02:59:00+02:00"),
        message("ben", "Hi!", "2020-10-25T00:59:30-05:00"),
    ]
    content = {"channel": {"id": "1"}, "messages": messages}
    rows, stats = read(write(tmp_path, "channel.json", json.dumps(content)))
    assert rows == [] and stats.rejects == {"no assistant turn": 2}


def test_a_discord_export_marks_its_bot(tmp_path):
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
