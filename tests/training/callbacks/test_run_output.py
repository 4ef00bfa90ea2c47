"""Metrics, samples and trackers of a run while it trains, and how it stops after a divergence."""

import json
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import read_strict
from training_support import build_pretrain_trainer
from transformers import TrainerCallback

from rorchat.errors import DivergedError, UsageError, exits_with_one_line
from rorchat.jsonl import read_json_lines
from rorchat.model import build_model
from rorchat.reporting.curves import draw_curves
from rorchat.reporting.runs import drop_superseded_lines
from rorchat.training import stage as stage_module
from rorchat.training import trackers
from rorchat.training.arguments import parse
from rorchat.training.callbacks.metrics import Utilization
from rorchat.training.context import StageContext
from rorchat.training.pretrain import PretrainArguments, PretrainTrainer
from rorchat.training.run_folder import RunFolder
from rorchat.training.sft import ChatSFTTrainer, SFTArguments, load_conversations
from rorchat.training.trackers import parse_trackers
from rorchat.training.train_and_save import train

ROOT = Path(__file__).resolve().parents[3]
BASE = [
    "--sources", "tinytown=120", "persona=60", "--weights", "5", "2", "--block_size", "32", "--validation_share", "0.1",
    "--per_device_train_batch_size", "2", "--global_batch_tokens", "128", "--max_steps", "8", "--logging_steps", "2",
    "--eval_steps", "4", "--bf16", "false", "--optimizer", "muon", "--learning_rate", "1e-3",
]  # fmt: skip
SHOWN = ["--sample_prompts", "One day", "--sample_steps", "3", "--price_per_hour", "36000"]


class Recorder(TrainerCallback):
    """A tracker that keeps its logs, as the trackers of Transformers receive them in `on_log`."""

    def __init__(self):
        self.logged = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))


@pytest.fixture(scope="module", autouse=True)
def known_peak():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_module, "get_peak_flops", lambda precision, on_gpu: (1e12, "measured"))
        yield


def parse_flags(folder: Path, *flags: object) -> PretrainArguments:
    return parse(PretrainArguments, [*BASE, "--output_dir", str(folder), *map(str, flags)])


def make_trainer(tokenizer, folder: Path, *flags: object, kind: type = PretrainTrainer) -> PretrainTrainer:
    model = build_model("2x2x32", tokenizer, 32)
    return build_pretrain_trainer(model, parse_flags(folder, *flags), tokenizer, kind)


def train_run(tokenizer, folder: Path, *flags: object, kind: type = PretrainTrainer) -> None:
    """Trains as the recipe does, with the folder of the run."""
    arguments = parse_flags(folder, *flags)
    run, model = RunFolder(arguments, "pretrain", {}), build_model("2x2x32", tokenizer, 32)
    train(run, build_pretrain_trainer(model, arguments, tokenizer, kind, run.context({})))


@pytest.fixture(scope="module")
def shown(tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A complete short run with every output: its trainer, its lines and the logs of a tracker."""
    folder = tmp_path_factory.mktemp("shown")
    trainer, recorder = make_trainer(tokenizer, folder, *SHOWN), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    lines = read_strict(folder / "metrics.jsonl")
    return SimpleNamespace(trainer=trainer, folder=folder, lines=lines, tracker=recorder)


def training_lines(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "loss" in line]


# metrics.jsonl


def test_every_field_of_a_training_line_is_documented(shown):
    lines = training_lines(shown.lines)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    fields = {
        "step", "tokens", "loss", "learning_rate", "matrix_learning_rate", "grad_norm", "tokens_per_second", "mfu",
        "memory_bytes", "mixture", "seconds", "dollars",
    }  # fmt: skip
    assert lines[0].keys() == fields | {"peak", "peak_flops", "flops_per_token"}
    assert all(line.keys() == fields for line in lines[1:])
    evaluation = next(line for line in shown.lines if "eval_loss" in line)
    assert {"eval_tinytown_loss", "eval_persona_bits_per_byte", "eval_bits_per_byte", "seconds"} <= evaluation.keys()
    documented = set(re.findall(r"^\| `(.+?)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    general = {re.sub("tinytown|persona", "SOURCE", key) for line in shown.lines for key in line}
    assert general <= documented, general - documented


def test_mfu_is_flops_per_token_times_speed_over_the_peak(shown):
    first = training_lines(shown.lines)[0]
    width, layers, vocabulary, positions = 32, 2, 384, 32
    work = 6 * (12 * layers * width**2 + vocabulary * width) + 12 * layers * width * positions
    assert (first["flops_per_token"], first["peak_flops"], first["peak"]) == (work, 1e12, "measured")
    assert Utilization(work, 1e9, "known").mfu(1000) == pytest.approx(1000 * work / 1e9)
    for line in training_lines(shown.lines):
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * work / 1e12, abs=1e-5)


def test_a_line_has_the_mixture_since_the_previous_line(shown):
    mixture, before = shown.trainer.mixture, 0
    for line in training_lines(shown.lines):
        rows = range(before * 4, line["step"] * 4)
        names = [mixture.plan.names[mixture.locate(row)[0]] for row in rows]
        assert line["mixture"] == {name: names.count(name) / len(rows) for name in ("tinytown", "persona")}
        before = line["step"]
    assert len({line["mixture"]["persona"] for line in training_lines(shown.lines)}) > 1


def test_both_learning_rates_are_logged(shown):
    lines = training_lines(shown.lines)
    for line in lines:
        assert line["matrix_learning_rate"] == pytest.approx(
            shown.trainer.args.matrix_learning_rate / 1e-3 * line["learning_rate"]
        )
    assert lines[-1]["learning_rate"] < lines[0]["learning_rate"]


def test_the_cost_is_time_times_price(shown):
    assert shown.lines[-1]["seconds"] > 0
    for line in shown.lines:
        assert line["dollars"] == pytest.approx(10 * line["seconds"], abs=0.06)  # 36,000 $/h; seconds have two digits


def test_trackers_receive_the_same_numbers_flat(shown):
    logged = [(step, logs) for step, logs in shown.tracker.logged if "train_runtime" not in logs]
    assert len(logged) == len(shown.lines) == 6
    for (step, logs), line in zip(logged, shown.lines, strict=True):
        assert all(isinstance(value, (int, float)) for value in logs.values())
        assert step == line["step"]
        flat = {f"mixture/{name}": share for name, share in line.get("mixture", {}).items()}
        expected = {key: value for key, value in line.items() if isinstance(value, (int, float))} | flat
        for key in expected.keys() - {"step", "peak_flops", "flops_per_token"}:
            assert logs[key] == pytest.approx(expected[key], abs=1e-6), key


def test_trackio_works_through_the_callback_of_transformers(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "trackio.py").write_text(
        "from types import SimpleNamespace\n__version__ = '0'\nlogged = []\nlog = logged.append\n"
        "class Config(dict):\n    def update(self, more, allow_val_change): super().update(more)\n"
        "config = Config()\ncontext_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: None))\n"
        "def init(**settings): pass\ndef finish(): logged.append('finished')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    make_trainer(tokenizer, tmp_path / "run", "--report_to", "trackio", "--max_steps", 4).train()
    import trackio

    monkeypatch.delitem(sys.modules, "trackio")
    assert trackio.logged[-1] == "finished"
    keys = {key for logs in trackio.logged[:-1] for key in logs}
    assert {
        "train/loss", "train/mfu", "train/tokens_per_second", "train/matrix_learning_rate", "train/mixture/persona",
        "train/seconds", "eval/loss", "eval/bits_per_byte", "eval/tinytown_loss", "train/global_step",
    } <= keys  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "report_to wandb needs a package that is not installed: pip install wandb"),
        ("tensorboard", "pip install tensorboard"),
        ("none,trackio", "pip install trackio"),
        ("tensorbord", "no tracker 'tensorbord'. Did you mean 'tensorboard'?"),
    ],
)
def test_an_unavailable_tracker_is_refused_before_the_start(name, message, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        parse(PretrainArguments, [*BASE, "--output_dir", "x", "--report_to", name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tensorboard,wandb", ["tensorboard", "wandb"]])
def test_trackers_are_given_with_commas_or_as_a_list(name, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: package)
    assert parse_trackers(name) == ["tensorboard", "wandb"]
    assert parse_trackers("none") == parse_trackers(None) == []
    config = tmp_path / "c.yaml"
    config.write_text(f"report_to: {json.dumps(name)}\n")
    arguments = parse(PretrainArguments, ["--config", str(config), *BASE, "--output_dir", "x"])
    assert arguments.report_to == ["tensorboard", "wandb"]


# Samples


def test_samples_are_generated_before_during_and_after_training(shown):
    lines = read_strict(shown.folder / "samples.jsonl")
    assert [(line["step"], line["tokens"]) for line in lines] == [(0, 0), (3, 384), (6, 768), (8, 1024)]
    assert all(line.keys() == {"step", "tokens", "prompt", "text"} for line in lines)
    assert {line["prompt"] for line in lines} == {"One day"}


def test_sampling_does_not_change_the_training(shown, tokenizer, tmp_path):
    plain = make_trainer(tokenizer, tmp_path)
    plain.train()
    other = dict(shown.trainer.model.named_parameters())
    assert all(torch.equal(value, other[name]) for name, value in plain.model.named_parameters())
    assert not (tmp_path / "samples.jsonl").exists()


# Divergence


@pytest.fixture
def no_skipped_steps(monkeypatch):
    monkeypatch.setattr("rorchat.training.checkpointing.trainer_mixin.MAX_SKIPPED_STEPS", 0)


class Poisoned(PretrainTrainer):
    """Its loss or its gradient is `poison` in the second micro-batch of step 7."""

    poison, in_gradient = math.nan, False

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.count = getattr(self, "count", 0) + 1
        if self.count != 14:
            return loss
        if self.in_gradient:
            self.model.transformer.ln_f.bias.register_hook(lambda gradient: gradient * self.poison)
            return loss
        self.before = self.model.transformer.wte.weight.detach().clone()
        return loss * self.poison


def test_a_non_finite_loss_ends_the_run_at_its_step(tokenizer, tmp_path, no_skipped_steps):
    for poison in (math.nan, math.inf):
        trainer = make_trainer(tokenizer, tmp_path / str(poison), kind=Poisoned)
        trainer.poison = poison
        with pytest.raises(DivergedError) as caught:
            trainer.train()
        last = read_strict(tmp_path / str(poison) / "metrics.jsonl")[-1]
        assert (last["event"], last["step"], last["loss"]) == ("diverged", 7, str(poison))
        assert math.isfinite(last["last_finite_loss"]) and sum(last["mixture"].values()) == 1
        message = str(caught.value)
        assert message.startswith(f"The loss is {poison} at step 7, with rows from tinytown")
        assert f"the last finite loss was {last['last_finite_loss']:.4f} at step 6" in message
        assert "learning_rate" in message and "checkpoint" in message and "\n" not in message
        assert caught.value.exit_code == 70
        assert torch.equal(trainer.model.transformer.wte.weight, trainer.before)  # the step was skipped


def test_a_non_finite_gradient_ends_the_run(tokenizer, tmp_path, no_skipped_steps):
    trainer = make_trainer(tokenizer, tmp_path, kind=Poisoned)
    trainer.in_gradient = True
    with pytest.raises(DivergedError, match=r"The loss is \d\.\d{4} but the gradient norm is nan at step 7"):
        trainer.train()
    last = read_strict(tmp_path / "metrics.jsonl")[-1]
    assert (last["step"], last["grad_norm"]) == (7, "nan") and math.isfinite(last["loss"])


@pytest.mark.parametrize("warmup", [0.5, 4])
def test_the_cooldown_starts_after_the_warmup(tokenizer, tmp_path, warmup):
    """Half of eight steps up and 0.7 of them down: no rate is skipped between the two."""
    trainer = make_trainer(tokenizer, tmp_path, "--warmup_steps", warmup, "--cooldown_share", 0.7)
    trainer.create_optimizer()
    schedule, rates = trainer.create_scheduler(8), []
    for _ in range(9):
        rates.append(schedule.get_last_lr()[-1] / 1e-3)
        trainer.optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25, 0])


def test_evaluate_refuses_another_dataset(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, tmp_path)
    with pytest.raises(ValueError, match="validation split of the run"):
        trainer.evaluate(trainer.train_dataset)


def test_a_diverged_run_resumes_and_its_log_is_append_only(tokenizer, tmp_path, no_skipped_steps, monkeypatch):
    monkeypatch.setattr(PretrainTrainer, "_roll_back", lambda trainer: None)
    flags = ["--save_strategy", "steps", "--save_steps", 4]
    with pytest.raises(DivergedError):
        train_run(tokenizer, tmp_path, *flags, kind=Poisoned)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    train_run(tokenizer, tmp_path, *flags)
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    lines = read_strict(tmp_path / "metrics.jsonl")
    assert [line.get("event", line["step"]) for line in training_lines(lines)] == [2, 4, 6, "diverged", 6, 8]
    assert [line["seconds"] for line in lines] == sorted(line["seconds"] for line in lines)
    valid_lines = drop_superseded_lines(lines)
    assert [line["step"] for line in training_lines(valid_lines)] == [2, 4, 6, 8]
    assert [line["event"] for line in valid_lines if "event" in line] == ["resumed"]


def test_without_a_checkpoint_the_logs_start_again(tokenizer, tmp_path):
    flags = ["--max_steps", 2, "--sample_prompts", "Hi", "--save_strategy", "no"]
    for _ in range(2):
        trainer = make_trainer(tokenizer, tmp_path, *flags)
        run = RunFolder(trainer.args, "pretrain", {})
        run.begin()
        trainer.train()
        run.held.close()  # as at the end of the process
    assert [line["step"] for line in training_lines(read_strict(tmp_path / "metrics.jsonl"))] == [2]
    assert [line["step"] for line in read_strict(tmp_path / "samples.jsonl")] == [0, 2]


def test_the_command_ends_with_70_and_one_line(tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = [*BASE, "--tokenizer", tmp_path / "tokenizer", "--size", "2x2x32", "--optimizer", "adamw"]
    flags += ["--output_dir", tmp_path / "run", "--learning_rate", "1e38", "--eval_strategy", "no"]
    main = exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["main"])
    with pytest.raises(SystemExit) as stopped:
        main([str(flag) for flag in flags])
    assert stopped.value.code == 70
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and re.match(r"error: The loss is .+ at step \d", errors[0])
    assert read_strict(tmp_path / "run" / "metrics.jsonl")[-1]["event"] == "diverged"


# The chat stages and the picture


def test_sft_writes_the_same_fields_except_mfu_and_mixture(tokenizer, tmp_path):
    flags = ["--sources", "tinytown=60", "--validation_share", "0.2", "--max_steps", "4", "--logging_steps", "2"]
    flags += ["--output_dir", str(tmp_path), "--eval_strategy", "no", "--bf16", "false", "--price_per_hour", "1"]
    arguments = parse(SFTArguments, flags)
    training, validation, *_ = load_conversations(arguments, tokenizer, 96)
    ChatSFTTrainer(
        build_model("2x2x32", tokenizer, 96), arguments, tokenizer, training, validation, StageContext()
    ).train()
    lines = read_strict(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    fields = {"step", "tokens", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert lines[0].keys() == fields | {"memory_bytes", "seconds", "dollars"}


def test_a_resumed_event_supersedes_the_lines_of_later_steps():
    records = [{"step": 2, "loss": 3}, {"step": 2, "eval_loss": 3}, {"step": 4, "loss": "nan", "event": "diverged"}]
    resumed = {"event": "resumed", "step": 2}
    assert drop_superseded_lines([*records, resumed, {"step": 3, "loss": 1}]) == [
        *records[:2],
        resumed,
        {"step": 3, "loss": 1},
    ]


def test_the_picture_has_a_panel_for_each_logged_quantity(shown, tmp_path, monkeypatch):
    from matplotlib import pyplot

    (tmp_path / "run").mkdir()
    lines = [*shown.lines, {"event": "diverged", "step": 9, "loss": "nan", "grad_norm": "inf"}]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run" / "run.json").write_text('{"stage": "pretrain"}')
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    draw_curves([tmp_path / "run"], tmp_path / "curves.png")
    axes = figures[0].axes
    assert [axis.get_ylabel().split("\n")[0] for axis in axes] == [
        "loss", "validation loss by source", "learning rate", "gradient norm", "tokens per second", "MFU (%)",
        "peak memory (GB)",
    ]  # fmt: skip
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == ["tinytown", "persona"]
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["AdamW", "Muon"]
    assert axes[0].lines[0].get_xdata().tolist() == [2, 4, 6, 8]
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl") == lines


def test_two_processes_sample_and_stop_together_on_divergence(sandbox):
    flags = {"processes": 2, "sample_prompts": ["One day"], "logging_steps": 1}
    finite, diverged = sandbox.new_folder(), sandbox.new_folder()
    result = sandbox.run(finite, **flags, max_steps=3, sample_steps=1)
    assert result.code == 0, result.output
    assert [line["step"] for line in read_strict(finite / "samples.jsonl")] == [0, 1, 2, 3]
    lines = training_lines(read_strict(finite / "metrics.jsonl"))
    assert [(line["step"], line["tokens"]) for line in lines] == [(1, 128), (2, 256), (3, 384)]
    result = sandbox.run(diverged, **flags, optimizer="adamw", learning_rate="1e38")
    assert result.code == 70 and "error: The loss is" in result.output, result.output
    assert read_strict(diverged / "metrics.jsonl")[-1]["event"] == "diverged"
