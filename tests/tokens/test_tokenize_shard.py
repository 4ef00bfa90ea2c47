"""A store has the same bytes for any number of workers, and after any interruption."""

import dataclasses
import subprocess
import time
from pathlib import Path

import datasets
import numpy as np
import preloaded
import pytest
from support import COPIES, DOCUMENTS, KEPT, SHARE, decode, hash_files, write_documents

from rorchat.errors import MismatchError
from rorchat.reading import parts
from rorchat.sources.hub_dataset import HubRows
from rorchat.sources.registry import pin_spec, source_digest, source_parts
from rorchat.tokenizer import load_tokenizer
from rorchat.tokens import tokenize_shard
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import Manifest


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.fixture
def folder_of_parts(tmp_path, monkeypatch) -> str:
    """The documents in seven files, with parts so small that each file has several."""
    monkeypatch.setattr(parts, "SMALLEST_PART", 300)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(7):
        write_documents(folder, DOCUMENTS[number * 18 : (number + 1) * 18], f"{number}.jsonl")
    assert len(source_parts(f"text={folder}")) > 15
    return f"text={folder}"


def test_several_shards_read_like_one(folder_of_parts, store, tokenizer, tmp_path):
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
        assert decode(many, split, tokenizer) == decode(store, split, tokenizer)
        for what in ("documents", "utf8_bytes"):
            assert many.manifest.total(split, what) == store.manifest.total(split, what)
    assert store.slice("train", 0, 5).dtype == np.int64


def test_a_store_is_the_same_bytes_for_any_number_of_workers(folder_of_parts, tokenizer, tmp_path):
    stores = [
        prepare(folder_of_parts, tokenizer, tmp_path / f"by-{workers}", validation_share=SHARE, workers=workers)
        for workers in (1, 2, 4)
    ]
    first, *others = [hash_files(store.folder) for store in stores]
    assert len(first) > 20 and all(other == first for other in others)


@pytest.fixture
def forty_files(tmp_path) -> str:
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(40):
        write_documents(folder, [f"{text} {number}" for text in DOCUMENTS], f"{number:02d}.jsonl")
    return f"text={folder}"


@pytest.mark.parametrize("parts_done", [1, 10, 25])
def test_a_killed_preparation_resumes_to_the_same_bytes(parts_done, forty_files, saved, tmp_path, monkeypatch):
    """In another process, because nothing cleans up after SIGKILL."""
    script = (
        "import sys, time\n"
        "from rorchat.reading import parts\n"
        "from rorchat.tokens import tokenize_shard\n"
        "from rorchat.tokens.prepare import prepare\n"
        "from rorchat.tokenizer import load_tokenizer\n"
        "parts.SMALLEST_PART = 5000\n"
        "slow = tokenize_shard.ShardTokenizer.tokenize\n"
        "def prepared(*arguments):\n"
        "    time.sleep(0.05); slow(*arguments)\n"
        "tokenize_shard.ShardTokenizer.tokenize = prepared\n"
        "prepare(sys.argv[1], load_tokenizer(sys.argv[2]), sys.argv[3], validation_share=0.2, workers=2)\n"
    )
    command = [preloaded.client("python"), "-c", script, forty_files, str(saved), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    left = tmp_path / ".killed.unfinished"
    while len(list(left.glob("part-*.json"))) < parts_done:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(1)  # the workers notice within half a second that their parent is gone
    assert len(list(left.glob("part-*.json"))) < 40 and not (tmp_path / "killed").exists()
    monkeypatch.setattr(parts, "SMALLEST_PART", 5000)
    for name in ("killed", "whole"):
        prepare(forty_files, load_tokenizer(str(saved)), tmp_path / name, validation_share=0.2, workers=2)
    assert hash_files(tmp_path / "killed") == hash_files(tmp_path / "whole") and not left.exists()


def test_complete_parts_are_not_tokenized_again(folder_of_parts, tokenizer, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.merge_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    monkeypatch.setattr("rorchat.tokens.tokenize_shard.ShardTokenizer.tokenize", interrupted)
    again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT)


def test_a_store_locked_by_another_process_is_refused(spec, tokenizer, tmp_path):
    from rorchat.files import folder_lock

    with folder_lock(tmp_path / "store"), pytest.raises(MismatchError, match="is in use by process \\d+ on "):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    assert prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest.kept == len(KEPT)
    assert not (tmp_path / ".store.lock").exists()


def test_a_lock_deleted_while_it_is_opened_admits_one_process(tokenizer, tmp_path, monkeypatch):
    import fcntl

    from rorchat.files import folder_lock

    holder = folder_lock(tmp_path / "store")
    holder.__enter__()
    flock, opened = fcntl.flock, []

    def late(file, operation):  # the holder finishes after the file is opened and before it is locked
        opened.append(file)
        if len(opened) == 1:
            holder.__exit__(None, None, None)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with folder_lock(tmp_path / "store"):
        with pytest.raises(MismatchError, match="is in use by"), folder_lock(tmp_path / "store"):
            pass
        assert len(opened) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_store_completed_by_another_process_is_opened(spec, tokenizer, tmp_path, monkeypatch):
    from rorchat.tokens import prepare as module

    folder_lock, waited = module.folder_lock, []

    def late(folder):
        waited.append(folder)
        if len(waited) == 1:
            prepare(spec, tokenizer, folder, validation_share=SHARE, workers=1)
        return folder_lock(folder)

    monkeypatch.setattr(module, "folder_lock", late)
    assert prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest.kept == len(KEPT)


def test_a_part_with_other_content_is_tokenized_again(folder_of_parts, store, tokenizer, tmp_path):
    """Complete parts are identified by their content, not by their number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.merge_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    left = tmp_path / ".again.unfinished"
    before = len(list(left.glob("part-*.json")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SMALLEST_PART", 2000)
        assert 2 < len(source_parts(folder_of_parts)) < before
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.rejects == {"duplicate": len(COPIES)} and again.manifest.rows_in == len(DOCUMENTS)
    for split in ("train", "validation"):
        assert decode(again, split, tokenizer) == decode(store, split, tokenizer)


def test_a_file_renamed_during_an_interruption_loses_no_document(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALLEST_PART", 1000)
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"Document {number} says hello." for number in range(200)]
    write_documents(folder, texts[:100], "a.jsonl")
    write_documents(folder, texts[100:], "c.jsonl")
    pieces = len(source_parts(f"text={folder}"))
    whole, done = tokenize_shard.ShardTokenizer.tokenize, []

    def half(job, number, piece, progress):
        if len(done) == pieces // 2:
            raise KeyboardInterrupt
        done.append(number)
        whole(job, number, piece, progress)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize_shard.ShardTokenizer, "tokenize", half)
        with pytest.raises(KeyboardInterrupt):
            prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE, workers=1)
    assert pieces >= 4 and len(list((tmp_path / ".store.unfinished").glob("part-*.json"))) == pieces // 2
    (folder / "a.jsonl").rename(folder / "z.jsonl")
    store = prepare(f"text={folder}", tokenizer, tmp_path / "store", validation_share=SHARE, workers=1)
    assert (store.manifest.kept, store.manifest.rejects) == (200, {})
    assert set(decode(store, "train", tokenizer) + decode(store, "validation", tokenizer)) == set(texts)


def test_a_kill_during_the_manifest_loses_no_complete_part(folder_of_parts, store, tokenizer, tmp_path):
    def killed(path, *arguments, **options):
        real(path, "", *arguments[1:], **options)  # truncated before it is written
        raise KeyboardInterrupt

    real = Path.write_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.merge_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", killed)
        patch.setattr(tokenize_shard.ShardTokenizer, "tokenize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
        names = {file.name for file in (tmp_path / ".again.unfinished").iterdir()}
        assert "blocks.npy" in names and "manifest.json" not in names  # the merge was almost complete
        patch.setattr(Path, "write_text", real)
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT) and again.verify() == []


def test_a_lost_manifest_is_written_again_from_the_parts(folder_of_parts, tokenizer, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare._has_manifest", lambda staging: False)
        patch.setattr(Manifest, "read", interrupted)  # it is read before the parts are deleted
        with pytest.raises(KeyboardInterrupt):
            prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    (tmp_path / ".again.unfinished" / "manifest.json").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_shard.ShardTokenizer, "tokenize", interrupted)
        again = prepare(folder_of_parts, tokenizer, tmp_path / "again", validation_share=SHARE, workers=1)
    assert again.manifest.kept == len(KEPT) and again.verify() == []
    assert not (again.folder / "identity.json").exists() and not list(again.folder.glob("part-*"))


def test_a_part_without_usable_rows_does_not_affect_others(folder_of_parts, store, tokenizer, tmp_path):
    (tmp_path / "parts" / "0a.jsonl").write_text("not JSON\n" * 40)
    assert len(source_parts(folder_of_parts)) > 15
    mixed = prepare(folder_of_parts, tokenizer, tmp_path / "mixed", validation_share=SHARE, workers=1)
    assert mixed.manifest.rejects == {"duplicate": len(COPIES), "not JSON": 40}
    for split in ("train", "validation"):
        assert decode(mixed, split, tokenizer) == decode(store, split, tokenizer)


def test_duplicates_across_parts_are_reported_with_their_places(folder_of_parts, tokenizer, tmp_path, capsys):
    prepare(folder_of_parts, tokenizer, tmp_path / "store", validation_share=SHARE, workers=2)
    messages = capsys.readouterr().err
    assert f"{len(COPIES)} rejected: duplicate, first at " in messages
    assert f"{tmp_path / 'parts' / '6.jsonl'}:" in messages


def serve_rows(monkeypatch, texts: list[str], commit: str) -> None:
    """Makes these texts the rows of every dataset on the Hub, at a commit."""

    def resolve(dataset):
        at_commit = dataclasses.replace(dataset, revision=commit, config="default", split="train")
        return dataset if dataset.is_pinned else at_commit

    monkeypatch.setattr("rorchat.sources.registry.resolve", resolve)
    rows = datasets.Dataset.from_list([{"text": text} for text in texts])
    monkeypatch.setattr("rorchat.sources.registry.open_rows", lambda dataset: HubRows(dataset, rows, "mit"))
    monkeypatch.setattr("rorchat.sources.registry.HUB_ROWS_PER_PART", 20)


@pytest.mark.parametrize("spec", ["tinystories", "text=me/stories"])
def test_a_new_hub_revision_restarts_only_an_unfinished_store(spec, tokenizer, tmp_path, monkeypatch):
    settings = {"tokenizer": tokenizer, "folder": tmp_path / "store", "validation_share": SHARE, "workers": 1}
    first, second, third = "1" * 40, "2" * 40, "3" * 40
    serve_rows(monkeypatch, DOCUMENTS, first)
    with monkeypatch.context() as patch:
        patch.setattr("rorchat.tokens.prepare.merge_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(spec, **settings)
    serve_rows(monkeypatch, [f"{text} again" for text in DOCUMENTS], second)
    store = prepare(spec, **settings)
    assert all(text.endswith(" again") for text in decode(store, "train", tokenizer))
    assert store.manifest.hub_fingerprint == store.manifest.summary()["hub"]["revision"] == second
    serve_rows(monkeypatch, DOCUMENTS, third)
    assert prepare(spec, **settings).manifest == store.manifest
    assert prepare(pin_spec(spec).replace(third, second), **settings).manifest == store.manifest
    with pytest.raises(MismatchError, match=f"@{second}', now '.*@{third}'"):
        prepare(pin_spec(spec), **settings)


def test_a_store_from_the_hub_without_a_recorded_commit_is_used(tokenizer, tmp_path, monkeypatch):
    """Earlier versions recorded the name of the source and a digest of its arguments only."""
    serve_rows(monkeypatch, DOCUMENTS, "1" * 40)
    settings = {"tokenizer": tokenizer, "folder": tmp_path / "store", "validation_share": SHARE, "workers": 1}
    prepare("tinystories", **settings)
    manifest = Manifest.read(tmp_path / "store")
    manifest.source, manifest.source_sha256 = "tinystories", source_digest("tinystories")
    manifest.write(tmp_path / "store")
    for spec in ("tinystories", f"tinystories=@{'2' * 40}"):
        assert prepare(spec, **settings).manifest == manifest
    monkeypatch.setattr("rorchat.sources.tinystories.HUB", {"path": "roneneldan/TinyStories", "split": "validation"})
    with pytest.raises(MismatchError, match="location on the Hub. has changed"):
        prepare("tinystories", **settings)


def test_files_without_settings_are_deleted(spec, store, tokenizer, tmp_path):
    left = tmp_path / ".again.unfinished"
    left.mkdir()
    (left / "train-00007.npy").write_bytes(b"half")
    again = prepare(spec, tokenizer, tmp_path / "again", validation_share=SHARE)
    assert hash_files(again.folder) == hash_files(store.folder) and not left.exists()
