"""Which vocabularies suit a text: trial tokenizers and how many bytes a token of each stands for."""

from dataclasses import dataclass

from rorchat.chatml import encode_text
from rorchat.tokenizer import train_tokenizer

VOCABULARIES = (512, 1024, 2048, 4096, 8192, 16384)
HELD_OUT_SHARE = 0.1  # of a sample: bytes per token are measured on text that the trial tokenizer has not seen
MIN_GAIN = 1.02  # in bytes per token, from one size to the next
TRAINING_CHARACTERS = 2_000_000  # of trial tokenizers
MIN_TRAINING_BYTES = 2_000_000  # of documents, per 16,384 tokens: a larger vocabulary would be learned from too little


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary size, and the mean number of UTF-8 bytes per token in documents and in the text of chats."""

    size: int
    bytes_per_token: float
    chat_bytes_per_token: float


@dataclass(frozen=True)
class Sample:
    """Some text of the documents or of the chats.

    Attributes:
        utf8_bytes: the size of all text that the sample is from.
        is_all: whether the sample has all of it.
    """

    text: str
    utf8_bytes: int
    is_all: bool

    @property
    def training(self) -> str:
        """What trial tokenizers are trained on: the whole text, or all but HELD_OUT_SHARE of a sample."""
        return self.text if self.is_all else self.text[: self._cut]

    @property
    def measured(self) -> str:
        """In which bytes per token are counted: the whole text, or of a sample what the tokenizers have not seen."""
        return self.text if self.is_all else self.text[self._cut :]

    @property
    def _cut(self) -> int:
        return int(len(self.text) * (1 - HELD_OUT_SHARE))


def try_vocabularies(documents: Sample, chats: Sample) -> list[Vocabulary]:
    """Trains tokenizers of rising size, as far as the text supports them. A second per million characters and size.

    The tokenizers are trained on documents and chats in proportion to their sizes, as that of the project.
    """
    samples = (documents, chats)
    total = sum(sample.utf8_bytes for sample in samples)
    training = [s.training[: max(1, TRAINING_CHARACTERS * s.utf8_bytes // total)] for s in samples]
    size_limit = max(VOCABULARIES[0], 16384 * documents.utf8_bytes // MIN_TRAINING_BYTES)
    tried: list[Vocabulary] = []
    for size in VOCABULARIES:
        if size > size_limit:
            break
        tokenizer = train_tokenizer(training, size)
        vocabulary = Vocabulary(size, *(measure_bytes_per_token(tokenizer, s.measured) for s in samples))
        if tried and vocabulary.bytes_per_token < MIN_GAIN * tried[-1].bytes_per_token:
            break  # the text has no more words: the additional tokens would be parts of rare ones
        tried.append(vocabulary)
    return tried


def measure_bytes_per_token(tokenizer, text: str) -> float:
    """The mean number of UTF-8 bytes that a token of the text stands for."""
    (ids,) = encode_text(tokenizer, [text])
    return len(text.encode(errors="surrogatepass")) / max(1, len(ids))
