"""Which vocabularies suit a text: trial tokenizers and how many bytes a token of each stands for."""

from dataclasses import dataclass

from rorchat.chatml import encode_text
from rorchat.tokenizer import train_tokenizer

VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384)
HELD_OUT_SHARE = 0.1  # of the sample: bytes per token are measured on text that the trial tokenizer has not seen
MIN_TRAINING_BYTES = 2_000_000  # of the sample, per 16,384 tokens: a larger vocabulary would be learned from too little


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary size and the mean number of UTF-8 bytes per token on held-out text."""

    size: int
    bytes_per_token: float


def try_vocabularies(sample: str) -> list[Vocabulary]:
    """Trains a tokenizer of every size that the text supports. A second per million characters and size.

    Args:
        sample: some text of every source.
    """
    cut = max(1, int(len(sample) * (1 - HELD_OUT_SHARE)))
    training, held_out = sample[:cut], sample[cut:] or sample
    size_limit = max(VOCABULARIES[0], 16384 * len(training.encode(errors="surrogatepass")) // MIN_TRAINING_BYTES)
    tried = []
    for size in VOCABULARIES:
        if size <= size_limit:
            tokenizer = train_tokenizer([training], size)
            tried.append(Vocabulary(size, measure_bytes_per_token(tokenizer, held_out)))
    return tried


def measure_bytes_per_token(tokenizer, text: str) -> float:
    """The mean number of UTF-8 bytes that a token of the text stands for."""
    (ids,) = encode_text(tokenizer, [text])
    return len(text.encode(errors="surrogatepass")) / max(1, len(ids))
