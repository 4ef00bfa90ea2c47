"""TOKENS: what is stored is what was read."""

import copy
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32 as zlib_crc32

import numpy as np
import pytest
import torch

from rorchat.chatml import END_OF_TEXT, encode_conversation, encode_text
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.persona import load_persona
from rorchat.sources import Filters, _parts, find, in_validation, parts
from rorchat.tokens import part
from rorchat.tokens.batch import padded
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import Manifest, TokenStore, crc_of_blocks

SHARE = 0.2
DOCUMENTS = [
    f"Document {n}: the {'very ' * (n % 7)}small model says “naïve café 你好 🙂” {n} times.\n" for n in range(120)
]
DOCUMENTS += ["  LEADING blanks and CAPITALS  ", "leading Blanks\nand capitals", "text that says <|endoftext|> itself"]
COPIES = [DOCUMENTS[3]] * 3  # the second of the blanks and capitals above is no copy of the first
DOCUMENTS += COPIES
KEPT = DOCUMENTS[: -len(COPIES)]


def write_documents(folder: Path, documents: list[str], name: str = "documents.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return f"text={path}"


def decoded(store: TokenStore, split: str, tokenizer) -> list[str]:
    """The documents of a split, cut at the document starts that the store keeps beside each shard."""
    documents = []
    for shard in store.manifest.shards:
        if shard.split == split:
            ids = np.load(store.folder / shard.file)
            starts = np.load(store.folder / shard.file.replace(".npy", ".docs.npy"))
            assert (ids[starts] == store.manifest.end_of_text_id).all()
            assert len(starts) == shard.documents
            documents += [
                tokenizer.decode(ids[start + 1 : end].tolist())
                for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
            ]
    return documents


def files_of(folder: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert len(found) >= 5
    return found


@pytest.fixture
def spec(tmp_path) -> str:
    return write_documents(tmp_path, DOCUMENTS)


@pytest.fixture
def store(spec, tokenizer, tmp_path) -> TokenStore:
    return prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)


def test_a_store_decodes_to_the_documents_it_was_made_of(store, tokenizer):
    assert decoded(store, "train", tokenizer) == [text for text in KEPT if not in_validation(text, SHARE)]
    assert decoded(store, "validation", tokenizer) == [text for text in KEPT if in_validation(text, SHARE)]


def test_the_ids_of_a_store_are_each_document_after_an_end_of_text(store, tokenizer):
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    expected = [
        token
        for text, ids in zip(KEPT, encode_text(tokenizer, KEPT), strict=True)
        if not in_validation(text, SHARE)
        for token in [end, *ids]
    ]
    assert store.slice("train", 0, store.tokens("train")).tolist() == expected
    # A text that spells a control token does not begin a document
    assert expected.count(end) == store.manifest.total("train", "documents")


def test_the_manifest_adds_up(store, tokenizer):
    manifest = store.manifest
    assert (manifest.rows_in, manifest.kept) == (len(DOCUMENTS), len(KEPT))
    assert manifest.rejects == {"duplicate": len(COPIES)}
    for split, documents in (
        ("train", [text for text in KEPT if not in_validation(text, SHARE)]),
        ("validation", [text for text in KEPT if in_validation(text, SHARE)]),
    ):
        assert len(documents) > 5
        assert manifest.total(split, "documents") == len(documents)
        assert manifest.total(split, "utf8_bytes") == sum(len(text.encode()) for text in documents)
        tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, documents))
        assert manifest.total(split, "tokens") == store.tokens(split) == tokens
        assert manifest.summary()[f"{split}_tokens"] == tokens
    assert manifest.vocabulary_size == len(tokenizer) == 384
    assert Manifest.read(store.folder) == manifest


def test_the_manifest_counts_what_was_rejected(tokenizer, tmp_path):
    spec = write_documents(tmp_path, DOCUMENTS)
    with open(spec.partition("=")[2], "a") as file:
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
    assert files_of(again.folder) == files_of(store.folder)


def test_a_finished_store_is_found_and_not_made_again(spec, store, tokenizer):
    Path(spec.partition("=")[2]).unlink()  # it would fail if it were read again
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    found = prepare(spec, tokenizer, store.folder, validation_share=SHARE)
    assert found.manifest == store.manifest
    assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


@pytest.fixture
def folder_of_parts(tmp_path, monkeypatch) -> str:
    """The documents in seven files of two formats, in parts so small that a file is read in several."""
    monkeypatch.setattr(_parts, "SMALLEST_PART", 300)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(7):
        write_documents(folder, DOCUMENTS[number * 18 : (number + 1) * 18], f"{number}.jsonl")
    assert len(parts(f"text={folder}")) > 15
    return f"text={folder}"


def test_several_shards_read_the_same_as_one(folder_of_parts, store, tokenizer, tmp_path):
    many = prepare(folder_of_parts, tokenizer, tmp_path / "many", validation_share=SHARE, workers=1)
    assert sum(shard.split == "train" for shard in many.manifest.shards) > 5
    assert sum(shard.split == "validation" for shard in many.manifest.shards) > 1
    for split in ("train", "validation"):
        tokens = store.tokens(split)
        assert many.tokens(split) == tokens
        whole = store.slice(split, 0, tokens)
        assert (many.slice(split, 0, tokens) == whole).all()
        for start in range(0, tokens - 1, 17):
            for stop in (start + 1, start + 16, min(start + 450, tokens)):
                assert (many.slice(split, start, min(stop, tokens)) == whole[start:stop]).all()
        assert decoded(many, split, tokenizer) == decoded(store, split, tokenizer)
        for what in ("documents", "utf8_bytes"):
            assert many.manifest.total(split, what) == store.manifest.total(split, what)
    assert store.slice("train", 0, 5).dtype == np.int64


def test_a_store_is_the_same_bytes_for_any_number_of_workers(folder_of_parts, tokenizer, tmp_path):
    stores = [
        prepare(folder_of_parts, tokenizer, tmp_path / f"by-{workers}", validation_share=SHARE, workers=workers)
        for workers in (1, 2, 4)
    ]
    first, *others = [files_of(store.folder) for store in stores]
    assert len(first) > 20 and all(other == first for other in others)


@pytest.mark.parametrize("parts_done", [1, 10, 25])
def test_a_preparation_killed_in_the_middle_and_run_again_gives_the_same_bytes(parts_done, tmp_path):
    """In a process of its own, with its workers: SIGKILL leaves nobody to clean up."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(40):
        write_documents(folder, [f"{text} {number}" for text in DOCUMENTS], f"{number:02d}.jsonl")
    script = (
        "import sys, time\n"
        "from rorchat.sources import _parts\n"
        "from rorchat.tokens import part\n"
        "from rorchat.tokens.prepare import prepare\n"
        "from rorchat.tokenizer import train_tokenizer\n"
        "_parts.SMALLEST_PART = 5000\n"
        "slow = part.Job.prepare\n"
        "def prepared(*arguments):\n"
        "    time.sleep(float(sys.argv[3])); slow(*arguments)\n"
        "part.Job.prepare = prepared\n"
        f"tokenizer = train_tokenizer({DOCUMENTS[:40]!r}, vocab_size=384)\n"
        "prepare(sys.argv[1], tokenizer, sys.argv[2], validation_share=0.2, workers=2)\n"
    )

    def command(target: str, pause: str) -> list[str]:
        return [sys.executable, "-c", script, f"text={folder}", str(tmp_path / target), pause]

    process = subprocess.Popen(command("killed", "0.05"), stderr=subprocess.DEVNULL)
    left = tmp_path / ".killed.unfinished"
    while len(list(left.glob("part-*.json"))) < parts_done:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(list(left.glob("part-*.json"))) < 40 and not (tmp_path / "killed").exists()
    subprocess.run(command("killed", "0"), check=True, capture_output=True)
    subprocess.run(command("whole", "0"), check=True, capture_output=True)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole") and not left.exists()


def test_finished_parts_are_not_prepared_again(folder_of_parts, tokenizer, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    monkeypatch.setattr("rorchat.tokens.part.Job.prepare", interrupted)
    again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT)


def test_a_store_that_another_process_is_making_is_left_to_it(spec, tokenizer, tmp_path):
    from rorchat.tokens.prepare import alone

    with alone(tmp_path / "store"), pytest.raises(MismatchError, match="is being prepared by another process"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    assert prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest.kept == len(KEPT)
    assert not (tmp_path / ".store.lock").exists()


def test_a_lock_that_is_deleted_while_another_process_opens_it_lets_only_one_in(tokenizer, tmp_path, monkeypatch):
    import fcntl

    from rorchat.tokens.prepare import alone

    holder = alone(tmp_path / "store")
    holder.__enter__()
    flock, opened = fcntl.flock, []

    def late(file, operation):  # the holder is done between the opening of the file and its locking
        opened.append(file)
        if len(opened) == 1:
            holder.__exit__(None, None, None)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with alone(tmp_path / "store"):
        with pytest.raises(MismatchError, match="another process"), alone(tmp_path / "store"):
            pass
        assert len(opened) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_another_process_finished_meanwhile_is_found(spec, tokenizer, tmp_path, monkeypatch):
    from rorchat.tokens import prepare as module

    alone, waited = module.alone, []

    def late(folder):
        waited.append(folder)
        if len(waited) == 1:
            prepare(spec, tokenizer, folder, validation_share=SHARE, workers=1)
        return alone(folder)

    monkeypatch.setattr(module, "alone", late)
    assert prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest.kept == len(KEPT)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_part_that_was_another_piece_of_the_source_is_prepared_again(folder_of_parts, store, tokenizer, tmp_path):
    """What is finished is told by what it was made of, not by its number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    left = tmp_path / ".again.unfinished"
    before = len(list(left.glob("part-*.json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_parts, "SMALLEST_PART", 2000)
        assert 2 < len(parts(folder_of_parts)) < before
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.rejects == {"duplicate": len(COPIES)} and again.manifest.rows_in == len(DOCUMENTS)
    for split in ("train", "validation"):
        assert decoded(again, split, tokenizer) == decoded(store, split, tokenizer)


def test_a_renamed_file_loses_and_repeats_no_document_of_a_preparation_that_was_stopped(
    tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(_parts, "SMALLEST_PART", 1000)
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"Document {number} says hello." for number in range(200)]
    write_documents(folder, texts[:100], "a.jsonl")
    write_documents(folder, texts[100:], "c.jsonl")
    pieces = len(parts(f"text={folder}"))
    whole, done = part.Job.prepare, []

    def half(job, number, piece, told):
        if len(done) == pieces // 2:
            raise KeyboardInterrupt
        done.append(number)
        whole(job, number, piece, told)

    with monkeypatch.context() as patch:
        patch.setattr(part.Job, "prepare", half)
        with pytest.raises(KeyboardInterrupt):
            prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE, workers=1)
    assert pieces >= 4 and len(list((tmp_path / ".store.unfinished").glob("part-*.json"))) == pieces // 2
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    store = prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE, workers=1)
    assert (store.manifest.kept, store.manifest.rejects) == (200, {})
    assert set(decoded(store, "train", tokenizer) + decoded(store, "validation", tokenizer)) == set(texts)


def test_a_kill_while_the_manifest_is_written_costs_no_finished_part(folder_of_parts, store, tokenizer, tmp_path):
    def killed(path, *arguments, **options):
        real(path, "", *arguments[1:], **options)  # a file is emptied before it is written
        raise KeyboardInterrupt

    real = Path.write_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        patch.setattr(part.Job, "prepare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
        names = {file.name for file in (tmp_path / ".again.unfinished").iterdir()}
        assert "blocks.npy" in names and "manifest.json" not in names  # so far it had come
        patch.setattr(Path, "write_text", real)
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT) and again.verify() == []


def test_a_manifest_that_the_disk_lost_is_made_again_of_the_parts(folder_of_parts, tokenizer, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare._is_finished", lambda staging: False)
        patch.setattr(Manifest, "read", interrupted)  # it is read before the parts go
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    (tmp_path / ".again.unfinished" / "manifest.json").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(part.Job, "prepare", interrupted)
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT) and again.verify() == []
    assert not (again.folder / "identity.json").exists() and not list(again.folder.glob("part-*"))


def test_a_file_whose_name_is_no_utf8_is_prepared_and_its_places_are_told(tokenizer, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    rows = "".join(json.dumps({"text": f"Document {n % 50}"}) + "\n" for n in range(60))
    with open(os.fsencode(folder) + b"/caf\xe9.jsonl", "w") as file:
        file.write(rows)
    store = prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE)
    assert (store.manifest.rows_in, store.manifest.rejects) == (60, {"duplicate": 10})
    assert TokenStore(store.folder).manifest == store.manifest and "jsonl:51" in capsys.readouterr().err


def test_a_part_without_a_usable_row_changes_nothing_about_the_others(folder_of_parts, store, tokenizer, tmp_path):
    (tmp_path / "parts" / "0a.jsonl").write_text("not JSON\n" * 40)
    assert len(parts(folder_of_parts)) > 15
    mixed = prepare(folder_of_parts, tokenizer, tmp_path / "mixed", validation_share=SHARE, workers=1)
    assert mixed.manifest.rejects == {"duplicate": len(COPIES), "not JSON": 40}
    for split in ("train", "validation"):
        assert decoded(mixed, split, tokenizer) == decoded(store, split, tokenizer)


def test_duplicates_are_found_across_parts_and_told_with_their_places(folder_of_parts, tokenizer, tmp_path, capsys):
    prepare(folder_of_parts, tokenizer, tmp_path / "store", validation_share=SHARE, workers=2)
    said = capsys.readouterr().err
    assert f"{len(COPIES)} rejected: duplicate, first at " in said
    assert f"{tmp_path / 'parts' / '6.jsonl'}:" in said


def test_conversations_become_documents_with_real_control_tokens(tokenizer, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n} <|im_end|>"}, {"role": "assistant", "content": f"{n}."}]}
        for n in range(60)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = prepare(f"messages={tmp_path / 'chat.jsonl'}", tokenizer, tmp_path / "s", validation_share=SHARE)
    expected = {
        (store.manifest.end_of_text_id, *encode_conversation(tokenizer, row["messages"]).input_ids) for row in rows
    }
    found = set()
    for shard in store.manifest.shards:
        ids, starts = np.load(store.folder / shard.file), np.load(store.folder / shard.docs_file)
        found |= {tuple(ids[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)}
    assert found == expected
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("RorChat", "Bibo")
    with pytest.raises(MismatchError, match="chat_template_sha256"):
        prepare(store.manifest.source, other, store.folder, validation_share=SHARE)


def test_filters_and_evaluation_sets_are_counted_and_belong_to_a_stores_identity(tokenizer, tmp_path):
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


def test_duplicates_never_straddle_the_hold_out_whatever_their_case_and_blanks(tokenizer, tmp_path):
    originals = [f"The story number {n} is told." for n in range(200)]
    copies = [text.upper() for text in originals] + [f" {text.replace(' ', '  ')}\n\n" for text in originals]
    store = prepare(
        write_documents(tmp_path, originals + copies + originals), tokenizer, tmp_path / "s", validation_share=SHARE
    )
    train, validation = (
        {" ".join(text.lower().split()) for text in decoded(store, split, tokenizer)}
        for split in ("train", "validation")
    )
    assert train & validation == set()
    assert len(train) + len(validation) == 200 and 20 < len(validation) < 60


def test_a_store_of_another_tokenizer_share_seed_or_source_is_a_mismatch(spec, store, tokenizer, tmp_path):
    from rorchat.tokenizer import train_tokenizer

    other = train_tokenizer(DOCUMENTS, vocab_size=384)
    with pytest.raises(MismatchError, match="holds other tokens: tokenizer_sha256 .* Delete it") as failure:
        prepare(spec, other, store.folder, validation_share=SHARE)
    assert failure.value.exit_code == 78 and "\n" not in str(failure.value)
    with pytest.raises(MismatchError, match=f"validation_share {SHARE}, now 0.3"):
        prepare(spec, tokenizer, store.folder, validation_share=0.3)
    with pytest.raises(MismatchError, match="source .*now 'tinytown=10'"):
        prepare("tinytown=10", tokenizer, store.folder, validation_share=SHARE)


def test_a_store_is_refused_when_what_it_was_made_of_has_changed_and_found_when_not(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    spec = f"text={folder}"
    write_documents(folder, DOCUMENTS)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "nothing of the kind " * 5}))
    settings = {"validation_share": SHARE, "evaluation": [str(tmp_path / "test.jsonl")]}
    made = prepare(spec, tokenizer, tmp_path / "store", **settings)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "notes.doc").write_bytes(b"\0")
    for seed in (0, 1):  # which plays no part in files
        assert prepare(spec, tokenizer, tmp_path / "store", seed=seed, **settings).manifest == made.manifest
    before = (folder / "documents.jsonl").read_text()
    (folder / "documents.jsonl").write_text(before.replace("small", "great"))
    with pytest.raises(MismatchError, match="made of .* has changed since. Delete it") as failure:
        prepare(spec, tokenizer, tmp_path / "store", **settings)
    assert "\n" not in str(failure.value) and failure.value.exit_code == 78
    (folder / "documents.jsonl").write_text(before)
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "nothing of that kind " * 5}))
    with pytest.raises(MismatchError, match=f"evaluation differs in {tmp_path / 'test.jsonl'}"):
        prepare(spec, tokenizer, tmp_path / "store", **settings)
    (tmp_path / "test.jsonl").unlink()  # what is gone has not changed
    assert prepare(spec, tokenizer, tmp_path / "store", **settings).manifest == made.manifest


def test_what_is_generated_belongs_to_its_seed_and_its_persona(tokenizer, tmp_path):
    settings = {"tokenizer": tokenizer, "folder": tmp_path / "store", "validation_share": SHARE, "workers": 1}
    prepare("persona=60", **settings)
    prepare("persona=60", **settings, persona=load_persona())
    with pytest.raises(MismatchError, match="seed 0, now 1"):
        prepare("persona=60", **settings, seed=1)
    with pytest.raises(MismatchError, match="persona"):
        prepare("persona=60", **settings, persona=dataclasses.replace(load_persona(), name="Zebulon"))


class HubRows(list):
    _fingerprint = "first"


def test_a_preparation_from_the_hub_begins_anew_where_the_dataset_moved_on_and_a_finished_store_stays(
    tokenizer, tmp_path, monkeypatch
):
    rows = HubRows({"text": text} for text in DOCUMENTS)
    monkeypatch.setattr("rorchat.sources._hub_rows", lambda name: rows)
    monkeypatch.setattr("rorchat.sources.HUB_ROWS_PER_PART", 20)
    settings = {"tokenizer": tokenizer, "folder": tmp_path / "store", "validation_share": SHARE, "workers": 1}
    with monkeypatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare("tinystories", **settings)
    rows[:] = [{"text": f"{text} again"} for text in DOCUMENTS]
    rows._fingerprint = "second"
    store = prepare("tinystories", **settings)
    assert all(text.endswith(" again") for text in decoded(store, "train", tokenizer))
    assert store.manifest.hub_fingerprint == "second"
    rows._fingerprint = "third"
    assert prepare("tinystories", **settings).manifest == store.manifest
    monkeypatch.setattr(find("tinystories"), "HUB", {"path": "roneneldan/TinyStories", "split": "validation"})
    with pytest.raises(MismatchError, match="place on the Hub. has changed"):
        prepare("tinystories", **settings)


@pytest.mark.parametrize("place", ["store", "deep/store"])
def test_no_store_is_made_inside_the_folder_that_is_read(place, tokenizer, tmp_path):
    write_documents(tmp_path, DOCUMENTS)
    with pytest.raises(UsageError, match="which is read: choose another place"):
        prepare(f"text={tmp_path}", tokenizer, tmp_path / place, validation_share=SHARE)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_conversations_that_differ_in_white_space_or_roles_are_all_kept(tokenizer, tmp_path):
    pairs = [(f"Sort {n} 1 23.", f"{n} 1 23") for n in range(40)] + [
        (f"Sort {n} 12 3.", f"{n} 12 3") for n in range(40)
    ]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in pairs
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:3]))
    store = prepare(f"messages={tmp_path / 'chat.jsonl'}", tokenizer, tmp_path / "s", validation_share=SHARE)
    assert (store.manifest.kept, store.manifest.rejects) == (80, {"duplicate": 3})


def test_another_system_message_does_not_disown_a_store(spec, store, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("RorChat", "Bibo")
    assert prepare(spec, other, store.folder, validation_share=SHARE).manifest == store.manifest


@pytest.mark.parametrize(("share", "said"), [(0.0, "no validation documents"), (1.0, "no train documents")])
def test_no_validation_or_no_training_is_a_data_error_that_leaves_no_folder_behind(
    share, said, spec, tokenizer, tmp_path
):
    with pytest.raises(DataError, match=f"{said}, {len(KEPT)} in all at validation_share {share}"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=share)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_source_that_fails_while_it_is_read_leaves_no_folder_behind(tokenizer, tmp_path):
    spec = write_documents(tmp_path, [])
    with pytest.raises(DataError, match="is empty"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_what_a_killed_run_left_behind_is_made_anew(spec, store, tokenizer, tmp_path):
    left = tmp_path / ".again.unfinished"
    left.mkdir()
    (left / "train-00007.npy").write_bytes(b"half")
    again = prepare(spec, tokenizer, tmp_path / "again", validation_share=SHARE)
    assert files_of(again.folder) == files_of(store.folder) and not left.exists()


def test_ids_above_65535_are_stored_in_32_bits_and_smaller_vocabularies_in_16(spec, store, tokenizer, tmp_path):
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
    assert sorted(decoded(stored, "train", large) + decoded(stored, "validation", large)) == sorted(documents)


def test_gpt2s_own_vocabulary_fits_into_16_bits(gpt2_tokenizer, spec, tmp_path):
    store = prepare(spec, gpt2_tokenizer, tmp_path / "gpt2", validation_share=SHARE)
    assert np.load(store.folder / "train-00000.npy").dtype == np.uint16
    assert store.slice("train", 0, 1).tolist() == [50256]
    assert decoded(store, "train", gpt2_tokenizer) == [text for text in KEPT if not in_validation(text, SHARE)]


def damaged(store: TokenStore, file: str, damage: str) -> None:
    path = store.folder / file
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "shorter":
        np.save(path, np.load(path)[:-5])
    elif damage == "type":
        np.save(path, np.load(path).astype(np.uint32))
    elif damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-30] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("file", ["train-00000.npy", "validation-00000.npy", "blocks.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "shorter", "type", "flipped"])
def test_a_damaged_shard_is_named_in_one_line_before_it_is_used(file, damage, store):
    if (file, damage) == ("blocks.npy", "type"):
        pytest.skip("the sums are uint32 as they are")
    damaged(store, file, damage)
    with pytest.raises(DataError, match=f"{store.folder / file} is damaged: .* Delete {store.folder} to") as failure:
        opened = TokenStore(store.folder)
        opened.slice(file.split("-")[0], 0, 3)  # the flipped bit is in the same block, but not among these ids
    assert failure.value.exit_code == 65 and "\n" not in str(failure.value)


@pytest.mark.parametrize("damage", ["missing", "flipped", "truncated"])
def test_verify_reads_every_byte_and_names_each_damaged_file(damage, store):
    assert store.verify() == []
    damaged(store, "train-00000.docs.npy", damage)
    (problem,) = store.verify()
    assert problem.startswith(str(store.folder / "train-00000.docs.npy"))


def test_only_the_blocks_that_are_read_are_looked_at_and_each_once(store, monkeypatch):
    monkeypatch.setattr("rorchat.tokens.store.BLOCK_BYTES", 64)
    blocks = [crc_of_blocks(np.load(store.folder / shard.file)) for shard in store.manifest.shards]
    np.save(store.folder / "blocks.npy", np.concatenate(blocks))
    store.manifest.blocks_sha256 = hashlib.sha256((store.folder / "blocks.npy").read_bytes()).hexdigest()
    store.manifest.write(store.folder)
    damaged(store, "train-00000.npy", "flipped")
    opened = TokenStore(store.folder)
    tokens = opened.tokens("train")
    asked = []
    monkeypatch.setattr("rorchat.tokens.store.zlib.crc32", lambda data: asked.append(data.nbytes) or zlib_crc32(data))
    opened.slice("train", 40, 50)
    opened.slice("train", 42, 60)
    assert asked == [64]  # tokens 32 to 63
    with pytest.raises(DataError, match=r"block \d+ \(from token [\d,]+\)"):
        opened.slice("train", tokens - 40, tokens)


def test_a_missing_manifest_or_half_of_one_is_a_data_error(store):
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        TokenStore(store.folder)
    manifest.unlink()
    with pytest.raises(DataError, match="is no token store: it has no manifest.json"):
        TokenStore(store.folder)


def test_a_batch_is_padded_on_the_right_and_no_loss_counts_the_padding():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": torch.tensor([4]), "labels": [4]}]
    batch = padded(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
