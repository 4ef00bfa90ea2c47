"""A prepared store contains exactly the usable documents of its source."""

import copy
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from support import COPIES, DOCUMENTS, KEPT, SHARE, decode, hash_files, json_lines, write_documents

from rorchat.chatml import END_OF_TEXT, encode_conversation, encode_text
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.files import json_sha256
from rorchat.mixture.stores import count_rows_per_epoch
from rorchat.persona import load_persona
from rorchat.reading import parts as split_parts
from rorchat.reading.filters import Filters
from rorchat.reading.long_texts import Limits
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import Manifest, TokenStore
from rorchat.validation_split import is_validation_text, text_digest


def test_a_store_decodes_to_its_documents(store, tokenizer):
    assert decode(store, "train", tokenizer) == [text for text in KEPT if not is_validation_text(text, SHARE)]
    assert decode(store, "validation", tokenizer) == [text for text in KEPT if is_validation_text(text, SHARE)]


def test_every_document_starts_with_the_end_of_text_token(store, tokenizer):
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    expected = [
        token
        for text, ids in zip(KEPT, encode_text(tokenizer, KEPT), strict=True)
        if not is_validation_text(text, SHARE)
        for token in [end, *ids]
    ]
    assert store.slice("train", 0, store.tokens("train")).tolist() == expected
    # A control string in a text does not start a document
    assert expected.count(end) == store.manifest.total("train", "documents")


def test_manifest_counts_match_the_documents(store, tokenizer):
    manifest = store.manifest
    assert (manifest.rows_in, manifest.kept) == (len(DOCUMENTS), len(KEPT))
    assert manifest.rejects == {"duplicate": len(COPIES)}
    for split, documents in (
        ("train", [text for text in KEPT if not is_validation_text(text, SHARE)]),
        ("validation", [text for text in KEPT if is_validation_text(text, SHARE)]),
    ):
        assert len(documents) > 5
        assert manifest.total(split, "documents") == len(documents)
        assert manifest.total(split, "utf8_bytes") == sum(len(text.encode()) for text in documents)
        tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, documents))
        assert manifest.total(split, "tokens") == store.tokens(split) == tokens
        assert manifest.summary()[f"{split}_tokens"] == tokens
    assert manifest.vocabulary_size == len(tokenizer) == 384
    assert Manifest.read(store.folder) == manifest


def test_the_manifest_counts_rejected_rows(tokenizer, tmp_path):
    spec = write_documents(tmp_path, DOCUMENTS)
    with open(spec.partition("=")[2], "a", encoding="utf-8") as file:
        file.write('5\n{"text": " "}\n{"text": "\\ud800"}\n')
    manifest = prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest
    duplicates = len(COPIES)
    assert manifest.rejects == {"wrong type": 1, "empty text": 1, "invalid Unicode": 1, "duplicate": duplicates}
    assert manifest.rows_in == manifest.kept + 3 + duplicates == len(DOCUMENTS) + 3


def test_the_sha256_in_the_manifest_is_that_of_the_file(store):
    assert len(store.manifest.shards) >= 2
    for shard in store.manifest.shards:
        assert hashlib.sha256((store.folder / shard.file).read_bytes()).hexdigest() == shard.sha256
        assert hashlib.sha256((store.folder / shard.docs_file).read_bytes()).hexdigest() == shard.docs_sha256


def test_a_second_run_writes_the_same_bytes(spec, store, tokenizer, tmp_path):
    again = prepare(spec, tokenizer, tmp_path / "again", validation_share=SHARE)
    assert hash_files(again.folder) == hash_files(store.folder)


def test_a_complete_store_is_opened_without_reading_the_source(spec, store, tokenizer):
    Path(spec.partition("=")[2]).unlink()  # reading it again would fail
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    reopened = prepare(spec, tokenizer, store.folder, validation_share=SHARE)
    assert reopened.manifest == store.manifest
    assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_file_names_need_not_be_valid_utf8(tokenizer, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"Document {n % 50}"}) + "\n" for n in range(60))
    with open(os.fsencode(folder) + b"/caf\xe9.jsonl", "w", encoding="utf-8") as file:
        file.write(rows)
    store = prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE)
    assert (store.manifest.rows_in, store.manifest.rejects) == (60, {"duplicate": 10})
    assert TokenStore(store.folder).manifest == store.manifest and "jsonl:51" in capsys.readouterr().err


def test_conversations_are_stored_with_control_tokens(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n} <|im_end|>"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = prepare(f"messages={tmp_path / 'chat.jsonl'}", tokenizer, tmp_path / "s", validation_share=SHARE)
    expected = {
        (store.manifest.end_of_text_id, *encode_conversation(tokenizer, row["messages"]).input_ids) for row in rows
    }
    actual = set()
    for shard in store.manifest.shards:
        ids, starts = np.load(store.folder / shard.file), np.load(store.folder / shard.docs_file)
        actual |= {tuple(ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)}
    assert actual == expected
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("RorChat", "Bibo")
    with pytest.raises(MismatchError, match="chat_template_sha256"):
        prepare(store.manifest.source, other, store.folder, validation_share=SHARE)


def test_filters_and_evaluation_sets_are_part_of_the_fingerprint(tokenizer, tmp_path):
    question = "Natalia sold clips to forty eight of her friends in April and then she sold half as many clips in May"
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": question}) + "\n")
    documents = [*DOCUMENTS, f"As it is told: {question}. So it was.", "tiny"]
    spec = write_documents(tmp_path, documents, "all.jsonl")
    settings = {"filters": Filters(min_characters=10), "evaluation": [str(tmp_path / "test.jsonl")]}
    store = prepare(spec, tokenizer, tmp_path / "s", validation_share=SHARE, **settings)
    assert store.manifest.rejects == {"contaminated": 1, "duplicate": len(COPIES), "too short": 1}
    assert store.manifest.rows_in == store.manifest.kept + sum(store.manifest.rejects.values()) == len(documents)
    with pytest.raises(MismatchError, match="filters"):
        prepare(spec, tokenizer, tmp_path / "s", validation_share=SHARE)


def test_copies_with_other_case_or_spacing_are_in_the_same_split(tokenizer, tmp_path):
    originals = [f"The story number {n} is told." for n in range(200)]
    copies = [text.upper() for text in originals] + [f" {text.replace(' ', '  ')}\n\n" for text in originals]
    store = prepare(
        write_documents(tmp_path, originals + copies + originals), tokenizer, tmp_path / "s", validation_share=SHARE
    )
    train, validation = (
        {" ".join(text.lower().split()) for text in decode(store, split, tokenizer)}
        for split in ("train", "validation")
    )
    assert train & validation == set()
    assert len(train) + len(validation) == 200 and 20 < len(validation) < 60


def test_a_store_with_different_settings_is_refused(spec, store, tokenizer, tmp_path):
    from rorchat.tokenizer import train_tokenizer

    other = train_tokenizer(DOCUMENTS, vocab_size=384)
    with pytest.raises(
        MismatchError, match="contains a different token store: tokenizer_sha256 .* Delete it"
    ) as failure:
        prepare(spec, other, store.folder, validation_share=SHARE)
    assert failure.value.exit_code == 78 and "\n" not in str(failure.value)
    with pytest.raises(MismatchError, match=f"validation_share {SHARE}, now 0.3"):
        prepare(spec, tokenizer, store.folder, validation_share=0.3)
    with pytest.raises(MismatchError, match="source .*now 'tinytown=10'"):
        prepare("tinytown=10", tokenizer, store.folder, validation_share=SHARE)
    with pytest.raises(DataError, match="No file or folder .*mistyped"):
        prepare(f"{spec}-mistyped", tokenizer, store.folder, validation_share=SHARE)


def test_a_store_is_refused_if_its_source_has_changed(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    spec = f"text={folder}"
    write_documents(folder, DOCUMENTS)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "nothing of the kind " * 5}))
    settings = {"validation_share": SHARE, "evaluation": [str(tmp_path / "test.jsonl")]}
    made = prepare(spec, tokenizer, tmp_path / "store", **settings)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.doc").write_bytes(b"\0")
    for seed in (0, 1):  # not used for files
        assert prepare(spec, tokenizer, tmp_path / "store", seed=seed, **settings).manifest == made.manifest
    before = (folder / "documents.jsonl").read_text()
    (folder / "documents.jsonl").write_text(before.replace("small", "great"))
    with pytest.raises(MismatchError, match="its source .* has changed. Delete it") as failure:
        prepare(spec, tokenizer, tmp_path / "store", **settings)
    assert "\n" not in str(failure.value) and failure.value.exit_code == 78
    (folder / "documents.jsonl").write_text(before)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "nothing of that kind " * 5}))
    with pytest.raises(MismatchError, match=f"evaluation differs in {tmp_path / 'test.jsonl'}"):
        prepare(spec, tokenizer, tmp_path / "store", **settings)
    (tmp_path / "test.jsonl").unlink()  # missing files count as unchanged
    assert prepare(spec, tokenizer, tmp_path / "store", **settings).manifest == made.manifest


def test_generated_stores_depend_on_seed_and_persona(tokenizer, tmp_path):
    settings = {"tokenizer": tokenizer, "folder": tmp_path / "store", "validation_share": SHARE, "workers": 1}
    prepare("persona=60", **settings)
    prepare("persona=60", **settings, persona=load_persona())
    with pytest.raises(MismatchError, match="seed 0, now 1"):
        prepare("persona=60", **settings, seed=1)
    with pytest.raises(MismatchError, match="persona"):
        prepare("persona=60", **settings, persona=dataclasses.replace(load_persona(), name="Zebulon"))


@pytest.mark.parametrize("place", ["store", "deep/store"])
def test_a_store_inside_its_source_folder_is_refused(place, tokenizer, tmp_path):
    write_documents(tmp_path, DOCUMENTS)
    with pytest.raises(UsageError, match="is inside the source folder"):
        prepare(f"text={tmp_path}", tokenizer, tmp_path / place, validation_share=SHARE)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_conversations_that_differ_in_white_space_are_kept(tokenizer, tmp_path):
    pairs = [(f"Sort {n} 1 23.", f"{n} 1 23") for n in range(40)] + [
        (f"Sort {n} 12 3.", f"{n} 12 3") for n in range(40)
    ]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:3]))
    store = prepare(f"messages={tmp_path / 'chat.jsonl'}", tokenizer, tmp_path / "s", validation_share=SHARE)
    assert (store.manifest.kept, store.manifest.rejects) == (80, {"duplicate": 3})


def test_a_store_of_documents_does_not_depend_on_the_system_message(spec, store, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("RorChat", "Bibo")
    assert prepare(spec, other, store.folder, validation_share=SHARE).manifest == store.manifest


@pytest.mark.parametrize(("share", "alone"), [(0.0, "validation"), (1e-9, "validation"), (1.0, "train")])
def test_a_split_that_would_be_empty_has_one_document(share, alone, spec, tokenizer, tmp_path, capsys):
    store = prepare(spec, tokenizer, tmp_path / "store", validation_share=share)
    other = {"train": "validation", "validation": "train"}[alone]
    chosen = (min if alone == "validation" else max)(KEPT, key=lambda text: text_digest(text))
    copies = [text for text in KEPT if text_digest(text) == text_digest(chosen)]
    assert decode(store, alone, tokenizer) == copies
    assert decode(store, other, tokenizer) == [text for text in KEPT if text not in copies]
    assert store.verify() == [] and store.manifest.kept == len(KEPT)
    expected = "no document: the one with the smallest hash is" if alone == "validation" else "every document: the one"
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"  validation_share {share:g} would hold out {expected}")
    assert line.endswith(f"documents.jsonl:{DOCUMENTS.index(chosen) + 1}")


def test_a_document_is_not_held_out_if_little_would_be_left_to_train_on(tokenizer, tmp_path):
    for number in range(8):
        texts = [f"Short text {number}.", f"It was the long text number {number}. " * 50]
        store = prepare(write_documents(tmp_path, texts), tokenizer, tmp_path / f"{number}", validation_share=1e-9)
        assert decode(store, "validation", tokenizer) == texts[:1]


def test_spellings_of_one_text_move_together(tokenizer, tmp_path):
    texts = [text for number in range(3) for text in (f"It was {number}.", f"IT  was {number}. ", f"it was\n{number}.")]
    store = prepare(write_documents(tmp_path, texts), tokenizer, tmp_path / "store", validation_share=1e-9)
    held_out = decode(store, "validation", tokenizer)
    assert len(held_out) == 3 and len({"".join(text.lower().split()) for text in held_out}) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_the_only_document_is_divided(workers, tokenizer, tmp_path, capsys):
    text = " ".join(f"It was sentence number {number}." for number in range(40))
    texts = [text] * 3
    store = prepare(
        write_documents(tmp_path, texts), tokenizer, tmp_path / f"{workers}", validation_share=0.01, workers=workers
    )
    pieces = decode(store, "train", tokenizer) + decode(store, "validation", tokenizer)
    assert len(pieces) == 10 and store.manifest.total("validation", "documents") == 1
    assert sorted(" ".join(pieces).split()) == sorted(text.split()) and all(piece[-1] == "." for piece in pieces)
    assert (store.manifest.rows_in, store.manifest.kept, store.manifest.rejects) == (30, 10, {"duplicate": 20})
    assert "  the only document was divided into 10; validation_share 0.01 would hold out no" in capsys.readouterr().err


def test_a_single_sentence_or_conversation_is_refused_and_leaves_no_folder(tokenizer, tmp_path):
    spec = write_documents(tmp_path, ["It was the best of times."] * 2)
    with pytest.raises(DataError, match="has one document, which cannot be divided between training and validation"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    row = {"messages": [{"role": "user", "content": "Hello. You there?"}, {"role": "assistant", "content": "Hi. Yes."}]}
    (tmp_path / "documents.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="has one conversation, which cannot be divided") as failure:
        prepare(f"messages={tmp_path / 'documents.jsonl'}", tokenizer, tmp_path / "store", validation_share=SHARE)
    assert "\n" not in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_store_of_an_earlier_version_is_kept_with_a_message(spec, store, tokenizer, monkeypatch, capsys):
    manifest = json.loads((store.folder / "manifest.json").read_text())
    earlier = {key: value for key, value in manifest.items() if key not in ("long_texts", "decoded", "sha256")}
    (store.folder / "manifest.json").write_text(json.dumps({**earlier, "sha256": json_sha256(earlier)}))
    assert prepare(spec, tokenizer, store.folder, validation_share=SHARE).manifest.long_texts == 0
    assert "was made by an earlier version, which did not cut long texts" in capsys.readouterr().err


def test_a_store_with_texts_cut_elsewhere_is_refused(spec, store, tokenizer, monkeypatch):
    assert store.manifest.long_texts == 8000
    monkeypatch.setattr("rorchat.sources.text.LONG_TEXTS", Limits(500))
    with pytest.raises(MismatchError, match="long texts were cut at about 8,000 characters, now 500"):
        prepare(spec, tokenizer, store.folder, validation_share=SHARE)


def test_a_failing_source_leaves_no_folder(tokenizer, tmp_path):
    spec = write_documents(tmp_path, [])
    with pytest.raises(DataError, match="is empty"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_ids_above_65535_are_stored_in_32_bits(spec, store, tokenizer, tmp_path):
    assert np.load(store.folder / "train-00000.npy").dtype == np.uint16
    large = copy.deepcopy(tokenizer)
    large.add_tokens([f"word{number}" for number in range(66_000)])
    documents = [f"A text with word{number} and word65999" for number in range(40)]
    stored = prepare(
        write_documents(tmp_path, documents, "large.jsonl"), large, tmp_path / "large", validation_share=SHARE
    )
    assert np.load(stored.folder / "train-00000.npy").dtype == np.uint32
    ids = stored.slice("train", 0, stored.tokens("train"))
    assert ids.max() == large.convert_tokens_to_ids("word65999") > 65_535
    assert sorted(decode(stored, "train", large) + decode(stored, "validation", large)) == sorted(documents)


def test_ids_of_gpt2_are_stored_in_16_bits(gpt2_tokenizer, spec, tmp_path):
    store = prepare(spec, gpt2_tokenizer, tmp_path / "gpt2", validation_share=SHARE)
    assert np.load(store.folder / "train-00000.npy").dtype == np.uint16
    assert store.slice("train", 0, 1).tolist() == [50256]
    assert decode(store, "train", gpt2_tokenizer) == [text for text in KEPT if not is_validation_text(text, SHARE)]


def marked_chats(count: int) -> list[dict]:
    """Conversations of two exchanges, in every second of which the first reply is not learned."""
    marks = ({"weight": 0}, {})
    return [
        {"messages": [
            {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"no{n}", **marks[n % 2]},
            {"role": "user", "content": "Again."}, {"role": "assistant", "content": f"yes{n}"},
        ]}
        for n in range(count)
    ]  # fmt: skip


def test_a_reply_that_is_not_learned_has_no_labels_in_a_store(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(split_parts, "SMALLEST_PART", 2_000)
    rows = marked_chats(60)
    path = tmp_path / "chat.jsonl"
    path.write_text(json_lines(*rows, rows[0], rows[1]))  # the last two are duplicates
    store = prepare(f"messages={path}", tokenizer, tmp_path / "s", validation_share=SHARE, workers=1)
    assert store.manifest.rejects == {"duplicate": 2} and len(store.manifest.shards) > 3 and store.verify() == []
    learned = ""
    for split in ("train", "validation"):
        assert store.has_untrained(split)
        ids = store.slice(split, 0, store.tokens(split))
        labels = store.labels(split, 0, ids)
        assert ((labels == ids) | (labels == -100)).all()
        for start in range(0, len(ids), 37):  # rows of a mixture begin anywhere
            piece = store.slice(split, start, min(start + 50, len(ids)))
            assert (store.labels(split, start, piece) == labels[start : start + 50]).all()
        assert tokenizer.decode(ids[labels == -100].tolist()).count("assistant\nno") > 2
        learned += tokenizer.decode(labels[labels != -100].tolist())
    assert set(re.findall(r"(?:no|yes)\d+", learned)) == {
        *(f"yes{n}" for n in range(60)), *(f"no{n}" for n in range(1, 60, 2)),
    }  # fmt: skip


def test_marks_are_part_of_the_content_of_a_store_and_are_verified(tokenizer, tmp_path):
    digests, rows = set(), marked_chats(20)
    for name, chats in (("marked", rows), ("plain", [{"messages": strip_marks(row["messages"])} for row in rows])):
        (tmp_path / f"{name}.jsonl").write_text(json_lines(*chats))
        store = prepare(f"messages={tmp_path / name}.jsonl", tokenizer, tmp_path / name, validation_share=SHARE)
        digests.add(store.manifest.content_sha256())
    assert len(digests) == 2 and not store.has_untrained("train")
    assert not list((tmp_path / "plain").glob("*.untrained.npy"))
    table = tmp_path / "marked" / "train-00000.untrained.npy"
    table.write_bytes(table.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"train-00000.untrained.npy is damaged: its sha256 differs"):
        TokenStore(tmp_path / "marked")


def strip_marks(messages: list[dict]) -> list[dict]:
    return [{"role": turn["role"], "content": turn["content"]} for turn in messages]


@pytest.mark.parametrize(
    ("filters", "reason", "thresholds"),
    [
        (Filters(min_characters=5000), "too short", "min_characters 5000"),
        (Filters(max_characters=3), "over-long", "max_characters 3"),
        (Filters(min_latin=0.1, min_letters=1.0), "few letters", "min_letters 1, min_latin 0.1"),
    ],
)
def test_the_error_names_the_filter_that_took_all_rows(filters, reason, thresholds, tokenizer, tmp_path):
    spec = write_documents(tmp_path, [f"1{text}1" for text in DOCUMENTS])
    advice = rf"Loosen the filters \({thresholds}\), or use another source."
    with pytest.raises(DataError, match=rf"No row of {spec} can be used: \d+ {reason}, first at .*:1 \(.*{advice}"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE, filters=filters)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_errors_about_too_few_rows_name_what_was_rejected(tokenizer, tmp_path):
    spec, settings = write_documents(tmp_path, [*DOCUMENTS, "x" * 300]), {"validation_share": SHARE}
    with pytest.raises(DataError, match=r"has one document.* give more. Rejected were \d+ too short, first at"):
        prepare(spec, tokenizer, tmp_path / "store", filters=Filters(min_characters=200), **settings)
    store = prepare(spec, tokenizer, tmp_path / "store", filters=Filters(min_characters=50), **settings)
    with pytest.raises(
        DataError, match=rf"one row of 9999: .* Of {len(DOCUMENTS) + 1} rows, 121 were kept: 3 duplicate, 3 too short"
    ):
        count_rows_per_epoch([store], 9999)


def test_files_that_are_not_read_are_named_when_a_store_is_made_and_when_it_is_opened(tokenizer, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_documents(folder, DOCUMENTS)
    (folder / "cover.png").write_bytes(b"\x89PNG")
    for _ in range(2):
        prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE)
        lines = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
        assert len(lines) == 1
        assert "1 file not read (less than 1% of the bytes): cover.png (unknown suffix .png, not" in lines[0]
