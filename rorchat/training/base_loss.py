"""Measures the base loss: the loss on the validation split of pretraining, before and after a later stage.

Its increase measures forgetting (McCloskey and Cohen 1989): a later stage makes the model worse at what it learned in
pretraining. The validation text is found through the run.json of each run, which names the model that the run started
from. Followed back, they lead to the pretraining run and its token stores, which contain the validation split.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, Subset
from transformers import Trainer, TrainerCallback

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.errors import RorchatError, UsageError
from rorchat.evaluation.loss import Loss, Rows
from rorchat.inference.engine import resolve_model_path
from rorchat.jsonl import append_json_line
from rorchat.mixture.dataset import ValidationRows
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import find_run
from rorchat.tokens.store import Manifest, TokenStore, open_store, store_folder
from rorchat.training.arguments import TOKENS_FOLDER
from rorchat.training.checkpointing.fingerprint import fingerprint_model

MAX_TOKENS = 50_000  # measured twice per stage
LOSS_NAMES = ("base_loss", "base_bits_per_byte")


@dataclass(frozen=True)
class BaseText:
    """The text on which the base loss is measured.

    Args:
        rows: Rows with `input_ids` and `labels`.
        origins: Folders of token stores, or the spec of a source.
        tokens: Number of predicted tokens (targets) in `rows`.
        available_tokens: Number of targets in the whole text; None if the text was not read to its end.
        validation_share: The largest validation share of the stores; 0 for the text of a source.
    """

    rows: Rows = field(repr=False)
    origins: list[str]
    tokens: int
    available_tokens: int | None
    validation_share: float = 0.0

    def describe(self) -> str:
        if self.available_tokens is None:
            amount = f"the first {self.tokens:,}"
        elif self.available_tokens == self.tokens:
            amount = f"{self.tokens:,}"
        else:
            amount = f"{self.tokens:,} of {self.available_tokens:,}"
        return f"{amount} {'held-out ' if self.validation_share else ''}tokens of {', '.join(self.origins)}"

    def sha256(self) -> str:
        """Returns a hash of the token ids of all rows. It does not depend on where the files are."""
        digest = hashlib.sha256()
        for index in range(len(self.rows)):
            digest.update(self.rows[index]["input_ids"].numpy().astype("<i8").tobytes() + b"end")
        return digest.hexdigest()


def find_previous_runs(model: str) -> Iterator[tuple[Path, dict]]:
    """Yields (folder, run.json) of the runs that led to a model, latest first, as far back as they are on this disk."""
    seen: set[Path] = set()
    run = find_run(model)
    while run and run[0].resolve() not in seen:
        yield run
        folder, record = run
        seen.add(folder.resolve())
        run = _find_initial_run(folder, record)


def _find_initial_run(folder: Path, record: dict) -> tuple[Path, dict] | None:
    """Finds the run whose model a run started from, at the recorded path or next to the run.

    Returns None if there is no such run, or if its model has changed since.
    """
    model = record["settings"].get("model")
    if not model:
        return None
    for path in (Path(model), folder.parent / Path(model).name):
        if path.is_dir() and fingerprint_model(resolve_model_path(str(path))) == record["inputs"].get("start"):
            return find_run(str(path))
    return None


def open_run_stores(folder: Path, record: dict, tokenizer) -> list[TokenStore]:
    """Opens the token stores of a pretraining run that exist, are intact and were created with this tokenizer."""
    root = Path(record["settings"].get("token_store") or folder / TOKENS_FOLDER)
    paths = {}
    for phase in (*record.get("past", []), record["inputs"]):
        for name, source in phase.get("mixture", {}).get("sources", {}).items():
            kind, _, path = source["spec"].partition("=")
            paths[name] = Path(path) if kind == "store" else root / name
    stores = []
    for name, path in paths.items():
        try:
            stores.append(open_store(path, tokenizer, name))
        except RorchatError:  # missing, damaged or made with another tokenizer
            continue
    return [store for store in stores if store.tokens("validation") > 1]


def find_base_text(given: str | None, model: str, tokenizer, n_positions: int) -> BaseText | None:
    """Returns the text given by `base_text`, or else the validation split of the model's pretraining.

    Returns None if neither exists.

    Args:
        given: The setting `base_text`: a token store, of which the validation split is used, or the spec of a source,
            of which all documents are used.
        model: A folder or Hub id. If it was pretrained in several runs, the earliest run with token stores is used.
        n_positions: Maximum number of tokens of a row.

    Raises:
        UsageError, DataError, MismatchError: `given` cannot be read.
    """
    if given:
        if folder := store_folder(given):
            return _read_stores([open_store(folder, tokenizer)], n_positions)
        return _read_source(given, tokenizer, n_positions)
    for folder, record in reversed([*find_previous_runs(model)]):
        stores = open_run_stores(folder, record, tokenizer)
        documents = [store for store in stores if store.manifest.kind == "document"]
        if stores:
            return _read_stores(documents or stores, n_positions)
    return None


def _read_stores(stores: list[TokenStore], n_positions: int) -> BaseText:
    """Returns the validation rows of all stores. Above MAX_TOKENS, uses an equal share of each, evenly spaced."""
    rows_by_store = [ValidationRows(store, n_positions) for store in stores]
    share = min(1.0, MAX_TOKENS / sum(rows.tokens for rows in rows_by_store))
    subsets = []
    for rows in rows_by_store:
        count = len(rows) if share == 1 else max(1, int(share * len(rows)))
        subsets.append(Subset(rows, [index * len(rows) // count for index in range(count)]))
    selected: ConcatDataset[dict] = ConcatDataset(subsets)
    return BaseText(
        selected,
        [str(store.folder) for store in stores],
        sum(len(selected[index]["input_ids"]) - 1 for index in range(len(selected))),
        sum(rows.tokens - 1 for rows in rows_by_store),
        max(store.manifest.validation_share for store in stores),
    )


def _read_source(spec: str, tokenizer, n_positions: int) -> BaseText:
    """Returns the first MAX_TOKENS of a source's documents, cut into rows that overlap by one token."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids: list[int] = []
    for row in load_rows(spec, "document"):
        ids += [end_of_text, *encode_text(tokenizer, [row["text"]])[0]]
        if len(ids) > MAX_TOKENS:
            break
    read = torch.tensor(ids[: MAX_TOKENS + 1])
    parts = [read[start : start + n_positions] for start in range(0, len(read) - 1, n_positions - 1)]
    rows = [{"input_ids": part, "labels": part} for part in parts]
    return BaseText(rows, [spec], len(read) - 1, len(read) - 1 if len(ids) <= MAX_TOKENS else None)


class BaseLossCallback(TrainerCallback):
    """Measures and logs the base loss before the first step, and whenever `measure_after` is called.

    A resumed run does not repeat the first measurement. If its text differs from the text of the first measurement, the
    increase of the loss is not reported.
    """

    def __init__(self, trainer, text: BaseText):
        self.trainer, self.text = trainer, text

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            if state.is_world_process_zero:
                metrics = self.trainer.metrics
                event = {"step": 0, "event": "base text", "tokens": 0}
                event |= {"text": self.text.describe(), "sha256": self.text.sha256()}
                append_json_line(metrics.path, event | metrics.elapsed())
            self._measure()
            return
        first_text, _ = self._read_first_measurement()
        if state.is_world_process_zero and first_text and first_text["sha256"] != self.text.sha256():
            print(  # noqa: T201
                f"base loss: the run started with a different text, {first_text['text']}. The change is not reported.",
                file=sys.stderr,
            )

    def measure_after(self) -> dict[str, float]:
        """Measures the loss. Also returns the loss before the first step, if it was measured on the same text."""
        text, before = self._read_first_measurement()
        if text.get("sha256") != self.text.sha256():
            before = {}
        return self._measure() | {f"{name}_before": value for name, value in before.items()}

    def _read_first_measurement(self) -> tuple[dict, dict[str, float]]:
        """Returns the event with the text and the loss before the first step, or two empty dictionaries."""
        path = self.trainer.metrics.path
        text: dict = {}
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
            record = json.loads(line) if line else {}
            if record.get("event") == "base text":
                text = record
            elif text and "base_loss" in record:
                return text, {name: record[name] for name in LOSS_NAMES}
        return {}, {}

    def _measure(self) -> dict[str, float]:
        trainer = self.trainer
        with trainer.metrics.pause():
            loss: Loss = trainer.loss_on({"": self.text.rows})[""]
        values = dict(zip(LOSS_NAMES, (loss.per_token, loss.bits_per_byte), strict=True)) | {"base_tokens": loss.tokens}
        # not TRL's `log`, which would add its averages over the steps since the last log entry
        Trainer.log(trainer, trainer.metrics.complete(dict(values), trainer.state.global_step))
        return values


def create_base_loss_callback(trainer, arguments, n_positions: int) -> BaseLossCallback | None:
    """Creates the callback of a stage that starts from a model. Without a text, prints a message and returns None.

    Raises:
        UsageError: the stage would train on the text.
    """
    model, given = arguments.model, arguments.base_text
    if not model and not given:
        return None
    text = find_base_text(given, model, trainer.chat.tokenizer, n_positions)
    if text:
        _check_not_trained_on(text, arguments)
    if trainer.is_world_process_zero():
        print(_startup_message(text, model, arguments), file=sys.stderr)  # noqa: T201
    return BaseLossCallback(trainer, text) if text else None


def _check_not_trained_on(text: BaseText, arguments) -> None:
    replay = arguments.replay_source()
    trained_specs = [replay] if arguments.resolved_mixture() is None else arguments.source_specs()
    if not text.validation_share and set(trained_specs) & set(text.origins):
        raise UsageError(
            f"base_text {text.origins[0]} is also training data: the base loss would be measured on all of its "
            "documents. Give a different text, or a token store, of which only the validation split is used."
        )
    if replay and not store_folder(replay) and arguments.validation_share < text.validation_share:
        raise UsageError(
            f"replay {replay} is split with validation_share {arguments.validation_share}, but the base text "
            f"{', '.join(text.origins)} with {text.validation_share}: parts of its validation split would be trained "
            f"on. Give --validation_share {text.validation_share}, or replay the token store."
        )


def _startup_message(text: BaseText | None, model: str, arguments) -> str:
    if text is None:
        return (
            f"base loss: not measured, because no pretraining run with token stores was found for {model}. To "
            "measure it, pass a token store or a source as --base_text."
        )
    message = f"base loss: measured on {text.describe()}, before and after this stage; if it rises, the model forgets"
    share = _training_validation_share(text, arguments)
    if share is not None and share < text.validation_share:
        message += (
            f"; warning: this stage has validation_share {share}, but the text was split with "
            f"{text.validation_share}, so parts of it may be trained on"
        )
    return message


def _training_validation_share(text: BaseText, arguments) -> float | None:
    """Returns the validation share of this stage's documents, or None if they are those of the text."""
    if arguments.resolved_mixture() is not None:
        return arguments.validation_share
    folder = store_folder(arguments.replay_source() or "")
    if not folder or folder.resolve() in {Path(path).resolve() for path in text.origins}:
        return None
    return Manifest.read(folder).validation_share
