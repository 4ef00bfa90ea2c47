"""Sources and phases -> a plan: how many rows each source gives in each phase, and which row of which comes i-th.

Nothing here is drawn at random and nothing is as long as the plan: one of 10^9 rows is as quick as one of ten.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from rorchat.errors import DataError, UsageError
from rorchat.tokens.phases import MixtureConfig, Phase
from rorchat.tokens.rounding import UNIT, Rounding, Segment, to_units

JUMP = 0.25  # of total variation distance: more at once shows as a bump in the loss
MANY_EPOCHS = 4


@dataclass
class _Stretch:
    """What a phase became: its rows, and the weights that it aims at from and to (before a source ran out)."""

    start: int
    end: int
    starts_with: tuple[int, ...] = ()
    jump: float = 0.0
    segments: list[Segment] = field(default_factory=list)

    @property
    def ends_with(self) -> tuple[int, ...]:
        return self.segments[-1].last


class Plan:
    """Which row of which source comes i-th, for a mixture over sources of known size.

    Args:
        config: what the user said.
        windows: rows of one epoch, by source; optional sources that could not be had are not in it.
        rows: how many rows in all.
        block_size: tokens a row.

    `names` are the sources in use; `locate` and `count` speak of them by index. Every source's count at every prefix is
    within `bound` rows of its budget: at most 1 for up to four sources, whatever their weights; for more it may exceed
    1 (`rorchat.tokens.rounding` says why; 1.4 rows is the most that was seen).

    Raises:
        UsageError: phases that do not make up `rows`, or that name no source that is left.
        DataError: a source that is missing and not optional, or sources used up before the end.
    """

    def __init__(self, config: MixtureConfig, windows: dict[str, int], rows: int, block_size: int):
        self.config, self.rows, self.block_size = config, rows, block_size
        self.names = [name for name in config.sources if name in windows]
        self.windows = [windows[name] for name in self.names]
        self.notices: list[str] = []
        missing = [name for name in config.sources if name not in windows]
        for name in missing:
            if not config.sources[name].optional:
                raise DataError(f"{config.where}: source {name!r} is missing and not optional.")
            self.notices.append(f"{name} is left out: it could not be had and is optional; the others share its part")
        if not self.names:
            raise DataError(f"{config.where}: none of the sources {', '.join(missing)} could be had.")
        self.phases = [_Stretch(start, end) for start, end in self._cut()]
        self._fill()
        self.rounding = Rounding([segment for phase in self.phases for segment in phase.segments])
        self.bound = self.rounding.bound

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the source, how many rows of it came before), found without reading the rows before it."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of a plan of {self.rows}")
        return self.rounding.locate(row)

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows are the source's."""
        return self.rounding.count(source, rows)

    def budget(self, source: int, row: int) -> float:
        """What the source should have of the first `row` rows, exactly."""
        segments = (segment for phase in self.phases for segment in phase.segments)
        return sum(segment.budget(source, min(row, segment.end)) for segment in segments if segment.start < row)

    # From what was said to rows and shares

    def _cut(self) -> list[tuple[int, int]]:
        """Where the phases begin and end, in rows."""
        phases, where = self.config.phases, self.config.where
        total, said = self.rows * self.block_size, sum(phase.tokens or 0 for phase in self.config.phases)
        left, shared = total - said, any(phase.share is not None for phase in phases)
        if abs(left) >= self.block_size and (left < 0 or not shared):
            advice = "give less" if left < 0 else "give one phase `share: 100%` instead, which takes what is left"
            raise UsageError(f"{where}: the phases' tokens sum to {said:,}, the run trains on {total:,}: {advice}.")
        ends, position = [0], 0.0
        for number, phase in enumerate(phases, 1):
            position += phase.tokens if phase.tokens is not None else phase.share * max(left, 0)
            ends.append(self.rows if number == len(phases) else min(self.rows, round(position / self.block_size)))
            if ends[-1] == ends[-2]:
                raise UsageError(
                    f"{where}: phase {number} is less than one row of {self.block_size} tokens, of {total:,} in all: "
                    "give it more, or leave it out."
                )
        return list(zip(ends, ends[1:], strict=False))

    def _fill(self) -> None:
        """The segments of every phase: straight lines of shares, cut where a source reaches its max_epochs."""
        # A count may be more than its budget by less than two rows, so a budget one row short never breaks the cap
        caps = [self.config.sources[name].max_epochs for name in self.names]
        self.limits = [
            None if cap is None else max(0, math.floor(cap * windows) - 1)
            for cap, windows in zip(caps, self.windows, strict=True)
        ]
        used, done, before = [0.0] * len(self.names), set(), ()
        for number, (phase, stretch) in enumerate(zip(self.config.phases, self.phases, strict=True), 1):
            first, last = self._ends(phase, before, number)
            at = stretch.start
            while at < stretch.end:
                first, last = self._without(done, first, last, at, number)
                whole = Segment(at, stretch.end, first, last)
                cut = min(reached := self._reached(whole, used, done))
                stretch.starts_with = stretch.starts_with or first
                if cut > at:
                    middle = whole if cut >= stretch.end else Segment(at, cut, first, _between(whole, cut))
                    stretch.segments.append(middle)
                    used = [have + middle.budget(source, cut) for source, have in enumerate(used)]
                    at, first = cut, middle.last
                for source, row in enumerate(reached):
                    if row == cut and cut < stretch.end:
                        done.add(source)
                        self._tell_cap(source, cut, number)
            if before:
                stretch.jump = sum(abs(a - b) for a, b in zip(before, stretch.starts_with, strict=True)) / UNIT / 2
            before = stretch.ends_with

    def _ends(self, phase: Phase, before: tuple[int, ...], number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shares at the start and the end of a phase, as said, of the sources that could be had."""
        said = phase.weights or phase.ramp_to
        if said is None:
            same = before or to_units(self.windows)
            return same, same
        weights = [said.get(name, 0.0) for name in self.names]
        if not any(weights):
            raise DataError(
                f"{self.config.where}: phase {number} has no source left: {', '.join(said)} could not be had."
            )
        target = to_units(weights)
        if phase.replay:
            target = to_units([phase.replay * a + (1 - phase.replay) * b for a, b in zip(before, target, strict=True)])
        return (before if phase.ramp_to else target), target

    def _without(self, done: set[int], first, last, row: int, number: int):
        """The shares at both ends once the sources that are used up are gone; the others share their part."""
        if not done:
            return first, last
        kept = [[0 if source in done else share for source, share in enumerate(end)] for end in (first, last)]
        first, last = (end if any(end) else None for end in kept)
        if first is None and last is None:
            names = ", ".join(
                f"{self.names[source]} (max_epochs {self.config.sources[self.names[source]].max_epochs:g} x "
                f"{self.windows[source] * self.block_size:,} tokens)"
                for source in sorted(done)
            )
            raise DataError(
                f"{self.config.where}: phase {number} has no source left after {row * self.block_size:,} of "
                f"{self.rows * self.block_size:,} tokens: {names} used up. Raise max_epochs, add a source or train "
                "less."
            )
        return to_units(first or last), to_units(last or first)

    def _reached(self, segment: Segment, used: list[float], done: set[int]) -> list[int]:
        """For every source the row at which it reaches its limit, the segment's end where it does not."""
        rows = []
        for source, limit in enumerate(self.limits):
            if limit is None or source in done or used[source] + segment.budget(source, segment.end) <= limit:
                rows.append(segment.end)
                continue
            first, slope = segment.first[source] / UNIT, (segment.last[source] - segment.first[source]) / UNIT
            missing = max(0.0, limit - used[source])
            root = math.sqrt(max(0.0, first**2 + 2 * slope * missing / segment.rows))
            rows.append(segment.start + min(segment.rows - 1, int(2 * missing / (first + root)) if missing else 0))
        return rows

    def _tell_cap(self, source: int, row: int, number: int) -> None:
        name = self.names[source]
        self.notices.append(
            f"{name} reaches max_epochs {self.config.sources[name].max_epochs:g} in phase {number}, after "
            f"{row * self.block_size:,} tokens in all; from there the others share its part"
        )

    # What a person sees

    def warnings(self) -> list[str]:
        """What is likely to be a mistake: jumps of the mixture, and sources repeated very often."""
        found = [
            f"phase {number} begins with another mixture than the phase before ended with (total variation distance "
            f"{phase.jump:.2f}): a `ramp_to` phase in between avoids a bump in the loss"
            for number, phase in enumerate(self.phases, 1)
            if phase.jump > JUMP
        ]
        return found + [
            f"{part['name']} is read {part['epochs']:.1f} times: up to about {MANY_EPOCHS} epochs repeated data is "
            "almost as good as new, after that its worth falls fast (Muennighoff et al. 2023, arXiv:2305.16264)"
            for part in self.totals()
            if part["epochs"] > MANY_EPOCHS
        ]

    def totals(self) -> list[dict[str, object]]:
        """What each source gives over the whole plan: its share, tokens and epochs."""
        return [self._part(source, 0, self.rows) for source in range(len(self.names))]

    def _part(self, source: int, start: int, end: int) -> dict[str, object]:
        until = self.count(source, end)
        count = until - self.count(source, start)
        return {
            "source": self.config.sources[self.names[source]].spec,
            "name": self.names[source],
            "share": (self.budget(source, end) - self.budget(source, start)) / (end - start),
            "tokens": count * self.block_size,
            "epochs": until / self.windows[source],
        }

    def summary(self) -> dict[str, object]:
        """The plan as JSON for run.json: totals by source; by phase also the shares at its start and end."""
        phases = [
            {
                "rows": [phase.start, phase.end],
                "tokens": (phase.end - phase.start) * self.block_size,
                "sources": [
                    self._part(source, phase.start, phase.end)
                    | {
                        "share_at_start": phase.starts_with[source] / UNIT,
                        "share_at_end": phase.ends_with[source] / UNIT,
                    }
                    for source in range(len(self.names))
                ],
            }
            for phase in self.phases
        ]
        return {
            "sources": self.totals(),
            "phases": phases,
            "rows": self.rows,
            "block_size": self.block_size,
            "notices": self.notices,
            "warnings": self.warnings(),
        }

    def told(self) -> str:
        """The plan as a text table: phases, what every source gives in them, totals, notices and warnings."""
        summary = self.summary()
        wide = max(8, *(len(name) for name in self.names))
        lines = [f"mixture: {self.rows * self.block_size:,} tokens in {self.rows:,} rows of {self.block_size:,}"]
        for number, phase in enumerate(summary["phases"], 1):
            first, end = phase["rows"]
            lines.append(f"  phase {number}: {phase['tokens']:,} tokens, rows {first:,} to {end - 1:,}")
            for part in phase["sources"]:
                if part["share"] == 0:
                    continue
                shares = f"{100 * part['share_at_start']:5.1f} % -> {100 * part['share_at_end']:5.1f} %"
                said = f"    {part['name']:{wide}} {part['tokens']:>18,} tokens"
                lines.append(f"{said}  {shares}  {part['epochs']:.2f} epochs so far")
        lines.append("  in all:")
        for part in summary["sources"]:
            share = f"{100 * part['share']:5.1f} % of all"
            lines.append(
                f"    {part['name']:{wide}} {part['tokens']:>18,} tokens  {share:18}  {part['epochs']:.2f} epochs"
            )
        lines += [f"  note: {notice}" for notice in self.notices]
        lines += [f"  warning: {warning}" for warning in summary["warnings"]]
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """A picture of the plan: the share of every source in the tokens, from the first token to the last."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import EngFormatter, PercentFormatter

        segments = [segment for phase in self.phases for segment in phase.segments]
        tokens = [row * self.block_size for segment in segments for row in (segment.start, segment.end)]
        ends = [end for segment in segments for end in (segment.first, segment.last)]
        labels = [f"{part['name']}\n{100 * part['share']:.1f} %, {part['epochs']:.2f} epochs" for part in self.totals()]
        figure, axis = pyplot.subplots(figsize=(9, 4.2), constrained_layout=True)
        colours = [pyplot.get_cmap("tab20")((2 * k) % 20 + (k // 10) % 2) for k in range(len(self.names))]
        shares = [[100 * end[source] / UNIT for end in ends] for source in range(len(self.names))]
        axis.stackplot(tokens, shares, labels=labels, colors=colours, edgecolor="white", linewidth=0.6)
        for number, phase in enumerate(self.phases, 1):
            middle = (phase.start + phase.end) / 2 * self.block_size
            if phase.end - phase.start > self.rows / 60:  # there is no room for the number of a shorter one
                axis.text(middle, 101.5, f"{number}", ha="center", va="bottom", color="0.3")
            if number > 1:
                axis.axvline(phase.start * self.block_size, color="0.15", linewidth=1, linestyle=(0, (4, 3)))
        axis.set(xlim=(0, self.rows * self.block_size), ylim=(0, 100), xlabel="tokens", ylabel="share of tokens")
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


def _between(segment: Segment, row: int) -> tuple[int, ...]:
    """The shares at a row inside a segment."""
    after, rows = row - segment.start, segment.rows
    mixed = [a * (rows - after) + b * after for a, b in zip(segment.first, segment.last, strict=True)]
    return to_units(mixed)
