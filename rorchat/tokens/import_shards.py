"""Shards that somebody else tokenized -> a token store."""

import re
import shutil
from pathlib import Path

import numpy as np

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.files import folder_lock, fsync_file
from rorchat.tokenizer import token_bytes, tokenizer_sha256
from rorchat.tokens.store import SPLITS, UNREADABLE, Manifest, Shard, TokenStore
from rorchat.tokens.tokenize_shard import link, sealed

IDS_AT_ONCE = 2**24
_VALIDATION = re.compile(r"(?<![^\W_])val(id(ation)?)?(?![^\W\d_])")  # but not interval, retrieval or values


def import_shards(shards: str | Path, tokenizer, folder: str | Path) -> TokenStore:
    """A token store of the flat `.npy` arrays in a folder, as nanoGPT-style projects write them.

    An array whose name has the word "val" (or "valid", or "validation") in it is validation, any other is training.
    Every id is looked at: it must be of the
    tokenizer's vocabulary, and documents are told by `<|endoftext|>` before (or after) them. The arrays are linked,
    not copied, where the file system allows it.

    Args:
        shards: a folder of one-dimensional uint16 or uint32 arrays, all of one type.
        tokenizer: the one they were made with. That cannot be proved, but ids beyond its vocabulary refute it.

    Raises:
        DataError: there is no such array, one is of another type or shape, or there is no training or validation.
        MismatchError: an id is not of the vocabulary, or no document begins with `<|endoftext|>`.
        UsageError: there is something at `folder`.

    What is held out are whole arrays, so a document of them may also stand in another source of a mixture.
    """
    shards, folder = Path(shards), Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another folder for the store.")
    if not shards.is_dir():
        raise DataError(f"No folder {shards}.")
    files = sorted(file for file in shards.glob("*.npy") if not file.name.endswith(".docs.npy"))
    arrays = {file: _opened(file) for file in files}
    types = {str(array.dtype) for array in arrays.values()}
    if len(types) != 1:
        raise DataError(
            f"{shards} holds {'arrays of ' + ', '.join(sorted(types)) if types else 'no .npy file'}: expected one type."
        )
    manifest = Manifest(
        source=f"shards={shards}",
        licence="unstated: tokenized elsewhere",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=0.0,
        seed=0,
        dtype=types.pop(),
    )
    staging = folder.with_name(f".{folder.name}.unfinished")
    with folder_lock(folder):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            _fill(staging, arrays, manifest, np.array(token_bytes(tokenizer), dtype=np.int64))
            manifest.write(staging)
        except BaseException:
            shutil.rmtree(staging)
            raise
        staging.rename(folder)
    return TokenStore(folder)


def _fill(staging: Path, arrays: dict[Path, np.ndarray], manifest: Manifest, spelled: np.ndarray) -> None:
    """Links the arrays into a store and describes them in its manifest. `spelled` is the UTF-8 bytes of each token."""
    blocks = []
    for split in SPLITS:
        of_split = [file for file in arrays if bool(_VALIDATION.search(file.name)) == (split == "validation")]
        if not of_split:
            raise DataError(
                f"{manifest.source} has no {split} array: what has the word 'val' in its name is validation, the rest "
                "training."
            )
        for serial, file in enumerate(of_split):
            starts, utf8_bytes = _documents(file, arrays[file], manifest, spelled)
            target = staging / f"{split}-{serial:05d}.npy"
            link(file, target)
            np.save(target.with_suffix(".docs.npy"), starts)
            fsync_file(target.with_suffix(".docs.npy"))
            digest, crc = sealed(target)
            docs_digest = sealed(target.with_suffix(".docs.npy"))[0]
            tokens = len(arrays[file])
            manifest.shards.append(Shard(target.name, split, tokens, len(starts), utf8_bytes, digest, docs_digest))
            blocks.append(crc)
    np.save(staging / "blocks.npy", np.concatenate(blocks))
    fsync_file(staging / "blocks.npy")
    manifest.blocks_sha256 = sealed(staging / "blocks.npy")[0]
    manifest.rows_in = manifest.kept = sum(shard.documents for shard in manifest.shards)


def _opened(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except UNREADABLE as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())[:120]}.") from None
    if not isinstance(array, np.ndarray):  # numpy tells an archive of several arrays by its bytes, not its name
        raise DataError(f"{file} is an archive of several arrays: expected one row of uint16 or uint32 ids.")
    if array.dtype not in (np.uint16, np.uint32) or array.ndim != 1 or not len(array):
        raise DataError(f"{file} holds {array.dtype} of shape {array.shape}: expected one row of uint16 or uint32 ids.")
    return array


def _documents(file: Path, array: np.ndarray, manifest: Manifest, spelled: np.ndarray) -> tuple[np.ndarray, int]:
    """(where documents begin, the UTF-8 bytes of all) of an array, which need not begin with a document."""
    starts, utf8_bytes = [], 0
    for at in range(0, len(array), IDS_AT_ONCE):
        ids = np.asarray(array[at : at + IDS_AT_ONCE])
        if ids.max() >= manifest.vocabulary_size:
            where = at + int(np.argmax(ids >= manifest.vocabulary_size))
            raise MismatchError(
                f"{file} has the id {array[where]} at {where:,}, but the tokenizer has {manifest.vocabulary_size:,} "
                "tokens: it was made with another one."
            )
        starts.append(at + np.flatnonzero(ids == manifest.end_of_text_id))
        utf8_bytes += int(spelled[ids].sum())
    found = np.concatenate(starts).astype(np.int64)
    if not len(found):
        raise MismatchError(
            f"No <|endoftext|> (id {manifest.end_of_text_id}) among the {len(array):,} ids of {file}: it was made with "
            "another tokenizer, or its documents are not separated."
        )
    return found, utf8_bytes
