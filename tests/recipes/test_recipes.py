"""The recipes through their command lines: a small story, equal results with two processes, bad input."""

import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from recipe_commands import ENVIRONMENT, command, inside, launch, metrics_of, recipe, refused, succeeded
from support import SENTENCES, json_lines

from rorchat.errors import exits_with_one_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Path:
    """tokenizer -> pretrain -> sft -> dpo on a few rows of Tinytown, with 20 thousand parameters."""
    out = tmp_path_factory.mktemp("story")
    succeeded(
        inside(
            "tokenizer",
            "--sources",
            "tinytown=200",
            "persona=50",
            "--vocab_size",
            384,
            "--output_dir",
            out / "tokenizer",
        )
    )
    succeeded(
        launch(
            "pretrain", "--sources", "tinytown=300", "--tokenizer", out / "tokenizer", "--size", "2x2x32",
            "--block_size", 192, "--per_device_train_batch_size", 4, "--global_batch_tokens", 1536, "--max_steps", 6,
            "--optimizer", "muon", "--validation_share", 0.05, "--logging_steps", 2, "--learning_rate", "1e-2",
            "--sample_prompts", "One day", "--output_dir", out / "pretrain",
        )
    )  # fmt: skip
    succeeded(
        inside(
            "sft", "--sources", "tinytown=60", "persona=30", "--model", out / "pretrain", "--validation_share", 0.1,
            "--sample_prompts", "Who are you?", "--logging_steps", 2, "--max_steps", 4, "--output_dir", out / "sft",
        )
    )  # fmt: skip
    succeeded(
        inside(
            "dpo", "--sources", "tinytown=40", "--model", out / "sft", "--validation_share", 0.2, "--max_steps", 2,
            "--logging_steps", 1, "--output_dir", out / "dpo",
        )
    )  # fmt: skip
    return out


def test_every_stage_writes_a_stock_model_and_its_record(story):
    assert not list(story.rglob("training_args.bin"))  # a pickle
    for stage in ("pretrain", "sft", "dpo"):
        run = story / stage
        files = {path.name for path in (run / "model").iterdir()}
        assert {
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
        } <= files
        pickles = [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
        assert all(path.parent.name.startswith("checkpoint-") and path.suffix != ".bin" for path in pickles)
        assert not (run / "README.md").exists()
        record = json.loads((run / "run.json").read_text())
        assert (record["stage"], record["finished"]) == (stage, True)
        assert record["metrics"]["eval_loss"] > 0
        config = json.loads((run / "model" / "config.json").read_text())
        assert config["architectures"] == ["GPT2LMHeadModel"]


def test_metrics_count_steps_and_tokens(story):
    training = [record for record in metrics_of(story / "pretrain") if "loss" in record]
    assert [(record["step"], record["tokens"]) for record in training] == [(2, 3072), (4, 6144), (6, 9216)]
    assert all(record["tokens_per_second"] > 0 and record["memory_bytes"] > 0 for record in training)
    assert training[-1]["loss"] < training[0]["loss"] + 0.5
    assert any("eval_bits_per_byte" in record for record in metrics_of(story / "pretrain"))


def test_samples_are_taken_before_and_after(story):
    samples = [json.loads(line) for line in (story / "pretrain" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(0, "One day"), (6, "One day")]


def test_a_finished_run_is_not_repeated_and_refuses_other_settings(story):
    config = story / "sft" / "config.yaml"
    again = succeeded(inside("sft", "--config", config))
    assert "already finished" in again.stderr
    refused(inside("sft", "--config", config, "--learning_rate", "0.5"), 78, "another run", "learning_rate")


def test_the_config_yaml_of_a_run_is_a_valid_config(story):
    from rorchat.training.arguments import parse
    from rorchat.training.pretrain import PretrainArguments

    path = story / "pretrain" / "config.yaml"
    assert parse(PretrainArguments, ["--config", str(path)]).given == yaml.safe_load(path.read_text())


def test_the_model_works_in_a_plain_pipeline_without_rorchat(story):
    code = (
        "import sys\nfrom transformers import pipeline\n"
        f"talk = pipeline('text-generation', model={str(story / 'dpo' / 'model')!r})\n"
        "out = talk([{'role': 'user', 'content': 'Who are you?'}])[0]['generated_text']\n"
        "print(len(out), out[-1]['role'], 'rorchat' in sys.modules)"
    )
    done = succeeded(command("python", "-c", code))
    assert done.stdout.split() == ["2", "assistant", "False"]


def test_a_story_is_scored_and_reported(story, monkeypatch):
    monkeypatch.setattr("rorchat.evaluation.scores.MAX_REPLY_TOKENS", 8)
    models = [f"{name}={story / name}" for name in ("pretrain", "sft", "dpo")]
    store = story / "pretrain" / "tokens" / "tinytown"
    scores = succeeded(
        inside("rorchat", "evaluate", *models, "--untrained", "--text", store, "--out", story / "scores.json")
    )
    assert "| held-out questions |" in scores.stdout and "gzip -9 needs" in scores.stdout
    columns = json.loads((story / "scores.json").read_text())
    assert [column["name"] for column in columns] == ["untrained", "pretrain", "sft", "dpo"]
    assert all(column["questions"]["asked"] == 200 for column in columns)
    bits = json.loads((story / "pretrain" / "run.json").read_text())["metrics"]["eval_bits_per_byte"]
    assert columns[1]["bits_per_byte"] == pytest.approx(bits, rel=0.05)
    written = succeeded(inside("rorchat", "report", story))
    assert str(story / "report.md") in written.stdout
    assert (story / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_chat_answers_through_a_pipe_and_reports_dropped_turns(story):
    long = "word " * 400
    done = subprocess.run(
        ["rorchat", "chat", str(story / "dpo"), "--temperature", "0", "--max_new_tokens", "8"],
        input=f"Hello\n{long}\n/exit\nnever\n", capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert "were dropped" in done.stderr and "Traceback" not in done.stderr


PRETRAIN = [
    "--size", "2x2x32", "--block_size", 64, "--per_device_train_batch_size", 2, "--global_batch_tokens", 512,
    "--max_steps", 5, "--logging_steps", 1, "--eval_strategy", "no", "--validation_share", 0.05, "--bf16", "false",
    "--lr_scheduler_type", "constant",
]  # fmt: skip


def test_micro_batches_and_processes_do_not_change_the_loss(sandbox):
    """Within 1e-5 in float32: the samples are the same, gradients are summed in another order."""
    flags = {
        "sources": ["tinytown=200"], "validation_share": 0.05, "token_store": sandbox.folder / "micro-batches",
        "block_size": 64, "global_batch_tokens": 512, "max_steps": 20, "logging_steps": 1, "optimizer": "muon",
        "lr_scheduler_type": "constant", "save_strategy": "no", "save_steps": None,
    }  # fmt: skip
    losses = []
    for rows, processes in ((8, 1), (1, 1), (2, 2)):
        out = sandbox.new_folder()
        result = sandbox.run(out, processes=processes, **flags, per_device_train_batch_size=rows)
        assert result.code == 0, result.output
        losses.append([record["loss"] for record in metrics_of(out) if "loss" in record])
    whole, eight, two = losses
    assert len(whole) == 20 and whole[0] - whole[19] > 0.1
    assert eight == pytest.approx(whole, rel=1e-5)
    assert two == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
def test_sft_of_gpt2_124m_needs_less_than_six_gigabytes(shared_data, tmp_path):
    from hub_folders import hub_gpt2

    hub_gpt2(tmp_path / "gpt2")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "gpt2_tokenizer" / name, tmp_path / "gpt2" / name)
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    succeeded(
        recipe(
            "sft", "--model", tmp_path / "gpt2", "--sources", f"alpaca={shared_data / 'alpaca' / 'alpaca_tiny.json'}",
            "--validation_share", 0.02, "--max_steps", 1, "--per_device_train_batch_size", 2, "--logging_steps", 1,
            "--max_length", 256, "--eval_strategy", "no", "--save_strategy", "no", "--sample_prompts",
            "--output_dir", tmp_path / "out",
        )
    )  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert peak == before or peak * 1024 < 6e9
    recorded = [record["memory_bytes"] for record in metrics_of(tmp_path / "out")]
    assert max(recorded) < 6e9
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert (config["vocab_size"], config["n_layer"]) == (50_304, 12)


class TestBadInput:
    """Every error is one line with its exit code, without a traceback."""

    @pytest.fixture
    def flags(self, story, tmp_path):
        return [*PRETRAIN, "--tokenizer", story / "tokenizer", "--output_dir", tmp_path / "out"]

    def pretrain(self, flags, *sources, **more):
        """Runs the recipe with these sources; `more` replaces values of the flags."""
        values = dict(zip(flags[::2], flags[1::2], strict=True)) | {f"--{name}": more[name] for name in more}
        return inside("pretrain", "--sources", *sources, *(word for pair in values.items() for word in pair))

    def test_a_missing_file(self, flags, tmp_path):
        refused(self.pretrain(flags, f"text={tmp_path / 'none.txt'}"), 65, "No file or folder", "none.txt")

    def test_an_empty_file(self, flags, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        refused(self.pretrain(flags, f"text={tmp_path / 'empty.jsonl'}"), 65, "empty")

    def test_a_file_with_only_rejected_rows(self, flags, tmp_path):
        (tmp_path / "bad.jsonl").write_text("not json\n{}\n")
        refused(self.pretrain(flags, f"text={tmp_path / 'bad.jsonl'}"), 65, "No row", "bad.jsonl:1")

    def test_an_unknown_source_with_a_suggestion(self, flags):
        refused(self.pretrain(flags, "tinytwon=10"), 2, "Did you mean 'tinytown'")

    def test_a_source_of_another_kind(self, flags):
        refused(self.pretrain(flags, "preference=x"), 2, "contains preferences", "documents or conversations")

    def test_a_source_of_one_sentence(self, flags, tmp_path):
        (tmp_path / "one.txt").write_text("It was the best of times.")
        refused(self.pretrain(flags, f"text={tmp_path / 'one.txt'}"), 65, "has one document, which cannot be divided")

    def test_a_missing_tokenizer(self, flags, tmp_path):
        refused(self.pretrain(flags, "tinytown=50", tokenizer=tmp_path / "nothing"), 65, "No tokenizer at")

    def test_a_tokenizer_that_does_not_fit_the_model(self, story, gpt2_tokenizer, tmp_path):
        shutil.copytree(story / "sft" / "model", tmp_path / "mixed")
        from rorchat.tokenizer import train_tokenizer

        train_tokenizer(SENTENCES, 512).save_pretrained(tmp_path / "mixed")
        flags = ["--model", tmp_path / "mixed", "--sources", "tinytown=20", "--output_dir", tmp_path / "out"]
        refused(inside("sft", *flags), 78, "384 embedding rows", "512 tokens")
        shutil.copytree(story / "sft" / "model", tmp_path / "other")
        gpt2_tokenizer.save_pretrained(tmp_path / "other")
        refused(inside("sft", "--model", tmp_path / "other", *flags[2:]), 78, "50,257 without added tokens", "384")
        refused(inside("rorchat", "chat", tmp_path / "other"), 78, "50,257 without added tokens")

    def test_a_folder_is_free_after_a_run_that_failed_before_its_first_step(self, flags):
        refused(self.pretrain(flags, "tinytown=200", "persona=9", weights=1), 2, "1 weights")
        assert self.pretrain(flags, "tinytown=200", max_steps=1).returncode == 0

    def test_rows_longer_than_the_positions(self, story, flags, tmp_path):
        more = {"model": story / "pretrain", "block_size": 256, "global_batch_tokens": 1024}
        refused(self.pretrain(flags, "tinytown=50", **more), 78, "only 192 positions")

    def test_an_output_folder_with_other_files(self, flags, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.doc").touch()
        refused(self.pretrain(flags, "tinytown=50"), 78, "not empty")

    def test_an_unknown_key_and_a_wrong_type_in_yaml(self, tmp_path):
        config = tmp_path / "c.yaml"
        config.write_text("sources: [tinytown=10]\nblok_size: 64\n")
        refused(inside("pretrain", "--config", config, "--output_dir", tmp_path / "x"), 2, "c.yaml:2", "'block_size'")
        config.write_text("sources: [tinytown=10]\nblock_size: [64]\n")
        refused(
            inside("pretrain", "--config", config, "--output_dir", tmp_path / "x"), 2, "c.yaml:2", "expected an int"
        )
        refused(inside("pretrain", "--config", tmp_path / "none.yaml"), 2, "Cannot read the config")
        config.write_text("seed: 1\nsources: [tinytown=10]\nseed: 2\n")
        refused(inside("pretrain", "--config", config), 2, "c.yaml:3: duplicate key 'seed'")

    @pytest.mark.slow
    def test_under_accelerate_launch_an_error_is_one_line_too(self, tmp_path):
        flags = ["--sources", "tinytown=10", "--output_dir", tmp_path / "x"]
        for wrong, message in (
            (["--model", tmp_path / "none"], f"error: No model folder {tmp_path / 'none'}."),
            (["--modell", "x"], "error: Unknown option --modell. Did you mean 'model'? See --help."),
        ):
            config = ["--config_file", "recipes/accelerate/one_process.yaml"]
            done = command("accelerate", "launch", "--quiet", *config, "recipes/sft.py", *wrong, *flags)
            assert done.returncode != 0
            assert (done.stdout, done.stderr.splitlines()) == ("", [message])

    def test_conversations_without_a_reply(self, story, tmp_path):
        rows = [{"messages": [{"role": "user", "content": f"Is anybody there? {n}"}]} for n in range(3)]
        (tmp_path / "asked.jsonl").write_text(json_lines(*rows))
        flags = ["--model", story / "sft", "--output_dir", tmp_path / "out"]
        done = inside("sft", "--sources", "tinytown=20", f"messages={tmp_path / 'asked.jsonl'}", *flags)
        refused(done, 65, "3 no assistant turn", "asked.jsonl:1")

    def test_pairs_with_equal_sides(self, story, tmp_path):
        pairs = [{"prompt": f"Hello {n}", "chosen": "Hi!", "rejected": " Hi!\n"} for n in range(3)]
        (tmp_path / "pairs.jsonl").write_text(json_lines(*pairs))
        flags = ["--model", story / "sft", "--output_dir", tmp_path / "out"]
        done = inside("dpo", "--sources", "tinytown=20", f"preference={tmp_path / 'pairs.jsonl'}", *flags)
        refused(done, 65, "3 identical chosen and rejected", "pairs.jsonl:1")

    def test_a_missing_model_in_chat_evaluate_and_report(self, tmp_path):
        for arguments in (("chat", tmp_path / "none"), ("evaluate", tmp_path / "none"), ("report", tmp_path)):
            refused(inside("rorchat", *arguments), 65)
        refused(inside("rorchat", "push", tmp_path, "noslash"), 2, "owner/name")


def test_a_full_disk_is_exit_code_74(capsys):
    @exits_with_one_line
    def fill():
        with open("/dev/full", "w", encoding="utf-8") as file:
            file.write("x" * 100_000)

    with pytest.raises(SystemExit) as stop:
        fill()
    assert stop.value.code == 74
    assert capsys.readouterr().err == "error: no space left on device; free some space, or choose another place\n"


def test_a_file_at_the_path_of_a_folder_is_named(capsys, tmp_path):
    (tmp_path / "runs").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        exits_with_one_line((tmp_path / "runs").mkdir)()
    assert stop.value.code == 74
    message = f"error: {tmp_path / 'runs'}: file exists; choose another place, or move the existing file\n"
    assert capsys.readouterr().err == message
