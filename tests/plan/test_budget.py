"""Plans spend their budget, and impossible requests are refused with a remedy."""

import math
import re
from functools import partial

import pytest
from plan_support import make_test_plan, within

from rorchat.errors import UsageError
from rorchat.plan.budget import Plan, iterate_plans
from rorchat.plan.cost import OUTSIDE_STEPS
from rorchat.plan.scaling import FITS, format_size, list_shapes
from rorchat.plan.show import build_rows, compute_isoflop_curve, list_assumptions


@pytest.mark.parametrize("fit", FITS)
def test_320_petaflops_choose_51m_parameters_and_1_1b_tokens(fit):
    plan = make_test_plan("V100", flops=3.2e17, fit=fit, vocabulary=50_257, block_size=64)
    assert within(1.3, plan.parameters, 50.9e6), plan.size
    assert within(1.3, plan.tokens, 1.1e9)
    if fit == "chinchilla":  # the constants that its author had
        assert plan.size == "51m"


@pytest.mark.parametrize("budget", [{"hours": 10}, {"money": 50}, {"flops": 1e20}], ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("size", [None, "124m"])
def test_a_plan_spends_its_budget_and_no_more(budget, size):
    plan = make_test_plan("A100-80", gpus=4, size=size, **budget)
    ((name, allowed),) = budget.items()
    assert 0.98 * allowed < getattr(plan, name) <= allowed * (1 + 1e-9)
    assert plan.money == pytest.approx(plan.hours * 4 * 1.79)
    assert plan.hours * 3600 == pytest.approx(plan.tokens * plan.seconds_per_token * (1 + OUTSIDE_STEPS))
    assert plan.micro_batch * plan.accumulation * 4 * 1024 == plan.global_batch_tokens
    assert plan.tokens == plan.steps * plan.global_batch_tokens
    if not size:
        larger = make_test_plan("A100-80", gpus=4, **{name: 10 * allowed})
        assert larger.parameters > plan.parameters and larger.tokens > plan.tokens and larger.loss < plan.loss


def test_an_mfu_replaces_the_assumed_speed():
    plan = make_test_plan("H100", hours=1, size="124m", mfu=0.5)
    assert plan.mfu == pytest.approx(0.5)
    assert 1 / plan.seconds_per_token == pytest.approx(0.5 * 989e12 / plan.setup.flops(plan.shape))
    assert "MFU 0.5, from --mfu" in "".join(list_assumptions(plan))


def test_short_runs_have_smaller_batches():
    assert make_test_plan("A100-80", size="51m", tokens=1e10).global_batch_tokens == 524_288
    short = make_test_plan("A100-80", size="51m", tokens=1e8)
    assert short.global_batch_tokens == 32_768 and short.steps >= 2_000


def test_tokens_with_a_budget_give_the_largest_affordable_model():
    plan = make_test_plan("A100-80", hours=24, tokens=5e9)
    larger = list_shapes()[list_shapes().index(plan.shape) + 1]
    with pytest.raises(UsageError, match=f"the largest model that fits them is {plan.size}"):
        make_test_plan("A100-80", hours=24, tokens=5e9, size=format_size(larger))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "No budget: give --money DOLLARS, --hours H or --flops F, or --size with --tokens"),
        ({"tokens": 1e9}, "No budget"),
        ({"size": "124m"}, "No budget"),
        ({"hours": 1, "money": 1}, "--money and --hours are two budgets"),
        ({"hours": 0}, "--hours is 0: give a positive, finite number"),
        ({"hours": -1}, "--hours is -1"),
        ({"hours": math.nan}, "--hours is nan"),
        ({"flops": math.inf}, "--flops is inf"),
        ({"hours": 1, "gpus": 0}, "--gpus is 0"),
        ({"hours": 1, "mfu": 1.2}, "--mfu is 1.2: give a share above 0, at most 1"),
        ({"hours": 1, "block_size": 1}, "--block_size is 1"),
        ({"hours": 1, "optimizer": "adam"}, "--optimizer 'adam'. Did you mean 'adamw'?"),
        ({"hours": 1, "fit": "chinchila"}, "Did you mean 'chinchilla'?"),
        ({"hours": 1, "kernels": "flash"}, "Available: eager, compiled, manual"),
        ({"hours": 1, "precision": "bf16"}, "T4 has no peak for bf16"),
        ({"hours": 1, "size": "123m"}, "Did you mean '124m'?"),
        ({"hours": 1, "size": "124m", "global_batch_tokens": 100_000}, "nearest multiples are 99,328 and 100,352"),
        ({"hours": 9, "size": "124m", "micro_batch": 128, "global_batch_tokens": 131_072}, "at most 32 does"),
        ({"hours": 9, "size": "124m", "micro_batch": 3, "global_batch_tokens": 131_072}, "not divide the 128 rows"),
        ({"hours": 1e-4}, "tokens: too few. Give a larger budget"),
        ({"hours": 1e-3, "size": "355m"}, "tokens: too few. Give a larger budget"),
        (
            {"hours": 48, "kernels": "eager", "size": "124m", "tokens": 1e10},
            r"124m on 10,000,000,000 tokens needs 8.55e\+18 FLOPs, \d+ hours \(\$[\d.]+\); 48 hours on one T4 pays for "
            r"2[.\d]+e\+09 tokens of it, and the largest model that fits them is 4x4x256",
        ),
        ({"hours": 1e4, "size": "1.5b"}, r"1.5b needs 26.7 GB .* T4 has 16.0 GB. Neither .* that fits now is 774m"),
        (
            {"hours": 1e4, "size": "774m", "optimizer": "adamw"},
            "with --optimizer adamw_8bit; the largest that fits now is 33x",
        ),
    ],
)  # fmt: skip
def test_an_impossible_request_is_refused_with_a_remedy(settings, message):
    with pytest.raises(UsageError) as refused:
        make_test_plan("T4", **settings)
    line = str(refused.value)
    assert message in line or re.search(message, line), line
    assert "\n" not in line


def test_a_note_names_the_model_that_memory_excludes():
    plan = make_test_plan("T4", hours=20_000, optimizer="adamw")
    assert sum(plan.memory.values()) <= 0.95 * 16e9
    assert "774m does not fit into T4's memory (it would with --optimizer adamw_8bit)" in plan.notes[0]


def test_a_note_names_a_much_better_size():
    planned_with = partial(make_test_plan, "H100", money=1, global_batch_tokens=32_768)
    plan, best = planned_with(size="1.5b"), planned_with()
    assert f"{best.size} on {best.tokens:,} tokens would reach a loss of {best.loss:.2f}" in plan.notes[-1]
    assert plan.loss > best.loss + 1
    assert not any("would reach" in note for note in best.notes)
    assert not any("would reach" in note for note in planned_with(size=best.size).notes)


@pytest.mark.parametrize("size", [None, "124m"])
def test_a_requested_micro_batch_is_kept(size):
    plan = make_test_plan("A100-80", hours=24, micro_batch=64, size=size)
    assert plan.micro_batch == 64 and sum(plan.memory.values()) <= 0.95 * 80e9


def test_a_note_names_a_limiting_micro_batch():
    plan = make_test_plan("A100-80", hours=2_000, micro_batch=64)
    assert "--micro_batch 64 of" in plan.notes[0] and "at most 32 does" in plan.notes[0]


def test_several_cpus_and_unknown_prices_are_refused():
    with pytest.raises(UsageError, match="--gpus is 2 on a CPU"):
        make_test_plan("cpu", hours=1, gpus=2)
    with pytest.raises(UsageError, match="cpu has no price: give --dollars_per_hour, or name a device"):
        make_test_plan("cpu", money=1, mfu=0.5, size="demo")


def test_the_predicted_loss_is_never_above_that_of_a_random_guess():
    plan = make_test_plan("T4", hours=0.01, vocabulary=768, block_size=128)
    guess = math.log(768)
    assert plan.loss == guess < plan.fitted_loss
    assert "does not reach this run" in plan.notes[0] and f"its {plan.fitted_loss:.1f} nats/token" in plan.notes[0]
    row = next(row for row in build_rows(plan) if row[0].startswith("loss"))
    assert row[1:] == ["6.644 nats/token", "ln V, a random guess: the fit does not reach here"]
    assert max(loss for _, loss in compute_isoflop_curve(plan, plan.flops)) == guess
    # the size is still chosen by the fit: of all that the budget pays for, the one with the lowest loss
    others = [other for other in iterate_plans(plan.request) if isinstance(other, Plan)]
    assert len(others) > 2 and plan.fitted_loss == min(other.fitted_loss for other in others)
    assert make_test_plan("A100-80", hours=24).loss < math.log(50_304)
