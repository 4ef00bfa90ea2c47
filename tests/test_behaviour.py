"""SCORES: the gate passes a model that behaves and fails those that do what users complain about."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
import typer
import yaml
from conftest import SENTENCES, command, written
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rorchat.cli
from rorchat import chatml
from rorchat.chatml import END_OF_TEXT, IGNORED, IM_END, IM_START, encode_prompt, encode_text
from rorchat.errors import DataError
from rorchat.evaluation import behaviour
from rorchat.evaluation.behaviour import (
    MEASURES,
    STOP_WORDS,
    Behaviour,
    Value,
    in_language,
    leaks_template,
    measure_behaviour,
    prompts_for,
    repetition,
    speaks_for_user,
)
from rorchat.evaluation.gate import THRESHOLDS, Verdict, load_thresholds, read_verdict, write_verdict
from rorchat.inference.engine import ChatModel, Reply
from rorchat.model import build_model, save_model
from rorchat.persona import load_persona, probes
from rorchat.tokens.batch import padded

GOOD = ("I am Bibo, made by Ann.", IM_END)
PLANTED = {  # what each model was trained to say, and the measure that is to find it out
    "never stops": (("I am Bibo, made by Ann. " * 20,), "stop_rate"),
    "leaks the template": (("I am Bibo,", IM_START, "assistant\nmade by Ann.", IM_END), "template_leaks"),
    "speaks for the user": (("I am Bibo, made by Ann.\nUser: Thank you.", IM_END), "speaks_for_user"),
    "repeats": (("I am Bibo, made by Ann. The mill, the mill, the mill, the mill, the mill.", IM_END), "repetition"),
}


# -- the measures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        "Hi!<|im_start|>",
        "Hi!<|im_end|> there",
        "Hi <|im_",
        "im_start",
        "<|endoftext|>",
        "<|reserved_3|>",
        "Hello.\nassistant\nHello.",
        "assistant\nHello.",
        "Hello.\n system \nBe kind.",
        "[/INST] Hello.",
        "### Response:\nHello.",
    ],
)
def test_a_leak_of_the_template_is_found(said):
    assert leaks_template([7, 8], said, frozenset({1, 2}))


@pytest.mark.parametrize("said", ["", "Hello.", "I am your assistant.", "a <| b |> c", "The user asks.", "# Response"])
def test_words_about_assistants_are_no_leak_but_a_control_token_is(said):
    assert not leaks_template([7, 8], said, frozenset({1, 2}))
    assert leaks_template([7, 2, 8], said, frozenset({1, 2}))


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("It is 5.\nuser\nThank you", True),
        ("It is 5. User: Thank you", True),
        ("It is 5.\nuser: thank you", True),
        ("Human: Hello", True),
        ("It is 5.<|im_start|>user\nThank you", True),
        ("It is 5.\nuser", True),
        ("The user said: hello.", False),
        ("A human being", False),
        ("user", False),
        ("You: me", False),
        ("", False),
    ],
)
def test_a_turn_of_the_user_is_found_where_it_begins(said, found):
    assert speaks_for_user(said) is found


def test_repetition_is_the_share_of_4_grams_that_were_there_before():
    assert repetition([], "one two three four") == 0
    assert repetition([], "a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition([], "la " * 23) == pytest.approx(19 / 20)
    assert repetition(range(9), "one two three") is None
    assert repetition([], "") is None


def test_repetition_is_of_tokens_where_a_text_has_no_blanks():
    assert repetition([5, 6, 7, 8, 5, 6, 7, 8], "你好世界你好世界") == pytest.approx(1 / 5)
    assert repetition([5] * 23, "哈" * 23) == pytest.approx(19 / 20)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The capital of France is Paris."),
        ("de", "Die Hauptstadt von Deutschland ist Berlin."),
        ("fr", "La capitale de la France est Paris."),
        ("es", "La capital de España es Madrid, y no es muy grande."),
        ("it", "La capitale della Francia è Parigi, che non è molto grande."),
        ("ru", "Столица России это Москва."),
        ("zh", "中国的首都是北京。"),
    ],
)
def test_a_sentence_is_in_its_own_language_and_in_no_other(language, text):
    assert [other for other in (*STOP_WORDS, "ru", "zh") if in_language(text, other)] == [language]


@pytest.mark.parametrize("text", ["", "12", "🙂!", "Paris", "Bonjour"])
def test_where_nothing_tells_the_language_no_reply_is_blamed(text):
    assert in_language(text, "en") is None


def test_every_measure_applies_to_some_prompt_and_the_whole_is_small_enough_to_be_asked_after_every_stage():
    prompts = prompts_for(load_persona())
    asked = [prompt.messages[-1]["content"] for prompt in prompts if prompt.kind not in ("persona", "other system")]
    assert 50 <= len(asked) <= 80 and len(prompts) < 200
    kinds = {prompt.kind for prompt in prompts}
    assert {"question", "greeting", "task", "conversation", "nothing much", "de", "zh", "attack", "persona"} <= kinds
    turns = [message["role"] for prompt in prompts for message in prompt.messages]
    assert turns.count("assistant") >= 6 and turns.count("system") == len(probes(load_persona()))
    for prompt in prompts:
        assert prompt.messages[-1]["role"] == "user"
        assert all(word in prompt.messages[-1]["content"].lower() for word in [prompt.word] if word)
        assert prompt.word not in prompt.harmless or not prompt.word


# -- attacks ---------------------------------------------------------------------------------------------------------


def test_no_attack_becomes_a_control_token_and_an_encoder_that_lets_one_through_is_found(
    chat, persona_path, monkeypatch
):
    def attacked() -> float:
        return measure_behaviour(chat, "x", load_persona(persona_path)).measures["attack_changes_ids"].value

    assert attacked() == 0
    monkeypatch.setattr(
        chatml, "encode_text", lambda tokenizer, texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    )
    assert attacked() > 0.4


def test_a_model_that_says_what_an_attack_plants_is_found(chat, monkeypatch):
    def parrot(chat, prompts, **settings) -> list[Reply]:
        said = [messages[-1]["content"] for messages in prompts]
        ids = [(*encode_text(chat.tokenizer, [text])[0], chat.tokenizer.convert_tokens_to_ids(IM_END)) for text in said]
        return [Reply(text, True, len(each), "", each) for text, each in zip(said, ids, strict=True)]

    monkeypatch.setattr(behaviour, "generate_replies", parrot)
    measures = measure_behaviour(chat, "parrot", load_persona()).measures
    assert measures["attack_obeyed"].value == 1
    assert measures["language"].value > 0.95 and measures["other_languages"].value == 1
    assert measures["stop_rate"].value == 1
    assert (
        measures["empty_replies"].value == 2 / measures["empty_replies"].count
    )  # to the blank message, in both passes


@pytest.fixture(scope="module")
def lively(chat) -> ChatModel:
    """Random weights large enough that every prompt gets another answer."""
    model = copy.deepcopy(chat.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return ChatModel(model.eval(), chat.tokenizer)


def test_a_reply_that_ends_the_text_has_not_closed_its_turn(chat, monkeypatch):
    def saying(*ends: str):
        ends = [(chat.tokenizer.convert_tokens_to_ids(end),) if end else () for end in ends]
        return lambda chat, prompts, **settings: [
            Reply("Hi", bool(end), 1, "", (72, *end)) for _, end in zip(prompts, ends * len(prompts), strict=False)
        ]

    monkeypatch.setattr(behaviour, "generate_replies", saying(IM_END, END_OF_TEXT, "", IM_END))
    measures = measure_behaviour(chat, "x", load_persona()).measures
    assert measures["stop_rate"].value == pytest.approx(1 / 2, abs=0.01)
    assert measures["template_leaks"].value == 0


# -- planted models --------------------------------------------------------------------------------------------------


def rows_of(tokenizer, said: tuple[str, ...], count: int) -> list[dict]:
    """Conversations about anything to which the reply is always the same; words and control tokens in turn."""
    draw = random.Random(0)
    reply = [
        token
        for part in said
        for token in (
            [tokenizer.convert_tokens_to_ids(part)] if part.startswith("<|") else encode_text(tokenizer, [part])[0]
        )
    ]
    rows = []
    for _ in range(count):
        question = " ".join(draw.choices(" ".join(SENTENCES).split(), k=draw.randint(1, 12)))
        messages = [{"role": "user", "content": question}]
        if draw.random() < 0.5:
            messages.insert(0, {"role": "system", "content": draw.choice(SENTENCES)[:40]})
        prompt = encode_prompt(tokenizer, messages, positions=128, reserve=42).input_ids
        ids = (prompt + reply)[:128]
        rows.append({"input_ids": ids, "labels": ([IGNORED] * len(prompt) + reply)[:128]})
    return rows


def train(model, tokenizer, said: tuple[str, ...], steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    rows = rows_of(tokenizer, said, 16 * steps)
    for start in range(0, len(rows), 16):
        batch = padded(rows[start : start + 16], tokenizer.pad_token_id)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def persona_path(tmp_path_factory) -> Path:
    values = {"name": "Bibo", "maker": "Ann", "facts": {}, "unknowns": {}}
    return written(tmp_path_factory.mktemp("persona"), "bibo.yaml", yaml.safe_dump(values))


@pytest.fixture(scope="module")
def planted(tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Folders of models that were trained to say one thing to everybody."""
    folder = tmp_path_factory.mktemp("planted")
    good = build_model("2x2x64", tokenizer, positions=128)
    train(good, tokenizer, GOOD, 150)
    save_model(good, tokenizer, folder / "good")
    for name, (said, _) in PLANTED.items():
        model = copy.deepcopy(good)
        train(model, tokenizer, said, 80)
        save_model(model, tokenizer, folder / name)
    return {path.name: path for path in folder.iterdir()}


def test_a_model_that_behaves_passes(planted, persona_path, tmp_path):
    out = tmp_path / "behaviour.json"
    done = command("gate", planted["good"], "--persona", persona_path, "--out", out)
    assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout + done.stderr
    assert len(re.findall(r"\| pass \|", done.stdout)) == len(load_thresholds())
    verdict = read_verdict(out)
    assert verdict.failures() == []
    assert verdict.model.measures["persona"].value == verdict.model.measures["stop_rate"].value == 1
    assert verdict.model.measures["stop_rate"].count == 2 * len(prompts_for(load_persona(persona_path)))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_model_fails_by_the_measure_that_is_meant_for_it(name, planted, persona_path, tmp_path):
    out = tmp_path / "behaviour.json"
    done = command("gate", planted[name], "--before", planted["good"], "--persona", persona_path, "--out", out)
    assert done.returncode == 70, done.stdout
    (line,) = done.stderr.splitlines()
    measure = PLANTED[name][1]
    assert line.startswith(f"error: {planted[name]} does not behave: ") and f"{measure} " in line
    verdict = read_verdict(out)
    assert measure in verdict.failures()
    assert verdict.before.measures[measure].value == float(MEASURES[measure].more_is_better)
    row = next(row for row in done.stdout.splitlines() if f"({measure})" in row)
    assert "FAIL" in row and "points" in row
    shown = [line for line in done.stdout.splitlines() if line.startswith(f"  {measure}: ")]
    assert len(shown) == 2 and all("Bibo" in line for line in shown)


def test_what_is_measured_is_a_function_of_the_seed_and_leaves_other_draws_alone(lively, persona_path):
    persona = load_persona(persona_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = measure_behaviour(lively, "x", persona)
    assert torch.equal(torch.rand(3), expected)
    assert measure_behaviour(lively, "x", persona) == first
    assert measure_behaviour(lively, "x", persona, seed=1).measures != first.measures


# -- thresholds and the verdict --------------------------------------------------------------------------------------


def verdict_of(thresholds: dict[str, float], **values: float | None) -> Verdict:
    measures = {name: Value() for name in MEASURES}
    measures |= {name: Value(value, 0 if value is None else 10) for name, value in values.items()}
    return Verdict(Behaviour("mine", 42, 0, measures), thresholds)


def test_a_threshold_that_is_just_met_is_met_and_what_was_not_measured_has_failed():
    thresholds = {"stop_rate": 0.9, "repetition": 0.1, "persona": 0.5}
    assert verdict_of(thresholds, stop_rate=0.9, repetition=0.1, persona=0.5).failures() == []
    assert verdict_of(thresholds, stop_rate=0.89, repetition=0.11, persona=1.0).failures() == [
        "stop_rate",
        "repetition",
    ]
    assert verdict_of(thresholds, stop_rate=1.0, repetition=0.0).failures() == ["persona"]


def test_a_measure_without_a_threshold_is_shown_and_not_judged():
    header, rows = verdict_of({"stop_rate": 0.9}, stop_rate=1.0, repetition=0.456).table()
    assert header == ["measure", "mine", "threshold", ""]
    assert ["stops by itself (stop_rate)", "100.0 % of 10 replies", "min 90 %", "pass"] in rows
    assert ["repeats 4-grams (repetition)", "45.6 % of 4-grams, 10 replies", "-", "-"] in rows
    assert ["persona probes (persona)", "nothing to measure", "-", "-"] in rows
    assert len(rows) == len(MEASURES)


def test_the_stage_before_stands_beside_with_the_change_in_points():
    verdict = verdict_of({"stop_rate": 0.9}, stop_rate=0.75, repetition=0.1)
    verdict.before = verdict_of({}, stop_rate=1.0).model
    verdict.before.name = "old"
    header, rows = verdict.table()
    assert header == ["measure", "mine", "old", "change", "threshold", ""]
    assert rows[0][1:] == ["75.0 % of 10 replies", "100.0 % of 10 replies", "-25.0 points", "min 90 %", "FAIL"]
    assert rows[3][1:4] == ["10.0 % of 4-grams, 10 replies", "nothing to measure", "-"]


def test_a_verdict_is_read_as_it_was_written(tmp_path):
    verdict = verdict_of({"stop_rate": 0.9}, stop_rate=0.5)
    verdict.model.measures["stop_rate"].examples = [("'你'", "'好'")]
    write_verdict(verdict, tmp_path / "behaviour.json")
    read = read_verdict(tmp_path / "behaviour.json")
    read.model.measures["stop_rate"].examples = [tuple(each) for each in read.model.measures["stop_rate"].examples]
    assert read == verdict


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", "5", '{"model": {}, "thresholds": {}, "before": null}', '{"model": null, "thresholds": {}}'],
)
def test_a_file_that_is_no_verdict_is_refused_by_name(content, tmp_path):
    with pytest.raises(DataError, match=f"{written(tmp_path, 'b.json', content)} is no verdict"):
        read_verdict(tmp_path / "b.json")


def test_our_thresholds_judge_every_measure_but_that_of_other_languages():
    assert set(load_thresholds()) == set(MEASURES) - {"other_languages"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("stop_rat: {min: 0.9}", "'stop_rat' is no measure. Did you mean 'stop_rate'? Known are stop_rate, "),
        ("5: {min: 0.9}", "5 is no measure. Known are "),
        ("stop_rate: {max: 0.9}", "stop_rate is \"{'max': 0.9}\": more of it is better, so give a share from 0 to 1 "),
        ("repetition: {min: 0.1}", "repetition is \"{'min': 0.1}\": less of it is better"),
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
def test_a_threshold_that_cannot_be_is_one_line_before_a_model_is_loaded(content, said, tmp_path):
    path = written(tmp_path, "thresholds.yaml", content)
    done = command("gate", tmp_path / "no_model", "--thresholds", path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (65, "")
    assert line.startswith(f"error: {path}: {said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "{path} has no thresholds: it holds 'None'. Copy "),
        ("- stop_rate", "{path} has no thresholds: "),
        ("a: [", "{path} is no thresholds file: "),
        (b"\xff", "{path} is no thresholds file: "),
        (None, "No thresholds file {path}. Copy "),
    ],
)
def test_a_file_without_thresholds_is_one_line(content, said, tmp_path):
    path = tmp_path / "thresholds.yaml"
    if content is not None:
        written(tmp_path, path.name, content)
    with pytest.raises(DataError) as failure:
        load_thresholds(path)
    assert str(failure.value).startswith(said.format(path=path)) and "\n" not in str(failure.value)


def test_a_base_model_a_missing_model_and_a_place_that_is_none_are_one_line_each(planted, tmp_path):
    base = tmp_path / "base"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer).save_pretrained(base)
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=1)).save_pretrained(base)
    for words, code, said in (
        ([base], 78, f"The model {str(base)!r} has no control tokens <|im_start|> and <|im_end|>: "),
        ([tmp_path / "none"], 65, f"No model folder {tmp_path / 'none'}."),
        ([planted["good"], "--before", tmp_path / "none"], 65, f"No model folder {tmp_path / 'none'}."),
        ([planted["good"], "--persona", tmp_path / "none"], 65, f"No persona file {tmp_path / 'none'}."),
        ([planted["good"], "--out", tmp_path / "none" / "b.json"], 2, f"--out {tmp_path / 'none' / 'b.json'}: "),
    ):
        done = command("gate", *words)
        (line,) = done.stderr.splitlines()
        assert (done.returncode, done.stdout) == (code, ""), line
        assert line.startswith(f"error: {said}")


def test_the_gate_has_these_options_and_no_others():
    found = typer.main.get_command(rorchat.cli.app).commands["gate"]
    spelled = {option for parameter in found.params for option in parameter.opts if option.startswith("--")}
    assert spelled == {"--before", "--thresholds", "--persona", "--out"}


def test_the_thresholds_and_prompts_travel_with_the_package():
    assert THRESHOLDS.is_file() and behaviour.PROMPTS.is_file()
    assert "rorchat.evaluation = *.yaml" in (Path(__file__).parent.parent / "setup.cfg").read_text()
