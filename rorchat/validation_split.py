"""Decides by a hash of its text whether a row belongs to the validation split, and which rows are duplicates."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence

#: Tokens of the validation split that an evaluation reads by default: enough to measure a loss to 0.1 %.
MAX_EVAL_TOKENS = 1_000_000
EVALUATED_SHARE = "evaluated_share"  # in run.json: the share of the validation split that an evaluation reads
_WHITE_SPACE = b" \t\n\r\v\f"
_CHUNK_CHARACTERS = 2**20  # texts are hashed in chunks, so that a book of 100 MB is not copied as a whole


def text_digest(text: str) -> bytes:
    """Returns a 32-byte hash of a text that ignores case and white space.

    The validation split is chosen by this hash, so near-identical copies of a text are always in the same split.
    """
    sha256 = hashlib.sha256()
    for chunk in _chunks(text):
        sha256.update(chunk.lower().encode(errors="surrogatepass").translate(None, _WHITE_SPACE))
    return sha256.digest()


def exact_digest(row: dict, digest: bytes) -> bytes:
    """Returns a 16-byte hash of a row, used to find exact duplicates.

    Unlike `text_digest`, it depends on case and white space (which matter in source code), on roles, on message
    boundaries, and on which messages are learned. White space at the start and end of a document is ignored.

    The hash consists of the first 12 bytes of `digest` and a 4-byte CRC of the exact text. For two different texts with
    the same `text_digest`, the CRCs are equal by chance once in four billion.

    Args:
        digest: the `text_digest` of the row's text.
    """
    if "text" in row:
        text = row["text"]
        if text[:1].isspace() or text[-1:].isspace():
            text = text.strip()
    else:
        text = "\0".join(_describe_turn(key, turn) for key, part in row.items() for turn in part)
    crc = 0
    for chunk in _chunks(text):
        crc = zlib.crc32(chunk.encode(errors="surrogatepass"), crc)
    return digest[:12] + crc.to_bytes(4)


def _describe_turn(key: str, turn: dict) -> str:
    mark = "" if turn.get("train", True) else "\0not learned"
    return f"{key}\0{turn['role']}{mark}\0{turn['content']}"


def _chunks(text: str) -> Iterator[str]:
    if len(text) <= _CHUNK_CHARACTERS:
        yield text
    else:
        yield from (text[start : start + _CHUNK_CHARACTERS] for start in range(0, len(text), _CHUNK_CHARACTERS))


def is_validation_digest(digest: bytes, share: float) -> bool:
    """Whether the text with this `text_digest` is in the validation split, which has a `share` of all texts."""
    return hash_order(digest) < share * 2**64


def hash_order(digest: bytes) -> int:
    """The number by which texts are ordered for the split: the validation split has those with the smallest."""
    return int.from_bytes(digest[:8])


def choose_for_empty_split(orders: Sequence[int], sizes: Sequence[int], empty: str) -> int | None:
    """Chooses the texts that move to a split which has none: all with the returned `hash_order`.

    Of texts that are all in training, those with the smallest order are held out, but not more than half of the whole
    size, because training needs the rest. Of texts that are all held out, those with the largest order are trained on.

    Args:
        orders: the `hash_order` of each text; equal texts have equal orders.
        sizes: the size of each text.
        empty: "train" or "validation".

    Returns:
        None if all texts are equal, so that they cannot be in different splits.
    """
    size_of: dict[int, int] = {}
    for order, size in zip(orders, sizes, strict=True):
        size_of[order] = size_of.get(order, 0) + size
    if len(size_of) < 2:
        return None
    if empty == "train":
        return max(size_of)
    return min(order for order, size in size_of.items() if 2 * size <= sum(sizes))


def describe_moved(empty: str, kind: str, share: float, places: Sequence[str]) -> str:
    """One line about the rows that were moved to a split which would have been empty."""
    shown = "; ".join([*places[:3], *(["..."] if places[3:] else [])])
    if empty == "train":
        return f"validation_share {share:g} would hold out every {kind}: the one with the largest hash is not, {shown}"
    return f"validation_share {share:g} would hold out no {kind}: the one with the smallest hash is, {shown}"


def is_validation_text(text: str, share: float) -> bool:
    """Whether a text is in the validation split. Case and white space are ignored."""
    return is_validation_digest(text_digest(text), share)
