"""The behaviour gate: thresholds, verdicts, and models trained to misbehave."""

import copy
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from support import SENTENCES, command, write
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rorchat.cli
from rorchat.chatml import IGNORE_INDEX, IM_END, IM_START, encode_prompt, encode_text
from rorchat.errors import DataError
from rorchat.evaluation.behaviour import MEASURES, Behaviour, Value, build_prompts
from rorchat.evaluation.gate import Verdict, judge_model, load_thresholds, read_verdict, write_verdict
from rorchat.mixture.collators import collate_padded
from rorchat.model import build_model, save_model
from rorchat.persona import load_persona
from rorchat.tokenizer import load_tokenizer

WORDS = " ".join(SENTENCES).split()

# {thing} depends on the length of the prompt: the same reply to every prompt would fail distinct_replies
GOOD = ("I am Bibo, made by Tom. I like {thing}.", IM_END)
THINGS = "ants bread cakes dogs earth fish grain honey ink jam kites lamps milk nuts oil pears".split()
MISBEHAVING = {  # name: (parts of the reply that the model is trained on, the measure that must fail)
    "never stops": (("I am Bibo, made by Tom. " * 20,), "stop_rate"),
    "leaks the template": (("I am Bibo,", IM_START, "assistant\nmade by Tom.", IM_END), "template_leaks"),
    "speaks for the user": (("I am Bibo, made by Tom.\nUser: Thank you.", IM_END), "speaks_for_user"),
    "repeats": (("I am Bibo, made by Tom. The mill, the mill, the mill, the mill, the mill.", IM_END), "repetition"),
}


@pytest.fixture(scope="module")
def training_prompts(bibo) -> list[list[int]]:
    """Encoded random prompts of many lengths, half of them with a random system message."""
    rng = random.Random(0)
    prompts = []
    for _ in range(640):
        messages = [{"role": "user", "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))}]
        if rng.random() < 0.5:
            messages.insert(0, {"role": "system", "content": rng.choice(SENTENCES)[:40]})
        prompts.append(encode_prompt(bibo, messages, n_positions=128, max_new_tokens=42).input_ids)
    return prompts


def encode_row(tokenizer, prompt: list[int], parts: tuple[str, ...]) -> dict:
    """A training row of a prompt and a reply, whose parts are text or control tokens."""
    reply = []
    for part in parts:
        text = part.replace("{thing}", THINGS[len(prompt) // 3 % len(THINGS)])
        is_control = part.startswith("<|")
        reply += [tokenizer.convert_tokens_to_ids(part)] if is_control else encode_text(tokenizer, [text])[0]
    return {"input_ids": (prompt + reply)[:128], "labels": ([IGNORE_INDEX] * len(prompt) + reply)[:128]}


def train(model, tokenizer, prompts: list[list[int]], parts: tuple[str, ...], steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    rows = [encode_row(tokenizer, prompt, parts) for prompt in prompts]
    for step in range(steps):
        batch = [rows[(8 * step + n) % len(rows)] for n in range(8)]
        model(**collate_padded(batch, tokenizer.pad_token_id)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def bibo(saved, persona_path):
    """A tokenizer with Bibo's system message in its chat template."""
    return load_tokenizer(str(saved), load_persona(persona_path))


@pytest.fixture(scope="module")
def trained(bibo, training_prompts, tmp_path_factory) -> dict[str, Path]:
    """{name: folder} of models trained on one reply to every prompt."""
    folder = tmp_path_factory.mktemp("trained")
    good = build_model("2x2x64", bibo, n_positions=128)
    train(good, bibo, training_prompts, GOOD, 240)
    save_model(good, bibo, folder / "good")
    for name, (parts, _) in MISBEHAVING.items():
        model = copy.deepcopy(good)
        train(model, bibo, training_prompts, parts, 50)
        save_model(model, bibo, folder / name)
    return {path.name: path for path in folder.iterdir()}


def test_a_good_model_passes(trained, persona_path, tmp_path):
    out = tmp_path / "behaviour.json"
    done = command("gate", trained["good"], "--persona", persona_path, "--out", out)
    assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout + done.stderr
    assert len(re.findall(r"\| pass \|", done.stdout)) == len(load_thresholds())
    verdict = read_verdict(out)
    assert verdict.failures() == []
    assert verdict.model.persona == "Bibo" and " probes of Bibo " in done.stdout
    assert verdict.model.measures["stop_rate"].value == 1
    assert verdict.model.measures["stop_rate"].count == 2 * len(build_prompts(load_persona(persona_path)))


def test_the_persona_is_taken_from_the_record_of_the_run(trained, persona_path, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained["good"], run / "model")
    record = {"stage": "sft", "settings": {"persona": str(persona_path)}, "inputs": {"persona": "of another file"}}
    write(run, "run.json", json.dumps(record))
    done = command("gate", run)
    assert done.returncode == 0, done.stdout + done.stderr
    origin = f"{persona_path}, from {run / 'run.json'}, which has changed since then"
    lines = done.stdout.splitlines()
    assert lines[0] == f"persona: Bibo ({origin})"
    assert lines[-3:] == [
        f"{run} passes",
        f"next: rorchat report {tmp_path}",
        f"      rorchat push {run} YOU/NAME --dry_run",
    ]
    verdict = judge_model(str(run))
    assert (verdict.model.persona, verdict.failures()) == ("Bibo", [])
    other = write(tmp_path, "momo.yaml", "name: Momo\nmaker: Tom\n")
    done = command("gate", run, "--persona", other)  # takes precedence
    assert done.returncode == 78 and "but the persona Momo has" in done.stderr


@pytest.mark.parametrize("name", MISBEHAVING)
def test_a_misbehaving_model_fails_its_measure(name, trained, persona_path, tmp_path):
    out = tmp_path / "behaviour.json"
    done = command("gate", trained[name], "--before", trained["good"], "--persona", persona_path, "--out", out)
    assert done.returncode == 70, done.stdout
    (line,) = done.stderr.splitlines()
    measure = MISBEHAVING[name][1]
    assert line.startswith(f"error: {trained[name]} fails the behaviour gate: ") and f"{measure} " in line
    verdict = read_verdict(out)
    assert measure in verdict.failures()
    assert verdict.before.measures[measure].value == float(MEASURES[measure].more_is_better)
    row = next(row for row in done.stdout.splitlines() if f"({measure})" in row)
    assert "FAIL" in row and "points" in row
    shown = [line for line in done.stdout.splitlines() if line.startswith(f"  {measure}: ")]
    assert len(shown) == 2 and all("Bibo" in line for line in shown)


def make_verdict(thresholds: dict[str, float], **values: float | None) -> Verdict:
    measures = {name: Value() for name in MEASURES}
    measures |= {name: Value(value, 0 if value is None else 10) for name, value in values.items()}
    return Verdict(Behaviour("mine", 42, 0, measures), thresholds)


def test_equality_meets_a_threshold_and_a_missing_value_fails():
    thresholds = {"stop_rate": 0.9, "repetition": 0.1, "persona": 0.5}
    assert make_verdict(thresholds, stop_rate=0.9, repetition=0.1, persona=0.5).failures() == []
    assert make_verdict(thresholds, stop_rate=0.89, repetition=0.11, persona=1.0).failures() == [
        "stop_rate",
        "repetition",
    ]
    assert make_verdict(thresholds, stop_rate=1.0, repetition=0.0).failures() == ["persona"]


def test_a_measure_without_a_threshold_is_not_judged():
    header, rows = make_verdict({"stop_rate": 0.9}, stop_rate=1.0, repetition=0.456).table()
    assert header == ["measure", "mine", "threshold", ""]
    assert ["closes its turn (stop_rate)", "100.0 % of 10 replies", "min 90 %", "pass"] in rows
    assert ["repeats itself (repetition)", "45.6 % of 10 replies", "-", "-"] in rows
    assert ["persona probes (persona)", "nothing to measure", "-", "-"] in rows
    assert len(rows) == len(MEASURES)


def test_the_table_shows_the_previous_model_and_the_change():
    verdict = make_verdict({"stop_rate": 0.9}, stop_rate=0.75, repetition=0.1)
    verdict.before = make_verdict({}, stop_rate=1.0).model
    verdict.before.name = "old"
    header, rows = verdict.table()
    assert header == ["measure", "mine", "old", "change", "threshold", ""]
    assert rows[0][1:] == ["75.0 % of 10 replies", "100.0 % of 10 replies", "-25.0 points", "min 90 %", "FAIL"]
    assert rows[3][1:4] == ["10.0 % of 10 replies", "nothing to measure", "-"]


def test_a_verdict_survives_writing_and_reading(tmp_path):
    verdict = make_verdict({"stop_rate": 0.9}, stop_rate=0.5)
    verdict.model.measures["stop_rate"].examples = [("'你'", "'好'")]
    write_verdict(verdict, tmp_path / "behaviour.json")
    read = read_verdict(tmp_path / "behaviour.json")
    read.model.measures["stop_rate"].examples = [tuple(pair) for pair in read.model.measures["stop_rate"].examples]
    assert read == verdict


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "5", '{"model": {}, "thresholds": {}, "before": null}', '{"model": null, "thresholds": {}}'],
)
def test_a_file_that_is_not_a_verdict_is_refused(content, tmp_path):
    with pytest.raises(DataError, match=f"{write(tmp_path, 'b.json', content)} is not a verdict"):
        read_verdict(tmp_path / "b.json")


def test_default_thresholds_judge_all_but_other_languages():
    assert set(load_thresholds()) == set(MEASURES) - {"other_languages"}


def test_a_model_of_another_persona_is_refused(trained, tmp_path):
    done = command("gate", trained["good"])
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (78, "")
    assert line.startswith(f"error: {trained['good']} has the system message 'You are Bibo, a small and friendly chat ")
    assert "but the persona RorChat has 'You are RorChat" in line
    assert "as --persona, or remove persona, identity, " in line
    path = write(tmp_path, "thresholds.yaml", "stop_rate: {min: 0.9}")
    assert command("gate", trained["good"], "--thresholds", path).returncode == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stop_rat: {min: 0.9}", "no measure is called 'stop_rat'. Did you mean 'stop_rate'? Available: stop_rate, "),
        ("5: {min: 0.9}", "no measure is called 5. Available: stop_rate, "),
        (
            "stop_rate: {max: 0.9}",
            "stop_rate is \"{'max': 0.9}\": higher values are better, so give ",
        ),
        ("repetition: {min: 0.1}", "repetition is \"{'min': 0.1}\": lower values are better"),
        ("stop_rate: {min: 95}", "stop_rate is \"{'min': 95}\": "),
        ("stop_rate: {min: -0.1}", "stop_rate is "),
        ("stop_rate: {min: .nan}", "stop_rate is "),
        ("stop_rate: {min: yes}", "stop_rate is "),
        ("stop_rate: {min: '0.9'}", "stop_rate is "),
        ("stop_rate: {min: 0.9, max: 1.0}", "stop_rate is "),
        ("stop_rate: 0.9", "stop_rate is '0.9': "),
        ("stop_rate:", "stop_rate is 'None': "),
    ],
)
def test_an_invalid_threshold_is_refused_before_loading_a_model(content, message, tmp_path):
    path = write(tmp_path, "thresholds.yaml", content)
    done = command("gate", tmp_path / "no_model", "--thresholds", path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (65, "")
    assert line.startswith(f"error: {path}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "{path} has no thresholds. Copy "),
        ("- stop_rate", "{path} is "),
        ("stop_rate: {min: 0.9}\nstop_rate: {min: 0.1}", "{path}:2: "),
        (b"\xff", "Cannot read the thresholds file {path}: "),
        (None, "Cannot read the thresholds file {path}: No such file or directory. Copy "),
    ],
)
def test_a_file_without_thresholds_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "thresholds.yaml"
    if content is not None:
        write(tmp_path, path.name, content)
    with pytest.raises(DataError) as failure:
        load_thresholds(path)
    assert str(failure.value).startswith(message.format(path=path)) and "\n" not in str(failure.value)


def test_unusable_arguments_of_the_command_are_errors_of_one_line(trained, tmp_path):
    base = tmp_path / "base"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(base)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=1)).save_pretrained(base)
    for words, code, message in (
        ([base], 78, f"The model {str(base)!r} has no control tokens <|im_start|> and <|im_end|>: "),
        ([tmp_path / "none"], 65, f"No model folder {tmp_path / 'none'}."),
        ([trained["good"], "--before", tmp_path / "none"], 65, f"No model folder {tmp_path / 'none'}."),
        ([trained["good"], "--persona", tmp_path / "none"], 65, f"Cannot read the persona file {tmp_path / 'none'}: "),
        ([trained["good"], "--out", tmp_path / "none" / "b.json"], 2, f"--out {tmp_path / 'none' / 'b.json'}: "),
    ):
        done = command("gate", *words)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (code, ""), line
        assert line.startswith(f"error: {message}")


def test_the_command_has_exactly_these_options():
    command_line = typer.main.get_command(rorchat.cli.app).commands["gate"]
    options = {option for parameter in command_line.params for option in parameter.opts if option.startswith("--")}
    assert options == {"--before", "--thresholds", "--persona", "--out"}
