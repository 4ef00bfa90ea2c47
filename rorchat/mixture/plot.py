"""What a person sees of a plan before step 1: a table in words, and a picture."""

from pathlib import Path

from rorchat.mixture.interleave import UNIT


def describe(plan) -> str:
    """The plan as a text table: phases, what every source gives in them, totals, notices and warnings."""
    summary = plan.summary()
    wide = max(8, *(len(name) for name in plan.names))
    lines = [f"mixture: {plan.rows * plan.block_size:,} tokens in {plan.rows:,} rows of {plan.block_size:,}"]
    for number, (phase, stretch) in enumerate(zip(summary["phases"], plan.phases, strict=True), 1):
        first, end = phase["rows"]
        mark = ", new phase" if stretch.is_new else ""
        lines.append(f"  phase {number}{mark}: {phase['tokens']:,} tokens, rows {first:,} to {end - 1:,}")
        for part in phase["sources"]:
            if part["share"] == 0:
                continue
            shares = f"{100 * part['share_at_start']:5.1f} % -> {100 * part['share_at_end']:5.1f} %"
            said = f"    {part['name']:{wide}} {part['tokens']:>18,} tokens"
            lines.append(f"{said}  {shares}  {part['epochs']:.2f} epochs so far")
    lines.append("  in all:")
    for part in summary["sources"]:
        share = f"{100 * part['share']:5.1f} % of all"
        lines.append(f"    {part['name']:{wide}} {part['tokens']:>18,} tokens  {share:18}  {part['epochs']:.2f} epochs")
    lines += [f"  note: {notice}" for notice in plan.notices]
    lines += [f"  warning: {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)


def draw(plan, path: str | Path) -> None:
    """A picture of the plan: the share of every source in the tokens, from the first token to the last."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, PercentFormatter

    segments = [segment for phase in plan.phases for segment in phase.segments]
    tokens = [row * plan.block_size for segment in segments for row in (segment.start, segment.end)]
    ends = [end for segment in segments for end in (segment.first, segment.last)]
    labels = [f"{part['name']}\n{100 * part['share']:.1f} %, {part['epochs']:.2f} epochs" for part in plan.totals()]
    figure, axis = pyplot.subplots(figsize=(9, 4.2), constrained_layout=True)
    colours = [pyplot.get_cmap("tab20")((2 * k) % 20 + (k // 10) % 2) for k in range(len(plan.names))]
    shares = [[100 * end[source] / UNIT for end in ends] for source in range(len(plan.names))]
    axis.stackplot(tokens, shares, labels=labels, colors=colours, edgecolor="white", linewidth=0.6)
    for number, phase in enumerate(plan.phases, 1):
        middle = (phase.start + phase.end) / 2 * plan.block_size
        if phase.end - phase.start > plan.rows / 60:  # there is no room for the number of a shorter one
            axis.text(middle, 101.5, f"{number}", ha="center", va="bottom", color="0.3")
        if number > 1:
            axis.axvline(phase.start * plan.block_size, color="0.15", linewidth=1, linestyle=(0, (4, 3)))
    axis.set(xlim=(0, plan.rows * plan.block_size), ylim=(0, 100), xlabel="tokens", ylabel="share of tokens")
    axis.text(-0.01, 1.015, "phase", ha="right", va="bottom", color="0.3", transform=axis.transAxes)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_formatter(PercentFormatter())
    # The legend in the order of the layers, the topmost first
    handles, said = axis.get_legend_handles_labels()
    axis.legend(
        handles[::-1], said[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, labelspacing=0.9
    )
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
