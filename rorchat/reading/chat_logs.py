"""Divides the log of a chat, which may span years, into conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from rorchat.reading.slices import Row

PAUSE_HOURS = 3  # without a message, after which a new conversation begins
WITHOUT_TEXT = "messages without text left out"


@dataclass(frozen=True)
class LogMessage:
    """A message of a log.

    Attributes:
        text: empty if the message has none, such as a picture.
    """

    place: str
    time: datetime
    speaker: str
    text: str


class ExportedChat(dict):
    """{"messages": [...]} of a conversation that a chat program has exported.

    Attributes:
        program: the chat program that wrote the log.
        speakers: those of the whole log, in the order of their first messages; empty if the messages have roles.
        repairs: what was changed or left out.
    """

    def __init__(
        self, messages: list[dict[str, str]], program: str, speakers: Sequence[str] = (), repairs: Sequence[str] = ()
    ):
        super().__init__(messages=messages)
        self.program, self.speakers, self.repairs = program, tuple(speakers), tuple(repairs)


def split_log(program: str, messages: Sequence[LogMessage]) -> Iterator[Row]:
    """Yields (place of the first message, conversation) of a log."""
    speakers = list(dict.fromkeys(message.speaker for message in messages if message.text.strip()))
    start, pause = 0, timedelta(hours=PAUSE_HOURS)
    for number in range(1, len(messages) + 1):
        if number == len(messages) or messages[number].time - messages[number - 1].time > pause:
            part, start = messages[start:number], number
            spoken = [{"speaker": m.speaker, "text": m.text} for m in part if m.text.strip()]
            repairs = [WITHOUT_TEXT] if len(spoken) < len(part) else []
            yield part[0].place, ExportedChat(spoken, program, speakers, repairs)


def place_of(path: Path | str, number: int) -> str:
    """The place of a message in an export: its number, from 0."""
    return f"{path}, message {number}"
