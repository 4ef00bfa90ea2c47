"""Interleaves sources by their shares: determines the source of every row.

The budget of a source at row m is the integral of its share over the first m rows, a real number. The number of rows
that a source has contributed must stay close to its budget, and the source of any row must be computable without the
rows before it.

Algorithm. The sources are the leaves of a binary tree. A node of the tree is a group of sources with a left and a right
half, and its budget is the sum of their budgets. Of the first m rows of a group, the left half gets floor(T + 1/2),
where T is the budget of the left half at the point where the budget of the group reaches m. The right half gets the
rest. When m increases by 1, T increases by a number between 0 and 1, so the row goes to exactly one half, which depends
only on m. To find the source of a row, descend from the root. All arithmetic uses integers (shares are multiples of
2**-40), so rounding errors cannot lose or repeat a row.

Deviation. Let e_group be the largest deviation of a group from its budget, and ratio the share of the group that goes
to one half. The deviation of that half is at most e = 1/2 + ratio * e_group. For any shares, this is at most 1/2 row
for two sources, 1 row for three or four, and 1.5 rows for five to eight. `Interleaver.bound` is the bound for the
given shares.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

#: The integer that represents a share of 1. Shares are even, so half the sum of two shares is an integer.
UNIT = 1 << 40


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `end` (exclusive), over which the share of every source changes linearly.

    `first` and `last` are the shares at `start` and `end` in multiples of 1/UNIT: even numbers that sum to UNIT.
    """

    start: int
    end: int
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.end - self.start

    def budget(self, source: int, row: int) -> float:
        """The budget of a source for the rows from `start` to `row` (exclusive)."""
        after, first = row - self.start, self.first[source]
        return (2 * self.rows * first + (self.last[source] - first) * after) * after / (2 * self.rows * UNIT)


def to_units(weights: Sequence[float]) -> tuple[int, ...]:
    """Normalizes weights to shares in multiples of 1/UNIT: even numbers that sum to UNIT; a weight of 0 stays 0."""
    total = sum(weights)
    units = [2 * int(weight / total * (UNIT // 2)) for weight in weights]
    units[max(range(len(units)), key=units.__getitem__)] += UNIT - sum(units)
    return tuple(units)


class _Group:
    """A node of the tree: a single source (a leaf), or a group of sources with two halves."""

    def __init__(self, segments: Sequence[Segment], sources: Sequence[int], halves: tuple["_Group", "_Group"] | None):
        self.segments, self.sources = segments, sources
        self.halves: tuple[_Group, ...] = halves or ()
        self.first = [sum(segment.first[source] for source in sources) for segment in segments]
        self.last = [sum(segment.last[source] for source in sources) for segment in segments]
        areas = ((f + q) // 2 * s.rows for f, q, s in zip(self.first, self.last, segments, strict=True))
        self.totals = list(accumulate(areas, initial=0))  # the budget at the ends of the segments, in 1/UNIT rows
        self.peak = max(self.first + self.last)

    def _budget(self, j: int, after: int) -> int:
        """The budget `after` rows into segment j, in 1 / (2 * rows * UNIT) rows."""
        rows, first = self.segments[j].rows, self.first[j]
        return 2 * rows * self.totals[j] + (2 * rows * first + (self.last[j] - first) * after) * after

    def _find_budget(self, rows: int) -> tuple[int, int]:
        """(index of the segment, offset in it) of the last row at which the budget of the group is at most `rows`."""
        j = bisect_right(self.totals, rows * UNIT) - 1
        length, first = self.segments[j].rows, self.first[j]
        # Solve the quadratic equation budget(after) = rows
        target = 2 * length * rows * UNIT
        missing, slope = target - 2 * length * self.totals[j], self.last[j] - first
        divisor = length * first + math.isqrt(max(0, (length * first) ** 2 + slope * missing))
        after = min(missing // divisor if divisor else 0, length - 1)
        while self._budget(j, after) > target:  # where shares approach 0, the integer square root is off by a few rows
            after -= 1
        while self._budget(j, after + 1) <= target:
            after += 1
        return j, after

    def count_left(self, rows: int) -> int:
        """How many of the group's first `rows` rows go to its left half."""
        if not self.totals[-1]:
            return 0  # all of its sources have a share of 0
        half = self.halves[0]
        j, after = self._find_budget(rows)
        unit = 2 * self.segments[j].rows * UNIT
        start, half_start = self._budget(j, after), half._budget(j, after)
        step, half_step = self._budget(j, after + 1) - start, half._budget(j, after + 1) - half_start
        # Budgets are linear between two rows: floor(T + 1/2) with T = half_start + half_step * (rows - start) / step
        return (2 * (half_start * step + half_step * (rows * unit - start)) + step * unit) // (2 * step * unit)

    def ratio(self, half: "_Group") -> float:
        """The largest share of the group that goes to a half. In a linear segment, it is reached at one of the ends."""
        ends = zip(half.first + half.last, self.first + self.last, strict=True)
        return max((part / whole for part, whole in ends if whole), default=0.0)


class Interleaver:
    """Assigns rows to sources by their shares in consecutive segments. Row 0 is the start of the first segment."""

    def __init__(self, segments: Sequence[Segment]):
        end = segments[-1].end
        sources = range(len(segments[0].first))
        budgets = [sum((s.first[k] + s.last[k]) * s.rows for s in segments) for k in sources]
        smallest = min(budget for budget in budgets if budget)
        # A group may receive its last row half a row early, so budgets continue after the end with the average shares
        average = to_units(budgets)
        extension = Segment(end, end + 4 * sum(budgets) // smallest + 4, average, average)
        leaves = [_Group([*segments, extension], (source,), None) for source in sources]
        trees = [
            _huffman_tree(leaves, lambda group: group.peak),
            _huffman_tree(leaves, lambda group: group.totals[-2]),
            _balanced_tree(sorted(leaves, key=lambda group: -group.peak)),
        ]
        self.bound, self._root = min(((_bound(tree), tree) for tree in trees), key=lambda pair: pair[0])

    def locate(self, row: int) -> tuple[int, int]:
        """(source of a row, number of earlier rows from that source)."""
        group, number = self._root, row
        while group.halves:
            before = group.count_left(number)
            if group.count_left(number + 1) > before:
                group, number = group.halves[0], before
            else:
                group, number = group.halves[1], number - before
        return group.sources[0], number

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows come from a source."""
        group, number = self._root, rows
        while group.halves:
            left = group.count_left(number)
            if source in group.halves[0].sources:
                group, number = group.halves[0], left
            else:
                group, number = group.halves[1], number - left
        return number


def _join(left: _Group, right: _Group) -> _Group:
    return _Group(left.segments, (*left.sources, *right.sources), (left, right))


def _huffman_tree(leaves: Sequence[_Group], weight: Callable[[_Group], int]) -> _Group:
    """A Huffman tree: sources with a large weight are close to the root."""
    heap = [(weight(leaf), number, leaf) for number, leaf in enumerate(leaves)]
    heapq.heapify(heap)
    for number in range(len(leaves), 2 * len(leaves) - 1):
        (_, _, left), (_, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        group = _join(left, right)
        heapq.heappush(heap, (weight(group), number, group))
    return heap[0][2]


def _balanced_tree(leaves: Sequence[_Group]) -> _Group:
    """A tree of minimum depth. Its bound is at most half its depth: 1 row for four sources, 1.5 rows for eight."""
    if len(leaves) == 1:
        return leaves[0]
    return _join(_balanced_tree(leaves[::2]), _balanced_tree(leaves[1::2]))


def _bound(group: _Group, deviation: float = 0.0) -> float:
    """The largest deviation of a source in a group that deviates by `deviation`, see the module docstring."""
    if not group.halves:
        return deviation
    return max(_bound(half, 0.5 + group.ratio(half) * deviation) for half in group.halves)
