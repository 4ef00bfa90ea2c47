"""Every row of a mixture is a pure function of its number."""

import numpy as np
import pytest
import torch
from mixture_support import CountingStore
from support import locate_rows

from rorchat.errors import DataError
from rorchat.mixture.dataset import Mixture, ValidationRows, limit_validation
from rorchat.mixture.mixture_file import MixtureConfig, Phase, Source
from rorchat.mixture.plan import Plan
from rorchat.mixture.stores import count_rows_per_epoch


@pytest.fixture
def stores() -> list[CountingStore]:
    return [CountingStore(f"s{n}", size, first=10_000 * n) for n, size in enumerate((1000, 333, 2050))]


def mixture_of(stores, weights, block_size, rows, seed=0) -> Mixture:
    given = None if weights is None else {store.name: w for store, w in zip(stores, weights, strict=True)}
    config = MixtureConfig({store.name: Source("text") for store in stores}, (Phase(share=1.0, weights=given),))
    return Mixture(stores, Plan(config, count_rows_per_epoch(stores, block_size), rows, block_size), seed)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [1, 1000, 1], [3, 0.001, 8], None])
def test_shares_are_exact_at_every_prefix_within_one_row(weights, stores):
    dataset = mixture_of(stores, weights, block_size=10, rows=3000)
    given = np.array(weights or [100, 33, 205], dtype=float)  # without weights: whole rows of each source
    sources = locate_rows(dataset.plan)[:, 0]
    seen = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 3001)[:, None] * (given / given.sum())
    assert np.abs(seen - expected).max() <= 1


def test_a_row_is_a_pure_function_of_its_number(stores):
    first = mixture_of(stores, [5, 2, 3], block_size=16, rows=400, seed=7)
    longer = mixture_of(stores, [5, 2, 3], block_size=16, rows=900, seed=7)
    expected = [first[row]["input_ids"].tolist() for row in range(400)]
    assert [longer[row]["input_ids"].tolist() for row in reversed(range(400))][::-1] == expected
    order = np.random.default_rng(0).permutation(400)
    again = mixture_of(stores[::-1], [3, 2, 5], block_size=16, rows=400, seed=7)
    again.plan.locate(399)
    assert sorted(map(tuple, expected)) == sorted(tuple(again[int(row)]["input_ids"].tolist()) for row in order)


def test_a_row_is_a_slice_of_its_source_with_equal_labels(stores):
    dataset = mixture_of(stores, [5, 2, 3], block_size=16, rows=300)
    assert len(dataset) == 300
    for row in range(300):
        source, offset = dataset.locate(row)
        ids, labels = dataset[row]["input_ids"], dataset[row]["labels"]
        first = 10_000 * source + offset
        assert ids.tolist() == list(range(first, first + 16)) == labels.tolist()
        assert offset % 16 == 0 and ids.dtype == labels.dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[300]


def test_every_epoch_has_each_row_of_a_source_once_in_a_new_order(stores):
    dataset = mixture_of(stores, [1, 1, 1], block_size=10, rows=3000)
    for source, rows_per_epoch in enumerate((100, 33, 205)):
        offsets = [offset for s, offset in map(dataset.locate, range(3000)) if s == source]
        assert len(offsets) == 1000
        starts = range(0, 1000 - rows_per_epoch + 1, rows_per_epoch)
        epochs = [offsets[start : start + rows_per_epoch] for start in starts]
        assert len(epochs) == 1000 // rows_per_epoch >= 4
        for epoch in epochs:
            assert sorted(epoch) == [10 * window for window in range(rows_per_epoch)]
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_another_seed_gives_another_order_of_the_same_rows(stores):
    first, other = (mixture_of(stores, [5, 2, 3], block_size=10, rows=500, seed=seed) for seed in (0, 1))
    assert (locate_rows(first.plan) == locate_rows(other.plan)).all()
    differing = sum(first.locate(row) != other.locate(row) for row in range(500))
    assert differing > 400


def test_an_added_source_keeps_the_order_within_the_others(stores):
    two = mixture_of(stores[:2], [1, 1], block_size=10, rows=60)
    three = mixture_of(stores[::-1], [1, 1, 1], block_size=10, rows=90)
    for name in ("s0", "s1"):
        before, after = (
            [offset for s, offset in map(dataset.locate, range(len(dataset))) if dataset.stores[s].name == name]
            for dataset in (two, three)
        )
        assert before == after and len(before) == 30


def test_a_source_smaller_than_one_row_is_a_data_error(stores):
    with pytest.raises(DataError, match="s1 has 333 training tokens, less than one row of 500"):
        count_rows_per_epoch(stores, 500)


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 19, 20, 100, 101])
def test_validation_rows_predict_every_token_but_the_first_exactly_once(tokens):
    store = CountingStore("s", 100, validation=tokens, first=500)
    rows = ValidationRows(store, block_size=10)
    predicted, widths = [], []
    for number in range(len(rows)):
        row = rows[number]
        assert row["input_ids"].tolist() == row["labels"].tolist()
        widths.append(len(row["labels"]))
        predicted += row["labels"][1:].tolist()  # the loss shifts the labels: the first label of a row is not used
    assert predicted == list(range(501, 500 + tokens))
    assert all(width == 10 for width in widths[:-1]) and 2 <= widths[-1] <= 10


@pytest.mark.parametrize(
    ("max_tokens", "expected"), [(0, (11, 45, 223)), (5000, (11, 45, 223)), (500, (2, 8, 44)), (9, (1, 1, 1))]
)
def test_an_evaluation_reads_the_same_share_of_every_source_evenly_spaced(max_tokens, expected):
    """The sources have 100, 400 and 2,001 tokens, in rows of 10."""
    stores = [CountingStore(f"s{n}", 100, validation=size) for n, size in enumerate((100, 400, 2001))]
    by_name = {store.name: ValidationRows(store, block_size=10) for store in stores}
    limited = limit_validation(by_name, max_tokens)
    assert tuple(len(rows) for rows in limited.values()) == expected
    for name, rows in limited.items():
        starts = [int(row["input_ids"][0]) for row in rows]
        gaps = np.diff([*(start // 9 for start in starts), len(by_name[name])])
        assert starts[0] == 0 and gaps.min() > 0 and np.ptp(gaps) <= 1
        again = limit_validation(by_name, max_tokens)[name]
        assert [int(row["input_ids"][0]) for row in again] == starts
