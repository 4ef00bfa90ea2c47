"""The table, the YAML and the figure of a plan, and the command."""

import numpy as np
import pytest
import yaml
from plan_support import make_test_plan
from support import command

from rorchat.device import find_device
from rorchat.model import parse_shape
from rorchat.plan.budget import Request, compare_fits
from rorchat.plan.scaling import FITS
from rorchat.plan.show import (
    BUDGETS,
    build_rows,
    compute_isoflop_curve,
    draw_isoflop_curves,
    format_count,
    format_duration,
    to_yaml,
)


def test_both_fits_are_compared():
    plans = compare_fits(Request(device=find_device("T4"), hours=100))
    assert {name: plan.fit.name for name, plan in plans.items()} == {"chinchilla": "chinchilla", "epoch": "epoch"}
    assert "arXiv:2203.15556" in FITS["chinchilla"].source and "arXiv:2404.10102" in FITS["epoch"].source


@pytest.mark.parametrize(
    "settings",
    [
        {"hours": 24},
        {"hours": 24, "gradient_checkpointing": True, "kernels": "compiled", "vocabulary": 8192, "block_size": 512},
        {"hours": 24, "gpus": 8, "optimizer": "adamw", "precision": "fp32"},
    ],
)
def test_pretraining_accepts_the_yaml(settings, tmp_path):
    from rorchat.training.arguments import parse
    from rorchat.training.pretrain import PretrainArguments

    plan = make_test_plan("T4", **settings)
    (tmp_path / "run.yaml").write_text(to_yaml(plan))
    arguments = parse(PretrainArguments, ["--config", str(tmp_path / "run.yaml")])
    assert parse_shape(arguments.size) == plan.shape
    assert arguments.max_steps == plan.steps
    assert arguments.gradient_accumulation_steps == plan.accumulation * plan.setup.gpus
    assert (arguments.block_size, arguments.optimizer) == (plan.setup.block_size, plan.setup.optimizer)
    assert arguments.gradient_checkpointing == plan.setup.gradient_checkpointing
    assert arguments.compile == (plan.setup.kernels == "compiled")


def test_every_curve_of_a_tiny_budget_has_five_points(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lengths, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *args, **kwargs: lengths.append(np.size(args[0])) or plot(self, *args, **kwargs)
    )
    draw_isoflop_curves(
        make_test_plan("T4", flops=2e13, block_size=256, global_batch_tokens=2_048), tmp_path / "iso.png"
    )
    assert min(lengths[: len(BUDGETS)]) >= 5


def test_the_minima_of_the_curves_fall_with_the_budget(tmp_path):
    plan = make_test_plan("V100", flops=3.2e17)
    draw_isoflop_curves(plan, tmp_path / "iso.png")
    assert (tmp_path / "iso.png").read_bytes().startswith(b"\x89PNG")
    lowest = [min(compute_isoflop_curve(plan, plan.flops * times), key=lambda point: point[1]) for times in BUDGETS]
    assert lowest == sorted(lowest, key=lambda point: (point[0], -point[1]))
    assert lowest[BUDGETS.index(1.0)][0] == plan.parameters


def test_counts_and_durations_are_readable():
    assert [format_count(n) for n in (12, 51_500_000, 1.1e9, 3.2e12)] == ["12", "51.5M", "1.1B", "3.2T"]
    assert [format_duration(h) for h in (0.01, 0.5, 3.5, 240)] == ["36 s", "30.0 min", "3.5 h", "10.0 days"]


def test_the_command_shows_plan_assumptions_and_fits(tmp_path):
    out, picture = tmp_path / "run.yaml", tmp_path / "iso.png"
    done = command("plan", "--money", 20, "--device", "a100-80", "--out", out, "--picture", picture)
    assert done.returncode == 0, done.stderr
    for text in ("| model |", "| time | 11.2 h |", "| money | $2", "- activations", "Fit: epoch", "at 0.65 of 312",
                 "an example from the table", "chinchilla: ", ", this plan", f"run  {out}"):  # fmt: skip
        assert text in done.stdout, text
    assert yaml.safe_load(out.read_text())["optimizer"] == "muon"
    assert picture.is_file()


def test_with_yaml_nothing_else_is_printed():
    done = command("plan", "--hours", 5, "--device", "L4", "--yaml")
    config = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and done.stdout.startswith("# ")
    assert config["train_tokens"] % config["global_batch_tokens"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "T4"], "No budget"),
        (["--hours", "1", "--device", "T44"], "No device 'T44'. Did you mean 'T4'"),
        (["--hours", "nan", "--device", "T4"], "--hours is nan"),
        (["--hours", "1", "--device", "T4", "--picture", "x.jpg"], "give a file that ends in .png"),
        (["--hours", "1", "--device", "T4", "--out", "no/such/run.yaml"], "No folder no/such"),
        (["--size", "124m", "--tokens", "1e9", "--device", "T4", "--probe"], "--probe measures this machine"),
    ],
)
def test_an_error_is_one_line_with_exit_code_2(arguments, message):
    done = command("plan", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("tokens", "validation"),
    [
        (1e7, ["4 x 101k tokens", "1.3 % of the FLOPs, outside of steps"]),  # a hundredth of the tokens
        (1e9, ["4 x 1M tokens", "0.13 % of the FLOPs, outside of steps"]),  # at most a million
        (1e10, ["4 x 1M tokens", "0.013 % of the FLOPs, outside of steps"]),
    ],
)
def test_a_plan_counts_its_evaluations(tokens, validation):
    rows = build_rows(make_test_plan("A100-80", size="51m", tokens=tokens))
    assert next(row for row in rows if row[0] == "validation")[1:] == validation
