"""Decompresses gzip, zstd, bzip2 and xz, and says what an archive is that cannot be read."""

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from functools import partial
from typing import IO, cast

BLOCK_BYTES = 2**16
#: Bytes that a decoder may hold in memory. `xz -9` takes half of it; it is also the limit of zstd without `--long`.
MEMORY_LIMIT = 2**27
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
HEADER_BYTES = 18  # of a zstd frame, at most
_ZSTD, _ZSTD_SKIPPABLE = b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
#: First bytes -> the format
_FORMATS = {
    b"\x1f\x8b": "gzip",
    _ZSTD: "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!": "rar",
    b"\x04\x22\x4d\x18": "lz4",
}
#: Part of a decoder's message -> what is wrong with a stream that is not damaged. zstd reports these only in English.
_UNSUPPORTED = {
    "too much memory": "its window is larger than {limit} MiB: recompress it without --long",
    "Memory usage limit": "it takes more than {limit} MiB of memory: recompress it with `xz -9` or less",
    "Dictionary mismatch": "it needs the dictionary that it was compressed with: decompress it (`zstd -d -D`)",
}


def open_compressed(source: str | IO[bytes], suffix: str) -> IO[bytes]:
    """The content of a compressed file, given by its path or open.

    Args:
        suffix: a key of COMPRESSIONS.
    """
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(source, "rb"))
    if suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(source, compression="zstd"))
    decompressor = bz2.BZ2Decompressor if suffix == ".bz2" else partial(lzma.LZMADecompressor, memlimit=MEMORY_LIMIT)
    file = open(source, "rb") if isinstance(source, str) else source
    return io.BufferedReader(_Streams(file, decompressor), BLOCK_BYTES)


class _Streams(io.RawIOBase):
    """The content of the streams of a .bz2 or .xz file, one after the other.

    The standard library's `bz2.open` and `lzma.open` end without an error at a later stream that is damaged.
    """

    def __init__(self, file: IO[bytes], new_decompressor: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]):
        self._file, self._new_decompressor = file, new_decompressor
        self._decompressor = new_decompressor()
        self._has_data = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        data = self._decompress(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompress(self, size: int) -> bytes:
        """At most `size` bytes; none only at the end of the file."""
        while True:
            raw = b""
            if self._decompressor.eof:
                raw = self._begin_stream()
                if not raw:
                    return b""
            elif self._decompressor.needs_input:
                raw = self._file.read(BLOCK_BYTES)
                if not raw and not self._has_data:
                    return b""  # an empty file
                if not raw:
                    raise EOFError("the file ends before its last stream does")
            self._has_data = True
            if data := self._decompressor.decompress(raw, size):
                return data

    def _begin_stream(self) -> bytes:
        """The first bytes of the next stream, without the zeros that may precede it; empty at the end of the file."""
        raw = self._decompressor.unused_data.lstrip(b"\0")
        while not raw and (block := self._file.read(BLOCK_BYTES)):
            raw = block.lstrip(b"\0")
        if raw:
            self._decompressor = self._new_decompressor()
        return raw


def refuse_header(start: bytes, suffix: str) -> str:
    """Why a compressed file that begins with `start` cannot be read, though it need not be damaged; or empty."""
    name = COMPRESSIONS[suffix]
    found = next((known for magic, known in _FORMATS.items() if start.startswith(magic)), "")
    if suffix == ".zst" and start[1:4] == _ZSTD_SKIPPABLE and 0x50 <= start[0] <= 0x5F:
        return ""  # a frame without content, which precedes those of pzstd
    if start and found != name:
        return f"not {name}, as its name says{f', but {found}' if found else ''}: rename it"
    return _refuse_frame(start) if suffix == ".zst" and len(start) > 5 else ""


def _refuse_frame(start: bytes) -> str:
    """Why a zstd frame cannot be decoded, by its header (RFC 8878, section 3.1.1)."""
    descriptor = start[4]
    if descriptor & 3:
        return f"zstd: {_UNSUPPORTED['Dictionary mismatch']}"
    if descriptor & 0x20:  # a single segment: the window is as large as the content
        size = (1, 2, 4, 8)[descriptor >> 6]
        window = int.from_bytes(start[5 : 5 + size], "little")
    else:
        base = 1 << (10 + (start[5] >> 3))
        window = base + base // 8 * (start[5] & 7)
    if window <= MEMORY_LIMIT:
        return ""
    return (
        f"zstd with a window of {window / 2**20:,.0f} MiB, but at most {MEMORY_LIMIT >> 20} MiB are kept in memory: "
        "recompress it, as in `zstd -dc --long=31 OLD.zst | zstd -o NEW.zst`"
    )


def describe_unsupported(error: Exception) -> str:
    """What is wrong with an archive that is not damaged, by the error of its decoder; empty if it is damaged."""
    message = next((text for part, text in _UNSUPPORTED.items() if part in str(error)), "")
    return message.format(limit=MEMORY_LIMIT >> 20)
