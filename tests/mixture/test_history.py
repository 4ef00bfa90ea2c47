"""An appended mixture keeps all earlier rows, follows its budgets, and loses no row."""

import json
import time

import numpy as np
import pytest
from mixture_support import MAX_DEVIATION, config_of, random_plan, random_weights
from support import locate_rows

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.mixture.history import build_plan, require_same_data
from rorchat.mixture.interleave import UNIT
from rorchat.mixture.mixture_file import MixtureConfig, Phase, Source, read_mixture
from rorchat.mixture.plan import Plan
from rorchat.reading.filters import Filters

PLANS = 60
SOURCE_ROWS = {"s0": 50, "s1": 50, "s2": 50}


def appended(previous: Plan, number: int) -> Plan:
    """Appends a random mixture at a random row of a plan: some sources continue, some are removed, some are new."""
    rng = np.random.default_rng(10_000 + number)
    kept = [name for name in previous.names if name == "s0" or rng.random() < 0.6]
    names = [*kept, *(f"n{number}-{n}" for n in range(rng.integers(0, 3)))]
    rows_per_epoch = {name: int(rng.integers(20, 200)) for name in names}
    rows_per_epoch |= {name: previous.rows_per_epoch[previous.names.index(name)] for name in kept}
    start = int(rng.integers(previous.start + 1, (previous.start + previous.rows) // 2))
    ends_on = [
        previous.names[source]
        for source, share in enumerate(previous.phases_until(start, len(previous.names))[-1].ends_with)
        if share
    ]
    phases = []
    for phase, share in enumerate(rng.dirichlet(np.full(rng.integers(1, 4), 3.0)).tolist()):
        before = phase > 0 or any(name in kept for name in ends_on)
        weights = random_weights(rng, names) | {"s0": float(rng.random()) + 0.01}
        kind = "ramp_to" if before and rng.random() < 0.5 else "weights"
        replay = float(rng.random()) if before and rng.random() < 0.3 else 0.0
        phases.append(Phase(share=max(share, 0.1), replay=replay, **{kind: weights}))
    total = sum(phase.share for phase in phases)
    phases = [Phase(phase.share / total, None, phase.weights, phase.ramp_to, phase.replay) for phase in phases]
    caps = {name: float(rng.integers(1, 5)) if rng.random() < 0.2 and name != "s0" else None for name in names}
    config = MixtureConfig({name: Source(name, max_epochs=caps[name]) for name in names}, tuple(phases))
    return Plan(config, rows_per_epoch, previous.rows, previous.block_size, previous, start)


def largest_deviation(plan: Plan, sources: np.ndarray) -> float:
    """The largest deviation of a source from its budget after `plan.start`, computed row by row."""
    shares = np.zeros((plan.rows - plan.start, len(plan.names)))
    for segment in (segment for phase in plan.phases for segment in phase.segments if segment.start >= plan.start):
        first, last = (np.array(end) / UNIT for end in (segment.first, segment.last))
        middle = (np.arange(segment.rows) + 0.5)[:, None] / segment.rows
        shares[segment.start - plan.start : segment.end - plan.start] = first + middle * (last - first)
    seen = np.cumsum(sources[plan.start :, None] == np.arange(len(plan.names)), axis=0)
    return float(np.abs(seen - np.cumsum(shares, axis=0)).max())


def test_an_appended_mixture_keeps_earlier_rows_and_loses_none():
    capped = 0
    for number in range(PLANS):
        plan = random_plan(number)
        for part in range(1 + number % 3):
            previous, plan = plan, appended(plan, 7 * number + part)
            rows_of_plan = locate_rows(plan)
            assert (rows_of_plan[: plan.start] == locate_rows(previous)[: plan.start]).all(), number
            counts = [0] * len(plan.names)
            for source, count in rows_of_plan:
                assert counts[source] == count, (number, part)  # consecutive across the start of the new plan
                counts[source] += 1
            for rows in (0, 1, plan.start - 1, plan.start, plan.start + 1, plan.rows):
                for source in range(len(plan.names)):
                    assert plan.count(source, rows) == (rows_of_plan[:rows, 0] == source).sum(), (number, part, rows)
            worst = largest_deviation(plan, rows_of_plan[:, 0])
            assert worst <= (1 if len(plan.active) <= 4 else MAX_DEVIATION) + 1e-9, (number, part, worst)
            off = [abs(count - plan.budget(source, plan.rows)) for source, count in enumerate(counts)]
            assert max(off) <= plan.bound + 1e-6
            active = {plan.names[source] for source in set(rows_of_plan[plan.start :, 0].tolist())}
            assert active <= set(plan.config.sources)
            for name, rows_per_epoch, count in zip(plan.names, plan.rows_per_epoch, counts, strict=True):
                cap = plan.config.sources[name].max_epochs if name in plan.config.sources else None
                before = previous.count(previous.names.index(name), plan.start) if name in previous.names else 0
                assert cap is None or count <= max(before, cap * rows_per_epoch), (number, part, name)
                capped += cap is not None and count > before > 0
            assert [phase.end for phase in plan.phases[:-1]] == [phase.start for phase in plan.phases[1:]]
    assert capped > 3


def test_phases_divide_the_remaining_rows():
    previous = Plan(config_of(Phase(share=1.0, weights={"s0": 1})), SOURCE_ROWS, 100, 16)
    phases = (Phase(share=0.5, weights={"s1": 1}), Phase(tokens=320, weights={"s2": 1}), Phase(share=0.5))
    plan = Plan(config_of(*phases), SOURCE_ROWS, 100, 16, previous, 40)
    assert [(phase.start, phase.end, phase.is_new) for phase in plan.phases] == [
        (0, 40, False), (40, 60, True), (60, 80, True), (80, 100, True),
    ]  # fmt: skip
    with pytest.raises(UsageError, match="tokens sum to 1,600, the run has 960 left: give less"):
        Plan(config_of(Phase(tokens=1600)), SOURCE_ROWS, 100, 16, previous, 40)
    with pytest.raises(UsageError, match="phase 1 is shorter than one row of 16 tokens .all phases have 960"):
        Plan(config_of(Phase(tokens=3), Phase(share=1.0)), SOURCE_ROWS, 100, 16, previous, 40)


def test_a_first_phase_continues_from_the_row_where_the_previous_plan_ends():
    ramp = config_of(Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, ramp_to={"s1": 1}))
    previous = Plan(ramp, {"s0": 900, "s1": 900, "s2": 900}, 1000, 16)
    for phase, at_start in (
        (Phase(share=1.0, ramp_to={"s2": 1}), [0.5, 0.5, 0]),
        (Phase(share=1.0, weights={"s2": 1}, replay=0.4), [0.2, 0.2, 0.6]),
    ):
        plan = Plan(config_of(phase), {"s0": 900, "s1": 900, "s2": 900}, 1000, 16, previous, 750)
        first = plan.summary()["phases"][2]["sources"]
        assert [part["share_at_start"] for part in first] == pytest.approx(at_start)
    with pytest.raises(UsageError, match="phase 1: ramp_to needs a previous phase, but this is the first"):
        Plan(config_of(Phase(share=1.0, ramp_to={"s2": 1})), SOURCE_ROWS, 100, 16)


def test_a_ramp_starts_without_removed_sources():
    previous = Plan(config_of(Phase(share=1.0, weights={"s0": 2, "s1": 1, "s2": 1})), SOURCE_ROWS, 100, 16)
    sources = {"s1": Source("text=s1"), "s2": Source("text=s2"), "new": Source("text=new")}
    config = MixtureConfig(sources, (Phase(share=1.0, ramp_to={"new": 1}),))
    plan = Plan(config, {"s1": 50, "s2": 50, "new": 70}, 100, 16, previous, 60)
    assert plan.names == ["s0", "s1", "s2", "new"] and plan.rows_per_epoch == [50, 50, 50, 70]
    assert [share / UNIT for share in plan.phases[1].starts_with] == pytest.approx([0, 0.5, 0.5, 0])
    assert plan.count(0, 100) == 30 and plan.phases[1].jump == pytest.approx(0.5)
    replaced = MixtureConfig({"new": Source("text=new")}, (Phase(share=1.0, ramp_to={"new": 1}),))
    with pytest.raises(UsageError, match="of s0, s1, s2, but uses none of its sources: keep one of them"):
        Plan(replaced, {"new": 70}, 100, 16, previous, 60)


def test_a_new_first_phase_without_weights_mixes_by_size():
    previous = Plan(config_of(Phase(share=1.0, weights={"s0": 1})), SOURCE_ROWS, 1000, 16)
    config = MixtureConfig({"s1": Source("text=s1"), "new": Source("text=new")})
    plan = Plan(config, {"s1": 50, "new": 150}, 1000, 16, previous, 200)
    assert [plan.count(source, 1000) for source in range(4)] == [200, 200, 0, 600]


def test_epochs_and_limits_include_the_previous_plan():
    previous = Plan(config_of(Phase(share=1.0, weights={"s0": 1, "s1": 1})), SOURCE_ROWS, 1000, 16)
    config = config_of(Phase(share=1.0, weights={"s0": 1, "s1": 1}), s0={"max_epochs": 3})
    plan = Plan(config, SOURCE_ROWS, 1000, 16, previous, 200)  # 100 rows of each: two epochs
    assert 148 <= plan.count(0, 1000) <= 150
    assert plan.totals()[0]["epochs"] == plan.count(0, 1000) / 50
    assert [part["epochs"] for part in plan.summary()["phases"][0]["sources"]] == [2, 2, 0]
    assert "s0 reaches max_epochs 3 in phase 2" in plan.notices[0]
    used_up = config_of(Phase(share=1.0, weights={"s0": 1, "s1": 1}), s0={"max_epochs": 2})
    assert Plan(used_up, SOURCE_ROWS, 1000, 16, previous, 200).count(0, 1000) == 100
    unused = config_of(Phase(share=1.0, weights={"s1": 1}), s0={"max_epochs": 1})
    assert not Plan(unused, SOURCE_ROWS, 1000, 16, previous, 200).notices  # an unused source gives no notice
    with pytest.raises(DataError, match=r"phase 1 has no source left after 3,\d+ of 16,000 tokens: s0 \(max_epochs 2"):
        Plan(config_of(Phase(share=1.0, weights={"s0": 1}), s0={"max_epochs": 2}), SOURCE_ROWS, 1000, 16, previous, 200)


def test_notices_of_the_previous_plan_about_later_rows_are_dropped():
    config = config_of(Phase(share=1.0, weights={"s0": 1, "s1": 1}), s0={"max_epochs": 1}, s1={"max_epochs": 18})
    previous = Plan(config, SOURCE_ROWS, 900, 16)
    assert len(previous.notices) == 1
    plans = [Plan(config_of(Phase(share=1.0)), SOURCE_ROWS, 900, 16, previous, start) for start in (50, 300)]
    assert [len(plan.notices) for plan in plans] == [0, 1]


def test_the_description_marks_new_phases():
    halves = config_of(Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, weights={"s1": 1}))
    previous = Plan(halves, SOURCE_ROWS, 1000, 16)
    plan = Plan(config_of(Phase(share=1.0, weights={"s1": 1, "s2": 1})), SOURCE_ROWS, 1000, 16, previous, 600)
    lines = [" ".join(line.split()) for line in plan.describe().splitlines()]
    assert lines[0] == "mixture: 16,000 tokens to train on, in 1,000 rows of 16 tokens"
    assert [line for line in lines if line.startswith("phase")] == [
        "phase 1: 8,000 tokens, rows 0 to 499",
        "phase 2: 1,600 tokens, rows 500 to 599",
        "phase 3, new phase: 6,400 tokens, rows 600 to 999",
    ]
    assert "s1 3,200 tokens 50.0 % read 6.00 times by then" in lines
    summary = json.loads(json.dumps(plan.summary()))
    assert [part["tokens"] for part in summary["sources"]] == [8000, 4800, 3200]
    for index, part in enumerate(summary["sources"]):
        assert sum(phase["sources"][index]["tokens"] for phase in summary["phases"]) == part["tokens"]


def test_the_picture_of_an_appended_plan_is_drawn(tmp_path):
    appended(random_plan(6), 6).draw(tmp_path / "mixture.png")
    assert (tmp_path / "mixture.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_after_two_appended_mixtures_is_found_in_a_millisecond():
    rows_per_epoch, rows = {f"s{number}": 10**8 for number in range(4)}, 10**9
    plan = None
    for start in (0, 3 * 10**8, 7 * 10**8):
        phases = (Phase(share=0.5, weights={"s0": 1}), Phase(share=0.5, ramp_to={"s1": 5, "s2": 3, "s3": 2}))
        plan = Plan(config_of(*phases, sources=4), rows_per_epoch, rows, 1024, plan, start)
    seconds = []
    for row in np.random.default_rng(0).integers(0, rows, 40).tolist():
        started = time.perf_counter()
        source, number = plan.locate(row)
        seconds.append(time.perf_counter() - started)
        assert plan.count(source, row) == number and plan.count(source, row + 1) == number + 1
    assert sorted(seconds)[20] < 0.001
    assert sum(plan.count(source, rows) for source in range(4)) == rows


def test_from_dict_restores_a_mixture(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(
        "sources: {a: {from: text=a, max_epochs: 2, optional: true, filters: {min_characters: 5}}, b: text=b}\n"
        "against: [eval.jsonl]\n"
        "phases: [{tokens: 100, ramp_to: {a: 1}, replay: 5%}, {share: 100%, weights: {b: 0.1}}]\n"
    )
    with pytest.raises(UsageError, match="phase 1: ramp_to needs a previous phase"):
        read_mixture(path)
    config = read_mixture(path, is_continuation=True)
    restored = MixtureConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (restored.sources, restored.phases, restored.against) == (config.sources, config.phases, config.against)


def history_entry(config: MixtureConfig, digests: dict[str, str], until: int = 40) -> dict:
    mixture = json.loads(json.dumps(config.to_dict()))
    return {"until": until, "mixture": mixture, "sources": digests, "windows": SOURCE_ROWS, "data": []}


def test_a_plan_is_rebuilt_from_the_mixture_history():
    first, second = config_of(Phase(share=1.0, weights={"s0": 1})), config_of(Phase(share=1.0, ramp_to={"s1": 1}))
    third = config_of(Phase(share=1.0, weights={"s2": 1}, replay=0.5))
    kept = json.loads(json.dumps([history_entry(first, {}), history_entry(second, {}, until=70)]))
    plan = build_plan(kept, third, SOURCE_ROWS, 100, 16)
    previous = Plan(second, SOURCE_ROWS, 100, 16, Plan(first, SOURCE_ROWS, 100, 16), 40)
    assert (locate_rows(plan) == locate_rows(Plan(third, SOURCE_ROWS, 100, 16, previous, 70))).all()
    with pytest.raises(MismatchError, match="Source 's1' had 50 rows up to row 40 and now has 51: .* another name"):
        build_plan(kept, third, SOURCE_ROWS | {"s1": 51}, 100, 16)
    assert build_plan([], first, SOURCE_ROWS, 100, 16).count(0, 100) == 100


def test_a_source_that_continues_must_have_the_same_data():
    config = MixtureConfig({"a": Source("text=a"), "b": Source("store=b")})
    history = [
        history_entry(config, {"text=a": "1", "store=b": "2"}),
        history_entry(MixtureConfig({"c": Source("text=c")}), {"text=c": "3"}),
    ]

    def check(sources: dict, digests: dict, against: tuple = ()) -> None:
        require_same_data(history, history_entry(MixtureConfig(sources, against=against), digests))

    check(config.sources, {"text=a": "", "store=b": "2"})
    check({"b": Source("store=elsewhere"), "d": Source("text=a")}, {"store=elsewhere": "2", "text=a": "5"})
    check({"a": Source("text=elsewhere")}, {"text=elsewhere": "1"})
    for name, sources, digests, against in (
        ("a", config.sources, {"text=a": "9", "store=b": "2"}, ()),
        ("a", {"a": Source("prose=a")}, {"prose=a": "1"}, ()),
        ("a", {"a": Source("text=a", filters=Filters(min_characters=3))}, {"text=a": "1"}, ()),
        ("a", {"a": Source("text=a")}, {"text=a": "1"}, ("eval.jsonl",)),
        ("b", config.sources, {"text=a": "1", "store=b": "9"}, ()),
        ("c", {"c": Source("text=c")}, {"text=c": "9"}, ()),
    ):
        with pytest.raises(MismatchError, match=f"Source '{name}' was .* Give it another name") as failure:
            check(sources, digests, against)
        assert "\n" not in str(failure.value)
