"""Plans follow the phases of their mixture, and their summaries match them."""

import json
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from mixture_support import config_of, random_plan
from support import locate_rows

from rorchat.errors import DataError, UsageError
from rorchat.mixture.interleave import UNIT
from rorchat.mixture.mixture_file import Phase
from rorchat.mixture.plan import Plan


def test_phases_start_at_their_rows():
    phases = (
        Phase(share=0.5, weights={"s0": 1}),
        Phase(tokens=320, weights={"s1": 1}),
        Phase(share=0.5, weights={"s2": 1}),
    )
    plan = Plan(config_of(*phases), {"s0": 50, "s1": 50, "s2": 50}, 100, 16)
    assert [(phase.start, phase.end) for phase in plan.phases] == [(0, 40), (40, 60), (60, 100)]
    assert locate_rows(plan)[:, 0].tolist() == [0] * 40 + [1] * 20 + [2] * 40
    assert plan.summary()["phases"][1]["rows"] == [40, 60]


def test_uneven_phases_add_up_to_all_rows():
    for parts in (2, 3, 7):
        plan = Plan(
            config_of(*[Phase(share=1 / parts, weights={"s0": 1})] * parts), {"s0": 9, "s1": 9, "s2": 9}, 100, 16
        )
        bounds = [0, *(phase.end for phase in plan.phases)]
        assert bounds == [round(100 * part / parts) for part in range(parts + 1)]


def test_a_ramp_is_linear():
    phases = (Phase(share=0.2, weights={"s0": 3, "s1": 1}), Phase(share=0.8, ramp_to={"s1": 1, "s2": 3}))
    plan = Plan(config_of(*phases), {"s0": 900, "s1": 900, "s2": 900}, 5000, 16)
    sources = locate_rows(plan)[1000:, 0]
    parts = sources.reshape(8, 500)
    for source, start, end in ((0, 0.75, 0), (1, 0.25, 0.25), (2, 0, 0.75)):
        seen = (parts == source).mean(axis=1)
        middles = start + (end - start) * (np.arange(8) + 0.5) / 8
        assert np.abs(seen - middles).max() <= 2 / 500
    assert (np.diff((parts == 0).sum(axis=1)) < 0).all() and (np.diff((parts == 2).sum(axis=1)) > 0).all()


def test_replay_keeps_its_share_of_the_previous_mixture():
    for kind in ("weights", "ramp_to"):
        phases = (Phase(share=0.5, weights={"s0": 1, "s1": 1}), Phase(share=0.5, replay=0.2, **{kind: {"s2": 1}}))
        plan = Plan(config_of(*phases), {"s0": 900, "s1": 900, "s2": 900}, 2000, 16)
        parts = plan.summary()["phases"][1]["sources"]
        assert [part["share_at_end"] for part in parts] == pytest.approx([0.1, 0.1, 0.8])
        expected = [100, 100, 800] if kind == "weights" else [300, 300, 400]
        for source in range(3):
            assert abs(plan.count(source, 2000) - plan.count(source, 1000) - expected[source]) <= 1


def test_a_phase_without_weights_continues_the_previous_phase():
    plan = Plan(config_of(Phase(share=0.5), Phase(share=0.5)), {"s0": 100, "s1": 300, "s2": 600}, 1000, 16)
    assert [plan.count(source, 1000) for source in range(3)] == [100, 300, 600]
    assert plan.phases[1].jump == 0 and not plan.warnings()


def test_other_sources_take_the_share_of_an_exhausted_source():
    phase = Phase(share=1.0, weights={"s0": 2, "s1": 1, "s2": 1})
    plan = Plan(config_of(phase, s0={"max_epochs": 2}), {"s0": 100, "s1": 900, "s2": 900}, 1000, 16)
    sources = locate_rows(plan)[:, 0]
    assert 198 <= (sources == 0).sum() <= 200
    last = int(np.flatnonzero(sources == 0)[-1])
    assert 395 <= last <= 400 and abs((sources[400:] == 1).sum() - 300) <= 1
    assert len(plan.notices) == 1 and "s0 reaches max_epochs 2 in phase 1" in plan.notices[0]
    assert plan.notices[0] in plan.describe()


def test_a_source_exhausted_in_a_ramp_is_removed_from_later_phases():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.4, ramp_to={"s1": 1, "s2": 1}), Phase(share=0.1))
    plan = Plan(config_of(*phases, s1={"max_epochs": 1}), {"s0": 900, "s1": 50, "s2": 900}, 1000, 16)
    sources = locate_rows(plan)[:, 0]
    assert 48 <= (sources == 1).sum() <= 50
    assert plan.phases[1].ends_with == plan.phases[2].ends_with == (0, 0, UNIT)
    assert (sources[900:] == 2).all()


def test_a_plan_without_sources_left_is_a_data_error():
    config = config_of(Phase(share=1.0), sources=2, s0={"max_epochs": 1}, s1={"max_epochs": 2})
    with pytest.raises(
        DataError,
        match=r"phase 1 has no source left after [\d,]+ of 16,000 tokens: s0 \(max_epochs 1 x 1,600 tokens\), s1",
    ) as failure:
        Plan(config, {"s0": 100, "s1": 100}, 1000, 16)
    assert "\n" not in str(failure.value)


def test_other_sources_take_the_share_of_a_missing_optional_source():
    phase = Phase(share=1.0, weights={"s0": 1, "s1": 2, "s2": 3})
    plan = Plan(config_of(phase, s1={"optional": True}), {"s0": 90, "s2": 90}, 400, 16)
    assert plan.names == ["s0", "s2"] and [plan.count(source, 400) for source in (0, 1)] == [100, 300]
    assert "note: s1 is optional and not available" in plan.describe()
    with pytest.raises(DataError, match="source 's1' is missing and not optional"):
        Plan(config_of(phase), {"s0": 90, "s2": 90}, 400, 16)
    with pytest.raises(DataError, match="phase 2 uses only sources that are not available: s1"):
        phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, weights={"s1": 1}))
        Plan(config_of(*phases, s1={"optional": True}), {"s0": 90, "s2": 90}, 400, 16)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase(tokens=800), Phase(tokens=1600)], "tokens sum to 2,400, the run trains on 1,600: give less"),
        ([Phase(tokens=800)], "tokens sum to 800, the run trains on 1,600: give one phase `share: 100%` instead"),
        ([Phase(tokens=800), Phase(tokens=2), Phase(share=1.0)], "phase 2 is shorter than one row of 16 tokens"),
        ([Phase(tokens=1600), Phase(share=1.0)], "phase 2 is shorter than one row"),
    ],
)
def test_phases_that_do_not_fit_the_run_are_a_usage_error(phases, message):
    with pytest.raises(UsageError, match=message):
        Plan(config_of(*phases), {"s0": 9, "s1": 9, "s2": 9}, 100, 16)


def test_a_plan_of_a_billion_rows_is_fast_and_small():
    phases = (
        Phase(share=0.5, weights={"s0": 1}),
        Phase(share=0.4, ramp_to={"s1": 5, "s2": 3, "s3": 2}),
        Phase(share=0.1),
    )
    rows_per_epoch = {f"s{number}": 10**8 for number in range(4)}
    rows = 10**9
    tracemalloc.start()
    plan = Plan(config_of(*phases, sources=4), rows_per_epoch, rows, 1024)
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
        Plan(config_of(*phases, sources=4), rows_per_epoch, rows, 1024)
        builds.append(time.perf_counter() - started)
    assert sorted(seconds)[10] < 0.001 and min(builds) < 0.005
    assert sum(plan.count(source, rows) for source in range(4)) == rows


def test_jumps_and_many_epochs_give_warnings():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, weights={"s0": 1, "s1": 1}))
    plan = Plan(config_of(*phases, sources=2), {"s0": 1000, "s1": 50}, 1000, 16)
    jump, epochs = plan.warnings()
    assert "phase 2 begins with a different mixture" in jump and "0.50" in jump and "ramp_to" in jump
    assert "s1 is read 5.0 times" in epochs and "arXiv:2305.16264" in epochs
    gentle = (phases[0], Phase(share=0.5, ramp_to={"s0": 1, "s1": 1}))
    assert Plan(config_of(*gentle, sources=2), {"s0": 1000, "s1": 900}, 1000, 16).warnings() == []


def test_the_description_lists_every_phase_and_the_total():
    phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, ramp_to={"s1": 1}))
    description = Plan(config_of(*phases, sources=2), {"s0": 1000, "s1": 100}, 1000, 16).describe()
    lines = [" ".join(line.split()) for line in description.splitlines()]
    assert lines[:5] == [
        "mixture: 16,000 tokens to train on, in 1,000 rows of 16 tokens",
        "phase 1: 8,000 tokens, rows 0 to 499",
        "s0 8,000 tokens 100.0 % read 0.50 times by then",
        "phase 2: 8,000 tokens, rows 500 to 999",
        "s0 4,000 tokens 100.0 % -> 0.0 % read 0.75 times by then",
    ]
    assert "s1 4,000 tokens 25.0 % of all read 2.50 times" in lines


def test_the_description_of_a_single_phase_has_one_line_for_each_source():
    description = Plan(config_of(Phase(share=1.0), sources=1), {"s0": 1000}, 500, 16).describe()
    assert [" ".join(line.split()) for line in description.splitlines()] == [
        "mixture: 8,000 tokens to train on, in 500 rows of 16 tokens",
        "total:",
        "s0 8,000 tokens 100.0 % of all read 0.50 times",
    ]


def test_the_summary_is_json_and_its_totals_match_the_rows():
    for number in range(20):
        plan = random_plan(number)
        summary = json.loads(json.dumps(plan.summary()))
        sources = Counter(locate_rows(plan)[:, 0].tolist())
        for index, part in enumerate(summary["sources"]):
            assert part["tokens"] == 16 * sources[index] and part["name"] == plan.names[index]
            assert part["epochs"] == sources[index] / plan.rows_per_epoch[index]
            assert sum(phase["sources"][index]["tokens"] for phase in summary["phases"]) == part["tokens"]
        assert sum(part["share"] for part in summary["sources"]) == pytest.approx(1)


def test_the_plot_is_a_png_file(tmp_path):
    random_plan(6).draw(tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("count", "is_recorded"), [(2, False), (4, False), (6, True)])
def test_only_plans_with_a_changed_row_order_record_it(count, is_recorded):
    rng = np.random.default_rng(0)
    recorded = []
    for _ in range(20):
        phase = Phase(share=1.0, weights={f"s{n}": float(weight) for n, weight in enumerate(rng.random(count))})
        plan = Plan(config_of(phase, sources=count), {f"s{n}": 100 for n in range(count)}, 100, 16)
        recorded.append("row_order" in plan.summary())
    assert any(recorded) == is_recorded
