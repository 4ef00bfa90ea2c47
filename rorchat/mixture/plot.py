"""Shows a plan before the first step: as a table of text, and as a picture."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorchat.mixture.interleave import UNIT

if TYPE_CHECKING:
    from rorchat.mixture.plan import Plan


def describe(plan: "Plan") -> str:
    """The plan as a text table: phases, the contribution of each source, totals, notices and warnings."""
    summary = plan.summary()
    width = max(8, *(len(name) for name in plan.names))
    rows = f"{plan.rows:,} rows of {plan.block_size:,} tokens"
    lines = [f"mixture: {plan.rows * plan.block_size:,} tokens to train on, in {rows}"]
    if len(plan.phases) > 1:
        lines += _describe_phases(plan, summary["phases"], width)
    lines.append("  total:")
    for source in summary["sources"]:
        tokens = f"    {source['name']:{width}} {source['tokens']:>18,} tokens"
        lines.append(f"{tokens}  {100 * source['share']:5.1f} % of all  read {source['epochs']:.2f} times")
    lines += [f"  note: {notice}" for notice in plan.notices]
    lines += [f"  warning: {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)


def _describe_phases(plan: "Plan", phases: list[dict[str, Any]], width: int) -> Iterator[str]:
    """The rows of every phase, and what its sources contribute."""
    for number, (phase, planned) in enumerate(zip(phases, plan.phases, strict=True), 1):
        first, end = phase["rows"]
        mark = ", new phase" if planned.is_new else ""
        yield f"  phase {number}{mark}: {phase['tokens']:,} tokens, rows {first:,} to {end - 1:,}"
        for source in phase["sources"]:
            if source["share"] == 0:
                continue
            shares = f"{100 * source['share_at_start']:5.1f} %"
            if source["share_at_end"] != source["share_at_start"]:
                shares += f" -> {100 * source['share_at_end']:5.1f} %"
            tokens = f"    {source['name']:{width}} {source['tokens']:>18,} tokens"
            yield f"{tokens}  {shares:18}  read {source['epochs']:.2f} times by then"


def draw(plan: "Plan", path: str | Path) -> None:
    """Writes a picture of the plan: the share of every source from the first token to the last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, PercentFormatter

    segments = [segment for phase in plan.phases for segment in phase.segments]
    tokens = [row * plan.block_size for segment in segments for row in (segment.start, segment.end)]
    ends = [end for segment in segments for end in (segment.first, segment.last)]
    labels = [f"{total['name']}\n{100 * total['share']:.1f} %, {total['epochs']:.2f} epochs" for total in plan.totals()]
    figure, axis = pyplot.subplots(figsize=(9, 4.2), constrained_layout=True)
    colours = [pyplot.get_cmap("tab20")((2 * k) % 20 + (k // 10) % 2) for k in range(len(plan.names))]
    shares = [[100 * end[source] / UNIT for end in ends] for source in range(len(plan.names))]
    axis.stackplot(tokens, shares, labels=labels, colors=colours, edgecolor="white", linewidth=0.6)
    for number, phase in enumerate(plan.phases, 1):
        middle = (phase.start + phase.end) / 2 * plan.block_size
        if phase.end - phase.start > plan.rows / 60:  # shorter phases have no room for a number
            axis.text(middle, 101.5, f"{number}", ha="center", va="bottom", color="0.3")
        if number > 1:
            axis.axvline(phase.start * plan.block_size, color="0.15", linewidth=1, linestyle=(0, (4, 3)))
    axis.set(xlim=(0, plan.rows * plan.block_size), ylim=(0, 100), xlabel="tokens", ylabel="share of tokens")
    axis.text(-0.01, 1.015, "phase", ha="right", va="bottom", color="0.3", transform=axis.transAxes)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter(PercentFormatter())
    # List the legend in the order of the layers, from the top
    handles, names = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=0.9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
