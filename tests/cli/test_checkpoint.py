"""`rorchat checkpoint list | verify | export` through the command line."""

import json

import pytest
import torch
from faults.comparison import flip_bit
from support import command
from transformers import AutoModelForCausalLM


def succeeded(*arguments) -> str:
    result = command("checkpoint", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(code: int, *arguments) -> str:
    result = command("checkpoint", *arguments)
    assert result.returncode == code and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, (
        result.stderr
    )
    return result.stderr


def test_checkpoints_are_listed_and_verified(uninterrupted):
    listed = succeeded("list", uninterrupted)
    assert "| checkpoint-8 | 8 |" in listed and "| checkpoint-6 | 6 |" in listed and listed.count("valid |") == 2
    verified = succeeded("verify", uninterrupted)
    assert verified.splitlines() == ["checkpoint-6: valid", "checkpoint-8: valid"]
    assert succeeded("verify", uninterrupted / "checkpoint-8") == "checkpoint-8: valid\n"


def test_verify_names_the_damaged_file_and_exits_with_65(sandbox, uninterrupted):
    out = sandbox.new_folder(uninterrupted)
    flip_bit(0.5)(out / "checkpoint-8" / "optimizer.pt")
    result = command("checkpoint", "verify", out)
    assert result.returncode == 65 and "1 of 2 checkpoints" in result.stderr
    assert "optimizer.pt is damaged: its sha256 differs" in result.stdout and "checkpoint-6: valid" in result.stdout
    (out / "checkpoint-8").rename(out / "checkpoint-8.damaged-1")
    assert "set aside earlier" in succeeded("verify", out)


def test_an_exported_model_has_the_weights_of_the_checkpoint(sandbox, uninterrupted, tmp_path):
    place, command = succeeded("export", uninterrupted, tmp_path / "model").splitlines()
    assert place == f"model in {tmp_path / 'model'}"
    assert command == f'next: rorchat complete {tmp_path / "model"} "Once upon a time"'
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin")) or name == "MANIFEST.json"]
    exported, final = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", uninterrupted / "model")
    )
    for (name, a), b in zip(exported.state_dict().items(), final.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 32


def test_impossible_requests_fail_with_one_line(sandbox, uninterrupted, tmp_path):
    assert "No folder" in refused(2, "list", tmp_path / "none")
    assert "has no checkpoint" in refused(65, "list", tmp_path)
    assert "already exists" in refused(2, "export", uninterrupted, tmp_path)
    out = sandbox.new_folder(uninterrupted)
    flip_bit(0.5)(out / "checkpoint-8" / "model.safetensors")
    error = refused(65, "export", out, tmp_path / "model")
    assert "model.safetensors is damaged: its sha256 differs" in error and "checkpoint-6 is valid" in error
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("arguments", [(), ("list",), ("verify",), ("export",)])
def test_every_command_has_help(arguments):
    assert "Usage" in succeeded(*arguments, "--help")
