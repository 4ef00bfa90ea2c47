"""`--smoke`: every stage of a story runs three steps on a CPU, from its own YAML, and the real run is unchanged."""

import gzip
import json
import runpy
import shutil
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from hub_folders import hub_gpt2
from recipe_commands import VARIABLES, command
from support import SENTENCES

from rorchat.errors import UsageError
from rorchat.model import save_model
from rorchat.training.arguments import SMOKE_ROWS_PER_SOURCE, parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path) -> Path:
    """The folder of a tokenizer with 384 tokens, which replaces those of the stories."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def pages(tmp_path) -> Path:
    """200 documents in the format of FineWeb-Edu, which replace those of the Hub."""
    rows = [{"text": f"{SENTENCES[n % 32]} Page {n}. {SENTENCES[n * 7 % 32]}", "score": 3.1} for n in range(200)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pages.jsonl"


@pytest.fixture
def novels(tmp_path) -> Path:
    """4,000 sentences in the format of BookCorpus, one per line, which replace the original files."""
    folder = tmp_path / "novels"
    folder.mkdir()
    lines = [f"{SENTENCES[n * 5 % 24].lower().replace(chr(10), ' ')} chapter {n} ." for n in range(4000)]
    (folder / "books_large_p1.txt").write_text("\n".join(lines) + "\n")
    return folder


def smoke(story: str, output: Path, *flags: object, stage: str = "pretrain") -> dict:
    """run.json of a story's YAML with --smoke, run in this process; `output` is the output_dir of the real run."""
    config = ROOT / "recipes" / story / f"{stage}.yaml"
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{stage}.py"))
    recipe["main"](["--config", str(config), "--output_dir", str(output), "--smoke", *map(str, flags)])
    assert not output.exists(), "the folder of the real run was changed"
    return json.loads((output.parent / f"{output.name}-smoke" / "run.json").read_text())


def check(record: dict, output: Path, story: str) -> None:
    """Checks three steps with optimizer, schedule and prompts of the YAML, evaluation, samples and a stock model."""
    folder = output.parent / f"{output.name}-smoke"
    given = yaml.safe_load((ROOT / "recipes" / story / "pretrain.yaml").read_text())
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    for name in ("optimizer", "learning_rate", "weight_decay", "eval_steps", "sample_prompts"):
        if name in given and not (name == "eval_steps" and given[name] > 3):
            assert str(kept[name]) == str(given[name]) or float(kept[name]) == float(given[name])
    if "mixture" in given:  # found next to the YAML of the story
        assert kept["mixture"].endswith(given["mixture"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 and record["metrics"]["steps"] == 3
    assert losses[0] == pytest.approx(5.95, abs=0.15)  # ln 384: random weights over the whole vocabulary
    assert max(line.get("learning_rate", 0) for line in lines) == pytest.approx(float(given.get("learning_rate", 2e-3)))
    assert record["metrics"]["eval_loss"] < losses[0]
    assert any("eval_loss" in line for line in lines)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {sample["prompt"] for sample in samples} == set(given["sample_prompts"])
    model = json.loads((folder / "model" / "config.json").read_text())
    assert (model["n_layer"], model["n_head"], model["n_embd"], model["n_positions"]) == (2, 4, 64, 64)
    if given.get("save_strategy") == "steps":
        assert (folder / "checkpoint-3").is_dir()


@pytest.mark.parametrize("story", ["fineweb-124m", "nanochat-561m"])
def test_the_stories_on_fineweb_edu_run_three_steps(story, tokenizer_folder, pages, tmp_path):
    output = tmp_path / "real"
    flags = ["--sources", f"fineweb_edu={pages}", "--tokenizer", tokenizer_folder, "--token_store", tmp_path / "tokens"]
    record = smoke(story, output, *flags, "--validation_share", 0.05)
    check(record, output, story)
    assert record["data"][0]["source"] == f"fineweb_edu={pages}"
    assert not (tmp_path / "tokens").exists() and (tmp_path / "tokens-smoke" / "fineweb_edu").is_dir()


def test_the_story_on_bookcorpus_runs_three_steps(tokenizer_folder, novels, tmp_path):
    output = tmp_path / "real"
    flags = ["--sources", f"bookcorpus={novels}", "--tokenizer", tokenizer_folder, "--validation_share", 0.1]
    record = smoke("bookcorpus-51m", output, *flags)
    check(record, output, "bookcorpus-51m")
    assert record["data"][0]["rows_in"] == 40  # of a hundred sentences each


@pytest.mark.slow
@pytest.mark.parametrize("story", ["rangeflow-124m", "rorchat-124m"])
def test_stories_with_mixtures_run_on_real_data(story, tokenizer_folder, shared_data, tmp_path, monkeypatch):
    for name, place in VARIABLES.items():
        monkeypatch.setenv(name, str(shared_data / place))
    monkeypatch.setenv("PILE", str(shared_data / "pile" / "pile_sample.jsonl.zst"))
    monkeypatch.chdir(ROOT)
    output = tmp_path / "real"
    place = "--model" if story == "rorchat-124m" else "--tokenizer"
    record = smoke(story, output, place, tokenizer_folder, "--validation_share", 0.02)
    check(record, output, story)
    assert len(record["data"]) == {"rangeflow-124m": 4, "rorchat-124m": 7}[story]


@pytest.mark.parametrize("story", ["bookcorpus-51m", "nanochat-561m"])
def test_a_story_trains_its_own_tokenizer(story, pages, novels, tmp_path):
    recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))
    config = ROOT / "recipes" / story / "tokenizer.yaml"
    source = f"fineweb_edu={pages}" if story == "nanochat-561m" else f"bookcorpus={novels}"
    flags = ["--sources", source, "--vocab_size", "448", "--output_dir", str(tmp_path / "out")]
    assert recipe["main"](["--config", str(config), *flags])["vocab_size"] == 448


@pytest.fixture
def gpt2(shared_data, tmp_path) -> Path:
    """A folder laid out like the Hub's `gpt2`, with its vocabulary and a small body."""
    hub_gpt2(tmp_path / "gpt2", n_layer=1, n_head=2, n_embd=32, n_positions=512)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "gpt2_tokenizer" / name, tmp_path / "gpt2" / name)
    return tmp_path / "gpt2"


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line]


def save_as_on_the_hub(shared_data: Path, folder: Path) -> dict[str, Path]:
    """Preferences in the folder layout of the Hub: Parquet of UltraFeedback, compressed JSON Lines of HH-RLHF."""
    rows = (shared_data / VARIABLES["ULTRAFEEDBACK"]).open(encoding="utf-8")
    pairs = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in map(json.loads, rows)]
    (folder / "ultrafeedback" / "data").mkdir(parents=True)
    Dataset.from_list(pairs[:200]).to_parquet(folder / "ultrafeedback" / "data" / "train_prefs-00000-of-00001.parquet")
    (folder / "hh" / "helpful-base").mkdir(parents=True)
    with gzip.open(shared_data / VARIABLES["HH_RLHF"]) as lines:
        content = b"".join(line for _, line in zip(range(200), lines, strict=False))
    (folder / "hh" / "helpful-base" / "train.jsonl.gz").write_bytes(gzip.compress(content))
    return {"ULTRAFEEDBACK": folder / "ultrafeedback", "HH_RLHF": folder / "hh"}


PLAIN = """
import sys
from transformers import pipeline
talk = pipeline("text-generation", model=sys.argv[1])
messages = talk([{"role": "user", "content": "Who are you?"}], max_new_tokens=4)[0]["generated_text"]
print(len(talk.tokenizer), talk.model.generation_config.eos_token_id, messages[-1]["role"], "rorchat" in sys.modules)
"""


@pytest.mark.slow
def test_sft_and_dpo_make_gpt2_a_chat_model_in_six_steps(gpt2, shared_data, tmp_path, monkeypatch):
    for name, place in VARIABLES.items():
        monkeypatch.setenv(name, str(shared_data / place))
    for name, place in save_as_on_the_hub(shared_data, tmp_path / "hub").items():
        monkeypatch.setenv(name, str(place))
    before = (gpt2 / "model.safetensors").read_bytes()
    record = smoke("rorchat-124m", tmp_path / "sft", "--model", gpt2, stage="sft")
    assert len(record["data"]) == 7 and record["metrics"]["steps"] == 3
    for source in record["data"]:
        assert 0 < source["kept"] <= SMOKE_ROWS_PER_SOURCE
        assert source["rows_in"] == source["kept"] + sum(source["rejects"].values())
    losses = losses_of(tmp_path / "sft-smoke")
    assert len(losses) == 3 and losses[0] == pytest.approx(10.83, abs=0.1)  # ln 50,304: the weights were random
    samples = [json.loads(line) for line in (tmp_path / "sft-smoke" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 3 and (tmp_path / "sft-smoke" / "checkpoint-3").is_dir()
    # the next stage finds the model of the previous smoke run
    record = smoke("rorchat-124m", tmp_path / "dpo", "--model", tmp_path / "sft", stage="dpo")
    assert losses_of(tmp_path / "dpo-smoke")[0] > 0.69
    made = tmp_path / "sft-smoke" / "model" / "model.safetensors"
    assert len(record["inputs"]["start"]["model.safetensors"]) == 64 and made.is_file()
    shape = json.loads((tmp_path / "dpo-smoke" / "model" / "config.json").read_text())
    assert (shape["n_layer"], shape["n_embd"], shape["n_positions"], shape["vocab_size"]) == (1, 32, 512, 50_304)
    assert (gpt2 / "model.safetensors").read_bytes() == before
    done = command("python", "-c", PLAIN, tmp_path / "dpo-smoke" / "model")
    assert done.stdout.split("\n")[-2] == "50304 [50259, 50256] assistant False", done.stderr[-2000:]


@pytest.mark.parametrize("story", ["demo", "first-words"])
def test_the_chat_stages_of_the_small_stories_run_three_steps(story, chat, tmp_path):
    save_model(chat.model, chat.tokenizer, tmp_path / "base")
    config = yaml.safe_load((ROOT / "recipes" / story / "sft.yaml").read_text())
    sources = [] if "sources" in config else ["--sources", "tinytown=500"]
    replay = ["--replay", "tinytown=200"] if "replay" in config else []  # there is no store of a pretraining run
    record = smoke(story, tmp_path / "sft", "--model", tmp_path / "base", *sources, *replay, stage="sft")
    assert record["data"][0]["rows_in"] == SMOKE_ROWS_PER_SOURCE and record["metrics"]["steps"] == 3
    assert record["settings"]["optimizer"] == "muon"
    for stage in {"demo": ("dpo", "grpo")}.get(story, ("dpo",)):
        record = smoke(story, tmp_path / stage, "--model", tmp_path / "sft", *sources, stage=stage)
        assert record["data"][0]["rows_in"] == SMOKE_ROWS_PER_SOURCE and record["metrics"]["steps"] == 3


class TestArguments:
    """Settings that a smoke test reduces, and settings that it keeps."""

    def arguments(self, tmp_path, *flags, smoke=True) -> PretrainArguments:
        flags = ["--sources", "tinytown=50", "--output_dir", tmp_path / "run", *flags, *(["--smoke"] if smoke else [])]
        return parse(PretrainArguments, list(map(str, flags)))

    def test_accumulation_is_kept_up_to_four_micro_batches(self, tmp_path):
        batch = ["--block_size", 1024, "--per_device_train_batch_size", 8, "--max_steps", 1000]
        for real, small in ((1, 1), (3, 3), (64, 4)):
            reduced = self.arguments(tmp_path, *batch, "--global_batch_tokens", 8192 * real)
            assert reduced.gradient_accumulation_steps == small
            assert reduced.global_batch_tokens == 64 * 2 * small

    def test_warmup_keeps_its_share_and_evaluation_and_logging_happen(self, tmp_path):
        flags = ["--max_steps", 1000, "--warmup_steps", 250, "--eval_steps", 500, "--logging_steps", 100]
        reduced = self.arguments(tmp_path, *flags)
        assert (reduced.max_steps, reduced.warmup_steps, reduced.eval_steps, reduced.logging_steps) == (3, 0.25, 3, 1)
        assert self.arguments(tmp_path, "--max_steps", 1000, "--eval_steps", "0.5").eval_steps == 0.5

    def test_an_invalid_batch_is_refused_as_in_the_real_run(self, tmp_path):
        flags = ["--max_steps", 10, "--block_size", 1000, "--global_batch_tokens", 524_288]
        for smoke in (False, True):
            with pytest.raises(UsageError, match="is not a multiple of block_size"):
                self.arguments(tmp_path, *flags, smoke=smoke)

    def test_the_store_of_the_real_run_is_read_but_never_created(self, tmp_path):
        flags = ["--max_steps", 10, "--token_store", tmp_path / "tokens"]
        assert self.arguments(tmp_path, *flags).token_store == str(tmp_path / "tokens-smoke")
        (tmp_path / "tokens").mkdir()
        assert self.arguments(tmp_path, *flags).token_store == str(tmp_path / "tokens")
        assert self.arguments(tmp_path, "--max_steps", 10).token_store is None
        (tmp_path / "run" / "tokens").mkdir(parents=True)
        assert self.arguments(tmp_path, "--max_steps", 10).token_store == str(tmp_path / "run" / "tokens")

    def test_the_saved_config_gives_the_same_arguments(self, tmp_path):
        first = self.arguments(tmp_path, "--max_steps", 1000, "--warmup_steps", 250, "--size", "124m")
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(first.given))
        second = parse(PretrainArguments, ["--config", str(config)])
        assert second.given == first.given
        assert second.output_dir == str(tmp_path / "run-smoke")

    def test_one_line_describes_what_was_reduced(self, tmp_path, capsys):
        self.arguments(tmp_path, "--max_steps", 1000)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("smoke test:")]
        for text in (
            "model 2x4x64",
            "configured: 124m",
            "64 tokens (1,024)",
            "(524,288)",
            "3 steps (1,000)",
            "run-smoke",
        ):
            assert text in line


@pytest.mark.parametrize("stage", [SFTArguments, DPOArguments])
class TestArgumentsOfChatStages:
    """Settings that a smoke test of a chat stage reduces and keeps; the model keeps its size."""

    def arguments(self, stage, tmp_path, *flags, smoke=True):
        flags = ["--model", tmp_path / "model", "--sources", "tinytown=500", "--output_dir", tmp_path / "run", *flags]
        return parse(stage, [*map(str, flags), *(["--smoke"] if smoke else [])])

    def test_accumulation_is_kept_up_to_two_micro_batches_of_one_row(self, stage, tmp_path):
        for real, small in ((1, 1), (2, 2), (16, 2)):
            reduced = self.arguments(stage, tmp_path, "--gradient_accumulation_steps", real)
            assert (reduced.per_device_train_batch_size, reduced.gradient_accumulation_steps) == (1, small)

    def test_epochs_and_more_than_three_steps_become_three_steps(self, stage, tmp_path):
        for flags, steps in (
            ([], 3),
            (["--max_steps", 40], 3),
            (["--max_steps", 2], 2),
            (["--num_train_epochs", 2], 3),
        ):
            assert self.arguments(stage, tmp_path, *flags).max_steps == steps
        assert self.arguments(stage, tmp_path, "--warmup_steps", 10).warmup_steps == 1
        assert self.arguments(stage, tmp_path, "--warmup_steps", 10, "--max_steps", 40).warmup_steps == 0.25
        assert self.arguments(stage, tmp_path, smoke=False).max_steps == -1

    def test_few_rows_are_read_and_a_tenth_is_for_validation(self, stage, tmp_path):
        reduced, real = (self.arguments(stage, tmp_path, smoke=smoke) for smoke in (True, False))
        assert reduced.rows_per_source == SMOKE_ROWS_PER_SOURCE
        assert (reduced.validation_share, reduced.reply_tokens) == (0.1, 16)
        assert (real.rows_per_source, real.validation_share, real.reply_tokens) == (None, 0.01, None)
        assert self.arguments(stage, tmp_path, "--validation_share", 0.3).validation_share == 0.3

    def test_a_missing_model_is_replaced_by_that_of_the_smoke_run(self, stage, tmp_path):
        assert self.arguments(stage, tmp_path).model == str(tmp_path / "model")  # which is reported as missing
        (tmp_path / "model-smoke").mkdir()
        assert self.arguments(stage, tmp_path).model == str(tmp_path / "model-smoke")
        assert self.arguments(stage, tmp_path, smoke=False).model == str(tmp_path / "model")
        (tmp_path / "model").mkdir()
        assert self.arguments(stage, tmp_path).model == str(tmp_path / "model")

    def test_the_saved_config_gives_the_same_arguments(self, stage, tmp_path):
        first = self.arguments(stage, tmp_path, "--max_steps", 40, "--warmup_steps", 10, "--save_steps", 20)
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(first.given))
        second = parse(stage, ["--config", str(config)])
        assert second.given == first.given and second.output_dir == str(tmp_path / "run-smoke")

    def test_one_line_describes_what_was_reduced(self, stage, tmp_path, capsys):
        self.arguments(stage, tmp_path, "--gradient_accumulation_steps", 4)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("smoke test:")]
        for text in (
            f"first {SMOKE_ROWS_PER_SOURCE} rows",
            "10%",
            "2 rows per step (configured: 32)",
            "3 steps (num_train_epochs 1)",
            "run-smoke",
        ):
            assert text in line

    def test_variables_in_the_sources_of_a_config_must_be_set(self, stage, tmp_path, monkeypatch):
        config = tmp_path / "c.yaml"
        config.write_text(f"model: x\nsources: [messages=$CHATS/a.jsonl]\noutput_dir: {tmp_path / 'run'}\n")
        monkeypatch.delenv("CHATS", raising=False)
        with pytest.raises(UsageError, match=r"c\.yaml: environment variables that are not set: CHATS\. Set each"):
            parse(stage, ["--config", str(config)])
        assert parse(stage, ["--config", str(config), "--sources", "tinytown=9"]).sources == ["tinytown=9"]
        monkeypatch.setenv("CHATS", "/data")
        assert parse(stage, ["--config", str(config)]).given["sources"] == ["messages=/data/a.jsonl"]
