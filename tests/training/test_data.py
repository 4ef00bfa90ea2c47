"""Rows of chat stages: how they are split, encoded, rejected and counted."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from support import json_lines

from rorchat.errors import DataError
from rorchat.rows import RejectedRow
from rorchat.training.data import Split, limit_split, load_split, row_lengths
from rorchat.validation_split import is_validation_text, text_digest

SHARE = 0.3


def build_arguments(*sources: str, rows_per_source: int | None = None, share: float = SHARE):
    return SimpleNamespace(
        sources=list(sources), persona=None, data_seed=0, validation_share=share, rows_per_source=rows_per_source
    )


@pytest.fixture
def pairs(tmp_path) -> str:
    rows = [{"prompt": f"Question {n // 2}?", "chosen": "yes " * (n + 1), "rejected": "no"} for n in range(80)]
    (tmp_path / "pairs.jsonl").write_text(json_lines(*rows))
    return f"preference={tmp_path / 'pairs.jsonl'}"


def encode_numbered(rows, row_stats):
    return ({"place": row["place"], "ids": [1] * len(row["chosen"][0]["content"])} for row in rows)


def encode_prompts(rows, row_stats):
    return ({"prompt": row["prompt"][0]["content"]} for row in rows)


def test_preferences_are_split_by_their_prompt(pairs):
    split = load_split(build_arguments(pairs), "preference", encode_prompts)
    for rows, is_validation in ((split.train, False), (split.validation, True)):
        assert all(is_validation_text(row["prompt"], SHARE) == is_validation for row in rows)
    assert len(split.train) + len(split.validation) == 80 and len(split.validation) > 5
    assert not set(split.train["prompt"]) & set(split.validation["prompt"])


def test_rejected_rows_are_counted_with_their_place(pairs):
    def encode(rows, row_stats):
        for encoded in encode_numbered(rows, row_stats):
            yield RejectedRow("over-long", "too many") if len(encoded["ids"]) > 280 else encoded

    split = load_split(build_arguments(pairs), "preference", encode)
    (row_stats,) = split.row_stats
    rejected = row_stats.rejects["over-long"]
    assert rejected > 0 and row_stats.kept == 80 - rejected == len(split.train) + len(split.validation)
    assert "pairs.jsonl" in row_stats.places["over-long"][0] and "too many" in row_stats.places["over-long"][0]
    assert row_lengths(split.train, "ids").tolist() == [len(row["ids"]) for row in split.train]


@pytest.mark.parametrize("rows_per_source", [1, 30])
def test_rows_per_source_limits_every_source(pairs, rows_per_source):
    arguments = build_arguments(pairs, pairs, rows_per_source=rows_per_source)
    if rows_per_source == 1:  # both rows are equal, so that they cannot be in different splits
        with pytest.raises(DataError, match="preferences to train on and .* to validate on, with validation_share 0.3"):
            load_split(arguments, "preference", encode_numbered)
        return
    split = load_split(arguments, "preference", encode_numbered)
    assert [stats.kept for stats in split.row_stats] == [30, 30]


@pytest.mark.parametrize(("share", "alone"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_a_split_that_would_be_empty_has_the_rows_of_one_prompt(pairs, share, alone):
    split = load_split(build_arguments(pairs, share=share), "preference", encode_prompts)
    one, others = (split.validation, split.train) if alone == "validation" else (split.train, split.validation)
    chosen = (min if alone == "validation" else max)(
        {*others["prompt"], *one["prompt"]}, key=lambda prompt: text_digest(prompt)
    )
    assert one["prompt"] == [chosen] * 2 and len(others) == 78 and chosen not in others["prompt"]
    (stats,) = split.row_stats
    assert f"validation_share {share:g} would hold out" in str(stats).splitlines()[-1]
    line = 2 * int(chosen.split()[1].rstrip("?")) + 1
    assert str(stats).endswith(f"pairs.jsonl:{line}; {pairs.partition('=')[2]}:{line + 1}")


def number_rows(rows: int, first: int = 0) -> Dataset:
    """Rows of two columns with ten tokens together."""
    return Dataset.from_list([{"a": [number] * 4, "b": [0] * 6} for number in range(first, first + rows)])


@pytest.mark.parametrize(
    ("max_tokens", "reply_tokens", "kept"), [(0, 0, (30, 6)), (360, 0, (30, 6)), (180, 0, (15, 3)), (180, 5, (10, 2))]
)
def test_validation_rows_are_limited_evenly_in_every_source(max_tokens, reply_tokens, kept):
    validation = {"one": number_rows(30), "two": number_rows(6, first=100)}
    split, share = limit_split(Split(number_rows(3), validation, [], [30, 6]), ("a", "b"), max_tokens, reply_tokens)
    assert tuple(len(rows) for rows in split.validation.values()) == kept and share == pytest.approx(kept[0] / 30)
    gap = 30 // kept[0]
    assert [row["a"][0] for row in split.validation["one"]] == [*range(0, 30, gap)]
    assert [row["a"][0] for row in split.validation["two"]] == [*range(100, 106, gap)]
    assert split.validation_rows == [30, 6] and len(split.train) == 3  # what is held out does not change


def test_validation_rows_without_names_of_sources_are_limited_too():
    split, share = limit_split(Split(number_rows(3), number_rows(40), [], [40]), ("a",), 40)
    assert share == 0.25 and [row["a"][0] for row in split.validation] == [*range(0, 40, 4)]


ALWAYS = {
    "over-long": "Give a larger max_length, if the model has the positions, or shorter rows.",
    "empty reply": "Correct them",
    "identical chosen and rejected": "Correct them",
}


@pytest.mark.parametrize("reason", ALWAYS)
@pytest.mark.parametrize("rows_per_source", [None, 7])
def test_the_error_names_the_reason_that_took_all_rows(reason, rows_per_source, pairs):
    def encode(rows, row_stats):
        return (RejectedRow(reason, "as tested") for _ in rows)

    count = rows_per_source or 80
    path = pairs.partition("=")[2]
    expected = f"No row of {pairs} can be used: {count} {reason}, first at {path}:1 (as tested). {ALWAYS[reason]}"
    for sources in ([pairs], [f"preference={path}", "persona=60"]):  # one unusable source of two is an error, too
        with pytest.raises(DataError) as failure:
            load_split(build_arguments(*sources, rows_per_source=rows_per_source), "preference", encode)
        assert str(failure.value).startswith(expected) and "\n" not in str(failure.value)


def test_the_error_of_an_empty_split_names_what_was_rejected(pairs):
    def encode(rows, row_stats):
        first, *others = encode_prompts(rows, row_stats)
        return [first, *(RejectedRow("over-long") for _ in others)]

    expected = rf"1 preferences to train on and 0 .* Give more data. Of {pairs} were rejected: 79 over-long, first at"
    with pytest.raises(DataError, match=expected):
        load_split(build_arguments(pairs, share=1e-9), "preference", encode)
