"""Token stores -> training and validation rows. Row i is a pure function of the plan and the seed.

The plan says which source row i comes from, and how many earlier rows come from that source. Every epoch of a source
visits its rows in a random order that depends only on the seed, the source's name and the number of the epoch.
"""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset, Subset

from rorchat.mixture.permutation import epoch_keys, permute
from rorchat.mixture.plan import Plan
from rorchat.tokens.store import TokenStore


class Mixture(Dataset):
    """Training rows: `mixture[i]` is {"input_ids": (block_size,), "labels": (block_size,)}, both int64.

    The labels are the ids, except in messages of conversations that are not learned, where they are -100.

    Args:
        stores: the token stores of the plan's sources, in any order. Stores that only the previous plan needs may
            be missing; their rows are then not available.
        plan: the source of every row.
        seed: seed of the order within sources.
    """

    def __init__(self, stores: Sequence[TokenStore], plan: Plan, seed: int):
        by_name = {store.name: store for store in stores}
        self.stores, self.plan, self.seed = [by_name.get(name) for name in plan.names], plan, seed

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        source, offset = self.locate(row)
        store = self.stores[source]
        assert store is not None  # only rows of the previous plan need a missing store
        return _read_row(store, "train", offset, offset + self.plan.block_size)

    def has_untrained(self) -> bool:
        """Whether some labels are -100."""
        return any(store.has_untrained("train") for store in self.stores if store)

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the source in the plan, offset in its tokens) of a row."""
        source, number = self.plan.locate(row)
        rows_per_epoch = self.plan.rows_per_epoch[source]
        epoch, index = divmod(number, rows_per_epoch)
        keys = epoch_keys(self.seed, self.plan.names[source], epoch)
        return source, permute(index, rows_per_epoch, keys) * self.plan.block_size


class ValidationRows(Dataset):
    """The validation tokens of a store in rows that overlap by one token, so that all but the first are predicted once.

    `rows[i]` is {"input_ids": (T,), "labels": (T,)} with T = block_size; the last row may be shorter.
    """

    def __init__(self, store: TokenStore, block_size: int):
        self.store, self.block_size = store, block_size
        self.tokens = store.tokens("validation")

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // (self.block_size - 1))

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        start = row * (self.block_size - 1)
        return _read_row(self.store, "validation", start, min(start + self.block_size, self.tokens))


def _read_row(store: TokenStore, split: str, start: int, stop: int) -> dict[str, torch.Tensor]:
    ids = store.slice(split, start, stop)
    labels = store.labels(split, start, ids)
    input_ids = torch.from_numpy(ids)
    return {"input_ids": input_ids, "labels": input_ids if labels is ids else torch.from_numpy(labels)}


def limit_share(tokens: int, max_tokens: int) -> float:
    """The share of a validation split that is read if it has more than `max_tokens`; 1 if that is 0."""
    return min(1.0, max_tokens / tokens) if max_tokens and tokens else 1.0


def choose_evenly(rows: int, share: float) -> list[int]:
    """The numbers of a share of some rows, at least one: evenly spaced, and always the same."""
    count = rows if share >= 1 else min(rows, max(1, int(share * rows)))
    return [index * rows // count for index in range(count)]


def limit_validation(rows_by_name: dict[str, ValidationRows], max_tokens: int) -> dict[str, Subset]:
    """The same share of every source's validation rows, evenly spaced, with at most about `max_tokens` in total."""
    share = limit_share(sum(rows.tokens for rows in rows_by_name.values()), max_tokens)
    return {name: Subset(rows, choose_evenly(len(rows), share)) for name, rows in rows_by_name.items()}
