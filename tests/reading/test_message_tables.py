"""Tables with one message in each row become conversations: trees of OpenAssistant, numbered utterances."""

import csv
import io
import random

import pyarrow
import pyarrow.parquet
import pytest
from support import chat_row, read_source, write

from rorchat.inspection.guess import guess_row_format
from rorchat.reading import parts
from rorchat.reading.message_tables import gather_trees
from rorchat.sources.registry import load_rows, source_parts


def post(name: str, text: str, parent: str | None = None, rank: int | None = None, role: str = "") -> dict:
    role = role or ("prompter" if len(name) % 2 else "assistant")
    return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "lang": "en"}


TABLE = [
    post("a", "Hello"),
    post("ab", "worse", "a", rank=1),
    post("ac", "best", "a", rank=0),
    post("aca", "And?", "ac"),
    post("acab", "So.", "aca"),
    post("b", "Bye"),
    post("ba", "Bye!", "b"),
    post("bab", "Unanswered?", "ba"),
    post("zz", "lost its question", "z"),
]
ROWS = [chat_row("Hello", "best", "And?", "So."), chat_row("Bye", "Bye!")]


def write_table(folder, rows: list[dict], form: str):
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "table.parquet")
        return folder / "table.parquet"
    if form == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "rank": "" if row["rank"] is None else float(row["rank"])} for row in rows)
        return write(folder, "table.csv", text.getvalue())
    return write(folder, f"table.{form}", rows)


@pytest.mark.parametrize("source", ["messages", "oasst"])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_a_table_of_messages_in_any_order_is_read_as_trees(source, form, tmp_path):
    table = random.Random(form).sample(TABLE, len(TABLE))
    path = write_table(tmp_path, table, form)
    rows, loaded = read_source(f"{source}={path}", "conversation")
    assert sorted(rows, key=str) == sorted(ROWS, key=str)
    assert loaded.stats.rejects == {"missing field": 1}
    assert "no usable message at the root of the tree" in loaded.stats.places["missing field"][0]
    assert loaded.stats.repairs == {"a last turn of the user, without a reply, left out": 1}
    assert (loaded.stats.rules == {"the best-ranked replies in trees of OpenAssistant": 2}) == (source == "messages")


def test_a_table_that_is_divided_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 300)
    path = write_table(tmp_path, TABLE[:-1], "jsonl")
    pieces = source_parts(f"messages={path}")
    rows = [row for part in pieces for row in load_rows(f"messages={path}", "conversation", part=part)]
    assert len(pieces) > 1 and rows == ROWS


def test_messages_in_a_circle_are_one_tree_that_has_no_root():
    circle = [post("a", "x", "c"), post("b", "y", "a"), post("c", "z", "b"), post("d", "w", "b")]
    ((place, tree),) = gather_trees((f"{number}", row) for number, row in enumerate(circle))
    assert (place, tree) == ("0", circle)


def test_the_release_of_trees_is_read_as_messages_too(tmp_path):
    tree = {"message_tree_id": "a", "prompt": {**TABLE[0], "replies": [{**TABLE[2], "replies": []}]}}
    path = write(tmp_path, "trees.jsonl", [tree])
    assert read_source(f"messages={path}", "conversation")[0] == [chat_row("Hello", "best")]


HEADER = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"


def utterance(conversation: int, number: int, speaker: int, text: str) -> str:
    return f"hit:{conversation},{number},sad,I was sad_comma_ once.,{speaker},{text},5|5|5_2|2|5,"


EMPATHETIC = [
    utterance(0, 1, 7, '"Hello" I said_comma_ and'),
    utterance(0, 2, 3, "Hi!"),
    utterance(0, 3, 7, "Bye."),
    utterance(1, 2, 3, '"quoted, ""as"" a table"'),
    utterance(1, 1, 9, "Hello"),
    utterance(2, 2, 3, "the first is missing"),
]


def test_utterances_of_a_csv_file_are_read_as_dialogues(tmp_path):
    path = write(tmp_path, "train.csv", "\n".join([HEADER, *EMPATHETIC[:6]]))
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row('"Hello" I said, and', "Hi!"), chat_row("Hello", 'quoted, "as" a table')]
    assert loaded.stats.rejects == {"utterance missing": 1}
    assert loaded.stats.repairs == {"a last turn of the user, without a reply, left out": 1}
    assert "two speakers: the first is the user" in str(loaded.stats)
    assert guess_row_format(path) == "messages"


def test_a_line_with_other_fields_is_rejected_with_its_dialogue(tmp_path):
    bad = [utterance(9, 1, 1, "Hello"), "hit:9,2,sad,too short", utterance(8, 1, 1, "one, two")]
    others = [utterance(7, 1, 1, "a") + ",other|replies", utterance(7, 2, 2, "b") + ",other|replies"]
    path = write(tmp_path, "test.csv", "\n".join([HEADER, *bad, *others]))
    rows, loaded = read_source(f"messages={path}", "conversation")
    assert rows == [chat_row("a", "b")]
    assert loaded.stats.places["not CSV"] == [
        f"{path}:3 (4 fields, but the header has 8)",
        f"{path}:4 (9 fields, but the header has 8)",
    ]
    assert loaded.stats.rejects == {"not CSV": 2, "one speaker": 1}


def test_utterances_of_the_hub_are_read_as_dialogues(tmp_path):
    texts = ("Hello", "Hi!", "How?", "So.")
    rows = [{"conv_id": "a", "utterance_idx": n + 1, "speaker_idx": n % 2, "utterance": t} for n, t in enumerate(texts)]
    path = write(tmp_path, "rows.jsonl", rows)
    assert read_source(f"messages={path}", "conversation")[0] == [chat_row(*texts)]
