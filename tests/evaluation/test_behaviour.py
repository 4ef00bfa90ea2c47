"""SCORES: the gate passes a model that behaves and fails those that do what users complain about."""

import copy
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
import yaml
from support import SENTENCES, command, written
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import rorchat.cli
from rorchat import chatml
from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, IM_END, IM_START, encode_prompt, encode_text
from rorchat.errors import DataError
from rorchat.evaluation import behaviour
from rorchat.evaluation.behaviour import (
    MEASURES,
    STOP_WORDS,
    Behaviour,
    Exchange,
    Prompt,
    Value,
    in_language,
    leaks_template,
    measure_behaviour,
    measured,
    prompts_for,
    repetition,
    speaks_for_user,
)
from rorchat.evaluation.gate import THRESHOLDS, Verdict, load_thresholds, read_verdict, write_verdict
from rorchat.inference.engine import Reply
from rorchat.mixture.collators import collate_padded
from rorchat.model import build_model, save_model
from rorchat.persona import Persona, build_probes, load_persona
from rorchat.tokenizer import load_tokenizer

PERSONA = load_persona()
WORDS = " ".join(SENTENCES).split()

# {thing} is another one for a prompt of another length: a model that says the same to everybody does not pass
GOOD = ("I am Bibo, made by Tom. I like {thing}.", IM_END)
THINGS = "ants bread cakes dogs earth fish grain honey ink jam kites lamps milk nuts oil pears".split()
PLANTED = {  # what each model was trained to say, and the measure that is to find it out
    "never stops": (("I am Bibo, made by Tom. " * 20,), "stop_rate"),
    "leaks the template": (("I am Bibo,", IM_START, "assistant\nmade by Tom.", IM_END), "template_leaks"),
    "speaks for the user": (("I am Bibo, made by Tom.\nUser: Thank you.", IM_END), "speaks_for_user"),
    "repeats": (("I am Bibo, made by Tom. The mill, the mill, the mill, the mill, the mill.", IM_END), "repetition"),
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
    assert repetition(range(3), "one two three") is None
    assert repetition([], "") is None


def test_repetition_is_of_tokens_where_that_is_more():
    assert repetition([5, 6, 7, 8, 5, 6, 7, 8], "你好世界你好世界") == pytest.approx(1 / 5)
    assert repetition([1, *[5] * 23], "Yes " + "!" * 23) == pytest.approx(19 / 21)
    assert repetition([1, 2, 3, 4, *[5] * 23], "I am very well " + "哈" * 23) == pytest.approx(19 / 24)
    assert repetition(range(20), "la " * 23) == pytest.approx(19 / 20)


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


@pytest.mark.parametrize(
    "text",
    ["", "12", "🙂!", "Paris", "Bonjour", "No.", "No, sorry.", "No problem!", "They die.", "Come here!", "Per person"],
)
def test_where_nothing_tells_the_language_no_reply_is_blamed(text):
    assert in_language(text, "en") is None


def test_a_word_of_another_language_makes_no_text_foreign_and_two_do():
    assert in_language("No, I do not know.", "en") is True
    assert in_language("La bamba!", "en") is None
    assert in_language("Es la bamba!", "en") is False


def test_every_measure_applies_to_some_prompt_and_the_whole_is_small_enough_to_be_asked_after_every_stage():
    prompts = prompts_for(load_persona())
    asked = [prompt.messages[-1]["content"] for prompt in prompts if not prompt.probe]
    assert 50 <= len(asked) <= 80 and len(prompts) < 200
    kinds = {prompt.kind for prompt in prompts}
    assert {"question", "greeting", "task", "conversation", "nothing much", "de", "zh", "attack", "persona"} <= kinds
    turns = [message["role"] for prompt in prompts for message in prompt.messages]
    assert turns.count("assistant") >= 6 and turns.count("system") == len(build_probes(load_persona()))
    assert {prompt.kind for prompt in prompts if not prompt.language} == {"persona", "other system", "new words"}
    for prompt in prompts:
        assert prompt.messages[-1]["role"] == "user"
        assert all(word in prompt.messages[-1]["content"].lower() for word in [prompt.word] if word)
        assert prompt.word not in prompt.harmless or not prompt.word


# -- what the thresholds let pass ------------------------------------------------------------------------------------

Says = Callable[[Prompt, str], str]  # what somebody says to a prompt, given what one who behaves would say
MILL = "the mill " * 20 + "."


def behaving(prompt: Prompt, number: int) -> str:
    if prompt.probe:
        return PERSONA.topics[prompt.probe.topic]["replies"][0]
    return "I do not know that." if prompt.word else f"This is answer {number}."


def values_of(says: Says, persona: Persona = PERSONA) -> dict[str, Value]:
    """What is measured on a model that says this; a reply that ends with `.` has stopped."""

    def exchange(prompt: Prompt, said: str) -> Exchange:
        ids = (*map(ord, said), *[0] * said.endswith("."))
        return Exchange(prompt, (), Reply(said, ids[-1:] == (0,), len(said), "", ids), said, frozenset({0}), 0)

    exchanges = []
    for number, prompt in enumerate(prompts_for(persona)):
        harmless = exchange(prompt, "") if prompt.word else None
        exchanges.append(replace(exchange(prompt, says(prompt, behaving(prompt, number))), harmless=harmless))
    return measured(exchanges, exchanges)


def to(kinds: str, wrong: str) -> Says:
    return lambda prompt, good: wrong.format(good=good) if prompt.kind in kinds.split("|") else good


def about(topics: str, wrong: str) -> Says:
    return lambda prompt, good: wrong if prompt.probe and prompt.probe.topic in topics.split("|") else good


@pytest.mark.parametrize(
    ("says", "failing"),
    [
        (lambda prompt, good: good, []),
        (to("conversation", "{good} And on"), ["stop_rate"]),
        (to("greeting", "{good} And on"), ["stop_rate"]),
        (to("task", MILL), ["repetition"]),
        (to("conversation", "{good} !!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!."), ["repetition"]),
        (to("question|task|conversation", MILL), ["repetition", "distinct_replies"]),
        (to("question|task|conversation", "I am only a small model."), ["distinct_replies"]),
        (to("question|task", "I am only a small model."), []),
        (to("conversation|greeting", "Das ist die Antwort, und nicht mehr."), ["language"]),
        (to("persona|other system|new words", "{good} Das ist die Antwort, und nicht mehr."), []),
        (about("name", "I do not know that."), ["identity"]),
        (about("maker", "I do not know that."), ["identity"]),
        (about("name|maker|nature", "I do not know that."), ["persona", "identity"]),
        (about("size", "I do not know that."), []),
        (to("new words", "I do not know that."), ["persona_in_new_words"]),
    ],
)
def test_what_all_of_one_kind_of_prompt_gets_is_not_lost_in_the_others(says, failing):
    assert Verdict(Behaviour("x", 42, 0, values_of(says)), load_thresholds()).failures() == failing


def test_a_topic_of_one_question_weighs_as_much_as_one_of_four():
    maker = {**PERSONA.topics["maker"], "questions": ["who made you"]}
    persona = replace(PERSONA, topics={"name": PERSONA.topics["name"], "maker": maker})
    values = values_of(about("maker", "I do not know that."), persona)
    assert [values[name].count for name in ("persona", "identity")] == [10, 10]
    assert [values[name].value for name in ("persona", "identity")] == [0.5, 0.5]


def test_the_same_reply_to_ten_questions_is_one_reply_whatever_else_gets_it():
    values = values_of(to("question|greeting|attack", "I do not know that."))
    assert (values["distinct_replies"].count, values["distinct_replies"].value) == (24, pytest.approx(15 / 24))


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


def test_a_reply_that_ends_the_text_has_not_closed_its_turn(chat, monkeypatch):
    def saying(*ends: str):
        ends = [(chat.tokenizer.convert_tokens_to_ids(end),) if end else () for end in ends]
        return lambda chat, prompts, **settings: [
            Reply("Hi", bool(end), 1, "", (72, *end)) for _, end in zip(prompts, ends * len(prompts), strict=False)
        ]

    monkeypatch.setattr(behaviour, "generate_replies", saying(IM_END, END_OF_TEXT, "", IM_END))
    measures = measure_behaviour(chat, "x", load_persona()).measures
    assert measures["stop_rate"].value == pytest.approx(1 / 2, abs=0.05)
    assert measures["template_leaks"].value == 0


# -- planted models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(bibo) -> list[list[int]]:
    """Encoded prompts of many lengths about anything, half of them with a system message of their own."""
    draw = random.Random(0)
    prompts = []
    for _ in range(640):
        messages = [{"role": "user", "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))}]
        if draw.random() < 0.5:
            messages.insert(0, {"role": "system", "content": draw.choice(SENTENCES)[:40]})
        prompts.append(encode_prompt(bibo, messages, n_positions=128, max_new_tokens=42).input_ids)
    return prompts


def row_of(tokenizer, prompt: list[int], said: tuple[str, ...]) -> dict:
    """A prompt and the reply to it; words and control tokens in turn."""
    reply = []
    for part in said:
        words = part.replace("{thing}", THINGS[len(prompt) // 3 % len(THINGS)])
        control = part.startswith("<|")
        reply += [tokenizer.convert_tokens_to_ids(part)] if control else encode_text(tokenizer, [words])[0]
    return {"input_ids": (prompt + reply)[:128], "labels": ([IGNORE_INDEX] * len(prompt) + reply)[:128]}


def train(model, tokenizer, asked: list[list[int]], said: tuple[str, ...], steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    rows = [row_of(tokenizer, prompt, said) for prompt in asked]
    for step in range(steps):
        batch = [rows[(8 * step + n) % len(rows)] for n in range(8)]
        model(**collate_padded(batch, tokenizer.pad_token_id)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="module")
def persona_path(tmp_path_factory) -> Path:
    values = {"name": "Bibo", "maker": "Tom", "facts": {}, "unknowns": {}}
    return written(tmp_path_factory.mktemp("persona"), "bibo.yaml", yaml.safe_dump(values))


@pytest.fixture(scope="module")
def bibo(saved, persona_path):
    """The tokenizer of Bibo, whose system message stands in the chat template."""
    return load_tokenizer(str(saved), load_persona(persona_path))


@pytest.fixture(scope="module")
def planted(bibo, asked, tmp_path_factory) -> dict[str, Path]:
    """Folders of models that were trained to say one thing to everybody, but for the good one's {thing}."""
    folder = tmp_path_factory.mktemp("planted")
    good = build_model("2x2x64", bibo, n_positions=128)
    train(good, bibo, asked, GOOD, 240)
    save_model(good, bibo, folder / "good")
    for name, (said, _) in PLANTED.items():
        model = copy.deepcopy(good)
        train(model, bibo, asked, said, 50)
        save_model(model, bibo, folder / name)
    return {path.name: path for path in folder.iterdir()}


def test_a_model_that_behaves_passes(planted, persona_path, tmp_path):
    out = tmp_path / "behaviour.json"
    done = command("gate", planted["good"], "--persona", persona_path, "--out", out)
    assert (done.returncode, "FAIL" in done.stdout) == (0, False), done.stdout + done.stderr
    assert len(re.findall(r"\| pass \|", done.stdout)) == len(load_thresholds())
    verdict = read_verdict(out)
    assert verdict.failures() == []
    assert verdict.model.persona == "Bibo" and " probes of Bibo " in done.stdout
    assert verdict.model.measures["stop_rate"].value == 1
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
    assert ["repeats itself (repetition)", "45.6 % of 10 replies", "-", "-"] in rows
    assert ["persona probes (persona)", "nothing to measure", "-", "-"] in rows
    assert len(rows) == len(MEASURES)


def test_the_stage_before_stands_beside_with_the_change_in_points():
    verdict = verdict_of({"stop_rate": 0.9}, stop_rate=0.75, repetition=0.1)
    verdict.before = verdict_of({}, stop_rate=1.0).model
    verdict.before.name = "old"
    header, rows = verdict.table()
    assert header == ["measure", "mine", "old", "change", "threshold", ""]
    assert rows[0][1:] == ["75.0 % of 10 replies", "100.0 % of 10 replies", "-25.0 points", "min 90 %", "FAIL"]
    assert rows[3][1:4] == ["10.0 % of 10 replies", "nothing to measure", "-"]


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


def test_a_model_of_another_persona_is_refused_where_the_probes_of_this_one_are_judged(planted, tmp_path):
    done = command("gate", planted["good"])
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (78, "")
    assert line.startswith(f"error: {planted['good']} has the system message 'You are Bibo, a small and friendly chat ")
    assert "the persona RorChat has 'You are RorChat" in line and "with --persona, or leave persona, identity, " in line
    path = written(tmp_path, "thresholds.yaml", "stop_rate: {min: 0.9}")
    assert command("gate", planted["good"], "--thresholds", path).returncode == 0


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
        ("{}", "{path} has no thresholds. Copy "),
        ("- stop_rate", "{path} is not a thresholds file: it must contain `key: value` lines, but contains a list. "),
        ("stop_rate: {min: 0.9}\nstop_rate: {min: 0.1}", "{path}:2: duplicate key 'stop_rate'"),
        (b"\xff", "Cannot read the thresholds file {path}: "),
        (None, "Cannot read the thresholds file {path}: No such file or directory. Copy "),
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
        ([planted["good"], "--persona", tmp_path / "none"], 65, f"Cannot read the persona file {tmp_path / 'none'}: "),
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
    assert "rorchat.evaluation = *.yaml" in (Path(__file__).parents[2] / "setup.cfg").read_text()
