"""Which vocabularies suit a text: trial tokenizers and how many bytes a token of each stands for."""

from dataclasses import dataclass

from rorchat.chatml import encode_text
from rorchat.tokenizer import train_tokenizer

VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384)
HELD_OUT_SHARE = 0.1  # of a sample: bytes per token are measured on text that the trial tokenizer has not seen
MIN_TRAINING_BYTES = 2_000_000  # of the sample, per 16,384 tokens: a larger vocabulary would be learned from too little


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary size, and the mean number of UTF-8 bytes per token in documents and in the text of chats."""

    size: int
    bytes_per_token: float
    chat_bytes_per_token: float


def try_vocabularies(documents: str, chats: str, *, is_all: bool) -> list[Vocabulary]:
    """Trains a tokenizer of every size that the text supports. A second per million characters and size.

    Args:
        is_all: whether this is all the text that there is. Then the tokens are counted in the text that the tokenizers
            are trained on, as in the project; else in a tenth that they have not seen, because most of the text will
            be new to them.
    """
    parts = [documents, chats]
    training, measured = parts, parts
    if not is_all:
        cuts = [int(len(text) * (1 - HELD_OUT_SHARE)) for text in parts]
        training = [text[:cut] for text, cut in zip(parts, cuts, strict=True)]
        measured = [text[cut:] for text, cut in zip(parts, cuts, strict=True)]
    training_bytes = sum(len(text.encode(errors="surrogatepass")) for text in training)
    size_limit = max(VOCABULARIES[0], 16384 * training_bytes // MIN_TRAINING_BYTES)
    tried = []
    for size in VOCABULARIES:
        if size <= size_limit:
            tokenizer = train_tokenizer(training, size)
            tried.append(Vocabulary(size, *(measure_bytes_per_token(tokenizer, text) for text in measured)))
    return tried


def measure_bytes_per_token(tokenizer, text: str) -> float:
    """The mean number of UTF-8 bytes that a token of the text stands for."""
    (ids,) = encode_text(tokenizer, [text])
    return len(text.encode(errors="surrogatepass")) / max(1, len(ids))
