"""Draws the curves of runs."""

import re
from pathlib import Path
from typing import Any

from rorchat.reporting.losses import list_unvalidated
from rorchat.reporting.runs import read_metrics

Line = tuple[str, str, float]  # key of metrics.jsonl, label, scale


def draw_curves(runs: list[Path], target: Path) -> None:
    """Plots losses, reward, learning rates, gradient norm, speed, MFU and memory by step, one column of panels per run.

    Panels without values are omitted. Dotted vertical lines mark resumes, red ones divergences.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [read_metrics(run) for run in runs]
    keys = dict.fromkeys(key for records in logs for record in records for key in record)
    panels = [panel for panel in _list_panels([*keys]) if any(key in keys for key, _, _ in panel[1])]
    panels = panels or list(_list_panels([])[:1])
    figure, axes = pyplot.subplots(
        len(panels), len(runs), figsize=(5.2 * len(runs), 0.6 + 2 * len(panels)), squeeze=False,
        constrained_layout=True, sharex="col",
    )  # fmt: skip
    for column, (run, records) in enumerate(zip(runs, logs, strict=True)):
        unvalidated = list_unvalidated(run)
        for axis, (label, lines) in zip(axes[:, column], panels, strict=True):
            _draw_panel(axis, records, lines, unvalidated)
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


def _draw_panel(axis: Any, records: list[dict], lines: tuple[Line, ...], unvalidated: list[str]) -> None:
    """Draws the lines of a panel. `unvalidated` names the sources that the validation loss does not cover."""
    highest = 0.0
    for key, label, scale in lines:
        if key == "eval_loss" and unvalidated:
            label += f", without {', '.join(unvalidated)}"
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
