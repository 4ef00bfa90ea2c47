"""Text in common with evaluation sets is found, without false positives."""

import json
import pickle
import random

import numpy as np
import pytest

from rorchat.errors import DataError, UsageError
from rorchat.rows import RejectedRow
from rorchat.sources.registry import load_rows
from rorchat.tokens import decontamination
from rorchat.tokens.decontamination import EvaluationText, words
from rorchat.tokens.evaluation_sets import evaluation_digests

CLEAN = "It is a far better thing that I do, than I have ever done before this day. " * 3


def evaluation(tmp_path, *rows: object, n: int = 13, name: str = "test.jsonl") -> EvaluationText:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluationText.read([str(tmp_path / name)], n=n)


def numbered(first: int, last: int) -> str:
    return " ".join(f"w{number}" for number in range(first, last + 1))


def test_words_are_lower_cased_runs_of_letters_and_digits():
    assert words("Don’t—stop, don't_stop: 3.14") == [b"don", b"t", b"stop", b"don", b"t", b"stop", b"3", b"14"]
    assert words("«Größe» 你好,été\u00a0x") == ["größe".encode(), "你好".encode(), "été".encode(), b"x"]
    assert words(" .,\n") == []


def test_thirteen_common_words_match_and_twelve_do_not(tmp_path):
    text = evaluation(tmp_path, {"question": "x", "answer": numbered(1, 40)})
    assert text.find(f"before {numbered(5, 16)} after") is None
    match = text.find(f"Before, {numbered(5, 17).upper()}! After all.")
    assert (match.ngrams, match.share, match.words) == (1, 1 / 4, numbered(5, 17))
    assert match.place == f"{tmp_path.name}/test.jsonl, row 0"
    assert text.find(numbered(1, 40)).share == 1.0


def test_strings_are_compared_separately_and_rows_are_named(tmp_path):
    rows = [
        {"question": numbered(1, 12), "answer": numbered(13, 24)},  # two short strings are not compared as one
        {"nested": [{"deep": (numbered(101, 120),)}], "number": 5, "none": None},
        {"short": "a"},
        {"last": numbered(201, 220)},
    ]
    text = evaluation(tmp_path, *rows)
    assert text.find(numbered(1, 24)) is None
    assert text.find(numbered(105, 120)).place.endswith("test.jsonl, row 1")
    assert text.find(numbered(201, 213)).place.endswith("test.jsonl, row 3")
    assert text.short == 2 + len(("question", "answer", "nested", "deep", "number", "none", "short", "a", "last"))


def test_a_table_without_a_header_loses_nothing(tmp_path):
    (tmp_path / "dev.csv").write_text(f'"{numbered(1, 13)}",same,same,c,d,A\n{numbered(21, 33)},a,b,c,d,"B"\nragged\n')
    text = EvaluationText.read([str(tmp_path)])
    assert text.find(numbered(1, 13)).place.endswith("dev.csv, row 0")
    assert text.find(numbered(21, 33)).place.endswith("dev.csv, row 1")


def test_a_spec_of_a_source_is_an_evaluation_set_too(tmp_path):
    (tmp_path / "alpaca.jsonl").write_text(json.dumps({"instruction": numbered(1, 13), "input": "", "output": "x"}))
    spec = f"alpaca={tmp_path / 'alpaca.jsonl'}"
    assert EvaluationText.read([spec]).find(numbered(1, 13)).place == f"{spec}, row 0"


def test_equal_hashes_match_only_if_the_words_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(decontamination, "_hash_windows", lambda ids, windows, n: np.zeros(len(windows), np.uint64))
    text = evaluation(tmp_path, {"a": numbered(1, 13)}, {"b": numbered(20, 40)})
    assert len(text.hashes) == 1
    assert text.find(numbered(1, 13)).ngrams == 1
    assert text.find(numbered(2, 12) + " w1 w13") is None


@pytest.mark.parametrize("n", [2, 5, 13])
def test_the_count_equals_that_of_tuple_sets(n, tmp_path):
    rng = random.Random(n)
    vocabulary = [f"v{number}" for number in range(6 if n < 13 else 2)] * 10
    rows = [{"text": " ".join(rng.choices(vocabulary, k=rng.randrange(40)))} for _ in range(30)]
    text = evaluation(tmp_path, *rows, n=n)
    known = {tuple(w[at : at + n]) for row in rows for w in [words(row["text"])] for at in range(len(w) - n + 1)}
    matches = 0
    for _ in range(300):
        sample = " ".join(rng.choices([*vocabulary, "unknown"], k=rng.randrange(60)))
        w = words(sample)
        windows = [tuple(w[at : at + n]) for at in range(len(w) - n + 1)]
        common = sum(window in known for window in windows)
        match = text.find(sample)
        assert (match.ngrams if match else 0) == common
        assert match is None or match.share == common / len(windows)
        matches += common
    assert matches > 40


@pytest.mark.parametrize("piece", [1, 50, 333, 4000])
def test_chunks_of_a_long_text_lose_and_repeat_no_window(piece, tmp_path, monkeypatch):
    text = evaluation(tmp_path, {"a": numbered(1, 500)}, n=5)
    sample = f"{CLEAN} {numbered(3, 400)}, {CLEAN} {numbered(1, 4)} {numbered(450, 500)} {CLEAN}"
    whole = text.find(sample)
    assert whole.ngrams == 394 + 47
    monkeypatch.setattr(decontamination, "CHUNK_CHARACTERS", max(piece, 50))
    assert text.find(sample) == whole
    monkeypatch.setattr(decontamination, "CHUNK_CHARACTERS", 1)
    text.find("a" * 1000 + " " * 1000 + "b")  # ends


def test_evaluation_words_in_another_order_do_not_match(shared_data):
    text = EvaluationText.read([str(shared_data / "gsm8k" / "test.jsonl")])
    rng = random.Random(0)
    sample = list(text.word_ids)
    rng.shuffle(sample)
    assert text.find(" ".join(word.decode() for word in sample)) is None


def test_a_gsm8k_question_inside_prose_is_found(shared_data):
    text = EvaluationText.read([str(shared_data / "gsm8k" / "test.jsonl")])
    prose = [row["text"] for row in load_rows(f"prose={shared_data / 'corpus_prose' / 'val.jsonl'}", "document")]
    assert len(prose) == 45 and not any(map(text.find, prose))
    question = json.loads((shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()[7])["question"]
    planted = prose[3][:3000] + "\n\n" + question.replace("\n", "  ").upper() + "\n\n" + prose[3][3000:]
    match = text.find(planted)
    assert match.place == "gsm8k/test.jsonl, row 7"
    assert match.words == b" ".join(words(question)[:13]).decode()
    assert match.ngrams == len(words(question)) - 12
    with pytest.raises(RejectedRow) as rejection:
        text.check(planted)
    assert rejection.value.reason == "contaminated"
    assert rejection.value.detail == f"13 words of gsm8k/test.jsonl, row 7: {match.words}"
    text.check(prose[3])


# (path in shared/data, keys that lead to a passage)
SETS = [
    ("hellaswag", ("endings", 0)), ("lambada/lambada_test.jsonl", ("text",)), ("human_eval", ("prompt",)),
]  # fmt: skip


@pytest.mark.parametrize(("path", "keys"), SETS, ids=[path for path, _ in SETS])
def test_every_long_string_of_a_real_evaluation_set_is_found(path, keys, shared_data):
    import gzip

    (file,) = [shared_data / path] if (shared_data / path).is_file() else (shared_data / path).iterdir()
    opened = gzip.open(file, "rt") if file.suffix == ".gz" else file.open()
    text, long = EvaluationText.read([str(shared_data / path)]), 0
    for line in opened:
        value = json.loads(line)
        for key in keys:
            value = value[key]
        if len(words(value)) >= 13:
            long += 1
            assert text.find(f"{CLEAN} {value} {CLEAN}").ngrams >= len(words(value)) - 12
    assert long > 100


def test_mmlu_and_squad_are_read_whole(shared_data):
    text = EvaluationText.read([str(shared_data / "mmlu"), str(shared_data / "squad")])
    assert len(text.files) == 115
    first = (shared_data / "mmlu" / "test" / "astronomy_test.csv").read_text().splitlines()[0]
    tale = "It was the best of times, it was the worst of times, it was the age of wisdom"
    assert text.find(tale).place == "test/high_school_world_history_test.csv, row 5"
    assert text.find(first) is None or text.find(first).place.startswith("test/astronomy_test.csv, row 0")
    context = json.loads((shared_data / "squad" / "small.json").read_text())["data"][0]["paragraphs"][0]["context"]
    assert text.find(context).place == "squad/small.json, row 0"


def test_evaluation_text_can_be_pickled(tmp_path):
    """Spawned workers (macOS, Windows) receive it by pickle."""
    text = evaluation(tmp_path, {"a": numbered(1, 40)})
    assert pickle.loads(pickle.dumps(text)).find(numbered(1, 20)) == text.find(numbered(1, 20))


def test_arrays_take_at_most_24_bytes_per_word(shared_data):
    text = EvaluationText.read([str(shared_data / "gsm8k" / "test.jsonl")])
    count = np.count_nonzero(text.text >= 0)
    assert text.nbytes <= 24.5 * count


def test_an_unreadable_evaluation_set_is_an_error_of_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"a": "fine"}\n{"a": \n')
    with pytest.raises(DataError, match=r"evaluation text at .*bad\.jsonl:2 cannot be read: not JSON") as failure:
        EvaluationText.read([str(tmp_path / "bad.jsonl")])
    assert "\n" not in str(failure.value)
    with pytest.raises(DataError, match="No file or folder"):
        EvaluationText.read([str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="must be an integer of at least 2"):
        EvaluationText.read([str(tmp_path / "bad.jsonl")], n=1)


def test_no_evaluation_text_matches_nothing(tmp_path):
    assert evaluation(tmp_path, {"a": numbered(1, 13)}).find(numbered(2, 100)) is None
    assert EvaluationText.read([]).find(CLEAN) is None


def test_rows_that_cannot_be_compared_are_reported_by_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"q": numbered(1, 20)}, {"q": "too short", "a": "to compare"}, {"q": numbered(1, 12)}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.lst").write_text("1\n0\n")
    (folder / ".hidden").write_text("")
    evaluation(tmp_path, {"q": numbered(1, 13)}, name="whole.jsonl")
    text = EvaluationText.read([str(folder), str(tmp_path / "whole.jsonl")])
    assert text.describe().splitlines() == [
        f"against {folder}: 20 words of 1 rows",
        "  2 of 3 rows have no string of 13 words: not compared",
        "  not read: labels.lst",
        f"against {tmp_path / 'whole.jsonl'}: 13 words of 1 rows",
    ]


@pytest.mark.parametrize(
    ("path", "rows", "short"), [("piqa", 1838, 814), ("openbookqa", 500, 375), ("mmlu", 14327, 3289)]
)
def test_rows_of_real_sets_without_long_strings_are_counted(path, rows, short, shared_data):
    (given,) = [*(shared_data / path).rglob("Main/test.jsonl")] or [shared_data / path]
    description = EvaluationText.read([str(given)]).describe()
    assert f"  {short:,} of {rows:,} rows have no string of 13 words: not compared" in description


def test_an_evaluation_set_without_a_window_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no string of 13 words in its 1 rows: nothing would be compared"):
        evaluation(tmp_path, {"a": numbered(1, 12)})
    with pytest.raises(DataError, match="has no string of 13 words"):  # even if another set has one
        evaluation(tmp_path, {"a": numbered(1, 20)}, name="good.jsonl")
        EvaluationText.read([str(tmp_path / "good.jsonl"), str(tmp_path / "test.jsonl")])


@pytest.mark.parametrize("name", ["data.zip", "data.npy", "data.xml", "data.parquet.xz"])
def test_an_unreadable_file_of_an_evaluation_set_is_named(name, tmp_path):
    evaluation(tmp_path, {"a": numbered(1, 20)})
    (tmp_path / name).write_bytes(b"questions")
    with pytest.raises(
        DataError, match=f"evaluation text of {tmp_path / name} cannot be read: name the readable files"
    ) as failure:
        EvaluationText.read([str(tmp_path)])
    assert "\n" not in str(failure.value)


def test_a_dataset_saved_to_disk_is_an_evaluation_set(tmp_path, shared_data):
    import datasets

    datasets.Dataset.from_list([{"q": numbered(1, 15)}, {"q": numbered(21, 40)}]).save_to_disk(tmp_path / "saved")
    text = EvaluationText.read([str(tmp_path / "saved")])
    assert text.find(numbered(22, 35)).place.endswith(".arrow, row 1")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert EvaluationText.read([str(file)]).find(numbered(1, 13)).place.endswith(".arrow, row 0")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(DataError, match=r"\.arrow, row 0 cannot be read: not Arrow"):
        EvaluationText.read([str(file)])
    text = EvaluationText.read([str(shared_data / "arc")])
    assert [len(begins) for name, begins in text.files if "ARC-Easy-validation/data-" in name] == [570]


def test_an_overlong_table_cell_is_an_error_of_one_line(tmp_path, monkeypatch):
    (tmp_path / "long.csv").write_text(f'"{numbered(1, 40_000)}",x\n')
    assert EvaluationText.read([str(tmp_path / "long.csv")]).find(numbered(30_000, 30_013)) is not None
    monkeypatch.setattr("rorchat.tokens.evaluation_sets.LONGEST_LINE", 1000)
    with pytest.raises(DataError, match=r"long\.csv cannot be read: field larger than field limit"):
        EvaluationText.read([str(tmp_path / "long.csv")])


def test_the_digest_of_an_evaluation_set_depends_on_its_text(tmp_path):
    evaluation(tmp_path, {"a": numbered(1, 20)})
    given = [
        str(tmp_path / "test.jsonl"),
        str(tmp_path),
        f"alpaca={tmp_path / 'test.jsonl'}",
        str(tmp_path / "nowhere"),
    ]
    before = evaluation_digests(given)
    assert list(before) == sorted(given) and before[str(tmp_path / "nowhere")] == ""
    evaluation(tmp_path, {"a": numbered(2, 21).replace("w21", "w1")})
    after = evaluation_digests(given)
    assert [before[name] == after[name] for name in given] == [False, False, False, True]
