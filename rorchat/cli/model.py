"""The commands `rorchat chat`, `evaluate`, `gate`, `report` and `push`."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rorchat.errors import UsageError

Model = Annotated[str, typer.Argument(help="Model folder, run folder or Hub id.")]


def _silence_transformers() -> None:
    """Turns off the progress bars and warnings of Transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def chat(
    folder: Model,
    system: Annotated[str | None, typer.Option(help="System message; default: the model's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Sampling temperature; 0: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling: cumulative probability.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Maximum tokens of a reply; default: a quarter of the context window.")
    ] = None,
) -> None:
    """Chat with a model in the terminal or through a pipe, with one message per line."""
    _silence_transformers()
    from rorchat.inference.engine import load_model
    from rorchat.inference.terminal import run_chat

    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # input from a pipe may not be valid UTF-8
    model = load_model(folder, require_chat=True)
    run_chat(model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="FOLDER or NAME=FOLDER of each model; one column per model.")],
    untrained: Annotated[
        bool, typer.Option(help="Add a column for a model of the same size with random weights.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(help="Text to compute the loss on: a source such as text=FILE, or a token store."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask Tinytown's validation questions and the persona probes.")] = True,
    persona: Annotated[
        str | None, typer.Option(help="Persona file whose probes are asked; default: RorChat's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Compare the scores of models in a table."""
    _silence_transformers()
    from rorchat.evaluation.compare import compare_models
    from rorchat.evaluation.scores import write_scores
    from rorchat.reporting import format_score_table

    named = []
    for model in models:
        name, sign, folder = model.partition("=")
        named.append((name or folder, folder) if sign else (Path(model).name, model))
    columns, notes = compare_models(named, untrained=untrained, text=text, ask=chat, persona=persona)
    print(format_score_table(columns))
    print(*notes, sep="\n")
    if out:
        write_scores(columns, out)


def gate(
    model: Model,
    before: Annotated[str | None, typer.Option(help="Model of the previous stage, for comparison.")] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="YAML file with thresholds; default: the package's behaviour.yaml.")
    ] = None,
    persona: Annotated[
        str | None, typer.Option(help="Persona file whose probes are asked; default: RorChat's.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the verdict to this JSON file.")] = None,
) -> None:
    """Test how a chat model behaves (stopping, template leaks, repetition, persona). Exits with code 70 on failure."""
    _silence_transformers()
    from rorchat.cli.tables import print_table
    from rorchat.evaluation import gate as behaviour_gate
    from rorchat.persona import load_persona

    if out and not out.absolute().parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist. Create it, or choose another place.")
    limits = behaviour_gate.load_thresholds(thresholds)
    verdict = behaviour_gate.judge_model(model, load_persona(persona), limits, before)
    if out:
        behaviour_gate.write_verdict(verdict, out)
    print_table(*verdict.table())
    for measure, question, reply in verdict.examples():
        print(f"\n  {measure}: {question} -> {reply}")
    if verdict.failures():
        raise behaviour_gate.BehaviourFailure(verdict.summary())


def report(folder: Annotated[Path, typer.Argument(help="Run folder, or folder with the runs of a story.")]) -> None:
    """Write report.md and curves.png for one or more runs."""
    from rorchat.evaluation.scores import read_scores
    from rorchat.reporting import format_stage_table, write_report

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
        print(f"\nmodel   {folder / 'model'}    chat: rorchat chat {folder / 'model'}")


def push(
    folder: Model,
    repository: Annotated[str, typer.Argument(help="Hub id to push to, such as you/your-model.")],
    private: Annotated[bool, typer.Option(help="Create a private repository.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only verify the model and show its card; upload nothing.")] = False,
) -> None:
    """Verify a model, upload it to the Hub with a model card, download it and verify the download."""
    _silence_transformers()
    from rorchat.hub import push_model

    if repository.count("/") != 1:
        raise UsageError(f"{repository!r} is not a Hub id: give owner/name, such as rory/my-chat-model.")
    print(push_model(folder, repository, private=private, dry_run=dry_run))
