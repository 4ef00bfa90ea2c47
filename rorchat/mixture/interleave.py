"""Shares over rows -> whose turn it is: real budgets rounded to whole rows, any row by itself and exactly.

The sources stand in a binary tree. Of the first m rows of a group, floor(T + 1/2) go to its left half, where T is what
the left half should have when the group should have m; the others go to the right. T never falls and never rises by
more than 1 from m to m + 1, so each row goes to one side, and which one needs nothing but m. Everything is computed in
whole numbers (shares are multiples of 2**-40), so that no rounding error can lose or repeat a row.

How far is a source's count from its budget? A half is off by at most 1/2, and by its ratio of the group times what the
group is off: e = 1/2 + ratio * e_group. That is at most 1/2 for two sources and at most 1 for four, whatever their
shares. Deeper in the tree it may be more, where a small part of a group becomes most of it; `Rounding.bound` says how
much at most. Seen in 800 random plans, many with sources alone in turn: up to 1.15 rows with five sources, 1.23 with
six, 1.40 with seven or eight.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

#: A share of 1. Shares are even, so that a ramp's budget at its last row, half the sum of both ends, is whole.
UNIT = 1 << 40

#: Up to so many sources all trees are searched where the simple ones may be off by more than 1: 10 ms for six.
SEARCHED = 6


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `end` (not included), in which every source's share moves in a straight line.

    `first` and `last` hold the shares at both ends, in multiples of 1/UNIT, all even; either sums to UNIT.
    """

    start: int
    end: int
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.end - self.start

    def budget(self, source: int, row: int) -> float:
        """What a source should have of the rows from `start` to `row`."""
        after, first = row - self.start, self.first[source]
        return (2 * self.rows * first + (self.last[source] - first) * after) * after / (2 * self.rows * UNIT)


def to_units(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights in any scale as shares of UNIT: even, zero where the weight is, and exact in sum."""
    total = sum(weights)
    units = [2 * int(weight / total * (UNIT // 2)) for weight in weights]
    units[max(range(len(units)), key=units.__getitem__)] += UNIT - sum(units)
    return tuple(units)


class _Group:
    """Some sources together: a leaf of the tree, or two halves."""

    def __init__(self, segments: Sequence[Segment], sources: Sequence[int], halves: tuple["_Group", "_Group"] | None):
        self.segments, self.sources, self.halves = segments, sources, halves
        self.first = [sum(segment.first[source] for source in sources) for segment in segments]
        self.last = [sum(segment.last[source] for source in sources) for segment in segments]
        areas = ((f + q) // 2 * s.rows for f, q, s in zip(self.first, self.last, segments, strict=True))
        self.at = list(accumulate(areas, initial=0))  # the budget at the ends of the segments, in 1/UNIT rows
        self.peak = max(self.first + self.last)

    def _value(self, j: int, after: int) -> int:
        """The budget `after` rows into segment j, in 1 / (2 * rows * UNIT) rows."""
        rows, first = self.segments[j].rows, self.first[j]
        return 2 * rows * self.at[j] + (2 * rows * first + (self.last[j] - first) * after) * after

    def _reaches(self, rows: int) -> tuple[int, int]:
        """(segment, rows into it) of the last row at which the group's budget is at most `rows`."""
        j = bisect_right(self.at, rows * UNIT) - 1
        length, first = self.segments[j].rows, self.first[j]
        wanted = 2 * length * rows * UNIT
        missing, slope = wanted - 2 * length * self.at[j], self.last[j] - first
        divisor = length * first + math.isqrt(max(0, (length * first) ** 2 + slope * missing))
        after = min(missing // divisor if divisor else 0, length - 1)
        while self._value(j, after) > wanted:  # the square root is a whole number: a few rows off where shares vanish
            after -= 1
        while self._value(j, after + 1) <= wanted:
            after += 1
        return j, after

    def left(self, rows: int) -> int:
        """How many of the group's first `rows` rows go to its left half."""
        if not self.at[-1]:
            return 0  # none of its sources is ever used
        half = self.halves[0]
        j, after = self._reaches(rows)
        unit = 2 * self.segments[j].rows * UNIT
        here, there = self._value(j, after), half._value(j, after)
        step, half_step = self._value(j, after + 1) - here, half._value(j, after + 1) - there
        # Between two rows budgets run straight: floor(T + 1/2) with T = there + half_step * (rows - here) / step
        return (2 * (there * step + half_step * (rows * unit - here)) + step * unit) // (2 * step * unit)

    def ratio(self, half: "_Group") -> float:
        """The largest share of the group that a half ever has; in a ramp it is at one of its ends."""
        ends = zip(half.first + half.last, self.first + self.last, strict=True)
        return max((own / all_ for own, all_ in ends if all_), default=0.0)


class Rounding:
    """Which source's turn a row is, for shares given as segments that follow each other from row 0."""

    def __init__(self, segments: Sequence[Segment]):
        rows = segments[-1].end
        sources = range(len(segments[0].first))
        budgets = [sum((s.first[k] + s.last[k]) * s.rows for s in segments) for k in sources]
        least = min(budget for budget in budgets if budget)
        # A group may get its last row half a row early: its budgets go on behind the end as they were on average
        average = to_units(budgets)
        behind = Segment(rows, rows + 4 * sum(budgets) // least + 4, average, average)
        leaves = [_Group([*segments, behind], (source,), None) for source in sources]
        trees = [_huffman(leaves, lambda group: group.peak), _huffman(leaves, lambda group: group.at[-2])]
        trees.append(_balanced(sorted(leaves, key=lambda group: -group.peak)))
        self.root = min(trees, key=lambda tree: max(_bounds(tree).values()))
        if max(_bounds(self.root).values()) > 1 and len(leaves) <= SEARCHED:
            self.root = min(self.root, _searched(leaves), key=lambda tree: max(_bounds(tree).values()))
        self.bounds = _bounds(self.root)

    @property
    def bound(self) -> float:
        """How many rows any source's count may be off its budget at any prefix, at most."""
        return max(self.bounds.values())

    def locate(self, row: int) -> tuple[int, int]:
        """(source, how many rows it had before) of a row."""
        group, number = self.root, row
        while group.halves:
            before = group.left(number)
            if group.left(number + 1) > before:
                group, number = group.halves[0], before
            else:
                group, number = group.halves[1], number - before
        return group.sources[0], number

    def count(self, source: int, rows: int) -> int:
        """How many of the first `rows` rows are a source's."""
        group, number = self.root, rows
        while group.halves:
            left = group.left(number)
            if source in group.halves[0].sources:
                group, number = group.halves[0], left
            else:
                group, number = group.halves[1], number - left
        return number


def _joined(left: _Group, right: _Group) -> _Group:
    return _Group(left.segments, (*left.sources, *right.sources), (left, right))


def _huffman(leaves: Sequence[_Group], weight) -> _Group:
    """The tree in which what is heavy stands near the root."""
    heap = [(weight(leaf), number, leaf) for number, leaf in enumerate(leaves)]
    heapq.heapify(heap)
    for number in range(len(leaves), 2 * len(leaves) - 1):
        (_, _, left), (_, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        group = _joined(left, right)
        heapq.heappush(heap, (weight(group), number, group))
    return heap[0][2]


def _balanced(leaves: Sequence[_Group]) -> _Group:
    """The tree of the least depth; four sources are within 1 row in it, whatever their shares."""
    if len(leaves) == 1:
        return leaves[0]
    return _joined(_balanced(leaves[::2]), _balanced(leaves[1::2]))


def _searched(leaves: Sequence[_Group]) -> _Group:
    """The tree of the least bound, or one of at most 1; bounds on the way are rounded up to sixteenths."""
    ends = [leaf.first + leaf.last for leaf in leaves]

    @cache
    def shares(members: int) -> list[int]:
        return [sum(column) for column in zip(*(e for k, e in enumerate(ends) if members >> k & 1), strict=True)]

    @cache
    def ratio(half: int, members: int) -> float:
        return max((a / b for a, b in zip(shares(half), shares(members), strict=True) if b), default=0.0)

    @cache
    def best(members: int, sixteenths: int) -> tuple[int, int]:
        """(bound in sixteenths, the left half) of some sources, as bits, in a group that is so far off itself."""
        if members & (members - 1) == 0:
            return sixteenths, 0
        found, lowest = (999, 0), members & -members
        half = others = members ^ lowest
        while half and found[0] > 16:
            half = (half - 1) & others
            worst = 0
            for part in (lowest | half, others ^ half):
                off = 8 + ratio(part, members) * sixteenths
                worst = max(worst, best(part, math.ceil(off - 1e-9))[0] if worst < found[0] else worst)
            found = min(found, (worst, lowest | half))
        return found

    def grown(members: int, sixteenths: int) -> _Group:
        left = best(members, sixteenths)[1]
        if not left:
            return leaves[members.bit_length() - 1]
        halves = (left, members ^ left)
        return _joined(*(grown(h, math.ceil(8 + ratio(h, members) * sixteenths - 1e-9)) for h in halves))

    return grown((1 << len(leaves)) - 1, 0)


def _bounds(group: _Group, own: float = 0.0) -> dict[int, float]:
    """By source: e = 1/2 + ratio * e_group along its path."""
    if not group.halves:
        return {group.sources[0]: own}
    return {
        source: bound for half in group.halves for source, bound in _bounds(half, 0.5 + group.ratio(half) * own).items()
    }
