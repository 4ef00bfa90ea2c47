"""Sizes that do not fit together are named all at once, with one complete set of sizes that fits."""

import re
from pathlib import Path

import pytest

from rorchat.errors import MismatchError, UsageError
from rorchat.model import build_model
from rorchat.training.arguments import parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments
from rorchat.training.sizes import read_model_size

STAGES = {"sft": SFTArguments, "dpo": DPOArguments, "grpo": GRPOArguments, "pretrain": PretrainArguments}


@pytest.fixture
def model(tokenizer, tmp_path) -> Path:
    build_model("1x2x16", tokenizer, n_positions=128).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def parse_stage(stage: str, tmp_path: Path, *flags: object):
    source = "gsm8k=unused" if stage == "grpo" else "tinytown=9"
    words = ["--sources", source, "--output_dir", tmp_path / "run", "--bf16", "false", *flags]
    return parse(STAGES[stage], [*map(str, words)])


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        ("--block_size 256 --global_batch_tokens 10000 --train_tokens 5000 --size 6x5x128", (
            "a width of 128 is not divisible by 5 heads", "global_batch_tokens 10,000 is not a multiple of block_size",
            "train_tokens is 5,000, less than one step of 10,000 tokens")),
        ("--block_size 1 --per_device_train_batch_size 0 --global_batch_tokens -5", (
            "block_size is 1: a row needs", "per_device_train_batch_size is 0", "global_batch_tokens is -5",
            "The length of the run is missing")),
        ("--train_tokens 200000", ("less than one step of 524,288",)),
        ("--max_steps 5 --block_size 100 --global_batch_tokens 30000", ("x 1 processes = 800",)),
        ("--model MODEL --block_size 256 --train_tokens 9 --global_batch_tokens 2048", (
            "block_size is 256, but the model has only 128 positions", "less than one step")),
    ],
)  # fmt: skip
def test_all_problems_are_named_and_the_suggested_sizes_fit(flags, problems, model, tmp_path):
    words = flags.replace("MODEL", str(model)).split()
    with pytest.raises(UsageError) as refused:
        parse_stage("pretrain", tmp_path, *words)
    message = str(refused.value)
    assert all(problem in message for problem in problems), message
    assert "\n" not in message
    suggested = re.search("Try: (.*)", message)[1].split()
    arguments = parse_stage("pretrain", tmp_path, *words, *suggested)
    assert arguments.max_steps >= 1 and arguments.gradient_accumulation_steps >= 1
    if "--train_tokens 200000" in flags:  # the user's own number is kept
        assert arguments.train_tokens == 200_000 and arguments.max_steps > 50


def test_problems_of_different_kinds_are_named_together(model, tmp_path):
    for stage, flags, problems in (
        ("sft", "--max_length 500 --replay_share 2 --lora_rank -1", (
            "lora_rank is -1", "only 128 positions. replay_share is 2.0", ". Try: --max_length 128")),
        ("dpo", "--max_length 0 --beta 0 --chosen_drop -1 --loss_type foo", (
            "max_length is 0", "beta is 0.0", "chosen_drop is -1", "No loss_type 'foo'")),
        ("grpo", "--max_completion_length 200 --per_device_train_batch_size 3 --temperature 0 --learning_rate -1", (
            "only 128 positions", "temperature is 0", "learning_rate is -1",
            ". Try: --max_completion_length 32 --per_device_train_batch_size 8")),
    ):  # fmt: skip
        with pytest.raises(UsageError) as refused:
            parse_stage(stage, tmp_path, "--model", model, *flags.split())
        assert all(problem in str(refused.value) for problem in problems), refused.value


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("name", ["per_device_train_batch_size", "gradient_accumulation_steps"])
def test_a_batch_without_rows_is_refused(stage, name, model, tmp_path):
    smallest = 8 if stage == "grpo" and name.startswith("per_device") else 1
    with pytest.raises(UsageError, match=f"{name} 0: give positive numbers. Try: --{name} {smallest}$"):
        parse_stage(stage, tmp_path, "--model", model, f"--{name}", 0)


def test_a_row_longer_than_the_context_window_alone_is_a_mismatch(model, tmp_path):
    with pytest.raises(MismatchError, match="but the model has only 128 positions. Try: --max_length 128"):
        parse_stage("sft", tmp_path, "--model", model, "--max_length", 129)
    assert parse_stage("sft", tmp_path, "--model", model, "--max_length", 128).max_length == 128
    with pytest.raises(MismatchError, match="only 128 positions. Try: --block_size 128"):
        parse_stage("pretrain", tmp_path, "--model", model, "--block_size", 256, "--max_steps", 9)


def test_positions_are_read_from_model_and_run_folders(model, tmp_path):
    assert read_model_size(str(model), "n_positions") == 128
    (tmp_path / "run").mkdir()
    model.rename(tmp_path / "run" / "model")
    assert read_model_size(str(tmp_path / "run"), "n_positions") == 128
    for unknown in ("gpt2", str(tmp_path), str(tmp_path / "nowhere"), ""):
        assert read_model_size(unknown, "n_positions") is None
