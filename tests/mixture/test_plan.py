"""MIXTURE, the plan: exact at every prefix, as cheap for any row, and every epoch in an order of its own."""

import json
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from mixture_support import WORST, config_of, drawn_plan
from support import located

from rorchat.errors import DataError, UsageError
from rorchat.mixture.config import MixtureConfig, Phase
from rorchat.mixture.interleave import UNIT
from rorchat.mixture.permutation import permutation_keys, permute
from rorchat.mixture.plan import Plan

PLANS = 200


def budgets(plan: Plan) -> np.ndarray:
    """(rows + 1, sources): what every source should have at every prefix, summed up row by row, not in closed form."""
    shares = np.zeros((plan.rows, len(plan.names)))
    for phase in plan.phases:
        for segment in phase.segments:
            first, last = (np.array(end) / UNIT for end in (segment.first, segment.last))
            middle = (np.arange(segment.rows) + 0.5)[:, None] / segment.rows  # of a straight line: exact
            shares[segment.start : segment.end] = first + middle * (last - first)
    return np.concatenate([np.zeros((1, len(plan.names))), np.cumsum(shares, axis=0)])


def errors(plan: Plan, sources: np.ndarray) -> float:
    seen = np.cumsum(sources[:, None] == np.arange(len(plan.names)), axis=0)
    return float(np.abs(seen - budgets(plan)[1:]).max())


# The plan: counts, shares, rows


def test_random_plans_are_exact_at_every_prefix_and_lose_or_repeat_no_row():
    guaranteed = within = capped = left_out = 0
    for number in range(PLANS):
        plan = drawn_plan(number)
        found = located(plan)
        counts = [0] * len(plan.names)
        for source, count in found:
            assert counts[source] == count, number  # 0, 1, 2 ... without a gap
            counts[source] += 1
        for rows in (0, 1, plan.rows // 3, plan.rows):
            for source in range(len(plan.names)):
                assert plan.count(source, rows) == (found[:rows, 0] == source).sum(), number
        worst = errors(plan, found[:, 0])
        assert worst <= (1 if len(plan.names) <= 4 else WORST) + 1e-9, (number, worst)
        assert worst <= plan.bound + 1e-9 and (len(plan.names) > 4 or plan.bound <= 1), (number, worst, plan.bound)
        guaranteed += plan.bound <= 1
        within += worst <= 1 + 1e-9
        for name, windows, count in zip(plan.names, plan.windows, counts, strict=True):
            cap = plan.config.sources[name].max_epochs
            assert cap is None or count <= cap * windows, (number, name)
        capped += any("max_epochs" in notice for notice in plan.notices)
        left_out += len(plan.names) < len(plan.config.sources)
    assert guaranteed >= PLANS // 2 and within >= PLANS * 2 // 3 and capped > 20 and left_out > 15


def test_where_every_source_is_alone_in_turn_four_are_within_one_row_and_eight_within_the_bound_that_is_said():
    for sources in (2, 3, 4, 8):
        for number in range(20):
            draw = np.random.default_rng(number)
            phases = [Phase(share=0.1, weights=dict.fromkeys([f"s{n}" for n in range(sources)], 1.0))]
            phases += [Phase(share=0.9 / sources, weights={f"s{n}": 1.0}) for n in draw.permutation(sources)]
            names = {f"s{n}": 100 for n in range(sources)}
            plan = Plan(config_of(*phases, sources=sources), names, int(draw.integers(300, 500)), 16)
            worst = errors(plan, located(plan)[:, 0])
            assert worst <= min(plan.bound, 1 if sources <= 4 else WORST) + 1e-9


def test_phases_begin_at_their_rows_and_give_what_they_say():
    phases = (
        Phase(share=0.5, weights={"s0": 1}),
        Phase(tokens=320, weights={"s1": 1}),
        Phase(share=0.5, weights={"s2": 1}),
    )
    plan = Plan(config_of(*phases), {"s0": 50, "s1": 50, "s2": 50}, 100, 16)
    assert [(phase.start, phase.end) for phase in plan.phases] == [(0, 40), (40, 60), (60, 100)]
    assert located(plan)[:, 0].tolist() == [0] * 40 + [1] * 20 + [2] * 40
    assert plan.summary()["phases"][1]["rows"] == [40, 60]


def test_phases_that_do_not_divide_evenly_still_make_up_all_rows():
    for parts in (2, 3, 7):
        plan = Plan(
            config_of(*[Phase(share=1 / parts, weights={"s0": 1})] * parts), {"s0": 9, "s1": 9, "s2": 9}, 100, 16
        )
        bounds = [0, *(phase.end for phase in plan.phases)]
        assert bounds == [round(100 * part / parts) for part in range(parts + 1)]


def test_a_ramp_goes_in_a_straight_line_from_the_phase_before_to_its_weights():
    phases = (Phase(share=0.2, weights={"s0": 3, "s1": 1}), Phase(share=0.8, ramp_to={"s1": 1, "s2": 3}))
    plan = Plan(config_of(*phases), {"s0": 900, "s1": 900, "s2": 900}, 5000, 16)
    sources = located(plan)[1000:, 0]
    parts = sources.reshape(8, 500)
    for source, start, end in ((0, 0.75, 0), (1, 0.25, 0.25), (2, 0, 0.75)):
        seen = (parts == source).mean(axis=1)
        middles = start + (end - start) * (np.arange(8) + 0.5) / 8
        assert np.abs(seen - middles).max() <= 2 / 500
    assert (np.diff((parts == 0).sum(axis=1)) < 0).all() and (np.diff((parts == 2).sum(axis=1)) > 0).all()


def test_replay_keeps_its_share_of_the_mixture_before_in_a_step_and_at_the_end_of_a_ramp():
    for kind in ("weights", "ramp_to"):
        phases = (Phase(share=0.5, weights={"s0": 1, "s1": 1}), Phase(share=0.5, replay=0.2, **{kind: {"s2": 1}}))
        plan = Plan(config_of(*phases), {"s0": 900, "s1": 900, "s2": 900}, 2000, 16)
        parts = plan.summary()["phases"][1]["sources"]
        assert [part["share_at_end"] for part in parts] == pytest.approx([0.1, 0.1, 0.8])
        expected = [100, 100, 800] if kind == "weights" else [300, 300, 400]
        for source in range(3):
            assert abs(plan.count(source, 2000) - plan.count(source, 1000) - expected[source]) <= 1


def test_a_phase_without_weights_goes_on_as_the_one_before_ended_and_the_first_mixes_by_size():
    plan = Plan(config_of(Phase(share=0.5), Phase(share=0.5)), {"s0": 100, "s1": 300, "s2": 600}, 1000, 16)
    assert [plan.count(source, 1000) for source in range(3)] == [100, 300, 600]
    assert plan.phases[1].jump == 0 and not plan.warnings()


def test_a_source_that_reaches_max_epochs_ends_there_and_the_others_share_its_part():
    phase = Phase(share=1.0, weights={"s0": 2, "s1": 1, "s2": 1})
    plan = Plan(config_of(phase, s0={"max_epochs": 2}), {"s0": 100, "s1": 900, "s2": 900}, 1000, 16)
    sources = located(plan)[:, 0]
    assert 198 <= (sources == 0).sum() <= 200
    last = int(np.flatnonzero(sources == 0)[-1])
    assert 395 <= last <= 400 and abs((sources[400:] == 1).sum() - 300) <= 1
    assert len(plan.notices) == 1 and "s0 reaches max_epochs 2 in phase 1" in plan.notices[0]
    assert plan.notices[0] in plan.describe()


def test_a_source_that_runs_out_in_a_ramp_is_gone_from_both_of_its_ends_and_from_later_phases():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.4, ramp_to={"s1": 1, "s2": 1}), Phase(share=0.1))
    plan = Plan(config_of(*phases, s1={"max_epochs": 1}), {"s0": 900, "s1": 50, "s2": 900}, 1000, 16)
    sources = located(plan)[:, 0]
    assert 48 <= (sources == 1).sum() <= 50
    assert plan.phases[1].ends_with == plan.phases[2].ends_with == (0, 0, UNIT)
    assert (sources[900:] == 2).all()


def test_a_plan_whose_sources_are_all_used_up_is_a_data_error_with_numbers():
    config = config_of(Phase(share=1.0), sources=2, s0={"max_epochs": 1}, s1={"max_epochs": 2})
    with pytest.raises(
        DataError,
        match=r"phase 1 has no source left after [\d,]+ of 16,000 tokens: s0 \(max_epochs 1 x 1,600 tokens\), s1",
    ) as failure:
        Plan(config, {"s0": 100, "s1": 100}, 1000, 16)
    assert "\n" not in str(failure.value)


def test_an_optional_source_that_is_missing_gives_its_part_to_the_others_and_is_told():
    phase = Phase(share=1.0, weights={"s0": 1, "s1": 2, "s2": 3})
    plan = Plan(config_of(phase, s1={"optional": True}), {"s0": 90, "s2": 90}, 400, 16)
    assert plan.names == ["s0", "s2"] and [plan.count(source, 400) for source in (0, 1)] == [100, 300]
    assert "note: s1 is left out" in plan.describe()
    with pytest.raises(DataError, match="source 's1' is missing and not optional"):
        Plan(config_of(phase), {"s0": 90, "s2": 90}, 400, 16)
    with pytest.raises(DataError, match="phase 2 has no source left: s1 could not be had"):
        alone = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, weights={"s1": 1}))
        Plan(config_of(*alone, s1={"optional": True}), {"s0": 90, "s2": 90}, 400, 16)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([Phase(tokens=800), Phase(tokens=1600)], "tokens sum to 2,400, the run trains on 1,600: give less"),
        ([Phase(tokens=800)], "tokens sum to 800, the run trains on 1,600: give one phase `share: 100%` instead"),
        ([Phase(tokens=800), Phase(tokens=2), Phase(share=1.0)], "phase 2 is less than one row of 16 tokens"),
        ([Phase(tokens=1600), Phase(share=1.0)], "phase 2 is less than one row"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_a_usage_error(phases, said):
    with pytest.raises(UsageError, match=said):
        Plan(config_of(*phases), {"s0": 9, "s1": 9, "s2": 9}, 100, 16)


def test_a_plan_of_a_billion_rows_is_as_quick_as_a_short_one_and_needs_no_memory():
    phases = (
        Phase(share=0.5, weights={"s0": 1}),
        Phase(share=0.4, ramp_to={"s1": 5, "s2": 3, "s3": 2}),
        Phase(share=0.1),
    )
    windows = {f"s{number}": 10**8 for number in range(4)}
    rows = 10**9
    tracemalloc.start()
    plan = Plan(config_of(*phases, sources=4), windows, rows, 1024)
    plan.locate(rows - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000  # bytes
    seconds = []
    for row in (0, *np.random.default_rng(0).integers(0, rows, 20).tolist()):
        started = time.perf_counter()
        source, number = plan.locate(row)
        seconds.append(time.perf_counter() - started)
        assert plan.count(source, row) == number and plan.count(source, row + 1) == number + 1
        assert abs(number - plan.budget(source, row)) <= 1 + 1e-5  # the budget here is in float64
    builds = []
    for _ in range(5):
        started = time.perf_counter()
        Plan(config_of(*phases, sources=4), windows, rows, 1024)
        builds.append(time.perf_counter() - started)
    assert sorted(seconds)[10] < 0.001 and min(builds) < 0.005
    assert sum(plan.count(source, rows) for source in range(4)) == rows


def test_specs_and_weights_make_a_mixture_whose_names_are_unique():
    config = MixtureConfig.from_specs(["text=a", "text=b", "tinytown=5", "text=c"], [1, 2, 3, 4])
    assert list(config.sources) == ["text", "text-2", "tinytown", "text-3"]
    assert config.phases[0].weights == {"text": 1, "text-2": 2, "tinytown": 3, "text-3": 4}
    assert MixtureConfig.from_specs(["text=a"]).phases == (Phase(share=1.0),)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]]
)
def test_wrong_weights_are_a_usage_error(weights):
    with pytest.raises(
        UsageError, match=rf"{len(weights)} weights .* for 3 sources: give one positive number a source"
    ):
        MixtureConfig.from_specs(["a", "b", "c"], weights)


# What is said before step 1


def test_jumps_and_many_epochs_are_warned_of_with_advice():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, weights={"s0": 1, "s1": 1}))
    plan = Plan(config_of(*phases, sources=2), {"s0": 1000, "s1": 50}, 1000, 16)
    jump, epochs = plan.warnings()
    assert "phase 2 begins with another mixture" in jump and "0.50" in jump and "ramp_to" in jump
    assert "s1 is read 5.0 times" in epochs and "arXiv:2305.16264" in epochs
    gentle = (phases[0], Phase(share=0.5, ramp_to={"s0": 1, "s1": 1}))
    assert Plan(config_of(*gentle, sources=2), {"s0": 1000, "s1": 900}, 1000, 16).warnings() == []


def test_the_plan_in_words_has_tokens_shares_and_epochs_of_every_phase_and_in_all():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, ramp_to={"s1": 1}))
    told = Plan(config_of(*phases, sources=2), {"s0": 1000, "s1": 100}, 1000, 16).describe()
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert lines[:5] == [
        "mixture: 16,000 tokens in 1,000 rows of 16",
        "phase 1: 8,000 tokens, rows 0 to 499",
        "s0 8,000 tokens 100.0 % -> 100.0 % 0.50 epochs so far",
        "phase 2: 8,000 tokens, rows 500 to 999",
        "s0 4,000 tokens 100.0 % -> 0.0 % 0.75 epochs so far",
    ]
    assert "s1 4,000 tokens 25.0 % of all 2.50 epochs" in lines


def test_the_summary_is_json_and_its_totals_are_the_rows_of_the_plan():
    for number in range(20):
        plan = drawn_plan(number)
        summary = json.loads(json.dumps(plan.summary()))
        sources = Counter(located(plan)[:, 0].tolist())
        for index, part in enumerate(summary["sources"]):
            assert part["tokens"] == 16 * sources[index] and part["name"] == plan.names[index]
            assert part["epochs"] == sources[index] / plan.windows[index]
            assert sum(phase["sources"][index]["tokens"] for phase in summary["phases"]) == part["tokens"]
        assert sum(part["share"] for part in summary["sources"]) == pytest.approx(1)


def test_the_picture_is_drawn(tmp_path):
    drawn_plan(6).draw(tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


# The order within a source


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 97, 128, 1009, 4096, 4097, 10_007])
def test_the_order_of_an_epoch_is_a_permutation(size):
    for said in ("0/text/0", "1/text/0", "0/text/1"):
        keys = permutation_keys(said)
        assert sorted(permute(place, size, keys) for place in range(size)) == list(range(size))


def test_the_order_of_an_epoch_looks_shuffled():
    """Fixed points, rises, and the distance of neighbours are what a uniform permutation has (four sigma)."""
    size = 4000
    for said in ("0/text/0", "0/text/1", "7/c4/0"):
        order = np.array([permute(place, size, permutation_keys(said)) for place in range(size)])
        assert (order == np.arange(size)).sum() <= 6
        assert abs((np.diff(order) > 0).mean() - 0.5) < 4 * (1 / 12 / size) ** 0.5 * 1.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / size**0.5
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
        spread = np.histogram2d(np.arange(size), order, bins=8)[0]
        assert ((spread - size / 64) ** 2 / (size / 64)).sum() < 49 + 4 * 98**0.5  # chi squared, 49 degrees of freedom


def test_small_epochs_come_in_every_order():
    orders = {tuple(permute(place, 3, permutation_keys(f"{seed}/a/0")) for place in range(3)) for seed in range(100)}
    assert len(orders) == 6


def test_a_row_of_a_huge_store_is_found_within_a_millisecond():
    keys = permutation_keys("0/huge/0")
    started = time.perf_counter()
    found = {permute(place, 10**9, keys) for place in range(0, 10**9, 10**7)}
    assert len(found) == 100 and (time.perf_counter() - started) / 100 < 0.001
