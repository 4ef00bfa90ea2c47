"""Which sources the training loss and the validation loss of a run cover."""

from dataclasses import dataclass
from pathlib import Path

from rorchat.mixture.mixture_file import name_sources
from rorchat.reporting.runs import last_value, read_metrics, read_run_record
from rorchat.validation_split import EVALUATED_SHARE

ROWS = {"sft": "conversations", "dpo": "pairs", "grpo": "questions"}


@dataclass(frozen=True)
class LossRow:
    """What a source adds to the training loss and to the validation loss of a run, in words; "" if nothing.

    Attributes:
        name: the name of the source in metrics.jsonl, as in `eval_NAME_loss`.
        spec: the source, as given.
        loss: its last validation loss; None if it was not measured separately.
    """

    name: str
    spec: str
    training: str
    validation: str
    loss: float | None = None


def list_loss_rows(run: Path) -> list[LossRow]:
    """What each source of a run adds to the losses, replayed documents last. Empty if the run has not finished."""
    record = read_run_record(run)
    data = record.get("data") or []
    mixture = (record.get("inputs") or {}).get("mixture") or {}
    names = list(mixture.get("sources", ()))  # as the mixture file calls them
    if len(names) != len(data):  # a chat stage, or a mixture with a missing source or with an earlier phase
        names = name_sources([source["source"] for source in data])
    keys = ["eval_loss"] if len(data) == 1 else [f"eval_{name}_loss" for name in names]
    metrics = read_metrics(run)
    rows = [
        LossRow(name, source["source"], *_describe(record, source), last_value(metrics, key))
        for name, source, key in zip(names, data, keys, strict=True)
    ]
    settings = record.get("settings") or {}
    if data and settings.get("replay"):
        share = settings.get("replay_share", 0.1)
        rows.append(LossRow("replay", settings["replay"], f"{float(share):.0%} of the tokens, all of them targets", ""))
    return rows


def _describe(record: dict, source: dict) -> tuple[str, str]:
    """(what a source adds to the training loss, and to the validation loss)."""
    share = record.get(EVALUATED_SHARE, 1)
    read = f"{share:.2%} of " if share < 1 else ""
    if "train_tokens" in source:  # a token store
        return f"{source['train_tokens']:,} tokens", f"{read}{source['validation_tokens']:,} tokens"
    kind = ROWS.get(record["stage"], "rows")
    if "validation" not in source:  # a run of an earlier version
        return kind, kind
    held_out = source["validation"]
    return f"{source['kept'] - held_out:,} {kind}", f"{read}{held_out:,} {kind}" if held_out else ""


def list_unvalidated(run: Path) -> list[str]:
    """The names of the sources that are in the training loss of a run, but not in its validation loss."""
    return [row.name for row in list_loss_rows(run) if not row.validation]
