"""Every raw row is counted as kept or rejected; digests identify the data of a source."""

import dataclasses
import gzip
import json
import os
import random
import shutil

import pytest
from support import CONVERTING, chat_row, convert_row, json_lines, read_source, write

from rorchat.errors import DataError, RemoteError, UsageError
from rorchat.persona import load_persona
from rorchat.rows import CHECKS, ConvertedRow, RejectedRow
from rorchat.sources.registry import find_source, iterate_texts, list_sources, load_rows, note_unread, source_digest

GENERATING = [name for name in list_sources() if find_source(name).is_generated]


GOOD_ROW = {"document": {"text": "It was."}, "conversation": chat_row(), "preference": find_source("preference").raw[0]}


def test_sources_of_every_kind_exist():
    assert len(CONVERTING) >= 6 and len(GENERATING) >= 2
    assert {kind for name in list_sources() for kind in find_source(name).kinds} == set(CHECKS)


@pytest.mark.parametrize("name", list_sources())
def test_sources_have_a_licence_and_convert_their_raw_rows(name):
    source = find_source(name)
    assert isinstance(source.licence, str) and source.licence
    if source.is_generated:
        converted = [(kind, row) for kind in find_source(name).kinds for row in load_rows(f"{name}=7", kind)]
        assert len(converted) == 7 * len(find_source(name).kinds)
    else:
        converted = [(source.kinds[0], source.convert(raw)) for raw in source.raw]
        converted = [(kind, row.row if isinstance(row, ConvertedRow) else row) for kind, row in converted]
        assert len(converted) >= 1
    for kind, row in converted:
        CHECKS[kind](row)


# Arbitrary JSON values: a source must return a valid row or raise RejectedRow
NOT_ROWS = [
    None, 5, 2.5, True, "", "a string", [], {}, [1], [None], [[]], ["user", "hi"], {"a": 1}, {"": None},
    {"text": None}, {"text": 5}, {"text": ["a"]},
    {"messages": None}, {"messages": 5}, {"messages": "hi"}, {"messages": [None]}, {"messages": [{"role": "user"}]},
    {"messages": [{"role": None, "content": "a"}]}, {"messages": [{"role": "user", "content": None}]},
    {"messages": {"role": "user", "content": "a"}}, {"conversations": [{"from": "human", "value": 5}]},
    {"instruction": None, "input": None, "output": None}, {"instruction": "a", "input": 5, "output": "b"},
    {"instruction": "a", "input": "", "output": None}, {"instruction": " ", "input": "", "output": "b"},
    {"utterances": None}, {"utterances": [1, 2]}, {"dialog": "a string"}, {"dialog": []}, {"dialog": ["alone"]},
    {"prompt": None, "chosen": "a", "rejected": "b"}, {"prompt": [], "chosen": "a", "rejected": "b"},
    {"prompt": "a", "chosen": None, "rejected": "b"}, {"prompt": "a", "chosen": [], "rejected": []},
    {"prompt": "a", "chosen": ["b"], "rejected": ["c"]}, {"prompt": "a", "chosen": "b", "rejected": ["c"]},
    {"prompt": [], "chosen": chat_row("a", "b")["messages"], "rejected": chat_row("a", "c")["messages"]},
    {"prompt": 5, "chosen": chat_row("a", "b")["messages"], "rejected": chat_row("x", "c")["messages"]},
    {"instruction": "a", "input": 5, "chosen": "b", "rejected": "c"},
    {"instruction": None, "chosen": "b", "rejected": "c"},
    {"conversations": None, "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
    {"conversations": [], "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": None},
    {"text": "half a pair \ud800"}, chat_row("\udfff", "a"), chat_row("a", "\ud83d"),
]  # fmt: skip


@pytest.mark.parametrize("name", CONVERTING)
def test_arbitrary_json_values_are_kept_or_rejected(name, tmp_path):
    source = find_source(name)
    good = next(raw for raw in source.raw if not isinstance(raw, str))
    path = write(tmp_path, "rows.jsonl", json_lines(*NOT_ROWS, good))
    rows, loaded = read_source(f"{name}={path}", source.kinds[0])
    assert loaded.stats.rows_in == len(NOT_ROWS) + 1
    assert loaded.stats.rejects["wrong type"] >= 3
    for row in rows:
        CHECKS[source.kinds[0]](row)
        json.dumps(row, ensure_ascii=False).encode()  # what a tokenizer needs: text that has UTF-8


@pytest.mark.parametrize("name", CONVERTING)
def test_raw_rows_with_damaged_parts_are_kept_or_rejected(name):
    """Every raw row with any part of it missing, null, a number, a list or empty."""
    rng, source, tried = random.Random(0), find_source(name), 0

    def damaged(value):
        if rng.random() < 0.15:
            return rng.choice([None, 7, [], {}, "", [value], {"role": value}])
        if isinstance(value, dict):
            return {key: damaged(part) for key, part in value.items() if rng.random() > 0.1}
        return [damaged(part) for part in value if rng.random() > 0.1] if isinstance(value, list) else value

    for _ in range(300):
        for raw in source.raw:
            tried += 1
            try:
                convert_row(name, damaged(raw))
            except RejectedRow as rejection:
                assert rejection.reason
    assert tried == 300 * len(source.raw)


# Lines with one error each, and the reason of their rejection
BAD_CONVERSATIONS = [
    (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', "invalid UTF-8"),
    (b'{"messages": [\n', "not JSON"),
    (json_lines({"messages": [{"role": "pirate", "content": "a"}]}).encode(), "unknown role"),
    (json_lines(chat_row("a", " \n")).encode(), "empty reply"),
    (json_lines(chat_row(" ", "a")).encode(), "empty question"),
    (json_lines({"messages": chat_row()["messages"][::-1] * 2}).encode(), "wrong order"),
    (json_lines({"messages": chat_row()["messages"][:1]}).encode(), "no assistant turn"),
    (json_lines({"messages": []}).encode(), "no assistant turn"),
    (json_lines({"messages": [{"role": "user", "content": 5}]}).encode(), "wrong type"),
    (json_lines({"messages": None}).encode(), "wrong type"),
    (json_lines({"turns": []}).encode(), "missing field"),
    (json_lines({"messages": [{"role": "user"}]}).encode(), "missing field"),
    (json_lines(17).encode(), "wrong type"),
    (json_lines(chat_row("a", "\ud800")).encode(), "invalid Unicode"),
    (b"1" * 5000 + b"\n", "not JSON"),  # Python refuses so many digits with another error than bad JSON
    (b"[" * 200_000 + b"\n", "not JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_CONVERSATIONS)
def test_a_bad_row_does_not_affect_the_others_and_its_line_is_reported(bad, reason, tmp_path):
    good = json_lines(chat_row()).encode()
    path = write(tmp_path, "rows.jsonl", good + b"\n" + bad + good)  # good, empty line, bad, good
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert (len(rows), loaded.stats.rejects) == (2, {reason: 1})
    assert loaded.stats.places[reason][0].split(" ")[0] == f"{path}:3"


def test_a_list_of_messages_is_a_valid_row(tmp_path):
    path = write(tmp_path, "rows.jsonl", json_lines(chat_row()["messages"], chat_row()))
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row(), chat_row()]


def test_an_unanswered_question_at_the_end_is_removed(tmp_path):
    row = {"messages": [*chat_row()["messages"], {"role": "user", "content": "And you?"}]}
    for source, raw in (
        ("messages", row),
        ("smoltalk", row),
        ("ultrachat", {"data": ["Hello", "Hi!", "And you?"]}),
        ("dailydialog", {"dialog": ["Hello", "Hi!", "And you?"]}),
        ("cornell_movie_dialogs", {"utterance": {"text": ["Hello", "Hi!", "And you?"]}}),
        ("prompt_completion", {"prompt": row["messages"][:1], "completion": row["messages"][1:]}),
    ):
        rows, loaded = read_source(f"{source}={write(tmp_path, f'{source}.jsonl', [raw])}", "conversation")
        assert rows == [chat_row()]
        assert "1 of them repaired: a last turn of the user, without a reply, left out" in str(loaded.stats)


PREFERENCES = [
    ({"prompt": "q", "chosen": "a", "rejected": " a\n"}, "identical chosen and rejected"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty reply"),
    ({"prompt": "q", "chosen": "a"}, "missing field"),
    ({"prompt": "q", "chosen": "a", "rejected": 5}, "wrong type"),
    ({"prompt": [], "chosen": chat_row()["messages"], "rejected": chat_row("Hello", "No.")["messages"]}, "wrong order"),
    ({"chosen": chat_row("a", "b")["messages"], "rejected": chat_row("x", "c")["messages"]}, "different prompts"),
    ({"prompt": [{"role": "pirate", "content": "q"}], "chosen": "a", "rejected": "b"}, "unknown role"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "reason"), PREFERENCES)
def test_invalid_preferences_are_rejected_with_their_reason(bad, reason, tmp_path):
    good = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write(tmp_path, "rows.jsonl", json_lines(good, bad))
    rows, loaded = read_source(f"preference={path}", "preference")
    assert loaded.stats.rejects == {reason: 1}
    assert loaded.stats.places[reason][0].startswith(f"{path}:2")
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        }
    ]


def test_hidden_files_are_ignored(tmp_path):
    for name in (".git", ".store.unfinished/deep", "shown"):
        (tmp_path / name).mkdir(parents=True)
        write(tmp_path / name, "a.json", '{"text": "good"}')
    write(tmp_path, ".hidden.txt", "bad")
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert (rows, loaded.stats.rows_in) == ([{"text": "good"}], 1) and note_unread(loaded.spec).unread == {}


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "inner").mkdir()
    for name in ("b.txt", "a.md", "inner/c.txt", "d.png", "e.csv"):
        write(tmp_path, name, b"\x89PNG" if name == "d.png" else name)
    rows, loaded = read_source(f"text={tmp_path}", "document")
    assert [row["text"] for row in rows] == ["a.md", "b.txt", "inner/c.txt"]


def test_files_beside_those_of_a_source_are_read_too(tmp_path):
    for name in ("movie_conversations.txt", "movie_lines.txt", "README.txt"):
        write(tmp_path, name, "x")
    assert note_unread(f"cornell_movie_dialogs={tmp_path}").unread == {
        str(tmp_path / "README.txt"): "not one of the files of cornell_movie_dialogs"
    }


def test_all_rejected_rows_are_counted_and_the_first_places_kept(tmp_path):
    path = write(tmp_path, "a.jsonl", json_lines(*[5] * 50, {"text": "good"}))
    _, loaded = read_source(f"text={path}", "document")
    assert loaded.stats.rejects == {"wrong type": 50}
    assert [place.split(" ")[0] for place in loaded.stats.places["wrong type"]] == [f"{path}:{n}" for n in (1, 2, 3)]
    first, second = str(loaded.stats).splitlines()
    assert first == f"text={path}: 1 of 51 rows kept"
    assert second.startswith(f"  50 rejected: wrong type, first at {path}:1 ")


def test_an_unknown_source_suggests_a_similar_name():
    with pytest.raises(UsageError, match=r"No source named 'alpacca'\. Did you mean 'alpaca'\? Available: .*tinytown"):
        load_rows("alpacca", "conversation")


def test_a_source_of_another_kind_lists_fitting_sources():
    with pytest.raises(
        UsageError, match="'alpaca' has conversations, but documents are expected here: use one of .*text"
    ):
        load_rows("alpaca=x", "document")


@pytest.mark.parametrize("amount", ["", "0", "-3", "many", "1e3"])
def test_a_generated_source_needs_a_number_of_rows(amount):
    with pytest.raises(UsageError, match="is generated and needs a number of rows, as in tinytown=1000"):
        load_rows(f"tinytown={amount}", "document")


def test_a_source_without_hub_dataset_needs_a_path():
    with pytest.raises(UsageError, match="text=PATH"):
        load_rows("text", "document")


def test_an_unreachable_hub_raises_one_line_with_the_local_alternative(monkeypatch):
    import datasets

    def unreachable(**arguments):
        raise ConnectionError("first line\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(RemoteError, match=r"tatsu-lab/alpaca .*first line second line.* alpaca=PATH") as failure:
        load_rows("alpaca", "conversation")
    assert "\n" not in str(failure.value)


NOTHING_TO_READ = [
    ("empty.txt", b"", "is empty: it has no rows"),
    ("empty.jsonl", b"", "is empty: it has no rows"),
    ("blank.jsonl", b"\n \n\n", "is empty: it has no rows"),
    ("empty.json", b"", "No row of .* can be used"),
    ("array.json", b"[]", "is empty: it has no rows"),
    ("empty.txt.gz", gzip.compress(b"", mtime=0), "is empty: it has no rows"),
    ("numbers.jsonl", b"1\n2\n", "No row of .* can be used: 2 wrong type, first at .*Correct them .*--rejects"),
    ("empty.xml", b"", r"cannot be read: unknown suffix \.xml, empty; supported are \.txt"),
    ("plain", b"\0", "cannot be read: no suffix, not text: 100% of its bytes are control characters"),
    ("a.txt", b"\x89PNG", "is empty: it has no rows. Not read: .*a.txt .a PNG picture."),
]


@pytest.mark.parametrize(("name", "content", "message"), NOTHING_TO_READ)
def test_a_file_without_usable_rows_raises_a_data_error(name, content, message, tmp_path):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as failure:
        list(load_rows(f"text={path}", "document"))
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)
    assert failure.value.exit_code == 65


@pytest.mark.parametrize("name", CONVERTING)
def test_a_missing_path_or_no_matching_file_raises_a_data_error(name, tmp_path):
    with pytest.raises(DataError, match=f"No file or folder {tmp_path / 'nowhere'}") as failure:
        list(load_rows(f"{name}={tmp_path / 'nowhere'}", find_source(name).kinds[0]))
    assert "\n" not in str(failure.value)
    with pytest.raises(DataError, match="is an empty folder: it has no file that matches"):
        list(load_rows(f"{name}={tmp_path}", find_source(name).kinds[0]))
    write(tmp_path, "picture.png", "")
    with pytest.raises(DataError, match=r"has no file that matches .*, only picture\.png") as failure:
        list(load_rows(f"{name}={tmp_path}", find_source(name).kinds[0]))
    assert "\n" not in str(failure.value)


def test_a_summary_has_licence_and_counts(tmp_path):
    _, loaded = read_source(f"text={write(tmp_path, 'a.jsonl', json_lines(5, {'text': 'good'}))}", "document")
    assert loaded.stats.summary() == {
        "source": loaded.spec,
        "licence": find_source("text").licence,
        "rows_in": 2,
        "kept": 1,
        "rejects": {"wrong type": 1},
        "repairs": {},
        "rules": {},
        "unread_columns": {},
        "cut": 0,
        "cuts": {},
    }


def test_iterate_texts_yields_all_texts_of_every_kind(tmp_path):
    documents = write(tmp_path, "a.jsonl", json_lines({"text": "a document"}))
    conversations = write(tmp_path, "b.jsonl", json_lines(chat_row("a question", "an answer")))
    preferences = write(tmp_path, "c.jsonl", json_lines({"prompt": "p", "chosen": "c", "rejected": "r"}))
    specs = [f"text={documents}", f"messages={conversations}", f"preference={preferences}"]
    assert list(iterate_texts(specs)) == ["a document", "a question", "an answer", "p", "c", "r"]


def test_the_source_digest_changes_only_with_the_files_content_and_names(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    first.mkdir()
    for name, rows in (("a.jsonl", 20), ("b.jsonl", 100_000)):  # one of 0.5 MB, one of more than 2
        write(first, name, json_lines(*({"text": f"document {name} {number:09d}"} for number in range(rows))))
    digest_before = source_digest(f"text={first}")
    shutil.copytree(first, copy)
    for file in copy.iterdir():
        os.utime(file, (0, 0))
    assert source_digest(f"text={copy}") == digest_before != ""
    write(copy, ".DS_Store", b"\0")
    write(copy, "notes.doc", b"\0")
    assert source_digest(f"text={copy}") == digest_before
    for name in ("a.jsonl", "b.jsonl"):
        content = (copy / name).read_bytes()
        end = content[:-9] + b'so"}\n\n\n\n\n'
        assert len(end) == len(content)
        for changed in (content.replace(b"document", b"DOCUMENT"), end, content + b"\n", content[:-1]):
            (copy / name).write_bytes(changed)
            assert source_digest(f"text={copy}") != digest_before
        (copy / name).write_bytes(content)
    (copy / "a.jsonl").rename(copy / "c.jsonl")
    assert source_digest(f"text={copy}") != digest_before
    assert source_digest(f"text={tmp_path / 'nowhere'}") == ""


def test_the_source_digest_includes_files_beside_the_data(tmp_path):
    separator = " +++$+++ "
    write(tmp_path, "movie_conversations.txt", separator.join(("u0", "u2", "m0", "['L1', 'L2']")) + "\n")
    lines = [separator.join((f"L{n}", f"u{n}", "m0", "A", f"Line {n}.")) for n in (1, 2)]
    write(tmp_path, "movie_lines.txt", "\n".join(lines))
    spec = f"cornell_movie_dialogs={tmp_path}"
    assert len(read_source(spec, "conversation")[0]) == 1
    before = source_digest(spec)
    write(tmp_path, "movie_lines.txt", "\n".join(lines).replace("Line 2", "Else 2"))
    assert source_digest(spec) != before


def test_only_the_persona_source_depends_on_the_persona():
    other = dataclasses.replace(load_persona(), name="Zebulon")
    assert source_digest("persona=60") != source_digest("persona=60", other)
    assert source_digest("tinytown=60") == source_digest("tinytown=60", other)
