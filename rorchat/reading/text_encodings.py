"""Finds the encoding of a text file where it is certain.

That is UTF-8 if the whole file is valid UTF-8, UTF-16 or UTF-32 after a byte order mark, and UTF-16 without one if
nearly every second byte is zero. Other files are Windows-1252 (of which ISO-8859-1 is a part) if all their bytes are
characters of it, in places where Western European texts have them. Other encodings of one byte per character are
refused where Windows-1252 would put signs into words; those for Czech or Turkish cannot be distinguished from it.

`charset-normalizer`, which guesses among a hundred encodings, was not used: it took three of four English books in
Windows-1252 and half of the tested sentences for cp1250, cp1006 or mac_latin2.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from rorchat.reading.compression import describe_unsupported
from rorchat.reading.encodings import BAD_BYTE, DECOMPRESSION_ERRORS, open_bytes
from rorchat.reading.zip_files import stat_file
from rorchat.rows import RejectedRow

NOT_TEXT = "not text"
BLOCK_BYTES = 2**20  # bytes read at a time

# In this order, because the mark of UTF-32-LE begins with that of UTF-16-LE
_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "UTF-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le", "UTF-32"),
    (codecs.BOM_UTF32_BE, "utf-32-be", "UTF-32"),
    (codecs.BOM_UTF16_LE, "utf-16-le", "UTF-16"),
    (codecs.BOM_UTF16_BE, "utf-16-be", "UTF-16"),
)
_KNOWN_FORMATS = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"%PDF-", "a PDF file"),
    (b"PK\x03\x04", "a ZIP archive, as .docx, .odt and .epub files are"),
    (b"\xd0\xcf\x11\xe0", "an old Office document"),
    (b"{\\rtf", "an RTF document"),
    (b"\x1f\x8b", "a gzip archive without .gz in its name"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive without .zst in its name"),
    (b"\xfd7zXZ\0", "an xz archive without .xz in its name"),
    (b"BZh91AY&SY", "a bzip2 archive without .bz2 in its name"),
    (b"ARROW1", "an Arrow file without .arrow in its name"),
    (b"PAR1", "a Parquet file"),
    (b"\x7fELF", "a program"),
    (b"SQLite format 3", "a database"),
)
_TAR_AT = 257  # position of the mark of a tar archive
# C0 without tab, line feed, vertical tab, form feed, carriage return; and DEL
_CONTROLS = bytes(set(range(32)) - {9, 10, 11, 12, 13} | {127})
_ASCII = bytes(range(128))
_UNDEFINED = re.compile(rb"[\x81\x8d\x8f\x90\x9d]")  # bytes that mean nothing in Windows-1252
_LETTERS = rb"\x83\x8a\x8c\x8e\x9a\x9c\x9e\x9f\xc0-\xd6\xd8-\xf6\xf8-\xff"
# Signs that are letters in other encodings. Not ª · º and the soft hyphen, nor the accent, an apostrophe to many
_SIGN_IN_WORD = re.compile(
    rb"(?<=[A-Za-z%b])[\xa1-\xa9\xab\xac\xae-\xb3\xb5\xb6\xb8\xb9\xbb-\xbf\xd7\xf7](?=[A-Za-z%b])"
    % (_LETTERS, _LETTERS)
)
_FOREIGN_LETTERS = re.compile(rb"[%b]{4,}" % _LETTERS)  # Cyrillic or Greek, which are whole words of these bytes
_MAX_NON_ASCII = 0.4  # of the bytes; 0.05 in French, 0.8 in Russian
_MAX_SIGNS_IN_WORDS = 0.05  # of the non-ASCII bytes
_MAX_DAMAGE = 0.05  # of the bytes; a text with more control characters or invalid bytes is no text
_MIN_ZEROS, _MAX_ZEROS = 0.7, 0.01  # of the high and of the low bytes of UTF-16 in Latin script


@dataclass(frozen=True)
class TextEncoding:
    """How a text file is decoded.

    Attributes:
        codec: its name in Python.
        name: its name for users.
        mark_bytes: the length of the byte order mark.
        is_damaged: the file is UTF-8 with some invalid bytes.
        has_controls: it contains control characters, which no text has.
    """

    codec: str
    name: str
    mark_bytes: int = 0
    is_damaged: bool = False
    has_controls: bool = False

    @property
    def is_certainly_text(self) -> bool:
        return not self.is_damaged and not self.has_controls


def detect_encoding(path: Path) -> TextEncoding | RejectedRow:
    """The encoding of a file, compressed or not, or the reason why it is not text. Reads the whole file, in blocks."""
    status = stat_file(path)
    return _detect(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _detect(path: Path, size: int, modified: int) -> TextEncoding | RejectedRow:
    try:
        with open_bytes(path) as file:
            start = file.read(4096)
        for magic, what in _KNOWN_FORMATS:
            if start.startswith(magic):
                return RejectedRow(NOT_TEXT, what)
        if start[_TAR_AT:].startswith(b"ustar"):
            return RejectedRow(NOT_TEXT, "a tar archive: unpack it")
        for mark, codec, name in _MARKS:
            if start.startswith(mark):
                return _check_marked(path, TextEncoding(codec, name, len(mark)))
        utf16 = _find_utf16(start)
        if utf16 and _is_valid(path, utf16):
            return TextEncoding(utf16, "UTF-16")
        return _detect_without_mark(path, TextEncoding("utf-8", "UTF-8"))
    except DECOMPRESSION_ERRORS as error:
        if unsupported := describe_unsupported(error):
            return RejectedRow("unsupported archive", unsupported)
        return TextEncoding("utf-8", "UTF-8", is_damaged=True)  # the reader will report the damage


def _blocks(path: Path) -> Iterator[bytes]:
    with open_bytes(path) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def _is_valid(path: Path, codec: str) -> bool:
    decoder = codecs.getincrementaldecoder(codec)()
    try:
        for block in _blocks(path):
            decoder.decode(block)
        decoder.decode(b"", final=True)
        return True
    except UnicodeDecodeError:
        return False


def _check_marked(path: Path, encoding: TextEncoding) -> TextEncoding | RejectedRow:
    if encoding.name == "UTF-8":
        return _detect_without_mark(path, encoding)
    return encoding if _is_valid(path, encoding.codec) else RejectedRow(NOT_TEXT, f"damaged {encoding.name}")


def _find_utf16(start: bytes) -> str | None:
    """The byte order of UTF-16 without a mark, if the zeros among the first bytes leave no doubt."""
    pairs = len(start) // 2
    if pairs < 2 or b"\0" not in start:
        return None
    even, odd = start[: 2 * pairs : 2].count(0) / pairs, start[1 : 2 * pairs : 2].count(0) / pairs
    if odd >= _MIN_ZEROS and even <= _MAX_ZEROS:
        return "utf-16-le"
    return "utf-16-be" if even >= _MIN_ZEROS and odd <= _MAX_ZEROS else None


@dataclass
class _ByteCounts:
    size: int = 0
    controls: int = 0
    non_ascii: int = 0
    undefined: int = 0
    signs_in_words: int = 0
    foreign_letters: int = 0
    multi_byte: int = 0  # characters that are valid UTF-8 of several bytes
    invalid: int = 0  # bytes that are not valid UTF-8

    def is_windows_1252(self) -> bool:
        return (
            not self.controls
            and not self.undefined
            and not self.foreign_letters
            and not self.multi_byte  # a few in many invalid bytes would be possible, but not certain
            and self.non_ascii <= _MAX_NON_ASCII * self.size
            and self.signs_in_words <= _MAX_SIGNS_IN_WORDS * self.non_ascii
        )


def _count_controls(block: bytes) -> int:
    return len(block) - len(block.translate(None, _CONTROLS))


def _count(path: Path) -> _ByteCounts:
    counts, decoder = _ByteCounts(), codecs.getincrementaldecoder("utf-8")("surrogateescape")
    for block in _blocks(path):
        counts.size += len(block)
        counts.controls += _count_controls(block)
        text = decoder.decode(block)
        if not block.isascii():
            counts.non_ascii += len(block.translate(None, _ASCII))
            counts.undefined += len(_UNDEFINED.findall(block))
            counts.signs_in_words += len(_SIGN_IN_WORD.findall(block))
            counts.foreign_letters += len(_FOREIGN_LETTERS.findall(block))
        invalid = len(BAD_BYTE.findall(text))
        counts.invalid += invalid
        counts.multi_byte += sum(not character.isascii() for character in text) - invalid if not text.isascii() else 0
    counts.invalid += len(decoder.decode(b"", final=True))
    return counts


def _detect_without_mark(path: Path, utf8: TextEncoding) -> TextEncoding | RejectedRow:
    """UTF-8, undamaged or damaged, or Windows-1252; or the reason why it is none of them."""
    decoder, size, controls = codecs.getincrementaldecoder("utf-8")(), 0, 0
    try:
        for block in _blocks(path):
            decoder.decode(block)
            size, controls = size + len(block), controls + _count_controls(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return _detect_damaged(path, utf8)
    if controls > _MAX_DAMAGE * size:
        return RejectedRow(NOT_TEXT, f"{controls / size:.0%} of its bytes are control characters")
    return TextEncoding(utf8.codec, utf8.name, utf8.mark_bytes, has_controls=controls > 0)


def _detect_damaged(path: Path, utf8: TextEncoding) -> TextEncoding | RejectedRow:
    """The encoding of a file that is not valid UTF-8."""
    counts = _count(path)
    if not utf8.mark_bytes and counts.is_windows_1252():
        return TextEncoding("cp1252", "Windows-1252")
    damage = counts.controls + counts.invalid
    if damage > _MAX_DAMAGE * counts.size:
        if counts.controls > _MAX_DAMAGE * counts.size:
            what = f"{counts.controls / counts.size:.0%} of its bytes are control characters"
        else:
            what = f"{counts.invalid / counts.size:.0%} of its bytes are invalid UTF-8: convert it to UTF-8"
        return RejectedRow(NOT_TEXT, what)
    return TextEncoding(utf8.codec, utf8.name, utf8.mark_bytes, is_damaged=True, has_controls=counts.controls > 0)
