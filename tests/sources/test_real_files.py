"""Sources convert exactly the rows of real files and remove their markup."""

import gzip
import json
import re

import pytest
from support import chat_row, convert_row, json_lines, read_source, write

from rorchat.errors import DataError
from rorchat.sources.registry import find_source, load_rows


def test_alpaca_appends_the_input_unless_it_means_none():
    convert = find_source("alpaca").convert
    for nothing in ("", None, "<noinput>", "noinput", "No input", "<no input>", "< noinput >", "\\<noinput\\>"):
        row = {"instruction": "Do it.", "input": nothing, "output": "Done."}
        assert convert(row) == chat_row("Do it.", "Done.")
    assert convert({"instruction": "Do it.", "input": "now", "output": "Done."}) == chat_row("Do it.\n\nnow", "Done.")


def test_dailydialog_removes_marks_and_spaces_around_punctuation():
    row = "Hey John , how are you ? __eou__ I ’ m fine , thanks . __eou__ Good ! __eou__\n"
    assert convert_row("dailydialog", row) == chat_row("Hey John, how are you?", "I'm fine, thanks.")


def test_dailydialog_reads_compressed_text_and_json_lines(tmp_path):
    path = tmp_path / "dialogues_text.txt.gz"
    path.write_bytes(gzip.compress(b"Hello . __eou__ Hi ! __eou__\n5 6 7\n", mtime=0))
    rows, loaded = read_source(f"dailydialog={path}", "conversation")
    assert rows == [chat_row("Hello.", "Hi!")]
    assert loaded.stats.places["not a dialogue"][0].startswith(f"{path}:2")
    path = write(tmp_path, "rows.jsonl", json_lines({"dialog": ["Hello .", "Hi !"]}))
    assert read_source(f"dailydialog={path}", "conversation")[0] == [chat_row("Hello.", "Hi!")]


# (source, path under shared/data, kind, rows in, rejects): the traps that data/SOURCES.md lists
REAL = [
    ("alpaca", "alpaca/alpaca_5000.json", 5000, {"empty reply": 2}),
    ("alpaca", "alpaca/alpaca_en_demo.json", 999, {}),
    ("alpaca", "alpaca/alpaca_tiny.json", 100, {}),
    ("alpaca", "code_alpaca", 2017, {"empty reply": 2}),
    ("messages", "preference/kto_en_demo.json", 300, {"marked as bad": 150}),
    ("dailydialog", "dailydialog/dialogues_text.txt", 2000, {}),
    ("dailydialog", "dailydialog", 2000, {}),
    ("messages", "chat/axolotl_sharegpt_conversation.json", 1, {}),
    ("messages", "chat/dolly_hhrlhf_train_small.jsonl", 1000, {}),  # columns prompt and response
    ("messages", "chat/deita_subset_test_sft.parquet", 5, {}),
    ("messages", "chat/moss003_messages.jsonl", 224, {}),
    ("messages", "chat/openai_sft.jsonl", 128, {}),
    ("messages", "chat/tulu3_oasst1_sft_sample.jsonl", 100, {}),
    ("preference", "preference/dpo_en_demo.json", 300, {"control character": 1}),
    ("preference", "preference/instruction-data-with-preference.json", 1100, {"identical chosen and rejected": 6}),
    ("preference", "preference/tulu3_preference_sample.jsonl", 100, {}),
    ("preference", "preference/ultrafeedback_eval_200.jsonl", 200, {"identical chosen and rejected": 1}),
    (
        "preference",
        "preference/ultrafeedback_train_1000.jsonl",
        1000,
        {"identical chosen and rejected": 4, "empty reply": 2, "control character": 1},
    ),
    ("prose", "corpus_prose", 3412, {"control character": 1}),
    ("prose", "corpus_prose/val.jsonl", 45, {}),
    ("text", "tinystories/tinystories_sample.txt", 5, {}),
    ("text", "tinystories/tinystories_sample_2mb.txt", 2317, {}),
    ("text", "books", 198, {}),  # four books, in documents of about 8,000 characters
]


@pytest.mark.parametrize(("name", "path", "rows_in", "rejects"), REAL, ids=[path for _, path, *_ in REAL])
def test_real_files_have_the_documented_row_counts(name, path, rows_in, rejects, shared_data):
    rows, loaded = read_source(f"{name}={shared_data / path}", find_source(name).kinds[0])
    assert loaded.stats.rejects == rejects
    assert loaded.stats.rows_in == rows_in
    assert len(rows) == loaded.stats.rows_in - sum(rejects.values())


# Real files in a format that the source does not read
UNREAD = [
    ("messages", "chat/moss003_original_example.json", 1),
    ("messages", "chat/mt_bench_question.jsonl", 80),
    ("preference", "preference/hh_rlhf_harmless_base_test.jsonl.gz", 2312),
    ("preference", "preference/kto_en_demo.json", 300),
]


@pytest.mark.parametrize(("name", "path", "rows_in"), UNREAD, ids=[path for _, path, _ in UNREAD])
def test_a_file_in_another_format_raises_a_one_line_error(name, path, rows_in, shared_data):
    pattern = f"can be used: {rows_in:,} missing field, first at .*(:1|row 0) "
    with pytest.raises(DataError, match=pattern) as failure:
        list(load_rows(f"{name}={shared_data / path}", find_source(name).kinds[0]))
    assert "\n" not in str(failure.value)


def test_alpaca_spellings_of_no_input_never_reach_a_question(shared_data):
    path = shared_data / "alpaca" / "alpaca_5000.json"
    means_none = re.compile(r"\W*no ?input( needed| required)?\W*", re.IGNORECASE)
    raw = json.loads(path.read_text())
    without = [row["instruction"].strip() for row in raw if means_none.fullmatch(row["input"]) and row["output"]]
    assert len(without) == 59
    questions = [row["messages"][0]["content"] for row in read_source(f"alpaca={path}", "conversation")[0]]
    assert set(without) <= set(questions)
    assert not [question for question in questions if means_none.fullmatch(question.rpartition("\n\n")[2])]


def test_dailydialog_utterances_are_not_empty_and_have_no_marks(shared_data):
    path = shared_data / "dailydialog" / "dialogues_text.txt"
    rows, _ = read_source(f"dailydialog={path}", "conversation")
    contents = [turn["content"] for row in rows for turn in row["messages"]]
    marks = [line.count("__eou__") for line in path.read_text().splitlines()]
    assert len(contents) == sum(count // 2 * 2 for count in marks)  # a last utterance without an answer is omitted
    assert not [content for content in contents if "__eou__" in content or not content.strip() or " ," in content]


def test_system_messages_of_preferences_begin_the_prompt(shared_data):
    rows, _ = read_source(f"preference={shared_data / 'preference' / 'dpo_en_demo.json'}", "preference")
    assert sum(row["prompt"][0]["role"] == "system" for row in rows) == 79  # of 80: row 15 has a control character
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
