"""Run folders -> curves.png and report.md: what was done, how it went, what came of it, stage by stage."""

import json
import re
from pathlib import Path

from rorchat.errors import DataError
from rorchat.evaluation.gate import read_verdict
from rorchat.evaluation.scores import Scores, read_scores
from rorchat.jsonl import read_json_lines

STAGE_ORDER = ("pretrain", "sft", "dpo", "grpo")


def find_runs(folder: Path) -> list[Path]:
    """The runs of a story, in the order of their stages: the folder itself, or those in it that have a run.json."""
    runs = [folder] if (folder / "run.json").is_file() else sorted(path.parent for path in folder.glob("*/run.json"))
    if not runs:
        raise DataError(f"{folder} holds no run: there is no run.json in it or one level below.")

    def position(run: Path) -> tuple[int, bool, str]:
        record = read_run_record(run)
        stage = STAGE_ORDER.index(record["stage"]) if record["stage"] in STAGE_ORDER else len(STAGE_ORDER)
        went_on = "model" in (record.get("settings") or {})  # from a model, as midtraining does
        return stage, went_on, run.name

    return sorted(runs, key=position)


def read_run_record(run: Path) -> dict:
    try:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{run}/run.json cannot be read: {error}") from None
    if not isinstance(record, dict) or "stage" not in record:
        raise DataError(f"{run}/run.json cannot be read: it is no record of a run, which names its stage.")
    return record


def drop_superseded_lines(records: list[dict]) -> list[dict]:
    """The records of metrics.jsonl that count: a restart takes back those of later steps, which it does again.

    And a phase that was appended at its step: no checkpoint has it.
    """
    kept: list[dict] = []
    for record in records:
        if record.get("event") == "resumed":
            step = record["step"]
            kept = [each for each in kept if each["step"] < step + (each.get("event") != "new phase")]
        kept.append(record)
    return kept


def _points(records: list[dict], key: str, scale: float) -> list[tuple[int, float]]:
    """(step, value) by step; "nan" and "inf", which stand as words in JSON, are no points."""
    return sorted({r["step"]: r[key] * scale for r in records if isinstance(r.get(key), (int, float))}.items())


def _source_losses(runs: list[list[dict]]) -> tuple[tuple[str, str, float], ...]:
    keys = dict.fromkeys(key for records in runs for record in records for key in record)
    found = [re.fullmatch(r"eval_(.+)_loss", key) for key in keys]
    return tuple((match[0], match[1], 1) for match in found if match)


def draw_curves(runs: list[Path], target: Path) -> None:
    """One column of panels a run, by step: losses, reward, learning rates, gradient norm, speed, MFU and memory.

    Panels without a value in any run are left out. A dotted line is a restart, a red one the step that diverged.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logged = [drop_superseded_lines(read_json_lines(run / "metrics.jsonl")) for run in runs]
    panels = (
        ("loss\n(nats/token; dpo: a pair)", (("loss", "training", 1), ("eval_loss", "validation", 1))),
        ("validation loss by source\n(nats/token)", _source_losses(logged)),
        ("reward", (("reward", "training", 1), ("eval_reward", "validation", 1))),
        ("learning rate", (("learning_rate", "AdamW", 1), ("matrix_learning_rate", "Muon", 1))),
        ("gradient norm", (("grad_norm", "gradient norm", 1),)),
        ("tokens per second", (("tokens_per_second", "tokens/s", 1),)),
        ("MFU (%)", (("mfu", "MFU", 100),)),
        ("peak memory (GB)", (("memory_bytes", "memory", 1e-9),)),
    )
    keys = {key for records in logged for record in records for key in record}
    panels = [panel for panel in panels if any(key in keys for key, _, _ in panel[1])] or [panels[0]]
    figure, axes = pyplot.subplots(
        len(panels), len(runs), figsize=(5.2 * len(runs), 0.6 + 2 * len(panels)), squeeze=False,
        constrained_layout=True, sharex="col",
    )  # fmt: skip
    for column, (run, records) in enumerate(zip(runs, logged, strict=True)):
        for axis, (label, lines) in zip(axes[:, column], panels, strict=True):
            _draw_panel(axis, records, lines)
            if column == 0:
                axis.set_ylabel(label)
        axes[0][column].set_title(run.name)
        axes[-1][column].set_xlabel("step")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)


def _draw_panel(axis, records: list[dict], lines: tuple[tuple[str, str, float], ...]) -> None:
    highest = 0.0
    for key, name, scale in lines:
        points = _points(records, key, scale)
        if not points:
            continue
        highest = max(highest, *(value for _, value in points))
        marker = "o" if len(points) < 12 else None
        axis.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=3, linewidth=1.2)
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


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def format_score_table(columns: list[Scores]) -> str:
    """Scores side by side, a model a column."""
    return _side_by_side([(column.name, column.rows()) for column in columns])


def _side_by_side(columns: list[tuple[str, dict[str, str]]]) -> str:
    names = list(dict.fromkeys(name for _, cells in columns for name in cells))
    rows = [[name, *(cells.get(name, "-") for _, cells in columns)] for name in names]
    return format_table(["", *(title for title, _ in columns)], rows)


def format_stage_table(folder: Path) -> str:
    """What was measured on the stages of a story, side by side: scores.json, behaviour.json and the forgetting meter.

    Returns:
        A Markdown table with a column a stage, behind models that are of no run here; empty where nothing was measured.
    """
    runs = {run.resolve(): run.name for run in find_runs(folder)}
    scores = read_scores(folder / "scores.json") if (folder / "scores.json").is_file() else []
    of_runs = {place: column for column in scores if (place := _place_of(column.folder)) in runs}
    others = [column for column in scores if column not in of_runs.values()]
    behaviour, losses = _behaviour_cells(folder / "behaviour.json"), _base_losses([*runs])
    columns = [(column.name, column.rows()) for column in others]
    for place, name in runs.items():
        column = of_runs.get(place)
        cells = (column.rows() if column else {}) | behaviour.get(place, {}) | losses.get(place, {})
        if cells:
            columns.append((column.name if column else name, cells))
    return _side_by_side(columns) if columns else ""


def _place_of(model: str) -> Path:
    """The folder of the run that a model's folder stands for."""
    folder = Path(model).resolve()
    return folder.parent if folder.name == "model" else folder


def _behaviour_cells(path: Path) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} of what the gate judged, on its model and that of the stage before."""
    if not path.is_file():
        return {}
    verdict, found = read_verdict(path), {}
    for behaviour in filter(None, (verdict.before, verdict.model)):
        values = {name: behaviour.measures[name].value for name in verdict.thresholds}
        found[_place_of(behaviour.name)] = {
            f"gate: {name.replace('_', ' ')}": "-" if value is None else f"{100 * value:.1f} %"
            for name, value in values.items()
        }
    found[_place_of(verdict.model.name)]["gate"] = "FAIL" if verdict.failures() else "pass"
    return found


def _base_losses(runs: list[Path]) -> dict[Path, dict[str, str]]:
    """{run: {row: cell}} of the loss on the base's text: after each stage, and of the model that a stage began with."""
    records = [(run, record) for run in runs if "base_loss" in (record := read_run_record(run)).get("metrics") or {}]
    texts = dict.fromkeys(record.get("base_text", "") for _, record in records)
    found: dict[Path, dict[str, str]] = {}
    for run, record in records:
        text, metrics = record.get("base_text", ""), record["metrics"]
        row = "base validation loss, nats/token" if "held-out" in text else "base loss, nats/token"
        row += f", on {text}" if len(texts) > 1 else ""
        began_with = record["settings"].get("model")
        if began_with and "base_loss_before" in metrics:
            found.setdefault(_place_of(began_with), {}).setdefault(row, f"{metrics['base_loss_before']:.3f}")
        found.setdefault(run, {})[row] = f"{metrics['base_loss']:.3f}"
    return found


def format_run_table(runs: list[Path]) -> str:
    rows = []
    for run in runs:
        record = read_run_record(run)
        metrics = record.get("metrics")
        if metrics is None:
            rows.append([run.name, "unfinished", *["-"] * 6])
            continue
        loss, bits = metrics.get("eval_loss"), metrics.get("eval_bits_per_byte")
        unit = "a pair" if record["stage"] == "dpo" else "nats/token"
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
    """What each stage cost the base: its loss on one text, before and after; empty where nobody has measured it."""
    rows = []
    for run in runs:
        record = read_run_record(run)
        metrics = record.get("metrics") or {}
        if "base_loss" not in metrics:
            continue
        cells = [run.name, record.get("base_text", "-")]
        for key in ("base_loss", "base_bits_per_byte"):
            before, after = metrics.get(f"{key}_before"), metrics[key]
            was, change = ("-", "-") if before is None else (f"{before:.3f}", f"{after - before:+.3f}")
            cells += [was, f"{after:.3f}", change]
        rows.append(cells)
    if not rows:
        return ""
    header = ["run", "measured on", "nats/token before", "after", "change", "bits per byte before", "after", "change"]
    return format_table(header, rows)


def format_data_table(runs: list[Path], public: bool = False) -> str:
    """Where every row went; `public` tables name a source without the path it was read from."""
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
    parts = []
    for run in runs:
        samples = read_json_lines(run / "samples.jsonl")
        prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
        rows = []
        for prompt in prompts:
            texts = [sample["text"] for sample in samples if sample["prompt"] == prompt]
            rows.append([prompt, texts[0], texts[-1]])
        if rows:
            parts.append(f"### {run.name}\n\n" + format_table(["prompt", "before", "after"], rows))
    return "\n\n".join(parts) or "No samples were taken."


def format_behaviour(path: Path) -> str:
    """A verdict of `rorchat gate` as a table, and what was said where a measure failed."""
    verdict = read_verdict(path)
    parts = [format_table(*verdict.table())]
    if verdict.failures():
        parts += [format_table(["failed", "user", "model"], [list(example) for example in verdict.examples()])]
    return "\n\n".join(parts)


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes report.md and curves.png into a run's or a story's folder.

    Returns:
        The two paths, report first.
    """
    runs = find_runs(folder)
    curves, report = folder / "curves.png", folder / "report.md"
    draw_curves(runs, curves)
    parts = [f"# {folder.name}", format_run_table(runs), "![curves](curves.png)"]
    if stages := format_stage_table(folder):
        parts += ["## Stages", stages]
    if (folder / "scores.json").is_file():
        columns = read_scores(folder / "scores.json")
        parts += [
            "Answers are the likeliest words. A question is right if the reply has the answer and no other of its kind."
        ]
        if columns[-1].examples:
            parts += [
                "### Exchanges with " + columns[-1].name,
                format_table(["user", "model"], [list(e) for e in columns[-1].examples]),
            ]
    if (folder / "behaviour.json").is_file():
        parts += ["## Behaviour", format_behaviour(folder / "behaviour.json")]
    if forgetting := format_forgetting_table(runs):
        said = "The loss on the text that a line names, before that stage and after it."
        parts += ["## What the base forgot", said, forgetting]
    parts += ["## Samples", format_samples(runs), "## Data", format_data_table(runs)]
    versions = read_run_record(runs[-1])["versions"]
    parts += [
        "Made with rorchat "
        + read_run_record(runs[-1])["rorchat"]
        + ", "
        + ", ".join(f"{k} {v}" for k, v in versions.items())
        + "."
    ]
    report.write_text("\n\n".join(parts) + "\n")
    return report, curves
