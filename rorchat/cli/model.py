"""The commands `rorchat chat`, `complete`, `evaluate`, `gate`, `report` and `push`."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rorchat.errors import UsageError

Model = Annotated[str, typer.Argument(help="A model or run folder, a project, or a Hub id.")]
Temperature = Annotated[float | None, typer.Option(help="Sampling temperature; 0: greedy; default: the model's own.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus sampling: cumulative probability.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Maximum tokens of a reply; default: a quarter of the context window.")
]
PersonaFile = Annotated[
    str | None, typer.Option(help="Persona file whose probes are asked; default: that of the model's run.")
]


def _silence_transformers() -> None:
    """Turns off the progress bars and warnings of Transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging

    logging.disable_progress_bar()


def chat(
    folder: Model,
    system: Annotated[str | None, typer.Option(help='System message, "" for none; default: the model\'s.')] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Chat with a model in the terminal or through a pipe, with one message per line."""
    _silence_transformers()
    from rorchat.inference.engine import load_model
    from rorchat.inference.terminal import run_chat

    _accept_any_input()
    model = load_model(folder, require_chat=True)
    system = None if system is None else _replace_invalid(system)
    run_chat(model, system=system, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


def _replace_invalid(argument: str) -> str:
    """An argument of the command line in valid UTF-8: Python keeps bytes that are not as lone surrogates."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _accept_any_input() -> None:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # input from a pipe may not be valid UTF-8


def complete(
    folder: Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of texts; default: all of stdin is one beginning.")
    ] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_new_tokens: MaxNewTokens = None,
) -> None:
    """Continue a text. Works with base models, which cannot chat, and with chat models."""
    _silence_transformers()
    from rorchat.inference.engine import load_model
    from rorchat.inference.terminal import run_completion

    if not prompts:
        if sys.stdin.isatty():
            print("Type the beginning of a text, then Ctrl-D on a new line.", file=sys.stderr)
        _accept_any_input()
        prompts = [sys.stdin.read().rstrip("\n")]
    model = load_model(folder)
    prompts = [_replace_invalid(prompt) for prompt in prompts]
    run_completion(model, prompts, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)


def evaluate(
    models: Annotated[list[str], typer.Argument(help="FOLDER or NAME=FOLDER of each model; one column per model.")],
    untrained: Annotated[
        bool, typer.Option(help="Add a column for a model of the same size with random weights.")
    ] = False,
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to compute the loss on: a source such as text=FILE, or a token store. Default: the validation "
            "split of each model's own pretraining."
        ),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Ask questions; --no_chat computes losses only.")] = True,
    tinytown: Annotated[
        bool | None,
        typer.Option(
            help="Ask every model Tinytown's questions, or none. Default: those that were trained on Tinytown."
        ),
    ] = None,
    persona: PersonaFile = None,
    out: Annotated[Path | None, typer.Option(help="Also write the scores to this JSON file.")] = None,
) -> None:
    """Compare models in a table: loss, bits per byte, and answers to Tinytown's questions or chat behaviour."""
    _require_parent("--out", out)
    _silence_transformers()
    from rorchat.cli.tables import print_table
    from rorchat.evaluation.compare import compare_models
    from rorchat.evaluation.scores import write_scores
    from rorchat.reporting.tables import build_score_table

    named = []
    for model in models:
        name, sign, folder = model.partition("=")
        named.append((name or folder, folder) if sign else (Path(model).name, model))
    columns, notes = compare_models(named, untrained=untrained, text=text, ask=chat, tinytown=tinytown, persona=persona)
    header, rows = build_score_table(columns)
    if rows:
        print_table(header, rows)
    print(*notes, sep="\n")
    if out:
        write_scores(columns, out)
        print(f"scores in {out}\nnext: rorchat report {out.parent}")


def _require_parent(flag: str, out: Path | None) -> None:
    """Raises UsageError if the folder of an output file does not exist, before anything is computed."""
    if out and not out.absolute().parent.is_dir():
        raise UsageError(f"{flag} {out}: the folder {out.parent} does not exist. Create it, or choose another place.")


def gate(
    model: Model,
    before: Annotated[str | None, typer.Option(help="Model of the previous stage, for comparison.")] = None,
    thresholds: Annotated[
        Path | None, typer.Option(help="YAML file with thresholds; default: the package's behaviour.yaml.")
    ] = None,
    persona: PersonaFile = None,
    out: Annotated[Path | None, typer.Option(help="Also write the verdict to this JSON file.")] = None,
) -> None:
    """Test how a chat model behaves (stopping, template leaks, repetition, persona). Exits with code 70 on failure."""
    _require_parent("--out", out)
    _silence_transformers()
    from rorchat.cli.tables import print_table
    from rorchat.evaluation import gate as behaviour_gate
    from rorchat.lineage import find_persona
    from rorchat.training.next_step import describe_next, list_commands_after_gate

    limits = behaviour_gate.load_thresholds(thresholds)
    trained = find_persona(model, persona)
    verdict = behaviour_gate.judge_model(model, trained.persona, limits, before)
    if out:
        behaviour_gate.write_verdict(verdict, out)
    print(f"persona: {trained.persona.name} ({trained.origin})")
    print_table(*verdict.table())
    for measure, question, reply in verdict.examples():
        print(f"\n  {measure}: {question} -> {reply}")
    if out:
        print(f"\nverdict in {out}")
    if verdict.failures():
        raise behaviour_gate.BehaviourFailure(verdict.summary())
    print(f"\n{model} passes", describe_next(list_commands_after_gate(model)), sep="\n")


def report(
    folder: Annotated[Path, typer.Argument(help="A run, a folder with the runs of a story, or a project.")],
) -> None:
    """Write report.md and curves.png for one or more runs."""
    from rorchat.cli.tables import print_table
    from rorchat.evaluation.scores import read_scores
    from rorchat.project_folder import locate_runs
    from rorchat.reporting.runs import find_runs
    from rorchat.reporting.summary import describe_results
    from rorchat.reporting.tables import build_stage_table
    from rorchat.reporting.write import write_report
    from rorchat.training.next_step import build_try_command, describe_next

    folder = locate_runs(folder)
    written, curves = write_report(folder)
    runs = find_runs(folder)
    print(*describe_results(folder, runs), sep="\n")
    header, rows = build_stage_table(folder)
    if rows:
        print()
        print_table(header, rows)
    scores = folder / "scores.json"
    if scores.is_file():
        columns = read_scores(scores)
        for question, answer in columns[-1].examples:
            print(f"\n  user: {question}\n  {columns[-1].name}: {answer}")
    print(f"\nreport in {written}\ncurves in {curves}")
    commands = [f"open {written}"]
    finished = [run for run in runs if (run / "model" / "config.json").is_file()]
    if finished:
        place = folder if (folder / "model" / "config.json").is_file() else finished[-1]
        print(f"model in {place / 'model'}")
        commands.append(build_try_command(finished[-1], place))
    print(describe_next(commands))


def push(
    folder: Model,
    repository: Annotated[str, typer.Argument(help="Hub id to push to, such as you/your-model.")],
    private: Annotated[bool, typer.Option(help="Create a private repository.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="Verify the model and show what would be uploaded, without a network.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Also upload report.md and curves.png, which `rorchat report` has written.")
    ] = False,
) -> None:
    """Verify a model, upload it to the Hub with a model card, download it and verify the download."""
    _silence_transformers()
    from rorchat import hub

    if repository.count("/") != 1:
        raise UsageError(f"{repository!r} is not a Hub id: give owner/name, such as rory/my-chat-model.")
    print(hub.push(folder, repository, private=private, dry_run=dry_run, report=report))
    if dry_run:
        print("next: the same command without --dry_run")
