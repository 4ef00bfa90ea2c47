"""Damage to a token store is detected before its tokens are used."""

import hashlib
from zlib import crc32 as zlib_crc32

import numpy as np
import pytest

from rorchat.errors import DataError
from rorchat.tokens.store import TokenStore, block_crcs


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
def test_a_damaged_shard_is_detected_before_it_is_used(file, damage, store):
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


def test_only_blocks_that_are_read_are_checked_once(store, monkeypatch):
    monkeypatch.setattr("rorchat.tokens.store.BLOCK_BYTES", 64)
    blocks = [block_crcs(np.load(store.folder / shard.file)) for shard in store.manifest.shards]
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


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ('"kept": 123', '"kept": 122', "it was changed after it was written"),
        ('"format_version": 4', '"format_version": 3', "format version 3, expected 4"),
    ],
)
def test_a_changed_or_older_manifest_is_refused(before, after, why, store):
    manifest = store.folder / "manifest.json"
    assert before in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(before, after))
    with pytest.raises(DataError, match=f"{manifest} cannot be read .*{why}.* delete the folder to prepare it again"):
        TokenStore(store.folder)


def test_a_missing_or_partial_manifest_is_a_data_error(store):
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        TokenStore(store.folder)
    manifest.unlink()
    with pytest.raises(DataError, match="is not a token store: it has no manifest.json"):
        TokenStore(store.folder)
