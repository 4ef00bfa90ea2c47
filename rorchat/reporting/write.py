"""Writes report.md and curves.png."""

from pathlib import Path

from rorchat.evaluation.scores import read_scores
from rorchat.project_folder import RUNS
from rorchat.reporting.curves import draw_curves
from rorchat.reporting.runs import find_runs, read_run_record
from rorchat.reporting.summary import describe_results
from rorchat.reporting.tables import (
    format_behaviour,
    format_data_table,
    format_forgetting_table,
    format_loss_table,
    format_replies,
    format_run_table,
    format_samples,
    format_stage_table,
    format_table,
)

LOSS_NOTE = (
    "The training loss is the mean over the steps since the log line before, so it lags behind a validation loss that "
    "is measured after them. Replayed documents and sources that are not in the validation loss make the two differ "
    "further: compare training losses with training losses only. In fine-tuning, the loss covers the replies of "
    "conversations, and every token of replayed documents."
)


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes report.md and curves.png into a run folder or the folder of a story.

    Returns:
        The paths of the two files.
    """
    runs = find_runs(folder)
    curves, report = folder / "curves.png", folder / "report.md"
    draw_curves(runs, curves)
    title = folder.absolute().parent.name if folder.name == RUNS else folder.name
    parts = [f"# {title}", *describe_results(folder, runs)]
    if replies := format_replies(runs):
        parts += ["## What it says", replies]
    parts += ["## Runs", format_run_table(runs), "![curves](curves.png)"]
    if stages := format_stage_table(folder):
        parts += ["## Stages", stages]
    if (folder / "scores.json").is_file():
        last = read_scores(folder / "scores.json")[-1]
        if last.examples:
            table = format_table(["user", "model"], [list(example) for example in last.examples])
            parts += [
                f"### Exchanges with {last.name}",
                "Replies are greedy. A reply is correct if it contains the answer and none of the alternatives.",
                table,
            ]
    if (folder / "behaviour.json").is_file():
        parts += ["## Behaviour", format_behaviour(folder / "behaviour.json")]
    if losses := format_loss_table(runs):
        parts += ["## What the losses cover", LOSS_NOTE, losses]
    if forgetting := format_forgetting_table(runs):
        parts += ["## Forgetting", "Loss on the text named in each row, before and after the stage.", forgetting]
    parts += ["## Samples", format_samples(runs), "## Data", format_data_table(runs)]
    record = read_run_record(runs[-1])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts.append(f"Made with rorchat {record['rorchat']}, {versions}.")
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report, curves
