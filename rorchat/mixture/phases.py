"""Plans the phases of a mixture: the row at which each phase starts, and segments of linearly changing shares.

A phase is one segment, from the shares at its start to those at its end. If a source reaches its `max_epochs` within a
phase, the segment is split there. The second part omits the source, and the others take over its share in proportion.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from rorchat.errors import DataError, UsageError
from rorchat.mixture.interleave import UNIT, Segment, to_units
from rorchat.mixture.mixture_file import MixtureConfig, Phase

Shares = tuple[int, ...]  # one per source, in multiples of 1/UNIT


@dataclass
class PlannedPhase:
    """The rows of a phase (`end` is exclusive) and the segments they consist of."""

    start: int
    end: int
    is_new: bool = False  # appended to a run that had already started (`--new_phase`)
    starts_with: Shares = ()  # the intended shares at the start, before a source is exhausted
    jump: float = 0.0  # total variation distance from the shares at the end of the previous phase
    segments: list[Segment] = field(default_factory=list)

    @property
    def ends_with(self) -> Shares:
        return self.segments[-1].last

    def until(self, row: int, n_later: int) -> "PlannedPhase":
        """The part before a row, with shares of 0 for the `n_later` sources that a later plan adds."""
        zeros = (0,) * n_later
        segments = []
        for segment in (segment for segment in self.segments if segment.start < row):
            end, last = (segment.end, segment.last) if row >= segment.end else (row, shares_at(segment, row))
            segments.append(Segment(segment.start, end, segment.first + zeros, last + zeros))
        return PlannedPhase(self.start, segments[-1].end, self.is_new, self.starts_with + zeros, self.jump, segments)


@dataclass
class PhasePlanner:
    """Plans the phases of a config over the rows from `start` to `rows`.

    Args:
        active: the indices of the sources in `names` that the config uses.
        used: the rows that each source has contributed before `start`.
        before: the shares at the end of the previous mixture; empty if there is none.
        n_previous: the number of phases before `start`, for messages.
    """

    config: MixtureConfig
    names: list[str]
    rows_per_epoch: list[int]
    active: list[int]
    used: list[float]
    before: Shares
    start: int
    rows: int
    block_size: int
    n_previous: int
    notices: list[tuple[int, str]] = field(default_factory=list)  # (row, text)
    exhausted: set[int] = field(default_factory=set)

    def __post_init__(self):
        # A source contributes less than two rows more than its budget, so a budget one row below the limit is safe
        caps = [self.config.sources[name].max_epochs if name in self.config.sources else None for name in self.names]
        self.limits = [
            None if cap is None else max(0, math.floor(cap * rows) - 1)
            for cap, rows in zip(caps, self.rows_per_epoch, strict=True)
        ]

    def plan(self) -> list[PlannedPhase]:
        planned = [PlannedPhase(first, end, bool(self.before)) for first, end in self._split_rows()]
        before = self.before
        for number, (phase, planned_phase) in enumerate(zip(self.config.phases, planned, strict=True), 1):
            self._fill(planned_phase, *self._target_shares(phase, before, number), number)
            if before:
                moved = sum(abs(a - b) for a, b in zip(before, planned_phase.starts_with, strict=True))
                planned_phase.jump = moved / UNIT / 2
            before = planned_phase.ends_with
        return planned

    def _split_rows(self) -> list[tuple[int, int]]:
        """(first row, end) of every phase."""
        phases, where = self.config.phases, self.config.where
        total, fixed = (self.rows - self.start) * self.block_size, sum(phase.tokens or 0 for phase in phases)
        left, has_shares = total - fixed, any(phase.share is not None for phase in phases)
        if abs(left) >= self.block_size and (left < 0 or not has_shares):
            advice = "give less" if left < 0 else "give one phase `share: 100%` instead, which takes the rest"
            available = f"has {total:,} left" if self.before else f"trains on {total:,}"
            raise UsageError(f"{where}: the phases' tokens sum to {fixed:,}, the run {available}: {advice}.")
        ends, tokens = [self.start], 0.0
        for number, phase in enumerate(phases, 1):
            tokens += phase.tokens if phase.tokens is not None else (phase.share or 0.0) * max(left, 0)
            end = self.start + round(tokens / self.block_size)
            ends.append(self.rows if number == len(phases) else min(self.rows, end))
            if ends[-1] == ends[-2]:
                raise UsageError(
                    f"{where}: phase {number} is shorter than one row of {self.block_size} tokens (all phases have "
                    f"{total:,}): make it longer or remove it."
                )
        return list(zip(ends, ends[1:], strict=False))

    def _target_shares(self, phase: Phase, before: Shares, number: int) -> tuple[Shares, Shares]:
        """The shares at the start and the end of a phase, over the available sources."""
        weights_by_name = phase.weights or phase.ramp_to
        if weights_by_name is None:
            # Without weights, the first phase mixes by size, even after a previous mixture: new sources need a share
            same = before if number > 1 else to_units(self._only_active(self.rows_per_epoch))
            return same, same
        weights = self._only_active([weights_by_name.get(name, 0.0) for name in self.names])
        if not any(weights):
            raise DataError(
                f"{self.config.where}: phase {number} uses only sources that are not available: "
                f"{', '.join(weights_by_name)}."
            )
        target = to_units(weights)
        if phase.ramp_to or phase.replay:
            before = self._continued_shares(before, number)
        if phase.replay:
            target = to_units([phase.replay * a + (1 - phase.replay) * b for a, b in zip(before, target, strict=True)])
        return (before if phase.ramp_to else target), target

    def _only_active(self, values: Sequence[float]) -> list[float]:
        return [value if source in self.active else 0 for source, value in enumerate(values)]

    def _continued_shares(self, before: Shares, number: int) -> Shares:
        """The shares from which a ramp or a replay starts: those at the end of the previous phase.

        Sources that are no longer used are left out.
        """
        kept = self._only_active(before)
        if not any(kept):
            names = ", ".join(name for name, share in zip(self.names, before, strict=True) if share)
            raise UsageError(
                f"{self.config.where}: phase {number} continues the previous mixture of {names}, but uses none of its "
                "sources: keep one of them, or give weights."
            )
        return to_units(kept)

    def _fill(self, planned: PlannedPhase, first: Shares, last: Shares, number: int) -> None:
        """Adds the segments of a phase, cut where a source is exhausted."""
        row = planned.start
        while row < planned.end:
            first, last = self._without_exhausted(first, last, row, number)
            segment = Segment(row, planned.end, first, last)
            rows_of_exhaustion = self._find_exhaustion(segment)
            cut = min(rows_of_exhaustion)
            planned.starts_with = planned.starts_with or first
            if cut > row:
                if cut < planned.end:
                    segment = Segment(row, cut, first, shares_at(segment, cut))
                planned.segments.append(segment)
                self.used = [used + segment.budget(source, cut) for source, used in enumerate(self.used)]
                row, first = cut, segment.last
            if cut < planned.end:
                for source in (source for source, end in enumerate(rows_of_exhaustion) if end == cut):
                    self.exhausted.add(source)
                    self._add_notice(source, cut, number)

    def _without_exhausted(self, first: Shares, last: Shares, row: int, number: int) -> tuple[Shares, Shares]:
        """The shares at both ends of a segment without the exhausted sources."""
        if not self.exhausted:
            return first, last
        ends = [[0 if source in self.exhausted else share for source, share in enumerate(end)] for end in (first, last)]
        if not any(map(any, ends)):
            names = ", ".join(
                f"{self.names[source]} (max_epochs {self.config.sources[self.names[source]].max_epochs:g} x "
                f"{self.rows_per_epoch[source] * self.block_size:,} tokens)"
                for source in sorted(self.exhausted)
            )
            raise DataError(
                f"{self.config.where}: phase {number} has no source left after {row * self.block_size:,} of "
                f"{self.rows * self.block_size:,} tokens: {names} exhausted. Raise max_epochs, add a source or train "
                "less."
            )
        start, end = ends  # if one end has no source left, the shares are those of the other end throughout
        return to_units(start if any(start) else end), to_units(end if any(end) else start)

    def _find_exhaustion(self, segment: Segment) -> list[int]:
        """For every source the row at which it reaches its limit; the segment's end if it does not."""
        rows = []
        for source, limit in enumerate(self.limits):
            budget = segment.budget(source, segment.end)
            if limit is None or source in self.exhausted or not budget or self.used[source] + budget <= limit:
                rows.append(segment.end)
                continue
            # Solve the quadratic equation used + budget(row) = limit
            first, slope = segment.first[source] / UNIT, (segment.last[source] - segment.first[source]) / UNIT
            missing = max(0.0, limit - self.used[source])
            root = math.sqrt(max(0.0, first**2 + 2 * slope * missing / segment.rows))
            rows.append(segment.start + min(segment.rows - 1, int(2 * missing / (first + root)) if missing else 0))
        return rows

    def _add_notice(self, source: int, row: int, number: int) -> None:
        name = self.names[source]
        text = (
            f"{name} reaches max_epochs {self.config.sources[name].max_epochs:g} in phase {number + self.n_previous}, "
            f"after {row * self.block_size:,} tokens in total; the other sources take over its share"
        )
        self.notices.append((row, text))


def shares_at(segment: Segment, row: int) -> Shares:
    """The shares at a row inside a segment."""
    after, rows = row - segment.start, segment.rows
    return to_units([a * (rows - after) + b * after for a, b in zip(segment.first, segment.last, strict=True)])
