"""What a report means, in a few sentences: the model, how well it predicts text, how it behaves."""

import json
import math
from pathlib import Path

from rorchat.evaluation.gate import read_verdict
from rorchat.plan.show import format_duration
from rorchat.project_folder import PLAN, RUNS
from rorchat.reporting.runs import read_run_record
from rorchat.tokenizer import was_trained_on_documents_only


def describe_results(folder: Path, runs: list[Path]) -> list[str]:
    """The sentences of the summary, one per paragraph.

    Args:
        folder: the folder of the report. The verdict of the gate is read from it, and the plan from the project that it
            belongs to.
        runs: the runs in the order of their stages.
    """
    finished = [run for run in runs if read_run_record(run).get("metrics") is not None]
    sentences = [_describe_model(runs, finished)]
    if text := _describe_text(folder, finished):
        sentences.append(text)
    if behaviour := _describe_behaviour(folder / "behaviour.json"):
        sentences.append(behaviour)
    return sentences


def _describe_model(runs: list[Path], finished: list[Path]) -> str:
    stages = ", ".join(run.name for run in finished)
    unfinished = ", ".join(run.name for run in runs if run not in finished)
    note = f" Not finished: {unfinished}." if unfinished else ""
    if not finished:
        return f"No stage has finished yet.{note}"
    first, last = read_run_record(finished[0]), read_run_record(finished[-1])
    kind = "base model, which continues texts," if was_trained_on_documents_only(str(finished[-1])) else "chat model"
    parameters = f" with {last['parameters']:,} parameters" if last.get("parameters") else ""
    start = (first.get("settings") or {}).get("model")
    origin = f"from {start}" if start else "from random weights"
    seconds = sum(read_run_record(run)["metrics"].get("train_seconds", 0) for run in finished)
    duration = format_duration(seconds / 3600)
    return f"A {kind}{parameters}, trained {origin} in {duration} on {last.get('device', '?')} ({stages}).{note}"


def _describe_text(folder: Path, finished: list[Path]) -> str:
    """How well the first stage predicts held-out text, beside what the plan expected; "" if that is not recorded."""
    run = next((run for run in finished if read_run_record(run)["stage"] == "pretrain"), None)
    bits = read_run_record(run)["metrics"].get("eval_bits_per_byte") if run else None
    if run is None or bits is None or not math.isfinite(bits):
        return ""
    expected = _read_prediction(folder)
    planned = f"; {expected:.2f} were planned" if expected else ""
    return (
        f"After {run.name} it predicts held-out text with {bits:.2f} bits per byte{planned}. Less is better: a "
        f"compressor that uses the model would need {bits / 8:.0%} of the text's size."
    )


def _read_prediction(folder: Path) -> float | None:
    """The bits per byte that the plan of a project expects; None if the runs belong to no project."""
    if folder.name != RUNS:
        return None
    try:
        return float(json.loads((folder.parent / PLAN).read_text(encoding="utf-8"))["predicted_bits_per_byte"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe_behaviour(path: Path) -> str:
    """The verdict of the gate; "" if there is none.

    Raises:
        DataError: the file cannot be read.
    """
    if not path.is_file():
        return ""
    verdict = read_verdict(path)
    if not verdict.failures():
        return (
            "It passes the behaviour gate: among other things, it ends its turns, does not speak for the user, and "
            "knows its persona."
        )
    return f"{verdict.summary()} The table under Behaviour shows all measures, with examples of the failures."
