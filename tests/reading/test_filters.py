"""Filters reject documents beyond their thresholds and report the share."""

import json
import time
from dataclasses import fields

import pytest

from rorchat.errors import UsageError
from rorchat.reading.filters import Filters, latin_share, letter_share, repetition_share
from rorchat.rows import RejectedRow


def rejected(filters: Filters, text: str) -> str:
    """The reason for which a text is rejected, or nothing."""
    try:
        filters.check(text)
    except RejectedRow as rejection:
        return rejection.reason
    return ""


def test_filters_are_off_by_default():
    filters = Filters()
    assert not filters.active and filters.describe() == {}
    for text in ("", " ", "1234", "Привет", "a\n" * 1000, "\ud800", "x" * 10**6):
        filters.check(text)


def test_describe_names_the_active_filters():
    filters = Filters(min_characters=200, min_latin=0.9)
    assert filters.active
    assert filters.describe() == {"min_characters": 200, "min_latin": 0.9}
    assert Filters(**filters.describe()) == filters


# (filters, a text at the threshold, one beyond it, reason)
THRESHOLDS = [
    (Filters(min_characters=5), "abcde", "abcd", "too short"),
    (Filters(max_characters=5), "äöüßé", "abcdef", "over-long"),
    (Filters(min_letters=0.5), "ab12", "ab123", "few letters"),
    (Filters(min_letters=1.0), "a b\tç\u00a0\u3000你é", "a b.", "few letters"),
    (Filters(min_latin=0.5), "abПр 123", "abПри", "other script"),
    (Filters(min_latin=1.0), "naïve Œuvre ŋ 12 €", "µ", "other script"),  # U+00B5 is a Greek letter
    (Filters(max_repetition=0.5), "ab\nab", "ab\nab\nab", "repetition"),
    (Filters(max_repetition=0.2), "abcdef\nxy\nxy", "abcde\nxy\n\nxy\n", "repetition"),
]


@pytest.mark.parametrize(
    ("filters", "good", "bad", "reason"), THRESHOLDS, ids=[str(t[0].describe()) for t in THRESHOLDS]
)
def test_filters_keep_texts_at_their_threshold_and_reject_beyond(filters, good, bad, reason):
    assert rejected(filters, good) == ""
    assert rejected(filters, bad) == reason


def test_shares_equal_a_count_by_hand():
    assert letter_share("ab1.") == 0.5
    assert letter_share("हिन्दी") == 1.0  # vowel signs belong to their letters
    assert letter_share("—…“”") == 0.0
    assert latin_share("abc абв") == 0.5
    assert latin_share("1 + 2 = 3 €") == 1.0  # no letter of another script
    assert latin_share("日本") == 0.0
    assert repetition_share("") == repetition_share("\n \n\n") == 0.0
    assert repetition_share("one\n\ntwo\n\n\nthree") == 0.0
    assert repetition_share("one\ntwo\none\n \n") == pytest.approx(3 / 9)


def test_character_classes_match_unicodedata():
    import unicodedata

    for code in [*range(0x3000), 0x4E00, 0xFB01, 0xFF21, 0x1F600, 0x20000]:
        character = chr(code)
        is_letter = unicodedata.category(character)[0] in "LM"
        assert letter_share(character) == (is_letter or character.isspace() and not 0x1C <= code <= 0x1F), hex(code)
        if is_letter:
            assert latin_share(character) == ("LATIN" in unicodedata.name(character, "")), hex(code)


def test_a_rejected_row_shows_its_share_rounded_down():
    with pytest.raises(RejectedRow, match=r"few letters: 59\.9% letters and white space, less than 60%"):
        Filters(min_letters=0.6).check("a" * 5999 + "1" * 4001)


WRONG = [
    {"min_characters": -1}, {"min_characters": 1.5}, {"max_characters": True}, {"max_characters": "5"},
    {"max_repetition": 1.1}, {"min_letters": -0.1}, {"min_latin": float("nan")}, {"min_latin": None},
    {"min_letters": "0.5"}, {"min_letters": False}, {"min_characters": 10, "max_characters": 9},
]  # fmt: skip


@pytest.mark.parametrize("settings", WRONG, ids=str)
def test_a_threshold_out_of_range_raises_a_usage_error(settings):
    with pytest.raises(UsageError, match=next(iter(settings))) as failure:
        Filters(**settings)
    assert "\n" not in str(failure.value) and failure.value.exit_code == 2
    assert set(settings) <= {field.name for field in fields(Filters)}


def test_min_latin_rejects_greek_and_bulgarian_in_the_pile(shared_data):
    rows = [json.loads(line) for line in (shared_data / "pile" / "pile_sample.jsonl").read_text().splitlines()]
    filters = Filters(min_latin=0.5)
    lost = [row["meta"]["pile_set_name"] for row in rows if rejected(filters, row["text"])]
    assert lost == ["EuroParl"]
    few = [row["meta"]["pile_set_name"] for row in rows if rejected(Filters(min_letters=0.6), row["text"])]
    assert sorted(few) == ["DM Mathematics"] * 4 + ["Github", "StackExchange"]


def test_filters_are_fast(shared_data):
    text = "\n".join((shared_data / "tinystories" / "tinystories_sample_2mb.txt").read_text().splitlines())
    texts = [text[start : start + 5000] + "’" for start in range(0, len(text), 5000)]
    filters = Filters(10, 10**6, 0.9, 0.5, 0.5)
    latin_share("é")  # makes the table of characters
    fastest = min(_seconds(filters, texts) for _ in range(3))
    assert len(text) / fastest > 30e6  # 190 MB/s on an idle core; a busy one must not fail the test


def _seconds(filters: Filters, texts: list[str]) -> float:
    start = time.perf_counter()
    for text in texts:
        filters.check(text)
    return time.perf_counter() - start
