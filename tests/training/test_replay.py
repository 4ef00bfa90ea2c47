"""Replayed documents: which ones are drawn, and how they become rows."""

import numpy as np
import pytest
from support import DOCUMENTS, SHARE, decode, write_documents

from rorchat.chatml import encode_text
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.tokenizer import train_tokenizer
from rorchat.tokens.prepare import prepare
from rorchat.training.replay import replay_rows
from rorchat.validation_split import is_validation_text


def decode_rows(rows, tokenizer) -> list[str]:
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


@pytest.fixture
def places(store, spec) -> dict[str, str]:
    return {"store": str(store.folder), "spec": spec, "store=": f"store={store.folder}"}


@pytest.mark.parametrize("place", ["store", "spec", "store="])
def test_rows_are_training_documents_only(place, places, store, tokenizer):
    total = sum(
        len(ids) + 2 for ids in encode_text(tokenizer, [d for d in DOCUMENTS if not is_validation_text(d, SHARE)])
    )
    rows = replay_rows(places[place], tokenizer, total // 2, 1000, 0, SHARE)
    validation = decode(store, "validation", tokenizer)
    texts = decode_rows(rows, tokenizer)
    assert len(validation) > 5 and len(texts) > 20 and not set(validation) & set(texts)
    assert set(texts[:-1]) <= set(decode(store, "train", tokenizer))  # the last row is cut
    end_of_text = store.manifest.end_of_text_id
    for row in rows[:-1]:
        ids, labels = row["input_ids"], row["labels"]
        assert ids[0] == ids[-1] == end_of_text and end_of_text not in ids[1:-1]
        assert labels == [-100, *ids[1:]]


@pytest.mark.parametrize("tokens", [2, 3, 50, 51, 52, 777])
def test_token_count_is_exact_or_one_less(tokens, store, tokenizer):
    rows = replay_rows(str(store.folder), tokenizer, tokens, 16, 0, SHARE)
    assert sum(len(row["input_ids"]) for row in rows) in (tokens, tokens - 1)
    assert all(2 <= len(row["input_ids"]) == len(row["labels"]) <= 16 for row in rows)


def test_long_document_continues_after_an_end_of_text(tokenizer, tmp_path):
    text = " ".join(f"word{n}" for n in range(100))
    spec = write_documents(tmp_path, [text] * 2)
    ids = encode_text(tokenizer, [text])[0]
    end_of_text = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = replay_rows(spec, tokenizer, len(ids) + 1 + -(-(len(ids) + 1) // 19), 20, 0, 0.0)
    assert all(row["input_ids"][0] == end_of_text for row in rows)
    assert [token for row in rows for token in row["input_ids"][1:]] == [*ids, end_of_text]
    assert [len(row["input_ids"]) for row in rows[:-1]] == [20] * (len(rows) - 1) and len(rows) > 10


def test_seed_selects_the_documents_of_a_store(store, tokenizer):
    first, again, other = (replay_rows(str(store.folder), tokenizer, 300, 64, seed, SHARE) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(decode_rows(first, tokenizer)) & set(decode_rows(other, tokenizer))) < len(first) / 2


def test_generated_source_is_split_by_the_same_hash(tokenizer):
    rows = replay_rows("tinytown=300", tokenizer, 5000, 1000, 0, 0.3)
    texts = decode_rows(rows, tokenizer)[:-1]
    assert len(texts) > 20 and not any(is_validation_text(text, 0.3) for text in texts)


def test_unusable_sources_raise(places, spec, tokenizer, tmp_path):
    for source in places.values():
        with pytest.raises(DataError, match=r"training tokens, but 1,000,000 are to be replayed: give"):
            replay_rows(source, tokenizer, 1_000_000, 64, 0, SHARE)
    for tokens, max_length, message in ((1, 64, "tokens is 1"), (9, 1, "max_length is 1")):
        with pytest.raises(UsageError, match=message):
            replay_rows(spec, tokenizer, tokens, max_length, 0, SHARE)
    with pytest.raises(UsageError, match="'persona' has conversations and preferences, but documents are expected"):
        replay_rows("persona=5", tokenizer, 9, 64, 0, SHARE)
    prepare("chat:tinytown=60", tokenizer, tmp_path / "talk", validation_share=SHARE)
    with pytest.raises(UsageError, match="holds conversations, but only documents can be replayed"):
        replay_rows(str(tmp_path / "talk"), tokenizer, 9, 64, 0, SHARE)
    other = train_tokenizer(["other words than those"], vocab_size=320)
    with pytest.raises(MismatchError, match="made with another tokenizer"):
        replay_rows(places["store"], other, 9, 64, 0, SHARE)
    with pytest.raises(DataError, match="not a token store"):
        replay_rows(f"store={tmp_path}", tokenizer, 9, 64, 0, SHARE)


def test_damaged_document_table_is_named(store, tokenizer):
    table = store.folder / "train-00000.docs.npy"
    starts = np.load(table)
    starts[3] += 1
    np.save(table, starts)
    with pytest.raises(DataError, match=r"train-00000.docs.npy is damaged: its sha256 differs"):
        replay_rows(str(store.folder), tokenizer, 9, 64, 0, SHARE)


def test_files_that_are_not_read_are_named(tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(" ".join(f"It was sentence number {number}." for number in range(99)))
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    replay_rows(f"text={tmp_path}", tokenizer, 100, 64, 0, 1e-9)
    assert "1 file not read (less than 1% of the bytes): b.png (unknown suffix" in capsys.readouterr().err
