"""`rorchat plan`: others' runs come out of their budgets, memory is what a step takes, no budget buys too much."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import yaml
from support import command

from rorchat.device import find_device
from rorchat.errors import UsageError
from rorchat.model import SIZES, build_model, count_parameters, count_scaling_parameters, flops_per_token, parse_shape
from rorchat.plan.budget import Plan, Request, choices, make_plan
from rorchat.plan.cost import CONTEXT_BYTES, OUTSIDE_STEPS, Setup, memory, seconds_per_token, total
from rorchat.plan.probe import Probe
from rorchat.plan.scaling import FITS, family, size_name
from rorchat.plan.show import BUDGETS, _curve, amount, as_yaml, assumptions, draw, duration


def planned(device: str, **wanted) -> Plan:
    return make_plan(Request(device=find_device(device), **wanted))


def within(factor: float, value: float, target: float) -> bool:
    return target / factor <= value <= target * factor


# --- FLOPs and parameters


def test_the_flops_of_a_token_are_those_of_nanogpt():
    assert flops_per_token(parse_shape("124m"), 50_257, 1024) == pytest.approx(854.4e6, rel=1e-4)


@pytest.mark.parametrize("size", ["demo", "3x2x64"])
def test_parameters_are_counted_as_the_model_has_them(size, tokenizer):
    model = build_model(size, tokenizer, n_positions=64)
    assert count_parameters(parse_shape(size), len(tokenizer), 64) == model.num_parameters()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "wpe" not in name]
    assert count_scaling_parameters(parse_shape(size), len(tokenizer)) == sum(p.numel() for p in matrices)


# --- the fits


def test_the_named_sizes_belong_to_the_family_and_it_grows():
    shapes = family()
    assert [size_name(shape) for shape in shapes if shape in SIZES.values()] == [
        "51m", "124m", "355m", "774m", "1.5b",
    ]  # fmt: skip
    counts = [count_scaling_parameters(shape, 50_304) for shape in shapes]
    assert counts == sorted(counts) and all(b / a < 1.7 for a, b in zip(counts, counts[1:], strict=False))
    assert {shape.n_embd // shape.n_head for shape in shapes} == {64}


def test_the_published_fit_gives_chinchilla_itself():
    """70B parameters on 1.4T tokens: 1.94 nats by the published constants (Hoffmann et al. 2022, table A3: 1.936)."""
    assert FITS["chinchilla"].loss(70e9, 1.4e12) == pytest.approx(1.937, abs=2e-3)


@pytest.mark.parametrize(("fit", "tokens_per_parameter"), [("chinchilla", (50, 110)), ("epoch", (15, 30))])
def test_only_the_corrected_fit_takes_twenty_tokens_a_parameter_at_chinchillas_budget(fit, tokens_per_parameter):
    """Besiroglu et al. 2024, figure 5: the published constants contradict the 20 that the authors used."""
    flops = 5.76e23
    best = min(
        (10**exponent for exponent in (9 + k / 100 for k in range(300))), key=lambda n: FITS[fit].loss(n, flops / 6 / n)
    )
    assert tokens_per_parameter[0] < flops / 6 / best / best < tokens_per_parameter[1]


@pytest.mark.parametrize("fit", FITS)
def test_the_choice_has_the_lowest_loss_of_the_family_on_the_real_flops(fit):
    plan = planned("A100-80", flops=1e19, fit=fit)
    curve = _curve(plan, 1e19)
    assert len(curve) == len(family())
    assert min(curve, key=lambda point: point[1])[0] == plan.parameters
    assert plan.flops == pytest.approx(1e19, rel=1e-3)
    assert plan.loss == pytest.approx(min(loss for _, loss in curve), rel=1e-3)


# --- what others achieved


@pytest.mark.parametrize("fit", FITS)
def test_320_petaflops_choose_51_million_parameters_and_1_1_billion_tokens(fit):
    plan = planned("V100", flops=3.2e17, fit=fit, vocabulary=50_257, block_size=64)
    assert within(1.3, plan.parameters, 50.9e6), plan.size
    assert within(1.3, plan.tokens, 1.1e9)
    if fit == "chinchilla":  # the constants that its author had
        assert plan.size == "51m"


def test_74_million_sentences_padded_to_64_tokens_take_a_v100_less_than_a_day():
    """The seed says no more than that. Filled rows hold the same 1.1 billion tokens in a quarter of the positions."""
    as_it_was = {"size": "51m", "vocabulary": 50_257, "block_size": 64, "optimizer": "adamw", "micro_batch": 256,
                 "global_batch_tokens": 16_384, "kernels": "eager"}  # fmt: skip
    padded = planned("V100", tokens=74e6 * 64, **as_it_was)
    assert 8 < padded.hours < 24
    filled = planned("V100", tokens=1.1e9, **as_it_was)
    assert filled.hours == pytest.approx(padded.hours * 1.1e9 / (74e6 * 64), rel=1e-3)


def test_124m_on_10_billion_tokens_on_8_a100_takes_three_and_a_half_hours():
    plan = planned("A100-80", gpus=8, size="124m", tokens=1e10, optimizer="adamw", micro_batch=64, kernels="eager")
    assert within(1.3, plan.hours, 3.5)
    assert within(1.3, 1 / plan.seconds_per_token, 944_000)
    assert plan.accumulation == 1


def test_a_t4_with_manual_attention_reads_8400_tokens_a_second_in_14_8_gb():
    plan = planned(
        "T4", size="124m", tokens=1e9, vocabulary=50_257, optimizer="adamw_8bit", kernels="manual", micro_batch=6,
        global_batch_tokens=129_024,
    )  # fmt: skip
    assert plan.accumulation == 21 and plan.setup.precision == "fp16"
    assert within(1.3, 1 / plan.seconds_per_token, 8_400)
    assert within(1.1, total(plan.memory), 14.8e9)
    fused = planned("T4", size="124m", tokens=1e9, optimizer="adamw_8bit")
    assert plan.seconds_per_token > 1.7 * fused.seconds_per_token


@pytest.mark.parametrize(
    ("device", "gpus", "kernels", "micro_batch", "tokens_per_second"),
    [
        ("A100-40", 1, "manual", 16, 16_384 / 0.300),
        ("A100-40", 1, "compiled", 16, 16_384 / 0.096),
        ("A100-80", 8, "compiled", 64, 524_288 / 0.300),
        ("H100", 8, "compiled", 64, 524_288 / 0.140),
    ],
    ids=["build-nanogpt, bf16", "build-nanogpt, compile and flash", "llm.c on A100", "llm.c on H100"],
)
def test_the_same_assumptions_give_other_peoples_speeds(device, gpus, kernels, micro_batch, tokens_per_second):
    plan = planned(
        device, gpus=gpus, size="124m", tokens=1e10, vocabulary=50_257, kernels=kernels, micro_batch=micro_batch,
        optimizer="adamw",
    )  # fmt: skip
    assert within(1.3, 1 / plan.seconds_per_token, tokens_per_second)


# --- memory

MEASURE = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from rorchat.device import find_device
from rorchat.plan.budget import Request, make_plan
from rorchat.plan.probe import _step
def plan_of(wanted):
    return make_plan(Request(device=find_device("cpu"), precision="fp32", tokens=1e9, **wanted))
def resident(name):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(name))
def train(plan):
    micro_step, update = _step(plan, plan.micro_batch)
    for work in (micro_step, micro_step, update) * 5:
        work()
# loads what a step needs
train(plan_of({"size": "2x2x128", "vocabulary": 512, "block_size": 32, "micro_batch": 1, "optimizer": "adamw"}))
before = resident("VmRSS")
train(plan_of(json.loads(sys.argv[1])))
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
    ("wanted", "optimizer"),
    [
        ({"size": "6x6x384", "vocabulary": 8192, "block_size": 256, "micro_batch": 8}, "adamw"),
        ({"size": "4x4x256", "vocabulary": 50_304, "block_size": 256, "micro_batch": 4}, "muon"),
    ],
    ids=["mostly activations", "mostly logits"],
)
def test_the_memory_of_a_step_is_what_was_planned(wanted, optimizer):
    """Peak resident memory of five real steps of two passes in fp32, less what the process held before, within a fifth.

    As in training, the C library keeps what a step frees: `_step` sees to it.
    """
    wanted = wanted | {"optimizer": optimizer}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plan = planned("cpu", precision="fp32", tokens=1e9, **wanted)
    assert within(1.2, total(plan.memory) - CONTEXT_BYTES[True], float(done.stdout)), (plan.memory, done.stdout)


def test_memory_falls_with_what_is_said_to_lower_it():
    setup = Setup(find_device("A100-80"), 1, "bf16", 50_304, 1024)
    shape = parse_shape("355m")
    plain = memory(setup, shape, 8)
    assert memory(replace(setup, optimizer="adamw_8bit"), shape, 8)["optimizer"] < 0.5 * plain["optimizer"]
    assert plain["optimizer"] > memory(replace(setup, optimizer="muon"), shape, 8)["optimizer"]
    assert memory(replace(setup, gradient_checkpointing=True), shape, 8)["activations"] < 0.25 * plain["activations"]
    assert memory(setup, shape, 4)["activations"] == plain["activations"] / 2
    exact = replace(setup, precision="fp32")
    assert memory(exact, shape, 8)["activations"] > 1.4 * plain["activations"]
    compiled = memory(replace(exact, kernels="compiled"), shape, 8)["activations"]  # not computed again by us
    assert memory(exact, shape, 8)["activations"] < 0.7 * compiled
    assert set(plain) == {"weights", "gradients", "optimizer", "activations", "logits", "workspace"}


@pytest.mark.parametrize(("device", "bytes_of_a_number"), [("A100-80", 2), ("V100-32", 4)])
@pytest.mark.parametrize(
    ("size", "numbers"), [("124m", 2**24), ("8x4x256", 4 * 8 * 256**2), ("2x40x2560", 4 * 2560**2)]
)
def test_where_muons_step_needs_more_than_the_backward_pass_the_plan_says_so(device, bytes_of_a_number, size, numbers):
    setup = Setup(find_device(device), 1, "fp16", 512, 16, optimizer="muon")
    shape = parse_shape(size)
    parts = memory(setup, shape, 1)
    resident = sum(parts[part] for part in ("weights", "gradients", "optimizer"))
    assert total(parts) == pytest.approx(resident + CONTEXT_BYTES[False] + 5 * numbers * bytes_of_a_number)
    assert "update" not in memory(replace(setup, optimizer="adamw"), shape, 1)
    long_rows = replace(setup, block_size=1024, vocabulary=50_304)
    assert "update" not in memory(long_rows, shape, 64)  # there the backward pass is the peak


def test_the_micro_batch_is_the_largest_divisor_that_fits():
    plan = planned("T4", size="355m", tokens=5e9)
    assert total(plan.memory) <= 0.95 * 16e9 < total(memory(plan.setup, plan.shape, 2 * plan.micro_batch))
    assert plan.micro_batch * plan.accumulation * 1024 == plan.global_batch_tokens


# --- budgets


@pytest.mark.parametrize("budget", [{"hours": 10}, {"money": 50}, {"flops": 1e20}], ids=lambda b: next(iter(b)))
@pytest.mark.parametrize("size", [None, "124m"])
def test_a_plan_spends_its_budget_and_no_more(budget, size):
    plan = planned("A100-80", gpus=4, size=size, **budget)
    ((name, allowed),) = budget.items()
    assert 0.98 * allowed < getattr(plan, name) <= allowed * (1 + 1e-9)
    assert plan.money == pytest.approx(plan.hours * 4 * 1.79)
    assert plan.hours * 3600 == pytest.approx(plan.tokens * plan.seconds_per_token * (1 + OUTSIDE_STEPS))
    assert plan.micro_batch * plan.accumulation * 4 * 1024 == plan.global_batch_tokens
    assert plan.tokens == plan.steps * plan.global_batch_tokens
    if not size:
        larger = planned("A100-80", gpus=4, **{name: 10 * allowed})
        assert larger.parameters > plan.parameters and larger.tokens > plan.tokens and larger.loss < plan.loss


def test_an_mfu_replaces_the_assumed_speed():
    plan = planned("H100", hours=1, size="124m", mfu=0.5)
    assert plan.mfu == pytest.approx(0.5)
    assert 1 / plan.seconds_per_token == pytest.approx(0.5 * 989e12 / plan.setup.flops(plan.shape))
    assert "MFU 0.5, as given" in "".join(assumptions(plan))


def test_short_runs_take_smaller_batches_and_long_ones_gpt3s():
    assert planned("A100-80", size="51m", tokens=1e10).global_batch_tokens == 524_288
    short = planned("A100-80", size="51m", tokens=1e8)
    assert short.global_batch_tokens == 32_768 and short.steps >= 2_000


def test_tokens_with_a_budget_give_the_largest_model_that_can_read_them():
    plan = planned("A100-80", hours=24, tokens=5e9)
    larger = family()[family().index(plan.shape) + 1]
    with pytest.raises(UsageError, match=f"the largest model that fits them is {plan.size}"):
        planned("A100-80", hours=24, tokens=5e9, size=size_name(larger))


@pytest.mark.parametrize(
    ("wanted", "said"),
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
        ({"hours": 1, "block_size": 1}, "--block-size is 1"),
        ({"hours": 1, "optimizer": "adam"}, "--optimizer 'adam'. Did you mean 'adamw'?"),
        ({"hours": 1, "fit": "chinchila"}, "Did you mean 'chinchilla'?"),
        ({"hours": 1, "kernels": "flash"}, "Known: eager, compiled, manual"),
        ({"hours": 1, "precision": "bf16"}, "T4 has no peak for bf16"),
        ({"hours": 1, "size": "123m"}, "Did you mean '124m'?"),
        ({"hours": 1, "size": "124m", "global_batch_tokens": 100_000}, "nearest that fit are 99,328 and 100,352"),
        ({"hours": 9, "size": "124m", "micro_batch": 128, "global_batch_tokens": 131_072}, "at most 32 does"),
        ({"hours": 9, "size": "124m", "micro_batch": 3, "global_batch_tokens": 131_072}, "not divide the 128 rows"),
        ({"hours": 1e-4}, "too few to train on"),
        ({"hours": 1e-3, "size": "355m"}, "too few to train on"),
        (
            {"hours": 48, "kernels": "eager", "size": "124m", "tokens": 1e10},
            r"124m on 10,000,000,000 tokens needs 8.55e\+18 FLOPs, \d+ hours \(\$[\d.]+\); 48 hours on one T4 buys "
            r"2[.\d]+e\+09 tokens of it, and the largest model that fits them is 4x4x256",
        ),
        ({"hours": 1e4, "size": "1.5b"}, r"1.5b needs 26.7 GB .* T4 has 16.0 GB. Neither .* largest that fits is 774m"),
        (
            {"hours": 1e4, "size": "774m", "optimizer": "adamw"},
            "with --optimizer adamw_8bit; as it is, the largest that fits is 33x",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line_with_what_could(wanted, said):
    with pytest.raises(UsageError) as refused:
        planned("T4", **wanted)
    line = str(refused.value)
    assert said in line or re.search(said, line), line
    assert "\n" not in line


def test_what_memory_keeps_from_being_chosen_is_said():
    plan = planned("T4", hours=20_000, optimizer="adamw")
    assert total(plan.memory) <= 0.95 * 16e9
    assert "774m does not fit into T4's memory (--optimizer adamw_8bit would let it)" in plan.notes[0]


def test_a_size_far_from_the_best_for_its_budget_is_told_with_the_best():
    planned_with = partial(planned, "H100", money=1, global_batch_tokens=32_768)
    plan, best = planned_with(size="1.5b"), planned_with()
    assert f"{best.size} on {best.tokens:,} tokens would end at a loss of {best.loss:.2f}" in plan.notes[-1]
    assert plan.loss > best.loss + 1
    assert not any("would end" in note for note in best.notes)
    assert not any("would end" in note for note in planned_with(size=best.size).notes)


@pytest.mark.parametrize("size", [None, "124m"])
def test_a_micro_batch_too_large_for_large_shapes_finds_the_ones_that_it_fits(size):
    plan = planned("A100-80", hours=24, micro_batch=64, size=size)
    assert plan.micro_batch == 64 and total(plan.memory) <= 0.95 * 80e9


def test_a_micro_batch_that_keeps_a_larger_model_away_is_named():
    plan = planned("A100-80", hours=2_000, micro_batch=64)
    assert "--micro-batch 64 of" in plan.notes[0] and "at most 32 does" in plan.notes[0]


def test_a_cpu_is_planned_with_its_own_figures_where_there_is_a_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "rorchat.plan.cost.get_peak_flops", lambda precision, on_gpu=True: asked.append(on_gpu) or (1e12, "")
    )
    assert Setup(find_device("cpu"), 1, "fp32", 512, 64).peak == 1e12
    assert asked == [False]


def test_several_gpus_on_a_cpu_and_a_device_without_a_price_are_refused():
    with pytest.raises(UsageError, match="--gpus is 2 on a CPU"):
        planned("cpu", hours=1, gpus=2)
    with pytest.raises(UsageError, match="cpu has no price: give --dollars-per-hour, or name a device"):
        planned("cpu", money=1, mfu=0.5, size="demo")


def test_both_fits_are_named_with_what_each_would_choose():
    found = choices(Request(device=find_device("T4"), hours=100))
    assert {name: plan.fit.name for name, plan in found.items()} == {"chinchilla": "chinchilla", "epoch": "epoch"}
    assert "arXiv:2203.15556" in FITS["chinchilla"].source and "arXiv:2404.10102" in FITS["epoch"].source


# --- what is shown


@pytest.mark.parametrize(
    "wanted",
    [
        {"hours": 24},
        {"hours": 24, "gradient_checkpointing": True, "kernels": "compiled", "vocabulary": 8192, "block_size": 512},
        {"hours": 24, "gpus": 8, "optimizer": "adamw", "precision": "fp32"},
    ],
)
def test_the_yaml_is_one_that_pretraining_accepts(wanted, tmp_path):
    from rorchat.training.arguments import parse
    from rorchat.training.pretrain import PretrainArguments

    plan = planned("T4", **wanted)
    (tmp_path / "run.yaml").write_text(as_yaml(plan))
    arguments = parse(PretrainArguments, ["--config", str(tmp_path / "run.yaml")])
    assert parse_shape(arguments.size) == plan.shape
    assert arguments.max_steps == plan.steps
    assert arguments.gradient_accumulation_steps == plan.accumulation * plan.setup.gpus
    assert (arguments.block_size, arguments.optimizer) == (plan.setup.block_size, plan.setup.optimizer)
    assert arguments.gradient_checkpointing == plan.setup.gradient_checkpointing
    assert arguments.compile == (plan.setup.kernels == "compiled")


def test_the_picture_of_a_tiny_budget_has_curves_and_no_lone_points(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lengths, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *args, **kwargs: lengths.append(np.size(args[0])) or plot(self, *args, **kwargs)
    )
    draw(planned("T4", flops=2e13, block_size=256, global_batch_tokens=2_048), tmp_path / "iso.png")
    assert min(lengths[: len(BUDGETS)]) >= 5


def test_the_picture_has_a_curve_for_every_budget_and_its_lowest_points_fall(tmp_path):
    plan = planned("V100", flops=3.2e17)
    draw(plan, tmp_path / "iso.png")
    assert (tmp_path / "iso.png").read_bytes().startswith(b"\x89PNG")
    lowest = [min(_curve(plan, plan.flops * times), key=lambda point: point[1]) for times in BUDGETS]
    assert lowest == sorted(lowest, key=lambda point: (point[0], -point[1]))
    assert lowest[BUDGETS.index(1.0)][0] == plan.parameters


def test_counts_and_times_are_said_as_people_do():
    assert [amount(n) for n in (12, 51_500_000, 1.1e9, 3.2e12)] == ["12", "51.5M", "1.1B", "3.2T"]
    assert [duration(h) for h in (0.01, 0.5, 3.5, 240)] == ["36 s", "30.0 min", "3.5 h", "10.0 days"]


def test_the_command_shows_the_plan_its_assumptions_and_both_choices(tmp_path):
    out, picture = tmp_path / "run.yaml", tmp_path / "iso.png"
    done = command("plan", "--money", 20, "--device", "a100-80", "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    for said in ("| model |", "| time | 11.2 h |", "| money | $2", "- activations", "Fit: epoch", "at 0.65 of 312",
                 "an example from the table", "chinchilla: ", ", this plan", f"run  {out}"):  # fmt: skip
        assert said in done.stdout, said
    assert yaml.safe_load(out.read_text())["optimizer"] == "muon"
    assert picture.is_file()


def test_with_yaml_nothing_else_is_printed():
    done = command("plan", "--hours", 5, "--device", "L4", "--yaml")
    config = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and done.stdout.startswith("# ")
    assert config["train_tokens"] % config["global_batch_tokens"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "T4"], "No budget"),
        (["--hours", "1", "--device", "T44"], "No device 'T44'. Did you mean 'T4'"),
        (["--hours", "nan", "--device", "T4"], "--hours is nan"),
        (["--hours", "1", "--device", "T4", "--picture", "x.jpg"], "give a file that ends in .png"),
        (["--hours", "1", "--device", "T4", "--out", "no/such/run.yaml"], "No folder no/such"),
        (["--size", "124m", "--tokens", "1e9", "--device", "T4", "--probe"], "--probe measures this machine"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, said):
    done = command("plan", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


# --- the probe


def test_a_probe_measures_real_steps_and_the_plan_takes_their_speed():
    words = ["--size", "2x2x128", "--tokens", "1e7", "--device", "cpu", "--vocabulary", 512, "--block-size", 64]
    done = command("plan", *words, "--probe", "--precision", "fp32")
    assert done.returncode == 0, done.stderr
    assert "probe: 4 steps of 2x2x128 on" in done.stderr
    assert "measured |" in done.stdout and "Speed: measured here" in done.stdout
    assert "assumed" not in done.stdout


def test_a_measured_speed_counts_every_micro_batch_and_one_update_a_step():
    plan = planned("A100-80", size="124m", tokens=1e10, gpus=2)
    probed = Probe(micro_batch=8, micro_step=0.1, update=0.05, spread=0.0)
    rows = plan.global_batch_tokens // 1024
    step = rows / 8 * 0.1 / 2 + 0.05  # every GPU does half of the micro-batches, and all of the update
    assert probed.seconds_per_token(plan) == pytest.approx(step / plan.global_batch_tokens)
    again = make_plan(plan.request, measured=probed.seconds_per_token(plan))
    assert again.hours == pytest.approx(plan.tokens * step / plan.global_batch_tokens * 1.1 / 3600)
    assert seconds_per_token(again.setup, again.shape, 1, 1024) == probed.seconds_per_token(plan)


def test_a_probe_on_a_busy_machine_says_so():
    plan = planned("cpu", tokens=1e8, size="2x2x128", mfu=0.5, block_size=128)
    said = {spread: " ".join(assumptions(plan, Probe(4, 0.2, 0.01, spread))) for spread in (0.05, 0.5)}
    assert "not steady" in said[0.5] and "not steady" not in said[0.05]
