"""Plans a mixture over sources of known size: decides which row of which source is the i-th training row.

A plan uses no random numbers, and its cost does not depend on its length: 10^9 rows are as fast as ten.
"""

from pathlib import Path
from typing import Any

from rorchat.errors import DataError
from rorchat.mixture import plot
from rorchat.mixture.interleave import UNIT, Interleaver, Segment
from rorchat.mixture.mixture_file import MixtureConfig, Source
from rorchat.mixture.phases import PhasePlanner, PlannedPhase

MAX_JUMP = 0.25  # total variation distance; a larger jump shows as a bump in the loss
MANY_EPOCHS = 4
#: Version of the order of rows, recorded in the summary of plans whose order has changed. See `Plan.summary`.
ROW_ORDER = 2


class Plan:
    """Assigns every training row to a row of a source.

    `names` lists the sources, those of the previous plan first; `locate` and `count` use their indices in this list.
    After every row, the count of each source is within `bound` rows of its budget. `bound` is at most 1 for up to four
    sources and at most 1.5 for up to eight (see `rorchat.mixture.interleave`), plus the bound of the previous plan.

    Args:
        config: the mixture.
        rows_per_epoch: source -> rows in one epoch. Optional sources that are not available are left out.
        rows: the total number of rows, including those of the previous plan.
        block_size: tokens per row.
        previous: the plan of the rows before `start`, which do not change. Every source continues after the rows that
            it has already contributed. Sources that only the previous plan uses need not be in `rows_per_epoch`.
        start: the first row of this mixture.

    Raises:
        UsageError: the phases do not add up to `rows`.
        DataError: a source is missing and not optional, or a phase has no source left.
    """

    def __init__(
        self,
        config: MixtureConfig,
        rows_per_epoch: dict[str, int],
        rows: int,
        block_size: int,
        previous: "Plan | None" = None,
        start: int = 0,
    ):
        self.config, self.rows, self.block_size, self.previous, self.start = config, rows, block_size, previous, start
        if previous is None:
            config.require_standalone()
        sizes = dict(zip(previous.names, previous.rows_per_epoch, strict=True)) if previous else {}
        sizes |= {name: rows_per_epoch[name] for name in config.sources if name in rows_per_epoch}
        self.names: list[str] = [*sizes]
        self.rows_per_epoch: list[int] = [*sizes.values()]
        self.sources: dict[str, Source] = (previous.sources if previous else {}) | config.sources
        self.active = [k for k, name in enumerate(self.names) if name in rows_per_epoch and name in config.sources]
        self.rows_before = [previous.count(k, start) if previous else 0 for k in range(len(self.names))]
        self.phases = previous.phases_until(start, len(self.names)) if previous else []
        self._notices: list[tuple[int, str]] = []
        if previous:
            self._notices += [notice for notice in previous._notices if notice[0] < start]
        self._notices += self._missing_sources([name for name in config.sources if name not in rows_per_epoch])
        used = [float(count) for count in self.rows_before]
        before = self.phases[-1].ends_with if previous else ()
        planner = PhasePlanner(
            config,
            self.names,
            self.rows_per_epoch,
            self.active,
            used,
            before,
            start,
            rows,
            block_size,
            len(self.phases),
        )
        phases = planner.plan()
        self._notices += planner.notices
        self.phases += phases
        segments = [self._active_segment(segment) for phase in phases for segment in phase.segments]
        self._interleaver = Interleaver(segments)
        self.bound: float = self._interleaver.bound + (previous.bound if previous else 0)

    def _missing_sources(self, missing: list[str]) -> list[tuple[int, str]]:
        """Notices about missing optional sources. Raises DataError for a missing required source or if none is left."""
        for name in missing:
            if not self.config.sources[name].optional:
                raise DataError(f"{self.config.where}: source {name!r} is missing and not optional.")
        if not self.active:
            raise DataError(f"{self.config.where}: none of the sources {', '.join(missing)} is available.")
        text = "is optional and not available, so it is omitted; the other sources take over its share"
        return [(self.start, f"{name} {text}") for name in missing]

    def _active_segment(self, segment: Segment) -> Segment:
        """The segment restricted to the active sources; the shares of all others are 0."""
        first, last = (tuple(end[source] for source in self.active) for end in (segment.first, segment.last))
        return Segment(segment.start, segment.end, first, last)

    def phases_until(self, row: int, n_sources: int) -> list[PlannedPhase]:
        """The phases before a row, with shares for `n_sources` sources."""
        n_later = n_sources - len(self.names)
        return [phase.until(row, n_later) for phase in self.phases if phase.start < row]

    def locate(self, row: int) -> tuple[int, int]:
        """Returns (index of the source of a row, number of earlier rows from that source)."""
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of a plan of {self.rows}")
        if self.previous and row < self.start:
            return self.previous.locate(row)
        column, number = self._interleaver.locate(row - self.start)
        return self.active[column], self.rows_before[self.active[column]] + number

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows come from the source."""
        if source >= len(self.names):
            return 0  # a source of a later plan
        if self.previous and rows < self.start:
            return self.previous.count(source, rows)
        if source not in self.active:
            return self.rows_before[source]
        return self.rows_before[source] + self._interleaver.count(self.active.index(source), rows - self.start)

    def budget(self, source: int, row: int) -> float:
        """The exact number of rows that the source should have among the first `row` rows."""
        segments = (segment for phase in self.phases for segment in phase.segments)
        return sum(segment.budget(source, min(row, segment.end)) for segment in segments if segment.start < row)

    @property
    def notices(self) -> list[str]:
        """Messages about sources that are missing or exhausted, in the order of the rows."""
        return [text for _, text in self._notices]

    def warnings(self) -> list[str]:
        """Likely mistakes: jumps of the mixture, and sources that are repeated many times."""
        jumps = [
            f"phase {number} begins with a different mixture than the previous phase ended with (total variation "
            f"distance {phase.jump:.2f}): a `ramp_to` phase in between avoids a bump in the loss"
            for number, phase in enumerate(self.phases, 1)
            if phase.jump > MAX_JUMP
        ]
        return jumps + [
            f"{total['name']} is read {total['epochs']:.1f} times: up to about {MANY_EPOCHS} epochs, repeated data is "
            "almost as good as new data; beyond that its value falls fast (Muennighoff et al. 2023, arXiv:2305.16264)"
            for total in self.totals()
            if total["epochs"] > MANY_EPOCHS
        ]

    def totals(self) -> list[dict[str, Any]]:
        """The share, tokens and epochs of each source over the whole plan."""
        return [self._summarize_source(source, 0, self.rows) for source in range(len(self.names))]

    def _summarize_source(self, source: int, start: int, end: int) -> dict[str, Any]:
        until = self.count(source, end)
        count = until - self.count(source, start)
        return {
            "source": self.sources[self.names[source]].spec,
            "name": self.names[source],
            "share": (self.budget(source, end) - self.budget(source, start)) / (end - start),
            "tokens": count * self.block_size,
            "epochs": until / self.rows_per_epoch[source],
        }

    def _summarize_phase(self, phase: PlannedPhase) -> dict[str, Any]:
        sources = [
            self._summarize_source(source, phase.start, phase.end)
            | {"share_at_start": phase.starts_with[source] / UNIT, "share_at_end": phase.ends_with[source] / UNIT}
            for source in range(len(self.names))
        ]
        tokens = (phase.end - phase.start) * self.block_size
        return {"rows": [phase.start, phase.end], "tokens": tokens, "sources": sources}

    def summary(self) -> dict[str, Any]:
        """The plan as JSON for run.json: totals by source; for each phase also the shares at its start and end."""
        return {
            "sources": self.totals(),
            "phases": [self._summarize_phase(phase) for phase in self.phases],
            "rows": self.rows,
            "block_size": self.block_size,
            "notices": self.notices,
            "warnings": self.warnings(),
            **({"row_order": ROW_ORDER} if self._has_new_row_order() else {}),
        }

    def _has_new_row_order(self) -> bool:
        """Whether version 0.1 before 2026-11-30 ordered these rows differently, so that its runs cannot be resumed."""
        changed = len(self.active) in (5, 6) and self._interleaver.bound > 1
        return changed or bool(self.previous and self.previous._has_new_row_order())

    def describe(self) -> str:
        """The plan as a text table: phases, the contribution of each source, totals, notices and warnings."""
        return plot.describe(self)

    def draw(self, path: str | Path) -> None:
        """Plots the share of every source over the tokens of the plan to an image file."""
        plot.draw(self, path)
