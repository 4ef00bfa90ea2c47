"""`rorchat checkpoint list | verify | export`, as they are called."""

import json

import pytest
from faults.comparison import flipped
from support import command
from transformers import AutoModelForCausalLM


def said(*words) -> str:
    done = command("checkpoint", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(code: int, *words) -> str:
    done = command("checkpoint", *words)
    assert done.returncode == code and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_what_there_is_is_listed_and_verified(whole):
    listed = said("list", whole)
    assert "| checkpoint-8 | 8 |" in listed and "| checkpoint-6 | 6 |" in listed and listed.count("whole") == 2
    verified = said("verify", whole)
    assert verified.splitlines() == ["checkpoint-6: whole", "checkpoint-8: whole"]
    assert said("verify", whole / "checkpoint-8") == "checkpoint-8: whole\n"


def test_damage_is_told_by_its_file_and_ends_with_65(bench, whole):
    out = bench.fresh(whole)
    flipped(0.5)(out / "checkpoint-8" / "optimizer.pt")
    done = command("checkpoint", "verify", out)
    assert done.returncode == 65 and "1 of 2 checkpoints" in done.stderr
    assert "optimizer.pt is not what was written" in done.stdout and "checkpoint-6: whole" in done.stdout
    (out / "checkpoint-8").rename(out / "checkpoint-8.damaged-1")
    assert "was set aside before" in said("verify", out)


def test_an_exported_model_is_a_plain_folder_with_the_weights_of_the_checkpoint(bench, whole, tmp_path):
    assert said("export", whole, tmp_path / "model") == f"{tmp_path / 'model'}\n"
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin")) or name == "MANIFEST.json"]
    made, final = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "model", whole / "model"))
    for (name, a), b in zip(made.state_dict().items(), final.state_dict().values(), strict=True):
        assert a.equal(b), name
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["model_max_length"] == 32


def test_what_cannot_be_is_refused_in_one_line(bench, whole, tmp_path):
    assert "No folder" in refused(2, "list", tmp_path / "none")
    assert "has no checkpoint" in refused(65, "list", tmp_path)
    assert "is there already" in refused(2, "export", whole, tmp_path)
    out = bench.fresh(whole)
    flipped(0.5)(out / "checkpoint-8" / "model.safetensors")
    told = refused(65, "export", out, tmp_path / "model")
    assert "model.safetensors is not what was written" in told and "checkpoint-6 is whole" in told
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("words", [(), ("list",), ("verify",), ("export",)])
def test_every_command_has_help(words):
    assert "Usage" in said(*words, "--help")
