"""Reads the documents of a text file of one's own: in any certain encoding, and with long texts cut into several."""

import codecs
from collections.abc import Iterator

from rorchat.reading.encodings import (
    BAD_BYTE,
    DECOMPRESSION_ERRORS,
    content_suffix,
    open_bytes,
    reject_damaged_archive,
)
from rorchat.reading.long_texts import Cutter, Limits
from rorchat.reading.notes import ReadingNotes
from rorchat.reading.slices import FileSlice, Row
from rorchat.reading.text import DOCUMENT_SEPARATOR
from rorchat.reading.text_encodings import TextEncoding, detect_encoding
from rorchat.reading.zip_files import file_size
from rorchat.rows import RejectedRow

BLOCK_BYTES = 2**20  # bytes read at a time


def read_plain_text(file_slice: FileSlice, limits: Limits, notes: ReadingNotes) -> Iterator[Row]:
    """Yields (file:line, {"text"}) of each document, and of each piece of a long one.

    At most one piece and one block of the file are in memory. A file that is not text has no rows; `notes` say why.
    """
    path = file_slice.path
    encoding = detect_encoding(path)
    if isinstance(encoding, RejectedRow):
        notes.add_unread(path, encoding.detail, file_size(path))
        return
    if encoding.name != "UTF-8" and not file_slice.start:
        notes.decoded.setdefault(encoding.name, []).append(str(path))
    separator = DOCUMENT_SEPARATOR if content_suffix(path) == ".txt" else ""
    documents = _Documents(file_slice, encoding, limits, notes)
    try:
        for text, is_closed in _split(_decode(file_slice, encoding), separator):
            yield from documents.read(text, is_closed)
        yield from documents.finish(is_closed=False)
    except DECOMPRESSION_ERRORS as error:
        yield f"{path}:{documents.line}", reject_damaged_archive(path, error)


def _decode(file_slice: FileSlice, encoding: TextEncoding) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding.codec)("surrogateescape" if encoding.codec == "utf-8" else "strict")
    with open_bytes(file_slice.path) as file:
        file.read(encoding.mark_bytes)
        if file_slice.start:  # never in a compressed file, which is always read from its start
            file.seek(file_slice.start)
        while block := file.read(
            BLOCK_BYTES if file_slice.stop is None else min(BLOCK_BYTES, file_slice.stop - file.tell())
        ):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _split(texts: Iterator[str], separator: str) -> Iterator[tuple[str, bool]]:
    """Yields (text, whether a separator follows it). A document comes in parts of any size."""
    overlap = max(0, len(separator) - 1)  # a separator may span two parts
    pending = ""
    for text in texts:
        *complete, pending = (pending + text).split(separator) if separator else [pending + text]
        yield from ((part, True) for part in complete)
        if len(pending) > overlap:
            yield pending[: len(pending) - overlap], False
            pending = pending[len(pending) - overlap :]
    yield pending, False


def _unify_line_ends(text: str) -> str:
    """Line ends of Windows and of old Macs become \\n, as in Python's text files: models see one kind."""
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


class _Documents:
    """Turns the text of a file into rows and keeps account of their lines and bytes."""

    def __init__(self, file_slice: FileSlice, encoding: TextEncoding, limits: Limits, notes: ReadingNotes):
        self.path, self.encoding, self.notes = file_slice.path, encoding, notes
        self.line, self.byte = file_slice.first + 1, file_slice.start or encoding.mark_bytes
        self._cutter, self._pieces, self._rows = Cutter(limits), 0, 0  # of the present document
        self._skipped = ""  # line ends at the start of the document

    def read(self, text: str, is_closed: bool) -> Iterator[Row]:
        """The rows that are complete after more text of the file."""
        if not self._pieces and not self._cutter.has_text:
            size = len(text) - len(text.lstrip("\r\n"))
            self._skipped, text = self._skipped + text[:size], text[size:]
        for piece in self._cutter.feed(text):
            yield from self._emit(piece, is_last=False, is_closed=is_closed)
        if is_closed:
            yield from self.finish(is_closed=True)
            self.byte += len(DOCUMENT_SEPARATOR)

    def finish(self, is_closed: bool) -> Iterator[Row]:
        """The last row of a document; the blank rest after a final separator is none."""
        yield from self._emit(self._cutter.finish(), is_last=True, is_closed=is_closed)
        self.notes.long_texts += self._rows > 1
        self._pieces, self._rows, self._skipped = 0, 0, ""

    def _emit(self, piece: str, *, is_last: bool, is_closed: bool) -> Iterator[Row]:
        begins = self.line + (self._skipped.count("\n") if piece else 0)
        first_byte = self.byte + len(self._skipped)
        text = piece.strip("\r\n") if is_last else piece.lstrip("\r\n").rstrip()
        begins += piece[: len(piece) - len(piece.lstrip("\r\n"))].count("\n") if text else 0
        self.line += self._skipped.count("\n") + piece.count("\n")
        if self.encoding.is_damaged:
            self.byte += len(self._skipped) + len(piece.encode(errors="surrogateescape"))
        self._skipped = ""
        self._pieces += 1
        if (text and not text.isspace()) or (is_closed and is_last and self._pieces == 1):
            self._rows += 1
            yield f"{self.path}:{begins}", self._row(_unify_line_ends(text), piece, first_byte)

    def _row(self, text: str, piece: str, first_byte: int) -> dict | RejectedRow:
        bad = BAD_BYTE.search(piece) if self.encoding.is_damaged else None
        if bad is None:
            return {"text": text}
        before = len(piece[: bad.start()].encode(errors="surrogateescape"))
        return RejectedRow("invalid UTF-8", f"byte {first_byte + before}")
