"""Hashes of texts and the validation split, licences, and what the loss counts by kind of row."""

import hashlib
import zlib

# What the loss of training counts, by the kind of rows
LOSS_BY_KIND = {
    "document": "every token",
    "conversation": "replies and their <|im_end|>",
    "preference": "chosen over rejected",
    "question": "sampled replies, by their rewards",
}


def licence_restriction(licence: str) -> str:
    """What a licence keeps its user from, in a few words; empty where nothing needs saying."""
    if "not for commercial use" in licence:
        return "not for commercial use"
    return "no licence stated" if licence.startswith("unstated") else ""


_BLANKS = b" \t\n\r\v\f"

_PIECE = 2**20  # characters; so that a book of 100 MB is not copied whole


def text_digest(text: str) -> bytes:
    """32 bytes that tell a text from any other, but not from itself in other case or with other white space.

    So the hold-out is decided: what may be a copy falls on the same side.
    """
    sha256 = hashlib.sha256()
    for start in range(0, len(text), _PIECE):
        piece = text if len(text) <= _PIECE else text[start : start + _PIECE]
        sha256.update(piece.lower().encode(errors="surrogatepass").translate(None, _BLANKS))
    return sha256.digest()


def exact_digest(row: dict, digest_of_text: bytes) -> bytes:
    """16 bytes that tell a row from any other, whose words have a `digest`: by these exact duplicates are found.

    Case and white space count, for they are meaning in source code, and so do roles and where a message ends; only
    white space around a document does not.

    The 4 last bytes are a CRC of the text as it stands. That of two texts whose digests agree, and that differ, is
    equal in one case of four billion.
    """
    if "text" in row:
        text = row["text"]
        if text[:1].isspace() or text[-1:].isspace():
            text = text.strip()
    else:
        text = "\0".join(f"{key}\0{turn['role']}\0{turn['content']}" for key, part in row.items() for turn in part)
    crc = 0
    for start in range(0, len(text), _PIECE):
        piece = text if len(text) <= _PIECE else text[start : start + _PIECE]
        crc = zlib.crc32(piece.encode(errors="surrogatepass"), crc)
    return digest_of_text[:12] + crc.to_bytes(4)


def is_validation_digest(digest_of_text: bytes, share: float) -> bool:
    """Whether the text of a digest is held out from training."""
    return int.from_bytes(digest_of_text[:8]) < share * 2**64


def is_validation_text(text: str, share: float) -> bool:
    """Whether a text is held out from training: decided by a hash of its characters, before anything is mixed.

    Exact duplicates, and those that differ in case or white space alone, always fall on the same side.
    """
    return is_validation_digest(text_digest(text), share)
