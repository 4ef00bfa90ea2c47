"""A random permutation of range(size), any element of which is computed without the others."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

FEISTEL_ROUNDS = 8
_MASK_64 = (1 << 64) - 1


@lru_cache(maxsize=1024)
def permutation_keys(seed: str) -> tuple[int, ...]:
    """The keys of a permutation, 64 bits per round, derived from any text."""
    digest = hashlib.blake2b(seed.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


def epoch_keys(seed: int, source: str, epoch: int) -> tuple[int, ...]:
    """The keys of the order of a source's rows in an epoch. They do not depend on other sources."""
    return permutation_keys(f"{seed}/{source}/{epoch}")


def permute(index: int, size: int, keys: Sequence[int]) -> int:
    """The element at `index` of the permutation of range(size) that the keys define.

    A Feistel network permutes range(2**bits), with 2**bits the next power of two. A result beyond `size` is permuted
    again until it is in range (cycle walking, Black and Rogaway 2002), which takes at most two passes on average.
    """
    bits = (size - 1).bit_length()
    if not bits:
        return index
    low = bits // 2
    low_mask, high_mask = (1 << low) - 1, (1 << (bits - low)) - 1
    while True:
        high, right = index >> low, index & low_mask
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= _mix(right ^ even) & high_mask
            right ^= _mix(high ^ odd) & low_mask
        index = high << low | right
        if index < size:
            return index


def _mix(word: int) -> int:
    """The finalizer of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & _MASK_64
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & _MASK_64
    return word ^ word >> 31
