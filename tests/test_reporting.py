"""Reports of run folders."""

import json
import struct
from pathlib import Path

import pytest

from rorchat.errors import DataError
from rorchat.evaluation.behaviour import MEASURES, Behaviour, Value
from rorchat.evaluation.gate import Verdict, write_verdict
from rorchat.evaluation.scores import Rate, Scores, write_scores
from rorchat.jsonl import read_json_lines
from rorchat.reporting.losses import list_unvalidated
from rorchat.reporting.runs import find_runs, read_run_record
from rorchat.reporting.summary import describe_results
from rorchat.reporting.tables import (
    format_replies,
    format_samples,
    format_score_table,
    format_stage_table,
    format_table,
)
from rorchat.reporting.write import write_report

PNG = b"\x89PNG\r\n\x1a\n"


def write_run(folder: Path, stage: str, logged: list[dict], samples: list[dict] = (), **record) -> Path:
    folder.mkdir(parents=True)
    values = {
        "stage": stage,
        "rorchat": "0.1.0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "device": "cpu",
        "settings": {},
        "parameters": 924_416,
        "metrics": {
            "eval_loss": 1.23456,
            "eval_bits_per_byte": 0.98765,
            "train_seconds": 88.2,
            "steps": 855,
            "tokens": 1_300_348,
        },
        "data": [
            {
                "source": "tinytown=9000",
                "licence": "Apache-2.0",
                "rows_in": 9000,
                "kept": 8998,
                "rejects": {"empty reply": 2},
            }
        ],
    }
    (folder / "run.json").write_text(json.dumps({**values, **record}))
    for name, rows in (("metrics.jsonl", logged), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def metrics(steps: int) -> list[dict]:
    training = [
        {
            "step": step,
            "loss": 5 / step,
            "learning_rate": 0.001,
            "tokens_per_second": 14_000 + step,
            "memory_bytes": 8e8,
        }
        for step in range(1, steps + 1)
    ]
    return [*training, {"step": steps, "eval_loss": 1.2}]


@pytest.fixture
def story(tmp_path) -> Path:
    """Two runs whose order by name is not their order by stage."""
    samples = [
        {"step": 0, "prompt": "Who are you?", "text": "and and | and"},
        {"step": 9, "prompt": "Who are you?", "text": "half-way"},
        {"step": 20, "prompt": "Who are you?", "text": "I am\nRorChat 你好"},
    ]
    write_run(tmp_path / "story" / "b-first", "pretrain", metrics(30), samples)
    write_run(tmp_path / "story" / "a-second", "sft", metrics(5), parameters=7, metrics={"steps": 3})
    return tmp_path / "story"


def test_a_story_of_two_runs_has_one_report_and_one_figure(story):
    report, curves = write_report(story)
    assert (report, curves) == (story / "report.md", story / "curves.png")
    lines = report.read_text().splitlines()
    assert lines[0] == "# story"
    header = (
        "| run | parameters | steps | tokens | seconds | training loss | validation loss | bits per byte | device |"
    )
    assert header in lines
    cells = "| b-first | 924,416 | 855 | 1,300,348 | 88 | 0.167 nats/token | 1.235 nats/token | 0.988 | cpu |"
    first = lines.index(cells)
    # in the order of the stages
    assert lines[first + 1] == "| a-second | 7 | 3 | 0 | 0 | 1.000 nats/token | - | - | cpu |"
    assert "![curves](curves.png)" in lines
    assert "| b-first | tinytown=9000 | Apache-2.0 | 8,998 of 9,000 | empty reply 2 |" in lines
    assert "| Who are you? | and and \\| and | I am RorChat 你好 |" in lines
    assert lines[-1] == "Made with rorchat 0.1.0, torch 2.13.0, transformers 5.23.0."
    assert "## Scores" not in lines


def test_the_curves_have_one_column_per_run(story):
    _, both = write_report(story)
    content = both.read_bytes()
    assert content[:8] == PNG and content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    _, one = write_report(story / "b-first")
    single = struct.unpack(">II", one.read_bytes()[16:24])
    assert (width, height) == (2 * single[0], single[1])
    assert single[0] > 300 and single[1] > 600


def test_the_report_has_scores_and_examples_of_the_last_model(story):
    columns = [
        Scores("before", "x", Rate(1, 200), {"sum": Rate(1, 67)}, Rate(0, 9), Rate(0, 9)),
        Scores(
            "after", "y", Rate(150, 200), {"fact": Rate(9, 10)}, Rate(9, 9), Rate(8, 9), 1.5, 0.75, [("2+2?", "4|")]
        ),
    ]
    write_scores(columns, story / "scores.json")
    text = write_report(story)[0].read_text()
    assert f"## Stages\n\n{format_score_table(columns)}\n" in text
    lines = text.splitlines()
    assert "|  | before | after |" in lines
    assert "| held-out questions | 0.5 % (1/200) | 75.0 % (150/200) |" in lines
    assert "| - sum | 1.5 % (1/67) | - |" in lines and "| - fact | - | 90.0 % (9/10) |" in lines
    assert "| bits per byte | - | 0.750 |" in lines
    assert "### Exchanges with after" in lines and "| 2+2? | 4\\| |" in lines


@pytest.mark.parametrize("half", ['{"step": 6, "lo', '{"step": 6, "text": "你'.encode()[:-1], "{", "\x00\x00\x00"])
def test_a_partly_written_line_is_skipped(half, story):
    path = story / "b-first" / "metrics.jsonl"
    before = read_json_lines(path)
    with path.open("ab") as file:
        file.write(half if isinstance(half, bytes) else half.encode())
    assert len(before) == 31 and read_json_lines(path) == before
    report, curves = write_report(story)
    assert curves.read_bytes()[:8] == PNG
    with path.open("ab") as file:  # a resumed run appends
        file.write(b'\n{"step": 7, "loss": 0.5}\n')
    assert read_json_lines(path) == [*before, {"step": 7, "loss": 0.5}]


def test_a_run_without_metrics_or_samples_is_reported(tmp_path):
    run = write_run(tmp_path / "only", "pretrain", [], metrics={}, data=[])
    (run / "metrics.jsonl").unlink()
    report, curves = write_report(run)
    assert "| only | 924,416 | 0 | 0 | 0 | - | - | - | cpu |" in report.read_text().splitlines()
    assert "No samples were generated." in report.read_text()
    assert curves.read_bytes()[:8] == PNG


def leave_unfinished(run: Path) -> None:
    """Reduces the record of a run to what it is before the run has finished."""
    record = json.loads((run / "run.json").read_text())
    for name in ("metrics", "data", "parameters"):
        record.pop(name)
    settings = {"settings": {"model": "runs/first/pretrain", "replay": "text=x"}, "inputs": {"sources": {}}}
    (run / "run.json").write_text(json.dumps(record | settings))


def test_an_unfinished_run_is_reported_with_its_steps_and_losses_so_far(story):
    leave_unfinished(story / "a-second")
    logged = [{"step": 4, "tokens": 900, "eval_loss": 2.5, "eval_bits_per_byte": 1.5, "seconds": 7.4}]
    logged += [{"step": 6, "tokens": 1300, "loss": 2.25, "seconds": 11.6}, {"step": 7, "loss": "nan", "tokens": 1500}]
    (story / "a-second" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    for folder in (story, story / "a-second"):
        report, curves = write_report(folder)
        cells = "| - | 7 | 1,500 | 12 | 2.250 nats/token | 2.500 nats/token | 1.500 | cpu |"
        assert f"| a-second (unfinished) {cells}" in report.read_text().splitlines()
        assert curves.read_bytes()[:8] == PNG


def test_a_run_that_has_logged_nothing_yet_is_reported(story):
    leave_unfinished(story / "a-second")
    for name in ("metrics.jsonl", "samples.jsonl"):
        (story / "a-second" / name).unlink()
    report, _ = write_report(story / "a-second")
    assert "| a-second (unfinished) | - | 0 | 0 | 0 | - | - | - | cpu |" in report.read_text().splitlines()
    assert "## What the losses cover" not in report.read_text()


def test_smoke_runs_are_left_out_unless_there_are_no_others(story):
    smoke = write_run(story / "dpo-smoke", "dpo", [])
    assert [run.name for run in find_runs(story)] == ["b-first", "a-second"]
    assert find_runs(smoke) == [smoke]
    assert "| dpo-smoke |" in write_report(smoke)[0].read_text()
    for name in ("a-second", "b-first"):
        (story / name / "run.json").unlink()
    assert find_runs(story) == [smoke]


def test_the_report_says_which_sources_the_losses_cover(tmp_path):
    data = [{"source": f"{name}=9", "licence": "-", "rows_in": 9, "kept": 9, "rejects": {}, "validation": held_out}
            for name, held_out in (("tinytown", 2), ("persona", 0))]  # fmt: skip
    logged = [{"step": 2, "eval_tinytown_loss": 0.75, "eval_loss": 0.7, "loss": 2.0}]
    settings = {"replay": "runs/pretrain/tokens/town", "replay_share": "0.25"}
    sft = write_run(tmp_path / "sft", "sft", logged, data=data, settings=settings)
    tokens = {"train_tokens": 9000, "validation_tokens": 100}
    store = {"source": "text=a/", "licence": "-", "rows_in": 9, "kept": 9, "rejects": {}} | tokens
    mixture = {"mixture": {"sources": {"tales": {}}}}
    logged = [{"step": 2, "eval_loss": 1.5}]  # there is a single source
    write_run(tmp_path / "pretrain", "pretrain", logged, data=[store], inputs=mixture)
    lines = write_report(tmp_path)[0].read_text().splitlines()
    start = lines.index("| run | source | in the training loss | in the validation loss | validation loss |")
    assert lines[start + 2 : start + 6] == [
        "| pretrain | text=a/ | 9,000 tokens | 100 tokens | 1.500 |",
        "| sft | tinytown=9 | 7 conversations | 2 conversations | 0.750 |",
        "| sft | persona=9 | 9 conversations | not in it | - |",
        "| sft | runs/pretrain/tokens/town (replay) | 25% of the tokens, all of them targets | not in it | - |",
    ]
    assert list_unvalidated(sft) == ["persona", "replay"]
    assert list_unvalidated(tmp_path / "pretrain") == []


@pytest.mark.parametrize(("share", "read"), [(1.0, "100 tokens"), (0.25, "25.00% of 100 tokens")])
def test_the_report_says_how_much_of_the_validation_split_an_evaluation_reads(share, read, tmp_path):
    store = {"source": "text=a/", "licence": "-", "rows_in": 9, "kept": 9, "rejects": {}, "train_tokens": 900}
    data = [store | {"validation_tokens": 100}]
    write_run(tmp_path / "run", "pretrain", [{"step": 2, "eval_loss": 1.5}], data=data, evaluated_share=share)
    assert f"| text=a/ | 900 tokens | {read} | 1.500 |" in write_report(tmp_path)[0].read_text()


def test_runs_are_sorted_by_stage(tmp_path):
    for name, stage in (("a", "grpo"), ("b", "some"), ("c", "sft"), ("d", "pretrain"), ("e", "sft"), ("f", "dpo")):
        write_run(tmp_path / name, stage, [])
    (tmp_path / "empty").mkdir()
    assert [run.name for run in find_runs(tmp_path)] == ["d", "c", "e", "f", "a", "b"]
    assert find_runs(tmp_path / "c") == [tmp_path / "c"]


@pytest.mark.parametrize("inside", [[], ["metrics.jsonl"], ["deep/deeper/run.json"]])
def test_a_folder_without_a_run_is_a_data_error(inside, tmp_path):
    for name in inside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=f"{tmp_path} contains no run: there is no run.json in it") as failure:
        write_report(tmp_path)
    assert "\n" not in str(failure.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="nowhere contains no run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"{", b'{"stage": "sft"', b"\xff\xfe", b"[]", b"5"])
def test_an_unreadable_record_is_a_data_error(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path}/run.json (cannot be read|is not the record of a run)"):
        read_run_record(tmp_path)


def test_cells_with_bars_and_line_ends_keep_the_table_intact():
    assert (
        format_table(["a", "b"], [["x|y", "1\n2"], ["", "-"]]) == "| a | b |\n| --- | --- |\n| x\\|y | 1 2 |\n|  | - |"
    )


def test_samples_show_the_first_and_last_reply_to_every_prompt(tmp_path):
    samples = [{"step": step, "prompt": prompt, "text": f"{prompt} at {step}"} for step in (0, 5, 9) for prompt in "pq"]
    run = write_run(tmp_path / "run", "sft", [], samples)
    assert format_samples([run]).splitlines()[2:] == [
        "| prompt | before | after |",
        "| --- | --- | --- |",
        "| p | p at 0 | p at 9 |",
        "| q | q at 0 | q at 9 |",
    ]


def test_a_run_that_has_sampled_once_has_one_column_of_samples(tmp_path):
    run = write_run(tmp_path / "run", "sft", [], [{"step": 0, "prompt": "p", "text": "p at 0"}])
    assert format_samples([run]).splitlines()[2:] == ["| prompt | after 0 steps |", "| --- | --- |", "| p | p at 0 |"]


def test_the_newest_replies_of_the_last_run_come_first(story):
    lines = write_report(story)[0].read_text().splitlines()
    start = lines.index("## What it says")
    assert lines[start + 2 : start + 5] == [
        "| prompt | b-first |",
        "| --- | --- |",
        "| Who are you? | I am RorChat 你好 |",
    ]
    assert start < lines.index("## Runs")
    assert format_replies([story / "a-second"]) == ""


def test_the_summary_names_the_model_its_time_and_what_was_planned(tmp_path):
    runs = tmp_path / "bot" / "runs"
    metrics = {"eval_bits_per_byte": 1.75, "train_seconds": 30}
    write_run(runs / "pretrain", "pretrain", [], metrics=metrics, settings={"sources": ["text=a"]}, inputs={})
    chat = write_run(runs / "sft", "sft", [], metrics={"train_seconds": 60}, settings={"model": "runs/pretrain"})
    (tmp_path / "bot" / "plan.json").write_text('{"predicted_bits_per_byte": 1.5}')
    first, second = describe_results(runs, find_runs(runs))
    assert first == (
        "A chat model with 924,416 parameters, trained from random weights in 1.5 min on cpu (pretrain, sft)."
    )
    assert second.startswith("After pretrain it predicts held-out text with 1.75 bits per byte; 1.50 were planned. ")
    assert second.endswith("a compressor that uses the model would need 22% of the text's size.")
    leave_unfinished(chat)
    first, _ = describe_results(runs, find_runs(runs))
    assert first.startswith("A base model, which continues texts, with 924,416 parameters, trained from random weights")
    assert first.endswith(" in 30 s on cpu (pretrain). Not finished: sft.")
    assert "1.50 were planned" not in describe_results(runs / "pretrain", [runs / "pretrain"])[1]


def test_the_summary_of_an_unfinished_first_stage(tmp_path):
    run = write_run(tmp_path / "pretrain", "pretrain", [])
    leave_unfinished(run)
    assert describe_results(run, [run]) == ["No stage has finished yet. Not finished: pretrain."]


@pytest.mark.parametrize(
    ("stop_rate", "sentence"),
    [
        (1.0, "It passes the behaviour gate: among other things, it ends its turns,"),
        (0.5, "dpo fails the behaviour gate: stop_rate 50.0 % of 10 replies (min 95 %). The table under Behaviour"),
    ],
)
def test_the_summary_has_the_verdict_of_the_gate(stop_rate, sentence, story):
    measures = {name: Value(stop_rate, 10) for name in MEASURES}
    write_verdict(Verdict(Behaviour("dpo", 128, 0, measures), {"stop_rate": 0.95}), story / "behaviour.json")
    assert describe_results(story, find_runs(story))[-1].startswith(sentence)


def test_measures_of_one_model_alone_are_not_repeated_in_the_table_of_stages(tmp_path):
    write_run(tmp_path / "sft", "sft", [])
    columns = [Scores("sft", str(tmp_path / "sft"), Rate(1, 2), behaviour={"stop_rate": 0.75})]
    write_scores(columns, tmp_path / "scores.json")
    assert "| gate: stop rate | 75.0 % |" in format_stage_table(tmp_path)
    measures = {name: Value(1.0, 10) for name in MEASURES}
    verdict = Verdict(Behaviour(str(tmp_path / "sft"), 128, 0, measures), {"stop_rate": 0.9})
    write_verdict(verdict, tmp_path / "behaviour.json")
    assert format_stage_table(tmp_path).splitlines()[2:] == [
        "| held-out questions | 50.0 % (1/2) |",
        "| gate | pass |",
    ]


def test_all_measures_of_a_stage_are_one_column(tmp_path):
    """Models are named by run or model folder; the base loss of a stage may come from the next one."""
    story, text = tmp_path / "story", "90 held-out tokens of runs/pretrain/tokens/town"
    write_run(story / "pretrain", "pretrain", [])
    for name, before, losses in (("sft", "pretrain", (0.5, 5.25)), ("dpo", "sft/model", (5.25, 6.125))):
        metrics = dict(zip(("base_loss_before", "base_loss"), losses, strict=True)) | {"base_bits_per_byte": 1.0}
        given = {"settings": {"model": str(story / before)}, "metrics": metrics, "base_text": text}
        write_run(story / name, name, [], **given)
    folders = {"untrained": "pretrain", "pretrained": "pretrain", "tuned": "sft/model"}
    columns = [Scores(name, str(story / folder), Rate(len(name), 20)) for name, folder in folders.items()]
    write_scores(columns, story / "scores.json")
    judged = {"stop_rate": 0.9, "template_leaks": 0.0}
    behaviours = [
        Behaviour(str(story / name), 128, 0, {measure: Value(value, 10) for measure in MEASURES})
        for name, value in (("dpo", 1.0), ("sft", 0.75))
    ]
    write_verdict(Verdict(behaviours[0], judged, behaviours[1]), story / "behaviour.json")
    lines = format_stage_table(story).splitlines()
    assert lines[0] == "|  | untrained | pretrained | tuned | dpo |"
    assert lines[2] == "| held-out questions | 45.0 % (9/20) | 50.0 % (10/20) | 25.0 % (5/20) | - |"
    assert lines[-4:] == [
        "| base validation loss, nats/token | - | 0.500 | 5.250 | 6.125 |",
        "| gate: stop rate | - | - | 75.0 % | 100.0 % |",
        "| gate: template leaks | - | - | 75.0 % | 100.0 % |",
        "| gate | - | - | - | FAIL |",
    ]
    record = json.loads((story / "dpo" / "run.json").read_text()) | {"base_text": "7 tokens of text=mine.txt"}
    (story / "dpo" / "run.json").write_text(json.dumps(record))
    lines = format_stage_table(story).splitlines()
    assert f"| base validation loss, nats/token, on {text} | - | 0.500 | 5.250 | - |" in lines
    assert "| base loss, nats/token, on 7 tokens of text=mine.txt | - | - | 5.250 | 6.125 |" in lines


def test_a_verdict_is_a_section_of_the_report(story):
    measures = {name: Value(1.0, 10) for name in MEASURES}
    measures["template_leaks"].examples = [("'Hi'", "'<|im_start|>'")]
    write_verdict(Verdict(Behaviour("dpo", 128, 0, measures), {"template_leaks": 0.0}), story / "behaviour.json")
    lines = write_report(story)[0].read_text().splitlines()
    assert lines.index("## Behaviour") < lines.index("## Samples")
    assert "| leaks the template (template_leaks) | 100.0 % of 10 replies | max 0 % | FAIL |" in lines
    assert "| template_leaks | 'Hi' | '<\\|im_start\\|>' |" in lines
    (story / "behaviour.json").unlink()
    assert "## Behaviour" not in write_report(story)[0].read_text()
