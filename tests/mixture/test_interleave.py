"""Interleaved sources stay close to their budgets, and no row is lost or repeated."""

import numpy as np
from mixture_support import MAX_DEVIATION, config_of, random_plan
from support import locate_rows

from rorchat.mixture.interleave import UNIT
from rorchat.mixture.mixture_file import Phase
from rorchat.mixture.plan import Plan

PLANS = 200


def budgets(plan: Plan) -> np.ndarray:
    """(rows + 1, sources): the budget of every source at every row, summed row by row instead of in closed form."""
    shares = np.zeros((plan.rows, len(plan.names)))
    for phase in plan.phases:
        for segment in phase.segments:
            first, last = (np.array(end) / UNIT for end in (segment.first, segment.last))
            middle = (np.arange(segment.rows) + 0.5)[:, None] / segment.rows  # exact for a linear segment
            shares[segment.start : segment.end] = first + middle * (last - first)
    return np.concatenate([np.zeros((1, len(plan.names))), np.cumsum(shares, axis=0)])


def largest_deviation(plan: Plan, sources: np.ndarray) -> float:
    seen = np.cumsum(sources[:, None] == np.arange(len(plan.names)), axis=0)
    return float(np.abs(seen - budgets(plan)[1:]).max())


def test_random_plans_follow_their_budgets_and_lose_no_row():
    guaranteed = within = capped = left_out = 0
    for number in range(PLANS):
        plan = random_plan(number)
        rows_of_plan = locate_rows(plan)
        counts = [0] * len(plan.names)
        for source, count in rows_of_plan:
            assert counts[source] == count, number  # consecutive
            counts[source] += 1
        for rows in (0, 1, plan.rows // 3, plan.rows):
            for source in range(len(plan.names)):
                assert plan.count(source, rows) == (rows_of_plan[:rows, 0] == source).sum(), number
        worst = largest_deviation(plan, rows_of_plan[:, 0])
        assert worst <= (1 if len(plan.names) <= 4 else MAX_DEVIATION) + 1e-9, (number, worst)
        assert worst <= plan.bound + 1e-9 and (len(plan.names) > 4 or plan.bound <= 1), (number, worst, plan.bound)
        guaranteed += plan.bound <= 1
        within += worst <= 1 + 1e-9
        for name, rows_per_epoch, count in zip(plan.names, plan.rows_per_epoch, counts, strict=True):
            cap = plan.config.sources[name].max_epochs
            assert cap is None or count <= cap * rows_per_epoch, (number, name)
        capped += any("max_epochs" in notice for notice in plan.notices)
        left_out += len(plan.names) < len(plan.config.sources)
    assert guaranteed >= PLANS // 2 and within >= PLANS * 3 // 5 and capped > 20 and left_out > 15


def test_deviation_stays_within_the_bound_for_single_sources_in_turn():
    for sources in (2, 3, 4, 8):
        for number in range(20):
            rng = np.random.default_rng(number)
            phases = [Phase(share=0.1, weights=dict.fromkeys([f"s{n}" for n in range(sources)], 1.0))]
            phases += [Phase(share=0.9 / sources, weights={f"s{n}": 1.0}) for n in rng.permutation(sources)]
            names = {f"s{n}": 100 for n in range(sources)}
            plan = Plan(config_of(*phases, sources=sources), names, int(rng.integers(300, 500)), 16)
            worst = largest_deviation(plan, locate_rows(plan)[:, 0])
            assert worst <= min(plan.bound, 1 if sources <= 4 else MAX_DEVIATION) + 1e-9
