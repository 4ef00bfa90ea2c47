"""Every setting inherited from Transformers and TRL works, is refused or is harmless: see inherited_options.yaml."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from trl import DPOConfig, GRPOConfig, SFTConfig

from rorchat.errors import UsageError
from rorchat.training.arguments import StageParser, parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

ROOT = Path(__file__).resolve().parents[2]
TABLE = yaml.safe_load((Path(__file__).parent / "inherited_options.yaml").read_text(encoding="utf-8"))
WORKS, HARMLESS = ([name for names in TABLE[key].values() for name in names.split()] for key in ("works", "harmless"))
STAGES = [
    (PretrainArguments, TrainingArguments),
    (SFTArguments, SFTConfig),
    (DPOArguments, DPOConfig),
    (GRPOArguments, GRPOConfig),
]


@pytest.mark.parametrize(("stage", "library"), STAGES)
def test_every_inherited_setting_works_or_is_harmless_or_refused(stage, library):
    """A setting that is new in a later version of the libraries is in no class: decide, and add it to one."""
    inherited = {entry.name for entry in fields(library)}
    assert len(inherited) > 100
    assert inherited - stage.UNSUPPORTED_ARGS.keys() - {*WORKS, *HARMLESS} == set()


def test_no_setting_is_in_two_classes_or_in_none_of_the_stages():
    accepted = {
        entry.name for stage, library in STAGES for entry in fields(library) if entry.name not in stage.UNSUPPORTED_ARGS
    }
    assert sorted([*WORKS, *HARMLESS]) == sorted(accepted)
    known = {entry.name for stage, _ in STAGES for entry in fields(stage)}
    assert {name for stage, _ in STAGES for name in stage.UNSUPPORTED_ARGS} <= known


def test_the_tests_that_the_table_names_exist():
    for test in TABLE["works"]:
        path, name = test.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), test


def other_value(action) -> object:
    """A value of the right type that is not the default of a setting."""
    kind = getattr(action.type, "__name__", "")
    if kind == "string_to_bool":
        return not action.default
    value = 7 if kind in ("int", "float") else "other"
    return [value] if action.nargs == "+" else value


@pytest.mark.parametrize("stage", [stage for stage, _ in STAGES])
def test_an_unsupported_setting_is_refused_with_its_reason(stage):
    options = {action.dest: action for action in StageParser(stage)._actions}
    refused = stage.UNSUPPORTED_ARGS.keys() & options.keys()
    values = {name: other_value(options[name]) for name in refused}
    with pytest.raises(UsageError) as caught:
        parse(stage, [], values)
    message = str(caught.value)
    assert [name for name in refused if f"{name} cannot be set: {stage.UNSUPPORTED_ARGS[name]}." not in message] == []
    assert "\n" not in message


def test_a_refusal_names_flags_and_keys_alike(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("packing: false\n")
    with pytest.raises(
        UsageError, match="^neftune_noise_alpha cannot be set: .*packing cannot be set: rorchat encodes"
    ):
        parse(SFTArguments, ["--config", str(config), "--neftune_noise_alpha", "5"])
