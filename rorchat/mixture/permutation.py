"""A random permutation of range(size), of which any element is computed without the others."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

FEISTEL_ROUNDS = 8
_WORD = (1 << 64) - 1


@lru_cache(maxsize=1024)
def permutation_keys(said: str) -> tuple[int, ...]:
    """The keys of one permutation: 64 bits a round, from any text."""
    digest = hashlib.blake2b(said.encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[at : at + 8], "little") for at in range(0, len(digest), 8))


def permute(place: int, size: int, keys: Sequence[int]) -> int:
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
