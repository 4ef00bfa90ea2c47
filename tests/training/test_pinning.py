"""A run reads the same commit of a dataset on the Hub when it resumes, and says if there is a newer one."""

import json
import signal
import subprocess
import time

import preloaded
import pytest
from fake_hub import FakeHub
from faults.harness import weights_sha256
from hub_datasets import QUESTIONS, as_lines, as_parquet, card
from recipe_commands import inside, succeeded
from support import ROOT, TEXTS

from rorchat.errors import RemoteError
from rorchat.tokens.store import Manifest
from rorchat.training.pinning import find_pins

FIRST, SECOND = "1" * 40, "2" * 40
PINNED = f"text=me/docs:default:split=train@{FIRST}"


@pytest.fixture
def hub_at(monkeypatch):
    """Sets the newest commit of every dataset on the Hub; None if the Hub cannot be reached."""

    def set_commit(commit):
        def pin(spec):
            if commit is None:
                raise RemoteError("no network")
            return f"{spec}:default:split=train@{commit}" if spec.startswith("text=me/") else spec

        def find(dataset):
            if commit is None:
                raise RemoteError("no network")
            return commit

        monkeypatch.setattr("rorchat.training.pinning.pin_spec", pin)
        monkeypatch.setattr("rorchat.training.pinning.find_commit", find)

    return set_commit


def test_a_new_run_takes_the_newest_commit_of_its_datasets(hub_at):
    hub_at(FIRST)
    assert find_pins(["text=me/docs", "tinytown=60", "store=tokens/mine"], {}) == {"text=me/docs": PINNED}


def test_a_resumed_run_keeps_its_commit_and_tells_that_there_is_a_newer_one(hub_at, capsys):
    record = {"hub": {"text=me/docs": PINNED}, "inputs": {"sources": {PINNED: "digest"}}}
    for commit, output in (
        (FIRST, ""),
        (None, ""),
        (SECOND, "the Hub now has revision 222222222222; this run continues"),
    ):
        hub_at(commit)
        assert find_pins(["text=me/docs"], record) == {"text=me/docs": PINNED}
        printed = capsys.readouterr().err
        assert printed == output == "" or (output in printed and printed.count("\n") == 1)


def test_a_run_of_an_earlier_version_without_commits_is_not_pinned(hub_at):
    hub_at(SECOND)
    record = {"inputs": {"sources": {"text=me/docs": "digest"}}}
    assert find_pins(["text=me/docs", "text=me/other"], record) == {
        "text=me/other": f"text=me/other:default:split=train@{SECOND}"
    }


def test_an_unreachable_dataset_ends_a_new_run_unless_it_is_optional(hub_at):
    hub_at(None)
    with pytest.raises(RemoteError):
        find_pins(["text=me/docs"], {})
    assert find_pins(["text=me/docs"], {}, optional={"text=me/docs"}) == {}


PRETRAIN = (
    "--size 2x2x32 --per_device_train_batch_size 2 --save_steps 10 --logging_steps 100 --eval_strategy no "
    "--validation_share 0.2 --bf16 false"
)
ROWS = ["--block_size", 32, "--global_batch_tokens", 128]


def start(hub, home, stage, *argv):
    environment = hub.environment(home, token=None) | {"PYTHONPATH": str(ROOT)}
    command = [preloaded.client("rorchat"), stage, *map(str, argv)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment | {"HF_HUB_OFFLINE": "0"}, cwd=home, text=True, stderr=pipe)


def finish(process, code=0):
    _, printed = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


@pytest.mark.slow
def test_an_interrupted_run_reads_the_same_rows_after_the_dataset_has_changed(saved, tmp_path):
    rows = [{"body": text} for text in TEXTS]
    with FakeHub() as hub:
        first = {"README.md": card(license="cc-by-4.0"), "train.parquet": as_parquet(rows)}
        dataset = hub.add_dataset("me/docs", first)
        options = ["--sources", "text=me/docs", "--columns", "text=body", "--tokenizer", saved, *PRETRAIN.split()]
        steps, options = ["--max_steps", 100], [*options, *ROWS]
        whole, out = tmp_path / "whole", tmp_path / "out"
        finish(start(hub, tmp_path, "pretrain", *options, *steps, "--output_dir", whole))

        interrupted = start(hub, tmp_path, "pretrain", *options, *steps, "--output_dir", out)
        deadline = time.monotonic() + 120
        while not (out / "checkpoint-10" / "MANIFEST.json").is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        interrupted.send_signal(signal.SIGTERM)
        finish(interrupted, 75)
        dataset.commits.append({"train.parquet": as_parquet(rows[::-1][:200])})
        output = finish(start(hub, tmp_path, "pretrain", *options, *steps, "--output_dir", out))
        commits = [dataset.commit_id(index) for index in (0, 1)]
        assert f"the Hub now has revision {commits[1][:12]}; this run continues with {commits[0][:12]}" in output
        assert weights_sha256(out) == weights_sha256(whole)

        (data,) = json.loads((out / "run.json").read_text())["data"]
        expected = {"dataset": "me/docs", "config": "default", "split": "train", "revision": commits[0]}
        assert data["hub"] == expected and data["licence"] == "cc-by-4.0"
        manifest = Manifest.read(out / "tokens" / "text")
        assert manifest.hub_fingerprint == commits[0] and manifest.source.endswith(f":text=body@{commits[0]}")

        other = start(hub, tmp_path, "pretrain", *options, "--output_dir", tmp_path / "new", "--max_steps", 4)
        assert "licence: unstated" in finish(other)  # the new commit has no card
        assert json.loads((tmp_path / "new" / "run.json").read_text())["data"][0]["hub"]["revision"] == commits[1]


@pytest.mark.slow
def test_a_chat_stage_records_the_commit_and_prints_the_licence(saved, tmp_path):
    with FakeHub() as hub:
        asked = [{"q": row["question"], "a": row["answer"]} for row in QUESTIONS]
        dataset = hub.add_dataset("me/qa", {"README.md": card(license="cc-by-nc-4.0"), "train.jsonl": as_lines(asked)})
        base = tmp_path / "base"
        succeeded(inside(
            "pretrain", "--sources", "tinytown=60", "--tokenizer", saved, *PRETRAIN.split(), "--output_dir", base,
            "--max_steps", 2, "--block_size", 128, "--global_batch_tokens", 512,
        ))  # fmt: skip
        options = [
            "--model", base, "--sources", "messages=me/qa", "persona=50", "--columns", "user=q", "assistant=a",
            "--max_steps", 2, "--validation_share", 0.2, "--bf16", "false", "--output_dir", tmp_path / "sft",
        ]  # fmt: skip
        output = finish(start(hub, tmp_path, "sft", *options))
        assert (
            "licence: cc-by-nc-4.0 (not for commercial use)" in output and f"revision {dataset.commit_id()}" in output
        )
        data = json.loads((tmp_path / "sft" / "run.json").read_text())["data"]
        assert data[0]["hub"]["revision"] == dataset.commit_id() and data[0]["kept"] == len(QUESTIONS)
    assert "already finished" in succeeded(inside("sft", *options)).stderr  # the Hub is gone
