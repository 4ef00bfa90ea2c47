"""Summarizes the records of a run as medians, ratios and shares of the peak, and formats them as Markdown."""

import re
import textwrap
from collections.abc import Sequence
from functools import partial
from statistics import mean, median

from works import SIDES, Work

SPEED = {"tokens": ",.0f", "pairs": ".3g"}  # format of a speed, by its unit
STEADY = 0.05  # relative change of a calibration that is reported

fill = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)


def flops_per_token(work: Work, parameters: int) -> int:
    """6N + 12LdT, where N includes the tied embedding but not the positions, and attention is counted as non-causal.

    Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    layers, _, width = work.shape
    return 6 * (parameters - work.block_size * width) + 12 * layers * width * work.block_size


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def summarize(work: Work, runs: list[dict], proof: dict, peaks: dict[str, float]) -> dict[str, dict]:
    """Figures of each side over its repeats; a side with an invalid repeat or without a valid one is left out.

    Args:
        runs: Records with `side`, `repeat` and `status`.
        peaks: FLOP/s by precision.
    """
    subject = {run["repeat"]: run for run in runs if run["side"] == work.subject and run["status"] == "ok"}
    summary = {}
    for side in dict.fromkeys(run["side"] for run in runs):
        valid = [run for run in runs if run["side"] == side and run["status"] == "ok"]
        if not valid or any(run["side"] == side and run["status"] == "invalid" for run in runs):
            continue
        steps = spread([median(run["step_seconds"]) for run in valid])
        speed = spread([work.units_per_step / median(run["step_seconds"]) for run in valid])
        summary[side] = {
            "precision": valid[0]["precision"],
            "repeats": len(valid),
            "per_second": speed,
            "step_seconds": steps,
            "mean_step_seconds": median(mean(run["step_seconds"]) for run in valid),
            "first_step_seconds": spread([run["first_step_seconds"] for run in valid]),
            "optimizer_seconds": spread([median(run["optimizer_seconds"]) for run in valid]),
            "peak_memory_bytes": spread([run["peak_memory_bytes"] for run in valid]),
        }
        if work.data == "rows":  # otherwise the FLOPs depend on how a side packs and pads
            flops = speed["median"] * flops_per_token(work, proof["parameters"])
            summary[side]["share_of_peak"] = {precision: flops / peak for precision, peak in peaks.items()}
        pairs = [(subject[run["repeat"]], run) for run in valid if run["repeat"] in subject]
        if pairs and side != work.subject:
            summary[side]["speed_ratio"] = spread(
                [median(theirs["step_seconds"]) / median(ours["step_seconds"]) for ours, theirs in pairs]
            )
            summary[side]["memory_ratio"] = spread(
                [ours["peak_memory_bytes"] / theirs["peak_memory_bytes"] for ours, theirs in pairs]
            )
    return summary


def find_peaks(calibration: dict[str, float]) -> dict[str, float]:
    """FLOP/s of the fastest matrix product in each precision."""
    return {name: max(value for key, value in calibration.items() if key.startswith(name)) for name in ("bf16", "fp32")}


def find_changes(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Relative changes of the calibration that exceed STEADY."""
    changes = {key: after[key] / before[key] - 1 for key in before}
    return {key: change for key, change in changes.items() if abs(change) > STEADY}


def _format_spread(values: dict[str, float], form: str, scale: float = 1) -> str:
    low, middle, high = (f"{values[key] / scale:{form}}" for key in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _cells(side: str, summary: dict, subject: str, unit: str) -> dict[str, str]:
    """Cells of a row of the table, by column heading."""
    cells = {
        "side": f"`{side}`",
        "precision": summary["precision"],
        f"{unit}/s": _format_spread(summary["per_second"], SPEED[unit]),
        "seconds a step": _format_spread(summary["step_seconds"], ".4g"),
        "of it the optimizer": _format_spread(summary["optimizer_seconds"], ".3g"),
        "first step, s": _format_spread(summary["first_step_seconds"], ".3g"),
        "peak memory, GB": _format_spread(summary["peak_memory_bytes"], ".2f", 1e9),
    }
    if "share_of_peak" in summary:
        shares = (f"{summary['share_of_peak'][name]:.0%}" for name in ("bf16", "fp32"))
        cells["share of the bf16 / fp32 peak"] = " / ".join(shares)
    for key, heading in (("speed_ratio", "speed over it"), ("memory_ratio", "memory over its")):
        cells[f"{subject}'s {heading}"] = _format_spread(summary[key], ".2f") if key in summary else ""
    return cells


def _table(work: dict, sides: list[tuple[str, dict]]) -> list[str]:
    unit = "pairs" if work["data"] == "pairs" else "tokens"
    rows = [_cells(side, summary, work["subject"], unit) for side, summary in sides]
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def _list_failures(result: dict) -> list[str]:
    lines = []
    for side in dict.fromkeys(run["side"] for run in result["runs"]):
        bad = next((r for r in result["runs"] if r["side"] == side and r["status"] != "ok"), None)
        if bad:
            lines.append(f"- `{side}` {bad['status']}: {bad['why'].splitlines()[0]}")
    return lines


def _compare_optimizers(result: dict) -> list[str]:
    summary = result["summary"]
    if not {"rorchat", "rorchat-muon"} <= set(summary):
        return []
    adamw, muon = (summary[side]["optimizer_seconds"]["median"] for side in ("rorchat", "rorchat-muon"))
    share = (muon - adamw) / summary["rorchat"]["step_seconds"]["median"]
    return [f"`optimizer.step()`: AdamW {adamw:.3g} s, Muon {muon:.3g} s: {share:+.1%} of a step with AdamW."]


def format_calibration(calibration: dict) -> list[str]:
    before = calibration["before"]
    products = [f"{key} {value / 1e9:,.0f} GFLOP/s" for key, value in before.items() if key[:4] in ("bf16", "fp32")]
    rest = f"memory copy {before['memory copy'] / 1e9:.1f} GB/s, Python {before['python loop'] / 1e6:.0f}M rounds/s"
    lines = [f"Calibration: {', '.join(products)}, {rest}."]
    if calibration["moved"]:
        changes = ", ".join(f"{key} {change:+.0%}" for key, change in calibration["moved"].items())
        lines.append(f"**The machine was not steady**: from before to after, {changes}.")
    return lines


def _format_steps(work: dict) -> str:
    if not work["discarded"]:
        return f"one step over {work['rows'] * work['passes']} {work['data']}"
    return f"{work['steps']} steps (behind {work['discarded']})"


def markdown(name: str, result: dict, run: dict) -> str:
    """The section of one work: machine, one row per side, and calibration."""
    work, machine = result["work"], run["machine"]
    sides = sorted(result["summary"].items(), key=lambda item: item[1]["per_second"]["median"])
    flags = f" ({', '.join(machine['flags'])})" if machine["flags"] else ""
    versions = ", ".join(f"{library} {version}" for library, version in machine["versions"].items())
    processor = f"{machine['gpu']}, " if machine["gpu"] else ""
    about = SIDES[work["data"]]
    descriptions = [f"- `{side}`: {about[side]}" for side, _ in sides if side in about]
    lines = [
        f"### {name}: {work['title']}",
        "",
        f"{run['date'][:10]}, {processor}{machine['cpu']}{flags}, {machine['threads']} threads; {versions}. "
        f"{run['repeats']} interleaved repeats of {_format_steps(work)}, medians "
        f"(lowest to highest); load {run['load']:.2f} before. `{run['command']}`",
        "",
        *_table(work, sides),
        "",
        *descriptions,
        *_list_failures(result),
        "",
        *_compare_optimizers(result),
        *format_calibration(result["calibration"]),
    ]
    return "\n".join(line if line.startswith("|") else fill(line) for line in lines)


def replace_section(text: str, name: str, body: str) -> str:
    """The document with the section of a work, which is enclosed by two comments, replaced.

    Raises:
        ValueError: The document has no such section.
    """
    start, end = f"<!-- bench: {name} -->", f"<!-- end of bench: {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no line {start} followed by {end}")
    return pattern.sub(lambda _: f"{start}\n{body}\n{end}", text, count=1)
