"""Reads documents or lines of text files."""

from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.encodings import (
    DECOMPRESSION_ERRORS,
    LONGEST_LINE,
    content_suffix,
    decode,
    open_bytes,
    reject_damaged_archive,
)
from rorchat.reading.slices import FileSlice, Row
from rorchat.rows import RejectedRow

DOCUMENT_SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file, as in TinyStories
BLOCK_BYTES = 2**20  # bytes read at a time


def read_documents(file_slice: FileSlice) -> Iterator[Row]:
    """Yields (place, {"text"}) of each document of a text file.

    Holds one document at a time, so a file of 2 GB needs only the memory of its longest document. If a file contains
    separators but does not end with one, its last document has "unclosed": True.
    """
    path, line, byte = file_slice.path, file_slice.first + 1, file_slice.start
    try:
        for document, is_closed in _split_documents(file_slice):
            size, newlines = len(document), document.count(b"\n")
            text = decode(document, "utf-8-sig" if byte == 0 else "utf-8", first_byte=byte)
            if isinstance(document, bytearray):
                document.clear()  # keep only one copy of a large document in memory
            if isinstance(text, RejectedRow):
                yield str(path), text
            elif is_closed or (text and not text.isspace()):  # the rest after a final separator is not a document
                length = len(text)
                text = text.lstrip("\r\n")
                blank_lines = newlines - text.count("\n") if text and len(text) < length else 0
                row = {"text": text.rstrip("\r\n")}
                del text
                yield f"{path}:{line + blank_lines}", row if is_closed or not byte else {**row, "unclosed": True}
            line, byte = line + newlines, byte + size + len(DOCUMENT_SEPARATOR)
    except DECOMPRESSION_ERRORS as error:
        yield f"{path}:{line}", reject_damaged_archive(path, error)


def _split_documents(file_slice: FileSlice) -> Iterator[tuple[bytes | bytearray, bool]]:
    """Yields the bytes of each document and whether a separator follows it.

    Only .txt files are split: in source code and Markdown, `<|endoftext|>` is ordinary text. A long document is yielded
    as a bytearray, which the caller may clear to free its memory.
    """
    separator = DOCUMENT_SEPARATOR.encode()
    has_separators = content_suffix(file_slice.path) == ".txt"
    pending = bytearray()
    with open_bytes(file_slice.path) as file:
        if file_slice.start:  # never in a compressed file, which is always read from its start
            file.seek(file_slice.start)
        while block := file.read(
            BLOCK_BYTES if file_slice.stop is None else min(BLOCK_BYTES, file_slice.stop - file.tell())
        ):
            overlap = max(0, len(pending) - len(separator) + 1)  # a separator may span two blocks
            pending += block
            end = pending.find(separator, overlap) if has_separators else -1
            if end < 0:
                continue
            *complete, rest = bytes(memoryview(pending)[end + len(separator) :]).split(separator)
            del pending[end:]
            yield pending, True
            yield from ((document, True) for document in complete)
            pending = bytearray(rest)
    yield pending, False


def read_lines(
    source: Path | FileSlice, encoding: str = "utf-8-sig", *, keep_empty: bool = False
) -> Iterator[tuple[str, str | RejectedRow]]:
    """Yields (file:line, line without its line end) of a text file, without empty lines unless `keep_empty`."""
    file_slice = source if isinstance(source, FileSlice) else FileSlice(source)
    path, number = file_slice.path, file_slice.first
    try:
        with open_bytes(path) as file:
            if file_slice.start:
                file.seek(file_slice.start)
            while (file_slice.stop is None or file.tell() < file_slice.stop) and (raw := file.readline(LONGEST_LINE)):
                number += 1
                is_whole = len(raw) < LONGEST_LINE or raw.endswith(b"\n")
                line = decode(raw, encoding)
                del raw  # a long line need not stay in memory as bytes while it is parsed
                if not is_whole:
                    line = RejectedRow("over-long", f"a line of more than {LONGEST_LINE:,} bytes")
                    while (rest := file.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
                        pass
                if isinstance(line, str):
                    line = line.rstrip("\r\n")
                lines = [line] if keep_empty or isinstance(line, RejectedRow) or (line and not line.isspace()) else []
                del line
                while lines:
                    yield f"{path}:{number}", lines.pop()  # pop: keep no reference to a yielded line
    except DECOMPRESSION_ERRORS as error:
        yield f"{path}:{number + 1}", reject_damaged_archive(path, error)
