"""Bits per byte of texts, from their log-likelihoods."""

import evaluate
from datasets import Features, Value

from rorchat.evaluation.evaluate_metrics.base import CITATION, InMemoryMetric
from rorchat.evaluation.text_measures import bits_per_byte

DESCRIPTION = """\
Bits that a language model needs per UTF-8 byte of text. Unlike loss per token and perplexity, it can be
compared between tokenizers, and with a file compressor."""

INPUTS = """
Args:
    predictions: the negative log-likelihood of each text in nats, summed over its tokens.
    references: the texts.
Returns:
    bits_per_byte: lower is better; 8 for a uniform distribution over bytes, NaN for no text.
Examples:
    >>> from rorchat.evaluation.evaluate_metrics import BitsPerByte
    >>> result = BitsPerByte().compute(predictions=[8.5, 13.0], references=["Hello", "Bonjour"])
    >>> round(result["bits_per_byte"], 3)
    2.585
"""


class BitsPerByte(InMemoryMetric):
    def _info(self) -> evaluate.MetricInfo:
        features = Features(predictions=Value("float64"), references=Value("string"))
        return evaluate.MetricInfo(DESCRIPTION, CITATION, features, inputs_description=INPUTS)

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float]:
        return {"bits_per_byte": bits_per_byte(sum(predictions), sum(len(text.encode()) for text in references))}
