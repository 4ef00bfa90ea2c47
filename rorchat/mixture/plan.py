"""Sources and phases -> a plan: how many rows each source gives in each phase, and which row of which comes i-th.

Nothing here is drawn at random and nothing is as long as the plan: one of 10^9 rows is as quick as one of ten.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

from rorchat.errors import DataError, UsageError
from rorchat.mixture import plot
from rorchat.mixture.config import MixtureConfig, Phase
from rorchat.mixture.interleave import UNIT, Rounding, Segment, to_units

JUMP = 0.25  # of total variation distance: more at once shows as a bump in the loss
MANY_EPOCHS = 4


@dataclass
class _Stretch:
    """What a phase became: its rows, and the weights that it aims at from and to (before a source ran out)."""

    start: int
    end: int
    is_new: bool = False  # appended to a plan that was being trained on
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
        rows: how many rows in all, those of the past included.
        block_size: tokens a row.
        past: the plan of the rows before `start`, which stays as it is: this one goes on behind it, and each source
            behind the rows that it has given. Sources that only the past has need not be in `windows`.
        start: the first row that the phases of `config` share.

    `names` are the sources in use, those of the past first; `locate` and `count` speak of them by index. Every source's
    count at every prefix is within `bound` rows of its budget: at most 1 for up to four sources, whatever their
    weights; for more it may exceed 1 (see `rorchat.mixture.interleave`; 1.4 rows is the most that was seen). What a
    past is off its budgets is added.

    Raises:
        UsageError: phases that do not make up `rows`, or that name no source that is left.
        DataError: a source that is missing and not optional, or sources used up before the end.
    """

    def __init__(
        self,
        config: MixtureConfig,
        windows: dict[str, int],
        rows: int,
        block_size: int,
        past: "Plan | None" = None,
        start: int = 0,
    ):
        self.config, self.rows, self.block_size, self.past, self.start = config, rows, block_size, past, start
        if past is None:
            config.require_standalone()
        sizes = dict(zip(past.names, past.windows, strict=True)) if past else {}
        sizes |= {name: windows[name] for name in config.sources if name in windows}
        self.names, self.windows = [*sizes], [*sizes.values()]
        self.sources = (past.sources if past else {}) | config.sources
        self.own = [source for source, name in enumerate(self.names) if name in windows and name in config.sources]
        self.given = [past.count(source, start) if past else 0 for source in range(len(self.names))]
        self.phases = past._until(start, len(self.names)) if past else []
        self._told = [each for each in past._told if each[0] < start] if past else []
        self._tell_missing([name for name in config.sources if name not in windows])
        phases = [_Stretch(first, end, past is not None) for first, end in self._cut()]
        self._fill(phases)
        self.phases += phases
        columns = [_columns(segment, self.own) for phase in phases for segment in phase.segments]
        self.rounding = Rounding(columns)
        self.bound = self.rounding.bound + (past.bound if past else 0)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the source, how many rows of it came before), found without reading the rows before it."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of a plan of {self.rows}")
        if row < self.start:
            return self.past.locate(row)
        column, number = self.rounding.locate(row - self.start)
        return self.own[column], self.given[self.own[column]] + number

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows are the source's."""
        if source >= len(self.names):
            return 0  # of a plan that goes on from this one
        if rows < self.start:
            return self.past.count(source, rows)
        if source not in self.own:
            return self.given[source]
        return self.given[source] + self.rounding.count(self.own.index(source), rows - self.start)

    def budget(self, source: int, row: int) -> float:
        """What the source should have of the first `row` rows, exactly."""
        segments = (segment for phase in self.phases for segment in phase.segments)
        return sum(segment.budget(source, min(row, segment.end)) for segment in segments if segment.start < row)

    @property
    def notices(self) -> list[str]:
        """What became of sources that are missing or used up, in the order of the rows."""
        return [notice for _, notice in self._told]

    def _until(self, row: int, sources: int) -> list[_Stretch]:
        """The phases before a row, the last one cut off there, with shares of 0 for sources that come later."""
        later = (0,) * (sources - len(self.names))
        cut = []
        for phase in self.phases:
            segments = [_cut_off(segment, row, later) for segment in phase.segments if segment.start < row]
            if segments:
                first = phase.starts_with + later
                cut.append(replace(phase, end=segments[-1].end, starts_with=first, segments=segments))
        return cut

    # From what was said to rows and shares

    def _tell_missing(self, missing: list[str]) -> None:
        for name in missing:
            if not self.config.sources[name].optional:
                raise DataError(f"{self.config.where}: source {name!r} is missing and not optional.")
            said = f"{name} is left out: it could not be had and is optional; the others share its part"
            self._told.append((self.start, said))
        if not self.own:
            raise DataError(f"{self.config.where}: none of the sources {', '.join(missing)} could be had.")

    def _cut(self) -> list[tuple[int, int]]:
        """Where the phases begin and end, in rows."""
        phases, where = self.config.phases, self.config.where
        total, said = (self.rows - self.start) * self.block_size, sum(phase.tokens or 0 for phase in self.config.phases)
        left, shared = total - said, any(phase.share is not None for phase in phases)
        if abs(left) >= self.block_size and (left < 0 or not shared):
            advice = "give less" if left < 0 else "give one phase `share: 100%` instead, which takes what is left"
            trains = "has left" if self.past else "trains on"
            raise UsageError(f"{where}: the phases' tokens sum to {said:,}, the run {trains} {total:,}: {advice}.")
        ends, position = [self.start], 0.0
        for number, phase in enumerate(phases, 1):
            position += phase.tokens if phase.tokens is not None else phase.share * max(left, 0)
            end = self.start + round(position / self.block_size)
            ends.append(self.rows if number == len(phases) else min(self.rows, end))
            if ends[-1] == ends[-2]:
                raise UsageError(
                    f"{where}: phase {number} is less than one row of {self.block_size} tokens, of {total:,} in all: "
                    "give it more, or leave it out."
                )
        return list(zip(ends, ends[1:], strict=False))

    def _fill(self, phases: list[_Stretch]) -> None:
        """The segments of every phase: straight lines of shares, cut where a source reaches its max_epochs."""
        # A count may be more than its budget by less than two rows, so a budget one row short never breaks the cap
        caps = [self.sources[name].max_epochs for name in self.names]
        self.limits = [
            None if cap is None else max(0, math.floor(cap * windows) - 1)
            for cap, windows in zip(caps, self.windows, strict=True)
        ]
        used, done = [float(rows) for rows in self.given], set()
        before = self.phases[-1].ends_with if self.past else ()
        for number, (phase, stretch) in enumerate(zip(self.config.phases, phases, strict=True), 1):
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
        if said is None:  # the first one mixes by size behind a past, too: what is new would have no part else
            same = before if number > 1 else to_units(self._of_own(self.windows))
            return same, same
        weights = [said.get(name, 0.0) for name in self.names]
        if not any(weights):
            raise DataError(
                f"{self.config.where}: phase {number} has no source left: {', '.join(said)} could not be had."
            )
        target = to_units(weights)
        before = self._going_on(before, number) if phase.ramp_to or phase.replay else before
        if phase.replay:
            target = to_units([phase.replay * a + (1 - phase.replay) * b for a, b in zip(before, target, strict=True)])
        return (before if phase.ramp_to else target), target

    def _of_own(self, values) -> list:
        return [value if source in self.own else 0 for source, value in enumerate(values)]

    def _going_on(self, before: tuple[int, ...], number: int) -> tuple[int, ...]:
        """The shares that a ramp or a replay begins with: where sources of the past are gone, the others share them."""
        kept = self._of_own(before)
        if not any(kept):
            names = ", ".join(name for name, share in zip(self.names, before, strict=True) if share)
            raise UsageError(
                f"{self.config.where}: phase {number} goes on from the mixture before, which was of {names}, and has "
                "none of it: keep a source, or give weights."
            )
        return to_units(kept)

    def _without(self, done: set[int], first, last, row: int, number: int):
        """The shares at both ends once the sources that are used up are gone; the others share their part."""
        if not done:
            return first, last
        kept = [[0 if source in done else share for source, share in enumerate(end)] for end in (first, last)]
        first, last = (end if any(end) else None for end in kept)
        if first is None and last is None:
            names = ", ".join(
                f"{self.names[source]} (max_epochs {self.sources[self.names[source]].max_epochs:g} x "
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
            more = segment.budget(source, segment.end)
            if limit is None or source in done or not more or used[source] + more <= limit:
                rows.append(segment.end)
                continue
            first, slope = segment.first[source] / UNIT, (segment.last[source] - segment.first[source]) / UNIT
            missing = max(0.0, limit - used[source])
            root = math.sqrt(max(0.0, first**2 + 2 * slope * missing / segment.rows))
            rows.append(segment.start + min(segment.rows - 1, int(2 * missing / (first + root)) if missing else 0))
        return rows

    def _tell_cap(self, source: int, row: int, number: int) -> None:
        name = self.names[source]
        said = (
            f"{name} reaches max_epochs {self.sources[name].max_epochs:g} in phase {number + len(self.phases)}, after "
            f"{row * self.block_size:,} tokens in all; from there the others share its part"
        )
        self._told.append((row, said))

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
            "source": self.sources[self.names[source]].spec,
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

    def describe(self) -> str:
        """The plan as a text table: phases, what every source gives in them, totals, notices and warnings."""
        return plot.describe(self)

    def draw(self, path: str | Path) -> None:
        """A picture of the plan: the share of every source in the tokens, from the first token to the last."""
        plot.draw(self, path)


def _between(segment: Segment, row: int) -> tuple[int, ...]:
    """The shares at a row inside a segment."""
    after, rows = row - segment.start, segment.rows
    mixed = [a * (rows - after) + b * after for a, b in zip(segment.first, segment.last, strict=True)]
    return to_units(mixed)


def _cut_off(segment: Segment, row: int, later: tuple[int, ...]) -> Segment:
    """The rows of a segment before a row, and further sources that have no share in them."""
    end, last = (segment.end, segment.last) if row >= segment.end else (row, _between(segment, row))
    return Segment(segment.start, end, segment.first + later, last + later)


def _columns(segment: Segment, sources: list[int]) -> Segment:
    """A segment of some of its sources, which have all of it."""
    first, last = (tuple(end[source] for source in sources) for end in (segment.first, segment.last))
    return Segment(segment.start, segment.end, first, last)
