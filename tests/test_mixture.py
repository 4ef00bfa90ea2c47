"""MIXTURE: which row comes when is a pure function of the plan, exact at every prefix, and as cheap for any row."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.tokens.adopt import adopt
from rorchat.tokens.mixture import Mixture, ValidationRows, prepare_stores, round_keys, shuffled, windows_of
from rorchat.tokens.phases import MixtureConfig, Phase, Source, read_mixture
from rorchat.tokens.plan import Plan
from rorchat.tokens.prepare import prepare
from rorchat.tokens.rounding import UNIT

MIXTURE = """
sources:
  c4: c4=data/c4
  tales: {from: cosmopedia=data/tales, max_epochs: 4, optional: true}
  alpaca: alpaca=data/alpaca
phases:
  - {share: 60%, weights: {c4: 1}}
  - {share: 0.2, ramp_to: {tales: 50, alpaca: 6e-1}, replay: 10%}
  - {share: 20%}
  - {tokens: 2_000}
"""
PLANS = 200
WORST = 1.4  # rows: what plans of more than four sources, many of them alone in turn, are allowed


def written(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text)
    return path


def config_of(*phases: Phase, sources: int = 3, **options) -> MixtureConfig:
    """Sources s0, s1, ...; an option `s1={...}` sets fields of s1."""
    names = [f"s{number}" for number in range(sources)]
    return MixtureConfig({name: Source(f"text={name}", **options.get(name, {})) for name in names}, phases)


def located(plan: Plan) -> np.ndarray:
    """(rows, 2): source and number of every row."""
    return np.array([plan.locate(row) for row in range(plan.rows)])


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


def drawn_weights(draw: np.random.Generator, names: list[str]) -> dict[str, float]:
    kind = draw.integers(3)
    if kind == 0:
        return {str(draw.choice(names)): 1.0}  # alone
    weights = draw.random(len(names)) ** 3 + 1e-4
    if kind == 1:
        weights *= draw.random(len(names)) < 0.5
        weights[draw.integers(len(names))] += 0.1
    return dict(zip(names, weights.tolist(), strict=True))


def drawn_plan(number: int) -> Plan:
    """A random plan: 2 to 8 sources, 1 to 5 phases, ramps, replay, zero weights, sources alone, caps, optional ones."""
    draw = np.random.default_rng(number)
    names = [f"s{n}" for n in range(2 + number % 7)]
    sources = {
        name: Source(name, max_epochs=float(draw.integers(1, 4)) if draw.random() < 0.2 else None) for name in names
    }
    sources["s0"] = Source("s0")  # somebody must be able to go on
    windows = {name: int(draw.integers(20, 200)) for name in names}
    missing = names[-1] if len(names) > 2 and draw.random() < 0.2 else None
    sources[names[-1]] = Source(names[-1], optional=True)
    phases = []
    for phase, share in enumerate(draw.dirichlet(np.full(draw.integers(1, 6), 3.0)).tolist()):
        weights = drawn_weights(draw, names) | {"s0": float(draw.random()) + 0.01 if draw.random() < 0.9 else 1e-3}
        ramp = phase > 0 and draw.random() < 0.5
        replay = float(draw.random()) if phase > 0 and draw.random() < 0.3 else 0.0
        phases.append(Phase(share=share, replay=replay, **{"ramp_to" if ramp else "weights": weights}))
    windows.pop(missing, None)
    return Plan(MixtureConfig(sources, tuple(phases)), windows, int(draw.integers(300, 700)), 16)


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
    assert plan.notices[0] in plan.told()


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
    assert "note: s1 is left out" in plan.told()
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
    told = Plan(config_of(*phases, sources=2), {"s0": 1000, "s1": 100}, 1000, 16).told()
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


# The file


def test_a_mixture_file_is_read_as_it_says(tmp_path):
    config = read_mixture(written(tmp_path, MIXTURE))
    assert config.sources["c4"] == Source("c4=data/c4")
    assert config.sources["tales"] == Source("cosmopedia=data/tales", 4.0, True)
    assert config.phases == (
        Phase(share=0.6, weights={"c4": 1.0}),
        Phase(share=0.2, ramp_to={"tales": 50.0, "alpaca": 0.6}, replay=0.1),
        Phase(share=0.2),
        Phase(tokens=2000),
    )
    assert json.loads(json.dumps(config.resolved()))["phases"][3]["tokens"] == 2000


def test_a_mixture_file_without_phases_is_one_phase_by_its_weights_or_by_size(tmp_path):
    plain = read_mixture(written(tmp_path, "sources: {a: text=a, b: text=b}\n"))
    assert plain.phases == (Phase(share=1.0),)
    weighed = read_mixture(written(tmp_path, "sources: {a: text=a, b: text=b}\nweights: {a: 1, b: 30%}\n"))
    assert weighed.phases == (Phase(share=1.0, weights={"a": 1.0, "b": 0.3}),)


def test_two_files_that_say_the_same_in_other_words_resolve_alike_and_others_do_not(tmp_path):
    first = read_mixture(written(tmp_path, MIXTURE)).resolved()
    other_words = MIXTURE.replace("60%", "0.6").replace("c4: c4=data/c4", "c4: {from: c4=data/c4}")
    assert read_mixture(written(tmp_path, other_words)).resolved() == first
    assert read_mixture(written(tmp_path, MIXTURE.replace("50", "51"))).resolved() != first


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("phases:", "phaess:", "unknown key 'phaess'. Did you mean 'phases'"),
        ("optional: true", "optinal: true", "source 'tales': unknown key 'optinal'. Did you mean 'optional'"),
        ("optional: true", "optional: maybe", "source 'tales': optional is 'maybe'; give true or false"),
        ("max_epochs: 4", "max_epochs: -1", "source 'tales': max_epochs is -1; give a number that is not negative"),
        ("max_epochs: 4", "max_epochs: 0", "max_epochs is 0; give a positive number"),
        ("c4: c4=data/c4", "c4: 5", "source 'c4' must hold `key: value` lines, it holds a int"),
        ("c4: c4=data/c4", "c4/x: c4=data/c4", "source 'c4/x': its name becomes a folder's"),
        ("alpaca: alpaca=data/alpaca", "c4: c4=twice", "key 'c4' stands twice"),
        ("{c4: 1}", "{alpaka: 1}", "phase 1: weights names 'alpaka', which is no source. Did you mean 'alpaca'"),
        ("{c4: 1}", "{c4: -1}", "phase 1: weights: c4 is -1; give a number that is not negative"),
        ("{c4: 1}", "{c4: true}", "phase 1: weights: c4 is True; give a number"),
        ("{c4: 1}", "{c4: .nan}", "phase 1: weights: c4 is nan; give a number"),
        ("{c4: 1}", "{c4: .inf}", "phase 1: weights: c4 is inf; give a number"),
        ("{c4: 1}", "{c4: 0}", "phase 1: weights are all 0"),
        ("{c4: 1}", "[1, 2]", r"phase 1: weights is \[1, 2\]; give one number a source"),
        ("share: 60%, weights", "share: 60%, weigths", "phase 1: unknown key 'weigths'. Did you mean 'weights'"),
        ("share: 60%", "share: 50%", "shares of the phases sum to 90 %: they must sum to 100 %"),
        ("share: 60%", "share: 160%", "phase 1: share is '160%'; give more than 0 and at most 100 %"),
        ("share: 60%", "share: 0", "phase 1: share is 0; give more than 0"),
        ("share: 60%", "share: 60%, tokens: 5", "phase 1: give its length as share .* or as tokens: one of the two"),
        ("share: 60%, weights", "weights", "phase 1: give its length as share"),
        ("60%, weights", "60%, ramp_to", "phase 1: ramp_to goes on from the phase before, and this is the first"),
        ("60%, weights", "60%, replay: 5%, weights", "phase 1: replay goes on from the phase before"),
        ("0.2, ramp_to", "0.2, weights: {c4: 1}, ramp_to", "phase 2: both weights and ramp_to"),
        ("replay: 10%", "replay: lots", "phase 2: replay is 'lots'; give a number"),
        ("share: 20%}", "share: 20%, replay: 10%}", "phase 3: replay without weights or ramp_to"),
        ("tokens: 2_000", "tokens: 0.5", "phase 4: tokens is 0.5; give a whole number"),
        ("phases:", "weights: {c4: 1}\nphases:", "both phases and weights"),
        ("phases:", "phases: []\nother:", "unknown key 'other'"),
    ],
)
def test_a_mistake_in_a_mixture_file_is_one_line_that_says_where(old, new, said, tmp_path):
    assert old in MIXTURE
    path = written(tmp_path, MIXTURE.replace(old, new, 1))
    with pytest.raises(UsageError, match=said) as failure:
        read_mixture(path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text", ["", "5", "sources: []", "sources: {}", "sources: {a: text=a}\nphases: 3", "{", "? {a: 1}\n: 2"]
)
def test_what_is_no_mixture_file_is_one_line_too(text, tmp_path):
    with pytest.raises(UsageError) as failure:
        read_mixture(written(tmp_path, text))
    assert str(tmp_path) in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(UsageError, match="Cannot read the mixture .*missing.yaml: No such file"):
        read_mixture(tmp_path / "missing.yaml")


def test_specs_and_weights_make_a_mixture_whose_names_are_unique():
    config = MixtureConfig.of(["text=a", "text=b", "tinytown=5", "text=c"], [1, 2, 3, 4])
    assert list(config.sources) == ["text", "text-2", "tinytown", "text-3"]
    assert config.phases[0].weights == {"text": 1, "text-2": 2, "tinytown": 3, "text-3": 4}
    assert MixtureConfig.of(["text=a"]).phases == (Phase(share=1.0),)


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]]
)
def test_wrong_weights_are_a_usage_error(weights):
    with pytest.raises(
        UsageError, match=rf"{len(weights)} weights .* for 3 sources: give one positive number a source"
    ):
        MixtureConfig.of(["a", "b", "c"], weights)


# The order within a source


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 97, 128, 1009, 4096, 4097, 10_007])
def test_the_order_of_an_epoch_is_a_permutation(size):
    for said in ("0/text/0", "1/text/0", "0/text/1"):
        keys = round_keys(said)
        assert sorted(shuffled(place, size, keys) for place in range(size)) == list(range(size))


def test_the_order_of_an_epoch_looks_shuffled():
    """Fixed points, rises, and the distance of neighbours are what a uniform permutation has (four sigma)."""
    size = 4000
    for said in ("0/text/0", "0/text/1", "7/c4/0"):
        order = np.array([shuffled(place, size, round_keys(said)) for place in range(size)])
        assert (order == np.arange(size)).sum() <= 6
        assert abs((np.diff(order) > 0).mean() - 0.5) < 4 * (1 / 12 / size) ** 0.5 * 1.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / size**0.5
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
        spread = np.histogram2d(np.arange(size), order, bins=8)[0]
        assert ((spread - size / 64) ** 2 / (size / 64)).sum() < 49 + 4 * 98**0.5  # chi squared, 49 degrees of freedom


def test_small_epochs_come_in_every_order():
    orders = {tuple(shuffled(place, 3, round_keys(f"{seed}/a/0")) for place in range(3)) for seed in range(100)}
    assert len(orders) == 6


def test_a_row_of_a_huge_store_is_found_within_a_millisecond():
    keys = round_keys("0/huge/0")
    started = time.perf_counter()
    found = {shuffled(place, 10**9, keys) for place in range(0, 10**9, 10**7)}
    assert len(found) == 100 and (time.perf_counter() - started) / 100 < 0.001


# The rows


class CountingStore:
    """A store whose tokens are the numbers `first`, `first` + 1, ..., so that a row shows where it comes from."""

    def __init__(self, name: str, train: int, validation: int = 0, first: int = 0):
        self.name, self.folder, self.first = name, Path(name), first
        self._tokens = {"train": train, "validation": validation}

    def tokens(self, split: str) -> int:
        return self._tokens[split]

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self._tokens[split]
        return np.arange(self.first + start, self.first + stop)


@pytest.fixture
def stores() -> list[CountingStore]:
    return [CountingStore(f"s{n}", size, first=10_000 * n) for n, size in enumerate((1000, 333, 2050))]


def mixture_of(stores, weights, block_size, rows, seed=0) -> Mixture:
    given = None if weights is None else {store.name: w for store, w in zip(stores, weights, strict=True)}
    config = MixtureConfig({store.name: Source("text") for store in stores}, (Phase(share=1.0, weights=given),))
    return Mixture(stores, Plan(config, windows_of(stores, block_size), rows, block_size), seed)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [1, 1000, 1], [3, 0.001, 8], None])
def test_shares_are_exact_at_every_prefix_within_one_row(weights, stores):
    mixture = mixture_of(stores, weights, block_size=10, rows=3000)
    given = np.array(weights or [100, 33, 205], dtype=float)  # without weights: whole rows of each source
    sources = located(mixture.plan)[:, 0]
    seen = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 3001)[:, None] * (given / given.sum())
    assert np.abs(seen - expected).max() <= 1


def test_a_row_is_a_pure_function_of_its_number(stores):
    first = mixture_of(stores, [5, 2, 3], block_size=16, rows=400, seed=7)
    longer = mixture_of(stores, [5, 2, 3], block_size=16, rows=900, seed=7)
    expected = [first[row]["input_ids"].tolist() for row in range(400)]
    assert [longer[row]["input_ids"].tolist() for row in reversed(range(400))][::-1] == expected
    order = np.random.default_rng(0).permutation(400)
    again = mixture_of(stores[::-1], [3, 2, 5], block_size=16, rows=400, seed=7)
    again.plan.locate(399)
    assert sorted(map(tuple, expected)) == sorted(tuple(again[int(row)]["input_ids"].tolist()) for row in order)


def test_a_row_is_a_window_of_its_source_and_its_labels_are_its_ids(stores):
    mixture = mixture_of(stores, [5, 2, 3], block_size=16, rows=300)
    assert len(mixture) == 300
    for row in range(300):
        source, offset = mixture.locate(row)
        ids, labels = mixture[row]["input_ids"], mixture[row]["labels"]
        first = 10_000 * source + offset
        assert ids.tolist() == list(range(first, first + 16)) == labels.tolist()
        assert offset % 16 == 0 and ids.dtype == labels.dtype == torch.int64
    with pytest.raises(IndexError):
        mixture[300]


def test_every_window_of_a_source_comes_once_in_every_epoch_and_in_another_order(stores):
    mixture = mixture_of(stores, [1, 1, 1], block_size=10, rows=3000)
    for source, windows in enumerate((100, 33, 205)):
        offsets = [offset for s, offset in map(mixture.locate, range(3000)) if s == source]
        assert len(offsets) == 1000
        epochs = [offsets[start : start + windows] for start in range(0, 1000 - windows + 1, windows)]
        assert len(epochs) == 1000 // windows >= 4
        for epoch in epochs:
            assert sorted(epoch) == [10 * window for window in range(windows)]
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_another_seed_gives_another_order_of_the_same_rows(stores):
    first, other = (mixture_of(stores, [5, 2, 3], block_size=10, rows=500, seed=seed) for seed in (0, 1))
    assert (located(first.plan) == located(other.plan)).all()
    differing = sum(first.locate(row) != other.locate(row) for row in range(500))
    assert differing > 400


def test_a_source_added_later_leaves_the_order_within_the_others_alone(stores):
    two = mixture_of(stores[:2], [1, 1], block_size=10, rows=60)
    three = mixture_of(stores[::-1], [1, 1, 1], block_size=10, rows=90)
    for name in ("s0", "s1"):
        before, after = (
            [offset for s, offset in map(mixture.locate, range(len(mixture))) if mixture.stores[s].name == name]
            for mixture in (two, three)
        )
        assert before == after and len(before) == 30


def test_a_source_smaller_than_one_row_is_a_data_error(stores):
    with pytest.raises(DataError, match="s1 has 333 training tokens, less than one row of 500"):
        windows_of(stores, 500)


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 19, 20, 100, 101])
def test_validation_rows_predict_every_token_but_the_first_exactly_once(tokens):
    store = CountingStore("s", 100, validation=tokens, first=500)
    rows = ValidationRows(store, block_size=10)
    predicted, widths = [], []
    for number in range(len(rows)):
        row = rows[number]
        assert row["input_ids"].tolist() == row["labels"].tolist()
        widths.append(len(row["labels"]))
        predicted += row["labels"][1:].tolist()  # the loss shifts: the first label of a row is never asked for
    assert predicted == list(range(501, 500 + tokens))
    assert all(width == 10 for width in widths[:-1]) and 2 <= widths[-1] <= 10


# The recipe


def pretrain_arguments(folder: Path, **more):
    from rorchat.training.pretrain import PretrainArguments

    settings = {"output_dir": str(folder / "run"), "block_size": 16, "global_batch_tokens": 16, "max_steps": 9}
    return PretrainArguments(**settings | {"per_device_train_batch_size": 1, "use_cpu": True} | more)


def test_a_mixture_excludes_sources_and_weights_and_stands_for_them(tmp_path):
    path = str(written(tmp_path, MIXTURE))
    for more in ({"sources": ["text=a"]}, {"weights": [1.0]}):
        with pytest.raises(UsageError, match=f"Both mixture and {next(iter(more))}"):
            pretrain_arguments(tmp_path, mixture=path, **more)
    assert pretrain_arguments(tmp_path, mixture=path).specs() == [
        "c4=data/c4",
        "cosmopedia=data/tales",
        "alpaca=data/alpaca",
    ]
    with pytest.raises(UsageError, match="No sources"):
        pretrain_arguments(tmp_path)


def test_a_run_compares_what_its_mixture_file_says_and_not_its_name(tmp_path):
    from rorchat.training.run import data_fingerprint

    path = written(tmp_path, MIXTURE)
    first = data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path)))
    path.write_text(MIXTURE.replace("50", "51"))
    assert data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path))) != first
    path.write_text(MIXTURE + "# a comment\n")
    assert data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path))) == first


def test_a_difference_between_mixtures_is_said_by_its_place(tmp_path):
    from rorchat.training.run import differences

    before = read_mixture(written(tmp_path, MIXTURE)).resolved()
    now = read_mixture(written(tmp_path, MIXTURE.replace("{c4: 1}", "{c4: 2}"))).resolved()
    assert differences("mixture", before, now) == ["mixture.phases.1.weights.c4 1.0, now 2.0"]
    assert differences("mixture", before, before) == []
    assert differences("a", {"b": [1]}, {"b": [1, 2]}) == ["a.b [1], now [1, 2]"]


def test_an_optional_source_that_fails_is_reported_and_left_out_and_another_stops_the_run(
    tmp_path, monkeypatch, capsys
):
    from rorchat.tokens import mixture

    def prepared(spec, tokenizer, folder, **options):
        if spec == "cosmopedia=data/tales":
            raise DataError("data/tales is not there.")
        return CountingStore(folder.name, 8 if spec.startswith("alpaca") else 100)

    monkeypatch.setattr(mixture, "prepare", prepared)
    optional = MIXTURE.replace("alpaca: alpaca=data/alpaca", "alpaca: {from: alpaca=x, optional: true}")

    def stores(text: str) -> list[str]:
        config = read_mixture(written(tmp_path, text))
        return [store.name for store in mixture.prepare_stores(config, None, tmp_path, 16, validation_share=0.1)]

    assert stores(optional) == ["c4"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "source tales is optional and left out: data/tales is not there."
    assert told[1].startswith("source alpaca is optional and left out: ") and "less than one row of 16" in told[1]
    with pytest.raises(DataError, match="less than one row of 16"):
        stores(MIXTURE)


# Where sources are mixed


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Document {n} says hello {n * 7919 % 1000}."}) + "\n" for n in range(400))
    )
    return path


def split_of(store, split: str, tokenizer) -> set[str]:
    ids = store.slice(split, 0, store.tokens(split)).tolist()
    return set(tokenizer.decode(ids).split("<|endoftext|>")) - {""}


def test_a_store_that_holds_out_another_share_is_not_mixed(texts, tokenizer, tmp_path):
    prepare(f"text={texts}", tokenizer, tmp_path / "small", validation_share=0.05, workers=1)
    prepare(f"text={texts}", tokenizer, tmp_path / "same", validation_share=0.2, workers=1)

    def stores(*specs: str) -> list:
        return prepare_stores(MixtureConfig.of([*specs]), tokenizer, tmp_path / "tokens", 16, validation_share=0.2)

    with pytest.raises(
        MismatchError, match="holds out 0.05 of its documents, this mixture 0.2.*Set validation_share to"
    ):
        stores(f"store={tmp_path / 'small'}", f"text={texts}")
    first, second = stores(f"store={tmp_path / 'same'}", f"text={texts}")
    held_out = split_of(second, "validation", tokenizer)
    assert len(held_out) > 40 and not held_out & split_of(first, "train", tokenizer)
    assert len(stores(f"store={tmp_path / 'small'}")) == 1  # alone it agrees with itself


def test_a_store_that_was_tokenized_elsewhere_is_mixed_with_a_word_of_warning(texts, tokenizer, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    ids = tokenizer("<|endoftext|>Somebody else said this, and more than this, and then went home to sleep.")[
        "input_ids"
    ]
    for name in ("train", "val"):
        np.save(shards / f"{name}.npy", np.array(ids * 3, dtype=np.uint16))
    adopt(shards, tokenizer, tmp_path / "theirs")
    config = MixtureConfig.of([f"store={tmp_path / 'theirs'}", f"text={texts}"])
    assert len(prepare_stores(config, tokenizer, tmp_path / "tokens", 16, validation_share=0.2)) == 2
    assert f"{tmp_path / 'theirs'} was tokenized elsewhere: what other sources hold out may" in capsys.readouterr().err
    prepare_stores(MixtureConfig.of([config.sources["store"].spec]), tokenizer, tmp_path, 16, validation_share=0.2)
    assert capsys.readouterr().err == ""


RANK = """
import sys
from pathlib import Path
from torch import distributed
from rorchat.errors import RemoteError
from rorchat.tokenizer import load_tokenizer
from rorchat.tokens import mixture
from rorchat.tokens.phases import MixtureConfig, Source
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
prepare = mixture.prepare
def flaky(spec, *arguments, **options):
    if rank == FAILING and "other" in spec:
        raise RemoteError("timeout")
    return prepare(spec, *arguments, **options)
mixture.prepare = flaky
names = {"texts": Source(f"text={folder}/texts.jsonl"), "other": Source(f"text={folder}/other.jsonl", optional=True)}
class InTurn:
    def __enter__(self):
        if rank: distributed.barrier()
    def __exit__(self, *_):
        if not rank: distributed.barrier()
tokenizer = load_tokenizer(str(folder / "tokenizer"))
stores = mixture.prepare_stores(
    MixtureConfig(names, ()), tokenizer, folder / "tokens", 16, validation_share=0.2, first=InTurn
)
print("STORES", [store.name for store in stores])
"""


@pytest.mark.parametrize("failing", [0, 1, None])
def test_an_optional_source_that_fails_in_one_process_is_left_out_in_all(failing, texts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "other.jsonl").write_text(texts.read_text())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("FAILING", str(failing)), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    names = "['texts']" if failing is not None else "['texts', 'other']"
    assert [out.partition("STORES ")[2].strip() for out, _ in said] == [names] * 2
    assert [err.count("source other is optional and left out") > 0 for _, err in said] == [failing is not None, False]
