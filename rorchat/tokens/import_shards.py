"""Arrays of token ids from another project -> a token store."""

import re
import shutil
from pathlib import Path

import numpy as np

from rorchat.chatml import END_OF_TEXT
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.files import folder_lock
from rorchat.tokenizer import token_bytes, tokenizer_sha256
from rorchat.tokens.store import NPY_ERRORS, SPLITS, Manifest, TokenStore
from rorchat.tokens.store_writer import StoreWriter, link_or_copy

CHUNK_TOKENS = 2**24
_VALIDATION = re.compile(r"(?<![^\W_])val(id(ation)?)?(?![^\W\d_])")  # but not interval, retrieval or values


def import_shards(shards: str | Path, tokenizer, folder: str | Path) -> TokenStore:
    """A token store of the flat `.npy` arrays in a folder, as nanoGPT-style projects write them.

    Files with the word "val", "valid" or "validation" in their name become validation data, all others training data.
    Documents are separated by `<|endoftext|>`. All ids are checked against the vocabulary. The arrays are hard-linked
    if possible, else copied. A document may also occur in another source of a mixture: no hold-out by hash was made.

    Args:
        shards: a folder of one-dimensional arrays, all uint16 or all uint32.
        tokenizer: the tokenizer they were made with. Only ids beyond its vocabulary can prove that it is the wrong one.

    Raises:
        DataError: there are no arrays, one has another dtype or shape, or a split is missing.
        MismatchError: an id is outside the vocabulary, or there is no `<|endoftext|>`.
        UsageError: `folder` exists.
    """
    shards, folder = Path(shards), Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists: choose another folder for the store.")
    if not shards.is_dir():
        raise DataError(f"No folder {shards}.")
    arrays = {file: _open_array(file) for file in sorted(shards.glob("*.npy")) if not file.name.endswith(".docs.npy")}
    dtypes = {str(array.dtype) for array in arrays.values()}
    if len(dtypes) != 1:
        content = f"arrays of {', '.join(sorted(dtypes))}" if dtypes else "no .npy file"
        raise DataError(f"{shards} holds {content}: expected arrays of one dtype, uint16 or uint32.")
    manifest = Manifest(
        source=f"shards={shards}",
        licence="unstated: tokenized elsewhere",
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        vocabulary_size=len(tokenizer),
        end_of_text_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        validation_share=0.0,
        seed=0,
    )
    staging = folder.with_name(f".{folder.name}.unfinished")
    with folder_lock(folder):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            _write_store(StoreWriter(staging, manifest), arrays, np.array(token_bytes(tokenizer), dtype=np.int64))
        except BaseException:
            shutil.rmtree(staging)
            raise
        staging.rename(folder)
    return TokenStore(folder)


def _write_store(writer: StoreWriter, arrays: dict[Path, np.ndarray], bytes_per_token: np.ndarray) -> None:
    manifest = writer.manifest
    for split in SPLITS:
        files = [file for file in arrays if bool(_VALIDATION.search(file.name)) == (split == "validation")]
        if not files:
            raise DataError(
                f"{manifest.source} has no {split} array: files with the word 'val' in their name become validation "
                "data, all others training data. Rename the files."
            )
        for file in files:
            starts, utf8_bytes = _scan_array(file, arrays[file], manifest, bytes_per_token)
            link_or_copy(file, writer.next_path(split))
            writer.add_shard(split, starts, utf8_bytes)
    manifest.rows_in = manifest.kept = sum(shard.documents for shard in manifest.shards)
    writer.close()


def _open_array(file: Path) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode="r")
    except NPY_ERRORS as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())[:120]}.") from None
    if not isinstance(array, np.ndarray):  # numpy detects an archive by its content, not by its name
        raise DataError(f"{file} is an archive of several arrays: expected one flat array of uint16 or uint32 ids.")
    if array.dtype not in (np.uint16, np.uint32) or array.ndim != 1 or not len(array):
        raise DataError(
            f"{file} holds {array.dtype} of shape {array.shape}: expected one flat array of uint16 or uint32 ids."
        )
    return array


def _scan_array(
    file: Path, array: np.ndarray, manifest: Manifest, bytes_per_token: np.ndarray
) -> tuple[np.ndarray, int]:
    """(offsets of the documents, UTF-8 bytes of the text) of an array, which may start inside a document."""
    starts, utf8_bytes = [], 0
    for first in range(0, len(array), CHUNK_TOKENS):
        ids = np.asarray(array[first : first + CHUNK_TOKENS])
        if ids.max() >= manifest.vocabulary_size:
            position = first + int(np.argmax(ids >= manifest.vocabulary_size))
            raise MismatchError(
                f"{file} has id {array[position]} at position {position:,}, but the tokenizer has "
                f"{manifest.vocabulary_size:,} tokens: give the tokenizer it was made with."
            )
        starts.append(first + np.flatnonzero(ids == manifest.end_of_text_id))
        utf8_bytes += int(bytes_per_token[ids].sum())
    offsets = np.concatenate(starts).astype(np.int64)
    if not len(offsets):
        raise MismatchError(
            f"{file} has no <|endoftext|> (id {manifest.end_of_text_id}) among its {len(array):,} ids: it was made "
            "with another tokenizer, or its documents are not separated."
        )
    return offsets, utf8_bytes
