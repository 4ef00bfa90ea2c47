"""The commands about finished models as functions: `load`, `evaluate`, `gate`, `report` and `push`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rorchat.console import quiet_libraries
from rorchat.errors import UsageError

if TYPE_CHECKING:
    from rorchat.evaluation.gate import Verdict
    from rorchat.evaluation.scores import Scores
    from rorchat.inference.engine import ChatModel

StrPath = str | Path


def load(model: StrPath, device: str | None = None) -> "ChatModel":
    """Load a model to talk to: `.chat("Hello")`, `.complete("Once upon a time")`, `.model` and `.tokenizer`.

    Args:
        model: a run folder, a model folder or a Hub id.
        device: "cuda", "cpu", ...; None for a GPU if there is one.

    Raises:
        DataError, RemoteError: the model cannot be loaded.
        MismatchError: the tokenizer is not the model's.
    """
    with quiet_libraries():
        from rorchat.inference.engine import load_model

        return load_model(str(model), device)


@dataclass(frozen=True)
class Evaluation:
    """The scores of several models. `print` shows them as a table.

    Attributes:
        scores: one for each model, in the given order.
        notes: what was measured, one sentence each.
    """

    scores: "list[Scores]"
    notes: list[str]

    def __str__(self) -> str:
        from rorchat.reporting.tables import format_score_table

        return "\n".join([format_score_table(self.scores), *self.notes])

    def _repr_markdown_(self) -> str:  # in a notebook
        return str(self)


def evaluate(
    models: StrPath | Sequence[StrPath] | Mapping[str, StrPath],
    *,
    untrained: bool = False,
    text: StrPath | None = None,
    chat: bool = True,
    tinytown: bool | None = None,
    persona: StrPath | None = None,
    out: StrPath | None = None,
) -> Evaluation:
    """Compare models: the loss on a text, and answers to Tinytown's questions or chat behaviour.

        print(rorchat.evaluate(["runs/pretrain", "runs/sft"], out="runs/scores.json"))

    Args:
        models: one or several run folders, model folders or Hub ids; a dict gives them names.
        untrained: add a model of the same size with random weights.
        text: a text to compute the loss on: a source such as "text=FILE", or a token store; None for the validation
            split of each model's own pretraining.
        chat: ask questions; False computes losses only.
        tinytown: ask every model Tinytown's questions, or none; None for those that were trained on Tinytown. The
            behaviour of other chat models is measured as by `gate`.
        persona: the persona file whose probes are asked; None for that of the model's run.
        out: also write the scores to this JSON file, where `report` finds them if it is named scores.json.

    Raises:
        UsageError: no model is given, or the folder of `out` does not exist.
        DataError, RemoteError: a model or the text cannot be loaded.
        MismatchError: the token store was written with another tokenizer.
    """
    if isinstance(models, (str, Path)):
        models = [models]
    if not isinstance(models, Mapping):
        models = {Path(model).name: model for model in models}
    if not models:
        raise UsageError("No models: give at least one run folder, model folder or Hub id.")
    _require_folder_of(out)
    with quiet_libraries():
        from rorchat.evaluation.compare import compare_models
        from rorchat.evaluation.scores import write_scores

        named = [(name, str(model)) for name, model in models.items()]
        scores, notes = compare_models(
            named, untrained=untrained, text=_as_text(text), ask=chat, tinytown=tinytown, persona=_as_text(persona)
        )
        if out is not None:
            write_scores(scores, Path(out))
    return Evaluation(scores, notes)


def gate(
    model: StrPath,
    *,
    before: StrPath | None = None,
    thresholds: StrPath | None = None,
    persona: StrPath | None = None,
    out: StrPath | None = None,
) -> "Verdict":
    """Test how a chat model behaves: does it stop, repeat itself, leak the chat template, know who it is?

        verdict = rorchat.gate("runs/sft")
        verdict.failures()  # [] if every measure passed

    Args:
        before: the model of the previous stage, for comparison.
        thresholds: a YAML file with thresholds; None for the package's behaviour.yaml.
        persona: the persona file whose probes are asked; None for that of the model's run.
        out: also write the verdict to this JSON file, where `report` finds it if it is named behaviour.json.

    Returns:
        The verdict. A model that fails raises nothing, unlike the command, which exits with code 70.

    Raises:
        UsageError: the folder of `out` does not exist.
        DataError, RemoteError: a model, the persona or the thresholds cannot be loaded.
        MismatchError: the model has no chat template, or its chat template belongs to another persona.
    """
    _require_folder_of(out)
    with quiet_libraries():
        from rorchat.evaluation.gate import judge_model, load_thresholds, write_verdict
        from rorchat.persona import load_persona

        limits = load_thresholds(thresholds)
        given = None if persona is None else load_persona(persona)
        verdict = judge_model(str(model), given, limits, _as_text(before))
        if out is not None:
            write_verdict(verdict, Path(out))
    return verdict


class ReportPaths(NamedTuple):
    """The files that `report` has written."""

    report: Path
    curves: Path


def report(folder: StrPath) -> ReportPaths:
    """Write report.md and curves.png for a run, a folder with the runs of several stages, or a project.

    Raises:
        DataError: there is no run in the folder.
    """
    with quiet_libraries():
        from rorchat.project_folder import locate_runs
        from rorchat.reporting.write import write_report

        return ReportPaths(*write_report(locate_runs(Path(folder))))


def push(model: StrPath, repository: str, *, private: bool = False, dry_run: bool = False, report: bool = False) -> str:
    """Publish a model on the Hub: verify it, upload it with a model card, download it and verify the download.

    Args:
        model: a run folder or a model folder.
        repository: the Hub id, such as "you/your-model".
        private: create a private repository.
        dry_run: only verify the model, list the files and build the card; upload nothing.
        report: also upload the report that `rorchat report` has written.

    Returns:
        What was done, in a few lines; after a dry run also the files with their sizes, and the model card.

    Raises:
        UsageError: the name of the repository is invalid.
        DataError, MismatchError: the model cannot be published; nothing was uploaded.
        PermissionDenied, RemoteError: the Hub denied access or failed.
    """
    with quiet_libraries():
        from rorchat import hub

        return hub.push(str(model), repository, private=private, dry_run=dry_run, report=report)


def _as_text(path: StrPath | None) -> str | None:
    return None if path is None else str(path)


def _require_folder_of(out: StrPath | None) -> None:
    """Raises UsageError before a long computation whose result could not be written."""
    if out is not None and not Path(out).absolute().parent.is_dir():
        raise UsageError(f"out is {out}: the folder {Path(out).parent} does not exist. Create it, or choose another.")
