"""Writes report.md and curves.png from run folders: training curves, scores, behaviour, samples and data of all stages.

The runs of a story (see the glossary in CONTRIBUTING.md) lie in one folder; a report covers all of them.
"""

import json
import re
from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.evaluation.gate import read_verdict
from rorchat.evaluation.scores import Scores, read_scores
from rorchat.jsonl import read_json_lines

STAGE_ORDER = ("pretrain", "sft", "dpo", "grpo")


def find_runs(folder: Path) -> list[Path]:
    """Finds the runs in a folder, sorted by stage: the folder itself, or its subfolders with a run.json.

    Raises:
        DataError: there is no run.
    """
    runs = [folder] if (folder / "run.json").is_file() else sorted(path.parent for path in folder.glob("*/run.json"))
    if not runs:
        raise DataError(f"{folder} contains no run: there is no run.json in it or in its subfolders.")

    def position(run: Path) -> tuple[int, bool, str]:
        record = read_run_record(run)
        stage = STAGE_ORDER.index(record["stage"]) if record["stage"] in STAGE_ORDER else len(STAGE_ORDER)
        is_continued = "model" in (record.get("settings") or {})  # pretraining from a model, which is midtraining
        return stage, is_continued, run.name

    return sorted(runs, key=position)


def read_run_record(run: Path) -> dict[str, Any]:
    """Reads the run.json of a run.

    Raises:
        DataError: the file cannot be read or is not the record of a run.
    """
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run}/run.json cannot be read: {error}") from None
    if not isinstance(record, dict) or "stage" not in record:
        raise DataError(f"{run}/run.json is not the record of a run: it has no 'stage'.")
    return record


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


# -- curves ----------------------------------------------------------------------------------------------------------

Line = tuple[str, str, float]  # key of metrics.jsonl, label, scale


def draw_curves(runs: list[Path], target: Path) -> None:
    """Plots losses, reward, learning rates, gradient norm, speed, MFU and memory by step, one column of panels per run.

    Panels without values are omitted. Dotted vertical lines mark resumes, red ones divergences.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [drop_superseded_lines(read_json_lines(run / "metrics.jsonl")) for run in runs]
    keys = dict.fromkeys(key for records in logs for record in records for key in record)
    panels = [panel for panel in _list_panels([*keys]) if any(key in keys for key, _, _ in panel[1])]
    panels = panels or list(_list_panels([])[:1])
    figure, axes = pyplot.subplots(
        len(panels), len(runs), figsize=(5.2 * len(runs), 0.6 + 2 * len(panels)), squeeze=False,
        constrained_layout=True, sharex="col",
    )  # fmt: skip
    for column, (run, records) in enumerate(zip(runs, logs, strict=True)):
        for axis, (label, lines) in zip(axes[:, column], panels, strict=True):
            _draw_panel(axis, records, lines)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title(run.name)
        axes[-1][column].set_xlabel("step")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _list_panels(keys: list[str]) -> tuple[tuple[str, tuple[Line, ...]], ...]:
    """(label of the y axis, lines) for every panel."""
    sources = [match for key in keys if (match := re.fullmatch(r"eval_(.+)_loss", key))]
    return (
        ("loss\n(nats/token; dpo: per pair)", (("loss", "training", 1), ("eval_loss", "validation", 1))),
        ("validation loss by source\n(nats/token)", tuple((match[0], match[1], 1) for match in sources)),
        ("reward", (("reward", "training", 1), ("eval_reward", "validation", 1))),
        ("learning rate", (("learning_rate", "AdamW", 1), ("matrix_learning_rate", "Muon", 1))),
        ("gradient norm", (("grad_norm", "gradient norm", 1),)),
        ("tokens per second", (("tokens_per_second", "tokens/s", 1),)),
        ("MFU (%)", (("mfu", "MFU", 100),)),
        ("peak memory (GB)", (("memory_bytes", "memory", 1e-9),)),
    )


def _draw_panel(axis: Any, records: list[dict], lines: tuple[Line, ...]) -> None:
    highest = 0.0
    for key, label, scale in lines:
        # numbers only: JSON Lines hold NaN and infinity as strings
        values = {r["step"]: r[key] * scale for r in records if isinstance(r.get(key), (int, float))}
        if not values:
            continue
        highest = max(highest, *values.values())
        marker = "o" if len(values) < 12 else None
        axis.plot(*zip(*sorted(values.items()), strict=True), label=label, marker=marker, markersize=3, linewidth=1.2)
    for record in records:
        if record.get("event") in ("resumed", "diverged"):
            red = record["event"] == "diverged"
            axis.axvline(record["step"], color="tab:red" if red else "0.5", linewidth=1, linestyle="-" if red else ":")
    axis.grid(alpha=0.3)
    axis.margins(x=0.02)
    drawn = len(axis.get_legend_handles_labels()[0])
    if drawn > 1:
        axis.legend(fontsize="small", frameon=False, ncols=-(-drawn // 6))
    elif not drawn:
        axis.text(0.5, 0.5, "not logged", ha="center", va="center", color="0.5", transform=axis.transAxes)
    if highest and not any("loss" in key or "reward" in key for key, _, _ in lines):
        axis.set_ylim(0, 1.1 * highest)


# -- tables ----------------------------------------------------------------------------------------------------------


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def format_score_table(columns: list[Scores]) -> str:
    """A Markdown table of scores, one column per model."""
    return _format_columns([(column.name, column.rows()) for column in columns])


def _format_columns(columns: list[tuple[str, dict[str, str]]]) -> str:
    """A table of (title, {row: cell}) columns; missing cells are "-"."""
    names = list(dict.fromkeys(name for _, cells in columns for name in cells))
    rows = [[name, *(cells.get(name, "-") for _, cells in columns)] for name in names]
    return format_table(["", *(title for title, _ in columns)], rows)


def format_stage_table(folder: Path) -> str:
    """The results of all stages: scores.json, behaviour.json and the base loss of every run.

    Returns:
        A Markdown table, or "" if there are no results. Columns of models without a run come first, then one per stage.
    """
    runs = {run.resolve(): run.name for run in find_runs(folder)}
    scores = read_scores(folder / "scores.json") if (folder / "scores.json").is_file() else []
    run_scores = {run: column for column in scores if (run := _find_run_folder(column.folder)) in runs}
    columns = [(column.name, column.rows()) for column in scores if column not in run_scores.values()]
    behaviour, losses = _read_behaviour_cells(folder / "behaviour.json"), _read_base_losses([*runs])
    for run, name in runs.items():
        column = run_scores.get(run)
        cells = (column.rows() if column else {}) | behaviour.get(run, {}) | losses.get(run, {})
        if cells:
            columns.append((column.name if column else name, cells))
    return _format_columns(columns) if columns else ""


def _find_run_folder(model: str) -> Path:
    """The run folder that contains a model folder."""
    folder = Path(model).resolve()
    return folder.parent if folder.name == "model" else folder


def _read_behaviour_cells(path: Path) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} for the model of a verdict and the previous stage's model."""
    if not path.is_file():
        return {}
    verdict = read_verdict(path)
    columns: dict[Path, dict[str, str]] = {}
    for behaviour in filter(None, (verdict.before, verdict.model)):
        values = {name: behaviour.measures[name].value for name in verdict.thresholds}
        columns[_find_run_folder(behaviour.name)] = {
            f"gate: {name.replace('_', ' ')}": "-" if value is None else f"{100 * value:.1f} %"
            for name, value in values.items()
        }
    columns[_find_run_folder(verdict.model.name)]["gate"] = "FAIL" if verdict.failures() else "pass"
    return columns


def _read_base_losses(runs: list[Path]) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} of the base loss. The loss before a stage belongs to the run that the stage started from."""
    records = [(run, record) for run in runs if "base_loss" in ((record := read_run_record(run)).get("metrics") or {})]
    texts = dict.fromkeys(record.get("base_text", "") for _, record in records)
    columns: dict[Path, dict[str, str]] = {}
    for run, record in records:
        text, metrics = record.get("base_text", ""), record["metrics"]
        row = "base validation loss, nats/token" if "held-out" in text else "base loss, nats/token"
        row += f", on {text}" if len(texts) > 1 else ""
        start = record["settings"].get("model")
        if start and "base_loss_before" in metrics:
            cells = columns.setdefault(_find_run_folder(start), {})
            cells.setdefault(row, f"{metrics['base_loss_before']:.3f}")
        columns.setdefault(run, {})[row] = f"{metrics['base_loss']:.3f}"
    return columns


def format_run_table(runs: list[Path]) -> str:
    """Size, duration and validation loss, one row per run."""
    rows = []
    for run in runs:
        record = read_run_record(run)
        metrics = record.get("metrics")
        if metrics is None:
            rows.append([run.name, "unfinished", *["-"] * 6])
            continue
        loss, bits = metrics.get("eval_loss"), metrics.get("eval_bits_per_byte")
        unit = "per pair" if record["stage"] == "dpo" else "nats/token"
        rows.append(
            [
                run.name,
                f"{record['parameters']:,}",
                f"{metrics.get('steps', 0):,}",
                f"{metrics.get('tokens', 0):,}",
                f"{metrics.get('train_seconds', 0):,.0f}",
                "-" if loss is None else f"{loss:.3f} {unit}",
                "-" if bits is None else f"{bits:.3f}",
                record["device"],
            ]
        )
    header = ["run", "parameters", "steps", "tokens", "seconds", "validation loss", "bits per byte", "device"]
    return format_table(header, rows)


def format_forgetting_table(runs: list[Path]) -> str:
    """The base loss before and after every stage, as a table; "" if it was not measured."""
    rows = []
    for run in runs:
        record = read_run_record(run)
        metrics = record.get("metrics") or {}
        if "base_loss" not in metrics:
            continue
        cells = [run.name, record.get("base_text", "-")]
        for key in ("base_loss", "base_bits_per_byte"):
            before, after = metrics.get(f"{key}_before"), metrics[key]
            shown, change = ("-", "-") if before is None else (f"{before:.3f}", f"{after - before:+.3f}")
            cells += [shown, f"{after:.3f}", change]
        rows.append(cells)
    if not rows:
        return ""
    header = ["run", "measured on", "nats/token before", "after", "change", "bits per byte before", "after", "change"]
    return format_table(header, rows)


def format_data_table(runs: list[Path], public: bool = False) -> str:
    """The kept and rejected rows of every source, as a table. `public` omits the paths of sources."""
    rows = [
        [
            run.name,
            source["source"].partition("=")[0] if public else source["source"],
            source["licence"],
            f"{source['kept']:,} of {source['rows_in']:,}",
            ", ".join(f"{reason} {count}" for reason, count in source["rejects"].items()) or "none",
        ]
        for run in runs
        for source in read_run_record(run).get("data", [])
    ]
    return format_table(["run", "source", "licence", "rows kept", "rejected"], rows)


def format_samples(runs: list[Path]) -> str:
    """The first and last sample of every prompt, one table per run."""
    parts = []
    for run in runs:
        texts: dict[str, list[str]] = {}
        for sample in read_json_lines(run / "samples.jsonl"):
            texts.setdefault(sample["prompt"], []).append(sample["text"])
        if texts:
            rows = [[prompt, samples[0], samples[-1]] for prompt, samples in texts.items()]
            parts.append(f"### {run.name}\n\n" + format_table(["prompt", "before", "after"], rows))
    return "\n\n".join(parts) or "No samples were generated."


def format_behaviour(path: Path) -> str:
    """A verdict of `rorchat gate` as a table, with examples of the failed measures."""
    verdict = read_verdict(path)
    parts = [format_table(*verdict.table())]
    if verdict.failures():
        parts.append(format_table(["failed", "user", "model"], [list(example) for example in verdict.examples()]))
    return "\n\n".join(parts)


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes report.md and curves.png into a run folder or the folder of a story.

    Returns:
        The paths of the two files.
    """
    runs = find_runs(folder)
    curves, report = folder / "curves.png", folder / "report.md"
    draw_curves(runs, curves)
    parts = [f"# {folder.name}", format_run_table(runs), "![curves](curves.png)"]
    if stages := format_stage_table(folder):
        parts += ["## Stages", stages]
    if (folder / "scores.json").is_file():
        last = read_scores(folder / "scores.json")[-1]
        parts.append("Replies are greedy. A reply is correct if it contains the answer and none of the alternatives.")
        if last.examples:
            table = format_table(["user", "model"], [list(example) for example in last.examples])
            parts += [f"### Exchanges with {last.name}", table]
    if (folder / "behaviour.json").is_file():
        parts += ["## Behaviour", format_behaviour(folder / "behaviour.json")]
    if forgetting := format_forgetting_table(runs):
        parts += ["## Forgetting", "Loss on the text named in each row, before and after the stage.", forgetting]
    parts += ["## Samples", format_samples(runs), "## Data", format_data_table(runs)]
    record = read_run_record(runs[-1])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts.append(f"Made with rorchat {record['rorchat']}, {versions}.")
    report.write_text("\n\n".join(parts) + "\n")
    return report, curves
