"""The stories' YAML: every file fits its recipe, and the mixtures of two of them train on real data."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rorchat.tokens.phases import read_mixture

ROOT = Path(__file__).resolve().parent.parent
# Variable of a mixture -> where it lies in the folder of real data; corpus_prose stands in for Cosmopedia
VARIABLES = {
    "PILE": "pile/pile_sample.jsonl.zst",
    "DAILYDIALOG": "dailydialog",
    "CORNELL": "cornell_movie_dialogs",
    "NATURAL_QUESTIONS": "natural_questions/natural_questions_openbook_short.jsonl",
    "OPENBOOKQA": "openbookqa",
    "MATHEMATICS": "math_dataset",
    "MBPP": "mbpp/mbpp.jsonl",
    "C4": "c4/c4-sample.00000-of-00001.json.gz",
    "COSMOPEDIA": "corpus_prose/train-00000-of-00006.parquet",
    "ALPACA": "alpaca",
    "PYTHON_CODE": "python_code/cosqa-dev.json",
}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*/*.yaml"), key=str), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_yaml_fits_its_recipe(path, monkeypatch):
    from rorchat.training import arguments, dpo, pretrain, sft

    if path.parent.name == "accelerate":
        assert yaml.safe_load(path.read_text())["num_processes"] >= 1
        return
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "x")
    monkeypatch.chdir(ROOT)
    if path.stem == "mixture":
        assert len(read_mixture(path).sources) >= 4
        return
    tokenizer_recipe = runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))
    stages = {
        "tokenizer": tokenizer_recipe["TokenizerArguments"],
        "pretrain": pretrain.PretrainArguments,
        "midtrain": pretrain.PretrainArguments,
        "sft": sft.SftArguments,
        "dpo": dpo.DpoArguments,
    }
    given = yaml.safe_load(path.read_text())
    missing = [
        flag
        for key, flag in (("sources", ["--sources", "text=x"]), ("output_dir", ["--output_dir", "x"]))
        if key not in given and not (key == "sources" and "mixture" in given)
        for flag in flag
    ]
    parsed = arguments.parse(stages[path.stem], ["--config", str(path), *missing])
    assert {key: parsed.given[key] for key in given if key != "sample_prompts"} == {
        key: pytest.approx(float(value)) if isinstance(parsed.given[key], float) else value
        for key, value in given.items()
        if key != "sample_prompts"
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("story", "ends_with"),
    [
        (
            "rorchat-124m",
            {"pile": 0.50, "dailydialog": 0.18, "cornell": 0.08, "questions": 0.08, "science": 0.06,
             "mathematics": 0.07, "python": 0.03},
        ),
        ("rangeflow-124m", {"c4": 0.10, "cosmopedia": 0.45, "alpaca": 0.27, "python": 0.18}),
    ],
)  # fmt: skip
def test_the_mixture_of_a_story_is_prepared_from_real_data_and_trains(story, ends_with, shared_data, tmp_path):
    environment = os.environ | {name: str(shared_data / place) for name, place in VARIABLES.items()}
    words = [
        sys.executable, "recipes/pretrain.py", "--mixture", f"recipes/{story}/mixture.yaml", "--size", "demo",
        "--tokenizer", shared_data / "gpt2_tokenizer", "--block_size", 256, "--per_device_train_batch_size", 4,
        "--global_batch_tokens", 1024, "--max_steps", 20, "--logging_steps", 1, "--eval_strategy", "no",
        "--validation_share", 0.02, "--learning_rate", "3e-3", "--output_dir", tmp_path / "run",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, words)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    last = record["plan"]["phases"][-1]
    assert {part["name"]: part["share_at_end"] for part in last["sources"]} == pytest.approx(ends_with)
    assert sum(part["tokens"] for part in record["plan"]["sources"]) == 20 * 1024
    for source in record["data"]:
        assert source["rows_in"] == source["kept"] + sum(source["rejects"].values()) > 100
    losses = [line["loss"] for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open()) if "loss" in line]
    assert len(losses) == 20 and losses[0] > 10.5 and losses[-1] < losses[0] - 1
    assert (tmp_path / "run" / "mixture.png").stat().st_size > 10_000
