"""The tables of a report, as Markdown."""

from collections.abc import Collection
from pathlib import Path

from rorchat.evaluation.behaviour import MEASURES
from rorchat.evaluation.gate import read_verdict
from rorchat.evaluation.scores import BASE_LOSS_ROWS, Scores, gate_row, read_scores
from rorchat.jsonl import read_json_lines
from rorchat.reporting.losses import list_loss_rows
from rorchat.reporting.runs import find_runs, last_value, read_metrics, read_run_record
from rorchat.sources.base import OWN_FILES


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


OWN_FILES_IN_PUBLIC = "the author's own files, licence not stated"
Table = tuple[list[str], list[list[str]]]  # header and rows


def build_score_table(columns: list[Scores]) -> Table:
    """A table of scores, one column per model."""
    return _join_columns([(column.name, column.rows()) for column in columns])


def format_score_table(columns: list[Scores]) -> str:
    """`build_score_table` as Markdown."""
    return format_table(*build_score_table(columns))


def _join_columns(columns: list[tuple[str, dict[str, str]]]) -> Table:
    """A table of (title, {row: cell}) columns; missing cells are "-"."""
    names = list(dict.fromkeys(name for _, cells in columns for name in cells))
    rows = [[name, *(cells.get(name, "-") for _, cells in columns)] for name in names]
    return ["", *(title for title, _ in columns)], rows


def format_stage_table(folder: Path) -> str:
    """`build_stage_table` as Markdown; "" if there are no results."""
    table = build_stage_table(folder)
    return format_table(*table) if table[1] else ""


def build_stage_table(folder: Path) -> Table:
    """The results of all stages: scores.json, behaviour.json and the base loss of every run.

    Columns of models without a run come first, then one per stage. Without results, the table has no rows.
    """
    runs = {run.resolve(): run.name for run in find_runs(folder)}
    scores = read_scores(folder / "scores.json") if (folder / "scores.json").is_file() else []
    run_scores = {run: column for column in scores if (run := _find_run_folder(column.folder, runs)) in runs}
    columns = [(column.name, column.rows()) for column in scores if column not in run_scores.values()]
    behaviour, losses = _read_behaviour_cells(folder / "behaviour.json", runs), _read_base_losses([*runs])
    for run, name in runs.items():
        column = run_scores.get(run)
        cells = (column.rows() if column else {}) | behaviour.get(run, {}) | losses.get(run, {})
        if cells:
            columns.append((column.name if column else name, cells))
    return _join_columns(_leave_out_single_gate_rows(columns) if behaviour else columns)


def _leave_out_single_gate_rows(columns: list[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Without the gate's measures if they are of one model only: the report's section on behaviour shows those."""
    rows = {gate_row(measure) for measure in MEASURES}
    if sum(not rows.isdisjoint(cells) for _, cells in columns) > 1:
        return columns
    return [(title, {name: cell for name, cell in cells.items() if name not in rows}) for title, cells in columns]


def _find_run_folder(model: str, runs: Collection[Path]) -> Path:
    """The run folder that contains a model folder.

    A relative path was written by a command that ran in another folder: it is the run whose path ends with it.
    """
    path = Path(model)
    parts = path.parts[:-1] if path.name == "model" else path.parts
    found = Path(*parts).resolve()
    if found in runs or path.is_absolute():
        return found
    return next((run for run in runs if parts and run.parts[-len(parts) :] == parts), found)


def _read_behaviour_cells(path: Path, runs: Collection[Path]) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} for the model of a verdict and the previous stage's model."""
    if not path.is_file():
        return {}
    verdict = read_verdict(path)
    columns: dict[Path, dict[str, str]] = {}
    for behaviour in filter(None, (verdict.before, verdict.model)):
        values = {name: behaviour.measures[name].value for name in verdict.thresholds}
        columns[_find_run_folder(behaviour.name, runs)] = {
            gate_row(name): "-" if value is None else f"{100 * value:.1f} %" for name, value in values.items()
        }
    columns[_find_run_folder(verdict.model.name, runs)]["gate"] = "FAIL" if verdict.failures() else "pass"
    return columns


def _read_base_losses(runs: list[Path]) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} of the base loss. The loss before a stage belongs to the run that the stage started from."""
    records = [(run, record) for run in runs if "base_loss" in ((record := read_run_record(run)).get("metrics") or {})]
    texts = dict.fromkeys(record.get("base_text", "") for _, record in records)
    columns: dict[Path, dict[str, str]] = {}
    for run, record in records:
        text, metrics = record.get("base_text", ""), record["metrics"]
        row = BASE_LOSS_ROWS[0] if "held-out" in text else "base loss, nats/token"
        row += f", on {text}" if len(texts) > 1 else ""
        start = record["settings"].get("model")
        if start and "base_loss_before" in metrics:
            cells = columns.setdefault(_find_run_folder(start, runs), {})
            cells.setdefault(row, f"{metrics['base_loss_before']:.3f}")
        columns.setdefault(run, {})[row] = f"{metrics['base_loss']:.3f}"
    return columns


def format_run_table(runs: list[Path]) -> str:
    """Size, duration and losses, one row per run. Of an unfinished run: what it has logged so far."""
    header = ["run", "parameters", "steps", "tokens", "seconds", "training loss", "validation loss", "bits per byte",
              "device"]  # fmt: skip
    return format_table(header, [_format_run(run) for run in runs])


def _format_run(run: Path) -> list[str]:
    record, logged = read_run_record(run), read_metrics(run)
    metrics = record.get("metrics")
    title = run.name if metrics is not None else f"{run.name} (unfinished)"
    if metrics is None:
        last = logged[-1] if logged else {}
        metrics = {"steps": last.get("step", 0), "tokens": last.get("tokens", 0)}
        metrics |= {"train_seconds": last_value(logged, "seconds") or 0}
        metrics |= {name: last_value(logged, name) for name in ("eval_loss", "eval_bits_per_byte")}
    unit = "per pair" if record["stage"] == "dpo" else "nats/token"
    parameters, bits = record.get("parameters"), metrics.get("eval_bits_per_byte")
    losses = [last_value(logged, "loss"), metrics.get("eval_loss")]
    return [
        title,
        "-" if parameters is None else f"{parameters:,}",
        f"{metrics.get('steps', 0):,}",
        f"{metrics.get('tokens', 0):,}",
        f"{metrics.get('train_seconds', 0):,.0f}",
        *("-" if loss is None else f"{loss:.3f} {unit}" for loss in losses),
        "-" if bits is None else f"{bits:.3f}",
        record.get("device", "-"),
    ]


def format_loss_table(runs: list[Path]) -> str:
    """What each source adds to the training loss and to the validation loss of a run; "" if no run has finished."""
    rows = [
        [
            run.name,
            row.spec if row.name != "replay" else f"{row.spec} (replay)",
            row.training,
            row.validation or "not in it",
            "-" if row.loss is None else f"{row.loss:.3f}",
        ]
        for run in runs
        for row in list_loss_rows(run)
    ]
    if not rows:
        return ""
    return format_table(["run", "source", "in the training loss", "in the validation loss", "validation loss"], rows)


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
    """The kept and rejected rows of every source, as a table.

    `public` is for readers who do not have the data: it omits the paths of sources, and calls the user's own files so.
    """
    rows = [
        [
            run.name,
            source["source"].partition("=")[0] if public else source["source"],
            OWN_FILES_IN_PUBLIC if public and source["licence"] == OWN_FILES else source["licence"],
            f"{source['kept']:,} of {source['rows_in']:,}",
            ", ".join(f"{reason} {count}" for reason, count in source["rejects"].items()) or "none",
        ]
        for run in runs
        for source in read_run_record(run).get("data", [])
    ]
    return format_table(["run", "source", "licence", "rows kept", "rejected"], rows)


def format_samples(runs: list[Path]) -> str:
    """The first and last sample of every prompt, one table per run. A run that has sampled once has one column."""
    parts = []
    for run in runs:
        texts = _read_samples(run)
        if not texts:
            continue
        rows = [[prompt, samples[0], samples[-1]] for prompt, samples in texts.items()]
        header = ["prompt", "before", "after"]
        if all(len(samples) == 1 for samples in texts.values()):
            rows, header = [row[:2] for row in rows], ["prompt", f"after {_first_step(run):,} steps"]
        parts.append(f"### {run.name}\n\n" + format_table(header, rows))
    return "\n\n".join(parts) or "No samples were generated."


def format_replies(runs: list[Path]) -> str:
    """The newest samples of the last run that has any, as a table; "" if there are none."""
    for run in reversed(runs):
        if texts := _read_samples(run):
            rows = [[prompt, samples[-1]] for prompt, samples in texts.items()]
            return format_table(["prompt", run.name], rows)
    return ""


def _read_samples(run: Path) -> dict[str, list[str]]:
    """{prompt: its samples in the order in which they were generated}."""
    texts: dict[str, list[str]] = {}
    for sample in read_json_lines(run / "samples.jsonl"):
        texts.setdefault(sample["prompt"], []).append(sample["text"])
    return texts


def _first_step(run: Path) -> int:
    return read_json_lines(run / "samples.jsonl")[0].get("step", 0)


def format_behaviour(path: Path) -> str:
    """A verdict of `rorchat gate` as a table, with examples of the failed measures."""
    verdict = read_verdict(path)
    parts = [format_table(*verdict.table())]
    if verdict.failures():
        parts.append(format_table(["failed", "user", "model"], [list(example) for example in verdict.examples()]))
    return "\n\n".join(parts)
