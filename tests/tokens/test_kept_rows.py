"""`data check` and `data prepare` keep the same rows; a word that takes too long to encode is rejected by both."""

import bz2
import random
import zipfile
from pathlib import Path

import pytest
from support import DOCUMENTS, SENTENCES, as_jsonl, chat_row, write

from rorchat.inspection import check_source
from rorchat.reading import parts
from rorchat.reading.filters import Filters
from rorchat.rows import RejectedRow
from rorchat.tokens.encode import MAX_WORD_BYTES, Encoder
from rorchat.tokens.kept_rows import check_words
from rorchat.tokens.prepare import prepare

LIMIT = 24  # bytes of a word, in place of MAX_WORD_BYTES
LONG = LIMIT + 1
#: Parts of texts that are almost, or just, too long for one word
RUNS = [
    "x" * LONG, "x" * LIMIT, " " + "x" * LIMIT, "é" * (LIMIT // 2), "é" * (LIMIT // 2 + 1), "1" * LONG, "\n" * LONG,
    "\n" * (LONG + 1), " " * LONG + "a", " " * (LONG + 1) + "a", "." * LONG, "漢" * (LIMIT // 3),
    "漢" * (LIMIT // 3 + 1),
    "x1" * LONG, "a'" * LONG, "word " * LONG, "漢字。" * LONG, "\u200b" * (LIMIT // 3 + 1), "🙂" * (LIMIT // 4),
    " " + "🙂" * (LIMIT // 4), "🙂" * (LIMIT // 4 + 1), "\u3000" * LONG + "a",
]  # fmt: skip


@pytest.fixture
def low_limit(monkeypatch):
    monkeypatch.setattr("rorchat.tokens.kept_rows.MAX_WORD_BYTES", LIMIT)
    monkeypatch.setattr("rorchat.tokens.kept_rows._SUSPICIOUS", LIMIT // 4)
    monkeypatch.setattr("rorchat.tokens.encode.MAX_WORD_BYTES", LIMIT)


def is_kept(text: str) -> bool:
    try:
        check_words(text)
        return True
    except RejectedRow as rejected_row:
        assert rejected_row.reason == "over-long" and "bytes; the limit is" in rejected_row.detail
        return False


def is_encoded(encoder: Encoder, text: str) -> bool:
    try:
        encoder.encode([text])
        return True
    except ValueError:
        return False


def test_texts_are_kept_if_gpt2_encodes_them(low_limit, gpt2_tokenizer):
    encoder, rng = Encoder(gpt2_tokenizer), random.Random(0)
    pieces = ["x", "1", " ", "\n", "é", ".", "漢", "🙂", "'s", "\u3000", "²"]
    texts = [around.replace("RUN", run) for run in RUNS for around in ("RUN", "Once RUN", "On.RUN and so. RUN")]
    texts += ["".join(rng.choice(pieces) * rng.randrange(1, 13) for _ in range(4)) for _ in range(2000)]
    kept = [is_kept(text) for text in texts]
    assert 500 < sum(kept) < len(texts) - 500
    assert [text for text, keep in zip(texts, kept, strict=True) if is_encoded(encoder, text) != keep] == []


def test_every_text_that_is_kept_can_be_encoded(low_limit, tokenizer):
    """The tokenizers of rorchat split numbers into digits, so that they could encode more texts than GPT-2's."""
    encoder = Encoder(tokenizer)
    kept = [text for text in RUNS if is_kept(text)]
    assert len(kept) > 5 and all(is_encoded(encoder, text) for text in kept)


def test_a_word_of_the_real_limit_is_kept_and_a_longer_one_is_not():
    for text in ("x" * MAX_WORD_BYTES, "word " * 100_000, " ".join(SENTENCES) * 100):
        assert is_kept(text) and is_kept(f"{text}.")
    assert not is_kept("A word. " * 9000 + "x" * (MAX_WORD_BYTES + 1)) and not is_kept("é" * 40_000)


def require_same_rows(spec: str, tokenizer, folder: Path, **settings) -> dict[str, int]:
    """Asserts that `check` and `prepare` count the same rows; returns the rejects."""
    checked = check_source(spec, **settings).stats
    stored = prepare(spec, tokenizer, folder, validation_share=0.2, workers=1, **settings).manifest
    assert (stored.rows_in, stored.kept, stored.rejects) == (checked.rows_in, checked.kept, checked.rejects)
    assert stored.kept > 1
    return stored.rejects


ODD = ["x" * (MAX_WORD_BYTES + 1), "1" * (MAX_WORD_BYTES + 1), "\0", " ", "tiny"]
ROWS = [{"text": text} for text in (*DOCUMENTS, *ODD)]
SYNTHETIC = {
    "a.jsonl": as_jsonl([*ROWS, 5, b"{", b"\xff", {"other": "a"}]),
    "b.jsonl.bz2": bz2.compress(as_jsonl(ROWS[::-1])),
    "c.csv": "text\n" + "".join(f'"{text}"\n' for text in SENTENCES * 2) + "a,b\n",
    "d.txt": "<|endoftext|>".join((*SENTENCES, *SENTENCES[:5], "x" * (MAX_WORD_BYTES + 1))),
    "e.md": "\n\n".join(f"{n}. {sentence}" for n in range(40) for sentence in SENTENCES),  # is cut
    "f.log": " ".join(SENTENCES).encode("utf-16"),
    "g.png": b"\x89PNG",
}
CHATS = [chat_row(f"Say {n % 70}.", f"It is {n % 7}.") for n in range(200)]
CHATS += [chat_row("Say it.", ""), chat_row("Long", "x" * 99_999), chat_row("Bad", "No.", label=False), {"a": 1}]


STRICT = Filters(min_characters=30, max_characters=8000, min_letters=0.7, min_latin=0.5, max_repetition=0.5)


@pytest.mark.parametrize("filters", [None, STRICT], ids=["all", "filtered"])
@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.bz2", "c.csv", "d.txt", "e.md", "folder", "texts.zip"])
def test_check_and_prepare_keep_the_same_documents(name, filters, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 1000)
    folder = tmp_path / "folder"
    for file, content in SYNTHETIC.items():
        write(folder, file, content)
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        for file, content in SYNTHETIC.items():
            archive.writestr(file, content)
    path = folder / name if name in SYNTHETIC else tmp_path / name
    rejects = require_same_rows(f"text={path}", tokenizer, tmp_path / "store", filters=filters)
    assert name == "e.md" or sum(rejects.values()) > 3


def test_check_and_prepare_keep_the_same_conversations(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 1000)
    spec = f"messages={write(tmp_path, 'chats.jsonl', CHATS)}"
    rejects = require_same_rows(spec, tokenizer, tmp_path / "store")
    assert {"duplicate", "empty reply", "marked as bad", "missing field"} <= set(rejects)
    evaluation = write(tmp_path, "test.jsonl", [{"q": " ".join(SENTENCES[:3])}])
    write(tmp_path, "more.jsonl", [*CHATS, chat_row("Go on.", " ".join(SENTENCES[:3]))])
    spec = f"messages={tmp_path / 'more.jsonl'}"
    settings = {"evaluation": [str(evaluation)], "filters": Filters(max_characters=1000)}
    rejects = require_same_rows(spec, tokenizer, tmp_path / "other", **settings)
    assert (rejects["contaminated"], rejects["over-long"]) == (1, 1)


REAL = {
    "alpaca/alpaca_tiny.json": "alpaca",
    "alpaca/seed_tasks.jsonl": "alpaca",
    "chat/openai_sft.jsonl": "messages",
    "chat/tulu3_oasst1_sft_sample.jsonl": "oasst",
    "chat/deita_subset_test_sft.parquet": "messages",
    "corpus_prose/val.jsonl": "prose",
    "dailydialog/test.zip": "dailydialog",
    "gsm8k/test.jsonl": "gsm8k",
    "math_dataset/hf_byte_literals.jsonl": "math_dataset",
    "mbpp": "mbpp",
    "natural_questions/simplified-nq-sample.jsonl": "natural_questions",
    "pile/pile_sample.jsonl.zst": "pile",
    "preference/kto_en_demo.json": "messages",
    "tinystories/tinystories_sample.txt": "tinystories",
    "tinyshakespeare": "tiny_shakespeare",
    "wikitext2/wiki.valid.tokens": "wikitext",
}


@pytest.mark.parametrize("path", REAL)
def test_check_and_prepare_keep_the_same_rows_of_real_files(path, tokenizer, tmp_path, shared_data, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 100_000)
    require_same_rows(f"{REAL[path]}={shared_data / path}", tokenizer, tmp_path / "store")
