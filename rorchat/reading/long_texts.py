"""Cuts a long text into documents, between its chapters, paragraphs or sentences.

A book would otherwise be one document: none of four books could be held out. A text of at most MAXIMUM characters stays
whole. Of a longer one, pieces of about TARGET characters are cut off, each at the best boundary between MINIMUM and
MAXIMUM characters: before a chapter heading, else after an empty line, a line end that ends a sentence, any line end, a
sentence, white space; of several, at the one nearest to TARGET. A word is never cut: one longer than MAXIMUM is a piece
of its own.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

# 8,000 characters are about 2,000 tokens, twice the context window of GPT-2, so few windows contain a cut. Twice that
# length leaves room to find the end of a chapter or a paragraph.
TARGET = 8_000
DIVIDED_INTO = 10  # pieces of the only document of a source
SHORTEST_WITHOUT_SENTENCES = 400  # characters; a shorter text is divided only between sentences or lines

_LINE_END = r"(?>\r\n|[\n\r])"  # atomic, so that \r\n is never taken for two line ends
_CLOSING = r"[\"'”’»)\]*_]*"
_NUMERAL = r"(?:[IVXLCDM]+|\d+|[A-ZÄÖÜÉ][\w-]*)\b"
_HEADING = re.compile(
    r"[ \t]*(?:\#{1,6}[ \t]+\S"
    r"|(?:CHAPTER|Chapter|BOOK|Book|PART|Part|VOLUME|Volume|ACT|Act|SCENE|Scene|LETTER|Letter|CANTO|Canto|STAVE|Stave"
    rf"|ADVENTURE|Adventure|KAPITEL|Kapitel|CHAPITRE|Chapitre|CAP[IÍ]TULO|Cap[ií]tulo|CAPITOLO|Capitolo)"
    rf"[ \t]+{_NUMERAL}[^\n\r]{{0,60}}{_LINE_END}"
    rf"|(?:PREFACE|Preface|PROLOGUE|Prologue|EPILOGUE|Epilogue|INTRODUCTION|Introduction)\.?[ \t]*{_LINE_END}"
    rf"|[IVXLC]+(?:\.[ \t]+[A-Z][^\n\r]{{0,60}})?\.?[ \t]*{_LINE_END})"
)
# Not no-break spaces, and not white space that a combining character is drawn on
_WHITE_SPACE = r"[^\S\xa0\u202f\u2007]+(?![\u0300-\u036f\u200d\ufe0f])"
_EMPTY_LINES = re.compile(rf"{_LINE_END}(?:[ \t\f\v]*{_LINE_END})+")
_LINE_OF_SENTENCE = re.compile(rf"[.!?…]{_CLOSING}[ \t]*{_LINE_END}|[。！？][」』”’）]*[ \t]*{_LINE_END}")  # noqa: RUF001
_LINE = re.compile(_LINE_END)
_SENTENCE = re.compile(rf"[.!?…]{_CLOSING}{_WHITE_SPACE}|[。！？][」』”’）]*")  # noqa: RUF001
_BETWEEN_WORDS = re.compile(_WHITE_SPACE)
_NEXT_BOUNDARY = re.compile(r"[^\S\xa0\u202f\u2007](?![\u0300-\u036f\u200d\ufe0f])|[。！？]")  # noqa: RUF001
_OPENING = "\"'“‘«([*_¿¡—–- "  # noqa: RUF001
_ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr St Prof Rev Hon Capt Col Gen Lt Sgt Mme Mlle Jr Sr vs etc cf No Nos Vol vol pp ca bzw Hr Fr".split()
)
_OTHER_THAN_WORDS = re.compile(r"\W+")
_LONGEST_ABBREVIATION = max(map(len, _ABBREVIATIONS))


@dataclass(frozen=True)
class Limits:
    """Characters of a piece: about `target`, at least half of it if possible, at most twice as many."""

    target: int = TARGET

    @property
    def minimum(self) -> int:
        return self.target // 2

    @property
    def maximum(self) -> int:
        return 2 * self.target

    def describe(self, cut: int) -> str:
        """What was done with long texts, `cut` of which were cut."""
        verb = "were" if cut != 1 else "was"
        return (
            f"{cut:,} of more than {self.maximum:,} characters {verb} cut into documents of about {self.target:,}, at "
            "chapter headings, else empty lines, line ends, sentence ends or white space"
        )


def _ends(pattern: re.Pattern) -> Callable[[str, int, int], list[int]]:
    return lambda text, first, last: [match.end() for match in pattern.finditer(text, first, last)]


def _ends_before_headings(text: str, first: int, last: int) -> list[int]:
    return [end for end in _ends(_EMPTY_LINES)(text, first, last) if _HEADING.match(text, end)]


def _sentence_ends(text: str, first: int, last: int) -> list[int]:
    """The positions after sentences. A full stop after an abbreviation, or before a small letter, ends none."""
    ends = []
    for match in _SENTENCE.finditer(text, first, last):
        if text[match.end() : match.end() + 9].lstrip(_OPENING)[:1].islower():
            continue
        before = text[max(0, match.start() - _LONGEST_ABBREVIATION - 1) : match.start()]
        word = _OTHER_THAN_WORDS.split(before)[-1]
        is_abbreviation = word in _ABBREVIATIONS or (len(word) == 1 and word.isalpha())
        if not (is_abbreviation and text[match.start()] == "."):
            ends.append(match.end())
    return ends


#: Kinds of boundaries, the best first: each gives the ends of possible pieces between two positions of a text.
_AT_LINES = (_ends_before_headings, _ends(_EMPTY_LINES), _ends(_LINE_OF_SENTENCE), _ends(_LINE))
_IN_LINES = (_sentence_ends, _ends(_BETWEEN_WORDS))


def _find_cut(window: str, limits: Limits) -> int | None:
    """The length of the first piece of a text that begins with `window`, which has `limits.maximum` characters.

    None if there is no boundary in it.
    """
    if window.endswith("\r"):
        window = window[:-1]  # it may be half of a line end
    target, near = limits.target, limits.target // 10
    for ends_in in (*(_AT_LINES if "\n" in window or "\r" in window else ()), *_IN_LINES):
        # First near the target, because a long line has thousands of words. One more character, because white space
        # that goes on at the end of the range would end elsewhere
        ends = [end for end in ends_in(window, target - 2 * near, target + near + 1) if abs(end - target) <= near]
        if not ends:
            ends = [end for end in ends_in(window, limits.minimum - 1, len(window)) if end >= limits.minimum]
        if ends:
            return min(ends, key=lambda end: abs(end - target))
    before = _inner(_ends(_BETWEEN_WORDS)(window, 0, limits.minimum), window)
    return before[-1] if before else None


class Cutter:
    """Cuts one text, which may be given in parts of any size: the pieces are the same. Joined, they are the text."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self._pending = ""
        self._searched = 0  # characters of `_pending` without any boundary

    @property
    def has_text(self) -> bool:
        """Whether some of the text has not been yielded yet."""
        return bool(self._pending)

    def feed(self, text: str) -> Iterator[str]:
        """Yields the pieces that are complete. Each ends with the white space that separates it from the next."""
        pending, start = self._pending + text, 0
        while len(pending) - start > self.limits.maximum:
            size = self._find_size(pending, start)
            if size is None:
                break
            yield pending[start : start + size]
            start += size
        self._pending = pending[start:]

    def _find_size(self, pending: str, start: int) -> int | None:
        if not self._searched:
            size = _find_cut(pending[start : start + self.limits.maximum], self.limits)
            if size is not None:
                return size
        boundary = _NEXT_BOUNDARY.search(pending, start + max(self._searched, self.limits.maximum - 1))
        if boundary and boundary.end() < len(pending):  # the last character may be followed by a combining one
            self._searched = 0
            return boundary.end() - start
        self._searched = len(pending) - start - 1
        return None

    def finish(self) -> str:
        """The rest of the text: its last piece, or the whole text if it is not longer than the maximum."""
        rest, self._pending, self._searched = self._pending, "", 0
        return rest


def cut(text: str, limits: Limits | None = None) -> list[str]:
    """The pieces of a text, which joined are the text; the text itself if it is not longer than the maximum."""
    cutter = Cutter(limits or Limits())
    return [*cutter.feed(text), cutter.finish()]


def divide(text: str) -> list[str]:
    """About ten pieces of a text that is the only one of its source, so that one of them can be held out.

    Joined, they are the text. A text without several paragraphs, lines or sentences is divided between words if it has
    SHORTEST_WITHOUT_SENTENCES characters, and otherwise is the only piece.
    """
    inner: list[int] = []
    for ends_in in (*_AT_LINES[:-1], _sentence_ends):
        inner = sorted({*inner, *_inner(ends_in(text, 0, len(text)), text)})
        if len(inner) >= DIVIDED_INTO - 1:
            break
    inner = inner or _inner(_ends(_LINE)(text, 0, len(text)), text)
    if not inner and len(text) >= SHORTEST_WITHOUT_SENTENCES:
        inner = _inner(_ends(_BETWEEN_WORDS)(text, 0, len(text)), text)
    wanted = [number * len(text) / DIVIDED_INTO for number in range(1, DIVIDED_INTO)]
    chosen = sorted({min(inner, key=lambda end: abs(end - at)) for at in wanted}) if inner else []  # noqa: B023
    return [text[start:end] for start, end in zip([0, *chosen], [*chosen, len(text)], strict=True)]


def _inner(ends: list[int], text: str) -> list[int]:
    """The boundaries with text on both sides."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    return [end for end in ends if first < end < last]


def cut_apart(text: str, limits: Limits) -> Iterator[str]:
    """The pieces of a text without the white space between them."""
    cutter = Cutter(limits)
    yield from (stripped for piece in cutter.feed(text) if (stripped := piece.rstrip()))
    if (rest := cutter.finish()) and not rest.isspace():
        yield rest
