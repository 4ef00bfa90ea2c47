"""The forgetting meter: the loss on what the base's pretraining held out, before a later stage and after it.

Whatever a model learns later costs some of what its base knew (McCloskey and Cohen 1989). The held-out documents are
found by themselves: a run's record names the model that it began with, that model's run its own, and so back to the
pretraining, whose token stores hold them.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import Trainer, TrainerCallback

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.errors import RorchatError, UsageError
from rorchat.evaluation.loss import Loss
from rorchat.inference.engine import resolve_model_path
from rorchat.jsonl import append_json_line
from rorchat.mixture.dataset import ValidationRows
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import find_run
from rorchat.tokens.store import Manifest, TokenStore, open_store, store_folder
from rorchat.training.arguments import TOKENS_FOLDER
from rorchat.training.checkpointing.fingerprint import fingerprint_model

MOST_TOKENS = 50_000  # that are measured, twice a stage


@dataclass(frozen=True)
class BaseText:
    """What forgetting is measured on: rows of ids, where they come from, how many tokens of how many they are.

    `held_out` is the largest share of the documents that its stores hold out; 0 where it is text of a source.
    """

    rows: Dataset | list = field(repr=False)
    where: list[str]
    tokens: int
    of: int | None  # None where the rest was not read
    held_out: float = 0.0

    def describe(self) -> str:
        """What it is, in words."""
        if self.of is None:
            many = f"the first {self.tokens:,}"
        else:
            many = f"{self.tokens:,}" if self.of == self.tokens else f"{self.tokens:,} of {self.of:,}"
        return f"{many} {'held-out ' if self.held_out else ''}tokens of {', '.join(self.where)}"

    def sha256(self) -> str:
        """Of the ids, row by row: by it two measurements are known to be of the same text, wherever it lies."""
        digest = hashlib.sha256()
        for at in range(len(self.rows)):
            digest.update(self.rows[at]["input_ids"].numpy().astype("<i8").tobytes() + b"end")
        return digest.hexdigest()


def runs_behind(model: str) -> Iterator[tuple[Path, dict]]:
    """(folder, run.json) of the runs that led to a model, the last one first, as far back as they are on this disk."""
    seen: set[Path] = set()
    found = find_run(model)
    while found and found[0].resolve() not in seen:
        yield found
        folder, record = found
        seen.add(folder.resolve())
        found = _run_before(folder, record)


def _run_before(folder: Path, record: dict) -> tuple[Path, dict] | None:
    """The run whose model a run began with: where it says, or beside it, with the same weights and tokenizer."""
    said = record["settings"].get("model")
    if not said:
        return None
    for place in (Path(said), folder.parent / Path(said).name):
        if place.is_dir() and fingerprint_model(resolve_model_path(str(place))) == record["inputs"].get("start"):
            return find_run(str(place))
    return None


def stores_of(folder: Path, record: dict, tokenizer) -> list[TokenStore]:
    """The token stores that a pretraining run read and that are still there, made with this tokenizer."""
    root = Path(record["settings"].get("token_store") or folder / TOKENS_FOLDER)
    stores = {}
    for part in (*record.get("past", []), record["inputs"]):
        for name, source in part.get("mixture", {}).get("sources", {}).items():
            kind, _, where = source["spec"].partition("=")
            stores[name] = Path(where) if kind == "store" else root / name
    opened = []
    for name, place in stores.items():
        try:
            opened.append(open_store(place, tokenizer, name))
        except RorchatError:  # gone, damaged, or another tokenizer's: of no use here
            continue
    return [store for store in opened if store.tokens("validation") > 1]


def base_text(given: str | None, model: str, tokenizer, positions: int) -> BaseText | None:
    """The held-out text of the pretraining that a model came from, or of `given`; None where none is to be had.

    Args:
        given: a token store, of which the validation documents count, or a source's spec, of which all do.
        model: a folder or Hub id. Of several pretrainings behind it the first one that has stores is the base's.
        positions: tokens a row, at most.

    Raises:
        UsageError, DataError, MismatchError: `given` cannot be read.
    """
    if given:
        if folder := store_folder(given):
            return _of_stores([open_store(folder, tokenizer)], positions)
        return _of_source(given, tokenizer, positions)
    for folder, record in reversed([*runs_behind(model)]):
        stores = stores_of(folder, record, tokenizer)
        documents = [store for store in stores if store.manifest.kind == "document"]
        if stores:
            return _of_stores(documents or stores, positions)
    return None


def _of_stores(stores: list[TokenStore], positions: int) -> BaseText:
    """Rows of the held-out tokens of all stores alike, evenly spaced where they are more than MOST_TOKENS."""
    rows = [ValidationRows(store, positions) for store in stores]
    share = min(1.0, MOST_TOKENS / sum(each.tokens for each in rows))
    taken = []
    for each in rows:
        count = len(each) if share == 1 else max(1, int(share * len(each)))
        taken.append(Subset(each, [at * len(each) // count for at in range(count)]))
    tokens = [sum(len(rows[at]["input_ids"]) - 1 for at in range(len(rows))) for rows in taken]
    held_out = max(store.manifest.validation_share for store in stores)
    where = [str(store.folder) for store in stores]
    return BaseText(ConcatDataset(taken), where, sum(tokens), sum(each.tokens - 1 for each in rows), held_out)


def _of_source(spec: str, tokenizer, positions: int) -> BaseText:
    """Rows of the first MOST_TOKENS of a source's documents."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids: list[int] = []
    for row in load_rows(spec, "document"):
        ids += [end_of_text, *encode_text(tokenizer, [row["text"]])[0]]
        if len(ids) > MOST_TOKENS:
            break
    whole, ids = len(ids) <= MOST_TOKENS, torch.tensor(ids[: MOST_TOKENS + 1])
    parts = [ids[start : start + positions] for start in range(0, len(ids) - 1, positions - 1)]
    rows = [{"input_ids": part, "labels": part} for part in parts]
    return BaseText(rows, [spec], len(ids) - 1, len(ids) - 1 if whole else None)


class Forgetting(TrainerCallback):
    """Measures the loss on the base's text and logs it: before the first step, and when `after` asks for it.

    A run that goes on does not measure again what its first start has logged. Where it finds another text than that
    one's, it says so and gives no difference.
    """

    def __init__(self, trainer, text: BaseText):
        self.trainer, self.text = trainer, text

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            before, _ = self._logged()
            if state.is_world_process_zero and before and before["sha256"] != self.text.sha256():
                print(  # noqa: T201
                    f"forgetting: the first start measured on {before['text']}, which is another text: there will be "
                    "no difference.",
                    file=sys.stderr,
                )
            return
        if state.is_world_process_zero:
            metrics = self.trainer.metrics
            named = {"text": self.text.describe(), "sha256": self.text.sha256()}
            append_json_line(metrics.path, {"step": 0, "event": "base text", "tokens": 0} | named | metrics.elapsed())
        self._measure()

    def measure_after(self) -> dict[str, float]:
        """The loss now and before the first step, for run.json; without the latter where it is not of this text."""
        text, before = self._logged()
        if text.get("sha256") != self.text.sha256():
            before = {}
        return self._measure() | {f"{name}_before": value for name, value in before.items()}

    def _logged(self) -> tuple[dict, dict[str, float]]:
        """(text, loss on it) before the first step; both empty where nothing was measured then."""
        path, text = self.trainer.metrics.path, {}
        for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else ():
            record = json.loads(line) if line else {}
            if record.get("event") == "base text":
                text = record
            elif text and "base_loss" in record:
                return text, {name: record[name] for name in ("base_loss", "base_bits_per_byte")}
        return {}, {}

    def _measure(self) -> dict[str, float]:
        trainer = self.trainer
        with trainer.metrics.pause():
            loss: Loss = trainer.loss_on({"": self.text.rows})[""]
        found = {"base_loss": loss.per_token, "base_bits_per_byte": loss.bits_per_byte, "base_tokens": loss.tokens}
        # not through TRL's `log`, which would add its averages of the steps since the last line
        Trainer.log(trainer, trainer.metrics.complete(dict(found), trainer.state.global_step))
        return found


def forgetting_of(trainer, arguments, positions: int) -> Forgetting | None:
    """The meter of a stage that begins with a model; None, and a line that says so, where nothing can be measured.

    Raises:
        UsageError: what it would be measured on is among what is replayed or mixed.
    """
    model, given = arguments.model, arguments.base_text
    if not model and not given:
        return None
    text = base_text(given, model, trainer.chat.tokenizer, positions)
    if text:
        _require_unseen(text, arguments)
    if trainer.is_world_process_zero():
        print(_told(text, model, arguments), file=sys.stderr)  # noqa: T201
    return Forgetting(trainer, text) if text else None


def _require_unseen(text: BaseText, arguments) -> None:
    """Raises UsageError where the documents that come are those that are measured on."""
    replay = arguments.replay_source()
    mixed = [replay] if arguments.resolved_mixture() is None else arguments.source_specs()
    if not text.held_out and set(mixed) & set(text.where):
        raise UsageError(
            f"base_text {text.where[0]} is what is trained on, and a source is measured whole: name other text, or a "
            "token store, of which the held-out documents count."
        )
    if replay and not store_folder(replay) and arguments.validation_share < text.held_out:
        raise UsageError(
            f"replay {replay} is split by validation_share {arguments.validation_share}, and {', '.join(text.where)} "
            f"holds out {text.held_out}: some of that would be trained on. Give --validation_share {text.held_out}, or "
            "replay the token store."
        )


def _told(text: BaseText | None, model: str, arguments) -> str:
    if text is None:
        return (
            f"forgetting is not measured: no pretraining with its token stores is known behind {model}. Give "
            "--base_text, a token store or a source."
        )
    said = f"forgetting is measured on {text.describe()}"
    share = _share_here(text, arguments)
    if share is not None and share < text.held_out:
        said += (
            f"; warning: validation_share is {share}, and {text.held_out} there: of what was held out there some may "
            "be trained on here"
        )
    return said


def _share_here(text: BaseText, arguments) -> float | None:
    """The share that is held out of the documents that come here; None where none come, or those of the base."""
    if arguments.resolved_mixture() is not None:
        return arguments.validation_share
    folder = store_folder(arguments.replay_source() or "")
    if not folder or folder.resolve() in {Path(place).resolve() for place in text.where}:
        return None
    return Manifest.read(folder).validation_share
