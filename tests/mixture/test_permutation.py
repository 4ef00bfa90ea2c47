"""The order within an epoch is a permutation, looks random, and any element of it is computed quickly."""

import time

import numpy as np
import pytest

from rorchat.mixture.permutation import permutation_keys, permute


@pytest.mark.parametrize("size", [*range(1, 34), 63, 64, 65, 97, 128, 1009, 4096, 4097, 10_007])
def test_the_order_of_an_epoch_is_a_permutation(size):
    for name in ("0/text/0", "1/text/0", "0/text/1"):
        keys = permutation_keys(name)
        assert sorted(permute(place, size, keys) for place in range(size)) == list(range(size))


def test_the_order_of_an_epoch_looks_shuffled():
    """Fixed points, rises and distances of neighbours agree with a uniform permutation within four sigma."""
    size = 4000
    for name in ("0/text/0", "0/text/1", "7/c4/0"):
        order = np.array([permute(place, size, permutation_keys(name)) for place in range(size)])
        assert (order == np.arange(size)).sum() <= 6
        assert abs((np.diff(order) > 0).mean() - 0.5) < 4 * (1 / 12 / size) ** 0.5 * 1.05
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / size**0.5
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 4 / size**0.5
        spread = np.histogram2d(np.arange(size), order, bins=8)[0]
        assert ((spread - size / 64) ** 2 / (size / 64)).sum() < 49 + 4 * 98**0.5  # chi squared, 49 degrees of freedom


def test_small_epochs_have_every_order():
    orders = {tuple(permute(place, 3, permutation_keys(f"{seed}/a/0")) for place in range(3)) for seed in range(100)}
    assert len(orders) == 6


def test_an_element_of_a_huge_permutation_takes_a_millisecond():
    keys = permutation_keys("0/huge/0")
    started = time.perf_counter()
    places = {permute(place, 10**9, keys) for place in range(0, 10**9, 10**7)}
    assert len(places) == 100 and (time.perf_counter() - started) / 100 < 0.001
