"""Shards -> rows: which tokens of which source make the i-th row of training, as a pure function of the plan.

Sources are mixed by tokens, not by documents. The k-th row of a source with share w stands at (k + 1/2) / w; all rows
sorted by that position give exact shares at every prefix, without a random draw. Within a source, rows are windows of
its token stream in an order drawn from (seed, source, epoch).
"""

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import Dataset

from rorchat.errors import DataError, UsageError
from rorchat.tokens.store import TokenStore


class Mixture(Dataset):
    """Training rows: `mixture[i]` is {"input_ids": (block_size,), "labels": (block_size,)}, both int64 and equal.

    Args:
        stores: one token store a source.
        weights: shares of the tokens, in any scale; None gives every source the share of its size.
        block_size: tokens a row.
        rows: how many rows in all; sources are repeated, reshuffled, where they have fewer.
        seed: of the order within sources.

    Raises:
        UsageError: weights of another number than sources, or not positive.
        DataError: a source is smaller than one row.
    """

    def __init__(
        self, stores: Sequence[TokenStore], weights: Sequence[float] | None, block_size: int, rows: int, seed: int
    ):
        self.stores, self.block_size, self.seed = list(stores), block_size, seed
        self.windows = [store.tokens("train") // block_size for store in stores]
        for store, windows in zip(stores, self.windows, strict=True):
            if not windows:
                raise DataError(
                    f"{store.folder} has {store.tokens('train'):,} training tokens, less than one row of "
                    f"{block_size}: give more text or a smaller block_size."
                )
        weights = list(weights or self.windows)
        if len(weights) != len(stores) or not all(0 < weight < math.inf for weight in weights):
            raise UsageError(
                f"{len(weights)} weights {weights} for {len(stores)} sources: give one positive number a source."
            )
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        self.source_of_row, self.number_of_row = _merged(self.shares, rows)

    def __len__(self) -> int:
        return len(self.source_of_row)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        source, offset = self.locate(row)
        ids = torch.from_numpy(self.stores[source].slice("train", offset, offset + self.block_size))
        return {"input_ids": ids, "labels": ids}

    def locate(self, row: int) -> tuple[int, int]:
        """(source, offset in its token stream) of a row, found without reading the rows before it."""
        source = int(self.source_of_row[row])
        epoch, window = divmod(int(self.number_of_row[row]), self.windows[source])
        return source, int(self._order(source, epoch)[window]) * self.block_size

    @lru_cache(maxsize=8)  # noqa: B019  one mixture lives as long as its run
    def _order(self, source: int, epoch: int) -> np.ndarray:
        name = zlib.crc32(self.stores[source].name.encode())  # a source added later leaves the others' order alone
        return np.random.default_rng([self.seed, name, epoch]).permutation(self.windows[source])

    def plan(self) -> list[dict[str, object]]:
        """What each source contributes: its share, rows, tokens and epochs."""
        rows = np.bincount(self.source_of_row, minlength=len(self.stores))
        return [
            {
                "source": store.manifest.source,
                "share": float(share),
                "tokens": int(count) * self.block_size,
                "epochs": float(count) / windows,
            }
            for store, share, count, windows in zip(self.stores, self.shares, rows, self.windows, strict=True)
        ]

    def told(self) -> str:
        """The plan in words: `tinytown=12000: 1,843,200 tokens, 100.0 % of all, 2.3 epochs`."""
        return "\n".join(
            f"{part['source']}: {part['tokens']:,} tokens, {100 * part['share']:.1f} % of all, "
            f"{part['epochs']:.1f} epochs"
            for part in self.plan()
        )


def _merged(shares: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(source, number within the source) of every row, in the order of (number + 1/2) / share."""
    counts = np.ceil(shares * rows).astype(np.int64) + 1  # one more than fits, so that the cut at `rows` decides
    sources = np.repeat(np.arange(len(shares)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((numbers + 0.5) / shares[sources], kind="stable")[:rows]
    return sources[order].astype(np.int16), numbers[order]


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
