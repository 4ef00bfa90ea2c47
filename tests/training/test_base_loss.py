"""TRAINING: what each stage costs the base, measured on what its pretraining held out."""

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
from rorchat.evaluation.loss import compute_batch_loss
from rorchat.inference.engine import load_model
from rorchat.mixture.dataset import ValidationRows
from rorchat.report import format_forgetting_table, write_report
from rorchat.tokenizer import load_tokenizer, token_bytes
from rorchat.tokens.prepare import prepare
from rorchat.training import base_loss
from rorchat.training import stage as stage_module
from rorchat.training.base_loss import base_text, runs_behind

SHARE = 0.2
FLAGS = {
    "validation_share": SHARE, "per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 3, "bf16": "false",
    "eval_strategy": "no", "save_strategy": "no", "seed": 1,
}  # fmt: skip
ROWS = {"block_size": 256, "global_batch_tokens": 512, "optimizer": "muon"}


def run(stage: str, out: Path, ends: int = 0, **flags) -> str:
    """A recipe's `main` in this process, which ends with this code: what it wrote to stderr."""
    words = []
    for name, value in (FLAGS | flags | {"output_dir": out}).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / f"{stage}.py"))["main"])(words)
        except SystemExit as stopped:
            code = stopped.code
    assert code == ends, said.getvalue()
    return said.getvalue()


def base_lines(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "base_loss" in line]


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def story(saved, tmp_path_factory) -> Path:
    """pretrain -> midtrain -> sft -> dpo of a model of one layer; what each said stands in said.json."""
    out = tmp_path_factory.mktemp("story")
    said = {
        "pretrain": run("pretrain", out / "pretrain", sources=["tinytown=200"], tokenizer=saved, size="1x2x16", **ROWS),
        "midtrain": run(
            "pretrain", out / "midtrain", model=out / "pretrain", sources=["tinytown=200", "chat:tinytown=200"], **ROWS
        ),
        "sft": run("sft", out / "sft", model=out / "midtrain", sources=["tinytown=60"], learning_rate=1e-2),
        "dpo": run("dpo", out / "dpo", model=out / "sft", sources=["tinytown=40"], learning_rate=1e-3),
    }
    (out / "said.json").write_text(json.dumps(said))
    return out


def test_each_stage_measures_the_base_before_its_first_step_and_after_its_last(story):
    assert base_lines(story / "pretrain") == []
    assert not any(key.startswith("base_") for key in metrics_of(story / "pretrain"))
    after = metrics_of(story / "pretrain")["eval_loss"]
    for stage in ("midtrain", "sft", "dpo"):
        first, last = base_lines(story / stage)
        assert (first["step"], first["tokens"], last["step"]) == (0, 0, FLAGS["max_steps"])
        assert first["base_loss"] == pytest.approx(after, abs=1e-4)  # of the stage before
        metrics, after = metrics_of(story / stage), last["base_loss"]
        assert (metrics["base_loss_before"], metrics["base_loss"]) == (first["base_loss"], after)
        assert abs(after - first["base_loss"]) > 1e-4
        assert metrics["base_bits_per_byte"] == last["base_bits_per_byte"] != metrics["base_bits_per_byte_before"]
        assert not any(name.startswith(("rewards", "logps", "entropy")) for name in first | last)  # TRL's averages


def test_it_is_the_loss_over_all_that_pretraining_held_out(story):
    chat = load_model(str(story / "sft"))
    (store,) = base_loss.stores_of(*[*runs_behind(str(story / "sft"))][-1], chat.tokenizer)
    assert store.folder == story / "pretrain" / "tokens" / "tinytown"
    sums = 0.0
    ids = torch.from_numpy(store.slice("validation", 0, store.tokens("validation")))
    for start in range(0, len(ids) - 1, 255):
        part = ids[None, start : start + 256]
        sums += compute_batch_loss(
            chat.model, {"input_ids": part, "labels": part}, torch.tensor(token_bytes(chat.tokenizer))
        ).nats
    metrics = metrics_of(story / "sft")
    assert metrics["base_tokens"] == len(ids) - 1
    assert metrics["base_loss"] == pytest.approx(sums / (len(ids) - 1), abs=1e-5)


def test_it_says_on_what_it_measures_and_the_report_shows_what_was_lost(story):
    said = json.loads((story / "said.json").read_text())
    tokens = metrics_of(story / "sft")["base_tokens"]
    where = f"{tokens:,} held-out tokens of {story / 'pretrain' / 'tokens' / 'tinytown'}"
    assert "forgetting" not in said["pretrain"]
    for stage in ("midtrain", "sft", "dpo"):
        assert f"forgetting is measured on {where}\n" in said[stage] and "warning" not in said[stage]
        assert f"step 0/{FLAGS['max_steps']}  base loss " in said[stage]
    metrics = metrics_of(story / "sft")
    before, after = metrics["base_loss_before"], metrics["base_loss"]
    table = format_forgetting_table([story / name for name in ("pretrain", "midtrain", "sft", "dpo")]).splitlines()
    assert len(table) == 2 + 3
    assert table[3].startswith(f"| sft | {where} | {before:.3f} | {after:.3f} | {after - before:+.3f} | ")
    report = write_report(story)[0].read_text()
    assert "\n".join(table) in report
    assert report.index("| pretrain | ") < report.index("| midtrain | ")  # which began with the other's model
    assert "forgot" not in write_report(story / "pretrain")[0].read_text()


def test_measuring_changes_nothing_of_the_training(story, tmp_path, monkeypatch):
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "learning_rate": 1e-2}
    monkeypatch.setattr(stage_module, "forgetting_of", lambda *given: None)
    run("sft", tmp_path / "without", **flags)
    assert base_lines(tmp_path / "without") == []
    weights = [(out / "model" / "model.safetensors").read_bytes() for out in (tmp_path / "without", story / "sft")]
    assert weights[0] == weights[1]


def test_where_nothing_is_known_of_the_pretraining_it_says_so_or_measures_what_it_is_given(story, spec, tmp_path):
    shutil.copytree(story / "pretrain" / "model", tmp_path / "stranger")
    flags = {"model": tmp_path / "stranger", "sources": ["tinytown=60"], "max_steps": 1}
    said = run("sft", tmp_path / "unknown", **flags)
    line = next(line for line in said.splitlines() if line.startswith("forgetting"))
    assert line == (
        "forgetting is not measured: no pretraining with its token stores is known behind "
        f"{tmp_path / 'stranger'}. Give --base_text, a token store or a source."
    )
    assert base_lines(tmp_path / "unknown") == []
    said = run("sft", tmp_path / "given", base_text=spec, **flags)
    assert f"tokens of {spec}\n" in said
    assert [line["step"] for line in base_lines(tmp_path / "given")] == [0, 1]


def test_a_midtraining_that_holds_out_less_than_its_base_is_warned(story, tmp_path):
    said = run(
        "pretrain", tmp_path / "run", model=story / "pretrain", sources=["tinytown=200"], **ROWS | {"max_steps": 1},
        validation_share=0.1,
    )  # fmt: skip
    assert (
        "; warning: validation_share is 0.1, and 0.2 there: of what was held out there some may be trained on" in said
    )


def test_a_run_that_goes_on_with_another_text_says_so_and_gives_no_difference(story, spec, tmp_path):
    out = tmp_path / "run"
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "max_steps": 1, "save_strategy": "steps"}
    run("sft", out, save_steps=1, **flags)
    assert metrics_of(out)["base_loss_before"] == base_lines(out)[0]["base_loss"]
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": False}))
    said = run("sft", out, save_steps=1, base_text=spec, **flags)
    store = story / "pretrain" / "tokens" / "tinytown"
    assert re.search(rf"the first start measured on [\d,]+ held-out tokens of {store}, which is another text", said)
    assert "base_loss" in metrics_of(out) and "base_loss_before" not in metrics_of(out)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"validation_share": 0.1}, "validation_share 0.1, .* holds out 0.2: .* Give --validation_share 0.2"),
        ({"base_text": "tinytown=100"}, "base_text tinytown=100 is what is trained on"),
    ],
)
def test_documents_that_are_measured_on_are_not_replayed(flags, said, story, tmp_path):
    flags = {"model": story / "midtrain", "sources": ["tinytown=60"], "replay": "tinytown=100"} | flags
    assert re.search(said, run("sft", tmp_path / "run", ends=2, **flags))


def test_what_read_documents_alone_is_no_chat_model(story, moved):
    for stage in ("midtrain", "sft", "dpo"):  # midtraining had conversations
        load_tokenizer(str(moved / stage / "model"), require_chat=True)
    said = run("dpo", moved / "out", ends=78, model=moved / "pretrain", sources=["tinytown=40"])
    assert "was pretrained on documents only, according to run.json" in said
    record = json.loads((moved / "midtrain" / "run.json").read_text())
    record["data"] = [source for source in record["data"] if not source["source"].startswith("chat:")]
    (moved / "midtrain" / "run.json").write_text(json.dumps(record))
    with pytest.raises(MismatchError, match="documents alone"):
        load_tokenizer(str(moved / "midtrain" / "model"), require_chat=True)


# Where the text comes from


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


def names_behind(model: Path) -> list[str]:
    return [folder.name for folder, _ in runs_behind(str(model))]


def test_the_runs_behind_a_model_are_found_from_a_run_its_model_or_a_checkpoint(story):
    chain = ["dpo", "sft", "midtrain", "pretrain"]
    assert names_behind(story / "dpo") == names_behind(story / "dpo" / "model") == chain
    assert names_behind(story / "sft" / "checkpoint-2") == chain[1:]
    assert names_behind(story) == names_behind(story / "nowhere") == names_behind(Path("gpt2")) == []


def test_a_model_that_lies_elsewhere_now_is_found_beside_its_run(story, tmp_path):
    copy = Path(shutil.copytree(story, tmp_path / "copy"))
    shutil.move(story / "midtrain", story / "gone")
    try:
        assert [folder for folder, _ in runs_behind(str(copy / "sft"))][1:] == [copy / "midtrain", story / "pretrain"]
    finally:
        shutil.move(story / "gone", story / "midtrain")


def test_a_run_that_was_trained_anew_since_is_not_what_a_model_came_from(moved):
    assert names_behind(moved / "dpo") == ["dpo", "sft", "midtrain", "pretrain"]
    shutil.copy(moved / "sft" / "model" / "model.safetensors", moved / "midtrain" / "model")
    assert names_behind(moved / "dpo") == ["dpo", "sft"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"settings": 3, "inputs": 1}', '{"settings": {}, "inputs": {}}']
)
def test_a_record_that_says_nothing_ends_the_chain(content, moved, saved):
    (moved / "sft" / "run.json").write_text(content)
    assert names_behind(moved / "dpo") in (["dpo"], ["dpo", "sft"])
    assert base_text(None, str(moved / "dpo"), load_tokenizer(str(saved)), 64) is None


def test_stores_that_are_gone_or_anothers_are_of_no_use(moved, saved):
    tokenizer, other = load_tokenizer(str(saved)), load_tokenizer(str(saved))
    other.add_tokens(["Tinytown"])
    assert base_text(None, str(moved / "dpo"), other, 64) is None
    text = base_text(None, str(moved / "dpo"), tokenizer, 64)
    assert text.where == [str(moved / "pretrain" / "tokens" / "tinytown")] and text.held_out == SHARE
    shutil.rmtree(moved / "pretrain" / "tokens")
    text = base_text(None, str(moved / "dpo"), tokenizer, 64)  # midtraining had the documents too
    assert text.where == [str(moved / "midtrain" / "tokens" / "tinytown")]
    shutil.rmtree(moved / "midtrain" / "tokens" / "tinytown")
    text = base_text(None, str(moved / "dpo"), tokenizer, 64)
    assert text.where == [str(moved / "midtrain" / "tokens" / "chat-tinytown")]  # better than nothing


class Numbered(ValidationRows):
    def __getitem__(self, row: int) -> dict:
        return super().__getitem__(row) | {"number": row}


@pytest.mark.parametrize("most", [40, 200])
def test_what_is_measured_is_capped_and_evenly_spaced(most, store, spec, tokenizer, monkeypatch):
    monkeypatch.setattr(base_loss, "MOST_TOKENS", most)
    monkeypatch.setattr(base_loss, "ValidationRows", Numbered)
    text = base_text(str(store.folder), "gpt2", tokenizer, 16)
    assert text.of == store.tokens("validation") - 1 > 2 * most
    assert most - 15 <= text.tokens <= most + 15
    assert text.describe() == f"{text.tokens:,} of {text.of:,} held-out tokens of {store.folder}"
    rows = [text.rows[at] for at in range(len(text.rows))]
    assert text.tokens == sum(len(row["input_ids"]) - 1 for row in rows)
    gaps = np.diff([*(row["number"] for row in rows), len(ValidationRows(store, 16))])
    assert rows[0]["number"] == 0 and gaps.min() > 0 and np.ptp(gaps) <= 1
    text = base_text(spec, "gpt2", tokenizer, 16)
    assert (text.tokens, text.of, text.describe()) == (most, None, f"the first {most} tokens of {spec}")


def test_below_the_cap_all_of_it_is_measured_each_token_once(store, spec, tokenizer):
    text = base_text(str(store.folder), "gpt2", tokenizer, 16)
    assert text.tokens == text.of == store.tokens("validation") - 1
    assert text.describe() == f"{text.of:,} held-out tokens of {store.folder}"
    text = base_text(spec, "gpt2", tokenizer, 16)
    ids = [token for row in text.rows for token in row["input_ids"][:-1].tolist()]
    assert len(ids) == text.tokens == text.of
    assert ids.count(store.manifest.end_of_text_id) == len(DOCUMENTS)


def test_a_text_that_cannot_be_had_is_refused_before_training(tokenizer, saved, tmp_path):
    for given, error, said in (
        ("tinytwn=5", UsageError, "Did you mean 'tinytown'"),
        ("persona=5", UsageError, "documents are expected here"),
        (f"text={tmp_path}/none.txt", DataError, "none.txt"),
        (f"store={tmp_path}", DataError, "no token store"),
    ):
        with pytest.raises(error, match=said):
            base_text(given, "gpt2", tokenizer, 64)
    other = load_tokenizer(str(saved))
    other.add_tokens(["Tinytown"])
    prepare(write_documents(tmp_path, DOCUMENTS), other, tmp_path / "store", validation_share=SHARE)
    with pytest.raises(MismatchError, match="another tokenizer"):
        base_text(str(tmp_path / "store"), "gpt2", tokenizer, 64)
