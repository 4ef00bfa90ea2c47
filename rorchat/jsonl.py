"""Appends to and reads JSON Lines files, and repairs them after a crash."""

import json
from pathlib import Path

from rorchat.files import to_json


def append_json_line(path: Path, record: dict) -> None:
    """Appends one record as a line of strict JSON."""
    with path.open("a", encoding="utf-8") as file:
        file.write(to_json(record, ensure_ascii=False) + "\n")


def drop_partial_line(path: Path) -> None:
    """Removes an incomplete last line, as left by a process that was killed while writing."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def read_json_lines(path: Path) -> list[dict]:
    """Returns the records of a JSON Lines file, or an empty list if the file does not exist.

    Lines that are not valid JSON are skipped: a process that was killed while writing leaves such a line.
    """
    if not path.is_file():
        return []
    records = []
    # Split bytes at "\n": str.splitlines() also splits at U+2028 and U+0085, which JSON strings may contain, and a
    # partly written line may end in the middle of a character.
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
