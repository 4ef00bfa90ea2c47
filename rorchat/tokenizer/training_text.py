"""Reads text up to a limit, in pieces that fit into memory, with counts and progress."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rorchat.console import shows_bars
from rorchat.errors import UsageError

PIECE_CHARACTERS = 100_000  # the BPE trainer buffers 256 texts: 26 MB, where 256 whole books would need far more
LOG_INTERVAL_SECONDS = 10
# Matches up to the white space before the last word. GPT-2's pre-tokenization and ours split there anyway, so that the
# word counts of the BPE trainer do not change
_UP_TO_LAST_WORD = re.compile(r".+(?=\s\S)", re.DOTALL)


@dataclass
class BoundedText:
    """Iterates over texts until `max_characters` are read; long texts are split between words. Can be read once.

    Afterwards `characters` and `utf8_bytes` count the text that was read, and `stopped` is true if there was more.

    Args:
        texts: documents.
        max_characters: exact maximum; the last text is cut there.
        show: report progress on stderr: a bar in a terminal, a line every ten seconds in a log.

    Raises:
        UsageError: the limit is not positive.
    """

    texts: Iterable[str]
    max_characters: int
    show: bool = False
    characters: int = 0
    utf8_bytes: int = 0
    stopped: bool = False

    def __post_init__(self):
        if self.max_characters < 1:
            raise UsageError(f"max_characters is {self.max_characters}: it must be at least 1.")

    def __iter__(self) -> Iterator[str]:
        progress = _Progress(self.max_characters) if self.show else None
        for piece in self._pieces():
            self.characters += len(piece)
            self.utf8_bytes += len(piece.encode())
            yield piece
            if progress:
                progress.update(self.characters)
        if progress:
            progress.close(self.characters)

    def _pieces(self) -> Iterator[str]:
        for text in self.texts:
            start = 0
            while start < len(text):
                room = self.max_characters - self.characters
                if not room:
                    self.stopped = True
                    return
                end = start + min(PIECE_CHARACTERS, room)
                if room > PIECE_CHARACTERS and end < len(text):
                    between_words = _UP_TO_LAST_WORD.match(text, start, end)
                    end = between_words.end() if between_words else end
                yield text[start:end]
                start = end


class _Progress:
    """Shows the characters read, their rate, and at most how much time is left: only the limit of the text is known."""

    def __init__(self, max_characters: int):
        self.started = self.last_line = time.monotonic()
        self.bar = None
        if shows_bars():  # in a log, tqdm would write one endless line
            from tqdm.auto import tqdm

            layout = "{desc} {percentage:3.0f}% |{bar}| {n_fmt} characters, {rate_fmt}, at most {remaining} left"
            self.bar = tqdm(
                desc="reading",
                total=max_characters,
                unit=" characters",
                unit_scale=True,
                dynamic_ncols=True,
                bar_format=layout,
                leave=False,
            )

    def update(self, characters: int) -> None:
        if self.bar is not None:
            self.bar.update(characters - self.bar.n)
        elif time.monotonic() - self.last_line >= LOG_INTERVAL_SECONDS:
            self.last_line = time.monotonic()
            rate = characters / (self.last_line - self.started)
            self._print(f"{characters:,} characters read, {rate:,.0f} a second")

    def close(self, characters: int) -> None:
        if self.bar is not None:
            self.bar.close()
        self._print(f"{characters:,} characters read in {time.monotonic() - self.started:.1f} s")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201
