"""The training functions: their settings, and what they leave behind in the process that calls them."""

import dataclasses
import inspect
import logging
import os
import re
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml
from tqdm import tqdm

import rorchat
import rorchat.tokenizer
from rorchat.console import SILENCED_LOGGERS
from rorchat.errors import DataError, Interrupted, MismatchError, UsageError
from rorchat.stories import HELP_FOLDER
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments
from rorchat.training.stage import StageTrainer
from rorchat.training.tokenizer import TokenizerArguments

STAGES = {
    "train_tokenizer": TokenizerArguments,
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "dpo": DPOArguments,
    "grpo": GRPOArguments,
}
each_stage = pytest.mark.parametrize("name", STAGES)


def describe(annotation: object) -> str:
    """A type as the dataclasses write it: a function accepts paths for strings, and any sequence for a list."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return text.replace("collections.abc.Sequence[", "list[").replace(" | pathlib.Path", "").replace("typing.", "")


def describe_setting(arguments: type, name: str) -> tuple[str, object]:
    """The type and the default of a setting. HfArgumentParser changes the types of fields, but not the annotations."""
    owner = next(base for base in arguments.__mro__ if name in vars(base).get("__annotations__", {}))
    (field,) = (field for field in dataclasses.fields(arguments) if field.name == name)
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return describe(owner.__annotations__[name]), value


@each_stage
def test_the_signature_names_the_settings_of_the_stage_with_their_types_and_defaults(name):
    help_text = (HELP_FOLDER / f"{name.replace('_', '-')}.txt").read_text().split("Common settings")[0]
    own = set(re.findall(r"^  --(\w+) [A-Z]+ ", help_text, re.MULTILINE)) - {"config"}
    parameters = dict(inspect.signature(getattr(rorchat, name)).parameters)
    assert (parameters.pop("config").default, len(own) > 5) == (None, True)
    if name != "train_tokenizer":
        own |= {"output_dir", "max_steps"}
        assert parameters.pop("trainer_settings").kind == inspect.Parameter.VAR_KEYWORD
    assert set(parameters) == own
    for parameter in parameters.values():
        expected = describe_setting(STAGES[name], parameter.name)
        assert (describe(parameter.annotation), parameter.default.value) == expected, parameter.name
        assert parameter.kind == inspect.Parameter.KEYWORD_ONLY


@each_stage
def test_help_explains_every_setting(name):
    text = inspect.getdoc(getattr(rorchat, name))
    for field in dataclasses.fields(STAGES[name]):
        if field.name in inspect.signature(getattr(rorchat, name)).parameters:
            assert re.search(rf"^  {field.name} [A-Z]+ ", text, re.MULTILINE), field.name
    assert "usage:" not in text and not re.search(r"^ *--", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modl": "x"}, "unknown setting 'modl'. Did you mean 'model'?"),
        ({"learning_rat": 1e-3}, "unknown setting 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"max_steps": "ten"}, "max_steps is 'ten', a str; expected an int."),
        ({"max_steps": True}, "max_steps is True, a bool; expected an int."),
        ({"sources": "tinytown=3"}, "sources is 'tinytown=3', a str; expected a list of strings."),
        ({"model": None}, "model is None, a NoneType; expected a string."),
        ({"optim": "sgd"}, "optim cannot be set: the optimizer is chosen by `optimizer`"),
        ({"replay_share": 2.0, "sources": ["tinytown=3"], "output_dir": "x"}, "replay_share is 2.0"),
        ({"config": "demo/stf.yaml"}, "Did you mean 'demo/sft.yaml'?"),
    ],
)
def test_a_wrong_setting_is_refused_with_one_line(settings, message):
    with pytest.raises(UsageError) as error:
        rorchat.sft(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def tiny(saved, tmp_path, monkeypatch) -> dict:
    """Settings of a pretraining run of seconds, and a new working directory."""
    monkeypatch.chdir(tmp_path)
    return {
        "sources": ["tinytown=200"], "tokenizer": saved, "size": "2x2x32", "block_size": 64, "bf16": False,
        "per_device_train_batch_size": 2, "global_batch_tokens": 512, "validation_share": 0.05, "max_steps": 2,
        "output_dir": Path("run"),
    }  # fmt: skip


def test_settings_of_python_precede_those_of_the_file_and_defaults_do_not(tiny, tmp_path):
    (tmp_path / "my.yaml").write_text("{learning_rate: 1e-3, max_steps: 9, block_size: 128, optimizer: adamw_8bit}\n")
    del tiny["block_size"]
    # the default, given explicitly, and values that only Python has
    tiny |= {"optimizer": "adamw", "sample_prompts": ("One day",), "cooldown_share": np.float64(0.5)}
    result = rorchat.pretrain(config=tmp_path / "my.yaml", **tiny)
    assert result.metrics["steps"] == 2 and result.model_folder == Path("run/model")
    written = yaml.safe_load((result.run_folder / "config.yaml").read_text())
    assert (written["max_steps"], written["block_size"], written["learning_rate"]) == (2, 128, 1e-3)
    assert (written["optimizer"], written["cooldown_share"]) == ("adamw", 0.5)
    assert (written["sample_prompts"], written["output_dir"]) == (["One day"], "run")
    assert set(written) == {*tiny, "learning_rate", "block_size"}  # nothing that was not given


def read_process_state() -> tuple:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    levels = [logging.getLogger(name).level for name in SILENCED_LOGGERS]
    return dict(os.environ), handlers, levels, list(warnings.filters)


def test_runs_follow_each_other_in_one_process_and_leave_it_unchanged(tiny, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = read_process_state()
    with pytest.raises(DataError, match="none.txt"):
        rorchat.pretrain(**tiny | {"sources": ["text=none.txt"]})
    assert read_process_state() == before
    result = rorchat.pretrain(**tiny)  # the folder is not locked
    assert result.metrics["eval_loss"] > 0
    assert read_process_state() == before
    assert rorchat.pretrain(**tiny) == result  # finished
    with pytest.raises(MismatchError, match="contains another run"):
        rorchat.pretrain(**tiny | {"max_steps": 3})
    with pytest.raises(UsageError):
        rorchat.pretrain(**tiny | {"block_size": 1})
    assert read_process_state() == before


def press_ctrl_c(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_in_training_saves_and_raises_and_the_next_call_resumes(tiny, monkeypatch):
    settings = tiny | {"max_steps": 4}
    with monkeypatch.context() as patch:
        step = StageTrainer.training_step
        patch.setattr(StageTrainer, "training_step", lambda *args, **kwargs: [press_ctrl_c(), step(*args, **kwargs)][1])
        with pytest.raises(Interrupted, match="Stopped at step 1, which is saved"):
            rorchat.pretrain(**settings)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert rorchat.pretrain(**settings).metrics["steps"] == 4
    assert '"event": "resumed", "step": 1' in Path("run/metrics.jsonl").read_text(encoding="utf-8")


def test_an_error_in_training_closes_the_progress_bar(tiny, monkeypatch):
    monkeypatch.setattr("rorchat.training.callbacks.metrics.shows_bars", lambda: True)
    monkeypatch.setattr(StageTrainer, "training_step", lambda *args, **kwargs: 1 / 0)
    tqdm._instances.clear()
    with pytest.raises(ZeroDivisionError):  # its traceback keeps the run
        rorchat.pretrain(**tiny)
    assert not tqdm._instances


def test_ctrl_c_before_training_raises_instead_of_ending_the_process(tiny, monkeypatch):
    monkeypatch.setattr(rorchat.tokenizer, "load_tokenizer", press_ctrl_c)
    with pytest.raises(Interrupted, match="Call the function again"):
        rorchat.pretrain(**tiny)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_tokenizer_is_trained_once(tmp_path):
    settings = {"sources": ["tinytown=50"], "vocab_size": 320, "output_dir": tmp_path / "tokenizer"}
    result = rorchat.train_tokenizer(**settings)
    assert (result.metrics["vocab_size"], result.folder) == (320, tmp_path / "tokenizer")
    assert rorchat.train_tokenizer(**settings) == result
    assert len(rorchat.load_tokenizer(str(result.folder))) == 320
    with pytest.raises(MismatchError, match="another tokenizer"):
        rorchat.train_tokenizer(**settings | {"vocab_size": 384})
