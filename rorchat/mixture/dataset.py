"""Shards -> rows: which tokens of which source make the i-th row of training, as a pure function of plan and seed.

The plan says which row of which source comes i-th. Within a source, rows are windows of its token stream in an order
that (seed, name of the source, epoch) decide; any place of that order is computed by itself.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch
from torch.utils.data import Dataset

from rorchat.errors import DataError, MismatchError, RorchatError
from rorchat.mixture.config import MixtureConfig
from rorchat.mixture.plan import Plan
from rorchat.persona import Persona
from rorchat.tokenizer import tokenizer_sha256
from rorchat.tokens.prepare import prepare, template_sha256
from rorchat.tokens.store import TokenStore

FEISTEL_ROUNDS = 8
_WORD = (1 << 64) - 1


def rows_per_epoch(stores: Sequence[TokenStore], block_size: int) -> dict[str, int]:
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
            rows_per_epoch([store], block_size)
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


def open_store(folder: str | Path, tokenizer, name: str | None = None) -> TokenStore:
    """A token store that is there already, made with this tokenizer.

    Args:
        name: by which a mixture knows it; default: the folder's.

    Raises:
        DataError: there is none, or it is damaged.
        MismatchError: its ids are another tokenizer's, or its conversations another template's.
    """
    store = TokenStore(folder, name)
    if store.manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise MismatchError(
            f"{store.folder} was made with another tokenizer, of {store.manifest.vocabulary_size:,} tokens: train with "
            "that one, or prepare the texts again."
        )
    if store.manifest.kind == "conversation" and store.manifest.chat_template_sha256 != template_sha256(tokenizer):
        raise MismatchError(
            f"The conversations of {store.folder} have another chat template or system message than the tokenizer: "
            "give the persona that they were written with, or prepare them again."
        )
    return store


class Mixture(Dataset):
    """Training rows: `mixture[i]` is {"input_ids": (block_size,), "labels": (block_size,)}, both int64 and equal.

    Args:
        stores: the token stores of the plan's sources, in any order; others are not read. Those that only the plan's
            past has may be missing: its rows cannot be had then.
        plan: which row of which source comes i-th.
        seed: of the order within sources.
    """

    def __init__(self, stores: Sequence[TokenStore], plan: Plan, seed: int):
        by_name = {store.name: store for store in stores}
        self.stores, self.plan, self.seed = [by_name.get(name) for name in plan.names], plan, seed

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        source, offset = self.locate(row)
        ids = torch.from_numpy(self.stores[source].slice("train", offset, offset + self.plan.block_size))
        return {"input_ids": ids, "labels": ids}

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the source in the plan, offset in its token stream) of a row."""
        source, number = self.plan.locate(row)
        epoch, place = divmod(number, self.plan.windows[source])
        keys = round_keys(f"{self.seed}/{self.plan.names[source]}/{epoch}")  # no other source has a say in the order
        return source, shuffled(place, self.plan.windows[source], keys) * self.plan.block_size


@lru_cache(maxsize=1024)
def round_keys(said: str) -> tuple[int, ...]:
    """The keys of one permutation: 64 bits a round, from any text."""
    digest = hashlib.blake2b(said.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


def shuffled(place: int, size: int, keys: Sequence[int]) -> int:
    """Where a permutation of range(size) takes `place`, without the rest of it.

    A Feistel network permutes the next power of two; what lands behind `size` goes through it again until it does not
    (cycle walking, Black and Rogaway 2002), twice at most on average.
    """
    bits = (size - 1).bit_length()
    if not bits:
        return place
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
    while True:
        high, right = place >> low, place & low_mask
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mixed(right ^ even) & high_mask
            right ^= _mixed(high ^ odd) & low_mask
        place = high << low | right
        if place < size:
            return place


def _mixed(word: int) -> int:
    """Every bit of 64 depends on every other: the finalizer of SplitMix64 (Steele et al. 2014)."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _WORD
    return word ^ word >> 31


class ValidationRows(Dataset):
    """The held-out tokens of a store in rows that overlap by one, so that every token but the first is predicted once.

    `rows[i]` is {"input_ids": (T,), "labels": (T,)} with T = block_size, the last row shorter.
    """

    def __init__(self, store: TokenStore, block_size: int):
        self.store, self.block_size = store, block_size
        self.tokens = store.tokens("validation")

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // (self.block_size - 1))

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        start = row * (self.block_size - 1)
        ids = torch.from_numpy(self.store.slice("validation", start, min(start + self.block_size, self.tokens)))
        return {"input_ids": ids, "labels": ids}
