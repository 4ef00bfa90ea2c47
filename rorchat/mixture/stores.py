"""The token stores of a mixture: created or opened, and the number of rows in each."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rorchat.errors import DataError, MismatchError, RorchatError
from rorchat.mixture.mixture_file import MixtureConfig
from rorchat.persona import Persona
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import TokenStore, open_store


def count_rows_per_epoch(stores: Sequence[TokenStore], block_size: int) -> dict[str, int]:
    """store name -> number of training rows in one epoch.

    Raises:
        DataError: a store has less than one row.
    """
    rows_per_epoch = {store.name: store.tokens("train") // block_size for store in stores}
    for store in stores:
        if not rows_per_epoch[store.name]:
            raise DataError(
                f"{store.folder} has {store.tokens('train'):,} training tokens, less than one row of "
                f"{block_size}: give more text or a smaller block_size.{store.manifest.describe_rejects()}"
            )
    return rows_per_epoch


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
    """Opens or creates the token store of every source of a mixture, in the subfolder of `root` with the source's name.

    `store=FOLDER` opens an existing store. If an `optional` source fails, this is reported and the source is omitted;
    if it fails in one process, all processes omit it, because their plans must be equal.

    Args:
        first: a context manager in which one process runs before the others, which wait while it tokenizes. Waiting
            longer than `ddp_timeout` (30 minutes by default) ends the run: prepare large sources before the launch,
            with `rorchat data prepare`.

    Raises:
        DataError: a source has less than one row, or no source is left.
        MismatchError: a store was created with a different tokenizer, different settings, or a validation share that
            differs from the mixture's.
    """
    stores = []
    for name, source in config.sources.items():
        try:
            kind, _, where = source.spec.partition("=")
            if kind == "store":
                store = open_store(where, tokenizer, name)
                if len(config.sources) > 1:
                    _require_validation_share(store, validation_share)
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
            _print_once(f"optional source {name} is omitted: {error}")
    stores = _common_stores(stores)
    if not stores:
        raise DataError(f"{config.where}: all sources are optional, and none is available.")
    return stores


def _print_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)  # noqa: T201


def _common_stores(stores: list[TokenStore]) -> list[TokenStore]:
    """Returns the stores that all processes could open: a disk or the Hub may fail for only one of them."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return stores
    names: list[list[str]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(names, [store.name for store in stores])
    common = set.intersection(*map(set, names))
    for name in sorted(set().union(*names) - common):
        _print_once(f"optional source {name} is omitted: not every process could open it")
    return [store for store in stores if store.name in common]


def _require_validation_share(store: TokenStore, validation_share: float) -> None:
    """Raises MismatchError if training documents of a store may be validation documents of other sources."""
    share = store.manifest.validation_share
    if not share:  # imported: its validation split consists of whole arrays
        _print_once(
            f"{store.folder} was tokenized elsewhere: its training text may contain validation documents of other "
            "sources."
        )
    elif share != validation_share:
        raise MismatchError(
            f"{store.folder} has a validation share of {share}, this mixture {validation_share}: a document that is in "
            f"both could be training data in one and validation data in the other. Set validation_share to {share}, or "
            "prepare the store again."
        )
