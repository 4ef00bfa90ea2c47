"""The layout of a project's folder, and how far each of its runs has come.

run.sh      the commands of the stages, see rorchat/project/runner.py
plan.json   what was planned
runs/       the folder of every run, `report.md` and `curves.png`
"""

import json
from pathlib import Path

SCRIPT, PLAN, RUNS = "run.sh", "plan.json", "runs"
TRAINING_STAGES = ("pretrain", "midtrain", "sft", "dpo")  # in the order in which they run


def is_project(folder: Path) -> bool:
    """Whether `rorchat new` has made the folder."""
    return (folder / SCRIPT).is_file() and (folder / PLAN).is_file()


def find_last_run(folder: Path) -> Path | None:
    """The run of the last training stage that has finished; None if no stage has."""
    runs = [folder / RUNS / stage for stage in TRAINING_STAGES]
    return next((run for run in reversed(runs) if (run / "model" / "config.json").is_file()), None)


def locate_runs(folder: Path) -> Path:
    """The folder of all runs of a project. Any other folder is returned unchanged."""
    return folder / RUNS if is_project(folder) else folder


def measure_progress(run: Path) -> float:
    """The share of a run that need not be repeated, from 0 to 1: 1 if it has finished, else that of its checkpoint."""
    if (run / "tokenizer.json").is_file():
        return 1.0
    try:
        if json.loads((run / "run.json").read_text(encoding="utf-8")).get("finished"):
            return 1.0
    except (OSError, ValueError):
        return 0.0
    return max((_read_share(state) for state in run.glob("checkpoint-*/trainer_state.json")), default=0.0)


def _read_share(state: Path) -> float:
    """The share of all steps that are done at a checkpoint; 0 if its state cannot be read."""
    try:
        values = json.loads(state.read_text(encoding="utf-8"))
        return min(1.0, values["global_step"] / values["max_steps"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0
