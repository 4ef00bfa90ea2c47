"""Reads dialogues as ParlAI writes them, such as PersonaChat: numbered lines, the texts of a line divided by tabs.

    1 your persona: i like to remodel homes.
    2 hi , how are you doing ?<TAB>i am fine , i am remodeling a house .<TAB><TAB>another reply|one more

Number 1 begins a dialogue. A line has a text, the reply to it, and after an empty field other replies to choose from,
which are not read. The persona is that of the one who replies; it becomes the system message.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rorchat.reading.chat_logs import ExportedChat
from rorchat.reading.slices import Row
from rorchat.reading.text import read_lines
from rorchat.reading.turns import LEFT_OUT
from rorchat.rows import RejectedRow, message

PARTNER_LEFT_OUT = "the persona of the user left out"
_OWN, _PARTNER, _SILENCE = "your persona: ", "partner's persona: ", "__SILENCE__"
_LINE = re.compile(r"(\d+) (.*)", re.DOTALL)
_FIRST_LINE = re.compile(r"1 (your persona: |partner's persona: |[^\t]*[^\W\d_][^\t]*\t[^\t]*[^\W\d_])")


def begins_dialogue(line: str) -> bool:
    """Whether a line is the first of a dialogue."""
    return bool(_FIRST_LINE.match(line))


def read_parlai(path: Path) -> Iterator[Row]:
    """Yields (file:line of the first line, conversation). A dialogue with a line that cannot be read is rejected."""
    place, texts, problem = "", list[str](), None
    for where, line in read_lines(path):
        match = None if isinstance(line, RejectedRow) else _LINE.match(line)
        if match and match[1] == "1" and place:
            yield place, problem or _read_dialogue(texts)
            place, texts, problem = "", [], None
        place = place or where
        if match and int(match[1]) == len(texts) + 1:
            texts.append(match[2])
        elif isinstance(line, RejectedRow):
            problem = problem or line
        else:
            problem = problem or RejectedRow("not a dialogue", f"line {len(texts) + 1} has another number, or none")
    if place:
        yield place, problem or _read_dialogue(texts)


def _read_dialogue(texts: list[str]) -> ExportedChat:
    persona: list[str] = []
    turns: list[dict] = []
    repairs: list[str] = []
    for text in texts:
        if text.startswith(_OWN):
            persona.append(text.removeprefix(_OWN).strip())
        elif text.startswith(_PARTNER):
            repairs.append(PARTNER_LEFT_OUT)
        else:
            question, reply = (text.split("\t") + [""])[:2]
            turns += [message("user", question)] if question.strip() != _SILENCE else []
            turns += [message("assistant", reply)] if reply.strip() else []
    if turns and turns[0]["role"] == "assistant":
        del turns[0]
        repairs.append(LEFT_OUT)
    system = [message("system", f"Your persona: {' '.join(persona)}")] if persona else []
    return ExportedChat([*system, *turns], "ParlAI", repairs=list(dict.fromkeys(repairs)))
