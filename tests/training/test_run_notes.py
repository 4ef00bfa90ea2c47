"""Warnings about runs that change the model too little, with settings that change it more."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from recipe_commands import inside, succeeded
from support import json_lines, write
from transformers import GPT2Config

from rorchat.model import build_model, save_model
from rorchat.sources.base import RowStats
from rorchat.training.dpo import default_learning_rate
from rorchat.training.run_notes import MIN_STEPS, warn_about_kept_rows, warn_about_margin, warn_about_steps


def settings(rows: int, **changes: object) -> SimpleNamespace:
    """Arguments of a chat stage whose number of steps follows from the rows, as in `count_steps`."""
    values = {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "world_size": 1, "num_train_epochs": 1.0,
        "given": {},
    } | changes  # fmt: skip
    batch = values["per_device_train_batch_size"] * values["gradient_accumulation_steps"] * values["world_size"]
    steps = max(1, math.ceil(rows * values["num_train_epochs"] / batch))
    return SimpleNamespace(**({"max_steps": steps} | values))


@pytest.mark.parametrize("rows", [1, 3, 10, 24, 50, 107, 390])
@pytest.mark.parametrize("changes", [{}, {"num_train_epochs": 2.5}, {"gradient_accumulation_steps": 4}])
def test_the_advice_gives_enough_steps(rows, changes):
    arguments = settings(rows, **changes)
    warning = warn_about_steps(arguments, rows)
    assert bool(warning) == (arguments.max_steps < MIN_STEPS)
    if not warning:
        return
    assert f"only {arguments.max_steps} step" in warning and "\n" not in warning
    advised = [(name, float(value)) for name, value in re.findall(r"--(\w+) (\d+)", warning)]
    assert {name for name, _ in advised} == {"per_device_train_batch_size", "num_train_epochs"}
    alternatives = [dict(advised)] if "more data" in warning else [dict([setting]) for setting in advised]
    for alternative in alternatives:
        assert MIN_STEPS <= settings(rows, **(changes | alternative)).max_steps < 2 * MIN_STEPS + 8


def test_a_batch_of_groups_stays_a_multiple_of_their_size():
    warning = warn_about_steps(settings(120, per_device_train_batch_size=64), 120, multiple=8)
    assert "--per_device_train_batch_size 8 --num_train_epochs 4" in warning
    warning = warn_about_steps(settings(1000, per_device_train_batch_size=64), 1000, multiple=8)
    assert "--per_device_train_batch_size 16 or --num_train_epochs 4" in warning


def test_steps_that_the_user_chose_are_no_mistake():
    assert warn_about_steps(settings(10, max_steps=5), 10)
    assert not warn_about_steps(settings(10, max_steps=5, given={"max_steps": 5}), 10)


def test_a_warning_says_how_many_rows_are_used():
    few, many = RowStats("a", rows_in=100, kept=30), RowStats("b", rows_in=100, kept=80)
    assert "only 30 of 100 rows are used" in warn_about_kept_rows([few])
    assert not warn_about_kept_rows([few, many]) and not warn_about_kept_rows([RowStats("c", rows_in=2, kept=1)])


def test_a_margin_near_0_is_a_warning():
    assert "differ by 0.001 after training" in warn_about_margin(0.001, 5e-7)
    assert "differ by -0.200" in warn_about_margin(-0.2, 5e-7) and "5e-07" in warn_about_margin(-0.2, 5e-7)
    assert not warn_about_margin(0.5, 5e-7)


@pytest.fixture
def model(tokenizer, tmp_path) -> Path:
    save_model(build_model("1x2x16", tokenizer, n_positions=192), tokenizer, tmp_path / "base")
    return tmp_path / "base"


def pairs(folder: Path, count: int, unusable: int) -> str:
    rows = [{"prompt": f"Is {n} even?", "chosen": f"It is {n}.", "rejected": "No."} for n in range(count)]
    rows += [{"prompt": f"Is {n} odd?", "chosen": "No.", "rejected": "No."} for n in range(unusable)]
    return f"preference={write(folder, 'pairs.jsonl', json_lines(*rows))}"


def test_dpo_warns_before_the_first_step_and_after_the_last(model, tmp_path):
    flags = ["--model", model, "--sources", pairs(tmp_path, 60, 80), "--validation_share", 0.2, "--bf16", "false"]
    run = ["--learning_rate", "1e-9", "--logging_steps", 2, "--output_dir", tmp_path / "run"]
    lines = succeeded(inside("dpo", *flags, *run)).stderr.splitlines()
    places = [
        next(index for index, line in enumerate(lines) if text in line)
        for text in (
            "only 60 of 140 rows",
            "warning: the run has only",
            "  loss ",
            "warning: the preferences hardly changed the model",
        )
    ]
    assert places == sorted(places)
    assert not any(line.startswith("learning rate ") for line in lines)  # it was given
    done = succeeded(inside("dpo", *flags, "--sample_prompts", "--output_dir", tmp_path / "other", "--smoke"))
    assert "warning" not in done.stderr


def test_dpo_says_its_default_learning_rate(model, tmp_path):
    flags = ["--model", model, "--sources", pairs(tmp_path, 60, 0), "--validation_share", 0.2, "--bf16", "false"]
    done = succeeded(inside("dpo", *flags, "--max_steps", 2, "--logging_steps", 1, "--output_dir", tmp_path / "run"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("learning rate ")]
    assert float(line.split()[2].rstrip(",")) > 1e-4  # fewer than a million parameters


def test_the_default_learning_rate_falls_with_the_root_of_the_size():
    small, large = (
        default_learning_rate(
            GPT2Config(vocab_size=vocabulary, n_positions=512, n_layer=layers, n_head=4, n_embd=width)
        )
        for vocabulary, layers, width in ((5_000, 4, 128), (20_000, 16, 512))
    )
    assert (small, large) == (8.2e-5, 1.3e-5)  # 1.5M and 60.9M parameters


def test_sft_warns_about_few_steps(model, tmp_path):
    flags = ["--model", model, "--sources", "tinytown=40", "--validation_share", 0.2, "--bf16", "false"]
    done = succeeded(inside("sft", *flags, "--output_dir", tmp_path / "run"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "the run has only" in line and "--per_device_train_batch_size 1 --num_train_epochs" in line
    flags += line[line.index("--") :].split(", which")[0].split()
    done = succeeded(inside("sft", *flags, "--output_dir", tmp_path / "long"))
    assert "warning" not in done.stderr and "step 40/" in done.stderr
