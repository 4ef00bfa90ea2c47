"""Conversation and preference sources read real files and folders as published."""

import gzip
import json
import re
from pathlib import Path

import pytest
from support import chat_row, json_lines, read_source, write

from rorchat.errors import DataError
from rorchat.sources.registry import find_source, load_rows

NQ, MATH, OBQA = "natural_questions", "math_dataset", "openbookqa/OpenBookQA-V1-Sep2018/Data"
UNANSWERED = "a last turn of the user, without a reply, left out"
# (source, path under shared/data, rows in, rejects by reason, repairs): what data/SOURCES.md says is in them
REAL = [
    ("alpaca", "alpaca/alpaca_5000.json", 5000, {"empty reply": 2}, {}),
    ("alpaca", "alpaca/instruction-data.json", 1100, {}, {}),
    ("alpaca", "alpaca/seed_tasks.jsonl", 175, {}, {}),
    ("code_alpaca", "code_alpaca", 2017, {"empty reply": 2}, {}),
    (
        "cornell_movie_dialogs",
        "cornell_movie_dialogs",
        8113,
        {"lines missing": 46, "empty reply": 1, "empty question": 1},
        {UNANSWERED: 2790, "Windows-1252 character": 32},
    ),
    (
        "cornell_movie_dialogs",
        "cornell_movie_dialogs/variants/movie_lines_crlf_utf8_ufffd.txt",
        850,
        {"lines missing": 2, "replacement character": 1, "empty question": 1},
        {UNANSWERED: 305},
    ),
    (
        "cornell_movie_dialogs",
        "cornell_movie_dialogs/variants/movie_lines_kaggle.tsv",
        583,
        {"empty reply": 1},
        {UNANSWERED: 198},
    ),
    ("gsm8k", "gsm8k", 7473, {}, {}),
    ("gsm8k", "gsm8k/test.jsonl", 1319, {}, {}),
    (
        "hh_rlhf",
        "preference/hh_rlhf_harmless_base_test.jsonl.gz",
        2312,
        {"empty reply": 4},
        {"turns of one speaker joined": 9},
    ),
    ("math_dataset", f"{MATH}/generated", 9360, {}, {}),
    ("math_dataset", f"{MATH}/generated/interpolate", 2160, {}, {}),
    ("math_dataset", f"{MATH}/mathematics_dataset-v1.0", 6, {}, {}),
    ("math_dataset", f"{MATH}/hf_byte_literals.jsonl", 900, {}, {"byte literal": 900}),
    ("mbpp", "mbpp", 974, {"evaluation split": 510}, {}),
    ("mbpp", "mbpp/sanitized-mbpp.json", 427, {"evaluation split": 264}, {}),
    ("moss", "chat/moss003_original_example.json", 1, {}, {}),
    ("natural_questions", NQ, 3, {"no short answer": 1}, {}),
    ("natural_questions", f"{NQ}/nq-dev-00.jsonl.gz", 2, {"no short answer": 1}, {}),
    ("natural_questions", f"{NQ}/simplified-nq-sample.jsonl", 5, {"no short answer": 2}, {}),
    ("natural_questions", f"{NQ}/natural_questions_openbook_short.jsonl", 824, {}, {}),
    ("natural_questions", f"{NQ}/nq_open/NQ-open.dev.jsonl", 3610, {}, {}),
    ("natural_questions", f"{NQ}/nq_open/NQ-open.efficientqa.dev.1.1.jsonl", 1800, {}, {}),
    ("oasst", "chat/tulu3_oasst1_sft_sample.jsonl", 100, {}, {}),
    ("openbookqa", "openbookqa", 4957, {}, {}),
    ("openbookqa", f"{OBQA}/Additional/dev_complete.jsonl", 500, {}, {}),
    ("openbookqa", f"{OBQA}/Main/dev.tsv", 500, {}, {}),
    ("openbookqa", f"{OBQA}/Main/test.jsonl", 500, {}, {}),
    ("prompt_completion", "chat/dolly_hhrlhf_train_small.jsonl", 1000, {}, {}),
    ("smoltalk", "chat/moss003_messages.jsonl", 224, {}, {}),
    ("ultrachat", "chat/deita_subset_test_sft.parquet", 5, {}, {}),
    (
        "ultrafeedback",
        "preference",
        1000,
        {"identical chosen and rejected": 4, "empty reply": 2, "control character": 1},
        {},
    ),
    ("ultrafeedback", "preference/ultrafeedback_eval_200.jsonl", 200, {"identical chosen and rejected": 1}, {}),
]


@pytest.mark.parametrize(("name", "path", "rows_in", "rejects", "repairs"), REAL, ids=[path for _, path, *_ in REAL])
def test_real_files_have_the_documented_row_counts(name, path, rows_in, rejects, repairs, shared_data):
    _, loaded = read_source(f"{name}={shared_data / path}")
    assert (loaded.stats.rows_in, loaded.stats.rejects, loaded.stats.repairs) == (rows_in, rejects, repairs)


# (source, path, reason, places) of these rejected rows; at most three places of a reason are kept
PLACES = [
    ("code_alpaca", "code_alpaca/code_alpaca_2k.json", "empty reply", [", row 237 ", ", row 1859 "]),
    ("alpaca", "alpaca/alpaca_5000.json", "empty reply", [", row 2335 ", ", row 4658 "]),
    ("mbpp", "mbpp/mbpp.jsonl", "evaluation split", [":1 (task_id 1)", ":2 (task_id 2)", ":3 (task_id 3)"]),
    (
        "hh_rlhf",
        "preference/hh_rlhf_harmless_base_test.jsonl.gz",
        "empty reply",
        [":87 (chosen", ":517 (chosen", ":926 (chosen"],
    ),
    (
        "ultrafeedback",
        "preference/ultrafeedback_train_1000.jsonl",
        "identical chosen and rejected",
        [":307", ":656", ":911"],
    ),
    ("cornell_movie_dialogs", "cornell_movie_dialogs/movie_conversations.txt", "empty reply", [":133 "]),
    ("cornell_movie_dialogs", "cornell_movie_dialogs/movie_conversations.txt", "empty question", [":1683 "]),
    (
        "cornell_movie_dialogs",
        "cornell_movie_dialogs/movie_conversations.txt",
        "lines missing",
        [":8052 (L203044, L203045)", ":8053 (L203068, L203069)", ":8054 (L203070, L203071)"],
    ),
    ("natural_questions", f"{NQ}/simplified-nq-sample.jsonl", "no short answer", [":3", ":5"]),
]


@pytest.mark.parametrize(("name", "path", "reason", "places"), PLACES, ids=[f"{n}-{r}" for n, _, r, _ in PLACES])
def test_bad_rows_of_real_files_are_reported_with_their_places(name, path, reason, places, shared_data):
    reported = read_source(f"{name}={shared_data / path}")[1].stats.places[reason]
    for place, expected in zip(reported, places, strict=True):
        assert place.startswith(f"{shared_data / path}{expected}")


# (source, path, number of the row among the kept ones, the row)
SPOTS = [
    (
        "cornell_movie_dialogs",
        "cornell_movie_dialogs",
        0,
        chat_row(
            "Can we make this quick? Roxanne Korrine and Andrew Barrett are having an incredibly horrendous public "
            "break- up on the quad. Again.",
            "Well, I thought we'd start with pronunciation, if that's okay with you.",
            "Not the hacking and gagging and spitting part. Please.",
            "Okay... then how 'bout we try out some French cuisine. Saturday? Night?",
        ),
    ),
    (
        "code_alpaca",
        "code_alpaca",
        3,
        chat_row(
            "Write a Python function to calculate the factorial of a given number.",
            "def factorial(number):\n    fact = 1\n    for i in range(1, number + 1):\n        fact = fact * i\n"
            "    return fact",
        ),
    ),
    (
        "alpaca",
        "alpaca/instruction-data.json",
        3,
        chat_row(
            "Rewrite this sentence to start with 'Although': Despite the rain, they went for a walk.",
            "Although it was raining, they went for a walk.",
        ),
    ),
    (
        "gsm8k",
        "gsm8k",
        0,
        chat_row(
            "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
            "clips did Natalia sell altogether in April and May?",
            "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n"
            "The answer is 72.",
        ),
    ),
    ("math_dataset", f"{MATH}/hf_byte_literals.jsonl", 0, chat_row("Solve -5*p + 5 = 10 for p.", "-1")),
    (
        "math_dataset",
        f"{MATH}/mathematics_dataset-v1.0/interpolate",
        0,
        chat_row("Solve -282*d + 929 - 178 = -1223 for d.", "7"),
    ),
    (
        "mbpp",
        "mbpp",
        91,  # task_id 602
        chat_row(
            "Write a python function to find the first repeated character in a given string.\n\n"
            'Your code should pass these tests:\n\nassert first_repeated_char("abcabc") == "a"\n'
            'assert first_repeated_char("abc") == "None"\nassert first_repeated_char("123123") == "1"',
            "```python\ndef first_repeated_char(str1):\n  for index,c in enumerate(str1):\n"
            '    if str1[:index+1].count(c) > 1:\n      return c \n  return "None"\n```',
        ),
    ),
    (
        "natural_questions",
        f"{NQ}/nq-train-00.jsonl.gz",
        0,
        chat_row("when is the last episode of season 8 of the walking dead", "March 18, 2018"),
    ),
    (
        "natural_questions",
        f"{NQ}/nq_open/NQ-open.dev.jsonl",
        0,
        chat_row("when was the last time anyone was on the moon", "14 December 1972 UTC"),
    ),
    (
        "openbookqa",
        "openbookqa",
        0,
        chat_row(
            "The sun is responsible for\n\nA. puppies learning new tricks\nB. children growing up and getting old\n"
            "C. flowers wilting in a vase\nD. plants sprouting, blooming and wilting",
            "D. plants sprouting, blooming and wilting",
        ),
    ),
    (
        "prompt_completion",
        "chat/dolly_hhrlhf_train_small.jsonl",
        7,
        chat_row("Van Halen famously banned what color M&Ms in their rider?", "Brown."),
    ),
]


@pytest.mark.parametrize(("name", "path", "number", "row"), SPOTS, ids=[path for _, path, *_ in SPOTS])
def test_real_rows_are_converted_exactly(name, path, number, row, shared_data):
    assert read_source(f"{name}={shared_data / path}")[0][number] == row


CORNELL_LINES = """L3 +++$+++ u1 +++$+++ m0 +++$+++ B +++$+++ Then <u>go</u>.
L2 +++$+++ u0 +++$+++ m0 +++$+++ A +++$+++ I'm  off to head\xadquarters.
L1 +++$+++ u0 +++$+++ m0 +++$+++ A +++$+++ \x93Hm\x85\x94
L4 +++$+++ u0 +++$+++ m0 +++$+++ A +++$+++
"""


@pytest.mark.parametrize("form", ["plain", "gz"])
def test_cornell_joins_lines_of_a_speaker_and_repairs_windows_characters(form, tmp_path):
    lines = CORNELL_LINES.encode("latin-1")
    write(tmp_path, "movie_lines.txt" + ".gz" * (form == "gz"), gzip.compress(lines) if form == "gz" else lines)
    conversations = "".join(f"u0 +++$+++ u1 +++$+++ m0 +++$+++ {ids}\n" for ids in (["L1", "L2", "L3"], ["L3", "L4"]))
    write(tmp_path, "movie_conversations.txt", conversations + "u0 +++$+++ u1\n")
    rows, loaded = read_source(f"cornell_movie_dialogs={tmp_path}")
    assert rows == [chat_row("“Hm…” I'm off to headquarters.", "Then go.")]
    assert loaded.stats.repairs == {"Windows-1252 character": 1}
    assert loaded.stats.places == {
        "empty reply": [f"{tmp_path / 'movie_conversations.txt'}:2 (message 1)"],
        "missing field": [f"{tmp_path / 'movie_conversations.txt'}:3 (no line ids)"],
    }


def test_half_of_cornell_raises_an_error_that_names_the_other_half(tmp_path):
    path = write(tmp_path, "movie_lines.txt", CORNELL_LINES.encode("latin-1"))
    with pytest.raises(DataError, match=r"movie_lines\.txt is only half of the corpus: put movie_conversations\.txt"):
        list(load_rows(f"cornell_movie_dialogs={path}", "conversation"))


def rows_by_place(spec: str) -> dict[str, list[str]]:
    """The message contents of the kept rows, by place."""
    rows = load_rows(spec, "conversation")
    return dict((rows.place, [turn["content"] for turn in row["messages"]]) for row in rows)


@pytest.mark.parametrize(
    ("variant", "lost"), [("movie_lines_kaggle.tsv", ", "), ("movie_lines_crlf_utf8_ufffd.txt", "")]
)
def test_conversations_are_equal_in_all_formats_of_cornell(variant, lost, shared_data):
    """Except for the commas that Kaggle's format has lost in lines without a quotation mark."""
    folder = shared_data / "cornell_movie_dialogs"
    whole = rows_by_place(f"cornell_movie_dialogs={folder}")
    some = rows_by_place(f"cornell_movie_dialogs={folder / 'variants' / variant}")
    without = str.maketrans("", "", lost)
    assert len(some) > 500
    for place, contents in some.items():
        assert [text.translate(without) for text in contents] == [text.translate(without) for text in whole[place]]


# (text, pairs and rejects by line): a missing line must not assign an answer to another question
MATH_FILES = [
    ("Q1?\n1\nQ2?\n2\n", [("Q1?", "1"), ("Q2?", "2")], []),
    ("Q1?\r\n1\r\nQ2?\r\n2", [("Q1?", "1"), ("Q2?", "2")], []),
    ("Q1?\n1\nQ2?\n", [("Q1?", "1")], ["empty reply:3"]),  # an odd number of lines
    ("Q1?\n1\nQ2?", [("Q1?", "1")], ["empty reply:3"]),
    ("Q1?\nQ2?\n2\n", [("Q2?", "2")], ["empty reply:1"]),
    ("Q1?\n\nQ2?\n2\n", [("Q2?", "2")], ["empty reply:1"]),
    ("\n1\nQ2?\n2\n", [("Q2?", "2")], ["empty question:1"]),
    ("Q1?\n1\n\nQ2?\n2\n", [("Q1?", "1"), ("Q2?", "2")], []),
    ("1\nWhich?  (a) 2  (b) 3\nb\nQ3?\n3\n", [("Which?  (a) 2  (b) 3", "b"), ("Q3?", "3")], ["empty reply:1"]),
    ("3*4\n12\n5 times 6\n30\n", [("3*4", "12"), ("5 times 6", "30")], []),  # questions without a mark
]  # fmt: skip


@pytest.mark.parametrize(("text", "pairs", "rejects"), MATH_FILES)
def test_a_missing_line_does_not_shift_answers_to_other_questions(text, pairs, rejects, tmp_path):
    path = write(tmp_path, "algebra__linear_1d.txt", text)
    rows, loaded = read_source(f"math_dataset={path}")
    assert rows == [chat_row(*pair) for pair in pairs]
    reported = [
        f"{reason}:{place.split(' ')[0].rpartition(':')[2]}" for reason, (place,) in loaded.stats.places.items()
    ]
    assert reported == rejects


def test_answers_of_mathematics_files_match_their_questions(shared_data):
    files = sorted((shared_data / MATH / "generated").rglob("*.txt"))
    assert len(files) == 72
    for file in files:
        lines = file.read_text().splitlines()
        rows, _ = read_source(f"math_dataset={file}")
        assert rows == [chat_row(*pair) for pair in zip(lines[::2], lines[1::2], strict=True)]


# (source, folder, files that it reads): training files, never evaluation files
FOLDERS = [
    ("gsm8k", "gsm8k", {"train.jsonl"}),
    ("openbookqa", "openbookqa", {"train.jsonl"}),
    ("natural_questions", NQ, {"nq-train-00.jsonl.gz", "nq-train-01.jsonl.gz"}),
    ("ultrafeedback", "preference", {"ultrafeedback_train_1000.jsonl"}),
    ("mbpp", "mbpp", {"mbpp.jsonl"}),
]


@pytest.mark.parametrize(("name", "folder", "files"), FOLDERS, ids=[name for name, *_ in FOLDERS])
def test_only_training_files_of_a_folder_are_read(name, folder, files, shared_data):
    places = {place for place, _ in load_rows(f"{name}={shared_data / folder}", find_source(name).kinds[0]).raw}
    assert {Path(re.split(r":\d+$|, row ", place)[0]).name for place in places} == files


@pytest.mark.parametrize("name", ["natural_questions", "hh_rlhf", "gsm8k", "openbookqa"])
def test_a_folder_with_only_evaluation_files_raises(name, tmp_path):
    for file in ("NQ-open.dev.jsonl", "nq-dev-00.jsonl.gz", "test.jsonl", "dev.jsonl"):
        write(tmp_path, file, json_lines(find_source(name).raw[0]))
    with pytest.raises(DataError, match="has no file that matches"):
        load_rows(f"{name}={tmp_path}", find_source(name).kinds[0])


def test_mathematics_reads_only_the_training_folders(shared_data):
    raw = load_rows(f"math_dataset={shared_data / MATH}", "conversation").raw
    assert {Path(place).parent.name for place, _ in raw} == {"train-easy", "train-medium", "train-hard"}


def test_mbpp_solutions_are_valid_python_without_carriage_returns(shared_data):
    rows, _ = read_source(f"mbpp={shared_data / 'mbpp'}")
    contents = [turn["content"] for row in rows for turn in row["messages"]]
    assert len(rows) == 464 and not [content for content in contents if "\r" in content]
    for row in rows:
        compile(row["messages"][1]["content"].removeprefix("```python\n").removesuffix("\n```"), "solution", "exec")


def test_gsm8k_answers_end_with_their_number_and_have_no_annotations(shared_data):
    rows, _ = read_source(f"gsm8k={shared_data / 'gsm8k'}")
    raw = [json.loads(line) for line in (shared_data / "gsm8k" / "train.jsonl").open()]
    for row, original in zip(rows, raw, strict=True):
        answer = row["messages"][1]["content"]
        assert answer.endswith(f"\nThe answer is {original['answer'].rpartition('#### ')[2]}.")
        assert "<<" not in answer and ">>" not in answer and "####" not in answer
