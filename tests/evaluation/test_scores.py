"""Scores of a chat model."""

from rorchat.chatml import END_OF_TEXT, IM_END
from rorchat.evaluation import scores
from rorchat.evaluation.scores import Rate, Scores, read_scores, score_chat, write_scores
from rorchat.inference.engine import Reply
from rorchat.persona import build_probes, load_persona
from rorchat.sources.tinytown import Question, held_out_questions


def replace_replies(answer, monkeypatch) -> list[dict]:
    """Replaces generation by a function from prompt to reply; returns the settings of each call."""
    calls = []

    def replies(chat, prompts, **settings):
        calls.append(settings)
        return [answer(prompt) for prompt in prompts]

    monkeypatch.setattr(scores, "generate_replies", replies)
    return calls


def test_a_perfect_model_has_full_scores(chat, monkeypatch):
    persona = load_persona()
    known = {question.text: question.answer for question in held_out_questions()}
    known |= {probe.question: probe.expect[0] for probe in build_probes(persona)}
    end = chat.tokenizer.convert_tokens_to_ids(IM_END)
    calls = replace_replies(lambda prompt: Reply(f"It is {known[prompt]}.", True, 3, ids=(7, end)), monkeypatch)
    result = score_chat(chat, "all", "folder", persona)
    asked = len(build_probes(persona))
    assert result.questions == Rate(200, 200)
    assert result.persona == Rate(asked, asked) and asked > 5
    assert result.stops == Rate(200 + asked, 200 + asked)
    assert sum(rate.asked for rate in result.kinds.values()) == 200
    assert len(result.examples) == len(result.kinds) == 3
    assert calls == [{"max_new_tokens": 128 // 3, "temperature": 0}]


def test_empty_replies_score_zero(chat, monkeypatch):
    replace_replies(lambda prompt: Reply("", False, 0), monkeypatch)
    result = score_chat(chat, "none", "folder", load_persona())
    assert (result.questions.right, result.persona.right, result.stops.right) == (0, 0, 0)
    assert result.questions.asked == 200


def test_questions_are_counted_by_kind(chat, monkeypatch):
    asked = [Question("sum", f"{n}?", str(n)) for n in range(10)] + [Question("fact", f"f{n}", "yes") for n in range(6)]
    im_end, end_of_text = chat.tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT])
    replace_replies(
        lambda prompt: Reply(
            "3" if prompt.endswith("?") else "yes", True, 1, ids=(7, im_end if prompt == "3?" else end_of_text)
        ),
        monkeypatch,
    )
    result = score_chat(chat, "some", "folder", load_persona(), asked)
    assert result.kinds == {"sum": Rate(1, 10), "fact": Rate(6, 6)}
    assert result.questions == Rate(7, 16)
    assert result.stops.right == 1  # <|endoftext|> does not close a turn
    assert result.rows()["held-out questions"] == "43.8 % (7/16)"
    assert result.rows()["- sum"] == "10.0 % (1/10)"


def test_scores_survive_writing_and_reading(tmp_path):
    column = Scores("a", "folder", Rate(1, 3), {"sum": Rate(0, 1)}, Rate(2, 2), Rate(0, 5), 1.25, 0.5, [("你", "好")])
    column.behaviour, column.on_base_text = {"stop_rate": 0.5}, True
    empty = Scores("b", "folder")
    write_scores([column, empty], tmp_path / "scores.json")
    assert read_scores(tmp_path / "scores.json") == [column, empty]
    assert column.rows()["base validation, bits per byte"] == "0.500"
    assert column.rows()["base validation loss, nats/token"] == "1.250"
    assert column.rows()["gate: stop rate"] == "50.0 %"
    assert empty.rows() == {}
