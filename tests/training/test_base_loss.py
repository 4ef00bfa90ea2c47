"""The base loss: which text it is measured on, and what each stage reports."""

import contextlib
import io
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import DOCUMENTS, ROOT, write_documents

from rorchat.errors import DataError, MismatchError, UsageError, exits_with_one_line
from rorchat.evaluation import base_text
from rorchat.evaluation.base_text import find_base_text, open_run_stores
from rorchat.evaluation.loss import compute_batch_loss
from rorchat.inference.engine import load_model
from rorchat.lineage import find_previous_runs
from rorchat.mixture.dataset import ValidationRows
from rorchat.reporting.tables import format_forgetting_table
from rorchat.reporting.write import write_report
from rorchat.tokenizer import load_tokenizer, token_bytes
from rorchat.tokens.prepare import prepare
from rorchat.training import stage as stage_module

SHARE = 0.2
FLAGS = {
    "validation_share": SHARE, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 3, "bf16": "false",
    "eval_strategy": "no", "save_strategy": "no", "seed": 1,
}  # fmt: skip
ROWS = {"block_size": 256, "global_batch_tokens": 512, "optimizer": "muon"}


def run(stage: str, out: Path, exit_code: int = 0, **flags) -> str:
    """Run a recipe's `main` in this process, check its exit code and return what it wrote to stderr."""
    arguments = []
    for name, value in (FLAGS | flags | {"output_dir": out}).items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    stderr, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / f"{stage}.py"))["main"])(arguments)
        except SystemExit as exit_:
            code = exit_.code
    assert code == exit_code, stderr.getvalue()
    return stderr.getvalue()


def base_loss_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "base_loss" in line]


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def story(saved, tmp_path_factory) -> Path:
    """pretrain -> midtrain -> sft -> dpo of a model of one layer; what each wrote to stderr is in stderr.json."""
    out = tmp_path_factory.mktemp("story")
    stderr = {
        "pretrain": run("pretrain", out / "pretrain", sources=["tinytown=200"], tokenizer=saved, size="1x2x16", **ROWS),
        "midtrain": run(
            "pretrain", out / "midtrain", model=out / "pretrain", sources=["tinytown=200", "chat:tinytown=200"], **ROWS
        ),
        "sft": run("sft", out / "sft", model=out / "midtrain", sources=["tinytown=60"], learning_rate=1e-2),
        "dpo": run("dpo", out / "dpo", model=out / "sft", sources=["tinytown=40"], learning_rate=1e-3),
    }
    (out / "stderr.json").write_text(json.dumps(stderr))
    return out


def test_every_stage_measures_before_and_after(story):
    assert base_loss_lines(story / "pretrain") == []
    assert not any(key.startswith("base_") for key in read_metrics(story / "pretrain"))
    after = read_metrics(story / "pretrain")["eval_loss"]
    for stage in ("midtrain", "sft", "dpo"):
        first, last = base_loss_lines(story / stage)
        assert (first["step"], first["tokens"], last["step"]) == (0, 0, FLAGS["max_steps"])
        assert first["base_loss"] == pytest.approx(after, abs=1e-4)  # of the stage before
        metrics, after = read_metrics(story / stage), last["base_loss"]
        assert (metrics["base_loss_before"], metrics["base_loss"]) == (first["base_loss"], after)
        assert abs(after - first["base_loss"]) > 1e-4
        assert metrics["base_bits_per_byte"] == last["base_bits_per_byte"] != metrics["base_bits_per_byte_before"]
        assert not any(name.startswith(("rewards", "logps", "entropy")) for name in first | last)  # TRL's averages


def test_loss_is_that_of_the_whole_validation_split(story):
    chat = load_model(str(story / "sft"))
    (store,) = open_run_stores(*[*find_previous_runs(str(story / "sft"))][-1], chat.tokenizer)
    assert store.folder == story / "pretrain" / "tokens" / "tinytown"
    sums = 0.0
    ids = torch.from_numpy(store.slice("validation", 0, store.tokens("validation")))
    for start in range(0, len(ids) - 1, 255):
        part = ids[None, start : start + 256]
        sums += compute_batch_loss(
            chat.model, {"input_ids": part, "labels": part}, torch.tensor(token_bytes(chat.tokenizer))
        ).nats
    metrics = read_metrics(story / "sft")
    assert metrics["base_tokens"] == len(ids) - 1
    assert metrics["base_loss"] == pytest.approx(sums / (len(ids) - 1), abs=1e-5)


def test_text_is_announced_and_differences_are_reported(story):
    stderr = json.loads((story / "stderr.json").read_text())
    tokens = read_metrics(story / "sft")["base_tokens"]
    origin = f"{tokens:,} held-out tokens of {story / 'pretrain' / 'tokens' / 'tinytown'}"
    assert "base loss" not in stderr["pretrain"]
    for stage in ("midtrain", "sft", "dpo"):
        assert f"base loss: measured on {origin}, before and after this stage" in stderr[stage]
        assert "warning: this stage" not in stderr[stage]
        assert f"step 0/{FLAGS['max_steps']}  base loss " in stderr[stage]
    metrics = read_metrics(story / "sft")
    before, after = metrics["base_loss_before"], metrics["base_loss"]
    table = format_forgetting_table([story / name for name in ("pretrain", "midtrain", "sft", "dpo")]).splitlines()
    assert len(table) == 2 + 3
    assert table[3].startswith(f"| sft | {origin} | {before:.3f} | {after:.3f} | {after - before:+.3f} | ")
    report = write_report(story)[0].read_text()
    assert "\n".join(table) in report
    assert report.index("| pretrain | ") < report.index("| midtrain | ")  # which began with the other's model
    assert "forgot" not in write_report(story / "pretrain")[0].read_text()


def test_measuring_does_not_change_training(story, tmp_path, monkeypatch):
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "learning_rate": 1e-2}
    monkeypatch.setattr(stage_module, "create_base_loss_callback", lambda *given: None)
    run("sft", tmp_path / "without", **flags)
    assert base_loss_lines(tmp_path / "without") == []
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (tmp_path / "without", story / "sft")]
    assert weights[0] == weights[1]


def test_unknown_pretraining_needs_a_given_text(story, spec, tmp_path):
    shutil.copytree(story / "pretrain" / "model", tmp_path / "stranger")
    flags = {"model": tmp_path / "stranger", "sources": ["tinytown=60"], "max_steps": 1}
    message = run("sft", tmp_path / "unknown", **flags)
    line = next(line for line in message.splitlines() if line.startswith("base loss"))
    assert line == (
        "base loss: not measured, because no pretraining run with token stores was found for "
        f"{tmp_path / 'stranger'}. To measure it, pass a token store or a source as --base_text."
    )
    assert base_loss_lines(tmp_path / "unknown") == []
    message = run("sft", tmp_path / "given", base_text=spec, **flags)
    assert f"tokens of {spec}, before and after" in message
    assert [line["step"] for line in base_loss_lines(tmp_path / "given")] == [0, 1]


def test_midtraining_with_a_smaller_validation_share_warns(story, tmp_path):
    message = run(
        "pretrain", tmp_path / "run", model=story / "pretrain", sources=["tinytown=200"], **ROWS | {"max_steps": 1},
        validation_share=0.1,
    )  # fmt: skip
    assert (
        "; warning: this stage has validation_share 0.1, but the text was split with 0.2, so parts of it may be"
        in message
    )


def test_resumed_run_with_another_text_reports_no_difference(story, spec, tmp_path):
    out = tmp_path / "run"
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "max_steps": 1, "save_strategy": "steps"}
    run("sft", out, save_steps=1, **flags)
    assert read_metrics(out)["base_loss_before"] == base_loss_lines(out)[0]["base_loss"]
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))
    message = run("sft", out, save_steps=1, base_text=spec, **flags)
    store = story / "pretrain" / "tokens" / "tinytown"
    assert re.search(rf"the run started with a different text, [\d,]+ held-out tokens of {store}\. The change", message)
    assert "base_loss" in read_metrics(out) and "base_loss_before" not in read_metrics(out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"validation_share": 0.1}, "validation_share 0.1, but .* with 0.2: .* Give --validation_share 0.2"),
        ({"base_text": "tinytown=100"}, "base_text tinytown=100 is also training data"),
    ],
)
def test_measured_documents_are_not_replayed(flags, message, story, tmp_path):
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "replay": "tinytown=100"} | flags
    assert re.search(message, run("sft", tmp_path / "run", exit_code=2, **flags))


def test_model_trained_on_documents_only_is_no_chat_model(story, moved):
    for stage in ("midtrain", "sft", "dpo"):  # midtraining had conversations
        load_tokenizer(str(moved / stage / "model"), require_chat=True)
    message = run("dpo", moved / "out", exit_code=78, model=moved / "pretrain", sources=["tinytown=40"])
    assert "was pretrained on documents only, according to run.json" in message
    record = json.loads((moved / "midtrain" / "run.json").read_text())
    record["data"] = [source for source in record["data"] if not source["source"].startswith("chat:")]
    (moved / "midtrain" / "run.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match="documents only"):
        load_tokenizer(str(moved / "midtrain" / "model"), require_chat=True)


# Finding the text


@pytest.fixture
def moved(story, tmp_path) -> Path:
    """A copy of the story in which every run names the model beside it."""
    moved = Path(shutil.copytree(story, tmp_path / "moved"))
    for path in moved.glob("*/run.json"):
        record = json.loads(path.read_text())
        if "model" in record["settings"]:
            record["settings"]["model"] = str(moved / Path(record["settings"]["model"]).name)
        path.write_text(json.dumps(record))
    return moved


def previous_run_names(model: Path) -> list[str]:
    return [folder.name for folder, _ in find_previous_runs(str(model))]


def test_previous_runs_are_found_from_run_model_or_checkpoint(story):
    chain = ["dpo", "sft", "midtrain", "pretrain"]
    assert previous_run_names(story / "dpo") == previous_run_names(story / "dpo" / "model") == chain
    assert previous_run_names(story / "sft" / "checkpoint-2") == chain[1:]
    assert previous_run_names(story) == previous_run_names(story / "nowhere") == previous_run_names(Path("gpt2")) == []


def test_moved_model_is_found_next_to_its_run(story, tmp_path):
    copy = Path(shutil.copytree(story, tmp_path / "copy"))
    shutil.move(story / "midtrain", story / "gone")
    try:
        assert [folder for folder, _ in find_previous_runs(str(copy / "sft"))][1:] == [
            copy / "midtrain",
            story / "pretrain",
        ]
    finally:
        shutil.move(story / "gone", story / "midtrain")


def test_retrained_run_is_not_a_previous_run(moved):
    assert previous_run_names(moved / "dpo") == ["dpo", "sft", "midtrain", "pretrain"]
    shutil.copy(moved / "sft" / "model" / "model.safetensors", moved / "midtrain" / "model")
    assert previous_run_names(moved / "dpo") == ["dpo", "sft"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"settings": 3, "inputs": 1}', '{"settings": {}, "inputs": {}}']
)
def test_unusable_record_ends_the_chain(content, moved, saved):
    (moved / "sft" / "run.json").write_text(content)
    assert previous_run_names(moved / "dpo") in (["dpo"], ["dpo", "sft"])
    assert find_base_text(None, str(moved / "dpo"), load_tokenizer(str(saved)), 64) is None


def test_missing_and_foreign_stores_are_skipped(moved, saved):
    tokenizer, other = load_tokenizer(str(saved)), load_tokenizer(str(saved))
    other.add_tokens(["Tinytown"])
    assert find_base_text(None, str(moved / "dpo"), other, 64) is None
    text = find_base_text(None, str(moved / "dpo"), tokenizer, 64)
    assert text.origins == [str(moved / "pretrain" / "tokens" / "tinytown")] and text.validation_share == SHARE
    shutil.rmtree(moved / "pretrain" / "tokens")
    text = find_base_text(None, str(moved / "dpo"), tokenizer, 64)  # midtraining had the documents too
    assert text.origins == [str(moved / "midtrain" / "tokens" / "tinytown")]
    shutil.rmtree(moved / "midtrain" / "tokens" / "tinytown")
    text = find_base_text(None, str(moved / "dpo"), tokenizer, 64)
    assert text.origins == [str(moved / "midtrain" / "tokens" / "chat-tinytown")]  # better than nothing


class NumberedRows(ValidationRows):
    def __getitem__(self, row: int) -> dict:
        return super().__getitem__(row) | {"number": row}


@pytest.mark.parametrize("limit", [40, 200])
def test_long_text_is_sampled_evenly(limit, store, spec, tokenizer, monkeypatch):
    monkeypatch.setattr(base_text, "MAX_TOKENS", limit)
    monkeypatch.setattr(base_text, "ValidationRows", NumberedRows)
    text = find_base_text(str(store.folder), "gpt2", tokenizer, 16)
    assert text.available_tokens == store.tokens("validation") - 1 > 2 * limit
    assert limit - 15 <= text.tokens <= limit + 15
    assert text.describe() == f"{text.tokens:,} of {text.available_tokens:,} held-out tokens of {store.folder}"
    rows = [text.rows[index] for index in range(len(text.rows))]
    assert text.tokens == sum(len(row["input_ids"]) - 1 for row in rows)
    gaps = np.diff([*(row["number"] for row in rows), len(ValidationRows(store, 16))])
    assert rows[0]["number"] == 0 and gaps.min() > 0 and np.ptp(gaps) <= 1
    text = find_base_text(spec, "gpt2", tokenizer, 16)
    assert (text.tokens, text.available_tokens, text.describe()) == (limit, None, f"the first {limit} tokens of {spec}")


def test_short_text_is_measured_once_per_token(store, spec, tokenizer):
    text = find_base_text(str(store.folder), "gpt2", tokenizer, 16)
    assert text.tokens == text.available_tokens == store.tokens("validation") - 1
    assert text.describe() == f"{text.available_tokens:,} held-out tokens of {store.folder}"
    text = find_base_text(spec, "gpt2", tokenizer, 16)
    ids = [token for row in text.rows for token in row["input_ids"][:-1].tolist()]
    assert len(ids) == text.tokens == text.available_tokens
    assert ids.count(store.manifest.end_of_text_id) == len(DOCUMENTS)


def test_unreadable_text_raises(tokenizer, saved, tmp_path):
    for given, error, message in (
        ("tinytwn=5", UsageError, "Did you mean 'tinytown'"),
        ("persona=5", UsageError, "documents are expected here"),
        (f"text={tmp_path}/none.txt", DataError, "none.txt"),
        (f"store={tmp_path}", DataError, "not a token store"),
    ):
        with pytest.raises(error, match=message):
            find_base_text(given, "gpt2", tokenizer, 64)
    other = load_tokenizer(str(saved))
    other.add_tokens(["Tinytown"])
    prepare(write_documents(tmp_path, DOCUMENTS), other, tmp_path / "store", validation_share=SHARE)
    with pytest.raises(MismatchError, match="another tokenizer"):
        find_base_text(str(tmp_path / "store"), "gpt2", tokenizer, 64)
