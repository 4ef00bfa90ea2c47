"""JSON lines files: append strict JSON, and drop a line that was only partly written."""

import json
import math
from pathlib import Path


def _strict(value: object) -> object:
    """JSON has no NaN and no infinity: they become "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def append_json_line(path: Path, record: dict) -> None:
    """Adds one record to a JSON lines file, strict JSON whatever its numbers are."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_strict(record), ensure_ascii=False, allow_nan=False) + "\n")


def drop_partial_line(path: Path) -> None:
    """Cuts off a last line that was only half written when a run was killed."""
    if path.is_file():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
