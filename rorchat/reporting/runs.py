"""The runs in a folder, their records and their metrics."""

import json
from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.files import as_number
from rorchat.jsonl import read_json_lines
from rorchat.lineage import SMOKE_SUFFIX

STAGE_ORDER = ("pretrain", "sft", "dpo", "grpo")


def find_runs(folder: Path) -> list[Path]:
    """Finds the runs in a folder, sorted by stage: the folder itself, or its subfolders with a run.json.

    Smoke runs (`--smoke`) are left out, unless there are no others.

    Raises:
        DataError: there is no run.
    """
    if (folder / "run.json").is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/run.json"))
    runs = [run for run in found if not run.name.endswith(SMOKE_SUFFIX)] or found
    if not runs:
        raise DataError(f"{folder} contains no run: there is no run.json in it or in its subfolders.")

    def position(run: Path) -> tuple[int, bool, str]:
        record = read_run_record(run)
        stage = STAGE_ORDER.index(record["stage"]) if record["stage"] in STAGE_ORDER else len(STAGE_ORDER)
        is_continued = "model" in (record.get("settings") or {})  # pretraining from a model, which is midtraining
        return stage, is_continued, run.name

    return sorted(runs, key=position)


def read_run_record(run: Path) -> dict[str, Any]:
    """Reads the run.json of a run. The record of an unfinished run has no metrics.

    Raises:
        DataError: the file cannot be read or is not the record of a run.
    """
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run}/run.json cannot be read: {error}") from None
    if not isinstance(record, dict) or "stage" not in record:
        raise DataError(f"{run}/run.json is not the record of a run: it has no 'stage'.")
    if "metrics" in record:
        record["metrics"] = {name: as_number(value) for name, value in record["metrics"].items()}
    return record


def read_metrics(run: Path) -> list[dict]:
    """Reads the records of metrics.jsonl that are not superseded. Empty if the run has not logged anything."""
    return drop_superseded_lines(read_json_lines(run / "metrics.jsonl"))


def drop_superseded_lines(records: list[dict]) -> list[dict]:
    """Removes records of metrics.jsonl whose steps were repeated after a resume.

    A phase that started at the step of the checkpoint is removed too, because the checkpoint does not contain it.
    """
    kept: list[dict] = []
    for record in records:
        if record.get("event") == "resumed":
            step = record["step"]
            kept = [
                line
                for line in kept
                if line["step"] < step or (line["step"] == step and line.get("event") != "new phase")
            ]
        kept.append(record)
    return kept


def last_value(records: list[dict], key: str) -> float | None:
    """The last finite value of a field of metrics.jsonl, in which NaN and infinity are strings."""
    values = [record[key] for record in records if isinstance(record.get(key), (int, float))]
    return values[-1] if values else None
