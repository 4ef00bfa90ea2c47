"""Reads chats that WhatsApp has exported as text.

    [31.12.20, 21:03:11] Anna: text         12/31/20, 9:03 PM - Anna: text

A line that does not begin with a date continues the message before it. A message without a name is from WhatsApp and
left out, as are attachments: their text begins with an invisible mark (U+200E) or is a note in angle brackets. Other
notes, such as that a message was deleted, depend on the language of the phone and are read as text.

The order of day and month depends on the phone, too: if one of the numbers exceeds 12 anywhere in the file, that one is
the day; otherwise the month comes first if the clock has 12 hours.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rorchat.reading.chat_logs import LogMessage, split_log
from rorchat.reading.slices import Row
from rorchat.reading.text import read_lines
from rorchat.rows import RejectedRow

MARK = "\u200e"  # written before notes of WhatsApp
_DATE = r"(?P<a>\d{1,4})[./-](?P<b>\d{1,2})[./-](?P<c>\d{1,4})\.?"
_TIME = r"(?P<hour>\d{1,2})[:.](?P<minute>\d{2})(?:[:.](?P<second>\d{2}))?(?:\s*(?P<half>[AaPp])\.?\s?[Mm]\.?)?"
_START = re.compile(rf"{MARK}?\[{_DATE},?(\sklo)?\s{_TIME}\]\s")
_START_PLAIN = re.compile(rf"{MARK}?{_DATE},?(\sklo)?\s{_TIME}\s[-–]\s")
_NAME = re.compile(r"(?P<name>[^:\n]{1,60}): ?(?P<text>.*)", re.DOTALL)
_NOTE = re.compile(rf"{MARK}.*|<[^<>\n]+>", re.DOTALL)
_EDITED = re.compile(rf"\s*{MARK}<[^<>\n]+>$")  # "This message was edited"


def match_start(line: str) -> re.Match | None:
    """The date at the start of a message; None if the line continues the message before it."""
    return _START.match(line) or _START_PLAIN.match(line)


def read_whatsapp(path: Path) -> Iterator[Row]:
    """Yields (file:line of the first message, conversation). A line that cannot be read is a rejected row."""
    starts: list[tuple[str, re.Match, list[str]]] = []
    for place, line in read_lines(path, keep_empty=True):
        if isinstance(line, RejectedRow):
            yield place, line
        elif start := match_start(line):
            starts.append((place, start, [line[start.end() :]]))
        elif starts:
            starts[-1][2].append(line)
    day_first = _is_day_first([start for _, start, _ in starts])
    messages = []
    for place, start, lines in starts:
        time = _parse_time(start, day_first)
        if time is None:
            yield place, RejectedRow("no date", start[0].strip())
        elif named := _NAME.fullmatch("\n".join(lines).rstrip()):
            text = _EDITED.sub("", named["text"])
            messages.append(LogMessage(place, time, _clean(named["name"]), "" if _NOTE.fullmatch(text) else text))
    yield from split_log("WhatsApp", messages)


def _clean(name: str) -> str:
    """A name without the invisible marks and the tilde before people who are not in the contacts."""
    return name.strip(f"{MARK}\u202a\u202c\u200f ~\u00a0\u202f")


def _is_day_first(starts: list[re.Match]) -> bool:
    if any(int(start["a"]) > 12 for start in starts if len(start["a"]) < 3):
        return True
    if any(int(start["b"]) > 12 for start in starts):
        return False
    return not any(start["half"] for start in starts)


def _parse_time(start: re.Match, day_first: bool) -> datetime | None:
    first, second, third = (int(start[name]) for name in "abc")
    if len(start["a"]) == 4:
        year, month, day = first, second, third
    else:
        day, month = (first, second) if day_first else (second, first)
        year = third if third > 99 else 2000 + third
    hour = int(start["hour"])
    if start["half"]:
        hour = hour % 12 + (12 if start["half"] in "Pp" else 0)
    try:
        return datetime(year, month, day, hour, int(start["minute"]), int(start["second"] or 0))
    except ValueError:
        return None
