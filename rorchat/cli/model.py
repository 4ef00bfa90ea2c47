"""Commands about a model: talk to it, score it, report on its run, publish it."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from rorchat.errors import UsageError

Folder = Annotated[str, typer.Argument(help="A model's folder, a run's folder, or a Hub id.")]


def _quiet() -> None:
    """Transformers' load bars and hints are for its developers."""
    import os

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def chat(
    folder: Folder,
    system: Annotated[str | None, typer.Option(help="A system message instead of the model's own.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 for the likeliest words; default: the model's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest words of this total share.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer; default: a quarter of the window.")
    ] = None,
) -> None:
    """Talk to a model; questions may also come through a pipe, one a line."""
    _quiet()
    from rorchat.inference.engine import load_model
    from rorchat.inference.terminal import talk

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may carry anything
    model = load_model(folder, require_chat=True)
    talk(model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="NAME=FOLDER or FOLDER, one column each.")],
    untrained: Annotated[
        bool, typer.Option(help="A first column with random weights in the first model's shape.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(help="Held-out text: a source such as text=FILE, or a token store's folder.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask Tinytown's held-out questions and the persona probes.")] = True,
    persona: Annotated[str | None, typer.Option(help="The persona file whose probes are asked.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores to this JSON file as well.")] = None,
) -> None:
    """Scores of models side by side."""
    _quiet()
    from rorchat.evaluation.compare import compare
    from rorchat.evaluation.scores import write_scores
    from rorchat.report import format_score_table

    named = [
        (name or value, value) if sign else (Path(name).name, name)
        for name, sign, value in (m.partition("=") for m in models)
    ]
    columns, notes = compare(named, untrained=untrained, text=text, ask=chat, persona=persona)
    print(format_score_table(columns))
    print(*notes, sep="\n")
    if out:
        write_scores(columns, out)


def gate(
    model: Folder,
    before: Annotated[str | None, typer.Option(help="The model of the stage before, to compare with.")] = None,
    thresholds: Annotated[Path | None, typer.Option(help="A YAML file of thresholds; default: the package's.")] = None,
    persona: Annotated[str | None, typer.Option(help="The persona file whose probes are asked.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the verdict to this JSON file as well.")] = None,
) -> None:
    """Does a chat model behave? Stops, template leaks, repetition, persona, attacks ... Ends with 70 if it does not."""
    _quiet()
    from rorchat.cli.tables import print_table
    from rorchat.evaluation import gate as behaviour_gate
    from rorchat.persona import load_persona

    if out and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {out.parent}.")
    verdict = behaviour_gate.gate(model, load_persona(persona), behaviour_gate.load_thresholds(thresholds), before)
    if out:
        behaviour_gate.write_verdict(verdict, out)
    print_table(*verdict.table())
    for measure, asked, said in verdict.examples():
        print(f"\n  {measure}: {asked} -> {said}")
    if verdict.failures():
        raise behaviour_gate.BehaviourFailure(verdict.sentence())


def report(folder: Annotated[Path, typer.Argument(help="A run's folder, or the folder of a story's runs.")]) -> None:
    """Write report.md and curves.png from what the runs logged."""
    from rorchat.evaluation.scores import read_scores
    from rorchat.report import format_stage_table, write_report

    written, curves = write_report(folder)
    print(f"report  {written}\ncurves  {curves}")
    if stages := format_stage_table(folder):
        print("\n" + stages)
    scores = folder / "scores.json"
    if scores.is_file():
        columns = read_scores(scores)
        for question, answer in columns[-1].examples:
            print(f"\n  user: {question}\n  {columns[-1].name}: {answer}")
    if (folder / "model").is_dir():
        print(f"\nmodel   {folder / 'model'}    talk to it: rorchat chat {folder / 'model'}")


def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(help="Where to: you/your-model on the Hub.")],
    private: Annotated[bool, typer.Option(help="Create the repository as a private one.")] = False,
) -> None:
    """Verify a model in a fresh process, upload it with a card, pull it back and verify again."""
    _quiet()
    from rorchat.hub import push_model

    if repository.count("/") != 1:
        raise UsageError(f"{repository!r} is no Hub id: give owner/name, as in rory/my-chat-model.")
    print(push_model(folder, repository, private=private))
