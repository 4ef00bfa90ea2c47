"""The token stores of a mixture: prepared or opened below one folder, and how many rows each one gives."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rorchat.errors import DataError, MismatchError, RorchatError
from rorchat.mixture.config import MixtureConfig
from rorchat.persona import Persona
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import TokenStore, open_store


def count_rows_per_epoch(stores: Sequence[TokenStore], block_size: int) -> dict[str, int]:
    """Rows of one epoch, by the name of the store.

    Raises:
        DataError: a store is smaller than one row.
    """
    windows = {store.name: store.tokens("train") // block_size for store in stores}
    for store in stores:
        if not windows[store.name]:
            raise DataError(
                f"{store.folder} has {store.tokens('train'):,} training tokens, less than one row of "
                f"{block_size}: give more text or a smaller block_size."
            )
    return windows


def prepare_stores(
    config: MixtureConfig,
    tokenizer,
    root: Path,
    block_size: int,
    *,
    validation_share: float,
    seed: int = 0,
    persona: Persona | None = None,
    first: Callable[[], AbstractContextManager] = nullcontext,
) -> list[TokenStore]:
    """The token store of every source of a mixture, below `root` and under the source's name.

    A source that fails and is `optional` is reported and left out, in every process if it fails in one: their plans
    must be the same. `store=FOLDER` is a store that is there already.

    Args:
        first: a context in which one of several processes goes first. The others wait while it tokenizes, and a group
            of processes that waits longer than its timeout (`ddp_timeout`, 30 minutes unless set) is given up: prepare
            what is large before the launch, with `rorchat data prepare`.

    Raises:
        DataError: a source is smaller than one row, or none could be had.
        MismatchError: a store was made with another tokenizer or other settings, or holds out another share of its
            documents than the rest of the mixture.
    """
    stores = []
    for name, source in config.sources.items():
        try:
            kind, _, where = source.spec.partition("=")
            if kind == "store":
                store = open_store(where, tokenizer, name)
                if len(config.sources) > 1:
                    _require_hold_out(store, validation_share)
            else:
                with first():
                    store = prepare(
                        source.spec, tokenizer, root / name, validation_share=validation_share, seed=seed,
                        persona=persona, filters=source.filters, evaluation=list(config.against),
                    )  # fmt: skip
            count_rows_per_epoch([store], block_size)
            stores.append(store)
        except RorchatError as error:
            if not source.optional:
                raise
            _tell(f"source {name} is optional and left out: {error}")
    stores = _had_by_all(stores)
    if not stores:
        raise DataError(f"{config.where}: none of its sources could be had, all are optional.")
    return stores


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)  # noqa: T201


def _had_by_all(stores: list[TokenStore]) -> list[TokenStore]:
    """The stores that every process of a launch has: a disk or the Hub may fail for one of them alone."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return stores
    names: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(names, [store.name for store in stores])
    common = set.intersection(*map(set, names))
    for name in sorted(set().union(*names) - common):
        _tell(f"source {name} is optional and left out: not every process could open it")
    return [store for store in stores if store.name in common]


def _require_hold_out(store: TokenStore, validation_share: float) -> None:
    """Raises MismatchError where documents that other sources hold out could be among a store's training documents."""
    theirs = store.manifest.validation_share
    if not theirs:  # adopted: whole arrays are its validation
        _tell(f"{store.folder} was tokenized elsewhere: what other sources hold out may stand in its training text.")
    elif theirs != validation_share:
        raise MismatchError(
            f"{store.folder} holds out {theirs} of its documents, this mixture {validation_share}: a document of both "
            f"would be trained on in one and validated on in the other. Set validation_share to {theirs}, or prepare "
            "the store again."
        )
