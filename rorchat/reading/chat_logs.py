"""Divides the log of a chat, which may span years, into conversations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from rorchat.reading.slices import Row

PAUSE_HOURS = 3  # without a message, after which a new conversation begins


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


class LoggedChat(dict):
    """{"messages": [{"speaker", "text"}]} of a conversation in a log.

    Attributes:
        program: the chat program that wrote the log.
        speakers: those of the whole log, in the order of their first messages.
        without_text: number of messages that were left out, because they have no text.
    """

    def __init__(self, program: str, messages: Sequence[LogMessage], speakers: Sequence[str]):
        spoken = [message for message in messages if message.text.strip()]
        super().__init__(messages=[{"speaker": message.speaker, "text": message.text} for message in spoken])
        self.program, self.speakers, self.without_text = program, list(speakers), len(messages) - len(spoken)


def split_log(program: str, messages: Sequence[LogMessage]) -> Iterator[Row]:
    """Yields (place of the first message, conversation) of a log."""
    speakers = list(dict.fromkeys(message.speaker for message in messages if message.text.strip()))
    start, pause = 0, timedelta(hours=PAUSE_HOURS)
    for number in range(1, len(messages) + 1):
        if number == len(messages) or messages[number].time - messages[number - 1].time > pause:
            yield messages[start].place, LoggedChat(program, messages[start:number], speakers)
            start = number


def place_of(path: Path | str, number: int) -> str:
    """The place of a message in an export: its number, from 0."""
    return f"{path}, message {number}"
