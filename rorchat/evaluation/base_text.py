"""The text on which the base loss of a model is measured: by default, the validation split of its pretraining.

The text is found through the run.json of each run, which names the model that the run started from. Followed back, they
lead to the pretraining run and its token stores, which contain the validation split.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.errors import RorchatError
from rorchat.evaluation.loss import Rows
from rorchat.lineage import find_previous_runs
from rorchat.mixture.dataset import ValidationRows, limit_validation
from rorchat.sources.registry import load_rows
from rorchat.tokens.store import TOKENS_FOLDER, TokenStore, open_store, store_folder

MAX_TOKENS = 50_000  # a stage measures it twice


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
    rows_by_folder = {str(store.folder): ValidationRows(store, n_positions) for store in stores}
    selected: ConcatDataset[dict] = ConcatDataset(limit_validation(rows_by_folder, MAX_TOKENS).values())
    return BaseText(
        selected,
        [*rows_by_folder],
        sum(len(selected[index]["input_ids"]) - 1 for index in range(len(selected))),
        sum(rows.tokens - 1 for rows in rows_by_folder.values()),
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
